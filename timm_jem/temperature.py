"""The temperature that calibrates p(y|x)."""

import math

import torch
from torch import Tensor

from timm_jem.errors import InputError

__all__ = ["at_bound", "best_temperature"]

# Temperatures outside are no optimum but the sign of labels that logits separate perfectly, or not at all.
_TEMPERATURES = (0.01, 100.0)


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


def at_bound(temperature: float) -> bool:
    """Whether a :func:`best_temperature` is but where its search ended: such images can't tell one."""
    least, most = _TEMPERATURES
    return not least * (1 + 1e-9) < temperature < most * (1 - 1e-9)
