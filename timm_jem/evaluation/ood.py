"""Out-of-distribution detection: scores of images, and how well they tell two sets apart."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from accelerate.utils import tqdm
from torch import Tensor

from timm_jem.energy import log_density
from timm_jem.errors import InputError, check_number, check_whole
from timm_jem.evaluation.labelled import eight_bit_images, numbers
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels

__all__ = ["SCORES", "auroc_interval", "ood_metrics", "ood_scores", "typicality"]

SCORES = ("log p(x)", "max softmax", "max logit = log p(x, y*)", "approximate mass", "typicality", "feature distance")
_DENSITY, _SOFTMAX, _LOGIT, _MASS, *_ = SCORES


def ood_scores(
    jem: JEM,
    images: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    approximate_mass: bool = True,
    batch_size: int = 256,
    desc: str = "scoring",
) -> dict[str, Tensor]:
    """Scores of images, higher = more like the training data: one forward a batch gives all of them.

    - "log p(x)": logsumexp f(x), up to the constant log Z (JEM, arXiv 1912.03263, eq. 7 and section 5.3).
    - "max softmax": max_y p(y|x) (Hendrycks & Gimpel, ICLR 2017, arXiv 1610.02136; JEM, section 5.3).
    - "max logit = log p(x, y*)": max_y f(x)[y] (Hendrycks et al., ICML 2022, arXiv 1911.11132). Of a joint energy model
      it is also −E(x, y*), the class-conditional energy of the predicted class y*: the same number, not another score.
    - "approximate mass": −‖∇ log p‖₂ (JEM, section 5.3), the gradient with respect to pixels in [-1, 1], and not to model
      input, so that backbones of other normalisation compare. One backward more.

    The fifth of :data:`SCORES` is made of the first: :func:`typicality`. The sixth needs features of images in distribution:
    :class:`timm_jem.evaluation.feature_distance.ClassFeatures`.

    Args:
        jem: the model; in eval mode meanwhile, and left as it was.
        images: 8-bit images, shape (N, C, H, W); or batches of them, or of (images, labels), e.g. a DataLoader's.
        approximate_mass: whether to score it: what the backward costs is saved without.
        batch_size: images through the network at once; batches that are given are taken as they are.
        desc: of the progress bar.

    Returns:
        Scores by name, in the order of :data:`SCORES`, each float64, shape (N,), on the CPU. What is not finite is left so,
        and refused by the metrics.

    Raises:
        InputError: images that are not 8-bit, of another shape, or none.
    """
    check_whole("batch_size", batch_size, 1)
    if not isinstance(images, Iterable):
        raise InputError(f"images are a {type(images).__name__}: give a uint8 tensor (N, C, H, W), or batches of that")
    if isinstance(images, Tensor):
        images = eight_bit_images(images).split(batch_size)
    device = jem.mean.device
    # Float32 would round confidences to 1, and tie them.
    wide = torch.float32 if device.type == "mps" else torch.float64
    found: dict[str, list[Tensor]] = {name: [] for name in (SCORES[:4] if approximate_mass else SCORES[:3])}
    with frozen(jem), torch.inference_mode(False), torch.set_grad_enabled(approximate_mass):
        for batch in _images(tqdm(images, desc=desc, leave=False), jem.input_size[0]):
            u = to_pixels(batch.to(device)).requires_grad_(approximate_mass)
            logits = jem(jem.normalize(u))
            if approximate_mass:
                gradient = torch.autograd.grad(log_density(logits).sum(), u)[0]
                found[_MASS].append(-gradient.flatten(1).norm(dim=1))
            logits = logits.detach().to(wide)
            found[_DENSITY].append(log_density(logits))
            found[_SOFTMAX].append(logits.softmax(1).amax(1))
            found[_LOGIT].append(logits.amax(1))
    if not found[_DENSITY]:
        raise InputError("there are no images to score: give at least one")
    return {name: torch.cat(parts).cpu().double() for name, parts in found.items()}


def _images(batches: Iterable[Tensor | tuple[Tensor, Tensor]], channels: int) -> Iterator[Tensor]:
    for batch in batches:
        yield eight_bit_images(batch[0] if isinstance(batch, (tuple, list)) else batch, channels=channels)


def typicality(log_density: Tensor, reference: Tensor) -> Tensor:
    """−|log p(x) − mean log p of held-out images|: images that are too likely are out of distribution, too.

    Source: Nalisnick et al., "Detecting out-of-distribution inputs to deep generative models using typicality"
    (arXiv 1906.02994), for batches of one image. The constant log Z cancels.

    Args:
        log_density: log p(x) of the images to score, shape (N,).
        reference: log p(x) of held-out images in distribution, which neither trained the model nor are scored; shape (M,).

    Returns:
        float64, shape (N,), on the CPU; NaN or −inf where a score of an image is not finite, which the metrics refuse.

    Raises:
        InputError: no held-out images, one whose log p(x) is not finite, or scores of another shape.
    """
    reference = torch.from_numpy(_checked(reference, "held-out"))
    scores = numbers(log_density, "scores").double()
    if scores.ndim != 1:
        raise InputError(f"log p(x) has shape {tuple(scores.shape)}: give one score per image, shape (N,)")
    return -(scores - reference.mean()).abs()


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


def auroc_interval(
    in_scores: Tensor, out_scores: Tensor, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979) of the AUROC; images of either set are drawn from that set.

    It knows the images' part of the uncertainty, not the training's; of sets that are perfectly apart it is [1, 1].

    Args:
        in_scores, out_scores: as :func:`ood_metrics`', and errors as there.
        level: of confidence.
        num_resamples: how often images are drawn anew.
        seed: of the draws.
    """
    check_whole("num_resamples", num_resamples, 1)
    check_number("level", level, above=0, most=1)
    inside, outside = _checked(in_scores, "in-distribution"), _checked(out_scores, "out-of-distribution")
    levels, rank = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    rank_in, rank_out = rank[: len(inside)], rank[len(inside) :]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        drawn = np.bincount(rank_out[rng.integers(len(outside), size=len(outside))], minlength=len(levels))
        beaten = drawn.cumsum() - drawn / 2  # ties count half
        values.append(beaten[rank_in[rng.integers(len(inside), size=len(inside))]].mean() / len(outside))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
