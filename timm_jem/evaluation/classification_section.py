"""Accuracy and calibration of p(y|x), as a section of a report."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from timm_jem.evaluation.calibration import (
    Reliability,
    binned,
    brier_score,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from timm_jem.evaluation.classification import in_batches, predict, top_correct
from timm_jem.evaluation.intervals import bootstrap_interval
from timm_jem.evaluation.plots import reliability_diagram
from timm_jem.evaluation.section import BASIC_BOOTSTRAP, BOOTSTRAP, Section
from timm_jem.evaluation.settings import EvaluationConfig
from timm_jem.evaluation.subject import Subject
from timm_jem.temperature import is_told

__all__ = ["classification_section"]

TABLE = "p(y|x) of test images"
WAY = "eval mode, no input noise"


def classification_section(subject: Subject, config: EvaluationConfig, section: Section) -> None:
    """Accuracy, and calibration as it is and with a temperature fitted on held-out images, where these can tell one."""
    batch_size = config.batch_size
    section.found.warnings += subject.warnings
    logits, y = predict(subject.model, in_batches(subject.test, subject.test_y, batch_size), desc="test images")
    held_out, held_out_y = predict(subject.model, in_batches(subject.val, subject.val_y, batch_size), desc="held-out images")
    temperature = fit_temperature(held_out, held_out_y)
    more = {"split": subject.split}
    section.share(TABLE, "Accuracy, top-1", top_correct(logits, y), WAY, "as it is", type="accuracy", title="Accuracy", **more)
    if subject.model.num_classes > 5:
        section.share(TABLE, "Accuracy, top-5", top_correct(logits, y, 5), WAY, "as it is", **more)
    bins = {"as it is": _calibration(section, logits, y, WAY, "as it is", subject)}
    if not is_told(held_out, held_out_y, temperature):
        section.warn(f"p(y|x) is the network's own: {len(held_out_y):,} {subject.held_out} can't tell a temperature.")
    else:
        way, scaled = f"{WAY}; f(x)/T, T fitted on {len(held_out_y):,} {subject.held_out}", "temperature scaled"
        bins[scaled] = _calibration(section, logits / temperature, y, way, scaled, subject)
        section.add(TABLE, "Temperature T", temperature, len(held_out_y), way, scaled, **more)
    section.curves["reliability"] = curves = {column: _curve(of_column) for column, of_column in bins.items()}
    caption = "Accuracy against confidence of the test images: on the diagonal, p(y|x) means what it says."
    section.picture("reliability.png", reliability_diagram(curves), caption)


def _calibration(section: Section, logits: Tensor, y: Tensor, way: str, column: str, subject: Subject) -> Reliability:
    """Add a column of calibration; returns its equal bins."""
    n, more = len(y), {"split": subject.split}

    def add(row: str, value: Any, statistic: Callable[[Tensor], float], *, biased: bool = False, **card: str) -> None:
        low, high = bootstrap_interval(statistic, n, value=value if biased else None, seed=subject.seed)
        how = BASIC_BOOTSTRAP if biased else BOOTSTRAP
        interval = {"low": max(0.0, low), "high": max(0.0, high), "interval": how, "seed": subject.seed}
        section.add(TABLE, row, value, n, way, column, **interval, **card, **more)

    p = logits.double().softmax(1)
    losses, briers, images = negative_log_likelihood(logits, y), brier_score(p, y), binned(p, y)
    bins = images.reliability()
    add("Negative log-likelihood, nats", losses.mean(), lambda rows: losses[rows].mean().item())
    add("Brier score", briers.mean(), lambda rows: briers[rows].mean().item())
    card = {"type": "ece", "title": "Expected calibration error, 15 equal bins, L1"} if column == "as it is" else {}
    add("ECE, 15 equal bins, L1", bins.ece, lambda rows: images.reliability(rows).ece, biased=True, **card)
    adaptive = reliability(p, y, adaptive=True).ece
    section.add(TABLE, "ECE, 15 bins of equally many images, L1", adaptive, n, way, column, **more)
    section.add(TABLE, "Largest gap of 15 equal bins", bins.mce, n, way, column, **more)
    return bins


def _curve(bins: Reliability) -> dict[str, Any]:
    """What :func:`timm_jem.evaluation.plots.reliability_diagram` draws."""
    return {
        "confidence": bins.confidence.tolist(),
        "accuracy": bins.accuracy.tolist(),
        "share": (bins.count / bins.count.sum()).tolist(),
        "ece": bins.ece,
    }
