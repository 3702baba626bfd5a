"""Calibration of p(y|x), and temperature scaling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.labelled import labelled_logits, labelled_probabilities, numbers
from timm_jem.temperature import best_temperature

__all__ = [
    "Binned",
    "Reliability",
    "binned",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "reliability",
]


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


@dataclass(frozen=True)
class Binned:
    """Images by their bins of confidence.

    Attributes:
        bins: each image's, int64, shape (N,).
        confidence, correct: max_y p(y|x), and 1 where that y is the label, else 0; float64, shape (N,).
        num_bins: how many bins there are.
    """

    bins: Tensor
    confidence: Tensor
    correct: Tensor
    num_bins: int

    def reliability(self, rows: Tensor | slice = slice(None)) -> Reliability:
        """Of the images with these row numbers, which may come more than once."""
        bins = self.bins[rows]
        count = bins.bincount(minlength=self.num_bins)
        sums = (
            torch.zeros(self.num_bins, dtype=torch.float64).index_add_(0, bins, values[rows])
            for values in (self.confidence, self.correct)
        )
        return Reliability(count, *(total / count for total in sums))


def reliability(probabilities: Tensor, y: Tensor, num_bins: int = 15, *, adaptive: bool = False) -> Reliability:
    """Bins of confidence: arguments and errors as :func:`binned`'s."""
    return binned(probabilities, y, num_bins, adaptive=adaptive).reliability()


def binned(probabilities: Tensor, y: Tensor, num_bins: int = 15, *, adaptive: bool = False) -> Binned:
    """Images in bins of confidence.

    Args:
        probabilities: p(y|x), shape (N, num_classes).
        y: labels, whole numbers, shape (N,).
        num_bins: 15 as in Guo et al. (arXiv 1706.04599).
        adaptive: bins of equally many images, by rank of confidence (Nguyen & O'Connor, EMNLP 2015, section 3; their ECE
            is the adaptive ECE of Mukhoti et al., NeurIPS 2020), instead of equal bins of [0, 1], where a confidence on
            an edge, which is i / num_bins as the probabilities' type rounds it, belongs to the bin below. Of equal
            confidences those of earlier rows come first: shuffle images that are in order of their classes.

    Raises:
        InputError: no images, probabilities that are none, or labels that don't fit.
    """
    check_whole("num_bins", num_bins, 1)
    probabilities, y = labelled_probabilities(probabilities, y)
    rounded, predicted = probabilities.max(1)
    confidence, correct = rounded.double(), (predicted == y).double()
    if adaptive:
        bins = torch.empty(len(y), dtype=torch.int64)
        bins[confidence.argsort(stable=True)] = torch.arange(len(y)) * num_bins // len(y)
    else:
        edges = (torch.arange(1, num_bins, dtype=torch.float64) / num_bins).to(rounded.dtype)
        bins = torch.bucketize(rounded, edges)
    return Binned(bins, confidence, correct, num_bins)


def expected_calibration_error(probabilities: Tensor, y: Tensor) -> float:
    """ECE over 15 equal bins of confidence, in [0, 1]: see :attr:`Reliability.ece`; arguments as :func:`reliability`'s."""
    return reliability(probabilities, y).ece


def negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of each image, nats, float64, shape (N,), on the CPU: logits (N, num_classes), labels (N,).

    Infinite where the label's own logit is −inf, i.e. a class that was ruled out.

    Raises:
        InputError: labels that don't fit, or logits that are NaN, +inf, or all −inf.
    """
    logits, y = labelled_logits(logits, y)
    return -logits.double().log_softmax(1).gather(1, y[:, None]).squeeze(1)


def brier_score(probabilities: Tensor, y: Tensor) -> Tensor:
    """Σ_y (p(y|x) − 1[y is the label])² of each image, float64, in [0, 2], shape (N,), on the CPU (Brier 1950, eq. 2).

    Arguments and errors as :func:`reliability`'s.
    """
    probabilities, y = labelled_probabilities(probabilities, y)
    target = torch.nn.functional.one_hot(y, probabilities.shape[1]).double()
    return (probabilities.double() - target).square().sum(1)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The temperature of held-out images, see :func:`timm_jem.temperature.best_temperature`.

    Args:
        logits: of held-out images, which neither trained the model nor are reported on; shape (N, num_classes), −inf where
            a class is ruled out.
        y: labels, whole numbers, shape (N,).

    Raises:
        InputError: no images, labels that don't fit or of a class that is ruled out, or logits that are NaN or +inf.
    """
    if numbers(y, "labels").numel() == 0:
        raise InputError("no held-out images to fit a temperature to: raise data.val_fraction")
    return best_temperature(*labelled_logits(logits, y))
