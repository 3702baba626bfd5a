"""The temperature that calibrates p(y|x)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_jem.errors import InputError

__all__ = ["best_temperature", "is_told"]

# Temperatures outside are no optimum but the sign of labels that logits separate perfectly, or not at all.
_TEMPERATURES = (0.01, 100.0)
_CHI2 = 3.84  # 95 % of χ² of one degree of freedom


def best_temperature(logits: Tensor, y: Tensor) -> float:
    """The T for which softmax(f(x)/T) has the least negative log-likelihood (Guo et al., arXiv 1706.04599, section 4.2).

    The loss is convex in 1/T; the root of its derivative is found by bisection, between 0.01 and 100. Where each image's
    logits are all equal, every T is as good, and 1 leaves them as they are.

    Args:
        logits: floating-point, shape (N, num_classes), at least one image; −inf where a class is ruled out, and no NaN.
        y: labels, int64, in [0, num_classes), shape (N,).

    Raises:
        InputError: a label of a class that is ruled out.
    """
    above = logits.double() - logits.double().gather(1, y[:, None])  # the logits, up to a constant: the label's is 0
    if not (above < torch.inf).all():
        raise InputError("a label is of a class whose logit is -inf: no temperature makes it likely, so leave that image out")
    if (possible := above.isfinite()).logical_and(above != 0).sum() == 0:
        return 1.0

    def slope(log_inverse: float) -> float:
        p = (above * math.exp(log_inverse)).softmax(1)
        return torch.where(possible, p * above, 0).sum(1).mean().item()

    low, high = (-math.log(t) for t in reversed(_TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def is_told(logits: Tensor, y: Tensor, temperature: float) -> bool:
    """Whether images tell their :func:`best_temperature`: at a third of it, and at three times as much, their labels are less
    likely by what a likelihood ratio test at 5 % asks for.

    A few hundred images do, and a few that the network is all right about, or hardly tells apart, do not. The factor is this
    package's choice: of simulated logits from flat to sure, nine in ten temperatures that pass it lie between 0.5 and 1.4 of
    the true one.

    Args:
        logits, y: as of :func:`best_temperature`.
        temperature: what it gave.
    """

    def cost(t: float) -> float:
        return F.cross_entropy(logits.double() / t, y, reduction="sum").item()

    least = cost(temperature)
    return all(2 * (cost(temperature * factor) - least) > _CHI2 for factor in (1 / 3, 3))
