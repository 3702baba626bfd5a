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
from timm_jem.inputs import batches_of, check_label_values, check_labels, of_batch
from timm_jem.temperature import best_temperature, is_told

__all__ = ["Reference", "accepting", "fit"]

_LEVELS = 101  # quantiles at 0, 1, ..., 100 %
_LARGEST = 1e30


@dataclass(frozen=True)
class Reference:
    """Of images that the model was not trained on, but that are like those it was.

    Attributes:
        temperature: the T for which softmax(f(x)/T) is calibrated; None: they had no labels, or can't tell it, as a few that
            the network is right about all of.
        quantiles: of their energies, nats, at 0, 1, ..., 100 %.
        threshold: the least energy, nats, at which ``accept`` of them or more are accepted: the usual convention of FPR95,
            by which images of higher energy are outliers.
        accept: a share, above 0 and at most 1.
        n: how many images there were.
        medians: those of E(x, y) of each class's images, nats, in order; of a class without images that of all; None: they
            had no labels.
        spread: quantiles, nats, at 0, 1, ..., 100 %, of how far each E(x, y) is above its class's median; None: no labels.

    Raises:
        InputError: values that no images have.
    """

    temperature: float | None
    quantiles: tuple[float, ...]
    threshold: float
    accept: float
    n: int
    medians: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_number("temperature", self.temperature, least=1e-3, most=1e3)
        tables = {"quantiles": self.quantiles}
        if self.medians is not None or self.spread is not None:
            if not isinstance(self.medians, (tuple, list)):
                raise InputError(
                    f"medians are {quoted(self.medians)}: give an energy for each class, or neither them nor spread"
                )
            tables["spread"] = self.spread
        for name, values in tables.items():
            if not isinstance(values, (tuple, list)) or len(values) != _LEVELS:
                raise InputError(f"{name} are {quoted(values)}: give {_LEVELS} energies, at 0, 1, ..., 100 %")
        for value in (*self.quantiles, self.threshold, *(self.medians or ()), *(self.spread or ())):
            check_number("an energy", value, least=-_LARGEST, most=_LARGEST)
        lowest, highest = self.quantiles[0], self.quantiles[-1]
        rising = all(list(values) == sorted(values) for values in tables.values())
        if not rising or not lowest <= self.threshold <= highest:
            raise InputError("quantiles don't rise, or the threshold is not among them: these are no energies of images")
        check_number("accept", self.accept, above=0, most=1)
        check_whole("n", self.n, 1, 2**53)
        for name in ("quantiles", "medians", "spread"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, values)))

    @classmethod
    def read(cls, data: Any) -> "Reference":
        """From JSON that anyone may have written.

        Raises:
            InputError: a value that is missing, unknown, or of the wrong type.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or {"medians", "spread", *data} != set(names):  # which older ones lack
            raise InputError(f"it is {quoted(data)}: give {', '.join(names)}")
        return cls(**data)

    def check_fit(self, num_classes: int) -> None:
        """Raise an InputError where its images were of more or fewer classes than a model has."""
        if self.medians is not None and len(self.medians) != num_classes:
            raise InputError(
                f"the reference is of {len(self.medians)} classes and this model has {num_classes}: "
                "call fit_reference again, or set jem.reference = None"
            )

    @property
    def uncalibrated(self) -> str | None:
        """Why there is no temperature, in words; None: there is one."""
        if self.temperature is not None:
            return None
        if self.medians is None:
            return "the held-out images had no labels"
        return f"{self.n:,} held-out image{'s' * (self.n > 1)} can't tell a temperature"

    def at(self, share: float, y: Tensor | None = None) -> Tensor:
        """The energy, nats, below which about a share of held-out images is: E(x), shape (); or E(x, y), shape (B,).

        Args:
            share: in [0, 1].
            y: classes, int64, shape (B,). A class's is its own median plus the spread of all, so that few images tell it.

        Raises:
            InputError: classes, and there are no medians, or fewer; or classes below 0.
        """
        levels = np.linspace(0, 1, _LEVELS)
        if y is None:
            return torch.tensor(np.interp(share, levels, self.quantiles), dtype=torch.float32)
        if self.medians is None or (len(y) and int(y.max()) >= len(self.medians)):
            raise InputError("the reference has energies of no class, or of fewer: call fit_reference with labels")
        check_label_values(y := y.cpu(), len(self.medians))
        return torch.tensor(self.medians)[y] + float(np.interp(share, levels, self.spread))

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
    if isinstance(x, Tensor) and x.ndim and y is not None:  # before the network runs
        check_labels(y, len(x), num_classes, torch.device("cpu"))
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
    y = None if labels[0] is None else torch.cat(labels)
    temperature = None if y is None else best_temperature(f, y)
    ordered, levels, top = energies.double().sort().values.numpy(), np.arange(_LEVELS), _LEVELS - 1
    return Reference(
        temperature=temperature if y is not None and is_told(f, y, temperature) else None,
        quantiles=tuple(ordered[np.maximum((len(f) * levels + top - 1) // top - 1, 0)].tolist()),
        threshold=accepting(energies.double(), accept),
        accept=float(accept),
        n=len(f),
        **({} if y is None else _of_classes(energy(f, y).double(), y, num_classes)),
    )


def _of_classes(energies: Tensor, y: Tensor, num_classes: int) -> dict[str, tuple[float, ...]]:
    parts = [energies[y == label] for label in range(num_classes)]
    medians = torch.stack([(part if len(part) else energies).median() for part in parts])
    spread = np.quantile((energies - medians[y]).numpy(), np.linspace(0, 1, _LEVELS))
    return {"medians": tuple(medians.tolist()), "spread": tuple(spread.tolist())}


def accepting(scores: Tensor, accept: float) -> float:
    """The smallest score up to which at least a share ``accept`` of ``scores`` are, shape (N,), higher = further out."""
    return scores.kthvalue(max(1, math.ceil(accept * len(scores) - 1e-9))).values.item()
