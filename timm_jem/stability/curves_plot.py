"""Plot of the curves of many runs: a column for each variant, a line for each seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from timm_jem.errors import InputError, importing
from timm_jem.stability.curves import Curve, Curves

with importing("matplotlib", "the picture of the curves", "plots"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["Trace", "draw_curves"]

_MARKS = {"rollback": ("x", "tab:red"), "stopped": ("s", "black"), "crashed": ("D", "black")}
_COLUMNS = 4
# More seeds than this have no colours of their own in the legend.
_NAMED_SEEDS = 10


@dataclass(frozen=True)
class Trace:
    """A run to draw.

    Attributes:
        seed: gives its colour.
        curves: energy gap and validation accuracy.
        rollbacks: the steps at which training broke and went back.
        end: how the run ended.
    """

    seed: int
    curves: Curves
    rollbacks: Sequence[int] = ()
    end: Literal["finished", "stopped", "crashed"] = "finished"


def draw_curves(variants: Mapping[str, Sequence[Trace]]) -> Figure:
    """For each variant the energy gap and, below it, the validation accuracy against optimiser steps, one line per seed.

    What a rollback undid is dotted; rollbacks and early ends are marked on the energy gap. Its axis spans what counts in
    the end, so a stretch that ran away is cut off, and its mark stands at the edge.

    Args:
        variants: the runs of each, by name.

    Raises:
        InputError: nothing to draw, or matplotlib is not installed (when this module is imported).
    """
    if not variants or not all(variants.values()):
        raise InputError("there are no curves to draw: give at least one run of each variant")
    columns = min(len(variants), _COLUMNS)
    blocks = math.ceil(len(variants) / columns)
    figure = Figure(figsize=(max(7.0, 4.2 * columns), 4.4 * blocks + 1.0), dpi=110, layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    colours = _colours(trace.seed for traces in variants.values() for trace in traces)
    for number, (name, traces) in enumerate(variants.items()):
        block, column = divmod(number, columns)
        _draw_variant(axes[2 * block, column], axes[2 * block + 1, column], name, traces, colours, labelled=column == 0)
    figure.legend(handles=_legend(colours), loc="outside lower center", ncols=max(4, 1 + 2 * columns), frameon=False)
    runs = sum(map(len, variants.values()))
    figure.suptitle(f"{runs} run{'s' * (runs > 1)}, one line per seed; energy gap = mean E(data) − mean E(chains)")
    return figure


def _colours(seeds: Iterable[int]) -> dict[int, Any]:
    seeds = sorted(set(seeds))
    if len(seeds) <= _NAMED_SEEDS:
        return dict(zip(seeds, colormaps["tab10"].colors, strict=False))
    return dict(zip(seeds, colormaps["viridis"](np.linspace(0, 0.95, len(seeds))), strict=True))


def _draw_variant(
    top: Axes, bottom: Axes, name: str, traces: Sequence[Trace], colours: Mapping[int, Any], *, labelled: bool
) -> None:
    bottom.sharex(top)
    for trace in traces:
        _draw_curve(top, trace.curves.gap, colours[trace.seed])
        _draw_curve(bottom, trace.curves.val_accuracy, colours[trace.seed])
    low, high = _span([value for trace in traces for _, value in _finite(trace.curves.gap.kept)])
    for kind, step, value in (mark for trace in traces for mark in _marks(trace)):
        marker, colour = _MARKS[kind]
        top.plot(step, min(max(value, low), high), marker, color=colour, markersize=6, zorder=3, clip_on=False)
    top.axhline(0, color="0.75", linewidth=0.8, zorder=1)
    margin = 0.08 * (high - low) or 1.0
    top.set_ylim(low - margin, high + margin)
    top.set_title(name, fontsize=11)
    top.tick_params(labelbottom=False)
    bottom.set_ylim(-0.03, 1.03)
    bottom.set_xlabel("optimiser step")
    if labelled:
        top.set_ylabel("energy gap (nats)")
        bottom.set_ylabel("validation accuracy (share)")
    for ax in (top, bottom):
        ax.set_visible(True)
        ax.grid(alpha=0.25)
        ax.margins(x=0.03)


def _draw_curve(ax: Axes, curve: Curve, colour: Any) -> None:
    for points, alpha, style in [*((part, 0.3, ":") for part in curve.undone), (curve.kept, 0.9, "-")]:
        steps, values = [step for step, _ in points], [value for _, value in points]
        dot = "." if len(points) < 10 else None
        ax.plot(steps, values, style, color=colour, alpha=alpha, linewidth=1.2, marker=dot, zorder=2)


def _marks(trace: Trace) -> list[tuple[str, int, float]]:
    """(kind, step, energy gap) of each: a rollback at the last finite value before it, an early end where the curve ends."""
    gap = trace.curves.gap
    kept = _finite(gap.kept)
    seen = [point for part in gap.undone for point in _finite(part)] + kept
    marks = []
    for at in trace.rollbacks:
        before = [point for point in seen if point[0] <= at]
        marks.append(("rollback", at, max(before, key=lambda point: point[0])[1] if before else 0.0))
    if trace.end != "finished":
        marks.append((trace.end, *(kept[-1] if kept else (0, 0.0))))
    return marks


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values, default=-1.0), max(values, default=1.0)


def _legend(colours: Mapping[int, Any]) -> list[Line2D]:
    named = colours if len(colours) <= _NAMED_SEEDS else {}
    handles = [Line2D([], [], color=colour, label=f"seed {seed}") for seed, colour in named.items()]
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="undone by a rollback"))
    for kind, (marker, colour) in _MARKS.items():
        label = "gave up" if kind == "stopped" else kind
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=label))
    return handles
