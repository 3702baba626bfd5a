"""Labels, probabilities and energies of images as people have them: files, arrays, what a camera gave."""

import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from timm_jem.decoding import BrokenImage, open_image, upright
from timm_jem.energy import energy
from timm_jem.errors import InputError, check_whole, program, quoted
from timm_jem.inputs import is_floats, kind
from timm_jem.preprocessing import Preprocessing
from timm_jem.reference import Reference

__all__ = ["Prediction", "Predictor", "imagenet_names"]

_GIVE = (
    "give the name of a file, a PIL image, a uint8 array (H, W) or (H, W, C), a uint8 tensor (C, H, W), or model input, a "
    "floating-point tensor (C, H, W)"
)
_IMAGENET = re.compile("(^|_)in(1|12|21|22)k(_|$)")  # in timm's tags of weights


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        label: name of the likeliest class, or its number where the model has no names.
        y: its number.
        p: its probability p(y|x): calibrated with ``temperature``, or, where that is None, as the network has it.
        probabilities: p(y|x) of all classes, float64, shape (num_classes,), on the CPU.
        energy: E(x), nats; lower = likelier.
        percentile: how many of the held-out images have at most this energy, %; None: the model has no reference.
        outlier: whether the energy is above that at which the reference accepts its share; None: the model has no reference.
        temperature: see ``p``.
    """

    label: str
    y: int
    p: float
    probabilities: Tensor = field(repr=False, compare=False)
    energy: float
    percentile: float | None
    outlier: bool | None
    temperature: float | None


@dataclass(frozen=True)
class Predictor:
    """What predictions need of a model.

    Attributes:
        see: how it takes images.
        classify: model input, shape (B, C, H, W), to logits, floating-point, on the CPU, shape (B, num_classes).
        names: of the classes; None: their numbers.
        reference: held-out images that others are compared with, or None.
    """

    see: Preprocessing
    classify: Callable[[Tensor], Tensor]
    names: Sequence[str] | None = None
    reference: Reference | None = None

    def predict(self, images: Any, *, batch_size: int = 64) -> Prediction | list[Prediction]:
        """One prediction of one image, a list of a batch or list; see :meth:`timm_jem.JEM.predict`.

        Raises:
            InputError: something else, or an image that can't be used.
        """
        items, alone = _items(images)
        found = []
        for outcome in self.stream(items, batch_size=batch_size):
            if isinstance(outcome, BrokenImage):
                raise outcome
            found.append(outcome)
        return found[0] if alone else found

    def model_input(self, images: Any) -> Tensor:
        """The images as the model takes them, shape (B, C, H, W); what is given as such is not checked.

        Raises:
            InputError: as :meth:`inputs`, no images, or model input of several shapes.
        """
        items, _ = _items(images)
        batches = list(self.inputs(items, batch_size=max(1, len(items))))
        if len(batches) != 1:
            raise InputError(
                f"{len(items)} images make {len(batches)} batches: give at least one, and model input of one shape"
            )
        return batches[0]

    def stream(self, items: Iterable, *, batch_size: int = 64, workers: int = 0) -> Iterator[Prediction | BrokenImage]:
        """A prediction of each image in order, or why there is none; about three batches are in memory.

        Args:
            items: images.
            batch_size: images through the network at once.
            workers: threads that decode while the network is busy with other images; 0: the calling thread does.

        Raises:
            InputError: the model gives logits that are not finite, or ``items`` raised it.
        """
        for loaded, batch in self._batches(items, batch_size, workers):
            found = iter(self._predictions(self.classify(torch.stack(batch))) if batch else ())
            for part in loaded:
                yield next(found) if isinstance(part, Tensor) else part

    def inputs(self, items: Iterable, *, batch_size: int = 64, workers: int = 0) -> Iterator[Tensor]:
        """The images as the model takes them, shape (B, C, H, W), batch after batch; arguments as :meth:`stream`'s.

        Raises:
            InputError: an image that can't be used.
        """
        for loaded, batch in self._batches(items, batch_size, workers):
            if broken := [part for part in loaded if isinstance(part, BrokenImage)]:
                raise broken[0]
            yield torch.stack(batch)

    def _batches(self, items: Iterable, batch_size: int, workers: int) -> Iterator[tuple[list, list[Tensor]]]:
        """What was loaded, in order, and the images among that, of one make and as many as a batch has."""
        check_whole("batch_size", batch_size, 1)
        check_whole("workers", workers, 0)
        loaded, batch = [], []
        for part in self._loaded(items, workers, 2 * batch_size):
            if isinstance(part, Tensor):
                if len(batch) == batch_size or (batch and _make(part) != _make(batch[0])):
                    yield loaded, batch
                    loaded, batch = [], []
                batch.append(part)
            loaded.append(part)
        if loaded:
            yield loaded, batch

    def _loaded(self, items: Iterable, workers: int, ahead: int) -> Iterator[Tensor | BrokenImage]:
        def load(number: int, item: Any) -> Tensor | BrokenImage:
            try:
                return self._load(item, number)
            except BrokenImage as error:
                return error

        if not workers:
            yield from itertools.starmap(load, enumerate(items))
            return
        # A thread that decodes has one core; threads that PyTorch meets later take over what was set last.
        threads = torch.get_num_threads()
        pool, pending = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)), deque()
        try:
            for number, item in enumerate(items):
                pending.append(pool.submit(load, number, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _load(self, item: Any, number: int) -> Tensor:
        """Model input, shape (C, H, W)."""
        if is_floats(item) and item.ndim == 3:
            return item
        path = _path(item)
        what = f"image {number}" if path is None else path
        return self.see(_picture(item, what) if path is None else _read(path), what)

    def _predictions(self, logits: Tensor) -> list[Prediction]:
        energies, y = energy(logits), logits.argmax(1)
        if broken := int((~energies.isfinite()).sum()):
            raise InputError(f"the model gives energies that are not finite for {broken} of {len(logits)} images: it is broken")
        reference = self.reference
        temperature = None if reference is None else reference.temperature
        p = (logits.double() / (1 if temperature is None else temperature)).softmax(1)
        percentiles = itertools.repeat(None) if reference is None else reference.percentiles(energies)
        return [
            Prediction(
                label=str(one) if self.names is None else self.names[one],
                y=one,
                p=of_all[one].item(),
                probabilities=of_all.clone(),  # a view would keep the whole batch
                energy=e,
                percentile=percentile,
                outlier=None if reference is None else e > reference.threshold,
                temperature=temperature,
            )
            for one, of_all, e, percentile in zip(y.tolist(), p, energies.tolist(), percentiles, strict=False)
        ]


def _make(x: Tensor) -> tuple:
    """What the images of one batch have in common."""
    return x.shape, x.dtype, x.device


def _items(images: Any) -> tuple[Sequence, bool]:
    """The images one by one, and whether there was but one."""
    if isinstance(images, (list, tuple)):
        return images, False
    strided = isinstance(images, Tensor) and images.layout == torch.strided
    if (strided or isinstance(images, np.ndarray)) and images.ndim == 4:
        return images, False
    return [images], True


def _picture(item: Any, what: str) -> PILImage.Image:
    """An upright image of 8 bits a channel.

    Raises:
        BrokenImage: no image.
    """
    if isinstance(item, PILImage.Image):
        return upright(item, what)
    if isinstance(item, (np.ndarray, Tensor)):
        return _of_array(item, what)
    raise BrokenImage(f"{what} is {quoted(item)}: {_GIVE}", what)


def _path(item: Any) -> str | None:
    try:
        path = os.fspath(item)
    except TypeError:
        return None
    return path if isinstance(path, str) else None


def _read(path: str) -> PILImage.Image:
    if os.path.isdir(path):
        raise BrokenImage(f"{path} is a folder: give the names of its files, or run {program('predict')}", path)
    if not os.path.lexists(path):
        raise BrokenImage(f"there is no file {quoted(path)}: give the name of an image", path)
    # From the root it is no address of anything elsewhere, whatever the name is.
    return open_image({"bytes": None, "path": os.path.abspath(path)}, path)


def _of_array(item: np.ndarray | Tensor, what: str) -> PILImage.Image:
    if isinstance(item, Tensor) and item.dtype == torch.uint8 and item.layout == torch.strided and not item.is_meta:
        # As torchvision reads files; numpy's images have their channels last.
        item = (item.movedim(0, -1) if item.ndim == 3 else item).cpu().numpy()
    if isinstance(item, Tensor) or item.dtype != np.uint8:
        told = kind(item) if isinstance(item, Tensor) else f"an array of {item.dtype}, shape {item.shape}"
        raise BrokenImage(f"{what} is {told}, whose range or shape is unknown: {_GIVE}", what)
    if 0 in item.shape or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] not in (1, 3, 4)):
        raise BrokenImage(f"{what} has shape {item.shape}, channels last, which is no image's: {_GIVE}", what)
    return PILImage.fromarray(item[..., 0] if item.shape[2:] == (1,) else item)


@cache
def _of_imagenet(subset: str) -> tuple[str, ...]:
    return tuple(ImageNetInfo(subset).label_descriptions())


def imagenet_names(pretrained_cfg: dict[str, Any], num_classes: int) -> Sequence[str] | None:
    """Names of the classes of ImageNet and its kin, where the tag of a timm model's weights says that they were trained on it.

    Args:
        pretrained_cfg: timm's configuration of the weights.
        num_classes: of the model.
    """
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None or not _IMAGENET.search(str(pretrained_cfg.get("tag") or "")):
        return None
    return _of_imagenet(subset)
