"""What was measured, with how many images, which seed and which protocol: as JSON, as Markdown, and in a folder."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_jem.errors import InputError, one_line
from timm_jem.files import folder_aside

__all__ = [
    "REPORT_FILE",
    "Report",
    "Result",
    "check_output_dir",
    "fingerprint",
    "in_order",
    "number",
    "read_report",
    "write_files",
    "write_report",
]

REPORT_FILE = "report.json"
FORMAT_VERSION = 1
_OURS = (REPORT_FILE, "report.md", "compare.json", "compare.md")


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
class Report:
    """All of one evaluation.

    Attributes:
        subject: what was evaluated, on what, by which command and settings, versions, seconds: JSON data.
        results: the numbers, in the report's order.
        curves: data of plots that :mod:`timm_jem.evaluation.comparison` overlays, by the plot's name; JSON data.
        warnings: what a reader must know before believing the numbers.
        pictures: (section, file name, caption).
    """

    subject: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str, str]] = field(default_factory=list)

    def as_json(self) -> str:
        """The whole, as JSON; NaN stays NaN, as Python writes it."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    def as_markdown(self) -> str:
        """For a reader: tables, protocols beneath them, and pictures."""
        subject = self.subject
        lines = [f"# Evaluation of {subject['name']}", ""]
        lines += [f"- **{key}**: {value}" for key, value in subject.get("headline", {}).items()]
        lines += ["", f"```bash\n{subject['command']}\n```" if "command" in subject else "", ""]
        if self.warnings:
            lines += ["**Warnings**", "", *(f"- {warning}" for warning in self.warnings), ""]
        sections = [result.section for result in self.results] + [section for section, _, _ in self.pictures]
        for section in in_order(sections):
            lines += [f"## {section}", ""]
            of_section = [result for result in self.results if result.section == section]
            for table in in_order([result.table for result in of_section]):
                of_table = [result for result in of_section if result.table == table]
                lines += [f"### {table}", "", *_table(of_table), ""]
                lines += [f"{_protocols(of_table)}", ""]
            for where, file, caption in self.pictures:
                if where == section:
                    lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
        return "\n".join(lines).rstrip() + "\n"

    def card_results(self) -> list[dict[str, Any]]:
        """The results that go on a model card, as :func:`timm_jem.hub.card.model_card` takes them."""
        return [
            {
                "name": result.title,
                "type": result.type,
                "value": result.value,
                "split": result.split,
                "n": result.n,
                "protocol": result.protocol + _interval(result),
            }
            for result in self.results
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
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"  # NaN is "nan"


def _table(results: Sequence[Result]) -> list[str]:
    cells = {(result.row, result.column): result for result in results}
    columns = in_order([result.column for result in results])
    lines = ["| | " + " | ".join(column or "value" for column in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in in_order([result.row for result in results]):
        shown = []
        for column in columns:
            result = cells.get((row, column))
            interval = f" [{number(result.low)}, {number(result.high)}]" if result and result.interval else ""
            shown.append(f"{number(result.value)}{interval}" if result else "")
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return lines


def _protocols(results: Sequence[Result]) -> str:
    """Each way to measure, and the rows or columns it was used for where there are several."""
    ways: dict[str, list[Result]] = {}
    for result in results:
        seed = "" if result.seed is None else f", seed {result.seed}"
        interval = f"; [intervals]: {result.interval}" if result.interval else ""
        ways.setdefault(f"{result.protocol}; n = {result.n:,}{seed}{interval}.", []).append(result)
    if len(ways) == 1:
        return next(iter(ways))
    columns = [in_order([result.column for result in alike]) for alike in ways.values()]
    by_column = len({column for names in columns for column in names}) == sum(map(len, columns))
    lines = []
    for way, alike in ways.items():
        names = [result.column for result in alike] if by_column else [result.row for result in alike]
        lines.append(f"- *{'; '.join(in_order(names))}*: {way}")
    return "\n".join(lines)


def read_report(path: str | os.PathLike) -> Report:
    """The report in a folder, or a report.json; JSON only.

    Raises:
        InputError: none there, or not one of this version's.
    """
    file = Path(path)
    file = file / REPORT_FILE if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{path} has no {REPORT_FILE}: give folders that recipes/evaluate.py wrote")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("format_version") != FORMAT_VERSION:
            raise InputError(f"{file} is of another version: evaluate that model again")
        names = {f.name for f in fields(Result)}
        results = [Result(**{key: value for key, value in result.items() if key in names}) for result in data.pop("results")]
        pictures = [tuple(entry) for entry in data.pop("pictures")]
        return Report(results=results, pictures=pictures, **data)
    except InputError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} is not a report ({type(error).__name__}: {one_line(error)}): evaluate that model again"
        ) from error


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and bytes. A report holds that of the model it is about."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_output_dir(path: str | os.PathLike, overwrite: bool) -> Path:
    """A folder for a report: new, empty, or, with ``overwrite``, of an earlier one.

    Raises:
        InputError: it holds something else.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not any((folder / name).is_file() for name in _OURS):
            raise InputError(f"output_dir {folder} holds other files: give a new folder")
        if not overwrite:
            raise InputError(f"output_dir {folder} holds a report: give a new folder, or --overwrite true")
    return folder


def write_report(report: Report, folder: Path, drawn: Path, *, missing: Sequence[str] = ()) -> None:
    """Put a report into its folder, in place of what was there; the pictures of an earlier report go with it.

    Args:
        report: as far as it goes.
        folder: made if it isn't there.
        drawn: a folder on the same file system with pictures that ``folder`` may not have yet; those that the report shows
            are moved.
        missing: titles of sections that are still to be measured. The report warns that it lacks them.

    Raises:
        InputError: the folder can't be written.
    """
    if missing:
        unfinished = f"Unfinished: {', '.join(missing)} not measured, because the evaluation is still running or was stopped."
        report = replace(report, warnings=[*report.warnings, unfinished])
    shown = {file for _, file, _ in report.pictures}
    with _explained(folder):
        (drawn / REPORT_FILE).write_text(report.as_json(), encoding="utf-8")
        (drawn / "report.md").write_text(report.as_markdown(), encoding="utf-8")
        _move([file for file in drawn.iterdir() if file.name in shown or file.name in _OURS], folder, _shown_in(folder) - shown)


def write_files(folder: Path, write: Callable[[Path], None], *, stale: Iterable[str] = ()) -> None:
    """``write(temporary folder)``, then move its files to ``folder``: all of them are there, or none.

    Args:
        folder: made if it isn't there.
        write: writes into the folder that it is given.
        stale: names of files in ``folder`` that must not stay unless ``write`` wrote them again.

    Raises:
        InputError: the folder can't be written.
    """
    with _explained(folder), folder_aside(folder) as aside:
        write(aside)
        files = list(aside.iterdir())
        _move(files, folder, {*stale} - {file.name for file in files})


def _move(files: Sequence[Path], folder: Path, stale: Iterable[str]) -> None:
    folder.mkdir(exist_ok=True)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    # The report itself last: where it is, all of its pictures are.
    for file in sorted(files, key=lambda file: file.name in _OURS):
        os.replace(file, folder / file.name)


def _shown_in(folder: Path) -> set[str]:
    """Names of the pictures of the report that ``folder`` holds; none where it can't be read."""
    try:
        pictures = read_report(folder).pictures
    except InputError:  # nothing there yet, or a report of another version, about to be replaced
        return set()
    return {file for _, file, _ in pictures if Path(file).name == file and file.endswith(".png")}


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"the report can't be written to {folder} ({one_line(error)}): make room, or give another") from error
