"""Calibration of p(y|x), and temperature scaling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole

__all__ = [
    "Reliability",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "reliability",
]

# Temperatures outside are no optimum but the sign of labels that logits separate perfectly, or not at all.
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Reliability:
    """Images in bins of confidence, max_y p(y|x): what a reliability diagram draws.

    Attributes:
        count: images in each bin, int64, shape (num_bins,).
        confidence, accuracy: their means in each bin, float64, shape (num_bins,); NaN where a bin is empty.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Σ_bins (share of images) · |accuracy − mean confidence| (Guo et al., ICML 2017, arXiv 1706.04599, eq. 3)."""
        gaps = (self.accuracy - self.confidence).abs()[self.count > 0]
        return (gaps * self.count[self.count > 0]).sum().item() / self.count.sum().item()

    @property
    def mce(self) -> float:
        """The largest |accuracy − mean confidence| of a bin (Guo et al., eq. 5): a bin of one image counts as any other."""
        return (self.accuracy - self.confidence).abs()[self.count > 0].max().item()


def reliability(probabilities: Tensor, y: Tensor, num_bins: int = 15, *, adaptive: bool = False) -> Reliability:
    """Bins of confidence.

    Args:
        probabilities: p(y|x), shape (N, num_classes).
        y: labels, shape (N,).
        num_bins: 15 as in Guo et al. (arXiv 1706.04599).
        adaptive: bins of equally many images, by rank of confidence (Nguyen & O'Connor, EMNLP 2015, section 3; their ECE
            is the adaptive ECE of Mukhoti et al., NeurIPS 2020), instead of equal bins of [0, 1], where a confidence on
            an edge belongs to the bin below.

    Raises:
        InputError: no images, or probabilities that are none.
    """
    check_whole("num_bins", num_bins, 1)
    if len(probabilities) == 0 or probabilities.shape[:1] != y.shape:
        raise InputError(f"calibration of {len(probabilities)} predictions and {len(y)} labels: give one of each, at least one")
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-5):  # NaN fails both
        raise InputError("calibration needs probabilities in [0, 1]: give logits.softmax(1), not logits")
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == y).double()
    if adaptive:
        bins = torch.empty(len(y), dtype=torch.int64)
        bins[confidence.argsort(stable=True)] = torch.arange(len(y)) * num_bins // len(y)
    else:
        bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    count = bins.bincount(minlength=num_bins)
    sums = (torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, values) for values in (confidence, correct))
    return Reliability(count, *(total / count for total in sums))


def expected_calibration_error(probabilities: Tensor, y: Tensor, num_bins: int = 15) -> float:
    """ECE over equal bins of confidence, in [0, 1]: see :attr:`Reliability.ece`; arguments as :func:`reliability`'s."""
    return reliability(probabilities, y, num_bins).ece


def negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of each image, nats, float64, shape (N,): logits (N, num_classes), labels (N,)."""
    return -logits.double().log_softmax(1).gather(1, y[:, None]).squeeze(1)


def brier_score(probabilities: Tensor, y: Tensor) -> Tensor:
    """Σ_y (p(y|x) − 1[y is the label])² of each image, float64, in [0, 2], shape (N,) (Brier 1950, eq. 2)."""
    target = torch.nn.functional.one_hot(y, probabilities.shape[1]).double()
    return (probabilities.double() - target).square().sum(1)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T for which softmax(f(x)/T) has the least negative log-likelihood (Guo et al., arXiv 1706.04599, section 4.2).

    The loss is convex in 1/T; the root of its derivative is found by bisection, between 0.01 and 100.

    Args:
        logits: of held-out images, which neither trained the model nor are reported on; shape (N, num_classes).
        y: labels, shape (N,).
    """
    if len(y) == 0:
        raise InputError("no held-out images to fit a temperature to: raise data.val_fraction")
    logits = logits.double()
    labelled = logits.gather(1, y[:, None]).squeeze(1)

    def slope(log_inverse: float) -> float:
        p = (logits * torch.tensor(log_inverse, dtype=torch.float64).exp()).softmax(1)
        return ((p * logits).sum(1) - labelled).mean().item()

    low, high = (-torch.tensor(t, dtype=torch.float64).log().item() for t in reversed(_TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return torch.tensor(-(low + high) / 2, dtype=torch.float64).exp().item()
