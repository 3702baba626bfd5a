"""Test-time adaptation of a classifier's normalisation layers to a batch of unlabelled images, undone at the end."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from timm.layers import norm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from timm_jem.energy import energy
from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.modes import checkpointed, frozen

__all__ = ["METHODS", "Adapt", "adapted", "normalisation_layers"]

METHODS = ("statistics", "energy", "tent")
_TIMM = [kind for kind in vars(norm).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, *_TIMM)  # _NormBase: BatchNorm and InstanceNorm

Adapt = Callable[[Tensor], None]


def normalisation_layers(model: nn.Module) -> list[nn.Module]:
    """BatchNorm, InstanceNorm, GroupNorm, LayerNorm and RMSNorm layers, timm's own kinds of them included."""
    return [layer for layer in model.modules() if isinstance(layer, _NORMS)]


@contextlib.contextmanager
def adapted(
    model: nn.Module,
    x: Tensor,
    method: str,
    *,
    steps: int,
    lr: float,
    negatives: Tensor | Callable[[int], Tensor],
    checked: Callable[[Tensor], Tensor] = lambda x: x,
) -> Iterator[Adapt]:
    """Within the context ``model`` is in eval mode and adapted to ``x``; then all is as it was, bit for bit.

    BatchNorm layers take the statistics of ``x`` (Schneider et al., NeurIPS 2020, arXiv 2006.16971, with no weight on those
    of training). Then ``steps`` of Adam move the normalisation layers' weights and biases down a loss, by "tent" the mean
    entropy of p(y|x) (TENT, ICLR 2021, arXiv 2006.10726), by "energy" E(x) − E(x'), the gradient of −log p(x), with x' from
    ``negatives`` (TEA, CVPR 2024, arXiv 2311.14402); and the statistics are taken anew. While a loss is taken BatchNorm
    normalises by the batch, and gradients pass through its statistics. Dropout and the like stay off. Weights and statistics
    move, and are put back, in place: no graph goes across the context's beginning or end.

    Args:
        model: model input to logits, shape (B, num_classes). No other thread may use it meanwhile.
        x: model input, shape (B, C, H, W).
        method: "energy", "tent", or "statistics", which is BatchNorm's alone.
        steps, lr: of Adam.
        negatives: x', model input; or draws so many of them from the model as it then is, called once a step, in eval mode.
        checked: a batch to what the model takes, or an exception; for ``x`` and for all further ones.

    Yields:
        A function that adapts to a further batch, going on from where the last one led, as the papers do with a stream.

    Raises:
        InputError: nothing to adapt, gradient checkpointing, too few images for statistics, a setting out of range, or a loss
            that is not finite.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"method of an adaptation is {quoted(method)}: give one of {', '.join(map(repr, METHODS))}")
    check_whole("steps of an adaptation", steps, 1)
    check_number("lr of an adaptation", lr, above=0, most=1)
    if method != "statistics" and checkpointed(model):
        raise InputError(f"method {method!r} can't move weights under gradient checkpointing: set_grad_checkpointing(False)")
    layers = normalisation_layers(model)
    counted = [layer for layer in layers if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    moved = {} if method == "statistics" else _weights(model, layers)
    if not (moved or (counted and method == "statistics")):
        if method == "statistics" and layers:
            raise InputError(
                "this model has no BatchNorm layers whose statistics could be adapted: give method='energy' or 'tent'"
            )
        remedy = "give method='statistics'" if counted else "take one that has some"
        raise InputError(
            "this model has no normalisation layers of the kinds that are adapted (BatchNorm, InstanceNorm, GroupNorm, "
            f"LayerNorm, RMSNorm) with weights: {remedy}"
        )
    if counted and method == "energy" and isinstance(negatives, Tensor) and len(negatives) < 2:
        raise InputError("one image has no statistics for BatchNorm layers: give more negatives, the more the better")
    with torch.inference_mode(False):
        held = [*moved.values(), *(buffer for layer in counted for buffer in layer.buffers())]
        kept = {tensor: tensor.detach().clone() for tensor in held}
        # In single precision at least: in half a step as small as lr would be rounded away.
        dtypes = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in moved.items()}
        exact = {name: kept[weight].to(dtypes[name], copy=True).requires_grad_(True) for name, weight in moved.items()}
    optimizer = torch.optim.Adam(exact.values(), lr) if exact else None

    def adapt(x: Tensor) -> None:
        x = checked(x)
        if len(x) < (2 if counted else 1):
            few = "have no statistics for BatchNorm layers: give a batch" if counted else "are none: give at least one"
            raise InputError(f"{len(x)} images to adapt to {few}, the larger the better")
        with torch.inference_mode(False), torch.enable_grad():
            x, others = x.detach().clone(), None
            for _ in range(steps if optimizer else 0):
                if method == "energy" and callable(negatives):
                    _take_statistics(model, counted, x)
                    others = negatives(len(x))
                elif method == "energy":
                    others = negatives
                loss = _loss(model, {name: exact[name].to(weight.dtype) for name, weight in moved.items()}, counted, x, others)
                if not loss.isfinite():
                    raise InputError(f"the loss of this adaptation is {loss.item()}: give a smaller lr or fewer steps")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for name, weight in moved.items():
                        weight.copy_(exact[name])
            _take_statistics(model, counted, x)

    with frozen(model):
        try:
            adapt(x)
            yield adapt
        finally:
            with torch.inference_mode(False), torch.no_grad():
                for tensor, value in kept.items():
                    tensor.copy_(value)


def _weights(model: nn.Module, layers: list[nn.Module]) -> dict[str, nn.Parameter]:
    """The layers' own weights and biases by their names in ``model``."""
    own = {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in own}


def _loss(
    model: nn.Module, weights: dict[str, Tensor], batch_norms: list[nn.Module], x: Tensor, negatives: Tensor | None
) -> Tensor:
    """E(x) − E(x') of negatives x', each batch by its own statistics; without them the entropy of p(y|x)."""
    with _by_batch(batch_norms):
        logits = torch.func.functional_call(model, weights, (x,))
        if negatives is None:
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            return -(log_p.exp() * log_p).sum(1).mean()
        return energy(logits).mean() - energy(torch.func.functional_call(model, weights, (negatives,))).mean()


@contextlib.contextmanager
def _by_batch(batch_norms: list[nn.Module]) -> Iterator[None]:
    """Within the context these layers normalise each batch by its own statistics."""
    before = [(layer, layer.training, layer.track_running_stats) for layer in batch_norms]
    try:
        for layer in batch_norms:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training, tracking in before:
            layer.training, layer.track_running_stats = training, tracking


@torch.no_grad()
def _take_statistics(model: nn.Module, batch_norms: list[nn.Module], x: Tensor) -> None:
    """Running mean and variance become those of ``x``, so that in eval mode ``x`` gets the logits that a batch gets."""

    def take(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        dims = [0, *range(2, given[0].ndim)]
        of_batch = given[0].to(torch.promote_types(given[0].dtype, torch.float32))
        variance, mean = torch.var_mean(of_batch, dims, correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)

    with contextlib.ExitStack() as hooks:
        for layer in batch_norms:
            hooks.callback(layer.register_forward_pre_hook(take).remove)
        with _by_batch(batch_norms):
            model(x)
