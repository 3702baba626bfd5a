"""What settings and data must agree on, found before anything is written."""

import math
from dataclasses import replace

from timm_jem.data import Splits
from timm_jem.errors import InputError
from timm_jem.training.settings import Settings

__all__ = ["check_plan", "images_of_an_epoch"]

# JEM's (arXiv 1912.03263, appendix A and released code), where nothing speaks against them.
_WARMUP_STEPS, _BUFFER_SIZE, _BUFFER_BYTES = 1000, 10_000, 2**30


def check_plan(settings: Settings, splits: Splits, world: int, *, sharded: bool = False) -> Settings:
    """The settings with numbers for all that follows from the data, if they can train on ``splits``; pure.

    ``train.epochs`` becomes ``train.steps``: what is written then says ``steps`` alone, so that a run that goes on can be
    told another number. A warm-up as long as the run becomes a tenth of it.

    Args:
        settings: as told.
        splits: their data.
        world: how many processes train.
        sharded: whether each of them holds a part of the weights only.

    Raises:
        InputError: what would fail, or mislead, later on.
    """
    data, train = settings.data, settings.train
    for section in ("train", "classifier") if settings.trains_classifier else ("train",):
        of_all = getattr(settings, section).batch_size * world
        if not data.streaming and len(splits.train) < of_all:
            raise InputError(
                f"{section}.batch_size of all processes is {of_all} with {len(splits.train)} training images: lower it"
            )
    if len(splits.val) < 2:
        raise InputError(f"{len(splits.val)} validation images are too few to choose anything by: raise data.val_fraction")
    attack = train.attack()
    farthest = 1.0 if train.attack_norm == "linf" else math.sqrt(math.prod(splits.image_shape))
    if attack is not None and attack.eps > farthest:
        raise InputError(
            f"train.attack_eps is {attack.eps:g}, and no two images are further apart than {farthest:.3g} ({attack.norm}, "
            "pixels in [0, 1]): grey levels are divided by 255, e.g. 8/255"
        )
    if train.buffer_size is None or train.objective.needs_chains:
        train = replace(train, buffer_size=_buffer_size(settings, splits))
    if train.ema_decay and sharded:
        raise InputError("train.ema_decay averages whole weights, and FSDP shards them: set it to 0")
    if train.balance and sharded:
        raise InputError("train.balance compares gradients of whole weights, and FSDP shards them: leave it out")
    if train.epochs is not None:
        of_a_step = train.batch_size * world * train.grad_accum
        steps = max(1, round(train.epochs * images_of_an_epoch(settings, splits) / of_a_step))
        train = replace(train, steps=steps, epochs=None)
    if train.warmup_steps is None:
        train = replace(train, warmup_steps=min(_WARMUP_STEPS, train.steps // 10))
    elif train.warmup_steps >= train.steps:
        train = replace(train, warmup_steps=train.steps // 10)
    return replace(settings, train=train)


def images_of_an_epoch(settings: Settings, splits: Splits) -> int:
    """How many images training reads: cross-entropy alone has no use for those without a label."""
    alone = splits.labeled is not None and not settings.train.objective.needs_chains
    return len(splits.labeled if alone else splits.train)


def _buffer_size(settings: Settings, splits: Splits) -> int:
    """How many chains a process keeps.

    Raises:
        InputError: fewer than a batch may need.
    """
    train, wanted, classes = settings.train, settings.train.batch_size, 1
    if train.needs_classes:
        classes = len(splits.class_names)
        if not settings.data.streaming and splits.labeled is None:
            # A batch that goes over into the next epoch can hold an image twice.
            wanted = min(wanted, 2 * int(splits.train.labels.bincount().max()))
    if train.buffer_size is None:
        return max(wanted * classes, min(_BUFFER_SIZE, _BUFFER_BYTES // (4 * math.prod(splits.image_shape))))
    if train.buffer_size < wanted * classes:
        raise InputError(
            f"train.buffer_size is {train.buffer_size}, and a batch may need {wanted} chains"
            f"{' of one class' * train.needs_classes}: raise it to {wanted * classes}, or lower train.batch_size"
        )
    return train.buffer_size
