"""Accuracy and calibration of p(y|x)."""

from collections.abc import Iterable

import torch
from accelerate.utils import tqdm
from torch import Tensor

from timm_jem.data import to_pixels
from timm_jem.model import JEM
from timm_jem.sampling import frozen

__all__ = ["accuracy", "expected_calibration_error", "predict"]


@torch.no_grad()
def predict(jem: JEM, batches: Iterable[tuple[Tensor, Tensor]], *, desc: str = "predicting") -> tuple[Tensor, Tensor]:
    """Logits of every image, in eval mode, without noise: the same at every call.

    Args:
        jem: the model; its train or eval flags are left as they were.
        batches: 8-bit images, shape (B, C, H, W), and labels, shape (B,).
        desc: of the progress bar.

    Returns:
        Logits, float32, shape (N, num_classes), and labels, int64, shape (N,), on the CPU.
    """
    device = jem.mean.device
    logits, labels = [], []
    with frozen(jem):
        for images, y in tqdm(batches, desc=desc, leave=False):
            logits.append(jem(jem.normalize(to_pixels(images.to(device)))).float().cpu())
            labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Part of the images whose largest logit is the label's: logits (N, num_classes), labels (N,)."""
    return (logits.argmax(1) == y).double().mean().item()


def expected_calibration_error(probabilities: Tensor, y: Tensor, num_bins: int = 15) -> float:
    """ECE: Σ_bins (share of images) · |accuracy − mean confidence| over ``num_bins`` equal bins of confidence.

    Source: Guo et al., ICML 2017 (arXiv 1706.04599), eq. 3; 15 bins as there. A confidence on a bin's edge belongs to
    the bin below.

    Args:
        probabilities: p(y|x), shape (N, num_classes).
        y: labels, shape (N,).
        num_bins: of [0, 1].

    Returns:
        In [0, 1].
    """
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == y).double()
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    difference = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, correct - confidence)
    return difference.abs().sum().item() / len(y)
