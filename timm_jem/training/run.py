"""A run: what advances, breaks, goes back and goes on."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_jem.errors import InputError, check_whole, one_line
from timm_jem.training.batches import Batches
from timm_jem.training.checkpoints import Checkpoints, damage, is_current, rank_files, shared_file
from timm_jem.training.guard import DivergenceGuard, Snapshot
from timm_jem.training.learner import Learner
from timm_jem.training.remedy import Remedy
from timm_jem.training.state import copy_tree, load_tree

__all__ = ["Rollback", "Run", "Unread"]


class Unread(InputError):
    """Images of the next step can't be read; the run is as it was after the last one, and can be saved."""


@dataclass(frozen=True)
class Rollback:
    """Training broke at ``step``, and is back at ``to_step``.

    Attributes:
        reason: what broke, in words.
        remedy: what is changed from here on; None: nothing more is tried.
    """

    step: int
    to_step: int
    reason: str
    remedy: Remedy | None


class Run:
    """Learner, stream of batches and guard as one. All processes call its methods together.

    Args:
        learner: what trains.
        stream: its batches; with ``state_dict`` and ``load_state_dict``, so that the run can go back.
        guard: judges training; its settings say how often the run goes back, and with which remedies.
        checkpoints: where the run is saved.
        grad_accum: batches of an optimiser step.
        seed: of the chains and the noise after a rollback.

    Attributes:
        rollbacks: those that training went on from, oldest first, as JSON data.
    """

    def __init__(
        self,
        learner: Learner,
        stream: Batches,
        guard: DivergenceGuard,
        checkpoints: Checkpoints,
        *,
        grad_accum: int = 1,
        seed: int = 0,
    ) -> None:
        check_whole("grad_accum", grad_accum, 1)
        self.learner, self.stream, self.guard, self.checkpoints = learner, stream, guard, checkpoints
        self.grad_accum, self.seed = grad_accum, seed
        self.rollbacks: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.learner.step

    def advance(self) -> dict[str, Tensor]:
        """One optimiser step; its terms, detached scalars on the device.

        Raises:
            Unread: the stream raised an InputError.
        """
        place, randomness = self.stream.state_dict(), self.learner.generator.get_state()
        try:
            batches = [next(self.stream) for _ in range(self.grad_accum)]
        except InputError as error:
            self.stream.load_state_dict(place)  # some of the step's batches may have been taken
            self.learner.generator.set_state(randomness)
            raise Unread(str(error)) from error
        terms = self.learner.iterate(batches)
        self.guard.observe(terms)
        return terms

    def judge(self, *, whole: bool) -> Rollback | None:
        """Go back to the last good snapshot where the steps since the last whole look broke; None: all is well.

        Where they broke already after the only snapshot that there is, the checkpoint before it is taken.

        Waits for the device.

        Args:
            whole: enough steps were taken for a whole look; otherwise only what is not finite counts.

        Raises:
            InputError: training broke before :meth:`snapshot` was ever called.
        """
        reason = self.guard.problem(early=not whole)
        if reason is None:
            if whole:
                self.guard.close()
            return None
        broke_at, remedies = self.step, self.learner.remedy
        number, config = len(self.rollbacks), self.guard.config
        if number < config.max_rollbacks and self.guard.cornered:
            self._take_older_checkpoint()
        step, state = self.guard.last_good()
        self._restore(state)
        if number >= config.max_rollbacks:  # more, where a resumed run is allowed fewer
            return Rollback(broke_at, step, reason, None)
        remedy = config.ladder[min(number, len(config.ladder) - 1)]
        if (heeded := getattr(self.learner.method, "heeds", None)) is not None:
            remedy = remedy.only(heeded)
        self.learner.remedy = remedies
        self.learner.apply(remedy, self._process_seed() + 1_000_000 * (number + 1))
        self.rollbacks.append({"step": broke_at, "to_step": step, "reason": reason, "remedy": str(remedy)})
        return Rollback(broke_at, step, reason, remedy)

    def snapshot(self, *, alone: bool = False) -> None:
        """Keep the present state to go back to, and the one before it as well, unless ``alone``."""
        self.guard.keep(self.step, self._state(), alone=alone)

    def save(self, extra: Mapping[str, Any], *, snapshots: bool = True, interim: bool = False) -> Path:
        """Write a checkpoint, whole or not at all, with ``extra`` of this process and the snapshots of earlier steps: the
        steps since the last look may be broken, and a run that goes on from here goes back as this one would.

        Args:
            extra: JSON data and tensors.
            snapshots: False: without these, each of which is as large as a checkpoint.
            interim: see :meth:`Checkpoints.save`.

        Raises:
            InputError: it can't be written; earlier ones are as they were.
        """
        state, shared = self._parts(self._state())
        of_process, of_all = [], []
        for kept in self.guard.snapshots if snapshots else ():
            part, common = (None, None) if kept.step == self.step else self._parts(kept.state)
            of_process.append({"step": kept.step, "state": part, "scales": kept.scales, "broke": kept.broke})
            of_all.append(common)
        own = {"state": state, "guard": self.guard.state_dict(), "snapshots": of_process, "rollbacks": self.rollbacks}
        return self.checkpoints.save(self.step, own | {"extra": dict(extra)}, shared | {"snapshots": of_all}, interim=interim)

    def resume(
        self, checkpoint: Path | None = None, accept: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Go on from a checkpoint, also one of another number of processes or kind of device.

        Args:
            checkpoint: None: the newest whole one.
            accept: is given the ``extra`` that was saved before anything is changed, and raises where the run can't go on.

        Returns:
            The ``extra`` that was saved with it; None: there is no whole checkpoint, and nothing has changed.

        Raises:
            InputError: ``checkpoint`` is damaged, or one of other settings or another version.
        """
        accelerator = self.learner.accelerator
        if checkpoint is not None and (reason := damage(checkpoint)):
            raise InputError(f"checkpoint {checkpoint} can't be resumed: {reason}; give the run's folder instead")
        if checkpoint is None:
            checkpoint, notes = self.checkpoints.newest()
            for note in notes:
                accelerator.print(note)
        if checkpoint is None:
            return None
        files, world = _rank_files(checkpoint), accelerator.num_processes
        with _as_saved(checkpoint):
            saved = _read(checkpoint, files, accelerator.process_index if len(files) == world else 0)
            if accept is not None:
                accept(saved["extra"])
            if len(files) == world and self._of_this_device(saved):
                self._restore(saved["state"])
            else:
                self._deal_out(saved, files)
                before = f"with {len(files)} process{'es' * (len(files) > 1)} and goes on with {world}"
                if len(files) == world:
                    before = f"on another kind of device and goes on on {accelerator.device.type}"
                accelerator.print(
                    f"{checkpoint} was written {before}: chains are dealt out anew, their randomness starts afresh, and a "
                    "streamed data set goes on about where it was"
                )
            self.guard.load_state_dict(saved["guard"], _snapshots(saved))
            self.rollbacks = list(saved["rollbacks"])
        self.checkpoints.forget_after(self.step)
        self.checkpoints.tidy(checkpoint)
        accelerator.print(f"goes on from {checkpoint}, step {self.step}")
        return saved["extra"]

    def _of_this_device(self, saved: dict[str, Any]) -> bool:
        """Whether its generators go on in these: each kind of device has its own."""
        return len(saved["state"]["learner"]["generator"]) == len(self.learner.generator.get_state())

    def _deal_out(self, saved: dict[str, Any], files: list[Path]) -> None:
        """Restore what another number of processes, or another kind of device, wrote; the states in ``saved`` become those of
        this one."""

        def restore(of: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
            state = of(saved)
            self.learner.load_state_dicts(
                len(files),
                lambda i: of(load_tree(files[i]) if i else saved)["learner"],
                self._process_seed() + 7919 * state["learner"]["step"],
            )
            self.stream.load_state_dict(state["stream"], old_world=len(files))
            return self._state()

        for number, kept in enumerate(saved.get("snapshots", [])):
            if kept["state"] is not None:
                kept["state"] = copy_tree(restore(lambda tree, number=number: tree["snapshots"][number]["state"]))
        saved["state"] = restore(lambda tree: tree["state"])

    def _take_older_checkpoint(self) -> None:
        """Keep the checkpoint before the only snapshot in its place, where there is one of as many such processes."""
        checkpoint, _ = self.checkpoints.newest(before=self.guard.snapshots[0].step)
        if checkpoint is None or not is_current(checkpoint):
            return
        files, accelerator = rank_files(checkpoint), self.learner.accelerator
        if len(files) != accelerator.num_processes:
            return
        saved = _read(checkpoint, files, accelerator.process_index)
        if not self._of_this_device(saved):
            return
        step = saved["state"]["learner"]["step"]
        self.guard.load_state_dict(saved["guard"], _snapshots(saved))
        self.checkpoints.forget_after(step)  # where training breaks

    def _state(self) -> dict[str, Any]:
        """What training goes on from after a rollback."""
        return {"learner": self.learner.state_dict(), "stream": self.stream.state_dict()}

    def _parts(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is this process's own of a :meth:`_state`, and what all have in common."""
        own = {name: part for name, part in state["learner"].items() if name not in self.learner.shared}
        return state | {"learner": own}, {name: state["learner"][name] for name in self.learner.shared}

    def _restore(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.stream.load_state_dict(state["stream"])

    def _process_seed(self) -> int:
        return self.seed + 1000 * self.learner.accelerator.process_index


@contextlib.contextmanager
def _as_saved(checkpoint: Path) -> Iterator[None]:
    """Sums in a manifest tell damage, and not whether what was written is a run's."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"checkpoint {checkpoint} doesn't hold what a run saves ({reason}): give another") from error


def _rank_files(checkpoint: Path) -> list[Path]:
    if not is_current(checkpoint):
        raise InputError(f"checkpoint {checkpoint} is of another version of timm_jem: resume it with that one")
    return rank_files(checkpoint)


def _read(checkpoint: Path, files: list[Path], rank: int) -> dict[str, Any]:
    """What a process has in a whole checkpoint, with what all have in common."""
    saved, shared = load_tree(files[rank]), shared_file(checkpoint)
    if not isinstance(saved, dict) or set(saved) - {"snapshots"} != {"state", "guard", "rollbacks", "extra"}:
        raise InputError(f"checkpoint {checkpoint} is none of a run: give another")
    if shared is not None:
        common = load_tree(shared)
        for kept, part in zip(saved.get("snapshots", []), common.pop("snapshots", []), strict=True):
            if part is not None:
                kept["state"]["learner"] |= part
        saved["state"]["learner"] |= common
    if "model" not in saved["state"]["learner"]:
        raise InputError(f"checkpoint {checkpoint} has no weights: its manifest was changed; give another")
    return saved


def _snapshots(saved: dict[str, Any]) -> list[Snapshot]:
    """Those that a checkpoint was saved with, oldest first; its own state, where it was saved with none."""
    step, scales = saved["state"]["learner"]["step"], dict(saved["guard"]["scales"])
    kept = [Snapshot(**one) for one in saved.get("snapshots", [])] or [Snapshot(step, None, scales)]
    for snapshot in kept:
        if snapshot.state is None:
            snapshot.state = copy_tree(saved["state"])
    return kept
