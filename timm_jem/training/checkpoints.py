"""Checkpoints of a run: written by every process, whole or not there at all, checked before they are trusted."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from timm_jem.errors import InputError, check_whole, one_line
from timm_jem.files import sha256
from timm_jem.training.state import save_tree

__all__ = ["Checkpoints", "damage", "is_current", "rank_files", "shared_file"]

_NAME = re.compile(r"(\.old-)?step_(\d{8})")
_MANIFEST, _SHARED = "manifest.json", "shared.safetensors"
_FORMAT = 2  # of the files and the trees in them


class Checkpoints:
    """The checkpoints in one folder: ``step_00000400/`` with a file of what all processes have in common, one for each
    process, and a manifest of their SHA-256.

    A checkpoint is written aside and renamed when all its files are on disk, so that a process killed at any instant
    leaves the earlier ones as they were. All processes call :meth:`save` and :meth:`newest` together; they share the
    folder. Only safetensors and JSON are read.

    Args:
        folder: made at the first :meth:`save`.
        accelerator: tells which process this is.
        keep: how many to keep, interim ones not counted; older ones are removed once a newer one is whole.
    """

    def __init__(self, folder: str | os.PathLike, accelerator: Accelerator, *, keep: int = 2) -> None:
        check_whole("checkpoints to keep", keep, 1)
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep

    def save(self, step: int, own: Any, shared: Any = None, *, interim: bool = False) -> Path:
        """Write the checkpoint of ``step``; the same one again replaces it, and those of later steps, which training went back
        from, are removed.

        Args:
            step: optimiser steps done.
            own: this process's part.
            shared: what is the same in all of them, and is written by one; None: nothing is.
            interim: where a run was stopped, and none would be otherwise. The next one takes its place, so that what there
                is to go back to is the same as if the run had not been stopped.

        Raises:
            InputError: in every process, where one of them could not write; earlier checkpoints are as they were.
        """
        main, rank = self.accelerator.is_main_process, self.accelerator.process_index
        target = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{target.name}"
        try:
            with self._together(target):
                if main:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    for left_over in self.folder.glob(".step_*"):  # by a process that was killed
                        shutil.rmtree(left_over)
                    aside.mkdir()
            digests: dict[str, str] = {}
            with self._together(target):
                digests[_rank_file(rank)] = save_tree(own, aside / _rank_file(rank))
                if main and shared is not None:
                    digests[_SHARED] = save_tree(shared, aside / _SHARED)
            digests = {name: digest for part in gather_object([digests]) for name, digest in part.items()}
            with self._together(target):
                if main:
                    interim = interim and (not target.exists() or _is_interim(target))
                    manifest = {"format": _FORMAT, "step": step, "interim": interim, "sha256": digests}
                    with (aside / _MANIFEST).open("w", encoding="utf-8") as file:
                        json.dump(manifest, file)
                        file.flush()
                        os.fsync(file.fileno())
                    if target.exists():
                        self._hide(target)
                    os.replace(aside, target)
                    _sync_folder(self.folder)
                    self.forget_after(step)
                    self.tidy(target)
        except InputError:
            if main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return target

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, oldest first."""
        return [_step(path) for path in self._all()]

    def newest(self, before: int | None = None) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, or None, and a line for each newer one that is not.

        Args:
            before: only those of earlier steps, and none that is interim.
        """
        found: list = [None, []]
        if self.accelerator.is_main_process:
            paths = self._all(hidden=True)
            if before is not None:
                paths = [path for path in paths if _step(path) < before and not _is_interim(path)]
            for path in reversed(paths):
                reason = damage(path)
                if reason is None:
                    found[0] = path
                    break
                if not path.name.startswith("."):
                    found[1].append(f"checkpoint {path} is passed over: {reason}")
        found = broadcast_object_list(found)
        return found[0], found[1]

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a run that goes on from an older one leaves them behind."""
        if self.accelerator.is_main_process:
            for path in self._all(hidden=True):
                if _step(path) > step:
                    shutil.rmtree(path if path.name.startswith(".") else self._hide(path))

    def tidy(self, newest: Path) -> None:
        """Remove those that ``newest`` and others before it replace, also where a save was killed before it could; not where
        ``newest`` itself was on its way out."""
        if self.accelerator.is_main_process and not newest.name.startswith("."):
            there = self._all()
            interim = [path for path in there if _is_interim(path)]
            regular = [path for path in there if path not in interim]
            for path in [*regular[: -self.keep], *(path for path in interim if path.name != newest.name)]:
                self._hide(path)
            for path in self.folder.glob(".old-step_*"):
                shutil.rmtree(path)

    def _all(self, *, hidden: bool = False) -> list[Path]:
        """By step; with those that were on their way out, which are whole if a process was killed just then."""
        if not self.folder.is_dir():
            return []
        paths = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted((path for path in paths if hidden or not path.name.startswith(".")), key=lambda p: (_step(p), p.name))

    def _hide(self, path: Path) -> Path:
        """Out of sight before it is removed: what is half removed is no checkpoint."""
        hidden = path.with_name(f".old-{path.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        os.replace(path, hidden)
        return hidden

    @contextlib.contextmanager
    def _together(self, target: Path):
        """What fails in one process is raised in all."""
        error = None
        try:
            yield
        except (OSError, SafetensorError) as caught:
            error = caught
        reasons = [reason for reason in gather_object([None if error is None else one_line(error)]) if reason]
        if reasons:
            kept = "earlier ones are whole" if self._all() else "there is no earlier one"
            raise InputError(f"checkpoint {target} can't be written ({reasons[0]}): {kept}") from error or OSError(reasons[0])


def damage(checkpoint: str | os.PathLike) -> str | None:
    """Why a checkpoint is not whole, or None: every file is there with the SHA-256 that its manifest tells."""
    checkpoint = Path(checkpoint)
    try:
        sums = _manifest(checkpoint)["sha256"]
        if _rank_file(0) not in sums:
            return "its manifest names no file"
        for name, expected in sums.items():
            if sha256(checkpoint / Path(name).name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it is not whole ({one_line(error)})"
    return None


def is_current(checkpoint: str | os.PathLike) -> bool:
    """Whether a whole checkpoint is one of this version."""
    return _manifest(checkpoint).get("format") == _FORMAT


def _is_interim(checkpoint: Path) -> bool:
    try:
        return _manifest(checkpoint).get("interim") is True
    except (OSError, ValueError, AttributeError, RecursionError):  # it is not whole
        return False


def rank_files(checkpoint: str | os.PathLike) -> list[Path]:
    """The files of a whole checkpoint, one for each process that wrote it, for :func:`load_tree`."""
    names = set(_manifest(checkpoint)["sha256"]) - {_SHARED}
    return [Path(checkpoint) / _rank_file(rank) for rank in range(len(names))]


def shared_file(checkpoint: str | os.PathLike) -> Path | None:
    """The file of what was the same in all processes, for :func:`load_tree`; None: there is none."""
    return Path(checkpoint) / _SHARED if _SHARED in _manifest(checkpoint)["sha256"] else None


def _manifest(checkpoint: str | os.PathLike) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / _MANIFEST).read_text(encoding="utf-8"))


def _step(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[2])


def _rank_file(rank: int) -> str:
    return f"rank_{rank}.safetensors"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
