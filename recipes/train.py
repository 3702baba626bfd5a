"""Train a joint energy model: cross-entropy plus maximum likelihood of x by SGLD (JEM, arXiv 1912.03263).

    accelerate launch recipes/train.py                                     # handwritten digits, nothing to download
    accelerate launch recipes/train.py --data.dataset cifar10 --model.name wrn_28_10
    accelerate launch recipes/train.py --config recipes/configs/cifar10_jem.yaml --output_dir runs/a

Without a data set and a config, recipes/configs/digits.yaml is used; otherwise the defaults are the paper's.
"""

import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed, tqdm
from jsonargparse import ArgumentError, ArgumentParser
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

import timm_jem
from timm_jem import Chains, InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.data import DataConfig, ImageSet, augment, load_splits, to_pixels
from timm_jem.errors import check_number, check_whole, one_line
from timm_jem.evaluation import accuracy, best_num_steps, expected_calibration_error, image_grid, predict
from timm_jem.hub import prepare
from timm_jem.models.names import check_name
from timm_jem.sampling import frozen, randn
from timm_jem.training import joint_step

DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class ModelConfig:
    """The backbone.

    Attributes:
        name: any timm name, or one of this package's wrn_*.
        pretrained: start from pretrained weights.
        num_classes: None: as many as the data has.
        kwargs: more arguments for timm.create_model, e.g. {act_layer: silu}. Those of a config are for its own model:
            a --model.name after it drops them.
    """

    name: str = "wrn_28_10"
    pretrained: bool = False
    num_classes: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """The training loop. Defaults are JEM's for CIFAR-10: 150 epochs, Adam, 1e-4, warm-up, ×0.3 at the end.

    Attributes:
        steps: iterations; 117,000 are 150 epochs of CIFAR-10.
        batch_size: images, and chains, per process and iteration.
        opt, lr, weight_decay: a timm optimiser and its settings.
        sched: how the learning rate falls after warmup_steps: cosine to 0, at milestones (parts of steps) by
            decay_rate, or not at all.
        grad_clip: bound of the gradient's norm; 0: none.
        data_noise: standard deviation of noise on the images while training, pixels. Chains can't be narrower than
            their own noise, so keep it above sgld.noise_std, or the energy sharpens without end.
        ce_noise: that of the images for the cross-entropy, or None: they are the same images.
        buffer_size, restart_prob: the replay buffer.
        objective: weights of the loss; w_xy > 0 gives class-conditional chains.
        seed: of weights, order and chains.
        mixed_precision: no or bf16.
        channels_last: memory layout of convolutions.
        threads: CPU threads of a process; None: this machine's cores divided among its processes, where
            ``accelerate launch`` by itself gives one.
        workers: processes that decode images, for data sets not kept in memory.
        log_every, sample_every, eval_every: iterations between lines of metrics.jsonl, pictures and validations;
            0: only at the end.
        sample_steps: lengths tried on validation images for fresh chains, in multiples of sgld.num_steps.
        sample_count: how many chains for that.
    """

    steps: int = 117_000
    batch_size: int = 64
    opt: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    sched: Literal["cosine", "multistep", "constant"] = "multistep"
    warmup_steps: int = 1000
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    decay_rate: float = 0.3
    grad_clip: float = 0.0
    data_noise: float = 0.03
    ce_noise: float | None = None
    buffer_size: int = 10_000
    restart_prob: float = 0.05
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    channels_last: bool = True
    threads: int | None = None
    workers: int = 2
    log_every: int = 50
    sample_every: int = 5000
    eval_every: int = 5000
    sample_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 7, 10, 15, 20])
    sample_count: int = 500

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "log_every": 1, "sample_count": 2, "seed": 0, "workers": 0}
        least |= {"warmup_steps": 0, "sample_every": 0, "eval_every": 0, "buffer_size": 1}
        for name, value in least.items():
            check_whole(f"train {name}", getattr(self, name), value)
        if self.threads is not None:
            check_whole("train threads", self.threads, 1)
        for name in ("lr", "weight_decay", "grad_clip", "data_noise", "decay_rate"):
            check_number(f"train {name}", getattr(self, name), least=0)
        if self.ce_noise is not None:
            check_number("train ce_noise", self.ce_noise, least=0)
        for milestone in self.milestones:
            check_number("train milestones", milestone, least=0, most=1)
        if not self.sample_steps or min(self.sample_steps) < 1:
            raise InputError("train sample_steps must be a list of whole numbers of at least 1")


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
    parser.add_argument("--hub", type=HubConfig, default=HubConfig())
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: runs/<data set>, numbered")
    flags = [word.split("=")[0] for word in argv]
    if not {"--config", "--data.dataset", "--data"} & set(flags):
        argv = ["--config", str(DIGITS_CONFIG), *argv]
    if "--model.name" in flags and not any(flag.startswith("--model.kwargs") for flag in flags):
        argv = [*argv, "--model.kwargs={}"]
    try:
        config = parser.parse_args(argv)
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())}; recipes/train.py --help lists the settings") from error
    return parser, config, parser.instantiate(config)


def choose_output_dir(output_dir: str | None, dataset: str) -> Path:
    """The given folder, which must be empty, or the first free runs/<data set>, runs/<data set>-2, ..."""
    if output_dir is None:
        stem = Path("runs") / Path(dataset).stem
        return next(p for n in count(1) if not (p := stem if n == 1 else Path(f"{stem}-{n}")).exists())
    path = Path(output_dir)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"output_dir {path} holds another run or other files: give a new folder")
    return path


def without_flag(argv: list[str], flag: str) -> list[str]:
    """``argv`` without ``flag`` and its value: where a run was written is nobody else's concern."""
    return [word for i, word in enumerate(argv) if word.split("=")[0] != flag and (i == 0 or argv[i - 1] != flag)]


def write_aside(path: Path, write) -> None:
    """``write(temporary path)``, then rename: the file is there whole, or as before."""
    aside = path.with_name(f".{path.name}")
    write(aside)
    os.replace(aside, path)


def batches(data: ImageSet, config: TrainConfig, *, train: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_size=config.batch_size if train else 256,
        shuffle=train,
        drop_last=train,
        collate_fn=lambda batch: batch,  # an ImageSet already gives batches
        num_workers=config.workers if data.images is None else 0,
        persistent_workers=train and data.images is None and config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(config.seed),
    )


def main(argv: list[str]) -> None:
    parser, config, settings = parse(argv)
    data, model, sgld, train, hub = settings.data, settings.model, settings.sgld, settings.train, settings.hub
    accelerator = Accelerator(mixed_precision=train.mixed_precision)
    device, rank = accelerator.device, accelerator.process_index
    set_seed(train.seed)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(train.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    # Everything that can be wrong with the input is found here, before anything is written.
    output_dir = broadcast_object_list([choose_output_dir(settings.output_dir, data.dataset)])[0]
    check_name(model.name)
    lengths = [n * sgld.num_steps for n in train.sample_steps if n * sgld.num_steps > sgld.denoise_steps]
    if not lengths:
        raise InputError(f"no train.sample_steps is longer than sgld.denoise_steps {sgld.denoise_steps}: give longer ones")
    splits = load_splits(data)
    num_classes = len(splits.class_names)
    if model.num_classes not in (None, num_classes):
        raise InputError(f"model.num_classes is {model.num_classes} and {data.dataset} has {num_classes} classes: leave it out")
    if taken := {"num_classes", "input_size", "class_names", "sgld"} & set(model.kwargs):
        raise InputError(f"model.kwargs has {', '.join(sorted(taken))}, which the data and other sections give: leave it out")
    together = train.batch_size * accelerator.num_processes
    if len(splits.train) < together:
        raise InputError(f"train.batch_size of all processes is {together} with {len(splits.train)} training images: lower it")
    if len(splits.val) < 2:
        raise InputError(f"{len(splits.val)} validation images can choose nothing: raise data.val_fraction")
    conditional = train.objective.w_xy > 0
    largest = int(splits.train.labels.bincount().max()) if conditional else len(splits.train)
    wanted = min(train.batch_size, largest)
    needed = wanted * num_classes if conditional else wanted
    if train.buffer_size < needed:
        raise InputError(
            f"train.buffer_size is {train.buffer_size}, and a batch may need {wanted} chains{' of one class' * conditional}: "
            f"raise it to {needed}, or lower train.batch_size"
        )
    jem = timm_jem.create_model(
        model.name,
        model.pretrained,
        input_size=splits.image_shape,
        class_names=splits.class_names,
        sgld=sgld,
        num_classes=num_classes,
        **model.kwargs,
    ).to(device)
    jem.data_config["crop_pct"] = 1.0  # trained on whole images
    if train.channels_last:
        jem = jem.to(memory_format=torch.channels_last)
    try:
        with frozen(jem):
            jem.energy(torch.zeros(2, *splits.image_shape, device=device, dtype=jem.dtype))
    except RuntimeError as error:
        raise InputError(
            f"{model.name} can't take images of {splits.image_shape} ({one_line(error)}): give --data.image_size"
        ) from error

    try:
        optimizer = create_optimizer_v2(jem.backbone, opt=train.opt, lr=train.lr, weight_decay=train.weight_decay)
    except ValueError as error:
        raise InputError(f"train.opt is {train.opt!r} ({one_line(error)}): give one of timm.optim.list_optimizers()") from error
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=train.sched,
        num_epochs=train.steps,
        warmup_epochs=min(train.warmup_steps, train.steps),
        warmup_lr=0.0,
        decay_milestones=[round(part * train.steps) for part in train.milestones],
        decay_rate=train.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    prepared, optimizer, train_loader = accelerator.prepare(jem, optimizer, batches(splits.train, train, train=True))

    # Chains differ by process; so does the noise.
    chain_rng, noise_rng = (torch.Generator(device).manual_seed(train.seed + 1000 * rank + i) for i in (1, 2))
    buffer = ReplayBuffer(
        splits.image_shape,
        init=uniform_noise,
        generator=chain_rng,
        capacity=train.buffer_size,
        restart_prob=train.restart_prob,
        num_classes=num_classes if conditional else None,
        device=device,
    )

    def evaluate(data: ImageSet, name: str) -> dict[str, float]:
        logits, y = predict(jem, batches(data, train, train=False), desc=name)
        return {
            f"{name}_accuracy": accuracy(logits, y),
            f"{name}_ece": expected_calibration_error(logits.softmax(1), y),
        }

    def draw_fresh(name: str, num_steps: int | None = None) -> None:
        """Fresh chains from noise, none selected, one row for each of the first 20 classes."""
        classes = torch.arange(min(num_classes, 20), device=device)
        x = jem.sample(
            y=classes.repeat_interleave(10), num_steps=num_steps, generator=torch.Generator(device).manual_seed(train.seed)
        )
        picture = image_grid(jem.denormalize(x), 10, splits.class_names[: len(classes)])
        write_aside(output_dir / name, lambda path: picture.save(path, "png"))

    def draw_buffer() -> None:
        slots = torch.linspace(0, len(buffer) - 1, 100, device=device).long() if len(buffer) > 100 else slice(None)
        picture = image_grid(buffer.chains[slots], 10)
        write_aside(output_dir / "buffer.png", lambda path: picture.save(path, "png"))

    if accelerator.is_main_process:
        if hub.push_to is not None:
            prepare(hub.push_to, private=hub.private)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output_dir {output_dir} can't be made ({one_line(error)}): give another") from error
        config.output_dir = str(output_dir)
        write_aside(output_dir / "config.yaml", lambda path: path.write_text(parser.dump(config), encoding="utf-8"))
        metrics_file = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
        parameters = sum(p.numel() for p in jem.parameters())
        print(
            f"{model.name} ({parameters:,} parameters) on {data.dataset}: {len(splits.train)} images to train on, "
            f"{len(splits.val)} for validation, {len(splits.test)} for the test; writing to {output_dir}"
        )

    def describe(results: list[dict[str, Any]], seconds: float) -> None:
        """What the model and its card say of how it came to be."""
        jem.provenance = {
            "dataset": data.dataset,
            "command": shlex.join(["accelerate", "launch", "recipes/train.py", *without_flag(argv, "--output_dir")]),
            "config": {section: asdict(getattr(settings, section)) for section in ("data", "model", "sgld", "train")},
            "steps": step,
            "seed": train.seed,
            "seconds": seconds,
            "versions": {"timm_jem": timm_jem.__version__, "timm": timm.__version__, "torch": torch.__version__},
            "results": results,
        }
        if hub.replay_buffer and (train.objective.w_x or train.objective.w_xy):
            jem.chains = Chains.of_pixels(buffer.chains, buffer.labels)

    def publish(message: str) -> None:
        url = jem.push_to_hub(hub.push_to, commit_message=message, private=hub.private, pictures=output_dir)
        progress.write(f"pushed to {url}")

    def log(metrics: dict[str, float]) -> None:
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()

    progress = tqdm(total=train.steps, desc="training", unit="it")
    start = time.perf_counter()
    aside = 0.0  # seconds spent on pictures and validation
    step = 0
    prepared.train()
    while step < train.steps:
        for images, y in train_loader:
            u = augment(to_pixels(images), crop_padding=splits.crop_padding, flip=splits.flip, generator=noise_rng)
            u_ce = None if train.ce_noise is None else u + train.ce_noise * randn(u.shape, generator=noise_rng, device=device)
            terms = joint_step(
                prepared,
                jem,
                u,
                y,
                buffer,
                sgld_config=sgld,
                objective=train.objective,
                data_noise=train.data_noise,
                generator=noise_rng,
                u_ce=u_ce,
            )
            accelerator.backward(terms["loss"])
            if train.grad_clip:
                accelerator.clip_grad_norm_(prepared.parameters(), train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            scheduler.step_update(step)
            progress.update()

            if accelerator.is_main_process:
                if step % train.log_every == 0 or step == train.steps:
                    means = {name: term.item() for name, term in terms.items()}
                    if not math.isfinite(means["loss"]):
                        raise InputError(
                            f"training diverged by step {step}, its loss is {means['loss']}: lower train.lr or sgld.noise_std, "
                            "or raise train.objective.energy_l2"
                        )
                    log({"step": step, "lr": optimizer.param_groups[0]["lr"], **means})
                    progress.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
                pause = time.perf_counter()
                if train.sample_every and step % train.sample_every == 0:
                    draw_fresh(f"samples_{step:06d}.png")
                    draw_buffer()
                if train.eval_every and step % train.eval_every == 0:
                    log({"step": step, **evaluate(splits.val, "val")})
                if hub.push_to is not None and hub.every and step % hub.every == 0 and step < train.steps:
                    describe([], time.perf_counter() - start - aside)
                    try:
                        publish(f"Step {step}")
                    except InputError as error:
                        progress.write(f"step {step} was not pushed, training goes on: {error}")
                aside += time.perf_counter() - pause
            if step == train.steps:
                break
    progress.close()
    seconds = time.perf_counter() - start - aside

    if accelerator.is_main_process:
        jem.eval()
        # How long fresh chains should be is chosen on validation images; test images are only reported on.
        val_images = to_pixels(torch.cat([images for images, _ in batches(splits.val, train, train=False)]))
        best, distances = best_num_steps(
            jem,
            val_images,
            torch.arange(train.sample_count) % num_classes,
            lengths,
            generator=torch.Generator(device).manual_seed(train.seed),
        )
        jem.sgld = replace(sgld, sample_steps=best)
        summary = {
            **evaluate(splits.val, "val"),
            **evaluate(splits.test, "test"),
            "steps": step,
            "seconds": seconds,
            "seconds_per_step": seconds / step,
            "sample_steps": best,
            "val_frechet_by_steps": distances,
        }
        describe(
            [
                {
                    "name": name,
                    "type": kind,
                    "value": summary[f"test_{kind}"],
                    "split": "test",
                    "n": len(splits.test),
                    "protocol": f"{protocol}; seed {train.seed}, {step} steps, one run",
                }
                for name, kind, protocol in (
                    ("Accuracy", "accuracy", "top-1"),
                    ("Expected calibration error", "ece", "15 equal bins, L1"),
                )
            ],
            seconds,
        )
        draw_fresh("samples.png")
        draw_buffer()
        jem.save_pretrained(output_dir / "model")
        write_aside(output_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
        metrics_file.close()
        print(
            f"test accuracy {summary['test_accuracy']:.4f}, ECE {summary['test_ece']:.4f}, "
            f"{seconds:.0f} s of training; look at {output_dir / 'samples.png'}"
        )
        if hub.push_to is not None:
            try:
                publish(f"{model.name} after {step} steps on {data.dataset}")
            except InputError as error:
                raise InputError(f"{error}; the run is whole: python recipes/push.py {output_dir} {hub.push_to}") from error
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        # One that a loader's process raised comes with that process's traceback, its own line last.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('timm_jem.errors.InputError: ')}")
