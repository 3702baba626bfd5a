"""Confidence intervals of what is measured on a part of all images."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError

__all__ = ["bootstrap_interval", "wilson_interval"]


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927): right also near 0 and 1, where the normal one isn't.

    Args:
        successes: how many of ``n``.
        n: at least 1.
        level: of confidence.

    Raises:
        InputError: no trials.
    """
    if n < 1:
        raise InputError("a proportion of no images has no interval: give some")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    statistic: Callable[[Tensor], float], n: int, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979) of a statistic of ``n`` images.

    Args:
        statistic: of the images with these row numbers, int64, shape (n,), drawn with replacement.
        n: how many images there are.
        level: of confidence.
        num_resamples: how often images are drawn anew.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(torch.from_numpy(rng.integers(n, size=n))) for _ in range(num_resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
