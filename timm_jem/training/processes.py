"""The processes of a run: started, seeded, and refused where they can't train jointly."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from timm_jem.errors import InputError
from timm_jem.files import cores
from timm_jem.training.settings import TrainConfig

__all__ = ["in_precision", "is_sharded", "local_processes", "open_accelerator", "refuse_unsupported"]


def open_accelerator(train: TrainConfig) -> Accelerator:
    """The accelerator of a run, with global seeds and CPU threads set.

    Args:
        train: its ``mixed_precision`` becomes the launcher's where it leaves it to that, so that it is kept with the run.
            "auto" stays, until :func:`timm_jem.training.build.build_learner` has a network to time.

    Raises:
        InputError: what ``accelerate launch`` offers and joint training can't use.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # before accelerate asks for it to be installed
        raise InputError("DeepSpeed gives no gradients for images, which SGLD needs: use DDP, or FSDP with fsdp_version: 2")
    auto = train.mixed_precision == "auto"
    accelerator = _accelerator(train, "no" if auto else train.mixed_precision)
    refuse_unsupported(accelerator)
    if not auto:
        train.mixed_precision = accelerator.mixed_precision
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(accelerator):
        accelerator.print("note: accelerate shards on GPUs only; here each process has the whole model")
    set_seed(train.seed)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(train.threads or max(1, cores() // local_processes()))
    return accelerator


def in_precision(accelerator: Accelerator, train: TrainConfig, name: str) -> Accelerator:
    """An accelerator of the same processes that prepares networks for ``name``, "no" or "bf16".

    accelerate is told the precision when an accelerator is made, which here is before there is a network.
    """
    if accelerator.mixed_precision == name:
        return accelerator
    AcceleratorState._reset_state()
    return _accelerator(train, name)


def _accelerator(train: TrainConfig, mixed_precision: str | None) -> Accelerator:
    return Accelerator(
        mixed_precision=mixed_precision,
        log_with=train.trackers or None,
        project_dir="runs" if train.trackers else None,
        # Others wait while one process draws, saves or uploads.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )


def local_processes() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights only."""
    return accelerator.distributed_type.value == "FSDP"


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Raise an InputError for what ``accelerate launch`` offers and joint training can't use.

    SGLD takes gradients with respect to images through the prepared model, which DeepSpeed and Megatron don't give; fp16's
    gradient scaler covers ``backward`` only, so that the chains' gradients would underflow.
    """
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise InputError(f"{kind} gives no gradients for images, which SGLD needs: use DDP, or FSDP with fsdp_version: 2")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        raise InputError("FSDP 1 gives wrong gradients for images, which SGLD needs: set fsdp_version: 2")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(
            f"{accelerator.mixed_precision} is not for SGLD: the gradient scaler does not cover the chains' gradients, "
            "which underflow; use bf16, no or auto"
        )
