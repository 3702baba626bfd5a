"""How well scores tell test images from outliers, as a section of a report."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.evaluation.extractors import classifier_extractor, extract
from timm_jem.evaluation.feature_distance import ClassFeatures
from timm_jem.evaluation.ood import SCORES, auroc_interval, ood_metrics, ood_scores, typicality
from timm_jem.evaluation.pictures import image_grid
from timm_jem.evaluation.plots import auroc_table, score_histograms
from timm_jem.evaluation.section import BOOTSTRAP, Section
from timm_jem.evaluation.settings import EvaluationConfig
from timm_jem.evaluation.subject import Subject
from timm_jem.pixels import to_pixels

__all__ = ["feature_distance", "ood_section"]

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
    held_out = ood_scores(subject.model, subject.val, approximate_mass=False, batch_size=size, desc="held-out images")
    reference = held_out["log p(x)"]
    distance = feature_distance(subject, size, section)

    def scores(images: Tensor, desc: str) -> dict[str, Tensor]:
        found = ood_scores(subject.model, images, batch_size=size, desc=desc)
        return {**found, "typicality": typicality(found["log p(x)"], reference), **distance(images)}

    tests = scores(inside, "scores of test images")
    sets = {name: scores(images, f"scores of {name}") for name, images in subject.outliers.items()}
    typical = f"typicality: distance to the mean log p(x) of {len(reference):,} {subject.held_out}"
    typical += ", of which feature distance has the classes' features, too: Mahalanobis' to the nearest"
    how = f"against {len(inside):,} test images; approximate mass: -|gradient of log p(x)| in pixels; {typical}"
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


def feature_distance(subject: Subject, size: int, section: Section) -> Callable[[Tensor], dict[str, Tensor]]:
    """The score of images by their features, under its name; nothing where the backbone has none, which a warning says."""
    try:
        extractor = classifier_extractor(subject.model, "features before the head")
        classes = ClassFeatures.fit(extract(extractor, subject.val, batch_size=size, desc="held-out features"), subject.val_y)
    except InputError as error:
        section.found.warnings.append(f"There is no feature distance: {error}.")
        return lambda images: {}
    return lambda images: {SCORES[5]: classes.score(extract(extractor, images, batch_size=size))}


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
