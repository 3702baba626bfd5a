"""What settings and data must agree on, found before anything is written."""

from dataclasses import replace

from timm_jem.data import Splits
from timm_jem.errors import InputError
from timm_jem.training.settings import Settings

__all__ = ["check_plan"]


def check_plan(settings: Settings, splits: Splits, world: int, *, sharded: bool = False) -> Settings:
    """The settings with ``train.steps`` in the place of ``train.epochs``, if they can train on ``splits``; pure.

    What is written of them then says ``steps`` alone, so that a run that goes on can be told another number.

    Args:
        settings: as told.
        splits: their data.
        world: how many processes train.
        sharded: whether each of them holds a part of the weights only.

    Raises:
        InputError: what would fail, or mislead, later on.
    """
    data, train = settings.data, settings.train
    num_classes, together = len(splits.class_names), train.batch_size * world
    if settings.model.num_classes not in (None, num_classes):
        raise InputError(
            f"model.num_classes is {settings.model.num_classes} and {data.dataset} has {num_classes} classes: leave it out"
        )
    if not data.streaming and len(splits.train) < together:
        raise InputError(f"train.batch_size of all processes is {together} with {len(splits.train)} training images: lower it")
    if len(splits.val) < 2:
        raise InputError(f"{len(splits.val)} validation images are too few to choose anything by: raise data.val_fraction")
    if train.objective.needs_chains:
        _check_buffer(settings, splits)
    if train.ema_decay and sharded:
        raise InputError("train.ema_decay averages whole weights, and FSDP shards them: set it to 0")
    if train.epochs is None:
        return settings
    steps = max(1, round(train.epochs * len(splits.train) / (together * train.grad_accum)))
    return replace(settings, train=replace(train, steps=steps, epochs=None))


def _check_buffer(settings: Settings, splits: Splits) -> None:
    train, wanted, classes = settings.train, settings.train.batch_size, 1
    if train.needs_classes:
        classes = len(splits.class_names)
        if not settings.data.streaming and splits.labeled is None:
            # A batch that goes over into the next epoch can hold an image twice.
            wanted = min(wanted, 2 * int(splits.train.labels.bincount().max()))
    if train.buffer_size < wanted * classes:
        raise InputError(
            f"train.buffer_size is {train.buffer_size}, and a batch may need {wanted} chains"
            f"{' of one class' * train.needs_classes}: raise it to {wanted * classes}, or lower train.batch_size"
        )
