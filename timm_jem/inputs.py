"""Checks of what a joint energy model is given: model input and labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.pixels import FAR_FROM_PIXELS

__all__ = ["as_labels", "check_drawing", "check_labels", "check_model_input", "how_many"]


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
        raise InputError(f"y has shape {tuple(y.shape)} for {n} images: give one label per image, shape ({n},)")
    if n and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            raise InputError(f"y holds the label {low if low < 0 else high}: this model's classes are 0 to {num_classes - 1}")
    return y.long()


def check_drawing(init, generator, seeds, batch_size, on_step) -> None:
    """Raise an InputError for what ``JEM.sample`` can't start from, draw with, or report to."""
    if not (init is None or isinstance(init, Tensor) or (isinstance(init, str) and init == "buffer")):
        what = repr(init) if isinstance(init, str) else f"a {type(init).__name__}"
        raise InputError(f"init is {what}: give a tensor of model input, shape (n, C, H, W), 'buffer' or None")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
    if seeds is not None and generator is not None:
        raise InputError("both generator and seeds are given: give seeds for images of your choice, or generator to draw them")
    if seeds is not None and isinstance(init, str):
        raise InputError("seeds don't choose among published chains: give generator=torch.Generator().manual_seed(seed)")
    check_whole("batch_size", batch_size, 1)
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step is {on_step!r}: give a function of (steps done, pixels)")


def how_many(n: int | None, init: Tensor | str | None, y: Tensor | None, seeds: Sequence | None) -> int:
    """The number of images to draw: ``n``, or that of the images they start from, of their classes, or of their seeds.

    Raises:
        InputError: nothing tells it, or there are more or fewer images to start from, or seeds. Labels are left to
            :func:`check_labels`.
    """
    images = len(init) if isinstance(init, Tensor) and init.ndim else None
    labels = len(y) if y is not None and y.ndim else None
    chains = None if seeds is None else len(seeds)
    if n is None:
        n = next((count for count in (images, labels, chains) if count is not None), None)
    if n is None:
        raise InputError("sample doesn't know how many images to draw: give n")
    check_whole("n", n, 1)
    if images not in (None, n):
        raise InputError(f"init holds {images} images and n is {n}: make them agree")
    if chains not in (None, n):
        raise InputError(f"there are {chains} seeds for {n} images: give one seed per image")
    return n
