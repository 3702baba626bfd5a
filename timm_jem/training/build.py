"""Settings to objects: model, learner and stream of a run."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed
from safetensors import SafetensorError
from timm.models import group_modules, group_parameters, load_checkpoint
from timm.models._hub import save_config_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_jem.backbone import label_names
from timm_jem.data import Splits
from timm_jem.data.loader import default_workers
from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import replaced_file
from timm_jem.hub.reading import CONFIG_FILE, WEIGHTS_FILE
from timm_jem.model import JEM
from timm_jem.modes import batch_norms
from timm_jem.noise import uniform_noise
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.training.batches import Batches
from timm_jem.training.learner import Learner
from timm_jem.training.memory import in_bytes, memory_of
from timm_jem.training.method import MaximumLikelihood, Method
from timm_jem.training.processes import in_measured_precision, local_processes
from timm_jem.training.sam import SAM
from timm_jem.training.settings import Settings, TrainConfig
from timm_jem.training.starts import class_gaussians, image_starts
from timm_jem.training.unseen import unseen_pixels, why_unseen
from timm_jem.wrap import create_model

__all__ = ["build_learner", "build_method", "build_model", "build_stream", "frozen_parts", "keep_source", "workers_of"]

_FUSED = ("adagrad", "adam", "adamw", "momentum", "nesterov", "sgd")  # of timm's names those of PyTorch that can be

# What timm's configuration of a model says of its published weights, and what holds for weights trained from them, too.
_OF_WEIGHTS = {"url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag"}
_INHERITED = {"license", "description", "origin_url", "paper_name", "paper_ids", "notes"}


def workers_of(train: TrainConfig) -> int:
    """Processes that decode images, for each training process."""
    return default_workers(local_processes()) if train.workers is None else train.workers


def build_model(
    settings: Settings,
    splits: Splits,
    device: torch.device,
    *,
    kept: Path | None = None,
    classifier: Path | None = None,
) -> JEM:
    """The joint energy model for the data, tried on two images.

    Args:
        settings, splits, device: the run's.
        kept: of a run that goes on: the folder where :func:`keep_source` may have left what its backbone was made from. No
            pretrained weights are loaded then, as its checkpoint has all of them.
        classifier: a folder with the model whose weights to start from: the same backbone, trained by cross-entropy.

    Raises:
        InputError: a backbone that can't be built, can't take such images, or does not look at all of their pixels; a
            classifier that is another.
    """
    model, name = settings.model, settings.model.name
    if kept is not None and (kept / CONFIG_FILE).is_file():
        name = f"local-dir:{kept}"
    pretrained = model.starts_pretrained and kept is None
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        for file in (CONFIG_FILE, WEIGHTS_FILE) if pretrained else (CONFIG_FILE,):
            if not (folder / file).is_file():
                raise InputError(f"model.name is {name}, and there is no {file} in it: give a folder with a saved model")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is a joint energy model and these are its weights alone")  # as is meant
        warnings.filterwarnings("ignore", ".* does not look at .* of the pixels")  # see below
        jem = create_model(
            name,
            pretrained,
            input_size=splits.image_shape,
            class_names=splits.class_names,
            sgld=settings.sgld,
            num_classes=len(splits.class_names),
            **{name: rate for name in ("drop_rate", "drop_path_rate") if (rate := getattr(model, name))},
            **model.kwargs,
        )
    known = label_names(jem.backbone) if pretrained else None
    if known is not None and known != splits.class_names:  # as many others, or in another order: timm keeps such a head
        jem.backbone.reset_classifier(jem.num_classes)
    jem = jem.to(device)
    if classifier is not None:
        try:
            load_checkpoint(jem.backbone, str(classifier / WEIGHTS_FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"{classifier} has no weights of {model.name} ({one_line(error)}): remove it, and --resume makes it again"
            ) from error
    foreign = _OF_WEIGHTS if model.starts_pretrained else _OF_WEIGHTS | _INHERITED
    jem.backbone.pretrained_cfg = {key: value for key, value in jem.backbone.pretrained_cfg.items() if key not in foreign}
    # What training does to images of another size, for whoever makes timm's transform of it.
    jem.data_config |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
    jem = jem.to(memory_format=torch.channels_last) if settings.train.channels_last else jem
    unseen = unseen_pixels(jem, splits.image_shape)
    if unseen.any() and settings.train.objective.needs_chains:
        raise InputError(why_unseen(model.name, jem, unseen))
    return jem


def keep_source(settings: Settings, jem: JEM, folder: Path) -> None:
    """Leave in ``folder`` what rebuilds a backbone that came from elsewhere, so that a run that goes on needs no more."""
    if settings.model.has_source:
        folder.mkdir(exist_ok=True)
        try:
            with replaced_file(folder / CONFIG_FILE) as aside:
                save_config_for_hf(jem.backbone, aside)
        except (TypeError, ValueError) as error:
            raise InputError(f"{settings.model.name} could not be saved for timm in the end ({one_line(error)})") from error


def build_learner(
    settings: Settings,
    splits: Splits,
    accelerator: Accelerator,
    *,
    kept: Path | None = None,
    classifier: Path | None = None,
) -> Learner:
    """Model, optimiser, schedule, moving average and method, prepared for the processes there are.

    Args:
        settings, splits, accelerator: the run's. Where ``train.mixed_precision`` is "auto" still, the learner has another
            accelerator; see :func:`timm_jem.training.processes.in_measured_precision`.
        kept, classifier: see :func:`build_model`.

    Raises:
        InputError: settings that timm refuses, or that leave nothing to train.
    """
    train, device, rank = settings.train, accelerator.device, accelerator.process_index
    jem = build_model(settings, splits, device, kept=kept, classifier=classifier)
    init = None
    if train.init == "gaussian" and train.objective.needs_chains:
        jem.starts = class_gaussians(splits, workers_of(train))
    elif settings.data.starts is not None and train.objective.needs_chains:
        init, jem.starts = image_starts(settings, splits, device)
    still = frozen_parts(jem.backbone, train.freeze)
    try:
        optimizer = create_optimizer_v2(
            jem.backbone, opt=train.opt, lr=train.lr, weight_decay=train.weight_decay, **_in_one_kernel(train, device)
        )
    except (ArithmeticError, AssertionError, ImportError, LookupError, TypeError, ValueError) as error:  # some want CUDA
        raise InputError(
            f"train.opt is {quoted(train.opt)} ({one_line(error)}): give one of timm.optim.list_optimizers() and its own "
            "opt_kwargs"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"train.opt {train.opt} needs second derivatives, which training doesn't take: give another one")
    ema = ModelEmaV3(jem, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None
    accelerator = in_measured_precision(accelerator, train, jem)
    if train.compile is not None:
        jem.backbone.compile(mode=train.compile)
    prepared, optimizer = accelerator.prepare(jem, optimizer)
    prepared.train()
    for module in still:
        module.eval()
    smallest = min(train.batch_size, train.ce_batch_size or train.batch_size)
    if smallest == 1 and train.batch_norm != "frozen" and batch_norms(jem):
        raise InputError(
            f"a batch of 1 image leaves BatchNorm in {settings.model.name} nothing to normalise by: raise train.batch_size, "
            "or set train.batch_norm frozen"
        )
    set_seed(train.seed + rank)  # all were built alike; dropout differs
    scheduler = _scheduler(train, optimizer)
    # Chains differ by process; so does the noise.
    chain_rng, noise_rng = (torch.Generator(device).manual_seed(train.seed + 1000 * rank + i) for i in (1, 2))
    method = build_method(settings, splits, jem, chain_rng, init)
    return Learner(
        accelerator,
        prepared,
        jem,
        optimizer,
        scheduler,
        method,
        generator=noise_rng,
        grad_clip=train.grad_clip,
        sam=SAM(train.sam_rho, train.sam_adaptive) if train.sam_rho else None,
        ema=ema,
    )


def _in_one_kernel(train: TrainConfig, device: torch.device) -> dict[str, Any]:
    """``opt_kwargs``, with PyTorch's own optimisers fused: on CPUs, where that isn't their default, a step takes a quarter."""
    ways = {"fused", "foreach", "differentiable"}
    fused = device.type == "cpu" and train.opt.lower() in _FUSED and not ways & set(train.opt_kwargs)
    return train.opt_kwargs | ({"fused": True} if fused else {})


def build_method(
    settings: Settings, splits: Splits, jem: JEM, generator: torch.Generator, init: Callable[..., Tensor] | None = None
) -> Method:
    """Maximum likelihood, with its replay buffer, whose randomness is ``generator``; cross-entropy alone has none.

    Chains start by ``init``, as of :class:`timm_jem.ReplayBuffer`; None: where the model's own do.
    """
    train, num_classes = settings.train, len(splits.class_names) if settings.train.needs_classes else None
    if train.batch_norm == "train" and train.objective.needs_chains and batch_norms(jem):
        warnings.warn(
            "train.batch_norm is 'train': chains move by batch statistics, so the density that is sampled in training is "
            "not the one that energies, evaluation and new samples use",
            stacklevel=2,
        )
    return MaximumLikelihood(
        jem,
        _buffer(settings, splits, jem, num_classes, generator, init) if train.objective.needs_chains else None,
        sgld=settings.sgld,
        objective=train.objective,
        batch_norm=train.batch_norm,
        class_frequencies=splits.class_frequencies if train.needs_classes else None,
        ramp_from=train.ramp_from,
        ramp_steps=train.ramp_steps,
        ramp_auc=train.ramp_auc,
        step_cosine=train.step_cosine,
        grad_accum=train.grad_accum,
        attack=train.attack(),
        balance=train.balance,
        capture=_captures(train, generator.device),
    )


def _captures(train: TrainConfig, device: torch.device) -> bool:
    # torch.compile's other modes capture graphs of their own, and what several processes exchange has not been tried in one.
    if not (train.capture and train.objective.needs_chains and device.type == "cuda" and train.compile in (None, "default")):
        return False
    return PartialState().distributed_type == DistributedType.NO


def frozen_parts(backbone: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules of ``names``, whose parameters get no gradients from here on. To keep their BatchNorm statistics, too, put
    them in eval mode; timm.utils.freeze exchanges these layers for others, which plain timm would not rebuild.

    Args:
        backbone: a timm model.
        names: of its modules; "stem" is what timm takes for it where no module has that name.

    Raises:
        InputError: a name that is none, or nothing left to train.
    """
    modules, found = dict(backbone.named_modules()), []
    for name in names:
        if name in modules and name:
            found.append(modules[name])
            parameters = list(modules[name].parameters())
        elif name == "stem" and hasattr(backbone, "group_matcher"):
            matcher = backbone.group_matcher(coarse=True)
            found += [modules[module] for module in group_modules(backbone, matcher)[0]]
            parameters = [backbone.get_parameter(name) for name in group_parameters(backbone, matcher)[0]]
        else:
            parts = ["stem"] + [name for name, part in backbone.named_children() if any(True for _ in part.parameters())]
            raise InputError(
                f"train.freeze has {quoted(name)}: give some of {', '.join(dict.fromkeys(parts))}, or of their parts"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise InputError(f"train.freeze is {', '.join(names)}, which leaves nothing to train: leave some out")
    return found


def _buffer(
    settings: Settings,
    splits: Splits,
    jem: JEM,
    num_classes: int | None,
    generator: torch.Generator,
    init: Callable[..., Tensor] | None,
) -> ReplayBuffer:
    train, device = settings.train, generator.device
    needed, there = 4 * train.buffer_size * math.prod(splits.image_shape), memory_of(device)
    if needed > there:
        raise InputError(
            f"train.buffer_size is {train.buffer_size}, and so many chains take {in_bytes(needed)} of the {in_bytes(there)} "
            f"that {device.type} has: lower it, or data.image_size"
        )
    return ReplayBuffer(
        splits.image_shape,
        init=init or (uniform_noise if jem.starts is None else jem.starts.to(device)),
        generator=generator,
        capacity=train.buffer_size,
        restart_prob=train.restart_prob,
        restart_least=train.restart_least,
        num_classes=num_classes,
        device=device,
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
                "decay_epochs": math.ceil(train.steps / 3) if train.sched == "step" else None,  # None: as timm has it
                # timm decays at the update before a milestone.
                "decay_milestones": sorted(round(part * train.steps) + 1 for part in train.milestones),
                **train.sched_kwargs,
            },
        )
        scheduler.step_update(train.steps)  # some settings show what is wrong with them after the warm-up
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(
            f"train.sched {train.sched} does not fit its settings ({one_line(error)}): change train.sched_kwargs or "
            "train.warmup_steps"
        ) from error
    return scheduler
