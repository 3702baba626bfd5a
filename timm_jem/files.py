"""Files and folders that are there whole or as they were before, and the machine's cores."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from timm_jem.errors import InputError, one_line

__all__ = ["cores", "folder_aside", "replaced_file"]


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the context ends well; otherwise ``path`` is as before.

    Raises:
        OSError: whatever the file system says; nothing partial stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside ``target``, on its file system, removed when the context ends.

    Raises:
        InputError: it can't be made.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"the folder {target} can't be made ({one_line(error)}): give another") from error
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
