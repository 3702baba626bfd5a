"""The model of a run as it is saved and pushed, with what its card tells."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from timm_jem.data import Splits
from timm_jem.data.sources import hub_id, public_name
from timm_jem.errors import program
from timm_jem.files import fingerprint
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.model import JEM
from timm_jem.models.names import weights_id
from timm_jem.training.build import build_model
from timm_jem.training.processes import is_sharded
from timm_jem.training.record import Record
from timm_jem.training.run import Run
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import Settings
from timm_jem.version import __version__

__all__ = ["of_classifier", "publishable", "push", "whole_state"]


def of_classifier(folder: RunFolder) -> dict[str, Any]:
    """What a run tells of the classifier that joint training started from, where that is a part of the run."""
    found = folder.classifier.summary() or {}
    told = ("val_accuracy", "val_ece", "test_accuracy", "test_ece", "steps", "seconds")
    numbers = {key: found[key] for key in told if isinstance(found.get(key), (int, float))}
    if numbers and isinstance(found.get("rollbacks"), list):
        numbers["rollbacks"] = len(found["rollbacks"])
    return {"classifier": numbers} if numbers else {}


def publishable(
    settings: Settings,
    splits: Splits,
    run: Run,
    record: Record,
    *,
    chains: bool = False,
    results: Sequence[dict[str, Any]] = (),
    outcome: str | None = None,
    explanation: str | None = None,
) -> JEM:
    """The run's model, whole where weights are sharded, with its provenance; all processes call it.

    Args:
        settings, splits, run, record: the run.
        chains: with those of the replay buffer, as ``hub.replay_buffer`` says.
        results: what was measured of it, as :func:`timm_jem.hub.card.model_card` takes them.
        outcome, explanation: "finished" or "stopped", and why; None: training goes on.
    """
    learner, accelerator = run.learner, run.learner.accelerator
    jem = learner.published()
    if is_sharded(accelerator):
        whole = build_model(settings, splits, accelerator.device, kept=record.folder.backbone)
        whole.load_state_dict(whole_state(jem))
        whole.sgld, whole.starts = jem.sgld, jem.starts
        jem = whole
    data, model = settings.data, settings.model
    jem.provenance = {
        "dataset": public_name(data.dataset),
        "dataset_id": hub_id(data.dataset),
        "datasets": [name for source in (data.dataset, data.unlabeled, data.starts) if source and (name := hub_id(source))],
        "base_model": weights_id(model.name, model.kwargs) if model.starts_pretrained else None,
        "command": shlex.join([*_launcher(accelerator), *program("train").split()[1:], *record.command]),
        "config": settings.sections(),
        "steps": run.step,
        "seed": settings.train.seed,
        "seconds": record.seconds,
        "rollbacks": run.rollbacks,
        **of_classifier(record.folder),
        "data": record.data,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"timm_jem": __version__, "timm": timm.__version__, "torch": torch.__version__},
        "results": list(results),
        **({"results_of": fingerprint(unwrap_model(jem.backbone).state_dict())} if results else {}),
        **({} if outcome is None else {"outcome": outcome, "explanation": explanation}),
    }
    buffer = learner.method.buffer
    chains = chains and settings.hub.replay_buffer and data.starts is None  # which they may show
    if chains and settings.train.objective.needs_chains and buffer is not None:
        jem.chains = PublishedChains.of_pixels(buffer.chains, buffer.labels)
    return jem


def _launcher(accelerator: Accelerator) -> list[str]:
    """With what is told to the launcher and not to the recipe."""
    flags = ["--num_processes", str(accelerator.num_processes)] if accelerator.num_processes > 1 else []
    flags += ["--mixed_precision", accelerator.mixed_precision] if accelerator.mixed_precision != "no" else []
    return ["accelerate", "launch", *flags]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whole; all processes call it."""
    # Buffers such as BatchNorm's are plain tensors.
    return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in model.state_dict().items()}


def push(jem: JEM, settings: Settings, record: Record, message: str, pictures: Mapping[str, Path]) -> None:
    """Push a model; the main process alone.

    Args:
        jem: what :func:`publishable` gave.
        settings, record: the run's.
        message: of the commit.
        pictures: for the card, by their names there: those of this very model.

    Raises:
        InputError: what the Hub refuses.
    """
    hub = settings.hub
    url = jem.push_to_hub(hub.push_to, commit_message=message, private=hub.private, pictures=pictures)
    record.say(f"pushed to {url}")
