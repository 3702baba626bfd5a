"""Train and eval state of networks: frozen while chains move, statistics kept while a loss is taken."""

import contextlib
from collections.abc import Iterator

from torch import nn

from timm_jem.errors import InputError

__all__ = ["batch_norms", "frozen", "in_eval_mode", "statistics_kept"]


@contextlib.contextmanager
def frozen(model: nn.Module, batch_norm: str = "eval") -> Iterator[nn.Module]:
    """Within the context ``model`` is in eval mode and needs no parameter gradients; each flag is then restored.

    Args:
        model: any module.
        batch_norm: "train": BatchNorm layers in train mode stay in it, and normalise each batch by its own statistics,
            as the released code of JEM++ (arXiv 2109.09032) does; their running statistics don't move. "eval": they are
            in eval mode like all others.

    Raises:
        InputError: another ``batch_norm``.
    """
    if batch_norm not in ("eval", "train"):
        raise InputError(f"batch_norm of frozen is {batch_norm!r}: give 'eval' or 'train'")
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mixing = batch_norms(model) if batch_norm == "train" else []
    try:
        for module, _ in training:
            module.training = False
        for module in mixing:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(False)
        with statistics_kept(mixing):
            yield model
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers in train mode: those that mix the images of a batch."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


@contextlib.contextmanager
def statistics_kept(layers: list[nn.Module]) -> Iterator[None]:
    """Within the context BatchNorm ``layers`` in train mode normalise batches as ever, but running statistics stay."""
    tracking = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, flag in zip(layers, tracking, strict=True):
            layer.track_running_stats = flag


@contextlib.contextmanager
def in_eval_mode(layers: list[nn.Module]) -> Iterator[None]:
    """Within the context ``layers``, which are in train mode, are in eval mode."""
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True
