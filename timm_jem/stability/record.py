"""What became of each run, as stability.json keeps it from one call to the next."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_jem.errors import InputError, one_line
from timm_jem.evaluation.strict_json import dumps, fits, restored
from timm_jem.files import replaced_file
from timm_jem.stability.curves import Curves
from timm_jem.stability.results import read_result
from timm_jem.training.resume import differences
from timm_jem.training.run_folder import RunFolder

__all__ = ["Record", "SeedRun", "slug"]


def slug(name: str) -> str:
    """The name of a variant's folder."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.").lower()


def _common(these: Any, others: Any) -> Any:
    """Settings that are in ``others`` as well: an earlier version had fewer."""
    if not (isinstance(these, dict) and isinstance(others, dict)):
        return these
    return {key: _common(value, others[key]) for key, value in these.items() if key in others}


@dataclass
class SeedRun:
    """One seed of a variant."""

    variant: str
    seed: int
    folder: Path
    flags: list[str]

    @property
    def command(self) -> list[str]:
        return [*self.flags, "--output_dir", str(self.folder), "--train.seed", str(self.seed), "--resume", "auto"]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def key(self) -> str:
        """Its name in stability.json."""
        return f"{self.folder.parent.name}/{self.folder.name}"


class Record:
    """stability.json: the flags and figures of each variant, and of each run its figures and every crash it ever had.

    Args:
        folder: where it is, with the runs; need not be there yet.

    Attributes:
        data: the JSON data.
        curves: of each run noted so far, by its key.

    Raises:
        InputError: an earlier one can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "stability.json"
        self.curves: dict[str, Curves] = {}
        self.data: dict[str, Any] = {"variants": {}, "runs": {}}
        self._flags: dict[str, list[str]] = {}
        if self.path.is_file():
            try:
                self.data = restored(json.loads(self.path.read_text(encoding="utf-8")))
                self._flags = {name: variant["flags"] for name, variant in self.data["variants"].items()}
                crashes = {key: run.get("crashes", []) for key, run in self.data["runs"].items()}
                if not fits(self._flags, dict[str, list[str]]) or not fits(crashes, dict[str, list[str]]):
                    raise TypeError("flags and crashes are lists of words")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{self.path} can't be read ({one_line(error)}): give a new --output_dir") from error

    def open(self, variants: dict[str, list[str]], settings: dict[str, dict[str, Any]]) -> None:
        """Make the folder, for runs of ``variants`` with what their flags, and the files that these name, set.

        Raises:
            InputError: it holds runs with other flags or settings, or can't be made.
        """
        for name, words in variants.items():
            folder = self.folder / slug(name)
            if not any(folder.glob("seed_*/")):
                continue
            if name not in self._flags:
                raise InputError(f"{folder} holds runs whose flags are not in {self.path}: give a new --output_dir")
            if self._flags[name] != words:
                raise InputError(
                    f"{folder} holds runs with other flags ({shlex.join(self._flags[name])}): "
                    "give the same ones, or a new --output_dir"
                )
            known = _common(settings[name], before := self.data["variants"][name].get("settings", {}))
            if changed := differences(_common(before, known), known):
                raise InputError(
                    f"{folder} holds runs with other settings ({changed[0]}): give the same ones, or a new --output_dir"
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {self.folder} can't be made ({one_line(error)}): give another") from error
        for name, words in variants.items():
            self.data["variants"][name] = {
                **self.data["variants"].get(name, {}),
                "flags": words,
                "settings": settings[name],
            }

    def save(self) -> None:
        self.write("stability.json", dumps(self.data))

    def write(self, name: str, text: str) -> None:
        try:
            with replaced_file(self.folder / name) as aside:
                aside.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.folder / name} can't be written ({one_line(error)}): make room, and call again") from error

    def note(self, run: SeedRun, code: int | None = None, last_line: str = "") -> dict[str, Any]:
        """The figures of a run as its folder has them; ``code`` is the exit status of one that has just ended."""
        result = read_result(RunFolder(run.folder))
        figures, crashes = result.figures(), list(self.data["runs"].get(run.key, {}).get("crashes", []))
        if code is not None and (result.state is None or (result.state == "finished" and code != 0)):
            how = f"killed by signal {-code}: " if code < 0 else "no summary.json: " if code == 0 else ""
            crashes.append(f"{how}{last_line}")
            figures["state"] = figures["state"] or "crashed"
        self.curves[run.key] = result.curves
        self.data["runs"][run.key] = {"variant": run.variant, "seed": run.seed, **figures, "crashes": crashes}
        return self.data["runs"][run.key]

    def ended(self, run: SeedRun, code: int, last_line: str) -> str:
        """Note and save what a run came to; returns it as a line to show."""
        figures = self.note(run, code, last_line)
        self.save()
        if figures["state"] == "crashed":
            return f"{run.variant}, seed {run.seed}: crashed, {figures['crashes'][-1]}; see {run.log}"
        number = len(figures["rollbacks"]) + len(figures["classifier_rollbacks"])
        return f"{run.variant}, seed {run.seed}: {figures['state']}, {number} rollback{'s' * (number != 1)}"
