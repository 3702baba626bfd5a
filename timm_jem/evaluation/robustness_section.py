"""Accuracy under attack, and whether the attacks deserve trust, as a section of a report."""

from functools import partial
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from timm_jem.evaluation.attacks import Classifier, PGDConfig, pixel_classifier
from timm_jem.evaluation.auto_attack import auto_attack, auto_attack_names
from timm_jem.evaluation.plots import accuracy_curves
from timm_jem.evaluation.refinement import RefinementConfig, refined_classifier
from timm_jem.evaluation.robustness import NORMS, is_correct, robust_correct, sanity_checks, sized, transfer_correct
from timm_jem.evaluation.section import WILSON, Section
from timm_jem.evaluation.settings import EvaluationConfig
from timm_jem.evaluation.subject import Subject

__all__ = ["robustness_section"]


def robustness_section(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    """PGD of growing size, AutoAttack, the refinement defence, transferred attacks, and checks of the attacks."""
    classifier = pixel_classifier(subject.model)
    surrogate = None if subject.baseline is None else pixel_classifier(subject.baseline)
    # On the CPU: attacks take batch_size of them to the model's device at a time.
    images, y = subject.test[: config.attack_images].float() / 255, subject.test_y[: config.attack_images]
    _pgd(subject, config, section, classifier, images, y)
    if config.auto_attack_images:
        _auto_attack(subject, config, section, classifier, images, y)
    if config.refinement_steps:
        _refinement(subject, config, section, images[: config.refinement_images], y[: config.refinement_images])
    if surrogate is not None:
        _transfer(subject, config, section, classifier, surrogate, images, y)
    _sanity(subject, config, section, classifier, surrogate, images[:100], y[:100])


def _more(subject: Subject) -> dict[str, str | int]:
    return {"split": subject.split, "seed": subject.seed}


def _sizes(config: EvaluationConfig) -> dict[str, tuple[float, str]]:
    """By norm, the size of single attacks, and the name of their row."""
    sizes = {"linf": config.linf_epsilon, "l2": config.l2_epsilon}
    return {norm: (epsilon, f"{NORMS[norm]}, {sized(norm, epsilon)}") for norm, epsilon in sizes.items()}


def _batches(config: EvaluationConfig, y: Tensor) -> str:
    """How many images share their noise's generator at a time: of the same seed, others are other numbers."""
    return f"{min(config.batch_size, len(y))} images at once"


def _pgd(
    subject: Subject, config: EvaluationConfig, section: Section, classifier: Classifier, images: Tensor, y: Tensor
) -> None:
    for norm, epsilons in (("linf", config.linf_epsilons), ("l2", config.l2_epsilons)):
        attack = PGDConfig(norm, steps=config.attack_steps, restarts=config.attack_restarts)
        options = {"generator": subject.generator(), "batch_size": config.batch_size, "desc": f"PGD {NORMS[norm]}"}
        correct = robust_correct(classifier, images, y, attack, [0.0, *sorted(epsilons)], **options)
        way = f"PGD, {attack.steps} steps of 2.5 ε / {attack.steps}, {attack.restarts} random restarts, [0, 1] pixel units"
        sizes = ", ".join(sized(norm, epsilon) for epsilon in sorted(epsilons))
        way += f"; what one of {sizes} breaks is broken at larger ones"
        table = f"Accuracy under PGD, {NORMS[norm]}"
        curve = {"PGD": section.curve(table, correct, partial(sized, norm), way, **_more(subject))}
        section.curves[f"accuracy under PGD, {norm}"] = curve
        caption = f"Accuracy of {len(y)} test images under PGD of growing size, with 95 % intervals."
        section.picture(f"pgd_{norm}.png", accuracy_curves(curve, norm, table, band=WILSON), caption)


def _auto_attack(
    subject: Subject, config: EvaluationConfig, section: Section, classifier: Classifier, images: Tensor, y: Tensor
) -> None:
    images, y = images[: config.auto_attack_images], y[: config.auto_attack_images]
    attacks = ", ".join(auto_attack_names("standard", subject.model.num_classes))
    by = f"pyautoattack {version('pyautoattack')}, {_batches(config, y)}"
    way = f"AutoAttack, standard ({attacks}; Croce & Hein 2020), by {by}"
    for norm, (epsilon, row) in _sizes(config).items():
        options = {"seed": config.seed, "batch_size": config.batch_size, "desc": f"AutoAttack {NORMS[norm]}"}
        broken = auto_attack(classifier, images, y, norm=norm, eps=epsilon, **options)
        right = is_correct(classifier, broken, y, config.batch_size)
        card = {"type": "robust_accuracy", "title": f"Accuracy under AutoAttack, {row}"}
        section.share("Accuracy under AutoAttack", row, right, way, **card, **_more(subject))


def _refinement(subject: Subject, config: EvaluationConfig, section: Section, images: Tensor, y: Tensor) -> None:
    """JEM-k, attacked as the paper's code did and through the refinement, side by side."""
    k = config.refinement_steps
    defence = RefinementConfig(steps=k)
    table = f"Accuracy with SGLD refinement, JEM-{k}, ℓ∞"
    ways = {
        "attack without the refinement's gradient": (
            "identity",
            "gradient of f at the refined image only, as the paper's code",
        ),
        "attack through the refinement": ("through", f"gradient through all {k} steps"),
    }
    curves = {}
    for column, (gradient, what) in ways.items():
        classifier = refined_classifier(subject.model, defence, generator=subject.generator(3), gradient=gradient)
        attack = PGDConfig("linf", steps=config.attack_steps, eot=config.eot)
        options = {"generator": subject.generator(4), "batch_size": config.batch_size, "stochastic": True, "desc": column}
        epsilons = [0.0, config.linf_epsilon, 2 * config.linf_epsilon]
        correct = robust_correct(classifier, images, y, attack, epsilons, **options)
        way = (
            f"{k} SGLD steps on E(x) before classifying; PGD, {config.attack_steps} steps, {what}, mean of {config.eot} noise "
            f"draws; judged with new noise, {_batches(config, y)}"
        )
        curves[column] = section.curve(table, correct, partial(sized, "linf"), way, column=column, **_more(subject))
    picture = accuracy_curves(curves, "linf", f"SGLD refinement (JEM-{k}) under two attacks", band=WILSON)
    caption = "One defence under two attacks: what it is worth is the lower of the two values."
    section.picture("refinement.png", picture, caption)


def _transfer(
    subject: Subject,
    config: EvaluationConfig,
    section: Section,
    classifier: Classifier,
    surrogate: Classifier,
    images: Tensor,
    y: Tensor,
) -> None:
    for norm, (epsilon, row) in _sizes(config).items():
        attack = PGDConfig(norm, epsilon, steps=config.attack_steps, restarts=config.attack_restarts)
        options = {"generator": subject.generator(1), "batch_size": config.batch_size}
        right = transfer_correct(surrogate, classifier, images, y, attack, **options)
        way = f"PGD, {attack.steps} steps, made on {Path(config.baseline).name}"
        section.share("Accuracy under transferred attacks", row, right, way, **_more(subject))


def _sanity(
    subject: Subject,
    config: EvaluationConfig,
    section: Section,
    classifier: Classifier,
    surrogate: Classifier | None,
    images: Tensor,
    y: Tensor,
) -> None:
    attack = PGDConfig("linf", config.linf_epsilon, steps=config.attack_steps)
    options = {"generator": subject.generator(2), "batch_size": config.batch_size, "surrogate": surrogate}
    way = f"checks of Carlini et al. 2019 and Athalye et al. 2018, PGD ℓ∞ at {sized('linf', config.linf_epsilon)}"
    for check in sanity_checks(classifier, images, y, attack, **options):
        row = f"{check.name}: {'passed' if check.passed else 'FAILED'}"
        section.add("Sanity of the attacks", row, check.value, len(y), way, "measured", **_more(subject))
        section.add("Sanity of the attacks", row, check.limit, len(y), way, "at most", **_more(subject))
        if not check.passed:
            section.warn(f"Attack check failed, robust accuracies may be overstated: {check.name}. {check.detail}")
