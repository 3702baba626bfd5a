"""Accuracy under attacks of growing size, and checks that the attacks deserve trust."""

import importlib.util
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.evaluation.attacks import Classifier, PGDConfig, check_attackable, check_logits, pgd
from timm_jem.evaluation.auto_attack import auto_attack
from timm_jem.noise import randn, uniform_noise
from timm_jem.progress import tqdm

__all__ = ["NORMS", "Check", "is_correct", "robust_correct", "sanity_checks", "sized", "transfer_correct"]

NORMS = {"linf": "ℓ∞", "l2": "ℓ2"}  # as readers know them


def sized(norm: str, epsilon: float) -> str:
    """The size of an attack, in [0, 1] pixel units, as reports show it: ℓ∞ in grey levels."""
    return f"ε = {epsilon * 255:g}/255" if norm == "linf" else f"ε = {epsilon:g}"


@torch.no_grad()
def is_correct(classifier: Classifier, images: Tensor, y: Tensor, batch_size: int = 256) -> Tensor:
    """Whether images in [0, 1] are classified as their labels: bool, shape (N,), on the CPU.

    Raises:
        InputError: images outside [0, 1], labels that don't fit, or logits that are not finite.
    """
    y = check_attackable(images, y).cpu()
    check_whole("batch_size", batch_size, 1)
    return torch.cat([check_logits(classifier(part)).argmax(1).cpu() for part in images.split(batch_size)]) == y


def robust_correct(
    classifier: Classifier,
    images: Tensor,
    y: Tensor,
    config: PGDConfig,
    epsilons: Sequence[float],
    *,
    generator: torch.Generator | None,
    stochastic: bool = False,
    batch_size: int = 256,
    desc: str = "PGD",
) -> dict[float, Tensor]:
    """Which images are classified rightly under PGD of each size: the curve of JEM's figure 5 (arXiv 1912.03263).

    What breaks an image in a small ball is in every larger one as well, so that an image broken once stays broken, unless
    the classifier draws noise: then each size is attacked by itself, and judged by a call with new noise.

    Args:
        classifier, images, y: as :func:`timm_jem.evaluation.attacks.pgd`'s.
        config: the attack; its ``eps`` is replaced.
        epsilons: radii, in [0, 1] pixel units; 0 is no attack.
        generator: the attacks' only source of randomness.
        stochastic: the classifier draws noise.
        batch_size: images at once.
        desc: of the progress bars.

    Returns:
        For each radius, in increasing order, bool, shape (N,), on the CPU.

    Raises:
        InputError: a radius below 0, or as :func:`timm_jem.evaluation.attacks.pgd`.
    """
    y = check_attackable(images, y)
    if isinstance(epsilons, numbers.Real) or epsilons is None:
        raise InputError(f"epsilons are {quoted(epsilons)}: give a list of radii, in [0, 1] pixel units")
    for eps in epsilons:
        check_number("eps of an attack", eps, least=0)
    found, alive = {}, torch.ones(len(y), dtype=torch.bool)
    for eps, attack in {eps: replace(config, eps=eps) for eps in sorted(epsilons)}.items():
        rows = torch.ones(len(y), dtype=torch.bool) if stochastic else alive
        correct = torch.zeros(len(y), dtype=torch.bool)
        if rows.any():
            options = {"generator": generator, "batch_size": batch_size, "desc": f"{desc}, ε = {eps:.3g}"}
            broken = pgd(classifier, images[rows], y[rows], attack, **options)
            correct[rows] = is_correct(classifier, broken, y[rows], batch_size)
        found[eps], alive = correct, correct
    return found


def transfer_correct(
    source: Classifier,
    target: Classifier,
    images: Tensor,
    y: Tensor,
    config: PGDConfig,
    *,
    generator: torch.Generator | None,
    batch_size: int = 256,
) -> Tensor:
    """Which images ``target`` classifies rightly after PGD on ``source``; arguments as :func:`robust_correct`'s."""
    broken = pgd(source, images, y, config, generator=generator, batch_size=batch_size, desc="PGD to transfer")
    return is_correct(target, broken, y, batch_size)


@dataclass(frozen=True)
class Check:
    """One sign of attacks that can be trusted: it fails where ``value`` is above ``limit``.

    Attributes:
        name: what was expected.
        value, limit: shares of images.
        detail: what a failure means.
    """

    name: str
    value: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # NaN fails


def sanity_checks(
    classifier: Classifier,
    images: Tensor,
    y: Tensor,
    config: PGDConfig,
    *,
    generator: torch.Generator | None,
    batch_size: int = 256,
    surrogate: Classifier | None = None,
    tolerance: float = 0.02,
) -> list[Check]:
    """Signs of masked gradients and of broken attacks.

    Source: Athalye et al., ICML 2018 (arXiv 1802.00420), section 3.1; Carlini et al. 2019 (arXiv 1902.06705), section 4.

    Args:
        classifier, images, y: as :func:`timm_jem.evaluation.attacks.pgd`'s; without noise.
        config: the attack whose accuracy is to be believed.
        generator: the only source of randomness.
        batch_size: images at once.
        surrogate: another classifier of the same classes, for a transferred attack; None: that check is left out.
        tolerance: share of images by which a weaker attack may be ahead by chance.

    Returns:
        One :class:`Check` a sign. That against an attack without gradients, Square (Andriushchenko et al., ECCV 2020) with
        500 queries an image, is left out where pyautoattack is missing.

    Raises:
        InputError: as :func:`timm_jem.evaluation.attacks.pgd`.
    """
    y = check_attackable(images, y)
    check_number("tolerance", tolerance, least=0)
    check_number("eps of the attack to check", config.eps, above=0)
    options = {"generator": generator, "batch_size": batch_size}
    attacked = pgd(classifier, images, y, config, **options, desc="sanity of attacks")
    held = is_correct(classifier, attacked, y, batch_size)
    checks = _pgd_checks(classifier, images, y, config, held.double().mean().item(), tolerance, **options)
    checks += [
        Check(
            "gradients of the loss are not zero",
            _zero_gradients(classifier, images, y, batch_size),
            tolerance,
            "Where it is exactly zero or not finite in the classifier's own precision, gradient attacks go nowhere: a "
            "rounding, a layer without slope, or a classifier so sure that all other probabilities round to 0. That masks "
            "gradients too.",
        ),
        Check(
            "random points of the ball break no more",
            _random_search(classifier, images[held], y[held], config, generator, batch_size) / len(y),
            tolerance,
            "Blind search breaks images that the gradient does not.",
        ),
    ]
    if surrogate is not None:
        transferred = transfer_correct(surrogate, classifier, images, y, config, **options)
        checks.append(
            Check(
                "attacks made on another model break no more",
                (held & ~transferred).double().mean().item(),
                tolerance,
                "Another model's gradient finds what this model's own does not.",
            )
        )
    if importlib.util.find_spec("pyautoattack") is not None:
        checks.append(
            Check(
                "an attack without gradients breaks no more",
                _square(classifier, images[held], y[held], config, batch_size) / len(y),
                tolerance,
                "Square, which only asks for logits, breaks images that PGD does not.",
            )
        )
    return checks


def _pgd_checks(
    classifier: Classifier,
    images: Tensor,
    y: Tensor,
    config: PGDConfig,
    base: float,
    tolerance: float,
    *,
    generator: torch.Generator | None,
    batch_size: int,
) -> list[Check]:
    """PGD of other sizes and lengths against ``base``, the accuracy under ``config``."""

    def accuracy(attack: PGDConfig) -> float:
        broken = pgd(classifier, images, y, attack, generator=generator, batch_size=batch_size, desc="sanity of attacks")
        return is_correct(classifier, broken, y, batch_size).double().mean().item()

    whole = 1.0 if config.norm == "linf" else math.sqrt(images[0].numel())
    unbounded = replace(config, eps=whole, steps=max(config.steps, 50), step_size=None)
    longer = accuracy(replace(config, steps=4 * config.steps, step_size=None))
    once = replace(config, steps=1, step_size=2 * config.eps)  # to the edge from any start
    larger = replace(config, eps=2 * config.eps, step_size=None)
    return [
        Check(
            "an attack without bound breaks all images",
            accuracy(unbounded),
            0.05,
            "Any image may become any other, so a gradient that can't find one is masked.",
        ),
        Check(
            "four times the steps are no weaker",
            longer - base,
            tolerance,
            "More steps break fewer images: the gradient leads astray.",
        ),
        Check(
            "four times the steps gain little",
            base - longer,
            2 * tolerance,
            "PGD had not converged: give it more steps (--attack_steps).",
        ),
        Check(
            "many steps are no weaker than one",
            base - accuracy(once),
            tolerance,
            "One step breaks what many don't: gradients change too fast to follow, or are noise.",
        ),
        Check(
            "twice the size is no weaker",
            accuracy(larger) - base,
            tolerance,
            "A larger ball holds the smaller one: the attack gets lost.",
        ),
    ]


def _square(classifier: Classifier, images: Tensor, y: Tensor, config: PGDConfig, batch_size: int) -> int:
    """How many images Square breaks in 500 queries each."""
    if not len(images):
        return 0
    square = {"norm": config.norm, "eps": config.eps, "attacks": ["square"], "n_queries": 500}
    broken = auto_attack(classifier, images, y, **square, batch_size=batch_size, desc="sanity of attacks: Square")
    return int((~is_correct(classifier, broken, y, batch_size)).sum())


def _zero_gradients(classifier: Classifier, images: Tensor, y: Tensor, batch_size: int) -> float:
    """Share of images whose cross-entropy has a gradient of exactly zero, or one that is not finite."""
    bad = 0
    with torch.inference_mode(False), torch.enable_grad():
        for part, labels in zip(images.split(batch_size), y.split(batch_size), strict=True):
            x = part.detach().clone().requires_grad_(True)
            logits = classifier(x)
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            gradient = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
            if gradient is None:
                bad += len(part)
            else:
                peak = gradient.abs().flatten(1).amax(1)
                bad += int(((peak == 0) | ~peak.isfinite()).sum())
    return bad / len(images)


def _random_search(
    classifier: Classifier, images: Tensor, y: Tensor, config: PGDConfig, generator: torch.Generator | None, batch_size: int
) -> int:
    """How many images one of a hundred random points breaks: corners of the ℓ∞ ball, or points of the ℓ2 sphere."""
    correct = torch.ones(len(y), dtype=torch.bool)
    if not len(y):
        return 0
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    for _ in tqdm(range(100), desc="random points of the ball", leave=False):
        if config.norm == "linf":
            away = uniform_noise(images.shape, **options).sign()
        else:
            away = randn(images.shape, **options)
            away /= away.flatten(1).norm(dim=1)[:, None, None, None]
        correct &= is_correct(classifier, (images + config.eps * away).clamp(0, 1), y, batch_size)
    return int((~correct).sum())
