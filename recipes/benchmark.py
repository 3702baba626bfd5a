"""Speed of a training iteration, as ratios to bare network passes measured in the same run.

    python recipes/benchmark.py
    python recipes/benchmark.py --model wrn_28_10 --batch_size 64 --mixed_precision bf16

The bare passes of an iteration of K SGLD steps are K times forward and input-backward of the chains, then forward and
backward of data and chains together, at the same precision and memory layout and through the same network, with
nothing else: no noise, energies, buffer, loss terms or optimiser.
"""

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate.utils import tqdm
from jsonargparse import ArgumentError, ArgumentParser
from timm.optim import create_optimizer_v2

import timm_jem
from timm_jem import InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.errors import check_whole, one_line
from timm_jem.sampling import frozen
from timm_jem.training import joint_step


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
    """

    model: str = "wrn_16_2"
    image_size: int = 32
    batch_size: int = 32
    num_steps: int = 20
    rounds: int = 7
    mixed_precision: Literal["no", "bf16"] = "no"
    channels_last: bool = True

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "num_steps", "rounds"):
            check_whole(name, getattr(self, name), 1)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="recipes/benchmark.py", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_class_arguments(BenchmarkConfig)
    try:
        config = BenchmarkConfig(**vars(parser.parse_args(argv)))
    except ArgumentError as error:
        raise InputError(f"{one_line(error)}; recipes/benchmark.py --help lists the settings") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = (3, config.image_size, config.image_size)
    jem = timm_jem.create_model(config.model, num_classes=10, input_size=shape).to(device).train()
    if config.channels_last:
        jem = jem.to(memory_format=torch.channels_last)
    rng = torch.Generator(device).manual_seed(0)
    buffer = ReplayBuffer(shape, init=uniform_noise, generator=rng, device=device)
    u = uniform_noise((config.batch_size, *shape), generator=rng, device=device)
    y = torch.arange(config.batch_size, device=device) % 10
    optimizer = create_optimizer_v2(jem, opt="adam", lr=1e-6)
    sgld = SGLDConfig(num_steps=config.num_steps)

    def precision() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")

    def iteration() -> None:
        with precision():
            terms = joint_step(
                jem, jem, u, y, buffer, sgld_config=sgld, objective=ObjectiveConfig(), data_noise=0.03, generator=rng
            )
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    ones = torch.ones(2 * config.batch_size, 10, device=device)

    def bare_passes() -> None:
        with frozen(jem):
            x = u.clone().requires_grad_(True)
            for _ in range(config.num_steps):
                with precision():
                    logits = jem.backbone(x)
                torch.autograd.grad(logits, x, ones[: config.batch_size].to(logits.dtype))
        with precision():
            logits = jem.backbone(torch.cat([u, u]))
        logits.backward(ones.to(logits.dtype))
        jem.zero_grad()

    def seconds(work) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"iteration": [], "bare": []}
    for round_ in tqdm(range(-1, config.rounds), desc="timing"):  # round −1 warms up
        work = [("iteration", iteration), ("bare", bare_passes)]
        for name, function in work if round_ % 2 else reversed(work):
            elapsed = seconds(function)
            if round_ >= 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{config.model}, {config.image_size} px, batch {config.batch_size}, K {config.num_steps}, "
        f"{config.mixed_precision if config.mixed_precision != 'no' else 'fp32'}, "
        f"{'channels_last' if config.channels_last else 'NCHW'}, {device.type}, {torch.get_num_threads()} threads: "
        f"iteration {medians['iteration']:.3f} s, bare passes {medians['bare']:.3f} s, medians of {config.rounds}"
    )
    ratio = statistics.median(a / b for a, b in zip(times["iteration"], times["bare"], strict=True))
    print(f"overhead {ratio:.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
