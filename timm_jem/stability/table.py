"""The table of many runs: a row a variant, and a line on each run that met trouble."""

import math
import statistics
from typing import Any

__all__ = ["events", "figures_of", "table"]


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant's row of the table from the figures of its runs."""
    states = [run["state"] for run in runs]
    # A run that gave up met one divergence more than it has rollbacks.
    rollbacks = [len(run["rollbacks"]) + len(run["classifier_rollbacks"]) for run in runs]
    divergences = [number + (run["state"] == "stopped") for number, run in zip(rollbacks, runs, strict=True)]
    row: dict[str, Any] = {
        "runs": len(runs),
        "finished": states.count("finished"),
        "divergences": sum(divergences),
        "runs_with_divergences": sum(number > 0 for number in divergences),
        "rollbacks": sum(rollbacks),
        "most_rollbacks": max(rollbacks),
        "stopped": states.count("stopped"),
        "crashed": states.count("crashed"),
        "models_with_nan": sum(bool(run["tensors_with_nan"]) for run in runs),
    }
    for name in ("test_accuracy", "gap", "test_ece", "seconds"):
        values = [run[name] for run in runs if run.get(name) is not None]
        row[name] = {
            "n": len(values),
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
            "min": min(values, default=None),
            "median": statistics.median(values) if values else None,
        }
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row per variant."""
    lines = [
        "| variant | runs | finished | divergences (in runs) | most rollbacks in a run | stopped or crashed | models with NaN "
        "| test accuracy | lowest | energy gap, nats | ECE | seconds |",
        "| --- |" + " --- |" * 11,
    ]
    for name, row in rows.items():
        cells = [
            name.replace("|", "\\|"),
            row["runs"],
            row["finished"],
            f"{row['divergences']} ({row['runs_with_divergences']})",
            row["most_rollbacks"],
            row["stopped"] + row["crashed"],
            row["models_with_nan"],
            _mean(row["test_accuracy"], 3),
            _number(row["test_accuracy"]["min"], 3),
            _mean(row["gap"], 2),
            _number(row["test_ece"]["mean"], 3),
            _number(row["seconds"]["median"], 0),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mean(figures: dict[str, Any], digits: int) -> str:
    return _number(figures["mean"], digits) + ("" if figures["std"] is None else f" ± {figures['std']:.{digits}f}")


def events(figures: dict[str, Any]) -> str | None:
    """One line on a run where not everything went well."""
    parts = [
        f"{of}step {event['step']} back to {event['to_step']}: {event.get('reason')} "
        f"({event.get('remedy', 'no remedy recorded')})"
        for of, name in (("its classifier's ", "classifier_rollbacks"), ("", "rollbacks"))
        for event in figures[name]
    ]
    parts += [f"crashed once: {line}" for line in figures["crashes"][: None if figures["state"] != "crashed" else -1]]
    if figures["state"] == "stopped":
        parts.append(figures["explanation"] or "stopped")
    if figures["state"] == "crashed":
        parts.append(f"crashed: {figures['crashes'][-1]}")
    if broken := figures["tensors_with_nan"]:
        parts.append(f"its model has NaN or infinity in {broken[0]}{f' and {len(broken) - 1} more' * (len(broken) > 1)}")
    parts += [figures["fault"]] if figures["fault"] else []
    return f"- {figures['variant']}, seed {figures['seed']}: {'; '.join(parts)}" if parts else None
