"""What was measured, with how many images, which seed and which protocol: as JSON and as Markdown."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from timm_jem.errors import InputError, one_line, program
from timm_jem.evaluation.strict_json import built, dumps, fits, restored

__all__ = ["REPORT_FILE", "Measured", "Report", "Result", "cell", "in_order", "number", "read_report"]

REPORT_FILE = "report.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Result:
    """One number. ``table``, ``row`` and ``column`` are its name: reports are compared by them.

    Attributes:
        section: of the report.
        table, row, column: where it stands; the column is "" in tables of one column.
        value: as measured; NaN where it is undefined.
        n: how many images it is of.
        protocol: how it was measured, one line, without ``n`` and ``seed``.
        seed: of everything random in it; None: nothing is.
        low, high: confidence interval, or None.
        interval: how that was found, e.g. "Wilson, 95 %".
        type, title: on a model card: the Hub's name of the metric and the result's own; None: not on cards.
        split: of the data set.
    """

    section: str
    table: str
    row: str
    column: str
    value: float
    n: int
    protocol: str
    seed: int | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    type: str | None = None
    title: str | None = None
    split: str = "test"


@dataclass
class Measured:
    """What one section of a report came to. It is there as a whole, or not at all.

    Attributes:
        title: of the section.
        settings: with which it was measured: JSON data.
        command, versions: which measured it, and with what software on which device.
        seconds: that it took.
        results: the numbers, in the report's order.
        curves: data of plots that :mod:`timm_jem.evaluation.comparison` overlays, by the plot's name; JSON data.
        warnings: what a reader must know before believing the numbers.
        pictures: (file name, caption).
        left_out: why there is nothing of all this; None: it was measured.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: str = ""
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    left_out: str | None = None


@dataclass
class Report:
    """All that was measured of one model on one data set, by one call or several.

    Attributes:
        subject: what was evaluated, and on what: JSON data with a ``name``.
        sections: what was measured, in the report's order.
        missing: titles of sections that are still to be measured.
    """

    subject: dict[str, Any]
    sections: list[Measured] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def results(self) -> list[Result]:
        """The numbers of all sections."""
        return [result for section in self.sections for result in section.results]

    @property
    def curves(self) -> dict[str, Any]:
        """The curves of all sections, by the plot's name."""
        return {name: curve for section in self.sections for name, curve in section.curves.items()}

    @property
    def pictures(self) -> list[tuple[str, str, str]]:
        """(section, file name, caption) of all sections."""
        return [(section.title, file, caption) for section in self.sections for file, caption in section.pictures]

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers, sections that are not there included."""
        found = []
        for section in self.sections:
            found += section.warnings
            found += [f"{section.title} is left out: {section.left_out}"] if section.left_out else []
        if self.missing:
            found.append(
                f"Unfinished: {', '.join(self.missing)} not measured, because the evaluation is still running or was stopped. "
                "The same command goes on with it."
            )
        return in_order(found)

    @property
    def presets(self) -> str:
        """Those that the sections were measured with."""
        return "; ".join(in_order([f"{s.settings['preset']}, seed {s.settings['seed']}" for s in self.sections if s.settings]))

    def measured(self, title: str) -> Measured | None:
        """The section of this title, unless it is not there or was left out."""
        return next((section for section in self.sections if section.title == title and section.left_out is None), None)

    def put(self, section: Measured, order: Sequence[str]) -> None:
        """Add a section, or replace it; the report's order is that of the titles ``order``.

        One that was left out takes no place of numbers that are there, and becomes a warning.
        """
        there = self.measured(section.title)
        if section.left_out is not None and there is not None:
            there.warnings = in_order([*there.warnings, f"{section.title} is of an earlier call; the last: {section.left_out}"])
            return
        others = [other for other in self.sections if other.title != section.title]
        self.sections = sorted([*others, section], key=lambda of: order.index(of.title) if of.title in order else len(order))

    def as_json(self) -> str:
        """The whole, as strict JSON: NaN and infinities are strings."""
        return dumps({"format_version": FORMAT_VERSION, **asdict(self)})

    def as_markdown(self) -> str:
        """For a reader: tables, protocols beneath them, and pictures."""
        subject, there = self.subject, [section for section in self.sections if section.left_out is None]
        headline = {
            **subject.get("headline", {}),
            "Preset": self.presets,
            "Versions": "; ".join(in_order([section.versions for section in there])),
            "Took": f"{sum(section.seconds for section in self.sections):.0f} s",
        }
        lines = [f"# Evaluation of {cell(subject['name'])}", ""]
        lines += [f"- **{cell(key)}**: {cell(value)}" for key, value in headline.items() if value]
        commands = in_order([section.command for section in there if section.command])
        lines += ["", "```bash", *commands, "```", ""] if commands else [""]
        if self.warnings:
            lines += ["**Warnings**", "", *(f"- {cell(warning)}" for warning in self.warnings), ""]
        for section in there:
            lines += [f"## {cell(section.title)}", ""]
            for table in in_order([result.table for result in section.results]):
                of_table = [result for result in section.results if result.table == table]
                lines += [f"### {cell(table)}", "", *_table(of_table), ""]
                lines += [f"{_protocols(of_table)}", ""]
            for file, caption in section.pictures:
                lines += [f"![{cell(caption)}]({file})", "", f"*{cell(caption)}*", ""]
        return "\n".join(lines).rstrip() + "\n"

    def card_results(self) -> list[dict[str, Any]]:
        """The results that go on a model card, as :func:`timm_jem.hub.card.model_card` takes them, with their warnings."""
        return [
            {
                "name": result.title,
                "type": result.type,
                "value": result.value,
                "split": result.split,
                "n": result.n,
                "protocol": result.protocol + _interval(result) + "".join(f"; warning: {text}" for text in section.warnings),
            }
            for section in self.sections
            for result in section.results
            if result.title is not None and math.isfinite(result.value)
        ]


def _interval(result: Result) -> str:
    seed = "" if result.seed is None else f"; seed {result.seed}"
    return f"{seed}; {result.interval} [{result.low:.4f}, {result.high:.4f}]" if result.interval else seed


def in_order(names: Sequence[str]) -> list[str]:
    """Each of the names once, in the order of their first appearance."""
    return list(dict.fromkeys(names))


def number(value: float) -> str:
    """A value as tables show it."""
    if 0 < abs(value) < 5e-4:  # KID may be so small
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"  # NaN is "nan"


def cell(text: str) -> str:
    """Text in a table of Markdown: one line, in which no bar ends the cell and no mark-up begins."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("![", "!\\[")


def _table(results: Sequence[Result]) -> list[str]:
    cells = {(result.row, result.column): result for result in results}
    columns = in_order([result.column for result in results])
    lines = ["| | " + " | ".join(cell(column) or "value" for column in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in in_order([result.row for result in results]):
        shown = []
        for column in columns:
            result = cells.get((row, column))
            interval = f" [{number(result.low)}, {number(result.high)}]" if result and result.interval else ""
            shown.append(f"{number(result.value)}{interval}" if result else "")
        lines.append(f"| {cell(row)} | " + " | ".join(shown) + " |")
    return lines


def _protocols(results: Sequence[Result]) -> str:
    """Each way to measure, and the rows or columns it was used for where there are several."""
    ways: dict[str, list[Result]] = {}
    for result in results:
        seed = "" if result.seed is None else f", seed {result.seed}"
        interval = f"; [intervals]: {result.interval}" if result.interval else ""
        ways.setdefault(cell(f"{result.protocol}; n = {result.n:,}{seed}{interval}."), []).append(result)
    if len(ways) == 1:
        return next(iter(ways))
    columns = [in_order([result.column for result in alike]) for alike in ways.values()]
    by_column = len({column for names in columns for column in names}) == sum(map(len, columns))
    lines = []
    for way, alike in ways.items():
        names = [result.column for result in alike] if by_column else [result.row for result in alike]
        lines.append(f"- *{cell('; '.join(in_order(names)))}*: {way}")
    return "\n".join(lines)


def read_report(path: str | os.PathLike) -> Report:
    """The report in a folder, or a report.json; JSON only.

    Raises:
        InputError: none there, or not one of this version's.
    """
    file = Path(path)
    file = file / REPORT_FILE if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{path} has no {REPORT_FILE}: give folders that {program('evaluate')} wrote")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} is not a report ({type(error).__name__}: {one_line(error)}): evaluate that model again"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(f"{file} is of another version: evaluate that model again")
    try:
        return _report(data)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not a report ({one_line(error)}): evaluate that model again") from error


def _report(data: dict[str, Any]) -> Report:
    sections = []
    for part in _list(data, "sections"):
        results = [built(Result, {**result, **_numbers(result)}) for result in _list(part, "results")]
        for result in results:
            if result.interval is not None and None in (result.low, result.high):
                raise TypeError(f"the interval of {result.row} has no ends")
        for name, curve in (curves := restored(part["curves"])).items():
            _check_curves(name, curve)
        pictures = [tuple(picture) for picture in _list(part, "pictures")]
        sections.append(built(Measured, {**part, "results": results, "curves": curves, "pictures": pictures}))
    report = built(Report, {**data, "sections": sections})
    if not fits(report.subject["name"], str) or not fits(report.subject.get("headline", {}), dict[str, str]):
        raise TypeError("subject has no name, or a headline that is no text")
    return report


def _list(data: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(data[name], list):
        raise TypeError(f"{name} is {data[name]!r:.80}")
    return data[name]


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: restored(result[name]) for name in ("value", "low", "high") if name in result}


def _check_curves(name: str, curves: dict[str, Any]) -> None:
    """A TypeError unless these are the curves that comparisons draw by this name."""
    for curve in curves.values():
        if name == "reliability":
            lists = [curve[key] for key in ("confidence", "accuracy", "share")]
            alike = fits(curve["ece"], float)
        else:
            lists, alike = list(curve), len(curve) == (2 if name.endswith(" against length") else 4)
        if not alike or not fits(lists, list[list[float]]) or len({len(values) for values in lists}) != 1 or not lists[0]:
            raise TypeError(f"the curves of {name!r:.80} are none")
