"""How well scores tell test images from outliers, as a section of a report."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.evaluation.ood import SCORES, ModelInput, auroc_interval, ood_metrics, ood_scores
from timm_jem.evaluation.pictures import image_grid
from timm_jem.evaluation.plots import auroc_table, score_histograms
from timm_jem.evaluation.section import BOOTSTRAP, Section
from timm_jem.evaluation.settings import DEFAULT_DETECTORS, EvaluationConfig
from timm_jem.evaluation.subject import Subject
from timm_jem.ood import Detector, survey
from timm_jem.pixels import to_pixels

__all__ = ["fitted", "ood_section"]

TABLES = {
    "auroc": "AUROC",
    "aupr_out": "AUPR, out-of-distribution positive",
    "aupr_in": "AUPR, in-distribution positive",
    "fpr95_in": "FPR95, in-distribution positive: share of outliers accepted where 95 % of test images are",
    "fpr95_out": "FPR95, out-of-distribution positive: share of test images rejected where 95 % of outliers are",
}


def ood_section(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    """Every score of test images against that of every set of outliers."""
    inside, size = subject.test[: config.ood_images], config.batch_size
    section.found.warnings += subject.warnings
    detectors = fitted(subject, config.detectors, size, section)
    tests = ood_scores(detectors, inside, batch_size=size, desc="scores of test images")
    sets = {
        name: ood_scores(detectors, images, batch_size=size, desc=f"scores of {name}")
        for name, images in subject.outliers.items()
    }
    _leave_out_what_is_not_finite([tests, *sets.values()], section)
    how = f"against {len(inside):,} test images{_protocol(detectors, subject)}"
    found = _metrics(subject, section, tests, sets, how)
    auroc = {name: {score: of_score["auroc"] for score, of_score in of_set.items()} for name, of_set in found.items()}
    caption = "AUROC of each score against each set: 1 tells them apart, 0.5 is chance, below 0.5 outliers look likelier."
    section.picture("ood_auroc.png", auroc_table(auroc), caption)
    values = {
        score: {"test images": tests[score].numpy(), **{name: of_set[score].numpy() for name, of_set in sets.items()}}
        for score in tests
    }
    caption = "Each score of test images and of the sets that the model has not seen; higher means more like the data."
    section.picture("ood_scores.png", score_histograms(values, "test images"), caption)
    shown = {name: images[:10] for name, images in subject.outliers.items() if len(images) >= 10}
    if shown:
        grid = image_grid(to_pixels(torch.cat([*shown.values()])), 10, [*shown])
        section.picture("ood_sets.png", grid, "The first ten images of each set.")


def fitted(subject: Subject, names: Sequence[str], size: int, section: Section) -> list[Detector]:
    """Detectors of these names, fitted to held-out images; a warning says which there are not, and why.

    Raises:
        InputError: none of them.
    """
    found, refused = [], {}
    for name in names:
        try:
            found.append(Detector(subject.model, name))
        except InputError as error:
            refused[name] = error
    features = any(one.features for one in found)
    if features or any(one.learns for one in found):
        images = ModelInput(subject.model, list(zip(subject.val.split(size), subject.val_y.split(size), strict=True)))
        seen = survey(subject.model, images, features=features, desc="held-out images")
        for one in found:
            try:
                one.fit_survey(seen)
            except InputError as error:
                refused[one.name] = error
    for name, error in refused.items():
        section.warn(f"There is no {SCORES[name]}: {error}.")
    found = [one for one in found if one.name not in refused]
    if not found:
        raise InputError("none of the detectors that are asked for can score this model's images: give --detectors others")
    return found


def _leave_out_what_is_not_finite(sets: Sequence[dict[str, Tensor]], section: Section) -> None:
    """Take a score out of every set where an image of one has none, and warn.

    Raises:
        InputError: no score is left.
    """
    for score in list(sets[0]):
        scores = torch.cat([of_set[score] for of_set in sets])
        if bad := int((~scores.isfinite()).sum()):
            section.warn(f"There is no {score}: {bad:,} of {len(scores):,} are not finite.")
            for of_set in sets:
                del of_set[score]
    if not sets[0]:
        raise InputError("no score of these images is finite: the model is broken")


def _protocol(detectors: Sequence[Detector], subject: Subject) -> str:
    """What the scores' names leave open."""
    names, held_out = [one.name for one in detectors], f"{len(subject.val):,} {subject.held_out}"
    said = []
    if "approximate_mass" in names:
        said.append("approximate mass: -|gradient of log p(x)| in pixels")
    if "typicality" in names:
        said.append(f"typicality: distance to the mean log p(x) of {held_out}")
    if "mahalanobis" in names:
        said.append(f"feature distance: Mahalanobis' to the nearest class, of features of {held_out}")
    for one in (one for one in detectors if one.name not in DEFAULT_DETECTORS):
        options = ", ".join(f"{option} {value}" for option, value in one.options.items() if value is not None)
        fit = f"fitted to {held_out}" if one.learns else ""
        details = ", ".join(filter(None, [options, fit]))
        said.append(f"{SCORES[one.name]}: timm_jem.ood's {one.name}" + (f" ({details})" if details else ""))
    return "".join(f"; {part}" for part in said)


def _metrics(
    subject: Subject, section: Section, tests: dict[str, Tensor], sets: dict[str, dict[str, Tensor]], how: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Add a table for each metric; returns the metrics by set and score."""
    found = {name: {score: ood_metrics(tests[score], of_set[score]) for score in tests} for name, of_set in sets.items()}
    for metric, table in TABLES.items():
        for name, of_set in sets.items():
            for score in tests:
                more = {"seed": subject.seed, "split": subject.split}
                if metric == "auroc":
                    low, high = auroc_interval(tests[score], of_set[score], seed=subject.seed)
                    more |= {"low": low, "high": high, "interval": BOOTSTRAP}
                    if score == "log p(x)":
                        more |= {"type": "roc_auc", "title": f"AUROC of log p(x) against {name}"}
                section.add(table, name, found[name][score][metric], len(of_set[score]), how, score, **more)
    return found
