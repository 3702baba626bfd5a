"""What detectors see of images: logits, features before the head and the energy's gradient, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timm_jem.energy import energy
from timm_jem.errors import InputError
from timm_jem.inputs import as_labels, batches_of, check_label_values, check_model_input, kind, of_batch
from timm_jem.model import JEM
from timm_jem.modes import frozen

__all__ = ["Survey", "View", "batches", "check_features", "survey", "view"]

# Numbers of features that a survey keeps, 256 MiB in single precision: 131,072 images of 512, 32,768 of 2,048.
MOST_KEPT = 2**26


@dataclass(frozen=True)
class View:
    """What a network shows of B images.

    Attributes:
        energy: E(x), float64, shape (B,), on the CPU.
        logits: f(x), shape (B, num_classes); None where only features are kept.
        features: what the last layer takes, shape (B, D), or None.
        slope: ‖∇ E‖₂ with respect to pixels in [-1, 1], shape (B,), or None.
    """

    energy: Tensor
    logits: Tensor | None = None
    features: Tensor | None = None
    slope: Tensor | None = None


def check_features(jem: JEM) -> None:
    """Raise an InputError for a backbone that doesn't show its features as timm's do."""
    if not (hasattr(jem.backbone, "forward_features") and hasattr(jem.backbone, "forward_head")):
        raise InputError(f"{type(jem.backbone).__name__} has no forward_features and forward_head: give a timm backbone")


def view(jem: JEM, x: Tensor, *, features: bool = False, slope: bool = False) -> View:
    """One forward of model input, shape (B, C, H, W), and one backward where the slope is asked for.

    The model is in eval mode meanwhile, and is left as it was. Works under ``no_grad`` and ``inference_mode``.

    Raises:
        InputError: a backbone without features, or whose features are not one vector an image.
    """
    with frozen(jem), torch.inference_mode(False), torch.set_grad_enabled(slope):
        x = x.detach().to(jem.device)
        x = x.clone() if slope or x.is_inference() else x
        x.requires_grad_(slope)
        z = None
        if features:
            check_features(jem)
            maps = jem.backbone.forward_features(x)
            logits = jem.backbone.forward_head(maps)
            z = _vectors(jem, jem.backbone.forward_head(maps, pre_logits=True)).detach()
        else:
            logits = jem(x)
        norm = None
        if slope:
            gradient = torch.autograd.grad(energy(logits).sum(), x)[0]
            norm = (gradient / (2 * jem.std)).flatten(1).norm(dim=1)  # by the chain rule, with respect to pixels
        logits = logits.detach()
        # In double precision, since float32 would round some to the same number, and tie them.
        return View(energy(logits.cpu().double()), logits, z, norm)


def _vectors(jem: JEM, features: Any) -> Tensor:
    if isinstance(features, Tensor) and features.ndim == 4 and features.shape[2:] == (1, 1):
        features = features.flatten(1)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(f"the features of {type(jem.backbone).__name__} are {kind(features)}: build it with pooling")
    return features


def batches(
    jem: JEM, x: Tensor | Iterable, y: Any = None, *, labels: bool = True, batch_size: int = 256, desc: str = ""
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Model input, and labels where there are some, with a progress bar where there are several batches.

    Args:
        jem: the model that they are for.
        x: model input, shape (N, C, H, W); or batches of it, or of (model input, labels), e.g. a DataLoader.
        y: labels of a tensor's images, integers, shape (N,); below 0 where unknown.
        labels: False: they are ignored, whatever they are.
        batch_size: into which a tensor is split.
        desc: of the progress bar.

    Raises:
        InputError: no images, or something else.
    """
    from timm_jem.progress import tqdm

    if isinstance(x, Tensor):
        _check_x(jem, x)
    given, count = batches_of(x, y if labels else None, batch_size, jem.num_classes), 0
    for batch in given if isinstance(given, Sequence) and len(given) == 1 else tqdm(given, desc=desc, leave=False):
        images, of_images = of_batch(batch)
        _check_x(jem, images)
        of_images = _labels(jem, of_images, len(images)) if labels and of_images is not None else None
        if len(images):
            yield images, of_images
        count += len(images)
    if not count:
        raise InputError("there are no images in x: give at least one")


def _check_x(jem: JEM, x: Any) -> None:
    if (isinstance(x, Tensor) and x.is_meta) or any(parameter.is_meta for parameter in jem.backbone.parameters()):
        raise InputError("x or the model is on the meta device, without values: load them first")
    check_model_input(x, jem.input_size, fixed_size=jem.fixed_input_size, dtype=jem.dtype, denormalize=jem.denormalize)


def _labels(jem: JEM, y: Any, n: int) -> Tensor:
    y = as_labels(y, jem.num_classes)
    if y.shape != (n,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"y is {kind(y)} for {n} images: give integer labels, shape ({n},)")
    y = y.cpu().long()
    check_label_values(y.clamp(min=-1), jem.num_classes, least=-1)
    return y


@dataclass(frozen=True)
class Survey:
    """Images in distribution as a network sees them: all that methods are fitted to.

    Attributes:
        first: the view of some of the images, as it was.
        view: energies, and features as float32, on the CPU, of the images that are kept.
        y: their labels, int64, shape (n,), or None.
        order: a random order of them, shape (n,): parts of it are honest subsets.
    """

    first: View
    view: View
    y: Tensor | None
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def part(self, start: int, stop: int | None = None) -> "Survey":
        """Those from ``start`` to ``stop`` of the random order, in the order that they came in."""
        rows = self.order[start:stop].sort().values
        features = None if self.view.features is None else self.view.features[rows]
        y = None if self.y is None else self.y[rows]
        return Survey(self.first, View(self.view.energy[rows], features=features), y, torch.arange(len(rows)))


def survey(
    jem: JEM,
    x: Tensor | Iterable,
    y: Any = None,
    *,
    features: bool = True,
    labels: bool | None = None,
    batch_size: int = 256,
    seed: int = 0,
    desc: str = "images in distribution",
    on_first: Callable[[View], Any] | None = None,
) -> Survey:
    """Look at images batch by batch. Of more features than fit into 256 MiB a random subset is kept.

    Args:
        jem: the model.
        x, y, batch_size, desc: as :func:`batches`.
        features: whether to keep those.
        labels: True: each batch has to have some; None: those that there are are kept; False: they are ignored.
        seed: of the subset and of the random order.
        on_first: called with the view of the first batch, to refuse before the others are looked at.

    Raises:
        InputError: no images, labels that are missing, or numbers of the model that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    first: View | None = None
    kept: list[tuple[Tensor, ...]] = []
    count, most = 0, MOST_KEPT
    for images, of_images in batches(jem, x, y, labels=labels is not False, batch_size=batch_size, desc=desc):
        if labels and of_images is None:
            raise InputError("these images need labels: give x and y, or batches of (x, y)")
        seen = view(jem, images, features=features)
        if first is None:
            first = seen
            if on_first is not None:
                on_first(seen)
        z = seen.features.float().cpu() if features else seen.energy.new_empty(len(images), 0)
        if not (seen.energy.isfinite().all() and z.isfinite().all()):
            raise InputError("logits or features of images in distribution are not finite: the model's weights are broken")
        most = max(1, MOST_KEPT // (z.shape[1] + 1))
        key = torch.rand(len(images), generator=generator, dtype=torch.float64)
        kept.append((key, seen.energy, z) if of_images is None else (key, seen.energy, z, of_images))
        if len(kept[-1]) != len(kept[0]):
            raise InputError("some batches have labels and some have none: give all of them labels, -1 where unknown")
        count += len(images)
        if count > 1.25 * most:
            kept, count = [_subset(kept, most)], most
    key, energies, z, *known = _subset(kept, most)
    return Survey(first, View(energies, features=z if features else None), known[0] if known else None, key.argsort())


def _subset(kept: list[tuple[Tensor, ...]], most: int) -> tuple[Tensor, ...]:
    """The rows with the ``most`` smallest keys, in the order that they came in."""
    columns = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
    if len(columns[0]) <= most:
        return columns
    rows = columns[0].argsort()[:most].sort().values
    return tuple(column[rows] for column in columns)
