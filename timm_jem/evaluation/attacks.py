"""Attacks on classifiers of images in [0, 1]: projected gradient descent.

Images are in [0, 1] here and in the refinement defence, so that ε = 8/255 is eight grey levels, as the literature has it; a
classifier maps such images, float, shape (N, C, H, W), to logits. :func:`pixel_classifier` maps them to a model's input.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.evaluation.labelled import labels
from timm_jem.model import JEM
from timm_jem.modes import checkpointed, frozen
from timm_jem.noise import randn, uniform_noise
from timm_jem.pixels import from_unit
from timm_jem.progress import tqdm

__all__ = [
    "Classifier",
    "PGDConfig",
    "check_attackable",
    "check_logits",
    "check_norm",
    "first_logits",
    "l2_step",
    "margin",
    "pgd",
    "pgd_end",
    "pixel_classifier",
]

Classifier = Callable[[Tensor], Tensor]


def pixel_classifier(jem: JEM) -> Classifier:
    """The classifier p(y|x) on images in [0, 1]: logits of ``jem.normalize(2 · images − 1)``, in eval mode.

    Half-precision logits become float32; a gradient reaches the images, and no parameter. Under gradient checkpointing, which
    would run layers again in the model's own modes, images that need one are an InputError.
    """

    def classify(images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != jem.input_size[0]:
            raise InputError(f"images have shape {tuple(images.shape)}: this model takes (N, {jem.input_size[0]}, H, W)")
        if images.requires_grad and torch.is_grad_enabled() and checkpointed(jem):
            raise InputError("gradient checkpointing runs layers again in other modes: set_grad_checkpointing(False)")
        if jem.fixed_input_size and tuple(images.shape[1:]) != jem.input_size:
            raise InputError(f"images have shape {tuple(images.shape)}: this model takes {('N', *jem.input_size)} only")
        with frozen(jem):
            logits = jem(jem.normalize(from_unit(images.to(jem.device))))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    return classify


@dataclass(frozen=True)
class PGDConfig:
    """Projected gradient descent on the cross-entropy (Madry et al., ICLR 2018, arXiv 1706.06083, section 2.1).

    Attributes:
        norm: linf or l2.
        eps: radius of the ball, in [0, 1] pixel units; 8/255 is the usual one for ℓ∞ and CIFAR-10.
        steps: gradient steps (Madry et al.: 7 to 100).
        step_size: None: 2.5 · eps / steps, so that a chain can reach the ball's edge from any start in it (as the same
            authors' public challenge has it).
        restarts: random starts; an image counts as broken if one of them breaks it.
        eot: forward passes whose mean gradient makes a step, against classifiers that draw noise (expectation over
            transformation: Athalye et al., ICML 2018, arXiv 1802.00420, section 4.2).

    Raises:
        InputError: a value outside its range.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 8 / 255
    steps: int = 40
    step_size: float | None = None
    restarts: int = 1
    eot: int = 1

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_number("eps of an attack", self.eps, least=0)
        if self.step_size is not None:
            check_number("step_size of an attack", self.step_size, above=0)
        for name in ("steps", "restarts", "eot"):
            check_whole(f"{name} of an attack", getattr(self, name), 1)


def check_norm(norm: str) -> None:
    """Raise an InputError unless attacks have balls of this norm."""
    if norm not in ("linf", "l2"):
        raise InputError(f"norm of an attack is {quoted(norm)}: give linf or l2")


def check_attackable(images: Tensor, y: Tensor) -> Tensor:
    """Labels as int64, shape (N,), on the images' device.

    Raises:
        InputError: ``images`` are no floats in [0, 1], shape (N, C, H, W), or don't have a label each, at least 0.
    """
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64) or images.ndim != 4:
        what = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise InputError(
            f"images to attack are {what}: give float32, (N, C, H, W), in [0, 1], i.e. 8-bit images divided by 255"
        )
    if not images.numel():
        raise InputError(f"images to attack have shape {tuple(images.shape)}: give at least one, of at least one pixel")
    y = labels(y, len(images), what="labels of images to attack").to(images.device)
    if y.min() < 0:
        raise InputError(f"the least label of images to attack is {y.min().item()}: give labels of at least 0")
    if not (images.min() >= 0 and images.max() <= 1):  # NaN included
        low, high = images.min().item(), images.max().item()
        raise InputError(f"images to attack lie in [{low:g}, {high:g}]: give [0, 1], i.e. 8-bit images divided by 255")
    return y


def check_logits(logits: Tensor) -> Tensor:
    """``logits``, or an InputError if they are not finite: NaN would compare as neither right nor wrong."""
    if not logits.isfinite().all():
        raise InputError("the attacked classifier gives logits that are not finite: it can't be judged by attacks")
    return logits


@torch.no_grad()
def first_logits(classifier: Classifier, images: Tensor, y: Tensor) -> Tensor:
    """Of two images: they tell where the classifier works, and how many classes it has.

    Raises:
        InputError: logits that are not finite, or a label of a class that the classifier doesn't have.
    """
    logits = check_logits(classifier(images[:2]))
    if y.max() >= logits.shape[1]:
        raise InputError(f"a label of the images to attack is {y.max().item()}: the classifier has {logits.shape[1]} classes")
    return logits


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j ≠ y} f_j − f_y, shape (N,): above 0 where the classifier is wrong. Of one class it is −inf.

    Raises:
        InputError: logits that are not (N, num_classes), or labels that don't fit.
    """
    if logits.ndim != 2:
        raise InputError(f"logits have shape {tuple(logits.shape)}: give (N, num_classes)")
    return _margin(logits, labels(y, len(logits), logits.shape[1]).to(logits.device))


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    others = logits.scatter(1, y[:, None], -math.inf)
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def pgd(
    classifier: Classifier,
    images: Tensor,
    y: Tensor,
    config: PGDConfig,
    *,
    generator: torch.Generator | None,
    batch_size: int = 256,
    desc: str = "PGD",
) -> Tensor:
    """The images of the ball that fool ``classifier`` most, of all that the attack comes by.

    Every restart begins at a random point of the ball. Of every image the iterate with the largest :func:`margin` (its
    mean over ``eot`` draws) is kept, the image itself and all restarts included. Works under ``no_grad`` and
    ``inference_mode``, and leaves no gradient on parameters.

    Args:
        classifier: maps images in [0, 1], (B, C, H, W), to logits, (B, num_classes), on its own device; in eval mode.
        images: float32 or float64, in [0, 1], shape (N, C, H, W).
        y: their labels, int64, shape (N,).
        config: see :class:`PGDConfig`.
        generator: the only source of randomness of the attack; None: PyTorch's global one.
        batch_size: images at once; a classifier without noise gives the same for any.
        desc: of the progress bar.

    Returns:
        Shape of ``images``, on their device; none further than ``eps`` from its image, and all in [0, 1].

    Raises:
        InputError: images outside [0, 1], labels that don't fit, or logits or gradients that are not finite.
    """
    y = check_attackable(images, y)
    check_whole("batch_size", batch_size, 1)
    with torch.inference_mode(False), torch.enable_grad():
        images, y = images.detach().clone(), y.clone()
        if config.eps == 0:
            return images
        device = first_logits(classifier, images, y).device
        best, margins = images.clone(), [-math.inf] * math.ceil(len(images) / batch_size)
        work = [(restart, part) for restart in range(config.restarts) for part in range(len(margins))]
        for restart, part in tqdm(work, desc=desc, leave=False):
            if part == 0:  # noise of all images at once: the same for any batch_size
                starts = _start(images, config, generator)
            rows = slice(part * batch_size, (part + 1) * batch_size)
            x, own, kept = images[rows].to(device), y[rows].to(device), best[rows].to(device)
            if restart == 0:
                margins[part] = _margins(classifier, x, own, config.eot)
            point = _project(starts[rows].to(device), x, config)
            for step in range(config.steps + 1):
                if step < config.steps:
                    gradient, now = _ascent(classifier, point, own, config.eot)
                else:
                    gradient, now = None, _margins(classifier, point, own, config.eot)
                better = now > margins[part]
                kept = torch.where(better[:, None, None, None], point, kept)
                margins[part] = torch.where(better, now, margins[part])
                if gradient is not None:
                    point = _project(point + _step(gradient, config), x, config)
            best[rows] = kept.to(best.device)
    return best


def pgd_end(
    classifier: Classifier, images: Tensor, y: Tensor, config: PGDConfig, *, generator: torch.Generator | None
) -> Tensor:
    """Where one run of :func:`pgd` ends, to train on (Madry et al., ICLR 2018, arXiv 1706.06083, section 2.1).

    Unlike there no iterate is preferred, nothing is checked, and nothing waits for the device.

    Args:
        classifier: maps images in [0, 1], (N, C, H, W), to logits; in eval mode.
        images: in [0, 1], on the classifier's device, shape (N, C, H, W).
        y: their labels, int64, shape (N,); −1, unknown: such an image moves nowhere but to where the attack starts.
        config: see :class:`PGDConfig`; of its restarts there is one.
        generator: the only source of randomness; None: PyTorch's global one.
    """
    with torch.inference_mode(False), torch.enable_grad():
        point = _project(_start(images, config, generator), images, config)
        for _ in range(config.steps):
            point.requires_grad_(True)
            loss = nn.functional.cross_entropy(classifier(point), y, ignore_index=-1, reduction="sum")
            gradient = torch.autograd.grad(loss, point)[0]
            point = _project(point.detach() + _step(gradient, config), images, config)
    return point


def _start(images: Tensor, config: PGDConfig, generator: torch.Generator | None) -> Tensor:
    """A random point of each ball: uniform for ℓ∞; for ℓ2 of uniform direction and of the radius that makes it uniform."""
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    if config.norm == "linf":
        return images + config.eps * uniform_noise(images.shape, **options)
    noise = randn(images.shape, **options)
    radius = ((uniform_noise((len(images), 1, 1, 1), **options) + 1) / 2) ** (1 / images[0].numel())
    return images + config.eps * radius * noise / _norm(noise)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def _step(gradient: Tensor, config: PGDConfig) -> Tensor:
    size = 2.5 * config.eps / config.steps if config.step_size is None else config.step_size
    if config.norm == "linf":
        return size * gradient.sign()
    return l2_step(gradient, size)


def l2_step(gradient: Tensor, size: float) -> Tensor:
    """Along each image's gradient, ℓ2 length ``size``; none where it is zero. Both of shape (B, C, H, W)."""
    # A confident classifier's gradient is so small that its squares are 0: make the largest entry 1 first.
    peak = gradient.abs().amax((1, 2, 3), keepdim=True)
    gradient = gradient / torch.where(peak > 0, peak, 1)
    return size * gradient / _norm(gradient).clamp_min(1)


def _project(point: Tensor, images: Tensor, config: PGDConfig) -> Tensor:
    """Into the ball and into [0, 1]. Cutting to [0, 1] never leads out of a ball whose centre is in it.

    Sums round by half a step at most, so that one step back towards the centre is never outside.
    """
    # Casting ε may have rounded it up.
    number = np.float32 if images.dtype == torch.float32 else np.float64
    eps = float(np.nextafter(number(config.eps), number(0)))
    if config.norm == "linf":
        low, high = (torch.nextafter(images + edge, images) for edge in (-eps, eps))
        return point.clamp(low, high).clamp(0, 1).detach()
    away = point - images
    norm = _norm(away)
    eps *= 1 - 8 * torch.finfo(images.dtype).eps  # what the norm itself rounds by
    cut = torch.nextafter(images + away * (eps / norm.clamp_min(eps)), images)
    return torch.where(norm > eps, cut, point).clamp(0, 1).detach()


def _ascent(classifier: Classifier, point: Tensor, y: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """The gradient of the cross-entropy and the margin, means over ``eot`` passes."""
    gradients, margins = 0, 0
    for _ in range(eot):
        x = point.clone().requires_grad_(True)
        logits = check_logits(classifier(x))
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        # A classifier whose gradient is cut off has none: an attacker sees zeros.
        gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
        gradients = gradients + (torch.zeros_like(x) if gradient is None else gradient)
        margins = margins + _margin(logits.detach(), y)
    if not gradients.isfinite().all():
        raise InputError("the attacked classifier has a gradient that is not finite: PGD can't follow it")
    return gradients / eot, margins / eot


@torch.no_grad()
def _margins(classifier: Classifier, point: Tensor, y: Tensor, eot: int) -> Tensor:
    return sum(_margin(check_logits(classifier(point)), y) for _ in range(eot)) / eot
