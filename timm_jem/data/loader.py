"""Endless batches of training images, whose place is a number or two: resuming and going back are exact."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_jem.data import ImageSet, StreamedSet
from timm_jem.data.augmentation import AutoAugment
from timm_jem.data.images import SKIP_HINT
from timm_jem.data.sources import LOADING_ERRORS
from timm_jem.data.streamed import StreamedImage
from timm_jem.decoding import BrokenImage
from timm_jem.errors import InputError, check_whole, one_line, quoted
from timm_jem.files import cores

__all__ = ["ImageStream", "StreamedImages", "apart", "data_loader", "default_workers", "open_stream"]


class _Batches:
    """What both streams share: batches from a DataLoader, each with the place after it, so that what workers have read
    ahead never counts.

    A subclass gives ``_loader()``, which goes on from ``self._place``. A loader's batch is (images, labels, place), or an
    InputError's one line: raised within a worker it would arrive with that process's traceback as its message.
    """

    def __init__(self, batch_size: int, seed: int, rank: int, world: int, workers: int, place: dict[str, int]) -> None:
        least = {
            "batch_size": (batch_size, 1),
            "seed": (seed, 0),
            "world": (world, 1),
            "rank": (rank, 0),
            "workers": (workers, 0),
        }
        for name, (value, bound) in least.items():
            check_whole(name, value, bound)
        if rank >= world:
            raise InputError(f"rank is {rank} of {world}: give less than world")
        self.batch_size, self.seed, self.rank, self.world, self.workers = batch_size, seed, rank, world, workers
        self._place, self._batches = place, None

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            if self._batches is None:
                self._batches = iter(self._loader())
            batch = next(self._batches)
            if isinstance(batch, str):
                raise InputError(batch)
        except BaseException:
            self.close()  # an iterator that raised is at its end; the next call opens one at the same place
            raise
        images, labels, self._place = batch
        return images, labels

    def state_dict(self) -> dict[str, int]:
        """The place after the last batch that was taken."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the place ``state``: the next batch is the one that came after it.

        Raises:
            InputError: no state of such a stream.
        """
        if not isinstance(state, dict) or set(state) != set(self._place):
            raise InputError(
                f"the place of a stream is {quoted(state)}: give what state_dict returned, {', '.join(self._place)}"
            )
        for name, value in state.items():
            check_whole(f"the stream's {name}", value, 0)
        if state != self._place:
            self.close()
            self._place = {name: int(value) for name, value in state.items()}

    def close(self) -> None:
        """End the worker processes; the next batch starts them again."""
        self._batches = None


class ImageStream(_Batches):
    """Epochs of an image set without end: all images in an order of its own each time, one epoch right after the other.

    Sample p of the endless sequence is image ``default_rng([seed, p // n]).permutation(n)[p % n]`` of n. At position p,
    rank r's batch is samples [p + r·B, p + (r + 1)·B); then p grows by B · world. So what all ranks see together doesn't
    depend on how many they are, and their place is the same number.

    Args:
        data: the images.
        batch_size: B, images of a batch of this rank; batches may straddle epochs.
        seed: of the order and of ``auto_augment``. Global random generators are neither used nor changed.
        rank, world: this process and how many there are.
        workers: processes that read ahead; 0: read when asked.
        auto_augment: a timm policy for each image (see :class:`timm_jem.data.augmentation.AutoAugment`), seeded by ``seed`` and
            the image's position.

    ``next`` gives 8-bit images (B, C, H, W) and int64 labels (B,), on the CPU.

    Raises:
        InputError: an unknown policy, no images; from ``next``: an image that can't be decoded.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        auto_augment: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed, rank, world, workers, {"position": 0})
        if len(data) == 0:
            raise InputError("there are no images to draw batches from: give a set of at least one")
        self._fetch = _Fetch(
            data, seed, batch_size * world, None if auto_augment is None else AutoAugment(auto_augment, data.size)
        )

    def _loader(self) -> DataLoader:
        first = self._place["position"]
        starts = ((p, p + self.rank * self.batch_size) for p in count(first, self.batch_size * self.world))
        positions = ([p, *range(start, start + self.batch_size)] for p, start in starts)
        return data_loader(self._fetch, self.workers, batch_sampler=positions)


class StreamedImages(_Batches):
    """As :class:`ImageStream`, of a stream: each epoch is shuffled anew by (seed, epoch).

    Rows are split over the ranks by whole shards where their number allows, otherwise one by one: each is read by exactly
    one rank in an epoch. Ranks with fewer rows begin their next epoch earlier. The place is each rank's own: its epoch
    and the images taken in it. Going to a place reads the rows before it in its epoch again, without decoding them.

    Args:
        workers: more than 0: one process reads ahead.
        auto_augment: seeded by ``seed``, the epoch and the image's content, or its path if it is a file.

    Other arguments, ``next`` and errors: see :class:`ImageStream`.
    """

    def __init__(
        self,
        data: StreamedSet,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        auto_augment: str | None = None,
    ) -> None:
        super().__init__(batch_size, seed, rank, world, workers, {"epoch": 0, "offset": 0})
        self._about = False
        self.data = replace(data, rows=split_dataset_by_node(data.rows, rank=rank, world_size=world))
        self.augment = None if auto_augment is None else AutoAugment(auto_augment, data.size)

    def load_state_dict(self, state: dict[str, int], *, about: bool = False) -> None:
        """Go to the place ``state``; with ``about`` one of other ranks: where this one's epoch ends before it, the next begins.

        Raises:
            InputError: no state of such a stream.
        """
        super().load_state_dict(state)
        self._about |= about

    def _loader(self) -> DataLoader:
        read = _Read(self.data, self.seed, self.batch_size, self.augment, self._about, **self._place)
        return data_loader(read, min(self.workers, 1), batch_size=None)


def open_stream(
    data: ImageSet | StreamedSet,
    batch_size: int,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    auto_augment: str | None = None,
) -> ImageStream | StreamedImages:
    """The stream of batches that suits ``data``; see :class:`ImageStream` and :class:`StreamedImages`.

    Decoded images that aren't augmented need no workers, and get none.
    """
    if isinstance(data, StreamedSet):
        kind = StreamedImages
    else:
        kind = ImageStream
        if data.images is not None and auto_augment is None:
            workers = 0
    return kind(data, batch_size, seed=seed, rank=rank, world=world, workers=workers, auto_augment=auto_augment)


def default_workers(local_world: int) -> int:
    """Worker processes of each of ``local_world`` training processes that suit this machine's cores: 1 to 8."""
    check_whole("local_world", local_world, 1)
    return max(1, min(8, cores() // local_world - 1))


def apart(_worker: int) -> None:
    """Called in a worker process first: a group of its own, so that a signal to the run's group, Ctrl-C or what ``accelerate
    launch`` and batch systems send, ends no worker while the run writes its checkpoint."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def data_loader(dataset: Dataset, workers: int, **how: Any) -> DataLoader:
    """Batches as ``dataset`` gives them, by ``workers`` processes; ``how``: of PyTorch's DataLoader."""
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=apart,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without one it would draw from the global generator
        **how,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class _Fetch(Dataset):
    """Samples of the endless sequence by their positions, in this process or a worker."""

    def __init__(self, data: ImageSet, seed: int, stride: int, augment: AutoAugment | None) -> None:
        self.data, self.seed, self.stride, self.augment = data, seed, stride, augment
        self.epochs: dict[int, np.ndarray] = {}

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, int]] | str:
        """The batch at (global position, its samples' positions ...)."""
        start, *positions = positions
        try:
            images, labels = self.data.__getitems__(self.rows(np.asarray(positions)).tolist())
        except BrokenImage as error:
            return f"{error}, {SKIP_HINT}"
        if self.augment is not None:
            images = self.augment(images, [(self.seed, position) for position in positions])
        return images, labels, {"position": start + self.stride}

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the image set at the given positions, same shape."""
        epochs, places = np.divmod(positions, len(self.data))
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self.epochs:
                latest = max(self.epochs, default=None)
                self.epochs = {latest: self.epochs[latest]} if latest is not None else {}
                self.epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            rows[epochs == epoch] = self.epochs[epoch][places[epochs == epoch]]
        return rows


class _Read(IterableDataset):
    """Batches of a stream from a place on, in this process or a worker."""

    def __init__(
        self, data: StreamedSet, seed: int, batch_size: int, augment: AutoAugment | None, about: bool, epoch: int, offset: int
    ) -> None:
        self.data, self.seed, self.batch_size, self.augment, self.about = data, seed, batch_size, augment, about
        self.epoch, self.offset = epoch, offset
        self.decoded = epoch  # the latest epoch of which an image could be

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, int]] | str]:
        try:
            taken = self.taken()
            while True:
                yield self.batch(taken)
        except InputError as error:
            yield str(error)

    def batch(self, taken: Iterator[tuple[StreamedImage, int, int]]) -> tuple[Tensor, Tensor, dict[str, int]]:
        """The next images, labels, and the place after them."""
        images, labels, seeds = [], [], []
        while len(images) < self.batch_size:
            image, epoch, offset = next(taken)
            if (pixels := self.data.decode(image)) is None:
                if epoch > self.decoded + 1:
                    raise InputError(f"{self.data.name} has no training image that can be decoded: repair some, or give others")
                continue
            self.decoded = epoch
            images.append(pixels)
            labels.append(image.label)
            seeds.append((self.seed, epoch, int.from_bytes(image.digest, "big")))
        images = torch.stack(images)
        images = images if self.augment is None else self.augment(images, seeds)
        return images, torch.tensor(labels), {"epoch": epoch, "offset": offset}

    def taken(self) -> Iterator[tuple[StreamedImage, int, int]]:
        """Images without end, each with the place after it."""
        skip = self.offset
        for epoch in count(self.epoch):
            seen = 0
            try:
                for seen, image in enumerate(self.data.epoch(np.random.default_rng([self.seed, epoch])), 1):
                    if seen > skip:
                        yield image, epoch, seen
            except InputError:
                raise
            except LOADING_ERRORS as error:
                raise InputError(
                    f"{self.data.name} can't be read on ({one_line(error)}): see that its files are whole and in reach"
                ) from error
            if seen == 0:
                raise InputError(f"{self.data.name} has no training image for this process: use fewer, or more data")
            if seen < skip and not self.about:
                raise InputError(f"{self.data.name} ends before image {skip} of epoch {epoch}: the place is another stream's")
            skip = 0
