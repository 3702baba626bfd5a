"""Where the time of an iteration goes: PyTorch's profiler, summed by parts of the iteration and kinds of operations."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from timm_jem.errors import InputError
from timm_jem.speed.iteration import iteration
from timm_jem.training import Run

__all__ = ["KINDS", "Profile", "profile"]

# Each with what the names of its operations begin with after "aten::"; the first that fits counts.
KINDS = {
    (_TO_INPUT := "convolution, backward to its input"): (),
    (_TO_WEIGHTS := "convolution, backward, weights too"): (),
    "convolution, forward": ("conv", "_conv", "mkldnn_conv", "thnn_conv", "slow_conv", "_slow_conv"),
    "matrix products": ("addmm", "mm", "bmm", "baddbmm", "linear", "mkldnn_linear", "matmul", "_scaled_dot", "scaled_dot"),
    "normalisation": ("native_batch_norm", "native_layer_norm", "native_group_norm", "batch_norm", "layer_norm", "group_norm"),
    "activations": (
        *("silu", "leaky_relu", "relu", "prelu", "elu", "gelu", "mish", "softplus", "threshold", "sigmoid", "tanh"),
        *("hardswish", "hardsigmoid", "hardtanh"),
    ),
    "casts and copies": ("_to_copy", "copy_", "contiguous", "clone", "cat", "empty", "zero", "fill", "resize"),
    "noise": ("normal_", "uniform_", "exponential_", "randint", "random_", "bernoulli"),
    (_OTHER := "other operations"): ("",),
    (_OUTSIDE := "outside operations"): (),
}
_PARTS = ("data", "chains", "loss", "backward", "optimiser", "moving average", "guard")
_REST = "rest"


@dataclass(frozen=True)
class Profile:
    """Seconds of an iteration.

    Attributes:
        seconds: by part of the iteration and kind of operation; what the profiler itself takes is in it.
        total: of the whole, by the clock.
    """

    seconds: dict[str, dict[str, float]]
    total: float

    @property
    def parts(self) -> list[str]:
        """Those that take at least half a per cent of the whole."""
        return [part for part, kinds in self.seconds.items() if sum(kinds.values()) >= 0.005 * self.total]

    def table(self) -> str:
        """Kinds against parts, in per cent of the whole; none that is below half a per cent throughout."""
        parts, kinds = self.parts, (*KINDS, "all")
        width = max(map(len, kinds))
        rows = [f"{'% of an iteration':{width}} {' '.join(f'{part:>10}' for part in (*parts, 'all'))}"]
        for kind in kinds:
            row = [sum(self.seconds[part].values()) if kind == "all" else self.seconds[part].get(kind, 0) for part in parts]
            shares = [100 * value / self.total for value in (*row, sum(row))]
            if shares[-1] >= 0.5:
                rows.append(f"{kind:{width}} {' '.join(f'{share:10.1f}' for share in shares)}")
        return "\n".join(rows)


def profile(run: Run, rounds: int) -> Profile:
    """Some iterations of ``run``, which has been warmed up, under PyTorch's profiler.

    The profiler sees what the CPU does, operation by operation, so that this is for CPUs.

    Raises:
        InputError: a run on another device.
    """
    if run.learner.accelerator.device.type != "cpu":
        raise InputError(f"profile is for CPUs, and this is {run.learner.accelerator.device.type}: leave it out")
    learner, method = run.learner, run.learner.method
    marked = [(method, "draw", "chains"), (method, "loss", "loss"), (learner.accelerator, "backward", "backward")]
    marked += [(learner.optimizer, "step", "optimiser"), (run.guard, "observe", "guard"), (run.guard, "problem", "guard")]
    marked += [(learner.ema, "update", "moving average")] if learner.ema is not None else []
    plain, run.stream = run.stream, _Marked(run.stream)
    for thing, name, part in marked:
        setattr(thing, name, record_function(part)(getattr(thing, name)))
    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(rounds):
                with record_function(_REST):
                    iteration(run)
    finally:
        run.stream = plain
        for thing, name, _ in marked:
            delattr(thing, name)
    return _summed(profiler.events(), rounds)


class _Marked:
    """A stream, with the time that it takes marked as that of data."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __next__(self) -> Any:
        with record_function("data"):
            return next(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _summed(events: Iterable[FunctionEvent], rounds: int) -> Profile:
    seconds, total = {part: defaultdict(float) for part in (*_PARTS, _REST)}, 0.0
    for event in events:
        above = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            above.append(parent.name)
            parent = parent.cpu_parent
        if above[-1] != _REST:  # another thread's
            continue
        part = next(name for name in above if name in seconds)
        seconds[part][_kind(event)] += event.self_cpu_time_total * 1e-6 / rounds
        total += event.cpu_time_total * 1e-6 / rounds if len(above) == 1 else 0.0
    return Profile({part: dict(kinds) for part, kinds in seconds.items()}, total)


def _kind(event: FunctionEvent) -> str:
    if not event.name.startswith("aten::"):
        return _OUTSIDE
    if event.name == "aten::convolution_backward":
        _, weights, _ = event.concrete_inputs[-1]  # of which of input, weights and biases
        return _TO_WEIGHTS if weights else _TO_INPUT
    kind = _OTHER
    while kind == _OTHER and event is not None and event.name.startswith("aten::"):  # relu leaves its work to clamp_min, say
        name, event = event.name.removeprefix("aten::"), event.cpu_parent
        kind = next(kind for kind, beginnings in KINDS.items() if name.startswith(beginnings))
    return kind
