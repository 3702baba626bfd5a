"""Which precision a run trains in where it is left to be measured."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from timm_jem.errors import one_line
from timm_jem.model import JEM
from timm_jem.modes import frozen, in_eval_mode
from timm_jem.noise import uniform_noise
from timm_jem.training.settings import TrainConfig

__all__ = ["faster_precision", "measured_precision", "precision_of"]

# A pass takes about so long in fp32, which is little where bf16 is emulated; small networks get more rounds.
PASS_SECONDS = 0.02
SECONDS, ROUNDS = 0.2, 3
CLEAR_GAIN = 1.15


def faster_precision(fp32: float, bf16: float) -> str:
    """The one whose pass takes clearly less, "bf16" or "no"; "no" in doubt. Arguments are seconds."""
    return "bf16" if fp32 >= CLEAR_GAIN * bf16 else "no"


def precision_of(device: torch.device) -> tuple[str, str]:
    """The precision for ``mixed_precision`` "auto" on a device other than a CPU, and the reason in words."""
    if device.type != "cuda":
        return "no", f"bf16 is not measured on {device.type}"
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16", "this GPU computes in it") if has else ("no", "this GPU does not compute in bf16")


def measured_precision(jem: JEM, train: TrainConfig) -> tuple[str, str]:
    """The precision for ``mixed_precision`` "auto" on a CPU, and the reason in words.

    What bf16 brings is as much the network's as the processor's: on a CPU with AVX-512 bf16 it makes a WRN-16-2 twice as
    fast, and a MobileNetV3 three times as slow. So it is the run's own network whose passes are timed, those that it makes
    most: forward and the gradient with respect to images, or to weights where no chains run. Modes, gradients, statistics and
    global randomness stay as they are.

    Args:
        jem: the run's, as built, in eager mode.
        train: its settings.
    """
    u = uniform_noise((train.batch_size, *jem.input_size), generator=torch.Generator().manual_seed(0))
    x = jem.normalize(u).requires_grad_()
    chains = train.objective.needs_chains
    with frozen(jem) if chains else in_eval_mode(jem.modules()):
        _seconds(jem, x[:1], bf16=False)  # warms up
        alone = _seconds(jem, x[:1], bf16=False, clock=time.thread_time)  # whatever else this machine does
        images = max(1, min(len(x), int(PASS_SECONDS / max(alone, 1e-6))))  # some clocks are coarse
        try:
            fp32, bf16 = _pass_seconds(jem, x[:images])
        except RuntimeError as error:
            return "no", f"bf16 fails with this network ({one_line(error)})"
    times = f"{fp32 / bf16:.2f} times as fast as fp32 here, by passes of {images} image{'s' * (images > 1)}"
    chosen = faster_precision(fp32, bf16)
    return chosen, f"it is {times}" if chosen == "bf16" else f"bf16 is {times}"


def _pass_seconds(jem: JEM, x: Tensor) -> tuple[float, float]:
    """Seconds of a pass in fp32 and in bf16, taken by turns: medians."""
    rounds, start = [], time.perf_counter()
    while len(rounds) <= ROUNDS or time.perf_counter() < start + SECONDS:
        rounds.append([_seconds(jem, x, bf16=bf16) for bf16 in (False, True)])
    fp32, bf16 = zip(*rounds[1:], strict=True)  # the first warms up
    return statistics.median(fp32), statistics.median(bf16)


def _seconds(jem: JEM, x: Tensor, *, bf16: bool, clock: Callable[[], float] = time.perf_counter) -> float:
    """A forward and a backward pass: to the images where no weight needs a gradient, else to the weights."""
    of = [parameter for parameter in jem.parameters() if parameter.requires_grad] or [x]
    start = clock()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        logits = jem(x)
    torch.autograd.grad(logits.float().sum(), of, allow_unused=True)
    return clock() - start
