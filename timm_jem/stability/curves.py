"""A run's curves, read back from its metrics.jsonl."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_jem.evaluation.strict_json import fits

__all__ = ["Curve", "Curves", "is_rollback", "read_curves"]


@dataclass
class Curve:
    """A quantity against optimiser steps.

    Attributes:
        kept: (step, value) of every point that counts, by rising step; values may be NaN or infinite.
        undone: stretches that a rollback took back, each beginning with the last point that was kept before it, if any.
    """

    kept: list[tuple[int, float]] = field(default_factory=list)
    undone: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """One more point. It replaces those of its own and later steps, which a resumed run measures again."""
        while self.kept and self.kept[-1][0] >= step:
            self.kept.pop()
        self.kept.append((step, value))

    def back_to(self, step: int) -> None:
        """Undo all points after ``step``."""
        before = [point for point in self.kept if point[0] <= step]
        if after := self.kept[len(before) :]:
            self.undone.append(before[-1:] + after)
            self.kept = before


@dataclass
class Curves:
    """What a run logged.

    Attributes:
        gap: energy gap in nats, mean E(data) − mean E(chains); that of class-conditional chains where there are any.
        val_accuracy: share of the validation images.
        rollbacks: as logged, oldest first: ``step``, ``to_step``, ``reason`` and ``remedy``.
    """

    gap: Curve = field(default_factory=Curve)
    val_accuracy: Curve = field(default_factory=Curve)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def back_to(self, step: int) -> None:
        """Undo all points after ``step``."""
        self.gap.back_to(step)
        self.val_accuracy.back_to(step)


def read_curves(path: Path) -> Curves:
    """The curves in a metrics.jsonl, with every rollback undone; without the file they are empty.

    Half a line, which a killed run can leave, is passed over, as is any other that no run writes.
    """
    curves = Curves()
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (RecursionError, ValueError):
            continue
        if not isinstance(line, dict) or not fits(line.get("step"), int):
            continue
        if line.get("event") == "rollback":
            if not is_rollback(line):
                continue
            curves.rollbacks.append(line)
            curves.back_to(line["to_step"])
            continue
        gap, accuracy = line.get("gap_xy", line.get("gap")), line.get("val_accuracy")
        if fits(gap, float):
            curves.gap.add(line["step"], gap)
        if fits(accuracy, float):
            curves.val_accuracy.add(line["step"], accuracy)
    return curves


def is_rollback(event: dict[str, Any]) -> bool:
    """Whether JSON data tell from which step a run went back to which."""
    return all(fits(event.get(name), int) for name in ("step", "to_step"))
