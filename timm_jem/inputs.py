"""Checks of what a joint energy model is given: model input and labels."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.pixels import FAR_FROM_PIXELS

__all__ = ["as_labels", "check_labels", "check_model_input"]


def check_model_input(
    x: Tensor,
    input_size: tuple[int, int, int],
    *,
    fixed_size: bool,
    dtype: torch.dtype,
    denormalize: Callable[[Tensor], Tensor],
) -> None:
    """Raise an InputError unless ``x`` is model input.

    Args:
        x: what was given.
        input_size: (C, H, W) of the model's images.
        fixed_size: whether the model takes images of that size only.
        dtype: of the model.
        denormalize: model input to pixels in [-1, 1].
    """
    channels, height, width = input_size
    expected = f"(B, {channels}, {height}, {width})"
    if not isinstance(x, Tensor):
        raise InputError(f"x is a {type(x).__name__}: give a tensor of model input, shape {expected}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise InputError(f"x has shape {tuple(x.shape)}: give model input of shape {expected}")
    if fixed_size and x.shape[2:] != (height, width):
        raise InputError(f"x has shape {tuple(x.shape)}: this backbone takes {expected} only; resize the images")
    if not x.is_floating_point():
        raise InputError(f"x has dtype {x.dtype}: give model input, e.g. jem.normalize(images / 127.5 - 1)")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise InputError(f"x has dtype {x.dtype} and the model {dtype}: give x.to({dtype})")
    if x.numel() and not torch.compiler.is_compiling():
        farthest = float(denormalize(x.detach()).abs().amax())
        if not farthest <= FAR_FROM_PIXELS:
            raise InputError(
                f"x is {farthest:.0f} in pixels, far outside [-1, 1]: give model input, "
                "e.g. jem.normalize(images / 127.5 - 1) for images in 0..255"
            )


def as_labels(y: Tensor | list[int] | int, num_classes: int) -> Tensor:
    """Labels as a tensor, whatever they came as, still unchecked."""
    try:
        return torch.as_tensor(y)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"y is a {type(y).__name__} that holds no labels: give integers, 0 to {num_classes - 1}") from error


def check_labels(y: Tensor | list[int] | int, n: int, num_classes: int, device: torch.device) -> Tensor:
    """Labels of ``n`` images as int64, shape (n,), on ``device``.

    Raises:
        InputError: labels of wrong shape, dtype or range.
    """
    y = as_labels(y, num_classes).to(device)
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise InputError(f"y has dtype {y.dtype}: give integer class labels")
    if y.shape != (n,):
        raise InputError(f"y has shape {tuple(y.shape)} for {n} images: give one label an image, shape ({n},)")
    if n and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            raise InputError(f"y holds the label {low if low < 0 else high}: this model's classes are 0 to {num_classes - 1}")
    return y.long()
