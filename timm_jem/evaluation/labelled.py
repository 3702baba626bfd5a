"""Predictions and their labels, checked before anything is measured of them: shapes that disagree would be broadcast."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError, one_line

__all__ = ["labelled_logits", "labelled_probabilities", "numbers"]


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
    rows, y = numbers(rows, what), numbers(y, "labels")
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} have shape {tuple(rows.shape)}: give (N, num_classes), at least one of each")
    if y.shape != rows.shape[:1] or y.is_floating_point():
        raise InputError(
            f"{what} of shape {tuple(rows.shape)} and labels of shape {tuple(y.shape)}, {y.dtype}: give one whole number each"
        )
    y = y.long()
    if y.min() < 0 or y.max() >= rows.shape[1]:
        raise InputError(
            f"labels go from {y.min()} to {y.max()}, and {what} are of classes 0 to {rows.shape[1] - 1}: leave images without "
            "a label out"
        )
    return rows if rows.is_floating_point() else rows.double(), y
