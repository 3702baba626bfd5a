"""Speed of a training iteration and of evaluation, as ratios to bare network passes, measured in the same run.

    python recipes/benchmark.py
    python recipes/benchmark.py --mixed_precision auto
    python recipes/benchmark.py --preset fashion_mnist --image_size 28 --channels 1 --profile profile.png
    python recipes/benchmark.py --model wrn_28_10 --batch_size 64 --mixed_precision bf16 --compile reduce-overhead

The iteration is the training recipe's on images of noise: all of it, with augmentation, moving average and the guard's whole
look. The bare passes of an iteration of K SGLD steps are K times forward and input-backward of the chains, then forward and
backward of all images of the loss together, at the same precision and memory layout and through the same network, with
nothing else: no noise, energies, buffer, loss terms or optimiser. The plain set-up is the same iteration in fp32, NCHW and
eager mode, without a CUDA graph. The bare passes don't have one either, so that a captured iteration may take less than they.
All out-of-distribution scores of 8-bit images are timed next to one forward and input-backward of the same images.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.ood import ood_scores
from timm_jem.files import replaced_file
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.ood import Detector
from timm_jem.pixels import to_pixels
from timm_jem.progress import tqdm
from timm_jem.shell import one_line_errors
from timm_jem.speed.iteration import bare_passes, build_run, iteration
from timm_jem.speed.profile import profile
from timm_jem.training import Run, Settings, open_accelerator, parse_settings

SCORED_AT_ONCE = 256


@dataclass
class BenchmarkConfig:
    """What to time.

    Attributes:
        preset: what recipes/train.py takes as --config, whose iteration is timed; None: JEM's, of a smaller network and batch.
        model: timm name of the network; None: the preset's, or wrn_16_2.
        image_size: side of its images.
        channels: 1 or 3.
        batch_size: images and chains in an iteration; None: the preset's, or 32.
        num_steps: SGLD steps K; None: the preset's, or 20.
        rounds: iterations timed, each next to its bare passes.
        mixed_precision: no, bf16, or auto: the faster one of them here; None: the preset's, or no.
        channels_last: memory layout; None: the preset's, or true.
        compile: torch.compile's mode for the backbone; None: eager.
        threads: CPU threads of a process; None: this machine's cores divided among its processes.
        score_images: how many images are scored for out-of-distribution detection in a round; 0: none.
        profile: file for a picture of where the time goes; the table is printed. CPUs only.
    """

    preset: str | None = None
    model: str | None = None
    image_size: int = 32
    channels: Literal[1, 3] = 3
    batch_size: int | None = None
    num_steps: int | None = None
    rounds: int = 7
    mixed_precision: Literal["no", "bf16", "auto"] | None = None
    channels_last: bool | None = None
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    threads: int | None = None
    score_images: int = 512
    profile: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "rounds"):
            check_whole(name, getattr(self, name), 1)
        check_whole("score_images", self.score_images, 0)
        if self.profile is not None and not Path(self.profile).parent.is_dir():
            raise InputError(f"profile is {self.profile}, and {Path(self.profile).parent} is no folder: make it first")

    def settings(self) -> Settings:
        """Those of the training recipe."""
        told = {"model.name": self.model, "sgld.num_steps": self.num_steps, "train.batch_size": self.batch_size}
        told |= {"train.mixed_precision": self.mixed_precision, "train.compile": self.compile, "train.threads": self.threads}
        told["train.channels_last"] = None if self.channels_last is None else str(self.channels_last).lower()
        told = {name: value for name, value in told.items() if value is not None}
        words = ["--config", self.preset]
        if self.preset is None:
            smaller = {"data.dataset": "digits", "model.name": "wrn_16_2", "train.batch_size": 32}
            words, told = [], {**smaller, "train.mixed_precision": "no", **told}
        words += [f"--{name}={value}" for name, value in told.items()]
        return parse_settings(words, Path(__file__).parent / "configs" / "digits.yaml")[0]


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


def scores_and_passes(jem: JEM, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """All scores of some images, and the bare passes that they need, as functions; fp32."""
    images = torch.randint(256, (count, *jem.input_size), dtype=torch.uint8)
    ready = [jem.normalize(to_pixels(part.to(jem.device))) for part in images.split(SCORED_AT_ONCE)]
    ones = torch.ones(SCORED_AT_ONCE, jem.num_classes, device=jem.device)
    detectors = [Detector(jem, name) for name in ("energy", "msp", "max_logit", "approximate_mass")]

    def scores() -> None:
        ood_scores(detectors, images, batch_size=SCORED_AT_ONCE)

    def passes() -> None:
        with frozen(jem):
            for part in ready:
                x = part.clone().requires_grad_(True)
                torch.autograd.grad(jem.backbone(x), x, ones[: len(x)])

    return scores, passes


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(work: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each in every round, by turns."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in tqdm(range(-1, rounds), desc="timing"):  # round −1 warms up
        for name in work if round_ % 2 else reversed(work):
            elapsed = seconds(work[name], device)
            if round_ >= 0:
                times[name].append(elapsed)
    return times


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds counted twice, per second, of a large matrix product on this device: the best of several.

    On CPUs PyTorch has one library for products and another for convolutions, of which a product is one, too: on some the
    second is twice as fast.
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    ways = [lambda: a @ b]
    if device.type == "cpu":
        images = a.view(1, 32, 64, n).permute(0, 3, 1, 2)  # channels last
        ways.append(lambda: torch.nn.functional.conv2d(images, b.view(n, n, 1, 1)))
    return 2 * n**3 / min(seconds(way, device) for way in ways for _ in range(8))


def plain_run(settings: Settings, shape: tuple[int, int, int], run: Run) -> Run:
    """The same iteration in fp32, NCHW and eager mode."""
    train = replace(settings.train, channels_last=False, compile=None, capture=False)
    plain, _ = build_run(replace(settings, train=train), shape, run.learner.accelerator)
    vars(plain.learner.jem).pop("forward", None)  # accelerate's, with its casts
    return plain


def main(argv: list[str]) -> None:
    parser = make_parser("benchmark", __doc__.splitlines()[0])
    parser.add_class_arguments(BenchmarkConfig)
    given = parse_flags(parser, read_flags(parser, argv))
    config = BenchmarkConfig(**{field.name: given[field.name] for field in fields(BenchmarkConfig)})
    if config.profile is not None:
        from timm_jem.speed.profile_plot import draw_profile  # which needs matplotlib

    told, shape = config.settings(), (config.channels, config.image_size, config.image_size)
    run, settings = build_run(told, shape, open_accelerator(told.train))
    accelerator, train = run.learner.accelerator, settings.train
    device, bf16 = accelerator.device, accelerator.mixed_precision == "bf16"
    work = {"iteration": lambda: iteration(run), "bare": bare_passes(run, bf16=bf16)}
    plain = plain_run(settings, shape, run)
    captured = run.learner.method.capture
    is_plain = not (bf16 or train.channels_last or train.compile or captured)
    if not is_plain:
        work["plain"] = lambda: iteration(plain)
    if config.score_images:
        work["scores"], work["bare scores"] = scores_and_passes(run.learner.published(), config.score_images)
    times = timed(work, config.rounds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))

    precision, layout = "bf16" if bf16 else "fp32", "channels_last" if train.channels_last else "NCHW"
    how = (f"compiled ({train.compile})" if train.compile else "eager") + ", captured" * captured
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    processes = f"{accelerator.num_processes} processes of " if accelerator.num_processes > 1 else ""
    chains = f", K {settings.sgld.num_steps}" if train.objective.needs_chains else ""
    accelerator.print(
        f"{settings.model.name}, {config.image_size} px, batch {train.batch_size}{chains}, {precision}, {layout}, {how}, "
        f"{processes}{where}: iteration {medians['iteration']:.3f} s, bare passes {medians['bare']:.3f} s, "
        f"medians of {config.rounds}"
    )
    accelerator.print(f"overhead {ratio('iteration', 'bare'):.3f}")
    if not is_plain:
        accelerator.print(f"gain {ratio('plain', 'iteration'):.2f} over fp32, NCHW, eager ({medians['plain']:.3f} s)")
    if config.score_images:
        accelerator.print(
            f"scores of {config.score_images:,} images: {medians['scores']:.3f} s, {ratio('scores', 'bare scores'):.3f} times "
            f"their bare passes (fp32, {SCORED_AT_ONCE} at once)"
        )
    with FlopCounterMode(display=False) as counter:  # in eager mode: what is compiled hides its operations
        bare_passes(plain, bf16=False)()
    flops = counter.get_total_flops() / medians["iteration"]
    peak = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
    accelerator.print(
        f"{flops / 1e12:.3f} TFLOP/s, {flops / peak:.0%} of the {peak / 1e12:.3f} that a large {precision} matrix product "
        "reaches here"
    )
    if device.type == "cuda":
        with CopiedBytes() as copied:
            iteration(plain)
        accelerator.print(f"{copied.bytes} bytes copied between host and device in an iteration, chains included")
    if config.profile is not None:
        found = profile(run, config.rounds)
        accelerator.print(found.table())
        if accelerator.is_main_process:
            with replaced_file(Path(config.profile)) as aside:
                draw_profile(found, f"{settings.model.name}, {precision}: an iteration").savefig(aside, format="png", dpi=120)


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted", less="lower --batch_size, --image_size or --score_images"):
        main(sys.argv[1:])
