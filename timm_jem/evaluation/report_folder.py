"""The folders of reports and comparisons: what may be written where, and whole files or none."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from timm_jem.errors import InputError, one_line
from timm_jem.evaluation.report import REPORT_FILE, Report, read_report
from timm_jem.files import folder_aside, folder_there, left_aside, move_in
from timm_jem.lock import LOCK_FILE, locked

__all__ = ["check_comparison_dir", "claimed", "earlier_report", "write_files", "write_report"]

_REPORT = (REPORT_FILE, "report.md")
_COMPARISON = ("compare.json", "compare.md")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[str | None]:
    """Within the context no other process evaluates into ``folder``; one that was made for it and stays empty goes again.

    Gives:
        None, or a line that says that this file system has no locks.

    Raises:
        InputError: another process does, or it is a file, holds something else, or can't be written.
    """
    _holds(folder, _REPORT)  # before a lock is put among other files
    with contextlib.ExitStack() as held:
        with _explained(folder):
            held.enter_context(folder_there(folder))
            note = held.enter_context(locked(folder))
        yield note


def earlier_report(folder: Path, overwrite: bool) -> Report | None:
    """The report that ``folder`` holds; None: it is new or empty, or, with ``overwrite``, holds one that can't be read.

    Raises:
        InputError: it is a file or holds something else, or, without ``overwrite``, a report that can't be read.
    """
    if not _holds(folder, _REPORT):
        return None
    try:
        return read_report(folder)
    except InputError as error:
        if overwrite:
            return None
        raise InputError(f"{error}, into a new folder or with --overwrite true") from error


def check_comparison_dir(folder: Path, overwrite: bool) -> None:
    """Raise an InputError unless ``folder`` is new, empty, or, with ``overwrite``, holds an earlier comparison."""
    if _holds(folder, _COMPARISON) and not overwrite:
        raise InputError(f"output_dir {folder} holds a comparison: give a new folder, or --overwrite true")


def _holds(folder: Path, names: Sequence[str]) -> bool:
    """Whether any of these is there. Nothing, or what a killed process left, is fine, and something else an InputError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file: give a folder")
    if not folder.is_dir() or not {*folder.iterdir()} - {*left_aside(folder), folder / LOCK_FILE}:
        return False
    if not any((folder / name).is_file() for name in names):
        raise InputError(f"output_dir {folder} holds other files: give a new folder")
    return True


def write_report(report: Report, folder: Path, drawn: Path) -> None:
    """Put a report into its folder, in place of what was there; the pictures of an earlier report go with it.

    Args:
        report: as far as it goes.
        folder: made if it isn't there.
        drawn: a folder on the same file system with pictures that ``folder`` may not have yet; those that the report shows
            are moved.

    Raises:
        InputError: the folder can't be written.
    """
    shown = {file for _, file, _ in report.pictures}
    with _explained(folder):
        (drawn / REPORT_FILE).write_text(report.as_json(), encoding="utf-8")
        (drawn / "report.md").write_text(report.as_markdown(), encoding="utf-8")
        files = [file for file in drawn.iterdir() if file.name in shown or file.name in _REPORT]
        # At any moment the pictures that a report shows are there: before it come its own, and after it go those of the last.
        stale = _shown_in(folder) - shown
        for file in sorted(files, key=lambda file: file.name in _REPORT):
            os.replace(file, folder / file.name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)


def write_files(folder: Path, write: Callable[[Path], None], *, last: str, stale: Iterable[str] = ()) -> None:
    """``write(temporary folder)``, then move its files to ``folder``: all of them are there, or none.

    Args:
        folder: made if it isn't there.
        write: writes into the folder that it is given.
        last: of the files that ``write`` writes, see :func:`timm_jem.files.move_in`.
        stale: names of files in ``folder`` that must not stay unless ``write`` wrote them again.

    Raises:
        InputError: the folder can't be written.
    """
    with _explained(folder), folder_aside(folder) as aside:
        write(aside)
        move_in(aside, folder, last=last, stale={*stale} - {file.name for file in aside.iterdir()})


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
