"""Energies of a classifier's logits, as pure functions.

The logits f(x) define an unnormalised joint density p(x, y) ∝ exp f(x)[y] (Grathwohl et al., ICLR 2020,
arXiv 1912.03263, section 3). One sign everywhere in this package: **lower energy = likelier**.
"""

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.inputs import check_label_values, is_floats, is_labels, kind

__all__ = ["energy", "log_density"]


def energy(logits: Tensor, y: Tensor | None = None) -> Tensor:
    """E(x) = −logsumexp_y f(x)[y], or E(x, y) = −f(x)[y] when labels are given.

    Source: JEM (arXiv 1912.03263), eq. 7 for E(x); eq. 5 for E(x, y), the negative logarithm of p(x, y) up to
    the constant log Z. Half-precision logits are reduced in float32.

    Args:
        logits: f(x), shape (B, num_classes).
        y: class labels, int64, shape (B,), in [0, num_classes).

    Returns:
        Energies in nats, shape (B,).

    Raises:
        InputError: logits or labels of another shape or type, or, on the CPU, labels that are no classes: elsewhere that
            would have to be waited for.
    """
    if not is_floats(logits) or logits.ndim != 2 or not logits.shape[1]:
        raise InputError(f"logits are {kind(logits)}: give floating-point f(x), shape (B, num_classes)")
    if y is not None:
        if not is_labels(y, logits.shape[0], logits):
            raise InputError(f"y is {kind(y)} for logits of shape {tuple(logits.shape)}: give int64, shape ({len(logits)},)")
        if y.device.type == "cpu":
            check_label_values(y, logits.shape[1])
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if y is None:
        return -logits.logsumexp(dim=1)
    # A copy, since autograd keeps no labels that were made in inference mode.
    return -logits.gather(1, y.unsqueeze(1).clone()).squeeze(1)


def log_density(logits: Tensor, y: Tensor | None = None) -> Tensor:
    """log p(x), or log p(x, y) with labels, up to the unknown constant −log Z: exactly −energy(logits, y)."""
    return -energy(logits, y)
