"""Energies of a classifier's logits, as pure functions.

The logits f(x) define an unnormalised joint density p(x, y) ∝ exp f(x)[y] (Grathwohl et al., ICLR 2020,
arXiv 1912.03263, section 3). One sign everywhere in this package: **lower energy = likelier**.
"""

import torch
from torch import Tensor

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
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if y is None:
        return -logits.logsumexp(dim=1)
    return -logits.gather(1, y.unsqueeze(1)).squeeze(1)


def log_density(logits: Tensor, y: Tensor | None = None) -> Tensor:
    """log p(x), or log p(x, y) with labels, up to the unknown constant −log Z: exactly −energy(logits, y)."""
    return -energy(logits, y)
