"""Settings to objects: model, learner and stream of a run."""

import math
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch.utils.data import Subset

from timm_jem.data import Splits
from timm_jem.data.loader import default_workers
from timm_jem.errors import InputError, one_line
from timm_jem.gaussians import ClassGaussians
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.sampling import uniform_noise
from timm_jem.training.batches import Batches
from timm_jem.training.learner import Learner
from timm_jem.training.measure import in_batches
from timm_jem.training.method import MaximumLikelihood, Method
from timm_jem.training.processes import local_processes
from timm_jem.training.settings import Settings, TrainConfig
from timm_jem.wrap import create_model

__all__ = ["build_learner", "build_method", "build_model", "build_stream", "workers_of"]


def workers_of(train: TrainConfig) -> int:
    """Processes that decode images, for each training process."""
    return default_workers(local_processes()) if train.workers is None else train.workers


def build_model(settings: Settings, splits: Splits, device: torch.device) -> JEM:
    """The joint energy model for the data, tried on two images.

    Raises:
        InputError: a backbone that can't be built, or can't take such images.
    """
    model = settings.model
    jem = create_model(
        model.name,
        model.pretrained,
        input_size=splits.image_shape,
        class_names=splits.class_names,
        sgld=settings.sgld,
        num_classes=len(splits.class_names),
        **{name: rate for name in ("drop_rate", "drop_path_rate") if (rate := getattr(model, name))},
        **model.kwargs,
    ).to(device)
    jem.data_config["crop_pct"] = 1.0  # trained on whole images
    jem = jem.to(memory_format=torch.channels_last) if settings.train.channels_last else jem
    try:
        with frozen(jem):
            jem.energy(torch.zeros(2, *splits.image_shape, device=device, dtype=jem.dtype))
    except RuntimeError as error:
        raise InputError(
            f"{model.name} can't take images of {splits.image_shape} ({one_line(error)}): give --data.image_size"
        ) from error
    return jem


def build_learner(settings: Settings, splits: Splits, accelerator: Accelerator) -> Learner:
    """Model, optimiser, schedule, moving average and method, prepared for the processes there are.

    Raises:
        InputError: settings that timm refuses.
    """
    train, device, rank = settings.train, accelerator.device, accelerator.process_index
    jem = build_model(settings, splits, device)
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
    prepared.train()
    set_seed(train.seed + rank)  # all were built alike; dropout differs
    scheduler = _scheduler(train, optimizer)
    # Chains differ by process; so does the noise.
    chain_rng, noise_rng = (torch.Generator(device).manual_seed(train.seed + 1000 * rank + i) for i in (1, 2))
    method = build_method(settings, splits, jem, chain_rng)
    return Learner(
        accelerator, prepared, jem, optimizer, scheduler, method, generator=noise_rng, grad_clip=train.grad_clip, ema=ema
    )


def build_method(settings: Settings, splits: Splits, jem: JEM, generator: torch.Generator) -> Method:
    """Maximum likelihood, with its replay buffer, whose randomness is ``generator``."""
    train, device = settings.train, generator.device
    num_classes = len(splits.class_names) if train.needs_classes else None
    init = uniform_noise
    if train.init == "gaussian":
        count = min(len(splits.train), int(settings.data.cache_gib * 2**30) // math.prod(splits.image_shape))
        rows = torch.linspace(0, len(splits.train) - 1, max(count, 2)).long().tolist()  # all, where memory allows
        images = torch.cat([images for images, _ in in_batches(Subset(splits.train, rows), workers_of(train))])
        init = ClassGaussians.fit(images, splits.train.labels[rows], num_classes).to(device)
    buffer = ReplayBuffer(
        splits.image_shape,
        init=init,
        generator=generator,
        capacity=train.buffer_size,
        restart_prob=train.restart_prob,
        num_classes=num_classes,
        device=device,
    )
    if train.batch_norm == "train":
        warnings.warn(
            "train.batch_norm is 'train': chains move by batch statistics, so the density that is sampled in training is "
            "not the one that energies, evaluation and new samples use",
            stacklevel=2,
        )
    return MaximumLikelihood(
        jem,
        buffer,
        sgld=settings.sgld,
        objective=train.objective,
        batch_norm=train.batch_norm,
        class_frequencies=splits.class_frequencies if train.needs_classes else None,
        ramp_from=train.ramp_from,
        ramp_steps=train.ramp_steps,
    )


def build_stream(settings: Settings, splits: Splits, learner: Learner) -> Batches:
    """The run's batches, with the learner's noise.

    Raises:
        InputError: an augmentation policy that timm doesn't know.
    """
    train, accelerator = settings.train, learner.accelerator
    return Batches(
        splits,
        train.batch_size,
        generator=learner.generator,
        energies=train.objective.needs_chains,
        ce_batch_size=train.ce_batch_size,
        px_augment=train.px_augment,
        ce_auto_augment=train.ce_auto_augment,
        noise=train.data_noise,
        ce_noise=train.ce_noise,
        seed=train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers_of(train),
    )


def _scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer) -> Scheduler:
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
        raise InputError(f"train.sched {train.sched} does not fit its settings ({one_line(error)}): change them") from error
    return scheduler
