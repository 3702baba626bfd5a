"""How a run ended, read back from its folder."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from timm_jem.errors import InputError, one_line
from timm_jem.evaluation.strict_json import built
from timm_jem.stability.curves import Curves, is_rollback, read_curves
from timm_jem.training.run_folder import RunFolder

__all__ = ["LAST_LINES", "RunResult", "read_result", "tensors_with_nan"]

LAST_LINES = 10  # lines of metrics.jsonl whose mean is a run's final energy gap


@dataclass
class RunResult:
    """What a run's folder says of it.

    Attributes:
        state: finished, stopped (training gave up, or that of its classifier), or None: the run has not come to its end, and
            nothing below but the rollbacks and ``fault`` is known.
        curves: of training; after the end of the run, with its last validation.
        rollbacks: those that training went on from, oldest first: ``step``, ``to_step``, ``reason`` and ``remedy``.
        classifier_rollbacks: those of the classifier that it started from.
        test_accuracy, test_ece, val_accuracy: shares of the images.
        gap: energy gap in nats: the mean of the last ``LAST_LINES`` lines that count; None: there are none.
        steps: optimiser steps behind the model.
        seconds: of training.
        explanation: why training gave up.
        tensors_with_nan: names of the model's tensors that are not finite throughout.
        fault: what in the folder can't be read, or None.
    """

    state: Literal["finished", "stopped"] | None = None
    curves: Curves = field(default_factory=Curves)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    classifier_rollbacks: list[dict[str, Any]] = field(default_factory=list)
    test_accuracy: float | None = None
    test_ece: float | None = None
    val_accuracy: float | None = None
    gap: float | None = None
    steps: int | None = None
    seconds: float | None = None
    explanation: str | None = None
    tensors_with_nan: list[str] = field(default_factory=list)
    fault: str | None = None

    def figures(self) -> dict[str, Any]:
        """All but the curves, as JSON data."""
        return {name: value for name, value in vars(self).items() if name != "curves"}


def read_result(folder: RunFolder) -> RunResult:
    """The result of a run, also of one that is not done, or whose folder isn't there yet."""
    curves, before = read_curves(folder.metrics_file), read_curves(folder.classifier.metrics_file).rollbacks
    result = RunResult(curves=curves, rollbacks=curves.rollbacks, classifier_rollbacks=before)
    try:
        summary = folder.summary()
        of_classifier = folder.classifier.summary() if summary is None else None
    except InputError as error:
        result.fault = str(error)
        return result
    if summary is None:
        if of_classifier is not None and of_classifier.get("outcome") == "stopped":
            result.state, result.explanation = "stopped", f"its classifier: {of_classifier.get('explanation')}"
        return result
    if summary.get("outcome") not in ("finished", "stopped"):
        result.fault = f"{folder.summary_file} gives no outcome"
        return result
    names = ("rollbacks", "test_accuracy", "test_ece", "val_accuracy", "steps", "seconds", "explanation")
    known = {"rollbacks": curves.rollbacks, "classifier_rollbacks": before}
    known |= {name: summary[name] for name in names if name in summary}
    try:
        result = built(RunResult, {"state": summary["outcome"], "curves": curves, **known})
        if not all(map(is_rollback, result.rollbacks)):
            raise TypeError("rollbacks are without their steps")
    except TypeError as error:
        fault = f"{folder.summary_file} is none of a run's ({error})"
        return RunResult(curves=curves, rollbacks=curves.rollbacks, classifier_rollbacks=before, fault=fault)
    if result.steps is not None:
        if result.state == "stopped":  # metrics.jsonl doesn't say that the model is of an earlier step than its last lines
            curves.back_to(result.steps)
        if result.val_accuracy is not None:
            curves.val_accuracy.add(result.steps, result.val_accuracy)
    last = [value for _, value in curves.gap.kept[-LAST_LINES:]]
    result.gap = statistics.fmean(last) if last else None
    try:
        result.tensors_with_nan = tensors_with_nan(folder.model / "model.safetensors")
    except (OSError, SafetensorError) as error:
        result.fault = f"its model can't be read ({one_line(error)})"
    return result


def tensors_with_nan(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file that hold NaN or infinity; one tensor is in memory at a time.

    Raises:
        OSError, SafetensorError: the file can't be read.
    """
    with safe_open(path, framework="pt") as file:
        return [name for name in file.keys() if not torch.isfinite(file.get_tensor(name)).all()]  # noqa: SIM118
