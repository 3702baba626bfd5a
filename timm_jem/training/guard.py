"""The divergence guard: when joint training breaks, and what it does then.

Energy-based training by short chains can break down within a few iterations: the released codes test ``|loss| > 1e8``,
which NaN passes, and are restarted by hand with another seed and a lower learning rate. Here the signals are gathered on
the device and read once every few iterations, and a run that broke goes on from its last good snapshot by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole
from timm_jem.training.remedy import Remedy
from timm_jem.training.state import copy_tree

__all__ = ["DivergenceGuard", "GuardConfig", "Snapshot"]


def _ladder() -> list[Remedy]:
    return [
        Remedy(lr=0.5),
        Remedy(lr=0.5, energy_l2=0.1),
        Remedy(lr=0.5, num_steps=1.5),
        Remedy(lr=0.3, step_size=0.3),
        Remedy(lr=0.1, step_size=0.1),
    ]


@dataclass(frozen=True)
class GuardConfig:
    """When training counts as broken, and the ladder of remedies.

    Attributes:
        check_every: optimiser steps between looks; the device is waited for only then. A look judges the medians of the
            steps since the last one, and any value that is not finite.
        snapshot_every: optimiser steps between snapshots in host memory, to go back to.
        max_rollbacks: after so many the run stops, with the last good model.
        runaway_factor: broken where |gap|, |energy| or cross-entropy is above ``runaway_floor`` nats plus this many times its
            own recent scale (mean over about the last ten looks).
        runaway_floor: nats; see there.
        max_energy: broken where |energy| is above this, whatever its past: float32 logits have no digits left for p(y|x).
        max_chain_rms: broken where chains leave the pixel range [-1, 1] by so much.
        min_chain_spread: broken where all chains are one image to within this, pixels.
        min_chain_moved: broken where an iteration moves chains by less, pixels: where they are stuck in a flat energy.
        max_saturated: broken where so much more of the chains than of the data lies at the pixel clamp.
        ladder: remedies, one more after each rollback; the last one repeats. All are this package's choice.

    Raises:
        InputError: a value outside its range.
    """

    check_every: int = 10
    snapshot_every: int = 100
    max_rollbacks: int = 6
    runaway_factor: float = 10.0
    runaway_floor: float = 10.0
    max_energy: float = 1e6
    max_chain_rms: float = 3.0
    min_chain_spread: float = 1e-3
    min_chain_moved: float = 1e-6
    max_saturated: float = 0.5
    ladder: list[Remedy] = field(default_factory=_ladder)

    def __post_init__(self) -> None:
        for name in ("check_every", "snapshot_every"):
            check_whole(f"guard {name}", getattr(self, name), 1)
        check_whole("guard max_rollbacks", self.max_rollbacks, 0)
        for f in fields(self):
            if f.type is float:
                check_number(f"guard {f.name}", getattr(self, f.name), above=0)
        if self.snapshot_every % self.check_every:
            raise InputError(
                f"guard snapshot_every {self.snapshot_every} is not a multiple of check_every {self.check_every}: make it one"
            )
        if not self.ladder and self.max_rollbacks:
            raise InputError("guard ladder is empty: give at least one remedy, or max_rollbacks 0")


@dataclass
class Snapshot:
    """A state to go back to, the recent scales of then, and whether training broke once after it."""

    step: int
    state: Any
    scales: dict[str, float]
    broke: bool = False


class DivergenceGuard:
    """Watches the terms of each iteration, and keeps snapshots to go back to.

    :meth:`observe` costs a few scalars on the device; :meth:`problem` reads them, and is the same in every process.

    Args:
        config: see :class:`GuardConfig`.
        accelerator: its processes are judged together.
        num_classes: for what the cross-entropy of a lost classifier is.
        watched: names of the terms that must not run away from their own recent scale.
        of: what makes up the terms, as JSON data: scales of a run with other ones are no past of these.
    """

    def __init__(
        self, config: GuardConfig, accelerator: Accelerator, num_classes: int, watched: Sequence[str], *, of: Any = None
    ) -> None:
        self.config, self.accelerator, self.watched, self.of = config, accelerator, watched, of
        self.chance = math.log(num_classes)
        self.window: list[tuple[tuple[str, ...], Tensor]] = []
        self.scales: dict[str, float] = {}
        self.snapshots: list[Snapshot] = []  # oldest first

    def observe(self, terms: Mapping[str, Tensor]) -> None:
        """Note the scalars of one iteration; nothing waits for the device."""
        names = tuple(sorted(terms))
        self.window.append((names, torch.stack([terms[name].detach().float().reshape(()) for name in names])))

    def problem(self, *, early: bool = False) -> str | None:
        """What is wrong with the iterations noted since the last :meth:`close`, in words; or None. Waits for the device.

        Args:
            early: there are fewer iterations than a look takes: only what is not finite counts.
        """
        if not self.window:
            return None
        tables = self._tables()
        for names, values in tables:
            finite = np.isfinite(values)
            if not finite.all():
                row = int(np.argmin(finite.all(axis=1)))
                broken = [name for name, ok in zip(names, finite[row], strict=True) if not ok]
                return f"{', '.join(broken)} not finite"
        if early:
            return None
        config, medians = self.config, self._medians(tables)
        for name in self.watched:
            if name not in medians:
                continue
            limit, past = config.max_energy, f", above guard.max_energy {config.max_energy:g}"
            recent = self.scales.get(name)  # before the first look nothing is known
            if recent is not None and (own := config.runaway_floor + config.runaway_factor * recent) < limit:
                limit, past = own, f" after {recent:.3g}"
            if medians[name] > limit:
                return f"|{name}| ran away: {medians[name]:.3g}{past}"
        best = self.scales.get("best_ce", math.inf)
        if "ce" in self.watched and medians.get("ce", 0.0) > 0.9 * self.chance and best < 0.5 * self.chance:
            return f"the classifier is lost: cross-entropy {medians['ce']:.3g} after {best:.3g}"
        if medians.get("chain_rms", 0.0) > config.max_chain_rms:
            return f"chains left the pixel range: root mean square {medians['chain_rms']:.3g}"
        if medians.get("chain_saturated", 0.0) > config.max_saturated:
            return f"chains saturate: {medians['chain_saturated']:.0%} more of them than of the data lies at the pixel clamp"
        if medians.get("chain_spread", math.inf) < config.min_chain_spread:
            return f"all chains are one image: chain_spread {medians['chain_spread']:.3g}"
        if medians.get("chain_moved", math.inf) < config.min_chain_moved:
            return f"chains are stuck: chain_moved {medians['chain_moved']:.3g}"
        return None

    def close(self) -> None:
        """Take the iterations noted since the last time for good ones: they become the recent scale."""
        medians = self._medians(self._tables())
        for name in self.watched:
            if name in medians:
                self.scales[name] = 0.9 * self.scales.get(name, medians[name]) + 0.1 * medians[name]
        if "ce" in medians:
            self.scales["best_ce"] = min(self.scales.get("best_ce", math.inf), medians["ce"])
        self.window = []

    def keep(self, step: int, state: Any, *, alone: bool = False) -> None:
        """Keep a copy of a good state; the one before it is kept as well, unless ``alone``."""
        kept = [] if alone else [snapshot for snapshot in self.snapshots if snapshot.step != step][-1:]
        self.snapshots = [*kept, Snapshot(step, copy_tree(state), dict(self.scales))]

    @property
    def cornered(self) -> bool:
        """Whether training broke already after the only snapshot that there is."""
        return len(self.snapshots) == 1 and self.snapshots[0].broke

    def last_good(self) -> tuple[int, Any]:
        """Step and state to go back to, with the scales of then: the newest snapshot, but where training already broke once
        after that one and there is an older, the older: what it had learned by then may have been the cause.

        Raises:
            InputError: nothing was kept.
        """
        if not self.snapshots:
            raise InputError("training broke, and there is no snapshot to go back to: take one before the first step")
        if self.snapshots[-1].broke and len(self.snapshots) > 1:
            self.snapshots.pop()
        snapshot = self.snapshots[-1]
        snapshot.broke = True
        self.window, self.scales = [], dict(snapshot.scales)
        return snapshot.step, snapshot.state

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs, but for the snapshots, which are whole states of a run."""
        return {"window": list(self.window), "scales": self.scales, "of": self.of}

    def load_state_dict(self, state: dict[str, Any], snapshots: Sequence[Snapshot] = ()) -> None:
        """Restore ``state_dict`` and its snapshots; those of what was trained before are forgotten.

        Where the terms are made up of something else now, what is known of their past is forgotten as well: a loss that has
        become a harder one is not lost.
        """
        self.snapshots = list(snapshots)
        self.scales = dict(state["scales"])
        self.window = [(tuple(names), values.to(self.accelerator.device)) for names, values in state["window"]]
        if state.get("of") != self.of:
            self.scales, self.window = {}, []
            for snapshot in self.snapshots:
                snapshot.scales = {}

    def _tables(self) -> list[tuple[tuple[str, ...], np.ndarray]]:
        """Names of terms, and their values on the host, shape (iterations · processes, terms): a table for each set of terms
        that iterations had."""
        rows: dict[tuple[str, ...], list[Tensor]] = {}
        for names, values in self.window:
            rows.setdefault(names, []).append(values)
        return [(names, self.accelerator.gather(torch.stack(values)).double().cpu().numpy()) for names, values in rows.items()]

    def _medians(self, tables: Sequence[tuple[Sequence[str], np.ndarray]]) -> dict[str, float]:
        """Of the watched |terms|, and of the others as they are: a single wild iteration is no divergence."""
        columns: dict[str, list[np.ndarray]] = {}
        for names, values in tables:
            for name, column in zip(names, values.T, strict=True):
                columns.setdefault(name, []).append(np.abs(column) if name in self.watched else column)
        return {name: float(np.median(np.concatenate(parts))) for name, parts in columns.items()}
