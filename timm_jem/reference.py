"""What held-out images tell of a model: how sure it may be, and which energies are ordinary."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_jem.energy import energy
from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.inputs import batches_of, check_labels, of_batch
from timm_jem.temperature import best_temperature

__all__ = ["Reference", "accepting", "fit"]

_LEVELS = 101  # quantiles at 0, 1, ..., 100 %
_LARGEST = 1e30


@dataclass(frozen=True)
class Reference:
    """Of images that the model was not trained on, but that are like those it was.

    Attributes:
        temperature: the T for which softmax(f(x)/T) is calibrated; None: they had no labels.
        quantiles: of their energies, nats, at 0, 1, ..., 100 %.
        threshold: the least energy, nats, at which ``accept`` of them or more are accepted: the usual convention of FPR95,
            by which images of higher energy are outliers.
        accept: a share, above 0 and at most 1.
        n: how many images there were.

    Raises:
        InputError: values that no images have.
    """

    temperature: float | None
    quantiles: tuple[float, ...]
    threshold: float
    accept: float
    n: int

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_number("temperature", self.temperature, least=1e-3, most=1e3)
        if not isinstance(self.quantiles, (tuple, list)) or len(self.quantiles) != _LEVELS:
            raise InputError(f"quantiles are {quoted(self.quantiles)}: give {_LEVELS} energies, at 0, 1, ..., 100 %")
        for value in (*self.quantiles, self.threshold):
            check_number("an energy", value, least=-_LARGEST, most=_LARGEST)
        lowest, highest = self.quantiles[0], self.quantiles[-1]
        if list(self.quantiles) != sorted(self.quantiles) or not lowest <= self.threshold <= highest:
            raise InputError("quantiles don't rise, or the threshold is not among them: these are no energies of images")
        check_number("accept", self.accept, above=0, most=1)
        check_whole("n", self.n, 1, 2**53)
        object.__setattr__(self, "quantiles", tuple(map(float, self.quantiles)))

    @classmethod
    def read(cls, data: Any) -> "Reference":
        """From JSON that anyone may have written.

        Raises:
            InputError: a value that is missing, unknown, or of the wrong type.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise InputError(f"it is {quoted(data)}: give {', '.join(names)}")
        return cls(**data)

    def percentiles(self, energies: Tensor) -> list[float]:
        """How many of the held-out images have at most each energy, %, shape (B,): 100 is beyond all of them.

        Between two quantiles it is interpolated.
        """
        return np.interp(energies.detach().cpu().double().numpy(), self.quantiles, np.linspace(0, 100, _LEVELS)).tolist()


def fit(
    classify: Callable[[Tensor], Tensor],
    x: Tensor | Iterable,
    y: Tensor | list[int] | None = None,
    *,
    num_classes: int,
    accept: float = 0.95,
    batch_size: int = 256,
) -> Reference:
    """The reference of held-out images.

    Args:
        classify: model input, shape (B, C, H, W), to logits on the CPU, shape (B, num_classes).
        x: model input, shape (N, C, H, W), or batches of that, or of (x, y), as a DataLoader gives them.
        y: their labels, integers, shape (N,); of batches each has its own, or none.
        num_classes: how many there are.
        accept: share of the images that is to be accepted.
        batch_size: images through the network at once; batches that are given are taken as they are.

    Raises:
        InputError: no images, labels that don't fit or that some batches alone have, or energies that are not finite.
    """
    check_number("accept", accept, above=0, most=1)
    logits, labels = [], []
    for images, of_images in map(of_batch, batches_of(x, y, batch_size, num_classes)):
        logits.append(classify(images))
        labels.append(None if of_images is None else check_labels(of_images, len(images), num_classes, torch.device("cpu")))
    f = torch.cat(logits) if logits else torch.zeros(0, num_classes)
    if not len(f):
        raise InputError("there are no held-out images: give at least one, better some hundreds")
    if len({part is None for part in labels}) > 1:
        raise InputError("some batches of held-out images have labels and some have none: give all of them labels, or none")
    energies = energy(f)
    if broken := int((~energies.isfinite()).sum()):
        raise InputError(f"energies of {broken} of {len(f)} held-out images are not finite: the model's weights are broken")
    # Each is the energy of an image: the least at which so many of them, or more, have at most that.
    ordered, shares = energies.double().sort().values.numpy(), np.arange(1, len(f) + 1) / len(f)
    return Reference(
        temperature=None if labels[0] is None else best_temperature(f, torch.cat(labels)),
        quantiles=tuple(ordered[np.searchsorted(shares, np.linspace(0, 1, _LEVELS))].tolist()),
        threshold=accepting(energies.double(), accept),
        accept=float(accept),
        n=len(f),
    )


def accepting(scores: Tensor, accept: float) -> float:
    """The smallest score up to which at least a share ``accept`` of ``scores`` are, shape (N,), higher = further out."""
    return scores.kthvalue(max(1, math.ceil(accept * len(scores) - 1e-9))).values.item()
