"""Train a joint energy model: cross-entropy plus maximum likelihood of x by SGLD (JEM, arXiv 1912.03263).

    accelerate launch recipes/train.py                                     # handwritten digits, nothing to download
    accelerate launch recipes/train.py --data.dataset cifar10 --model.name wrn_28_10
    accelerate launch recipes/train.py --config recipes/configs/cifar10_jem.yaml --output_dir runs/a
    accelerate launch recipes/train.py --resume runs/a                     # go on from the newest checkpoint

Without a data set and a config, recipes/configs/digits.yaml is used; otherwise the defaults are the paper's.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed, tqdm
from jsonargparse import ArgumentError, ArgumentParser
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Subset

import timm_jem
from timm_jem import JEM, ClassGaussians, InputError, ObjectiveConfig, PublishedChains, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.data import DataConfig, ImageSet, load_splits
from timm_jem.data.loader import default_workers
from timm_jem.errors import check_number, check_whole, one_line
from timm_jem.evaluation import accuracy, best_num_steps, expected_calibration_error, image_grid, predict
from timm_jem.hub.card import PICTURES
from timm_jem.hub.repository import make_repository
from timm_jem.models.names import check_name
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels
from timm_jem.training import (
    Batches,
    Checkpoints,
    DivergenceGuard,
    GuardConfig,
    Learner,
    damage,
    load_tree,
    rank_files,
    refuse_unsupported,
)

DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class ModelConfig:
    """The backbone.

    Attributes:
        name: any timm name, or one of this package's wrn_*.
        pretrained: start from pretrained weights.
        num_classes: None: as many as the data has.
        drop_rate, drop_path_rate: timm's dropout and stochastic depth, for the loss only: chains move without.
        kwargs: more arguments for timm.create_model, e.g. {act_layer: silu}. Those of a config are for its own model:
            a --model.name after it drops them.
    """

    name: str = "wrn_28_10"
    pretrained: bool = False
    num_classes: int | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """The training loop. Defaults are JEM's for CIFAR-10: 150 epochs, Adam, 1e-4, warm-up, ×0.3 at the end.

    Attributes:
        steps: optimiser steps; 117,000 are 150 epochs of CIFAR-10.
        epochs: instead of steps: passes over the training images.
        batch_size: images, and chains, per process and iteration.
        grad_accum: iterations whose gradients make one optimiser step.
        ce_batch_size: batches of their own for the cross-entropy, of so many images; None: the same images (SADA-JEM:
            64 for p(x), 128 for the cross-entropy).
        px_augment: how images for p(x) are augmented: full (JEM: as for the cross-entropy), flip, or none (SADA-JEM).
        ce_auto_augment: a policy of timm for the images of the cross-entropy, e.g. rand-m9-mstd0.5 or augmix-m3-w3; they
            then come in batches of their own.
        opt, lr, weight_decay, opt_kwargs: a timm optimiser and its settings.
        sched: a timm schedule over all steps after warmup_steps; milestones are parts of steps, decay_rate their factor.
        sched_kwargs: more for timm.scheduler.create_scheduler_v2, in steps where it says epochs.
        grad_clip: bound of the gradient's norm; 0: none.
        ema_decay: of timm's moving average of the weights, which then is what is evaluated, drawn from and kept; 0: none.
        data_noise: standard deviation of noise on the images while training, pixels. Chains can't be narrower than
            their own noise, so keep it above sgld.noise_std, or the energy sharpens without end.
        ce_noise: that of the images for the cross-entropy, or None: as data_noise.
        buffer_size, restart_prob: the replay buffer of a process.
        init: where chains start: uniform noise (JEM), or gaussian: fitted to each class (JEM++, SADA-JEM).
        conditional_chains: chains of p(y) p(x|y) as negatives of E(x) as well; with objective w_xy they are anyway.
        ramp_from, ramp_steps: sgld.num_steps is reached from ramp_from in so many optimiser steps; 0: at once.
        batch_norm: BatchNorm while chains move: eval (running statistics), frozen (in the loss, too), or train (JEM++,
            SADA-JEM: batch statistics; what is sampled then is not the density that is scored).
        objective: weights of the loss; w_xy > 0 gives class-conditional chains.
        seed: of weights, order and chains.
        mixed_precision: no or bf16; None: as accelerate launch says.
        channels_last: memory layout of convolutions.
        compile: torch.compile's mode for the backbone: default, reduce-overhead or max-autotune; None: not compiled.
        threads: CPU threads of a process; None: this machine's cores divided among its processes, where
            ``accelerate launch`` by itself gives one.
        workers: processes that decode images, for data sets not kept in memory; None: as the machine's cores allow.
        log_every, sample_every, eval_every: optimiser steps between lines of metrics.jsonl, pictures and validations;
            0: only at the end.
        checkpoint_every: optimiser steps between checkpoints for --resume; 0: only when the last step is done, or when stopped
            by SIGTERM or SIGINT.
        keep_checkpoints: how many.
        best_k: keep the models of the k best validation accuracies in best/.
        trackers: tensorboard, trackio or wandb.
        sample_steps: lengths tried on validation images for fresh chains, in multiples of sgld.num_steps.
        sample_count: how many chains for that.
    """

    steps: int = 117_000
    epochs: float | None = None
    batch_size: int = 64
    grad_accum: int = 1
    ce_batch_size: int | None = None
    px_augment: Literal["full", "flip", "none"] = "full"
    ce_auto_augment: str | None = None
    opt: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "multistep"
    warmup_steps: int = 1000
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    decay_rate: float = 0.3
    sched_kwargs: dict[str, Any] = field(default_factory=dict)
    grad_clip: float = 0.0
    ema_decay: float = 0.0
    data_noise: float = 0.03
    ce_noise: float | None = None
    buffer_size: int = 10_000
    restart_prob: float = 0.05
    init: Literal["noise", "gaussian"] = "noise"
    conditional_chains: bool = False
    ramp_from: int = 1
    ramp_steps: int = 0
    batch_norm: Literal["eval", "frozen", "train"] = "eval"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    mixed_precision: str | None = None
    channels_last: bool = True
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    threads: int | None = None
    workers: int | None = None
    log_every: int = 50
    sample_every: int = 5000
    eval_every: int = 5000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    best_k: int = 0
    trackers: list[str] = field(default_factory=list)
    sample_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 7, 10, 15, 20])
    sample_count: int = 500

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "grad_accum": 1, "log_every": 1, "sample_count": 2, "seed": 0}
        least |= {"warmup_steps": 0, "sample_every": 0, "eval_every": 0, "buffer_size": 1, "ramp_from": 1, "ramp_steps": 0}
        least |= {"checkpoint_every": 0, "keep_checkpoints": 1, "best_k": 0}
        least |= {name: 1 for name in ("threads", "ce_batch_size") if getattr(self, name) is not None}
        least |= {"workers": 0} if self.workers is not None else {}
        for name, value in least.items():
            check_whole(f"train {name}", getattr(self, name), value)
        for name in ("lr", "weight_decay", "grad_clip", "data_noise", "decay_rate"):
            check_number(f"train {name}", getattr(self, name), least=0)
        if self.ce_noise is not None:
            check_number("train ce_noise", self.ce_noise, least=0)
        if self.epochs is not None:
            check_number("train epochs", self.epochs, above=0)
        check_number("train ema_decay", self.ema_decay, least=0, most=1)
        for milestone in self.milestones:
            check_number("train milestones", milestone, least=0, most=1)
        if not self.sample_steps or min(self.sample_steps) < 1:
            raise InputError("train sample_steps must be a list of whole numbers of at least 1")
        if self.mixed_precision not in (None, "no", "bf16"):
            raise InputError(
                f"train mixed_precision is {self.mixed_precision!r}: give bf16 or no (the gradient scaler of fp16 does not "
                "cover the chains' gradients, which underflow)"
            )
        for name in self.trackers:
            if name not in ("tensorboard", "trackio", "wandb"):
                raise InputError(f"train trackers has {name!r}: choose from tensorboard, trackio and wandb")
            if name not in {str(tracker) for tracker in get_available_trackers()}:
                raise InputError(f"train trackers has {name!r}, which is not installed: pip install {name}")


@dataclass
class HubConfig:
    """Publishing. ``hf auth login`` first; recipes/push.py publishes a run already done.

    Attributes:
        push_to: repository "user/name" to push the model, its card, pictures and chains to; None: none.
        private: make it private if it isn't there yet.
        every: push what there is every so many iterations as well; 0: only at the end.
        replay_buffer: publish the chains, at 8 bits, as many as fit 64 MiB.
    """

    push_to: str | None = None
    private: bool = False
    every: int = 0
    replay_buffer: bool = True

    def __post_init__(self) -> None:
        check_whole("hub every", self.every, 0)


def parse(argv: list[str]):
    parser = ArgumentParser(prog="recipes/train.py", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    parser.add_argument("--data", type=DataConfig, default=DataConfig())
    parser.add_argument("--model", type=ModelConfig, default=ModelConfig())
    parser.add_argument("--sgld", type=SGLDConfig, default=SGLDConfig())
    parser.add_argument("--train", type=TrainConfig, default=TrainConfig())
    parser.add_argument("--guard", type=GuardConfig, default=GuardConfig())
    parser.add_argument("--hub", type=HubConfig, default=HubConfig())
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: runs/<data set>, numbered")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="a run's folder, or one of its checkpoints: go on with it, by its own config.yaml unless told otherwise; "
        "auto: go on with output_dir where it has a checkpoint, else start it",
    )
    flags = [word.split("=")[0] for word in argv]
    if not {"--config", "--data.dataset", "--data"} & set(flags):
        resume = flag_value(argv, "--resume") or "auto"
        own = run_and_checkpoint(resume)[0] / "config.yaml"
        if resume != "auto" and own.is_file():  # the folder may have been moved since
            argv = ["--config", str(own), "--output_dir=null", *argv]
        else:
            argv = ["--config", str(DIGITS_CONFIG), *argv]
    if "--model.name" in flags and not any(flag.startswith("--model.kwargs") for flag in flags):
        argv = [*argv, "--model.kwargs={}"]
    try:
        config = parser.parse_args(argv)
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())}; recipes/train.py --help lists the settings") from error
    return parser, config, parser.instantiate(config)


def flag_value(argv: list[str], flag: str) -> str | None:
    """The last value given for ``flag``, as ``--flag value`` or ``--flag=value``."""
    values = [word.split("=", 1)[1] for word in argv if word.startswith(f"{flag}=")]
    values += [value for word, value in pairwise(argv) if word == flag]
    return values[-1] if values else None


def run_and_checkpoint(path: str) -> tuple[Path, Path | None]:
    """A run's folder, and the checkpoint of it that ``path`` names, if it names one."""
    given = Path(path)
    return (given.parent.parent, given) if given.parent.name == "checkpoints" else (given, None)


def choose_output_dir(output_dir: str | None, dataset: str, resume: str | None = None) -> Path:
    """The given folder, which must be empty, or the first free runs/<data set>, runs/<data set>-2, ...

    A run that goes on keeps its own; ``auto`` without a folder is the latest of those.
    """
    if resume not in (None, "auto"):
        run = run_and_checkpoint(resume)[0]
        if output_dir is not None and Path(output_dir) != run and Path(output_dir).resolve() != run.resolve():
            raise InputError(f"resume is {resume}, and a run goes on in its own folder: leave output_dir {output_dir} out")
        if not (run / "checkpoints").is_dir():
            raise InputError(f"{run} has no checkpoints: give a run's folder, such as runs/digits, or --resume auto")
        return run
    if output_dir is None:
        stem = Path("runs") / Path(dataset).stem
        paths = (stem if n == 1 else Path(f"{stem}-{n}") for n in count(1))
        free, latest = next((free, n) for n, free in enumerate(paths) if not free.exists())
        if resume == "auto" and latest:
            return stem if latest == 1 else Path(f"{stem}-{latest}")
        return free
    path = Path(output_dir)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and resume is None):
        raise InputError(f"output_dir {path} holds another run or other files: give a new folder, or --resume auto")
    return path


def without_flags(argv: list[str], *flags: str) -> list[str]:
    """``argv`` without ``flags`` and their values: where a run was written is nobody else's concern."""
    return [word for i, word in enumerate(argv) if word.split("=")[0] not in flags and (i == 0 or argv[i - 1] not in flags)]


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """``write(temporary path)``, then rename: the file is there whole, or as before."""
    aside = path.with_name(f".{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What a resumed run does otherwise than before, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in new if key in old]
        return [line for key in keys for line in differences(old[key], new[key], f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} is {new!r} now and was {old!r}"]


def unchanged(batch: Any) -> Any:
    """An ImageSet already gives batches."""
    return batch


def batches(data: ImageSet | Subset, workers: int) -> DataLoader:
    """For evaluation, in order."""
    return DataLoader(
        data,
        batch_size=256,
        collate_fn=unchanged,
        num_workers=workers if getattr(data, "dataset", data).images is None else 0,
        generator=torch.Generator(),  # a loader draws from the global one otherwise
    )


def catch_signals() -> list[signal.Signals]:
    """SIGTERM and SIGINT ask for a checkpoint and an end; a second one ends at once. The list fills as they come."""
    caught: list[signal.Signals] = []

    def catch(number: int, _) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def release_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: list[str]) -> None:
    parser, config, settings = parse(argv)
    data, model, sgld, train, hub = settings.data, settings.model, settings.sgld, settings.train, settings.hub
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # before accelerate asks for it to be installed
        raise InputError("DeepSpeed gives no gradients for images, which SGLD needs: use DDP, or FSDP with fsdp_version: 2")
    accelerator = Accelerator(
        mixed_precision=train.mixed_precision,
        log_with=train.trackers or None,
        project_dir="runs" if train.trackers else None,
        # Others wait while one process draws, saves or uploads.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    refuse_unsupported(accelerator)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main_process, sharded = accelerator.is_main_process, accelerator.distributed_type.value == "FSDP"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not sharded:
        accelerator.print("note: accelerate shards on GPUs only; here each process has the whole model")
    set_seed(train.seed)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(train.threads or max(1, cores // local_world))
    workers = default_workers(local_world) if train.workers is None else train.workers

    # Everything that can be wrong with the input is found here, before anything is written.
    output_dir = broadcast_object_list([choose_output_dir(settings.output_dir, data.dataset, settings.resume)])[0]
    summary_file = output_dir / "summary.json"
    check_name(model.name)
    lengths = [n * sgld.num_steps for n in train.sample_steps if n * sgld.num_steps > sgld.denoise_steps]
    if not lengths:
        raise InputError(f"no train.sample_steps is longer than sgld.denoise_steps {sgld.denoise_steps}: give longer ones")
    if data.streaming and train.epochs is not None:
        raise InputError("train.epochs needs to know how many images there are, and data.streaming doesn't: give steps")
    if data.streaming and train.init == "gaussian":
        raise InputError("train.init gaussian is fitted to images at hand, and data.streaming has none: use noise")
    splits = load_splits(data)
    num_classes = len(splits.class_names)
    if model.num_classes not in (None, num_classes):
        raise InputError(f"model.num_classes is {model.num_classes} and {data.dataset} has {num_classes} classes: leave it out")
    if taken := {"num_classes", "input_size", "class_names", "sgld", "drop_rate", "drop_path_rate"} & set(model.kwargs):
        raise InputError(f"model.kwargs has {', '.join(sorted(taken))}, which other settings give: leave it out")
    together = train.batch_size * world
    if not data.streaming and len(splits.train) < together:
        raise InputError(f"train.batch_size of all processes is {together} with {len(splits.train)} training images: lower it")
    if train.epochs is not None:
        train.steps = max(1, round(train.epochs * len(splits.train) / (together * train.grad_accum)))
    if settings.resume and summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        if summary.get("outcome") == "stopped":
            raise InputError(
                f"{output_dir} has ended: {summary['explanation']}; without its summary.json it goes on with other settings"
            )
        if summary.get("steps", 0) >= train.steps:
            accelerator.print(f"{output_dir} is finished: {summary['steps']} steps, see {summary_file}")
            return
    if len(splits.val) < 2:
        raise InputError(f"{len(splits.val)} validation images can choose nothing: raise data.val_fraction")
    energies = train.objective.w_x > 0 or train.objective.w_xy > 0
    conditional = train.objective.w_xy > 0 or train.conditional_chains
    wanted = train.batch_size
    if conditional and not data.streaming and splits.labeled is None:
        # A batch that goes over into the next epoch can hold an image twice.
        wanted = min(wanted, 2 * int(splits.train.labels.bincount().max()))
    needed = wanted * num_classes if conditional else wanted
    if energies and train.buffer_size < needed:
        raise InputError(
            f"train.buffer_size is {train.buffer_size}, and a batch may need {wanted} chains{' of one class' * conditional}: "
            f"raise it to {needed}, or lower train.batch_size"
        )
    if train.ema_decay and sharded:
        raise InputError("train.ema_decay averages whole weights, and FSDP shards them: set it to 0")

    def build() -> JEM:
        jem = timm_jem.create_model(
            model.name,
            model.pretrained,
            input_size=splits.image_shape,
            class_names=splits.class_names,
            sgld=sgld,
            num_classes=num_classes,
            **{name: rate for name in ("drop_rate", "drop_path_rate") if (rate := getattr(model, name))},
            **model.kwargs,
        ).to(device)
        jem.data_config["crop_pct"] = 1.0  # trained on whole images
        return jem.to(memory_format=torch.channels_last) if train.channels_last else jem

    jem = build()
    try:
        with frozen(jem):
            jem.energy(torch.zeros(2, *splits.image_shape, device=device, dtype=jem.dtype))
    except RuntimeError as error:
        raise InputError(
            f"{model.name} can't take images of {splits.image_shape} ({one_line(error)}): give --data.image_size"
        ) from error
    try:
        optimizer = create_optimizer_v2(
            jem.backbone, opt=train.opt, lr=train.lr, weight_decay=train.weight_decay, **train.opt_kwargs
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            f"train.opt is {train.opt!r} ({one_line(error)}): give one of timm.optim.list_optimizers() and its own opt_kwargs"
        ) from error
    ema = ModelEmaV3(jem, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None
    if train.compile is not None:
        jem.backbone.compile(mode=train.compile)
    prepared, optimizer = accelerator.prepare(jem, optimizer)
    set_seed(train.seed + rank)  # all were built alike; dropout differs
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=train.sched,
            num_epochs=train.steps,
            warmup_epochs=min(train.warmup_steps, train.steps),
            decay_rate=train.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=1,
            **{
                "warmup_lr": 0.0,
                "decay_milestones": [round(part * train.steps) for part in train.milestones],
                **train.sched_kwargs,
            },
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"train.sched {train.sched} does not fit its settings ({one_line(error)}): mend them") from error
    if train.batch_norm == "train" and main_process:
        warnings.warn(
            "train.batch_norm is 'train': chains move by batch statistics, so the density that is sampled in training is "
            "not the one that energies, evaluation and new samples use",
            stacklevel=1,
        )

    # Chains differ by process; so does the noise.
    chain_rng, noise_rng = (torch.Generator(device).manual_seed(train.seed + 1000 * rank + i) for i in (1, 2))
    init = uniform_noise
    if train.init == "gaussian":
        count = min(len(splits.train), int(data.cache_gib * 2**30) // math.prod(splits.image_shape))
        rows = torch.linspace(0, len(splits.train) - 1, max(count, 2)).long().tolist()  # all, where memory allows
        images = torch.cat([images for images, _ in batches(Subset(splits.train, rows), workers)])
        init = ClassGaussians.fit(images, splits.train.labels[rows], num_classes if conditional else None).to(device)
    buffer = ReplayBuffer(
        splits.image_shape,
        init=init,
        generator=chain_rng,
        capacity=train.buffer_size,
        restart_prob=train.restart_prob,
        num_classes=num_classes if conditional else None,
        device=device,
    )
    learner = Learner(
        accelerator,
        prepared,
        jem,
        optimizer,
        scheduler,
        buffer,
        sgld=sgld,
        objective=train.objective,
        generator=noise_rng,
        data_noise=train.data_noise,
        batch_norm=train.batch_norm,
        class_frequencies=splits.class_frequencies.to(device),
        grad_clip=train.grad_clip,
        ema=ema,
        ramp_from=train.ramp_from,
        ramp_steps=train.ramp_steps,
    )

    stream = Batches(
        splits,
        train.batch_size,
        generator=noise_rng,
        energies=energies,
        ce_batch_size=train.ce_batch_size,
        px_augment=train.px_augment,
        ce_auto_augment=train.ce_auto_augment,
        ce_noise=train.data_noise if train.ce_noise is None else train.ce_noise,
        shared=train.ce_noise is None,
        seed=train.seed,
        rank=rank,
        world=world,
        workers=workers,
    )

    def evaluate(images: ImageSet, name: str) -> dict[str, float]:
        """Each process predicts every world-th image; a few are predicted twice so that all have as many."""
        rows = [min(rank + world * i, len(images) - 1) for i in range(-(-len(images) // world))]
        mine, _ = predict(learner.averaged, batches(Subset(images, rows), workers), desc=name)
        logits = accelerator.gather(mine.to(device)).cpu().view(world, len(rows), -1).transpose(0, 1).flatten(0, 1)
        logits = logits[: len(images)]
        return {
            f"{name}_accuracy": accuracy(logits, images.labels),
            f"{name}_ece": expected_calibration_error(logits.softmax(1), images.labels),
        }

    def draw_fresh(drawn: JEM, name: str) -> None:
        """Fresh chains from noise, none selected, one row for each of the first 20 classes."""
        classes = torch.arange(min(num_classes, 20), device=device)
        x = drawn.sample(y=classes.repeat_interleave(10), generator=torch.Generator(device).manual_seed(train.seed))
        if main_process:
            keep_picture(name, image_grid(jem.denormalize(x), 10, splits.class_names[: len(classes)]))

    def draw_buffer() -> None:
        slots = torch.linspace(0, len(buffer) - 1, 100, device=device).long() if len(buffer) > 100 else slice(None)
        keep_picture("buffer.png", image_grid(buffer.chains[slots], 10))

    def keep_picture(name: str, picture) -> None:
        write_aside(output_dir / name, lambda path: picture.save(path, "png"))
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.split(".")[0].split("_")[0]: np.asarray(picture)[None]}, learner.step, **layout)

    def whole_model() -> JEM:
        """The model to publish, not sharded."""
        if not sharded:
            return learner.averaged
        whole = build()
        whole.load_state_dict({name: tensor.full_tensor() for name, tensor in jem.state_dict().items()})
        return whole

    checkpoints = Checkpoints(output_dir / "checkpoints", accelerator, keep=train.keep_checkpoints)
    guard = DivergenceGuard(settings.guard, accelerator, num_classes)
    best: list[list[float]] = []  # [validation accuracy, step] of the models in best/, best first
    seconds = 0.0  # of training, without pictures and validation
    sections = {section: asdict(getattr(settings, section)) for section in ("data", "model", "sgld", "train", "guard")}

    def state() -> dict[str, Any]:
        """What training goes on from after a rollback."""
        return {
            "learner": learner.state_dict(),
            "stream": stream.state_dict(),
            "scales": dict(guard.scales),
        }

    command = without_flags(argv, "--output_dir", "--resume")

    def restore(saved: dict[str, Any]) -> None:
        learner.load_state_dict(saved["learner"])
        stream.load_state_dict(saved["stream"])
        guard.scales = dict(saved["scales"])

    def save_checkpoint() -> None:
        if main_process:
            metrics_file.flush()
            os.fsync(metrics_file.fileno())
        checkpoints.save(
            learner.step,
            {
                "state": state(),
                "guard": guard.state_dict(),
                "best": best,
                "seconds": seconds,
                "metrics_bytes": metrics_file.tell() if main_process else 0,
                "sections": sections,
                "command": command,
            },
        )

    def keep_listed() -> None:
        """Remove what is in best/ and no longer one of the best, and models half written by a process that was killed."""
        listed = {f"step_{int(step):08d}" for _, step in best}
        for folder in [*(output_dir / "best").glob("*step_*"), *output_dir.glob(".model-*")]:
            if folder.name not in listed:
                shutil.rmtree(folder)

    # Where a run goes on: the newest whole checkpoint, or the one that was asked for.
    found: Path | None = None
    if settings.resume:
        found = None if settings.resume == "auto" else run_and_checkpoint(settings.resume)[1]
        if found is not None and (reason := damage(found)):
            raise InputError(f"checkpoint {found} can't be resumed: {reason}; give --resume {output_dir}")
        if found is None:
            found, notes = checkpoints.newest()
            for note in notes:
                accelerator.print(note)
        if found is None and (settings.resume != "auto" or summary_file.is_file()):
            raise InputError(f"{output_dir} has no whole checkpoint to go on from: start anew in another output_dir")
    metrics_bytes = 0
    if found is not None:
        files = rank_files(found)
        saved = load_tree(files[rank if len(files) == world else 0])
        if len(files) == world:
            restore(saved["state"])
        else:
            accelerator.print(
                f"{found} was written by {len(files)} processes and goes on with {world}: chains are dealt out anew, "
                f"their randomness starts afresh{', and the stream about where it was' * data.streaming}"
            )
            learner.load_state_dicts(
                len(files), lambda i: load_tree(files[i])["state"]["learner"], train.seed + 1000 * rank + 7919 * learner.step
            )
            stream.load_state_dict(saved["state"]["stream"], old_world=len(files))
        guard.load_state_dict(saved["guard"])
        best, seconds, command = saved["best"], saved["seconds"], saved["command"]
        metrics_bytes = broadcast_object_list([saved["metrics_bytes"]])[0]
        for line in differences(saved["sections"], sections):
            accelerator.print(f"note: {line}")
        accelerator.print(f"goes on from {found}, step {learner.step}")
        del saved

    if main_process:
        if hub.push_to is not None:
            make_repository(hub.push_to, private=hub.private)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {output_dir} can't be made ({one_line(error)}): give another") from error
        if found is not None:
            checkpoints.forget_after(learner.step)
        keep_listed()
        config.output_dir, config.resume = str(output_dir), None
        write_aside(output_dir / "config.yaml", lambda path: path.write_text(parser.dump(config), encoding="utf-8"))
        metrics_file = (output_dir / "metrics.jsonl").open("ab")
        metrics_file.truncate(min(metrics_bytes, metrics_file.tell()))  # what came after the checkpoint comes again
        metrics_file.seek(0, os.SEEK_END)
        parameters = sum(p.numel() for p in jem.parameters())
        images = "a stream of images" if data.streaming else f"{len(splits.train)} images"
        if splits.labeled is not None and not data.streaming:
            images += f" ({len(splits.labeled)} with labels)"
        print(
            f"{model.name} ({parameters:,} parameters) on {data.dataset}: {images} to train on, "
            f"{len(splits.val)} for validation, {len(splits.test)} for the test; writing to {output_dir}"
        )
    if train.trackers:
        accelerator.project_configuration.logging_dir = str(output_dir)
        accelerator.init_trackers("tracking", config=None)

    def describe(whole: JEM, results: list[dict[str, Any]]) -> None:
        """What the model and its card say of how it came to be."""
        whole.provenance = {
            "dataset": data.dataset,
            "command": shlex.join(["accelerate", "launch", "recipes/train.py", *command]),
            "config": sections,
            "steps": learner.step,
            "seed": train.seed,
            "seconds": seconds,
            "rollbacks": guard.rollbacks,
            "versions": {"timm_jem": timm_jem.__version__, "timm": timm.__version__, "torch": torch.__version__},
            "results": results,
        }
        if hub.replay_buffer and energies:
            whole.chains = PublishedChains.of_pixels(buffer.chains, buffer.labels)

    def publish(whole: JEM, message: str) -> None:
        url = whole.push_to_hub(
            hub.push_to,
            commit_message=message,
            private=hub.private,
            pictures={name: output_dir / name for name in PICTURES if (output_dir / name).is_file()},
        )
        progress.write(f"pushed to {url}")

    def log(metrics: dict[str, Any]) -> None:
        metrics_file.write((json.dumps({"step": learner.step, **metrics}) + "\n").encode())
        metrics_file.flush()
        accelerator.log({name: value for name, value in metrics.items() if isinstance(value, float)}, step=learner.step)

    def keep_best(val_accuracy: float) -> None:
        """best/ holds the models of the highest validation accuracies so far."""
        nonlocal best
        best = sorted([*best, [val_accuracy, learner.step]], key=lambda entry: (-entry[0], entry[1]))[: train.best_k]
        if [val_accuracy, learner.step] in best:
            whole = whole_model()
            if main_process:
                describe(whole, [])
                whole.save_pretrained(output_dir / "best" / f"step_{learner.step:08d}", replay_buffer=False)
        if main_process:
            keep_listed()

    def roll_back(problem: str) -> bool:
        """To the last good snapshot; False where that was the last time."""
        broke_at, remedy_so_far = learner.step, learner.remedy
        nonlocal best
        step, saved = guard.last_good()
        restore(saved)
        best = [entry for entry in best if entry[1] <= step]  # later ones come again
        if main_process:
            keep_listed()
        number = len(guard.rollbacks)
        if number == settings.guard.max_rollbacks:
            return False
        remedy = settings.guard.ladder[min(number, len(settings.guard.ladder) - 1)]
        learner.remedy = remedy_so_far
        learner.apply(remedy, train.seed + 1000 * rank + 1_000_000 * (number + 1))
        event = {"step": broke_at, "to_step": step, "reason": problem, "remedy": str(remedy)}
        guard.rollbacks.append(event)
        progress.n = step
        progress.refresh()
        progress.write(f"step {broke_at}: {problem}; back to step {step} with {remedy}, other chains")
        if main_process:
            log({"step": broke_at, "event": "rollback", **event})
        return True

    progress = tqdm(total=train.steps, initial=learner.step, desc="training", unit="it")
    signals = catch_signals()
    explanation = None
    guard.keep(learner.step, state())
    prepared.train()
    start = time.perf_counter()
    while learner.step < train.steps:
        terms = learner.iterate([next(stream) for _ in range(train.grad_accum)])
        guard.observe(terms)
        step = learner.step
        progress.update()

        def due(every: int, step: int = step) -> bool:
            return every > 0 and step % every == 0

        last = step == train.steps
        look, checkpoint = due(settings.guard.check_every), due(train.checkpoint_every) or last
        logging, sampling, validating = due(train.log_every) or last, due(train.sample_every), due(train.eval_every)
        pushing = hub.push_to is not None and due(hub.every) and not last
        stop = signals[:1]
        if world > 1:  # all stop at the same step, and agreeing waits for the device
            stop = gather_object(stop)[:1] if look or last else []
        if not (look or checkpoint or logging or sampling or validating or pushing or stop):
            continue
        # Nothing is logged, kept or shown of training that broke.
        problem = guard.problem(early=not look)
        if problem is not None:
            if roll_back(problem):
                continue
            explanation = (
                f"gave up after {len(guard.rollbacks)} rollbacks at step {step}: {problem}; lower train.lr or sgld.noise_std, "
                "raise train.objective.energy_l2 or sgld.num_steps, or take a smooth activation"
            )
            break
        if look:
            guard.close()
        if logging and main_process:
            values = {name: term.item() for name, term in terms.items()}
            log({"lr": optimizer.param_groups[0]["lr"], **values})
            progress.set_postfix({name: f"{values[name]:.3g}" for name in ("loss", "ce", "gap", "gap_xy") if name in values})
        pause = time.perf_counter()
        if sampling and (main_process or sharded):
            draw_fresh(learner.averaged, f"samples_{step:06d}.png")
            if main_process:
                draw_buffer()
        if validating:
            metrics = evaluate(splits.val, "val")
            if main_process:
                log(metrics)
            if train.best_k:
                keep_best(metrics["val_accuracy"])
        if pushing:
            whole = whole_model()
            if main_process:
                describe(whole, [])
                try:
                    publish(whole, f"Step {step}")
                except InputError as error:
                    progress.write(f"step {step} was not pushed, training goes on: {error}")
        now = time.perf_counter()
        seconds, start = seconds + pause - start, now
        if checkpoint:
            guard.keep(step, state(), alone=True)  # as a resumed run, which has no other
            try:
                save_checkpoint()
            except InputError as error:
                progress.write(f"{error}; training goes on")
        elif due(settings.guard.snapshot_every):
            guard.keep(step, state())
        if stop:
            if not checkpoint:
                save_checkpoint()
            progress.close()
            accelerator.print(f"{stop[0].name}: stopped at step {step}; go on with --resume {output_dir}")
            accelerator.end_training()
            sys.exit(128 + stop[0])
    progress.close()
    stream.close()
    seconds += time.perf_counter() - start
    release_signals()

    # How long fresh chains should be is chosen on validation images; test images are only reported on.
    whole = whole_model().eval()
    whole.sgld = replace(learner.sgld_now(), sample_steps=None)
    if learner.remedy.num_steps != 1:
        lengths = [n * whole.sgld.num_steps for n in train.sample_steps if n * whole.sgld.num_steps > sgld.denoise_steps]
    figures = {**evaluate(splits.val, "val"), **evaluate(splits.test, "test")}
    if not main_process:
        accelerator.end_training()
        return
    val_images = to_pixels(torch.cat([images for images, _ in batches(splits.val, workers)]))
    best_length, distances = best_num_steps(
        whole,
        val_images,
        torch.arange(train.sample_count) % num_classes,
        lengths,
        generator=torch.Generator(device).manual_seed(train.seed),
    )
    whole.sgld = replace(whole.sgld, sample_steps=best_length)
    summary = {
        "outcome": "finished" if explanation is None else "stopped",
        "explanation": explanation,
        **figures,
        "steps": learner.step,
        "seconds": seconds,
        "seconds_per_step": seconds / max(learner.step, 1),
        "rollbacks": guard.rollbacks,
        "best": [{"val_accuracy": value, "model": f"best/step_{int(step):08d}"} for value, step in best],
        "sample_steps": best_length,
        "val_frechet_by_steps": distances,
    }
    describe(
        whole,
        [
            {
                "name": name,
                "type": kind,
                "value": summary[f"test_{kind}"],
                "split": "test",
                "n": len(splits.test),
                "protocol": f"{protocol}; seed {train.seed}, {learner.step} steps, one run",
            }
            for name, kind, protocol in (
                ("Accuracy", "accuracy", "top-1"),
                ("Expected calibration error", "ece", "15 equal bins, L1"),
            )
        ],
    )
    draw_fresh(whole, "samples.png")
    draw_buffer()
    whole.save_pretrained(output_dir / "model")
    write_aside(summary_file, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    metrics_file.close()
    print(
        f"test accuracy {summary['test_accuracy']:.4f}, ECE {summary['test_ece']:.4f}, "
        f"{seconds:.0f} s of training{f', rolled back {n} times' if (n := len(guard.rollbacks)) else ''}; "
        f"look at {output_dir / 'samples.png'}"
    )
    if explanation is not None:
        raise InputError(f"training {explanation}; the last good model, of step {learner.step}, is in {output_dir / 'model'}")
    if hub.push_to is not None:
        try:
            publish(whole, f"{model.name} after {learner.step} steps on {data.dataset}")
        except InputError as error:
            raise InputError(f"{error}; the run is whole: python recipes/push.py {output_dir} {hub.push_to}") from error
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        # One that a loader's process raised comes with that process's traceback, its own line last.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('timm_jem.errors.InputError: ')}")
    except RuntimeError as error:
        if not (torch.distributed.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl"))):
            raise
        sys.exit(f"error: another process of this run has ended ({one_line(error)}); go on with --resume")
    except OSError as error:
        sys.exit(f"error: {one_line(error)}; what was written before is whole: mend it and go on with --resume")
