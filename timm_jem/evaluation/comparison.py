"""Several reports side by side: one table, and their curves in one plot each."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_jem.evaluation import plots
from timm_jem.evaluation.report import Report, Result, cell, in_order, number, read_report
from timm_jem.evaluation.report_folder import write_files
from timm_jem.evaluation.robustness import NORMS
from timm_jem.evaluation.settings import TITLES
from timm_jem.evaluation.strict_json import dumps

__all__ = ["comparison", "overlays", "read_reports", "write_comparison"]

# Images besides those of the test that numbers of these sections depend on.
_READ = {
    "val": ("held-out images", [TITLES["classification"], TITLES["ood"]]),
    "train": ("training images", [TITLES["generation"]]),
}

# What a row's name says of one run: the length that was found best for its chains, and whether a check of its attacks failed.
_OF_A_RUN = re.compile(r"(?<=^fresh chains), \d+ steps$|: (passed|FAILED)$")


def read_reports(entries: Sequence[str]) -> dict[str, list[Report]]:
    """Reports of "name=FOLDER" or "FOLDER", by name; a folder without one has its report's own, and may have a = in its path.

    Raises:
        InputError: a folder without a report.
    """
    reports: dict[str, list[Report]] = {}
    for entry in entries:
        name, path = entry.split("=", 1) if "=" in entry and not Path(entry).is_dir() else ("", entry)
        report = read_report(path)
        reports.setdefault(name or report.subject["name"], []).append(report)
    return reports


def write_comparison(reports: dict[str, list[Report]], folder: Path) -> None:
    """compare.md, compare.json and the pictures, in place of those of an earlier comparison.

    Raises:
        InputError: the folder can't be written.
    """
    text, data = comparison(reports)
    pictures = overlays(reports)

    def write(aside: Path) -> None:
        for file, (picture, _) in pictures.items():
            plots.save_figure(picture, aside / file)
        shown = [f"![{caption}]({file})\n\n*{caption}*\n" for file, (_, caption) in pictures.items()]
        (aside / "compare.md").write_text("\n".join([text, *shown]), encoding="utf-8")
        (aside / "compare.json").write_text(dumps(data), encoding="utf-8")

    write_files(
        folder,
        write,
        last="compare.json",
        stale=[*(f"pgd_{norm}.png" for norm in NORMS), "reliability.png", "chain_length.png"],
    )


def comparison(reports: dict[str, Sequence[Report]]) -> tuple[str, dict[str, Any]]:
    """One table of several models: rows are results, columns models.

    A model with several reports, e.g. of several seeds, is shown as mean ± standard deviation over them; a cell that fewer of
    them have ends with their number.

    Args:
        reports: by the models' names.

    Returns:
        Markdown, and the same as JSON data: ``rows``, each with section, table, row, column, and of each model the values; and
        ``warnings``.
    """
    keys = in_order([_key(result) for group in reports.values() for report in group for result in report.results])
    values: dict[tuple, dict[str, list[float]]] = {key: {} for key in keys}
    for name, group in reports.items():
        for report in group:
            for key, value in {_key(result): result.value for result in report.results}.items():  # one a report
                values[key].setdefault(name, []).append(value)
    lines = ["# Models side by side", ""]
    for name, group in reports.items():
        runs = f", {len(group)} runs: mean ± standard deviation; (n): of n of them" if len(group) > 1 else ""
        lines.append(f"- **{cell(name)}**: {'; '.join(in_order([cell(report.subject['name']) for report in group]))}{runs}")
        told = [(f"{cell(report.subject['name'])}: " * (len(group) > 1), report.warnings) for report in group]
        lines += in_order([f"  - {whose}{cell(warning)}" for whose, warnings in told for warning in warnings])
    differences = _differences(reports)
    lines += [f"- {cell(line)}" for line in differences]
    for section in in_order([key[0] for key in keys]):
        lines += ["", f"## {cell(section)}", ""]
        for table in in_order([key[1] for key in keys if key[0] == section]):
            lines += [
                "",
                f"### {cell(table)}",
                "",
                "| | " + " | ".join(map(cell, reports)) + " |",
                "| --- |" + " --- |" * len(reports),
            ]
            for key in keys:
                if key[:2] == (section, table):
                    cells = [_mean(values[key].get(name, []), len(group)) for name, group in reports.items()]
                    lines.append(f"| {cell(', '.join(filter(None, key[2:])))} | " + " | ".join(cells) + " |")
    rows = [
        {"section": key[0], "table": key[1], "row": key[2], "column": key[3], "values": of_models}
        for key, of_models in values.items()
    ]
    of_reports = [f"{name}: {warning}" for name, group in reports.items() for report in group for warning in report.warnings]
    data = {"warnings": in_order([line.replace("**", "") for line in differences] + of_reports), "rows": rows}
    return "\n".join(lines).rstrip() + "\n", data


def _key(result: Result) -> tuple[str, str, str, str]:
    return result.section, result.table, _OF_A_RUN.sub("", result.row), result.column


def _mean(values: Sequence[float], runs: int) -> str:
    if not values:
        return ""
    of = f" ({len(values)})" if len(values) < runs else ""
    if len(values) == 1:
        return number(values[0]) + of
    with np.errstate(invalid="ignore"):  # a run of inf or NaN, as of chains that ran away, makes both NaN
        return f"{number(float(np.mean(values)))} ± {number(float(np.std(values, ddof=1)))}{of}"


def _differences(reports: dict[str, Sequence[Report]]) -> list[str]:
    """Warn where numbers of the same name were not measured alike."""
    every = [report for group in reports.values() for report in group]
    images = {_images(report, "test") for report in every}
    kinds = {
        "presets or seeds": lambda report: report.presets,
        "transforms of images": lambda report: report.subject.get("transform") or "those of training here",
    }
    if len(images) > 1 or None in images:  # the same images may lie elsewhere
        kinds = {"data sets": lambda report: report.subject.get("data"), **kinds}
    lines = [
        f"**Not alike**: {what} differ between these reports ({'; '.join(sorted(found))})"
        for what, kind in kinds.items()
        if len(found := {str(kind(report)) for report in every}) > 1
    ]
    for name, group in reports.items():
        lines += [f"**{name} is no one model in several runs**: {why}" for why in _mixed(group)]
    if len(images - {None}) > 1:
        lines.append("**Not alike**: test images differ between these reports")
    for split, (what, titles) in _READ.items():
        of_split = {_images(report, split) for report in every if any(report.measured(title) for title in titles)}
        if len(of_split - {None}) > 1:
            lines.append(f"**Not alike**: {what} differ between these reports")
    lines += [f"**Not alike**: {what} differ between these reports" for what in _others(every)]
    ways: dict[tuple, set[tuple]] = {}
    for report in every:
        for result in report.results:
            ways.setdefault(_key(result), set()).add((result.protocol, result.n, result.split))
    unlike = in_order([f"{key[1]}" for key, found in ways.items() if len(found) > 1])
    return lines + ([f"**Measured differently** (protocol, n or split): {', '.join(unlike)}"] if unlike else [])


def _others(reports: Sequence[Report]) -> list[str]:
    """What rows name by the last part of a path, and what was not the same in these reports."""
    models: dict[str, set[str]] = {}
    named: dict[str, dict[str, set[str]]] = {"outliers": {}, "extractor_weights": {}}
    for section in (section for report in reports for section in report.sections):
        for key in ("judge", "baseline"):
            if (model := section.settings.get(f"{key}_model")) is not None:
                models.setdefault(f"{key}s of section {cell(section.title)}", set()).add(dumps(model))
        for key, of_kind in named.items():
            if isinstance(kept := section.settings.get(key), dict):
                for name, what in kept.items():
                    of_kind.setdefault(cell(name), set()).add(dumps(what))
    told = []
    for what, of_kind in zip(("out-of-distribution sets", "extractors"), named.values(), strict=True):
        if unlike := [name for name, found in of_kind.items() if len(found) > 1]:
            told.append(f"{what} of one name ({', '.join(unlike)})")
    return [what for what, found in models.items() if len(found) > 1] + told


def _images(report: Report, split: str) -> str | None:
    """Which those of a split are, or None where the report doesn't tell, as of a stream."""
    images = report.subject.get("images")
    known = isinstance(images, dict) and images.get(split) is not None
    return dumps([images.get("image_shape"), images[split]]) if known else None


def _mixed(group: Sequence[Report]) -> list[str]:
    """Why the mean over reports of one name is none over runs of one model."""
    if len(group) == 1:
        return []
    weights = [report.subject.get("weights") for report in group]
    found = {
        "architectures": in_order([str(report.subject.get("headline", {}).get("Model")) for report in group]),
        "training commands": in_order([_but_for_the_seed(report.subject.get("trained")) for report in group]),
    }
    reasons = [f"{what} differ ({'; '.join(of_kind)})" for what, of_kind in found.items() if len(of_kind) > 1]
    return reasons + (["some have the same weights"] if len(set(weights)) < len(weights) else [])


def _but_for_the_seed(command: str | None) -> str:
    """A training command without what differs between seeds."""
    return " ".join(re.sub(r"--(train\.seed|output_dir|resume|hub\.push_to)[= ]('[^']*'|\S+)", "", str(command)).split())


def overlays(reports: dict[str, list[Report]]) -> dict[str, tuple[Any, str]]:
    """The curves of all models in one plot each; of several runs of a model, the mean and the range."""
    pictures = {}
    for norm, shown in NORMS.items():
        curves = {}
        for name, group in reports.items():
            found = [r.curves[key]["PGD"] for r in group if (key := f"accuracy under PGD, {norm}") in r.curves]
            if found and all(curve[0] == found[0][0] for curve in found):
                accuracies = np.array([curve[1] for curve in found])
                low, high = (found[0][2], found[0][3]) if len(found) == 1 else (accuracies.min(0), accuracies.max(0))
                curves[name] = (found[0][0], accuracies.mean(0).tolist(), list(low), list(high))
        if curves:
            picture = plots.accuracy_curves(curves, norm, f"Accuracy under PGD, {shown}")
            band = "95 % interval of one run, or range over runs"
            pictures[f"pgd_{norm}.png"] = picture, f"Accuracy under PGD, {shown}; the band is the {band}."

    def of_runs(plot: str, curve: str) -> dict[str, Any]:
        """That curve of every run, numbered where a model has several."""
        return {
            name if len(group) == 1 else f"{name} {i}": report.curves[plot][curve]
            for name, group in reports.items()
            for i, report in enumerate(group, 1)
            if plot in report.curves
        }

    if bins := of_runs("reliability", "as it is"):
        caption = "Accuracy against confidence, before temperature scaling."
        pictures["reliability.png"] = plots.reliability_diagram(bins), caption
    panels = {measure: curves for measure in plots.AGAINST_LENGTH if (curves := of_runs(measure, "fresh chains"))}
    if panels:
        caption = "Fresh chains against their length: near training images, read as asked, and diverse?"
        pictures["chain_length.png"] = plots.quality_curves(panels), caption
    return pictures
