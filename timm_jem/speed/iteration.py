"""An iteration of training on images of noise, and the bare network passes that it needs, as functions to time."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from torch import Tensor

from timm_jem.data import DataConfig, load_splits
from timm_jem.errors import InputError
from timm_jem.modes import batch_norms, frozen, in_eval_mode
from timm_jem.training import Checkpoints, DivergenceGuard, Run, Settings, check_plan
from timm_jem.training.build import build_learner, build_stream

__all__ = ["bare_passes", "build_run", "iteration"]

_CLASSES = 10


def build_run(settings: Settings, image_shape: tuple[int, int, int], accelerator: Accelerator) -> tuple[Run, Settings]:
    """A run by ``settings``, on images of noise, whose chains have all their steps from the first iteration on.

    Args:
        settings: of recipes/train.py; of their data the augmentation counts only, and no classifier is trained before.
        image_shape: (C, H, W) of the images.
        accelerator: see :func:`timm_jem.training.build.build_learner`.

    Returns:
        The run, and its settings with what was measured or follows from the data.

    Raises:
        InputError: settings that can't train on such images.
    """
    train, told = replace(settings.train, ramp_steps=0, ramp_auc=None), settings.data
    settings = replace(settings, train=train, classifier=replace(settings.classifier, steps=0, epochs=None))
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(_noise(Path(folder) / "noise.parquet", image_shape, settings), channels=image_shape[0])
        splits = load_splits(replace(data, crop_padding=told.crop_padding, flip=told.flip))
        settings = check_plan(replace(settings, data=data), splits, accelerator.num_processes)
        learner = build_learner(settings, splits, accelerator)
        run = Run(
            learner,
            build_stream(settings, splits, learner),
            DivergenceGuard(settings.guard, learner.accelerator, _CLASSES, learner.method.watched),
            Checkpoints(folder, learner.accelerator),
            grad_accum=settings.train.grad_accum,
        )
    run.snapshot()
    return run, settings


def iteration(run: Run) -> None:
    """An optimiser step, all of it: images, chains, loss, optimiser, moving average, and, as every tenth has it, the guard's
    whole look.

    Raises:
        InputError: training broke: from there on its settings would be others.
    """
    run.advance()
    if (broke := run.judge(whole=True)) is not None:
        raise InputError(f"training broke on images of noise ({broke.reason}): lower train.lr, which changes no timing")


def bare_passes(run: Run, *, bf16: bool) -> Callable[[], None]:
    """Forward and backward of as many images as an iteration has, through the same network in the same memory layout, and
    nothing else: no noise, energies, buffer, loss terms or optimiser.

    K SGLD steps, or those of an attack, are as many passes with the gradient of the images; the loss, with SAM twice, is
    one with that of the weights, of images, chains and what the cross-entropy has of its own together. ``train.balance``
    goes back twice more.
    """
    jem, method = run.learner.jem, run.learner.method
    batch, chains = next(run.stream), method.objective.needs_chains
    of_ce = batch.u if batch.u_ce is None else batch.u_ce
    moved = [batch.u] * (chains * method.sgld.num_steps) + [of_ce] * (method.attack.steps if method.attack else 0)
    moved = [jem.normalize(u) for u in moved]
    # Without chains only the cross-entropy's images count; with them its own, if it has any, come third.
    parts = [batch.u, batch.u, *([] if batch.u_ce is None else [of_ce])] if chains else [of_ce]
    of_loss, weights = jem.normalize(torch.cat(parts)), [p for p in jem.parameters() if p.requires_grad]

    def passed(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = jem.backbone(x.view_as(x))  # the counter of operations wants no leaf
        return logits, torch.ones_like(logits)

    def passes() -> None:
        for _ in range(run.grad_accum):
            with frozen(jem):
                for x in moved:
                    logits, ones = passed(x.requires_grad_(True))
                    torch.autograd.grad(logits, x, ones)
            for again in range(1 if run.learner.sam is None else 2):
                with in_eval_mode(batch_norms(jem) if method.batch_norm == "frozen" else []):
                    logits, ones = passed(of_loss)
                for _ in range(2 if method.balance and not again else 0):
                    torch.autograd.grad(logits, weights, ones, retain_graph=True)
                logits.backward(ones)
        jem.zero_grad()

    return passes


def _noise(file: Path, image_shape: tuple[int, int, int], settings: Settings) -> str:
    """A data set with images for a few different batches."""
    channels, height, width = image_shape
    count = 3 * max(settings.train.batch_size, settings.train.ce_batch_size or 0, 40)
    shape = (count, height, width, channels) if channels == 3 else (count, height, width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {i}" for i in range(_CLASSES)])})
    columns = {"image": [fromarray(array) for array in pixels], "label": [i % _CLASSES for i in range(count)]}
    Dataset.from_dict(columns, features).to_parquet(file)
    return str(file)
