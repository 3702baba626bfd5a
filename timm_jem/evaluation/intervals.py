"""Confidence intervals of what is measured on a part of all images."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole

__all__ = ["bootstrap_interval", "wilson_interval"]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % (Wilson, JASA 1927): right also near 0 and 1, where the normal one isn't.

    Args:
        successes: how many of ``n``.
        n: at least 1.

    Raises:
        InputError: no trials, or successes that are not among them.
    """
    check_whole("successes", successes, 0)
    check_whole("n", n, 0)
    if n < 1:
        raise InputError("a proportion of no images has no interval: give some")
    if successes > n:
        raise InputError(f"{successes} successes of {n} images: give at most as many as images")
    z = NormalDist().inv_cdf(0.975)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    statistic: Callable[[Tensor], float],
    n: int,
    *,
    value: float | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap (Efron 1979), 95 %, of a statistic of ``n`` images.

    Args:
        statistic: of the images with these row numbers, int64, shape (n,), drawn with replacement.
        n: how many images there are.
        value: of the statistic of all images once each. Where it is given the interval is the basic one, ``value`` minus the
            quantiles of (statistic − ``value``), for statistics with a bias, such as calibration errors, which are too large
            by chance alone: drawing anew adds that bias once more, and this takes it off. None: the percentile interval.
        num_resamples: how often images are drawn anew.
        seed: of the draws.

    Raises:
        InputError: no images, or no draws.
    """
    check_whole("n", n, 1)
    check_whole("num_resamples", num_resamples, 1)
    rng = np.random.default_rng(seed)
    values = [statistic(torch.from_numpy(rng.integers(n, size=n))) for _ in range(num_resamples)]
    low, high = np.quantile(values, [0.025, 0.975])
    return (float(low), float(high)) if value is None else (2 * value - float(high), 2 * value - float(low))
