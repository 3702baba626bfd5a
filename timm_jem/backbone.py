"""What a timm classifier tells of itself: whether it is one, its images, its classes."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.data.model_config import resolve_input_data_config
from timm.models import group_parameters
from timm.optim import auto_group_layers
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_jem.errors import InputError, check_number, one_line, quoted
from timm_jem.inputs import values_known
from timm_jem.modes import in_eval_mode

__all__ = [
    "architecture",
    "check_classifier",
    "label_names",
    "normalisation",
    "parameter_groups",
    "patch_size",
    "refuse_size",
    "resolve_data_config",
    "warn_of_projection",
    "warn_of_unseen",
    "warn_of_zero_head",
]

_CLIP_WIDTHS = (384, 512, 640, 768, 1024, 1152, 1280)  # of timm's published image towers
_SIZE_ERRORS = (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError)


def architecture(model: nn.Module) -> str:
    """timm's name of a model."""
    return model.pretrained_cfg.get("architecture") or type(model).__name__


def check_classifier(model: nn.Module) -> None:
    """Raise an InputError unless ``model`` is a timm classifier, neither compiled nor wrapped."""
    if not isinstance(model, nn.Module) or getattr(model, "pretrained_cfg", None) is None:
        raise InputError(f"{type(model).__name__} is not a timm model: build it with timm.create_model")
    if unwrap_model(model) is not model:
        raise InputError(
            "this model is compiled or wrapped already: wrap the timm model first, then compile or prepare the result"
        )
    if getattr(model, "num_classes", 0) < 1:
        raise InputError(
            f"{architecture(model)} has no classification head: build it with num_classes=N, or call reset_classifier(N); "
            "encoders that have none (names ending in _enc) can't be joint energy models"
        )


def resolve_data_config(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[dict[str, Any], bool]:
    """timm's data configuration of a model, and whether it takes images of that size only.

    Args:
        model: a timm model.
        input_size: (C, H, W); None: as the model's configuration says.
        mean, std: normalisation, [0, 1] pixel units; None: as the model's configuration says.

    Raises:
        InputError: an input size that the model can't take, or a configuration that can't be read.
    """
    requested = {"input_size": input_size, "mean": mean, "std": std}
    try:
        for key in ("mean", "std"):
            values = model.pretrained_cfg.get(key)
            if requested[key] is None and values and len(set(values)) == 1:
                requested[key] = values[:1]  # the same for any number of channels
        data_config = resolve_input_data_config(model, {k: v for k, v in requested.items() if v is not None})
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{architecture(model)}: {one_line(error)}") from error
    fixed = getattr(model, "_traits", {}).get("fixed_input_size", model.pretrained_cfg.get("fixed_input_size", False))
    return data_config, bool(fixed)


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the patches that a model cuts images into; None: it cuts none, or doesn't tell."""
    found = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return (tuple(found) if isinstance(found, (tuple, list)) else (found, found)) if found else None


def refuse_size(model: nn.Module, input_size: Sequence[int]) -> None:
    """Raise an InputError where the model can't take images of shape ``input_size``, (C, H, W).

    A copy without memory is tried first; where that fails, which other reasons may have, the model itself.
    """
    try:
        memory = {id(tensor): _without_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
        _try(copy.deepcopy(model, memory), torch.empty(1, *input_size, device="meta"))
        return
    except Exception:  # anything may stand in a copy's way
        if any(parameter.is_meta for parameter in model.parameters()):
            return
    first = next(model.parameters(), torch.empty(0))
    try:
        _try(model, torch.zeros(1, *input_size, device=first.device, dtype=first.dtype))
    except _SIZE_ERRORS as error:
        remedy = "build it with pooling" if is_unpooled(model) else "take images of another size"
        raise InputError(
            f"{architecture(model)} can't take images of {tuple(input_size)} ({one_line(error)}): {remedy}"
        ) from error


def is_unpooled(model: nn.Module) -> bool:
    """Whether pooling is turned off somewhere: of most networks there are no logits then."""
    return any(getattr(part, name, None) == "" for part in model.modules() for name in ("global_pool", "pool_type"))


def _without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@torch.no_grad()
def _try(model: nn.Module, x: Tensor) -> None:
    with in_eval_mode(model.modules()):
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.shape != (1, model.num_classes):
        raise ValueError(f"its output is {tuple(getattr(logits, 'shape', ()))} and no logits of {model.num_classes} classes")


def label_names(model: nn.Module) -> list[str] | None:
    """The names of the classes that the model's configuration has, if any."""
    names = model.pretrained_cfg.get("label_names")
    return list(names) if isinstance(names, (list, tuple)) and len(names) == model.num_classes else None


def normalisation(data_config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a model's input, [0, 1] pixel units, shape (1, C, 1, 1) each.

    Raises:
        InputError: they are not one number per channel, or one for all, or no normalisation goes by them.
    """
    channels, found = data_config["input_size"][0], []
    for name, bounds in (("mean", {"least": -1e6, "most": 1e6}), ("std", {"above": 0, "most": 1e6})):
        given = data_config.get(name)
        values = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
        if len(values) not in (1, channels):
            raise InputError(f"{name} is {quoted(given)}: give one number per channel, {channels}")
        for value in values:
            check_number(f"{name} of a channel", value, **bounds)
        with torch.inference_mode(False):  # gradients pass through what they make
            # On the CPU, also where new tensors are to have no memory.
            numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
            found.append(numbers.expand(channels).reshape(1, channels, 1, 1).to(device, dtype))
    return found[0], found[1]


def parameter_groups(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    """The layer, counted from the input, of each parameter by its name, as timm's layer-wise learning rates take it."""
    if hasattr(model, "group_matcher"):
        return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    return auto_group_layers(model)


def warn_of_unseen(model: nn.Module, input_size: Sequence[int], stacklevel: int) -> None:
    """Warn where patches leave pixels out at the right and at the bottom: chains could never move them."""
    patch = patch_size(model)
    if patch is None or getattr(model.patch_embed, "dynamic_img_pad", True):
        return
    height, width = input_size[1:]
    unseen = 1 - (height // patch[0] * patch[0]) * (width // patch[1] * patch[1]) / (height * width)
    if unseen:
        warnings.warn(
            f"{architecture(model)} does not look at {unseen:.0%} of the pixels of {height}×{width} images, which chains could "
            f"never move: take sides that {patch[0]} divides",
            stacklevel=stacklevel,
        )


def warn_of_projection(model: nn.Module, stacklevel: int) -> None:
    """Warn where the head is no classifier but the projection of a CLIP image tower, whose width timm counts as classes."""
    name = f"{architecture(model)}.{model.pretrained_cfg.get('tag') or ''}"
    as_published = model.num_classes == model.pretrained_cfg.get("num_classes") and model.num_classes in _CLIP_WIDTHS
    if as_published and ("clip" in name or "pe_core" in name):
        warnings.warn(
            f"the {model.num_classes} outputs of {name} are a CLIP embedding and no classes, so that energies mean nothing: "
            "create it with num_classes, and train it",
            stacklevel=stacklevel,
        )


def warn_of_zero_head(model: nn.Module, stacklevel: int) -> None:
    """Warn where the head's weights are all zero: energies are flat in x, and chains can't move."""
    head = model.get_classifier()
    heads = head if isinstance(head, (tuple, list)) else (head,)
    weights = [p for h in heads if isinstance(h, nn.Module) for k, p in h.named_parameters() if k.endswith("weight")]
    if weights and not any(not values_known(w) or bool(w.any()) for w in weights):
        warnings.warn(
            f"the head of {architecture(model)} is all zeros, so its energy is flat and chains can't move: "
            f"call model.reset_classifier({model.num_classes}) before wrap, or load trained weights",
            stacklevel=stacklevel,
        )
