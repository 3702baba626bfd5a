"""Speed of a training iteration and of evaluation, as ratios to bare network passes, measured in the same run.

    python recipes/benchmark.py
    python recipes/benchmark.py --mixed_precision bf16
    python recipes/benchmark.py --model wrn_28_10 --batch_size 64 --mixed_precision bf16 --compile reduce-overhead

The iteration is the training recipe's: augmentation apart, all of it, with guard, moving average and a log line. The bare
passes of an iteration of K SGLD steps are K times forward and input-backward of the chains, then forward and backward of
data and chains together, at the same precision and memory layout and through the same network, with nothing else: no
noise, energies, buffer, loss terms or optimiser. The plain set-up is the same iteration in fp32, NCHW and eager mode.
All out-of-distribution scores of 8-bit images are timed next to one forward and input-backward of the same images.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_jem
from timm_jem import ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.errors import check_whole
from timm_jem.evaluation.ood import ood_scores
from timm_jem.modes import frozen
from timm_jem.ood import Detector
from timm_jem.pixels import to_pixels
from timm_jem.training import Batch, DivergenceGuard, GuardConfig, Learner, MaximumLikelihood
from timm_jem.training.shell import one_line_errors

SCORED_AT_ONCE = 256


@dataclass
class BenchmarkConfig:
    """What to time.

    Attributes:
        model: timm name of the network.
        image_size: side of its RGB images.
        batch_size: images and chains in an iteration.
        num_steps: SGLD steps K.
        rounds: iterations timed, each next to its bare passes.
        mixed_precision: no or bf16.
        channels_last: memory layout.
        compile: torch.compile's mode for the backbone; None: eager.
        score_images: how many images are scored for out-of-distribution detection in a round; 0: none.
    """

    model: str = "wrn_16_2"
    image_size: int = 32
    batch_size: int = 32
    num_steps: int = 20
    rounds: int = 7
    mixed_precision: Literal["no", "bf16"] = "no"
    channels_last: bool = True
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    score_images: int = 512

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "num_steps", "rounds"):
            check_whole(name, getattr(self, name), 1)
        check_whole("score_images", self.score_images, 0)


class CopiedBytes(TorchDispatchMode):
    """Counts what is copied between devices, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and tensors[0].device.type != "cpu":
            self.bytes += tensors[0].element_size()
        elif func is torch.ops.aten.copy_.default and tensors[0].device != tensors[1].device:
            self.bytes += tensors[0].nbytes
        elif func is torch.ops.aten._to_copy.default and out.device != tensors[0].device:
            self.bytes += out.nbytes
        return out


def build(config: BenchmarkConfig, accelerator: Accelerator, *, plain: bool):
    """An iteration and its bare passes, as functions."""
    device = accelerator.device
    torch.manual_seed(0)
    shape = (3, config.image_size, config.image_size)
    jem = timm_jem.create_model(config.model, num_classes=10, input_size=shape).to(device).train()
    ema = ModelEmaV3(jem, decay=0.999)
    optimizer = create_optimizer_v2(jem, opt="adam", lr=1e-6)
    if not plain:
        if config.channels_last:
            jem = jem.to(memory_format=torch.channels_last)
            ema.module.to(memory_format=torch.channels_last)
        if config.compile is not None:
            jem.backbone.compile(mode=config.compile)
    prepared, optimizer = (jem, optimizer) if plain else accelerator.prepare(jem, optimizer)
    rng = torch.Generator(device).manual_seed(0)
    buffer = ReplayBuffer(shape, init=uniform_noise, generator=rng, device=device)
    method = MaximumLikelihood(jem, buffer, sgld=SGLDConfig(num_steps=config.num_steps), objective=ObjectiveConfig())
    learner = Learner(accelerator, prepared, jem, optimizer, None, method, generator=rng, ema=ema)
    guard = DivergenceGuard(GuardConfig(), accelerator, 10, method.watched)
    u = uniform_noise((config.batch_size, *shape), generator=rng, device=device)
    y = torch.arange(config.batch_size, device=device) % 10
    log = tempfile.TemporaryFile("w")  # noqa: SIM115

    def iteration() -> None:
        terms = learner.iterate([Batch(u, y)])
        guard.observe(terms)
        # The recipe does the rest in one of ten iterations.
        guard.problem()
        guard.close()
        log.write(json.dumps({name: term.item() for name, term in terms.items()}) + "\n")
        log.flush()

    def precision() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16" and not plain)

    ones = torch.ones(2 * config.batch_size, 10, device=device)

    def bare_passes() -> None:
        with frozen(jem):
            x = u.clone().requires_grad_(True)
            for _ in range(config.num_steps):
                with precision():
                    logits = jem.backbone(x.view_as(x))  # the counter of operations below wants no leaf
                torch.autograd.grad(logits, x, ones[: config.batch_size].to(logits.dtype))
        with precision():
            logits = jem.backbone(torch.cat([u, u]))
        logits.backward(ones.to(logits.dtype))
        jem.zero_grad()

    return iteration, bare_passes


def build_scores(config: BenchmarkConfig, device: torch.device):
    """All scores of some images, and the bare passes that they need, as functions; fp32."""
    torch.manual_seed(0)
    shape = (3, config.image_size, config.image_size)
    jem = timm_jem.create_model(config.model, num_classes=10, input_size=shape).to(device).eval()
    jem = jem.to(memory_format=torch.channels_last) if config.channels_last else jem
    images = torch.randint(256, (config.score_images, *shape), dtype=torch.uint8)
    ready = [jem.normalize(to_pixels(part.to(device))) for part in images.split(SCORED_AT_ONCE)]
    ones = torch.ones(SCORED_AT_ONCE, 10, device=device)
    detectors = [Detector(jem, name) for name in ("energy", "msp", "max_logit", "approximate_mass")]

    def scores() -> None:
        ood_scores(detectors, images, batch_size=SCORED_AT_ONCE)

    def bare_passes() -> None:
        with frozen(jem):
            for part in ready:
                x = part.clone().requires_grad_(True)
                torch.autograd.grad(jem.backbone(x), x, ones[: len(x)])

    return scores, bare_passes


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds counted twice, per second, of a large matrix product on this device: the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def main(argv: list[str]) -> None:
    parser = make_parser("recipes/benchmark.py", __doc__.splitlines()[0])
    parser.add_class_arguments(BenchmarkConfig)
    given = parse_flags(parser, read_flags(parser, argv))
    config = BenchmarkConfig(**{field.name: given[field.name] for field in fields(BenchmarkConfig)})
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device, bf16 = accelerator.device, config.mixed_precision == "bf16"
    iteration, bare_passes = build(config, accelerator, plain=False)
    work = {"iteration": iteration, "bare": bare_passes}
    is_plain = not (bf16 or config.channels_last or config.compile)
    if not is_plain:
        work["plain"] = build(config, accelerator, plain=True)[0]
    if config.score_images:
        work["scores"], work["bare scores"] = build_scores(config, device)

    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in tqdm(range(-1, config.rounds), desc="timing"):  # round −1 warms up
        for name in work if round_ % 2 else reversed(work):
            elapsed = seconds(work[name], device)
            if round_ >= 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))

    precision, layout = "bf16" if bf16 else "fp32", "channels_last" if config.channels_last else "NCHW"
    how = f"compiled ({config.compile})" if config.compile else "eager"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{config.model}, {config.image_size} px, batch {config.batch_size}, K {config.num_steps}, {precision}, {layout}, "
        f"{how}, {where}: iteration {medians['iteration']:.3f} s, bare passes {medians['bare']:.3f} s, "
        f"medians of {config.rounds}"
    )
    print(f"overhead {ratio('iteration', 'bare'):.3f}")
    if not is_plain:
        print(f"gain {ratio('plain', 'iteration'):.2f} over fp32, NCHW, eager ({medians['plain']:.3f} s)")
    if config.score_images:
        print(
            f"scores of {config.score_images:,} images: {medians['scores']:.3f} s, {ratio('scores', 'bare scores'):.3f} times "
            f"their bare passes (fp32, {SCORED_AT_ONCE} at once)"
        )
    # Counted in eager mode: what is compiled hides its operations.
    plain_iteration, plain_passes = build(config, accelerator, plain=True)
    with FlopCounterMode(display=False) as counter:
        plain_passes()
    flops = counter.get_total_flops() / medians["iteration"]
    peak = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
    print(
        f"{flops / 1e12:.3f} TFLOP/s, {flops / peak:.0%} of the {peak / 1e12:.3f} that a large {precision} matrix product "
        "reaches here"
    )
    if device.type == "cuda":
        with CopiedBytes() as copied:
            plain_iteration()
        print(f"{copied.bytes} bytes copied between host and device in an iteration, chains included")


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted", less="lower --batch_size, --image_size or --score_images"):
        main(sys.argv[1:])
