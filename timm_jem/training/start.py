"""What is about to happen, in words."""

import os
from operator import attrgetter

from timm_jem.data import Splits
from timm_jem.training.memory import in_bytes
from timm_jem.training.plan import images_of_an_epoch
from timm_jem.training.run import Run
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import Settings

__all__ = ["method_in_words", "start_lines", "without_effect"]

# But for buffer_size, which every run has a number of in its config.yaml.
_OF_CHAINS = ["px_augment", "restart_prob", "restart_least", "init", "conditional_chains", "ramp_from", "ramp_steps"]
_OF_CHAINS += ["ramp_auc", "step_cosine", "objective.contrast", "objective.energy_l2", "balance"]
_OF_CHAINS = [*(f"train.{name}" for name in _OF_CHAINS), "data.starts", "sgld.step_decay"]
_OF_ATTACKS = [f"train.attack_{name}" for name in ("eps", "steps", "step_size")]


def start_lines(told: Settings, settings: Settings, splits: Splits, run: Run, folder: RunFolder) -> str:
    """Data, network, method, length, place and memory of a run, a line each, and a note for each setting that is not as told,
    or does nothing.

    Args:
        told: what was asked for.
        settings: what :func:`timm_jem.training.check_plan` made of it.
        splits, run, folder: the run's.
    """
    accelerator, train = run.learner.accelerator, settings.train
    world = accelerator.num_processes
    together = train.batch_size * train.grad_accum * world
    epochs = ""
    if not settings.data.streaming:
        epochs = f" ({train.steps * together / images_of_an_epoch(settings, splits):,.3g} epochs)"
    processes = f"{world} process{'es' * (world > 1)}"
    captured = ", chains by a CUDA graph" if getattr(run.learner.method, "capture", False) else ""
    return "\n".join(
        [
            f"data      {settings.data.dataset}: {splits.summary()}",
            f"model     {_model(settings, run, folder)}",
            f"method    {method_in_words(settings)}",
            f"training  {train.steps:,} steps of {together:,} images{epochs}, {train.warmup_steps:,} of them to warm up; "
            f"{accelerator.device.type}, {processes}, {_precision(accelerator.mixed_precision)}{captured}",
            f"memory    {_memory(run)}",
            f"writes to {folder}",
            *(f"note: {note}" for note in _notes(told, settings, world)),
            # A classifier's run has joint training's settings, which are not meant for it.
            *(f"note: {note}" for note in without_effect(told) if folder.part_of is None),
        ]
    )


def method_in_words(settings: Settings) -> str:
    """The terms of the loss, and the chains' lengths and starts."""
    train, sgld, objective = settings.train, settings.sgld, settings.train.objective
    of = "" if (attack := train.attack()) is None else f" of attacked images ({attack.norm} {attack.eps:.3g})"
    contrast = {"linear": "likelihood", "softplus": "softplus contrast", "bce": "BCE contrast"}[objective.contrast]
    terms = {f"cross-entropy{of}": objective.w_ce, f"{contrast} of x": objective.w_x, f"{contrast} of (x, y)": objective.w_xy}
    terms["squared energies"] = objective.energy_l2 if objective.needs_chains else 0
    words = " + ".join(f"{weight:g} × {term}".removeprefix("1 × ") for term, weight in terms.items() if weight)
    if objective.needs_chains:
        elsewhere = "noise" if settings.data.starts is None else f"images of {settings.data.starts}"
        kind = "class-conditional " * train.needs_classes
        grows = f"{train.ramp_from} to " if train.ramp_steps or train.ramp_auc is not None else ""
        size = ", ".join(["of adapted size"] * (train.step_cosine is not None) + ["falling to 0"] * sgld.step_decay)
        place = "class Gaussians" if train.init == "gaussian" else elsewhere
        again = ", new ones each time" if train.restart_prob == 1 and train.restart_least is None else ""
        words += f"; {kind}chains of {grows}{sgld.num_steps} steps {f'({size}) ' * bool(size)}from {place}{again}"
        words += "; balanced gradients" * train.balance
    return words + "; sharpness-aware minimisation" * (train.sam_rho > 0)


def without_effect(told: Settings) -> list[str]:
    """Settings that are told, and that nothing asks for as the others are: a line for each reason."""
    usual, train = Settings(), told.train
    chains = train.objective.needs_chains
    first = ("classifier.steps", "classifier.epochs") if told.model.starts_pretrained else ()
    idle = {
        "the weights are trained already": first,
        "train.objective.w_x and w_xy are 0, and no chain moves": () if chains else _OF_CHAINS,
        "there is no train.attack_norm": _OF_ATTACKS if train.attack_norm is None else (),
        "train.sam_rho is 0": () if train.sam_rho else ("train.sam_adaptive",),
    }
    if chains and not train.ramp_steps and train.ramp_auc is None:
        idle["there is no train.ramp_steps or ramp_auc"] = ("train.ramp_from",)
    names = {why: [name for name in some if attrgetter(name)(told) != attrgetter(name)(usual)] for why, some in idle.items()}
    return [f"{', '.join(some)} {'do' if some[1:] else 'does'} nothing: {why}" for why, some in names.items() if some]


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
        f"{in_bytes(state + chains)} of disk for a checkpoint, up to three times that where the run is stopped"
    )


def _precision(name: str) -> str:
    return "fp32" if name == "no" else name


def _notes(told: Settings, settings: Settings, world: int) -> list[str]:
    train, notes, usual = settings.train, [], Settings()
    if (told.model.name, train.steps) == (usual.model.name, usual.train.steps):
        notes.append(
            f"{usual.model.name} and {usual.train.steps:,} steps are the paper's for CIFAR-10, days on a GPU; "
            "--config own_data is for small sets and folders"
        )
    if told.train.warmup_steps not in (None, train.warmup_steps):
        asked = told.train.warmup_steps
        notes.append(f"train.warmup_steps {asked} would be the whole run of {train.steps} steps: it is {train.warmup_steps}")
    if told.train.buffer_size is None and train.objective.needs_chains and train.buffer_size != 10_000:
        why = "as many of each class as a batch may need: lower train.batch_size to have fewer"
        if train.buffer_size < 10_000:
            why = "which take 1 GiB: set it to have more or fewer"
        notes.append(f"train.buffer_size is {train.buffer_size:,}, {why}")
    if settings.hub.every and settings.hub.push_to is None:
        notes.append(f"hub.every {settings.hub.every} publishes nothing without hub.push_to")
    # accelerate launch starts one process on a CPU, however many it was asked for, and leaves this trace of it.
    if world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        notes.append(
            "one process trains, though accelerate launch was asked for several: on CPUs start them by "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return notes
