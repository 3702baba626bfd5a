"""Images, predictions and labels, checked before anything is measured: shapes that disagree would be broadcast."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError, one_line

__all__ = ["eight_bit_images", "labelled_logits", "labelled_probabilities", "labels", "numbers"]


def numbers(values: Any, what: str) -> Tensor:
    """Real numbers as a tensor on the CPU without a gradient: tensors, numpy's arrays and lists alike.

    Raises:
        InputError: something else; ``what`` names it.
    """
    try:
        # A copy of what isn't a tensor: PyTorch takes no negative strides.
        values = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.array(values))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{what} are no numbers ({one_line(error)}): give a tensor or an array") from error
    if values.dtype == torch.bool or values.is_complex() or values.layout != torch.strided:
        raise InputError(f"{what} have dtype {values.dtype} and layout {values.layout}: give real numbers, strided")
    return values


def labels(y: Any, count: int | None = None, num_classes: int | None = None, what: str = "labels") -> Tensor:
    """Labels as int64, shape (N,), on the CPU: at least one, ``count`` of them and from 0 to ``num_classes`` − 1, where given.

    Raises:
        InputError: they are none; ``what`` names them.
    """
    y = numbers(y, what)
    if y.ndim != 1 or y.is_floating_point() or len(y) == 0 or count not in (None, len(y)):
        raise InputError(
            f"{what} have shape {tuple(y.shape)} and dtype {y.dtype}: give whole numbers, shape ({count or 'N'},), at least one"
        )
    y = y.long()
    if num_classes is not None and (y.min() < 0 or y.max() >= num_classes):
        raise InputError(f"{what} go from {y.min()} to {y.max()}: there are classes 0 to {num_classes - 1}, and −1 is unknown")
    return y


def eight_bit_images(images: Any, what: str = "images", channels: int | None = None) -> Tensor:
    """``images`` if they are 8-bit ones: a tensor, uint8, shape (N, C, H, W), at least one; of so many channels, where given.

    Raises:
        InputError: they are none; ``what`` names them.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"{what} are a {type(images).__name__}: give a uint8 tensor, (N, C, H, W)")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0 or channels not in (None, images.shape[1]):
        raise InputError(
            f"{what} have dtype {images.dtype} and shape {tuple(images.shape)}: give 8-bit ones, uint8, (N, "
            f"{channels or 'C'}, H, W), at least one, as timm_jem.pixels.eight_bit makes them"
        )
    return images


def labelled_logits(logits: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Logits, floating-point, shape (N, num_classes), −inf where a class is ruled out, and labels, int64, shape (N,).

    Raises:
        InputError: other shapes, no images, labels that are none of the classes, or logits of which no softmax can be taken.
    """
    logits, y = _labelled(logits, y, "logits")
    # A maximum that is not finite: of NaN, of +inf, and of classes that are all ruled out.
    if broken := int((~logits.amax(1).isfinite()).sum()):
        raise InputError(f"logits of {broken} of {len(logits)} images are not finite, so they predict nothing: mend the model")
    return logits, y


def labelled_probabilities(probabilities: Any, y: Any) -> tuple[Tensor, Tensor]:
    """p(y|x), floating-point, shape (N, num_classes), and labels, int64, shape (N,).

    Raises:
        InputError: other shapes, no images, labels that are none of the classes, or rows that are no probabilities.
    """
    probabilities, y = _labelled(probabilities, y, "probabilities")
    tolerance = max(1e-3, torch.finfo(probabilities.dtype).eps ** 0.5)  # of a half-precision softmax
    in_range = probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-5  # NaN fails both
    if not in_range or (probabilities.double().sum(1) - 1).abs().max() > tolerance:
        raise InputError("probabilities have to be in [0, 1] and to sum to 1: give logits.softmax(1), not logits")
    return probabilities, y


def _labelled(rows: Any, y: Any, what: str) -> tuple[Tensor, Tensor]:
    rows = numbers(rows, what)
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} have shape {tuple(rows.shape)}: give (N, num_classes), at least one of each")
    return rows if rows.is_floating_point() else rows.double(), labels(y, len(rows), rows.shape[1])
