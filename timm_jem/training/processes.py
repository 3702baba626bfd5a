"""The processes of a run: started, seeded, and refused where they can't train jointly."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env, set_seed

from timm_jem.errors import InputError
from timm_jem.files import cores
from timm_jem.heap import keep_freed_memory
from timm_jem.model import JEM
from timm_jem.training.precision import measured_precision, precision_of
from timm_jem.training.settings import TrainConfig

__all__ = ["in_measured_precision", "is_sharded", "local_processes", "open_accelerator", "refuse_unsupported"]

# Others wait while one process draws, saves or uploads.
_PROCESS_GROUP = InitProcessGroupKwargs(timeout=timedelta(hours=2))


def open_accelerator(train: TrainConfig) -> Accelerator:
    """The accelerator of a run, with global seeds and CPU threads set, in a process that keeps the memory that it frees.

    Args:
        train: its ``mixed_precision`` becomes the launcher's where it leaves it to that, so that it is kept with the run.
            "auto" becomes the device's, or stays on CPUs, where :func:`in_measured_precision` needs a network to time.

    Raises:
        InputError: what ``accelerate launch`` offers and joint training can't use.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # before accelerate asks for it to be installed
        raise InputError("DeepSpeed gives no gradients for images, which SGLD needs: use DDP, or FSDP with fsdp_version: 2")
    why = None
    if train.mixed_precision == "auto":
        device = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), **_PROCESS_GROUP.to_kwargs()).device
        if device.type != "cpu":
            train.mixed_precision, why = broadcast_object_list([*precision_of(device)])
    accelerator = _accelerator(train)
    refuse_unsupported(accelerator)
    if why is not None:
        _say(accelerator, train, why)
    if train.mixed_precision != "auto":
        train.mixed_precision = accelerator.mixed_precision
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(accelerator):
        accelerator.print("note: accelerate shards on GPUs only; here each process has the whole model")
    keep_freed_memory()
    set_seed(train.seed)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(train.threads or max(1, cores() // local_processes()))
    return accelerator


def in_measured_precision(accelerator: Accelerator, train: TrainConfig, jem: JEM) -> Accelerator:
    """The accelerator to prepare ``jem`` with: the same one, unless ``train.mixed_precision`` is still "auto".

    accelerate is told the precision when an accelerator is made, before there is a network; on CPUs, where nothing is
    sharded, a second one can take the place of the first. All processes measure at once, as they train, and go by the main
    process, whose answer ``train.mixed_precision`` becomes.
    """
    if train.mixed_precision != "auto":
        return accelerator
    train.mixed_precision, why = broadcast_object_list([*measured_precision(jem, train)])
    _say(accelerator, train, why)
    AcceleratorState._reset_state()
    return _accelerator(train)


def _accelerator(train: TrainConfig) -> Accelerator:
    return Accelerator(
        mixed_precision="no" if train.mixed_precision == "auto" else train.mixed_precision,
        log_with=train.trackers or None,
        project_dir="runs" if train.trackers else None,
        kwargs_handlers=[_PROCESS_GROUP],
    )


def _say(accelerator: Accelerator, train: TrainConfig, why: str) -> None:
    accelerator.print(f"note: train.mixed_precision auto is {train.mixed_precision}: {why}")


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
