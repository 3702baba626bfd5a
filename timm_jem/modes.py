"""Train and eval state of networks: frozen while chains move, statistics kept while a loss is taken."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from timm_jem.errors import InputError, quoted

__all__ = ["batch_norms", "checkpointed", "forget_passes", "frozen", "in_eval_mode", "statistics_kept"]

_lock = threading.Lock()
# Of what open contexts hold, by object and attribute: how many do, and the value from before the first.
_held: dict[tuple[int, str], tuple[int, Any]] = {}


@contextlib.contextmanager
def frozen(model: nn.Module, batch_norm: str = "eval") -> Iterator[nn.Module]:
    """Within the context ``model`` is in eval mode and needs no parameter gradients; each flag is then restored.

    Several threads may be in this context with one model, or with models that share layers: flags are restored when the
    last one leaves. A thread that trains the model meanwhile finds it in eval mode and without gradients.

    Args:
        model: any module.
        batch_norm: "train": BatchNorm layers in train mode stay in it, and normalise each batch by its own statistics,
            as the released code of JEM++ (arXiv 2109.09032) does; their running statistics don't move. "eval": they are
            in eval mode like all others.

    Raises:
        InputError: no module, or another ``batch_norm``.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model to freeze is a {type(model).__name__}: give a torch.nn.Module")
    if not isinstance(batch_norm, str) or batch_norm not in ("eval", "train"):
        raise InputError(f"batch_norm of frozen is {quoted(batch_norm)}: give 'eval' or 'train'")
    mixing = batch_norms(model) if batch_norm == "train" else []
    calm = set(model.modules()) - set(mixing)
    try:
        with in_eval_mode(calm), _set(model.parameters(), "requires_grad", False), statistics_kept(mixing):
            yield model
    finally:
        for part in model.modules():
            if hasattr(part, "reshard"):  # FSDP2's: weights that no backward followed would stay gathered, and get no gradients
                part.reshard()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers in train mode: those that mix the images of a batch."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]


def checkpointed(model: nn.Module) -> bool:
    """Whether timm's gradient checkpointing is on: a backward pass runs layers again, in the modes that they have by then."""
    return any(getattr(module, "grad_checkpointing", False) for module in model.modules())


def statistics_kept(layers: list[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Within the context BatchNorm ``layers`` in train mode normalise batches as ever, but running statistics stay."""
    return _set(layers, "track_running_stats", False)


@contextlib.contextmanager
def in_eval_mode(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context ``layers`` are in eval mode; each is then as it was."""
    layers = list(layers)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_set(layers, "training", False))
        for layer in _keeping_biases(layers):
            stack.enter_context(_set([layer], "attention_bias_cache", _Forgetting()))
        yield


class _Forgetting(dict):
    """A cache that never has what is asked for, that train() finds nothing to clear in, and that copies are empty of."""

    def __contains__(self, key: object) -> bool:
        return False

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> tuple:
        return dict, ()


def forget_passes(model: nn.Module) -> None:
    """From now on attention of ``model`` keeps nothing of a pass that spoils a later one; what it computes is the same."""
    hooks = [(module, _forget_biases) for module in _keeping_biases(model.modules())]
    hooks += [(module, _own_indices) for module in model.modules() if "rel_indices" in module._buffers]
    for module, hook in hooks:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def _own_indices(module: nn.Module, _: tuple[Tensor]) -> None:
    """ConViT's are made by its first pass, and spoil gradients where that was in inference mode."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():  # TorchScript compiles hooks
        return
    if module.rel_indices.is_inference() and not torch.is_inference_mode_enabled():
        module.rel_indices = module.rel_indices.clone()


def _forget_biases(module: nn.Module, _: tuple[Tensor]) -> None:
    """Before each pass, since timm gives a module that is moved or cast a cache that keeps again; and so do copies."""
    if torch.jit.is_scripting():
        return
    if not isinstance(module.attention_bias_cache, _Forgetting):
        module.attention_bias_cache = _Forgetting()


def _keeping_biases(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Attention of timm's LeViT, EfficientFormer and their kin, which keeps its biases from one pass in eval mode to the next.

    It lets go of them in train() alone: they would be those from before other weights came, and hold a graph.
    """
    caches = ((module, vars(module).get("attention_bias_cache")) for module in modules)
    return [module for module, cache in caches if cache is not None and not isinstance(cache, _Forgetting)]


@contextlib.contextmanager
def _set(objects: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Within the context the attribute ``name`` of ``objects`` is ``value``; the last of several to end restores it."""
    with contextlib.ExitStack() as stack:  # which restores all, whatever one of them raises
        with _lock:
            # Read all before any is set: a compiled module's flag is that of the module within.
            found = [(item, *_held.get((id(item), name), (0, getattr(item, name)))) for item in objects]
            for item, count, before in found:
                _held[id(item), name] = count + 1, before
                stack.callback(_restore, item, name)
                setattr(item, name, value)
        yield


def _restore(item: Any, name: str) -> None:
    with _lock:
        count, before = _held.pop((id(item), name))
        if count > 1:
            _held[id(item), name] = count - 1, before
        else:
            setattr(item, name, before)
