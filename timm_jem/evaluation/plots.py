"""Plots of what was measured. Each takes plain data by name, so that one model and several look alike."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from textwrap import fill
from typing import Any

import numpy as np

from timm_jem.errors import InputError, how_to_install, quoted

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, PercentFormatter, ScalarFormatter
except ImportError:  # told by the first figure, so that whatever draws can be imported without it
    Figure = None

__all__ = [
    "AGAINST_LENGTH",
    "accuracy_curves",
    "auroc_table",
    "quality_curves",
    "reliability_diagram",
    "save_figure",
    "score_histograms",
]

# Okabe & Ito's, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DPI = 120
# Where values are further apart than this factor, a linear axis hides the small ones.
_LOG_FROM = 30
# What is drawn against the length of chains, by its name among the curves of a report: the axis, and what to know of it.
AGAINST_LENGTH = {
    "quality against length": ("Fréchet distance", "In {features}; lower is better"),
    "read as asked against length": ("share read as asked", "By an independent classifier; higher is better"),
    "distance within a class against length": (
        "distance within a class",
        "Relative to real images'; noise raises it",
    ),
}


def _style(i: int) -> dict[str, str]:
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3]}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Figure, Any]:
    if Figure is None:
        raise InputError(f"plots need matplotlib: {how_to_install('eval')}")
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for axis in np.atleast_1d(axes).flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _without_formulas(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Names with two $ are names."""

    @wraps(draw)
    def drawn(*args: Any, **options: Any) -> Figure:
        with contextlib.nullcontext() if Figure is None else rc_context({"text.parse_math": False}):
            return draw(*args, **options)

    return drawn


def _check_some(what: str, data: Mapping) -> None:
    if not data or not all(data.values()):
        raise InputError(f"there is nothing to draw as {what}: give at least one entry, none of them empty")


@_without_formulas
def reliability_diagram(bins: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy against confidence, and the share of images at each confidence below (Guo et al., arXiv 1706.04599, fig. 1).

    Args:
        bins: by name: ``confidence``, ``accuracy``, ``share`` of each of the equal bins of [0, 1], NaN where a bin is empty
            (it is left out), ``ece``, and, if known, ``n``, the number of images.

    Raises:
        InputError: nothing to draw.
    """
    _check_some("a reliability diagram", bins)
    figure, (above, below) = _figure(5.2, 5.6, 2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    # On the axes' own scale, clear of the diagonal.
    above.text(0.03, 0.9, "underconfident:\nmore often right than it says", color="grey", fontsize=8, va="top")
    above.text(0.3, 0.2, "overconfident", color="grey", fontsize=8, va="top")
    for i, (name, curve) in enumerate(bins.items()):
        share = np.asarray(curve["share"], dtype=float)
        there = share > 0
        confidence, accuracy = (np.asarray(curve[key], dtype=float)[there] for key in ("confidence", "accuracy"))
        label = f"{name}: ECE {curve['ece']:.3f}" + (f" (n = {curve['n']:,})" if "n" in curve else "")
        above.plot(confidence, accuracy, **_style(i), linewidth=1, alpha=0.35)
        # Bins of few images say little, and are small.
        above.scatter(confidence, accuracy, s=8 + 200 * share[there], color=_style(i)["color"], label=label, clip_on=False)
        below.stairs(share, np.linspace(0, 1, len(share) + 1), **_style(i), linewidth=1.4)
    above.set(ylabel="accuracy", title="Accuracy against confidence", xlim=(0, 1), ylim=(0, 1))
    below.set(xlabel="confidence, max p(y|x)", ylabel="share of images", ylim=(0, 1))
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend = figure.legend(loc="outside lower center", frameon=False, ncols=1, title="area of a dot: share of the images")
    legend.set_alignment("left")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([40])
    return figure


@_without_formulas
def score_histograms(scores: Mapping[str, Mapping[str, np.ndarray]], in_name: str) -> Figure:
    """A panel for each score: the in-distribution set filled, the others outlined.

    The bins of a panel are shared, and span the middle 99 % of every set, so that a few far outliers don't hide the rest and
    a large set doesn't push a small one out; the panel says how many values fall outside.

    Args:
        scores: by score and set, values of shape (N,), of any scale.
        in_name: the set that is in distribution.

    Raises:
        InputError: nothing to draw, no set of that name, or values that are not finite.
    """
    _check_some("histograms", scores)
    for score, sets in scores.items():
        if in_name not in sets:
            raise InputError(f"{score} of {', '.join(sets)}: there is no set {in_name}, the one in distribution")
        for name, values in sets.items():
            if len(values) == 0 or not np.isfinite(values).all():
                raise InputError(f"{score} of {name} is empty or not finite: the model is broken, or there are no images")
    columns = 2 if len(scores) > 1 else 1
    rows = -(-len(scores) // columns)
    figure, axes = _figure(5 * columns if columns > 1 else 6, 3 * rows if rows > 1 else 3.6, rows, columns, squeeze=False)
    for axis in axes.flat[len(scores) :]:
        axis.set_axis_off()
    for axis, (score, sets) in zip(axes.flat, scores.items(), strict=False):
        sets = {name: np.asarray(values, dtype=float) for name, values in sets.items()}
        low = min(np.quantile(values, 0.005) for values in sets.values())
        high = max(np.quantile(values, 0.995) for values in sets.values())
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # all the same, up to rounding
            width = 0.5 * max(1.0, 1e-6 * abs(low))
            low, high = low - width, high + width
        edges = np.linspace(low, high, 51)
        for i, (name, values) in enumerate(sets.items()):
            inside = name == in_name
            axis.hist(
                values,
                bins=edges,
                weights=np.full(len(values), 1 / len(values)),
                histtype="stepfilled" if inside else "step",
                **_style(i),
                alpha=0.45 if inside else 1.0,
                linewidth=1.4,
                label=f"{name} (n = {len(values):,})",
            )
        outside = sum(int(((values < low) | (values > high)).sum()) for values in sets.values())
        axis.set_title(score + (f"   ({outside:,} of the values lie outside)" if outside else ""), fontsize=10)
        axis.set(ylabel="share of the set", xlabel="score; higher: more like the training data")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.locator_params(axis="x", nbins=5)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(2 * columns, len(labels)), frameon=False)
    return figure


@_without_formulas
def auroc_table(auroc: Mapping[str, Mapping[str, float]]) -> Figure:
    """AUROC of each score (columns) against each set (rows): white at chance, purple above, orange below.

    Args:
        auroc: by set and score, in [0, 1]; the same scores for every set.

    Raises:
        InputError: nothing to draw, or sets with other scores.
    """
    _check_some("a table of AUROC", auroc)
    sets, scores = list(auroc), list(next(iter(auroc.values())))
    if any(list(of_set) != scores for of_set in auroc.values()):
        raise InputError(f"AUROC of other scores than {', '.join(scores)} for some sets: give the same ones")
    values = np.array([[auroc[name][score] for score in scores] for name in sets])
    figure, axis = _figure(max(6.0, 1.6 + 1.5 * len(scores)), 1.6 + 0.5 * len(sets))
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.imshow(values, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if abs(value - 0.5) > 0.32 else "black")
    axis.set_xticks(range(len(scores)), [score.replace(" = ", "\n= ") for score in scores])
    axis.set_yticks(range(len(sets)), sets)
    axis.set(xlabel="score", ylabel="set")
    axis.set_title("AUROC, test images against each set (1: told apart, 0.5: chance)", fontsize=11)
    return figure


@_without_formulas
def accuracy_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    norm: str,
    title: str,
    *,
    band: str = "interval",
) -> Figure:
    """Accuracy against the size of attacks.

    Args:
        curves: by name: radii in [0, 1] pixel units, accuracies, and the lower and upper ends of their intervals.
        norm: linf (drawn in 255ths) or l2.
        title: of the plot.
        band: what lies between the lower and upper ends, e.g. "95 % interval".

    Raises:
        InputError: nothing to draw, or another norm.
    """
    _check_some("accuracy", curves)
    if norm not in ("linf", "l2"):
        raise InputError(f"norm is {quoted(norm)}: give linf or l2")
    figure, axis = _figure(5.6, 4)
    unit = 255 if norm == "linf" else 1
    for i, (name, (epsilons, accuracies, lows, highs)) in enumerate(curves.items()):
        x = np.asarray(epsilons, dtype=float) * unit
        axis.plot(x, accuracies, marker="o", markersize=4, **_style(i), label=name, clip_on=False)
        axis.fill_between(x, lows, highs, color=_style(i)["color"], alpha=0.15, linewidth=0)
    axis.set(
        xlabel="ε of the attack in ℓ∞, in 1/255 of the pixel range"
        if norm == "linf"
        else "ε of the attack in ℓ2, pixels in [0, 1]",
        ylabel="accuracy",
        title=title,
        ylim=(0, 1),
    )
    axis.set_xlim(left=0)
    handles, _ = axis.get_legend_handles_labels()
    axis.legend(handles=[*handles, Patch(color="grey", alpha=0.3, linewidth=0, label=f"shaded: {band}")], framealpha=0.8)
    return figure


@_without_formulas
def quality_curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
    *,
    features: str = "the features of each report",
    floors: Mapping[str, float] | None = None,
    marks: Mapping[str, int] | None = None,
) -> Figure:
    """What became of samples against the number of SGLD steps, which is logarithmic: a panel for each measure.

    So is a distance where it varies much. Chains that ran away, NaN, have no point.

    Args:
        panels: by measure, one of :data:`AGAINST_LENGTH`, and name: numbers of steps, in increasing order, and values.
        features: in which the Fréchet distance is.
        floors: by measure, the value of real images.
        marks: by name, the length that the model itself uses: a ring on its curves.

    Raises:
        InputError: nothing to draw, another measure, or a mark of no curve.
    """
    _check_some("quality", panels)
    for curves in panels.values():
        _check_some("quality", curves)
    floors, marks = dict(floors or {}), dict(marks or {})
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))  # of one style in all panels
    if lost := [name for name in marks if name not in names]:
        raise InputError(f"marks of {', '.join(lost)}, which have no curve: give those of {', '.join(names)}")
    if lost := [measure for measure in panels if measure not in AGAINST_LENGTH]:
        raise InputError(f"measures against length are {', '.join(AGAINST_LENGTH)}, and not {', '.join(map(quoted, lost))}")
    figure, axes = _figure(5.8, 1.7 + 2.5 * len(panels), len(panels), squeeze=False, sharex=True)
    for axis, (measure, curves) in zip(axes.flat, panels.items(), strict=True):
        for name, (steps, values) in curves.items():
            style = _style(names.index(name))
            label = name if name not in marks else f"{name} (ring: the model's own {marks[name]:,} steps)"
            axis.plot(steps, values, marker="o", markersize=4, **style, label=label)
            if name in marks:
                at = np.interp(np.log(marks[name]), np.log(steps), values)
                ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
                axis.plot([marks[name]], [at], color=style["color"], linestyle="none", **ring)
        drawn = np.concatenate([np.asarray(values, dtype=float) for _, values in curves.values()])
        if not np.isfinite(drawn).any():
            axis.text(0.5, 0.4, "NaN at every length", color="grey", ha="center", transform=axis.transAxes)
        if np.isfinite(floor := floors.get(measure, np.nan)):
            axis.axhline(floor, color="grey", linestyle="--", linewidth=1, label="real test images")
        ylabel, title = AGAINST_LENGTH[measure]
        axis.set_ylabel(ylabel)
        axis.set_title(fill(title.format(features=features), 80), loc="left", fontsize=9)
        _scale(axis, measure, np.append(drawn, floor))
    figure.suptitle("Fresh chains against their length")
    axes[-1, 0].set(xlabel="SGLD steps (log scale)", xscale="log")
    ticks: list[int] = []
    for step in sorted({step for curves in panels.values() for steps, _ in curves.values() for step in steps}):
        if not ticks or step >= 1.3 * ticks[-1]:
            ticks.append(step)
    axes[-1, 0].set_xticks(ticks, [f"{step:,}" for step in ticks], rotation=60 if len(ticks) > 6 else 0)
    for axis in axes.flat:
        axis.tick_params(which="minor", bottom=False, labelbottom=False)
    shown = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", frameon=False)
    return figure


def _scale(axis: Any, measure: str, values: np.ndarray) -> None:
    """The vertical axis: of shares 0 to 1, of distances from 0 on, or logarithmic where these vary much."""
    values = values[np.isfinite(values)]
    if measure == "read as asked against length":
        axis.set_ylim(0, 1.04)  # clear of the points at 1
    elif len(values) and values.min() > 0 and values.max() > _LOG_FROM * values.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel(f"{axis.get_ylabel()} (log scale)")
    elif not (values < 0).any():
        axis.set_ylim(bottom=0)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """As PNG, without the version that would make the same plot another file; the same data gives the same bytes."""
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
