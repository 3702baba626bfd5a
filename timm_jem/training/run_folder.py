"""A run's folder: every name in it, and who may write there."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import as_path, files_left_aside, left_aside, replaced_file
from timm_jem.hub.card import PICTURES
from timm_jem.lock import LOCK_FILE, locked

__all__ = ["RunFolder"]

# With the names under which timm_jem.files.folder_aside writes them.
_BEST = re.compile(r"step_\d{8}|\.step_\d{8}-[0-9a-f]{8}")
_FILES = r"(config|summary|samples(_\d+)?|buffer|chains)\.(yaml|json|png)"  # that a run replaces


class RunFolder:
    """What a run has on disk: config.yaml, metrics.jsonl, summary.json, pictures, model/, best/ and checkpoints/; and in
    classifier/ a run of the same kind, of the classifier that it started from.

    One process writes there, the one that has :meth:`claimed` it. Evaluation writes to evaluation/ alone, and publishing
    reads: they may do so meanwhile, since a model is replaced whole.

    Args:
        path: the folder, which need not be there yet.
        checkpoint: the checkpoint of it that was asked for; None: the newest.
        numbered_by: the data set after which the folder is numbered, so that :meth:`claimed` may take another number.
        goes_on: a run is there already.
        part_of: the folder of the run that this one is the first part of, where it is.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        checkpoint: Path | None = None,
        *,
        numbered_by: str | None = None,
        goes_on: bool = False,
        part_of: "RunFolder | None" = None,
    ) -> None:
        self.path, self.checkpoint, self.numbered_by, self.goes_on = as_path(path), checkpoint, numbered_by, goes_on
        self.part_of = part_of

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def choose(cls, output_dir: str | None, dataset: str, resume: str | None) -> "RunFolder":
        """The folder of a run, whether it goes on or is a new one; nothing is written.

        Args:
            output_dir: the folder; None: the first free one of runs/<data set>, runs/<data set>-2, ...
            dataset: name of the data set.
            resume: a run's folder or one of its checkpoints, "auto", or None; see
                :class:`timm_jem.training.settings.Settings`.

        Raises:
            InputError: a folder that holds something else, or a run that can't go on.
        """
        found = cls.find(output_dir, dataset, resume)
        if found is not None:
            if output_dir is not None and Path(output_dir).resolve() != found.path.resolve():
                raise InputError(f"resume is {resume}, and a run goes on in its own folder: leave output_dir {output_dir} out")
            if resume != "auto" and not found._can_go_on:
                raise InputError(f"{found} has no checkpoints: give a run's folder, such as runs/digits, or --resume auto")
            return found
        if output_dir is None:
            return cls(next(path for path in _numbered(dataset) if not path.exists()), numbered_by=dataset)
        new = cls(output_dir)
        new._refuse_others()
        return new

    @classmethod
    def find(cls, output_dir: str | None, dataset: str, resume: str | None) -> "RunFolder | None":
        """The run that goes on, by the arguments of :meth:`choose`; None: there is none, or a new one is asked for."""
        if resume is None:
            return None
        if resume != "auto":
            given = as_path(resume)
            of_checkpoint = given.parent.name == "checkpoints"
            return cls(given.parent.parent, given, goes_on=True) if of_checkpoint else cls(given, goes_on=True)
        if output_dir is not None:
            run = cls(output_dir, goes_on=True)
            return run if run.config_file.is_file() else None
        taken = None
        for path in _numbered(dataset):
            if not path.exists():
                break
            run = cls(path, goes_on=True)
            if run.config_file.is_file() or (path.is_dir() and _empty(path)):  # its writer was killed at once
                taken = run
        return taken

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def _can_go_on(self) -> bool:
        return any(at.is_dir() for at in (self.checkpoints, self.classifier.checkpoints, self.classifier.model))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def backbone(self) -> Path:
        """What :func:`timm_jem.training.build.keep_source` leaves, where the backbone came from elsewhere."""
        return self.path / "backbone"

    @property
    def classifier(self) -> "RunFolder":
        """Of the run that trains by cross-entropy alone first."""
        path = self.path / "classifier"
        return RunFolder(path, goes_on=path.is_dir(), part_of=self)

    @property
    def whole(self) -> "RunFolder":
        """What to ``--resume``."""
        return self.part_of or self

    @property
    def model(self) -> Path:
        return self.path / "model"

    def samples(self, step: int) -> Path:
        return self.path / f"samples_{step:06d}.png"

    def best(self, step: int) -> Path:
        return self.path / "best" / f"step_{step:08d}"

    @contextlib.contextmanager
    def claimed(self, accelerator: Accelerator) -> Iterator[None]:
        """Within the context the folder is there, and this run's alone; all processes call it.

        A numbered one that someone else made meanwhile is left to them, and the next is taken.

        Raises:
            InputError: it can't be made, holds something else, or another process writes there; and in the place of an
                OSError that names a file in it.
        """
        with contextlib.ExitStack() as held:
            note = error = None
            if accelerator.is_main_process:
                try:
                    note = held.enter_context(self._claim())
                except InputError as caught:
                    error = caught
            self.path, note, refused = broadcast_object_list([self.path, note, None if error is None else str(error)])
            if refused is not None:
                raise InputError(refused) from error
            if note is not None:
                accelerator.print(note)
            try:
                yield
            except OSError as caught:
                if not self._has(caught.filename):
                    raise
                raise InputError(
                    f"{one_line(caught)}; what was written before is whole: fix this and go on with --resume {self.whole}"
                ) from caught

    @contextlib.contextmanager
    def _claim(self) -> Iterator[str | None]:
        with contextlib.ExitStack() as held:
            try:
                if self.numbered_by is None:
                    self.path.mkdir(parents=True, exist_ok=True)
                    note = held.enter_context(locked(self.path))
                    if not self.goes_on:  # by now
                        self._refuse_others()
                else:
                    self.path, note = next(filter(None, (_first(path, held) for path in _numbered(self.numbered_by))))
            except OSError as error:
                raise InputError(f"output_dir {self} can't be made ({one_line(error)}): give another") from error
            yield note

    def _refuse_others(self) -> None:
        if self.path.is_file():
            raise InputError(f"output_dir {self} is a file: give a folder")
        if self.path.is_dir() and not _empty(self.path):
            what, remedy = ("another run", ", or --resume auto") if self.config_file.is_file() else ("other files", "")
            raise InputError(f"output_dir {self} holds {what}: give a new folder{remedy}")

    def _has(self, filename: str | bytes | int | None) -> bool:
        if not isinstance(filename, (str, bytes)):
            return False
        return Path(os.fsdecode(filename)).resolve().is_relative_to(self.path.resolve())

    def finished(self, steps: int) -> int | None:
        """How many steps a finished run has done, where that is ``steps`` at least; None: it has more to do.

        Raises:
            InputError: a run that gave up, or a summary.json that can't be read.
        """
        summary = self.summary()
        if summary is None:
            return None
        if summary.get("outcome") == "stopped":
            further = "without its summary.json it goes on with other settings"
            if not self._can_go_on:
                further = "it has no checkpoint to go on from: start anew with other settings and another output_dir"
            raise InputError(f"{self} has ended: {summary.get('explanation')}; {further}")
        done = summary.get("steps")
        if not isinstance(done, int):
            raise InputError(f"{self.summary_file} says {quoted(done)} for its steps: remove it, and the run goes on")
        return done if done >= steps else None

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where the run has not come to its end.

        Raises:
            InputError: it can't be read.
        """
        try:
            summary = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, RecursionError, ValueError) as error:
            raise InputError(
                f"{self.summary_file} can't be read ({one_line(error)}): remove it, and the run goes on"
            ) from error
        if not isinstance(summary, dict):
            raise InputError(f"{self.summary_file} holds a {type(summary).__name__}: remove it, and the run goes on")
        return summary

    def write_text(self, file: Path, text: str) -> None:
        """Replace a file of the run's.

        Raises:
            InputError: it can't be written; the old one is as it was.
        """
        try:
            with replaced_file(file) as aside:
                aside.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file} can't be written ({one_line(error)}): make room") from error

    def write_json(self, file: Path, data: Any) -> None:
        """As :meth:`write_text`."""
        self.write_text(file, json.dumps(data, indent=2) + "\n")

    def write_picture(self, name: str, picture: Image.Image) -> None:
        with replaced_file(self.path / name) as aside:
            picture.save(aside, "png")

    def pictures(self) -> dict[str, Path]:
        """The run's own pictures that a model's card can show."""
        return {name: self.path / name for name in PICTURES if "/" not in name and (self.path / name).is_file()}

    def tidy(self, steps: Iterable[int]) -> None:
        """Remove the models in best/ of other steps than ``steps``, and what a killed process left half written."""
        kept = {self.best(step) for step in steps}
        of_best = [path for path in (self.path / "best").glob("*") if _BEST.fullmatch(path.name)]
        for folder in [*of_best, *left_aside(self.model)]:
            if folder.is_dir() and not folder.is_symlink() and folder not in kept:
                shutil.rmtree(folder)
        for file in files_left_aside(self.path, _FILES):
            file.unlink()


def _empty(folder: Path) -> bool:
    return all(path.name == LOCK_FILE for path in folder.iterdir())


def _first(path: Path, held: contextlib.ExitStack) -> tuple[Path, str | None] | None:
    """The folder at ``path``, made and locked by this process; None: someone else was first."""
    try:
        path.mkdir(parents=True)
        return path, held.enter_context(locked(path))
    except (FileExistsError, InputError):  # an InputError: one that goes on with the newest took it at once
        return None


def _numbered(dataset: str) -> Iterable[Path]:
    stem = Path("runs") / (Path(dataset).stem or Path(dataset).resolve().stem)
    return (stem if n == 1 else Path(f"{stem}-{n}") for n in count(1))
