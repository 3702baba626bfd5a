"""Scores of images by logits, energies and features, in closed form: higher = further out."""

from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.inputs import kind

__all__ = ["gradnorm", "max_logit", "msp", "typicality"]


def msp(logits: Tensor) -> Tensor:
    """−max_y p(y|x), the maximum softmax probability (Hendrycks & Gimpel, ICLR 2017, arXiv 1610.02136; JEM, arXiv 1912.03263,
    section 5.3).

    Args:
        logits: f(x), shape (B, num_classes).

    Returns:
        float64, shape (B,), on the CPU: float32 would round confidences to 1, and tie them.
    """
    return -logits.cpu().double().softmax(1).amax(1)


def max_logit(logits: Tensor) -> Tensor:
    """−max_y f(x)[y] (Hendrycks et al., ICML 2022, arXiv 1911.11132).

    Of a joint energy model it is also E(x, y*), the class-conditional energy of the predicted class y*: the same number, not
    another score. Arguments and result as :func:`msp`.
    """
    return -logits.cpu().double().amax(1)


def gradnorm(logits: Tensor, features: Tensor) -> Tensor:
    """−‖∂KL(u ‖ softmax f(x)) / ∂W‖₁ of the last layer's weight W, with u uniform (Huang et al., "On the importance of
    gradients for detecting distributional shifts in the wild", NeurIPS 2021, arXiv 2110.00218, section 3).

    That gradient is the outer product of softmax f(x) − u and the features, and so its norm the product of theirs (section 5
    there). The temperature is 1; the authors' code sums over classes, which is num_classes times as much.

    Args:
        logits: f(x), shape (B, num_classes).
        features: what the last layer takes, shape (B, D).

    Returns:
        float64, shape (B,), on the CPU.
    """
    p = logits.cpu().double().softmax(1)
    return -(p - 1 / p.shape[1]).abs().sum(1) * features.cpu().double().abs().sum(1)


def typicality(energies: Tensor, reference: Tensor) -> Tensor:
    """|E(x) − mean E of held-out images|: images that are too likely are out of distribution, too.

    Source: Nalisnick et al., "Detecting out-of-distribution inputs to deep generative models using typicality" (arXiv
    1906.02994), for batches of one image. The constant log Z cancels.

    Args:
        energies: E(x) of the images to score, shape (N,).
        reference: E(x) of held-out images in distribution, which neither trained the model nor are scored, shape (M,).

    Returns:
        float64, shape (N,), on the CPU; NaN or inf where an energy is not finite, which the metrics refuse.

    Raises:
        InputError: no held-out images, one whose energy is not finite, or energies of another shape.
    """
    for what, values in (("E(x)", energies), ("E(x) of held-out images", reference)):
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise InputError(f"{what} is {kind(values)}: give one energy per image, shape (N,)")
    reference = reference.cpu().double()
    if not len(reference) or not reference.isfinite().all():
        bad = int((~reference.isfinite()).sum())
        raise InputError(f"{bad} of {len(reference)} energies of held-out images are not finite: give at least one that is")
    return (energies.cpu().double() - reference.mean()).abs()
