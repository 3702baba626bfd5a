"""What a run tells people: metrics, trackers, pictures and the best models so far."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors import SafetensorError

from timm_jem.data.identity import changed_data
from timm_jem.errors import InputError, check_number, check_whole, one_line
from timm_jem.evaluation import image_grid
from timm_jem.hub.local_paths import without_local_paths
from timm_jem.model import JEM
from timm_jem.progress import tqdm
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.training.parsing import joined
from timm_jem.training.resume import differences, refuse_changes
from timm_jem.training.run import Rollback
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import Settings

__all__ = ["Record"]

WAITS = (1.0, 5.0, 15.0)  # seconds between tries to write what would be lost otherwise


class Record:
    """A run's words and pictures, and the little that it must remember for them. The main process alone writes.

    Args:
        folder: where they go.
        accelerator: tells which process this is, and has the trackers.
        settings: the run's.
        command: flags that repeat the run.
        data: what :func:`timm_jem.data.identity.data_identity` says of its data; None: it isn't known.
        called: settings of it that were told by other names.

    Attributes:
        best: [validation accuracy, step] of the models in best/, best first.
        seconds: of training so far, without pictures and validation.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        settings: Settings,
        command: Sequence[str],
        data: Mapping[str, Any] | None = None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.settings, self.command = folder, accelerator, settings, list(command)
        self.data, self.called = data, called
        self.best: list[list[float]] = []
        self.seconds = 0.0
        self._metrics_bytes = 0
        self._owed = b""
        self._since = time.perf_counter()

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def open(self, step: int) -> None:
        """Make the folder this run's at ``step``: settings written, metrics cut back to there, leftovers removed."""
        if self.main:
            self.folder.tidy(int(step) for _, step in self.best)
            self.folder.summary_file.unlink(missing_ok=True)  # from here on, pictures may be of other weights than model/
            self.write_settings()
            self._metrics = self.folder.metrics_file.open("ab", buffering=0)
            self._metrics.truncate(min(self._metrics_bytes, self._metrics.tell()))  # what came later comes again
            self._metrics.seek(0, os.SEEK_END)
        if self.settings.train.trackers:
            self.accelerator.project_configuration.logging_dir = str(self.folder)
            self.accelerator.init_trackers(
                "timm_jem",
                config=_flat(without_local_paths(self.settings.sections())),  # which may be seen on the web
                init_kwargs={"wandb": {"name": self.folder.path.name}, "trackio": {"name": self.folder.path.name}},
            )
        desc = "training" if self.folder.part_of is None else "classifier"
        self._bar = tqdm(total=self.settings.train.steps, initial=step, desc=desc, unit="it")
        self._since = time.perf_counter()

    def write_settings(self) -> None:
        """config.yaml, by which the run goes on; :meth:`open` does so as well."""
        if self.main:
            self.folder.write_text(self.folder.config_file, f"# {self._machine()}\n{self.settings.as_yaml()}")

    def advanced(self) -> None:
        """One more step is done."""
        self._bar.update()

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.main:
            self._bar.write(line)

    def log(self, step: int, values: Mapping[str, Any], lr: float | None = None) -> None:
        """A line of metrics.jsonl; its numbers go to the trackers as well. Tensors are each process's own, shape (): all
        processes have the same names, and the line has their means."""
        if tensors := {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}:
            means = self.accelerator.reduce(torch.stack([value.float() for value in tensors.values()]), "mean")
            values = {**values, **dict(zip(tensors, means.tolist(), strict=True))}
        if not self.main:
            return
        line = {"step": step, **({} if lr is None else {"lr": lr}), **values}
        self._append((json.dumps(line) + "\n").encode())
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=step)
        if shown := {name: f"{values[name]:.3g}" for name in ("loss", "ce", "gap", "gap_xy") if name in values}:
            self._bar.set_postfix(shown)

    def rollback(self, event: Rollback) -> None:
        """Training went back: say so, and forget the models of steps that come again."""
        self.best = [entry for entry in self.best if entry[1] <= event.to_step]
        if self.main:
            self.folder.tidy(int(step) for _, step in self.best)
        if event.remedy is None:
            return
        self._bar.n = event.to_step
        self._bar.refresh()
        self.say(f"step {event.step}: {event.reason}; back to step {event.to_step} with {event.remedy}, other chains")
        told = {"to_step": event.to_step, "reason": event.reason, "remedy": str(event.remedy)}
        self.log(event.step, {"event": "rollback", **told})

    def picture(self, step: int, name: str, picture: Image.Image, *, tracked: bool = True) -> None:
        """A picture in the folder and, if ``tracked``, with the trackers; training goes on where it can't be written."""
        try:
            self.folder.write_picture(name, picture)
        except OSError as error:
            self.say(f"{self.folder.path / name} can't be written ({one_line(error)}) and is left out")
        for tracker in self.accelerator.trackers if tracked else ():
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.split(".")[0].split("_")[0]: np.asarray(picture)[None]}, step, **layout)

    def samples(self, step: int, jem: JEM, name: str) -> None:
        """Fresh chains, none selected: ten of each of the first 20 classes, a row a class.

        Picture k, counted from 0 along the rows, is ``jem.sample(y=k // 10, seeds=[k])``. Every process takes part where
        weights are sharded, otherwise the main one alone.
        """
        classes = min(jem.num_classes, 20)
        y = torch.arange(classes).repeat_interleave(10)
        # No more memory than a step of training takes.
        x = jem.sample(y=y, seeds=range(len(y)), batch_size=self.settings.train.batch_size)
        if self.main:
            self.picture(step, name, image_grid(jem.denormalize(x), 10, (jem.class_names or ())[:classes]))

    def chains(self, step: int, buffer: ReplayBuffer | None) -> None:
        """A hundred chains of the replay buffer, evenly from all; with ``data.starts`` under a name that nothing publishes, and
        not for the trackers."""
        if self.main and buffer is not None:
            own = self.settings.data.starts is None  # else they may show images of others
            slots = torch.linspace(0, len(buffer) - 1, 100).long() if len(buffer) > 100 else slice(None)
            self.picture(step, "buffer.png" if own else "chains.png", image_grid(buffer.chains[slots], 10), tracked=own)

    def keep_best(self, step: int, accuracy: float, model: Callable[[], JEM]) -> None:
        """Note a validation: if it is among the ``train.best_k`` best so far, ``model`` is called and what it gives is saved,
        and one that no longer is among them is removed.

        Where the disk refuses the model all stays as it was, a line says so, and training goes on.
        """
        entry = [accuracy, step]
        best = sorted([*self.best, entry], key=lambda entry: (-entry[0], entry[1]))[: self.settings.train.best_k]
        if entry not in best:
            return
        jem, refused = model(), None
        if self.main:
            try:
                self.patiently(lambda: jem.save_pretrained(self.folder.best(step), replay_buffer=False))
            except (InputError, OSError) as error:
                if not _is_disks(error):
                    raise
                refused = str(error)
        (refused,) = broadcast_object_list([refused])
        if refused is not None:
            return self.say(f"{refused}; training goes on")
        self.best = best
        if self.main:
            self.folder.tidy(int(step) for _, step in best)

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Time within the context is none of training's."""
        self._count()
        yield
        self._since = time.perf_counter()

    def close(self) -> None:
        """The last step is done, or the last that there will be; to close it again changes nothing."""
        self._count()
        self._bar.close()
        if self.main and not self._metrics.closed:
            self._append()
            self._metrics.close()

    def patiently(self, write: Callable[[], Any]) -> Any:
        """What ``write`` returns; where the disk refuses, a few more tries, and a line for each.

        Raises:
            InputError, OSError: of the last try, or what isn't the disk's.
        """
        for wait in WAITS:
            try:
                return write()
            except (InputError, OSError) as error:
                if not _is_disks(error):
                    raise
                self.say(f"{one_line(error)}; trying again in {wait:g} s")
            time.sleep(wait)
        return write()

    def _append(self, line: bytes = b"") -> None:
        """Add to the metrics what they lack; what a full disk doesn't take waits for the next time."""
        first, end = not self._owed, self._metrics.tell()
        self._owed += line
        try:
            written = 0
            while written < len(self._owed):
                written += self._metrics.write(self._owed[written:])
            self._owed = b""
        except OSError as error:
            self._metrics.truncate(end)  # whole lines only
            self._metrics.seek(end)
            if first:
                self.say(f"{self.folder.metrics_file} can't be written ({one_line(error)}): its lines wait, training goes on")

    def _machine(self) -> str:
        """What settings leave to how a run is launched."""
        world, kind = self.accelerator.num_processes, self.accelerator.device.type
        return f"{world} process{'es' * (world > 1)} on {kind}, precision {self.accelerator.mixed_precision}"

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the record; metrics so far are on disk when this returns."""
        self._count()
        if self.main:
            self._append()
            os.fsync(self._metrics.fileno())
        return {
            "best": self.best,
            "seconds": self.seconds,
            "metrics_bytes": self._metrics.tell() if self.main else 0,
            "sections": self.settings.sections(),
            "command": self.command,
            "push_to": self.settings.hub.push_to,
            "data": self.data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the record of a checkpoint, and say which settings are others now. Before :meth:`open`.

        Raises:
            InputError: a setting that the run can't take over, or other data; nothing has changed then.
        """
        refuse_changes(state["sections"], self.settings, called=self.called)
        if self.data is not None and state["data"] is not None and (how := changed_data(state["data"], self.data)):
            raise InputError(
                f"{self.settings.data.dataset} is not the data of this run ({how}), and test images could move into training: "
                "give the same data, in whatever place, or start another run; recipes/evaluate.py measures on any"
            )
        check_number("the seconds so far, in the checkpoint,", state["seconds"], least=0)
        check_whole("the size of metrics.jsonl, in the checkpoint,", state["metrics_bytes"], 0)
        for accuracy, step in state["best"]:
            check_number("an accuracy in the checkpoint", accuracy)
            check_whole("the step of a model in best/, in the checkpoint,", step, 0)
        # A better one that is forgotten now may have taken a model's place since.
        there = [entry for entry in state["best"] if self.folder.best(int(entry[1])).is_dir()]
        self.best = broadcast_object_list([there])[0][: self.settings.train.best_k]
        self.seconds = state["seconds"]
        if self.command != state["command"]:
            self.command = joined(state["command"], self.command)
        if state["push_to"] is not None and self.settings.hub.push_to is None:
            self.accelerator.print(f"note: nothing will be pushed; the run was: give --hub.push_to {state['push_to']} again")
        self._metrics_bytes = broadcast_object_list([state["metrics_bytes"]])[0]
        for line in differences(state["sections"], self.settings.sections(), called=self.called):
            self.accelerator.print(f"note: {line}")


def _is_disks(error: Exception) -> bool:
    """Whether a file could not be written."""
    return isinstance(error, OSError) or isinstance(error.__cause__, (OSError, SafetensorError))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of text and numbers, as trackers take them."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
