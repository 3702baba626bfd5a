"""How close drawn images are to real ones."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_jem.errors import InputError, check_whole, importing
from timm_jem.evaluation.labelled import eight_bit_images, labels, numbers
from timm_jem.progress import tqdm

__all__ = [
    "FEWEST_SAMPLES",
    "FEWEST_SCORED",
    "frechet_distance",
    "inception_score",
    "nearest_neighbours",
    "pyramid",
    "sample_quality",
    "thumbnails",
    "within_class_distance",
]

FEWEST_SAMPLES = 5  # whose distances to others are defined
FEWEST_SCORED = 10  # one for each part of an Inception score
# (E|z|^½)² of standard normal z.
_OF_NORMAL = math.sqrt(2) * math.gamma(0.75) ** 2 / math.pi


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (Heusel et al., NeurIPS 2017, eq. 6).

    |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), in float64. The last trace is the sum of the singular values of
    R_a R_bᵀ, where C = RᵀR, whose squares are the product's eigenvalues.

    Args:
        a, b: features, shapes (N, D) and (M, D), at least two rows each.

    Returns:
        The distance, never below 0; NaN where a feature is not finite.

    Raises:
        InputError: fewer than two rows, or features of other shapes.
    """
    a, b = _features(a, b, 2, "the Fréchet distance")
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan  # LAPACK would not survive it
    scale = torch.cat([a, b]).abs().max().item() or 1.0  # squares of what is this large would overflow, and kill LAPACK
    a, b = a / scale, b / scale
    # R by QR of the features themselves: roots of a covariance's own eigenvalues would turn its rounding into its square root.
    r_a, r_b = (torch.linalg.qr(x - x.mean(0), mode="r").R / math.sqrt(len(x) - 1) for x in (a, b))
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    distance = (mean + r_a.square().sum() + r_b.square().sum() - 2 * cross).item()
    return max(0.0, distance) * scale * scale  # below 0 is rounding: of equal sets


def _features(a: Tensor, b: Tensor, least: int, what: str) -> tuple[Tensor, Tensor]:
    """Two sets of features of one kind, float64, on the CPU."""
    a, b = (numbers(features, "features").double() for features in (a, b))
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or a.shape[1] == 0:
        raise InputError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: give (N, D) and (M, D), of one kind")
    if min(len(a), len(b)) < least:
        raise InputError(f"{what} of {len(a)} and {len(b)} images is undefined: give at least {least} of each")
    return a, b


def thumbnails(u: Tensor) -> Tensor:
    """Pixels averaged down to 8×8 at most, clamped to [-1, 1], flattened: (N, C, H, W) to (N, C · 64 or less).

    Raises:
        InputError: no floats of that shape.
    """
    if not isinstance(u, Tensor) or u.ndim != 4 or 0 in u.shape[1:] or not u.is_floating_point():
        raise InputError("thumbnails are made of pixels: give a tensor of floats, (N, C, H, W), in [-1, 1]")
    size = [min(side, 8) for side in u.shape[-2:]]
    return F.adaptive_avg_pool2d(u.clamp(-1, 1), size).flatten(1)


def pyramid(u: Tensor) -> Tensor:
    """:func:`thumbnails`, and how strong the detail is that these drop: (N, C, H, W) to (N, C · (64 + 4 a level) or less).

    In thumbnails noise averages out, and blurred images are as good as sharp ones. The detail is a Laplacian pyramid's (Burt
    and Adelson, 1983): sides are halved by averaging until they are 8, and each level is what an image differs by from the
    next smaller one. Its strength is taken in each quarter of the image, as the standard deviation of normal noise that has
    the same mean of |d|^½, and weighed as in the ℓ2 distance of pixels, in units of a thumbnail's pixel. Not as its own
    standard deviation, because noise adds to edges in quadrature, and so is hidden by them: the mean of roots is mostly of
    the flat parts, where noise is what one sees. Images up to 8×8 have no such detail: theirs are their thumbnails, bit for
    bit.

    Raises:
        InputError: no floats of that shape.
    """
    features = [thumbnails(u)]
    u, size = u.clamp(-1, 1), list(u.shape[-2:])
    last, quarters = [min(side, 8) for side in size], [min(side, 2) for side in size]
    weight = math.sqrt(math.prod(last) / math.prod(quarters)) / _OF_NORMAL
    while size != last:
        size = [max(end, (side + 1) // 2) for side, end in zip(size, last, strict=True)]
        smaller = F.adaptive_avg_pool2d(u, size)
        detail = u - F.interpolate(smaller, u.shape[-2:], mode="nearest-exact")
        features.append(weight * F.adaptive_avg_pool2d(detail.abs().sqrt(), quarters).square().flatten(1))
        u = smaller
    return torch.cat(features, 1)


def sample_quality(fake: Tensor, real: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Distances of samples to real images in the features of an extractor.

    Args:
        fake, real: features, shapes (N, D) and (M, D).
        seed: of KID's subsets.

    Returns:
        ``frechet``: see :func:`frechet_distance`. It is biased: too large where N or M are not far above D, and with
        fewer images than dimensions the covariances are not even of full rank.
        ``kid``, ``kid_std``: squared maximum mean discrepancy of the kernel (x·y / D + 1)³, unbiased, mean and standard
        deviation over 100 subsets of 1,000 images, or of min(N, M) where that is less (Bińkowski et al., ICLR 2018, arXiv
        1801.01401, section 4). Subsets that are the whole set are always the same: the deviation is then too small.
        ``precision``, ``recall``: share of samples within the 3-nearest-neighbour balls of real images, and the reverse
        (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991, section 2). By torch-fidelity.

    Raises:
        InputError: fewer than five images, features of different extractors or not finite; torch-fidelity is missing.
    """
    fake, real = _features(fake, real, FEWEST_SAMPLES, "the quality of samples against real images")
    if not (fake.isfinite().all() and real.isfinite().all()):
        raise InputError("features are not finite, so they have no precision or recall: check the extractor and its input")
    with importing("torch-fidelity", "the quality of samples", "eval"):
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    size = min(1000, len(fake), len(real))
    kid = kid_features_to_metric(
        fake, real, kid_subsets=100, kid_subset_size=size, kid_kernel="poly", rng_seed=seed, verbose=False
    )
    if not math.isfinite(kid["kernel_inception_distance_mean"]):
        raise InputError(f"features of up to {max(fake.abs().max(), real.abs().max()):.3g} are too large for KID: scale them")
    # In parts: all distances of 50,000 real images would be 20 GB.
    prc = prc_features_to_metric(fake, real, prc_neighborhood=3, save_cpu_ram=True, prc_batch_size=1000, verbose=False)
    return {
        "frechet": frechet_distance(fake, real),
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) ‖ p(y)): mean and standard deviation over ten parts, by torch-fidelity.

    Source: Salimans et al., NeurIPS 2016 (arXiv 1606.03498), section 4. Between 1 and the number of classes, but no part
    of n images can have more than n: it is too small for few images. Name the classifier whose logits these are.

    Args:
        logits: of the samples, shape (N, num_classes).
        seed: of the parts.

    Returns:
        Mean and standard deviation; NaN where a logit is not finite.

    Raises:
        InputError: fewer than ten samples, or logits of another shape; torch-fidelity is missing.
    """
    logits = numbers(logits, "logits")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"logits have shape {tuple(logits.shape)}: give (N, num_classes)")
    if len(logits) < FEWEST_SCORED:
        raise InputError(f"an Inception score of {len(logits)} samples in ten parts: give at least ten")
    with importing("torch-fidelity", "the Inception score", "eval"):
        from torch_fidelity.metric_isc import isc_features_to_metric
    # A probability that underflows in all images would be 0 · log 0 there: NaN.
    log_p = logits.double().log_softmax(1).clamp(min=-700)
    found = isc_features_to_metric(log_p, splits=10, shuffle=True, rng_seed=seed)
    return found["inception_score_mean"], found["inception_score_std"]


def nearest_neighbours(images: Tensor, train: Tensor, k: int = 1, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The ``k`` training images nearest to each image, by the ℓ2 distance of pixels in [0, 1]; 0 for a copy, exactly.

    Args:
        images, train: uint8, shapes (N, C, H, W) and (M, C, H, W).
        k: how many, at most M.
        batch_size: images compared at once with four times as many training images.

    Returns:
        Distances, nearest first, float64, and rows of ``train``, int64, shapes (N, k).

    Raises:
        InputError: images that are not 8-bit or of different shapes, or fewer than ``k`` training images.
    """
    eight_bit_images(images, "images")
    if eight_bit_images(train, "training images").shape[1:] != images.shape[1:]:
        raise InputError(f"neighbours of images {tuple(images.shape)} among {tuple(train.shape)}: give images of one shape")
    check_whole("k", k, 1)
    check_whole("batch_size", batch_size, 1)
    if k > len(train):
        raise InputError(f"{k} nearest neighbours among {len(train)} training images: give more of them")
    best = [(torch.empty(len(part), 0).double(), torch.empty(len(part), 0).long()) for part in images.split(batch_size)]
    for start in tqdm(range(0, len(train), 4 * batch_size), desc="nearest neighbours", leave=False):
        # Whole numbers in float64: squared distances are exact, where float32 would lose small ones.
        known = train[start : start + 4 * batch_size].flatten(1).double()
        for i, part in enumerate(images.split(batch_size)):
            distances = torch.cat([best[i][0], torch.cdist(part.flatten(1).double(), known).cpu()], 1)
            rows = torch.cat([best[i][1], (torch.arange(len(known)) + start).expand(len(part), -1)], 1)
            nearest = distances.topk(min(k, distances.shape[1]), largest=False)
            best[i] = nearest.values, rows.gather(1, nearest.indices)
    return torch.cat([values for values, _ in best]) / 255, torch.cat([rows for _, rows in best])


def within_class_distance(images: Tensor, y: Tensor, *, batch_size: int = 256) -> float:
    """Mean ℓ2 distance between two images of the same class, pixels in [0, 1]: over pairs, then over classes.

    Samples whose distance is far below that of real images have collapsed to few images a class. It can't tell variety from
    noise: independent noise of standard deviation s in each of D numbers makes d² + 2Ds² of a squared distance d². So noise
    raises it, beyond real images', too, and can hide a collapse: believe it only of samples that a classifier reads as asked
    and whose precision is high.

    Args:
        images: uint8, shape (N, C, H, W).
        y: their classes, shape (N,). Images of unknown class, below 0, and classes of one image are left out.
        batch_size: images compared at once with as many.

    Returns:
        The distance; NaN where no class has two images.

    Raises:
        InputError: images that are not 8-bit, or classes that don't fit.
    """
    y = labels(y, len(eight_bit_images(images, "images to compare")), what="classes of images")
    check_whole("batch_size", batch_size, 1)
    means = []
    for label, n in zip(*y[y >= 0].unique(return_counts=True), strict=True):
        parts, total = images[y == label].flatten(1).split(batch_size), 0.0
        for i, a in enumerate(parts):
            for b in parts[i:]:  # whole numbers in float64, as in nearest_neighbours: copies are 0 apart
                distances = torch.cdist(a.double(), b.double())
                total += (distances.triu(1) if a is b else distances).sum().item()
        means += [total / (n.item() * (n.item() - 1) / 2) / 255] if n > 1 else []
    return math.fsum(means) / len(means) if means else math.nan
