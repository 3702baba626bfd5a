"""Out-of-distribution detection: scores of images, and how well they tell two sets apart."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.labelled import eight_bit_images, numbers
from timm_jem.model import JEM
from timm_jem.ood import Detector, score_all
from timm_jem.pixels import to_pixels

__all__ = ["SCORES", "ModelInput", "auroc_interval", "ood_metrics", "ood_scores"]

# Detectors of timm_jem.ood by the names that reports give their scores, which have the other sign.
SCORES = {
    "energy": "log p(x)",
    "msp": "max softmax",
    "max_logit": "max logit = log p(x, y*)",
    "approximate_mass": "approximate mass",
    "typicality": "typicality",
    "mahalanobis": "feature distance",
    "react": "ReAct",
    "ash": "ASH",
    "dice": "DICE",
    "vim": "ViM",
    "knn": "KNN",
    "gradnorm": "GradNorm",
}


def ood_scores(
    detectors: Sequence[Detector],
    images: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    batch_size: int = 256,
    desc: str = "scoring",
) -> dict[str, Tensor]:
    """Scores of 8-bit images, higher = more like the training data: one forward a batch gives all of them.

    Args:
        detectors: of one model, fitted where they have to be.
        images: 8-bit images, shape (N, C, H, W); or batches of them, or of (images, labels), e.g. a DataLoader's.
        batch_size: images through the network at once; batches that are given are taken as they are.
        desc: of the progress bar.

    Returns:
        Scores by name, see :data:`SCORES`, each float64, shape (N,), on the CPU. What is not finite is left so, and refused
        by the metrics.

    Raises:
        InputError: images that are not 8-bit, of another shape, or none; or what :func:`timm_jem.ood.score_all` refuses.
    """
    check_whole("batch_size", batch_size, 1)
    if not isinstance(images, Iterable):
        raise InputError(f"images are a {type(images).__name__}: give a uint8 tensor (N, C, H, W), or batches of that")
    if isinstance(images, Tensor):
        images = eight_bit_images(images).split(batch_size)
    jem = detectors[0].jem
    scores = score_all(detectors, ModelInput(jem, images), desc=desc)
    return {SCORES[detector.name]: -found for detector, found in zip(detectors, scores, strict=True)}


@dataclass(frozen=True)
class ModelInput:
    """Batches of 8-bit images as those of model input, on the model's device, with their labels where they have some.

    Attributes:
        jem: the model.
        images: batches of images, uint8, shape (B, C, H, W), or of (images, labels).
    """

    jem: JEM
    images: Iterable[Tensor | tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for batch in self.images:
            images, *labels = batch if isinstance(batch, (tuple, list)) else (batch,)
            u = to_pixels(eight_bit_images(images, channels=self.jem.input_size[0]).to(self.jem.device))
            x = self.jem.normalize(u)
            yield (x, *labels) if labels else x


def ood_metrics(in_scores: Tensor, out_scores: Tensor) -> dict[str, float]:
    """How well a score, higher = in distribution, tells two sets apart; each between 0 and 1. Ties count half.

    - "auroc": the chance that an image in distribution scores higher than one out of it. Higher is better.
    - "aupr_out", "aupr_in": average precision with images out of, or in, distribution as the positive class (Hendrycks &
      Gimpel, arXiv 1610.02136). Higher is better; chance is the positive class's share of all images.
    - "fpr95_in": share of images out of distribution that are accepted where 95 % of those in distribution are (ODIN, Liang
      et al., ICLR 2018, arXiv 1706.02690: the usual convention). Lower is better.
    - "fpr95_out": share of images in distribution that are rejected where 95 % of those out of it are (pytorch-ood's
      convention). Lower is better. The two differ on the same scores.

    FPR95 is the smallest false positive rate of a threshold whose true positive rate is at least 0.95.

    Args:
        in_scores, out_scores: shapes (N,) and (M,), of any scale.

    Raises:
        InputError: an empty set, scores that are not finite, or of another shape.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    inside, outside = _checked(in_scores, "in-distribution"), _checked(out_scores, "out-of-distribution")
    scores = np.concatenate([inside, outside])
    is_in = np.repeat([1, 0], [len(inside), len(outside)])
    return {
        "auroc": float(roc_auc_score(is_in, scores)),
        # Sums of shares round to a little more than 1.
        "aupr_out": min(1.0, float(average_precision_score(1 - is_in, -scores))),
        "aupr_in": min(1.0, float(average_precision_score(is_in, scores))),
        "fpr95_in": _fpr95(is_in, scores),
        "fpr95_out": _fpr95(1 - is_in, -scores),
    }


def _fpr95(positive: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


def _checked(scores: Tensor, name: str) -> np.ndarray:
    scores = numbers(scores, f"{name} scores").double().numpy()
    if scores.ndim != 1:
        raise InputError(f"{name} scores have shape {scores.shape}: give one score per image, shape (N,)")
    if len(scores) == 0:
        raise InputError(f"there are no {name} scores: give at least one")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise InputError(f"{bad} of {len(scores)} {name} scores are not finite: the model is broken, or the score overflows")
    return scores


def auroc_interval(in_scores: Tensor, out_scores: Tensor, *, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979), 95 %, of the AUROC; images of either set are drawn from that set.

    It knows the images' part of the uncertainty, not the training's; of sets that are perfectly apart it is [1, 1].

    Args:
        in_scores, out_scores: as :func:`ood_metrics`', and errors as there.
        num_resamples: how often images are drawn anew.
        seed: of the draws.
    """
    check_whole("num_resamples", num_resamples, 1)
    inside, outside = _checked(in_scores, "in-distribution"), _checked(out_scores, "out-of-distribution")
    levels, rank = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    rank_in, rank_out = rank[: len(inside)], rank[len(inside) :]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        drawn = np.bincount(rank_out[rng.integers(len(outside), size=len(outside))], minlength=len(levels))
        beaten = drawn.cumsum() - drawn / 2  # ties count half
        values.append(beaten[rank_in[rng.integers(len(inside), size=len(inside))]].mean() / len(outside))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
