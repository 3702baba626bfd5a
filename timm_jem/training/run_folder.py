"""A run's folder: every name in it, and who may write there."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from timm_jem.errors import InputError, one_line
from timm_jem.files import replaced_file
from timm_jem.hub.card import PICTURES

__all__ = ["RunFolder"]

# With the names under which timm_jem.files.folder_aside writes them.
_BEST = re.compile(r"step_\d{8}|\.step_\d{8}-[a-z0-9_]+")
_MODEL_ASIDE = re.compile(r"\.model-[a-z0-9_]+")


class RunFolder:
    """What a run has on disk: config.yaml, metrics.jsonl, summary.json, pictures, model/, best/ and checkpoints/.

    Args:
        path: the folder, which need not be there yet.
        checkpoint: the checkpoint of it that was asked for; None: the newest.
        numbered_by: the data set after which the folder is numbered, so that :meth:`claim` may take another number.
    """

    def __init__(self, path: str | os.PathLike, checkpoint: Path | None = None, *, numbered_by: str | None = None) -> None:
        self.path, self.checkpoint, self.numbered_by = Path(path), checkpoint, numbered_by

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
            if resume != "auto" and not found.checkpoints.is_dir():
                raise InputError(f"{found} has no checkpoints: give a run's folder, such as runs/digits, or --resume auto")
            return found
        if output_dir is None:
            return cls(next(path for path in _numbered(dataset) if not path.exists()), numbered_by=dataset)
        path = Path(output_dir)
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise InputError(f"output_dir {path} holds another run or other files: give a new folder, or --resume auto")
        return cls(path)

    @classmethod
    def find(cls, output_dir: str | None, dataset: str, resume: str | None) -> "RunFolder | None":
        """The run that goes on, by the arguments of :meth:`choose`; None: there is none, or a new one is asked for."""
        if resume is None:
            return None
        if resume != "auto":
            given = Path(resume)
            of_checkpoint = given.parent.name == "checkpoints"
            return cls(given.parent.parent, given) if of_checkpoint else cls(given)
        if output_dir is not None:
            run = cls(output_dir)
            return run if run.config_file.is_file() else None
        taken = None
        for path in _numbered(dataset):
            if not path.exists():
                break
            run = cls(path)
            if run.config_file.is_file() or (path.is_dir() and not any(path.iterdir())):  # its writer was killed at once
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
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def backbone(self) -> Path:
        """What :func:`timm_jem.training.build.keep_source` leaves, where the backbone came from elsewhere."""
        return self.path / "backbone"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def samples(self, step: int) -> Path:
        return self.path / f"samples_{step:06d}.png"

    def best(self, step: int) -> Path:
        return self.path / "best" / f"step_{step:08d}"

    def claim(self) -> None:
        """Make the folder; a numbered one that someone else made meanwhile is left to them, and the next is taken.

        Raises:
            InputError: it can't be made.
        """
        try:
            if self.numbered_by is None:
                self.path.mkdir(parents=True, exist_ok=True)
                return
            for path in _numbered(self.numbered_by):
                self.path = path
                with contextlib.suppress(FileExistsError):
                    path.mkdir(parents=True)
                    return
        except OSError as error:
            raise InputError(f"output_dir {self} can't be made ({one_line(error)}): give another") from error

    def finished(self, steps: int) -> int | None:
        """How many steps a finished run has done, where that is ``steps`` at least; None: it has more to do.

        Raises:
            InputError: a run that gave up, or a summary.json that can't be read.
        """
        summary = self.summary()
        if summary is None:
            return None
        if summary.get("outcome") == "stopped":
            raise InputError(
                f"{self} has ended: {summary.get('explanation')}; without its summary.json it goes on with other settings"
            )
        done = summary.get("steps")
        if not isinstance(done, int):
            raise InputError(f"{self.summary_file} says {done!r} for its steps: remove it, and the run goes on")
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
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.summary_file} can't be read ({one_line(error)}): remove it, and the run goes on"
            ) from error
        if not isinstance(summary, dict):
            raise InputError(f"{self.summary_file} holds a {type(summary).__name__}: remove it, and the run goes on")
        return summary

    def write_json(self, file: Path, data: Any) -> None:
        with replaced_file(file) as aside:
            aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

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
        aside = [path for path in self.path.glob("*") if _MODEL_ASIDE.fullmatch(path.name)]
        for folder in [*of_best, *aside]:
            if folder.is_dir() and not folder.is_symlink() and folder not in kept:
                shutil.rmtree(folder)


def _numbered(dataset: str) -> Iterable[Path]:
    stem = Path("runs") / (Path(dataset).stem or Path(dataset).resolve().stem)
    return (stem if n == 1 else Path(f"{stem}-{n}") for n in count(1))
