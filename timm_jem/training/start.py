"""What is about to happen, in words."""

import os

from timm_jem.data import Splits
from timm_jem.training.memory import in_bytes
from timm_jem.training.run import Run
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import Settings

__all__ = ["start_lines"]


def start_lines(told: Settings, settings: Settings, splits: Splits, run: Run, folder: RunFolder) -> str:
    """Data, network, length, place and memory of a run, a line each, and a note for each setting that is not as told.

    Args:
        told: what was asked for.
        settings: what :func:`timm_jem.training.check_plan` made of it.
        splits, run, folder: the run's.
    """
    accelerator, train = run.learner.accelerator, settings.train
    world = accelerator.num_processes
    together = train.batch_size * train.grad_accum * world
    epochs = "" if settings.data.streaming else f" ({train.steps * together / len(splits.train):,.3g} epochs)"
    processes = f"{world} process{'es' * (world > 1)}"
    return "\n".join(
        [
            f"data      {settings.data.dataset}: {splits.summary()}",
            f"model     {_model(settings, run, folder)}",
            f"training  {train.steps:,} steps of {together:,} images{epochs}, {train.warmup_steps:,} of them to warm up"
            f"{'' if train.objective.needs_chains else ', by cross-entropy alone'}; "
            f"{accelerator.device.type}, {processes}, {_precision(accelerator.mixed_precision)}",
            f"memory    {_memory(run)}",
            f"writes to {folder}",
            *(f"note: {note}" for note in _notes(told, settings, world)),
        ]
    )


def _model(settings: Settings, run: Run, folder: RunFolder) -> str:
    counts = [(p.numel(), p.requires_grad) for p in run.learner.jem.parameters()]
    frozen = sum(count for count, trained in counts if not trained)
    weights = ", from trained weights" if settings.model.starts_pretrained else ""
    weights = f", from {folder.classifier.model}" if folder.classifier.model.is_dir() else weights
    still = f", of which {frozen:,} stay as they are" if frozen else ""
    return f"{settings.model.name}, {sum(count for count, _ in counts):,} parameters{still}{weights}"


def _memory(run: Run) -> str:
    learner = run.learner
    parameters = sum(p.numel() * p.element_size() for p in learner.jem.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in learner.jem.parameters() if p.requires_grad)  # Adam's
    state, buffer = parameters * (1 + (learner.ema is not None)) + moments, learner.method.buffer
    chains = 0 if buffer is None else buffer.chains.nbytes
    kept = "no replay buffer" if buffer is None else f"replay buffer of {len(buffer):,} chains {in_bytes(chains)}"
    return (
        f"{kept}; about {in_bytes(2 * (state + chains))} of host memory for two snapshots to go back to, and "
        f"{in_bytes(state + chains)} of disk for a checkpoint"
    )


def _precision(name: str) -> str:
    return "fp32" if name == "no" else name


def _notes(told: Settings, settings: Settings, world: int) -> list[str]:
    train, notes = settings.train, []
    if told.train.warmup_steps not in (None, train.warmup_steps):
        asked = told.train.warmup_steps
        notes.append(f"train.warmup_steps {asked} would be the whole run of {train.steps} steps: it is {train.warmup_steps}")
    if told.train.buffer_size is None and train.objective.needs_chains and train.buffer_size < 10_000:
        notes.append(f"train.buffer_size is {train.buffer_size:,}, which take 1 GiB: set it to have more or fewer")
    if settings.hub.every and settings.hub.push_to is None:
        notes.append(f"hub.every {settings.hub.every} publishes nothing without hub.push_to")
    # accelerate launch starts one process on a CPU, however many it was asked for, and leaves this trace of it.
    if world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        notes.append(
            "one process trains, though accelerate launch was asked for several: on CPUs start them by "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return notes
