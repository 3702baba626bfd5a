"""Checks of what functions are given: model input, labels, logits, class names, and what chains are drawn with."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole, quoted

__all__ = [
    "FAR_FROM_PIXELS",
    "MOST_NUMBERS",
    "as_labels",
    "batches_of",
    "check_drawing",
    "check_label_values",
    "check_labels",
    "check_model_input",
    "checked_names",
    "how_many",
    "is_floats",
    "is_labels",
    "kind",
    "of_batch",
    "values_known",
]

# In one tensor of images: 16 GiB in single precision, beyond which a count or a size is a mistake.
MOST_NUMBERS = 2**32
# Chains and noise leave the pixels' [-1, 1] by a little, images in 0..255 by far.
FAR_FROM_PIXELS = 20.0

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kind(value) -> str:
    """What was given, for messages: a tensor's dtype, shape and what else may be wrong with it, or a type's name."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f", layout {value.layout}"
    where = " on the meta device" if value.is_meta else ""
    return f"{value.dtype} of shape {tuple(value.shape)}{layout}{where}"


def values_known(tensor: Tensor) -> bool:
    """Whether the host can read a tensor's values: not where it has none, nor where a program is traced or transformed."""
    return not (
        tensor.is_meta
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__  # a fake one, say
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad, ...
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_floats(x) -> bool:
    """Whether ``x`` is a tensor of real floating-point numbers as networks take them, neither sparse nor quantised."""
    return isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in _FLOATS


def is_labels(y, n: int, like: Tensor) -> bool:
    """Whether ``y`` holds ``n`` labels as int64, where ``like`` is."""
    return isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (n,) and y.is_meta == like.is_meta


def check_model_input(
    x: Tensor,
    input_size: tuple[int, int, int],
    *,
    fixed_size: bool,
    dtype: torch.dtype,
    denormalize: Callable[[Tensor], Tensor],
) -> None:
    """Raise an InputError unless ``x`` is model input.

    However far chains of a model ran, they are its input; images in 0..255, which nobody means to give, are told by having
    nothing below 0.

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
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise InputError(f"x has shape {tuple(x.shape)}: give model input of shape {expected}")
    if fixed_size and x.shape[2:] != (height, width):
        raise InputError(f"x has shape {tuple(x.shape)}: this backbone takes {expected} only; resize the images")
    if not is_floats(x):
        what = f"dtype {x.dtype}" if x.layout == torch.strided else f"layout {x.layout}"
        raise InputError(f"x has {what}: give model input, e.g. jem.normalize(images / 127.5 - 1)")
    if x.dtype != dtype:
        castable = not x.is_meta and torch.float64 not in (x.dtype, dtype)
        if not (castable and torch.is_autocast_enabled(x.device.type)):
            raise InputError(f"x has dtype {x.dtype} and the model {dtype}: give x.to({dtype})")
    if x.numel() and values_known(x):
        of_channels = torch.stack(torch.aminmax(x.detach().flatten(2), dim=2)).flatten(0, 1)  # few, which are quick to scale
        lowest, highest = torch.stack(torch.aminmax(denormalize(of_channels[..., None, None]))).tolist()
        if not (abs(lowest) < float("inf") and abs(highest) < float("inf")):  # nor is NaN
            broken = int((~x.detach().flatten(1).isfinite()).any(1).sum())
            raise InputError(
                f"{broken} of {len(x)} images in x have values that are NaN or infinite: "
                "if they are chains, they ran away, so give sample a smaller step_size or fewer steps, or leave them out"
            )
        if highest > FAR_FROM_PIXELS and of_channels.min() >= 0:
            raise InputError(
                f"x is {lowest:.3g} to {highest:.3g} in pixels, whose range is [-1, 1]: give model input, e.g. "
                "jem.normalize(images / 127.5 - 1) for images in 0..255; of chains that ran away take jem.pixel_energy"
            )


def as_labels(y: Tensor | list[int] | int, num_classes: int) -> Tensor:
    """Labels as a tensor, whatever they came as, still unchecked."""
    if isinstance(y, np.ndarray):  # PyTorch takes neither all of numpy's layouts nor objects
        y = y.tolist() if y.dtype == object else y.astype(y.dtype.newbyteorder("="))
    try:
        return torch.as_tensor(y)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"y is a {type(y).__name__} that holds no labels: give integers, 0 to {num_classes - 1}") from error


def check_labels(y: Tensor | list[int] | int, n: int, num_classes: int, device: torch.device) -> Tensor:
    """Labels of ``n`` images as int64, shape (n,), on ``device``.

    Raises:
        InputError: labels of wrong shape, dtype or range.
    """
    y = as_labels(y, num_classes)
    if (y.is_meta and device.type != "meta") or y.layout != torch.strided:
        raise InputError(f"y is {kind(y)}: give labels that have values, where the model is")
    y = y.to(device)
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise InputError(f"y has dtype {y.dtype}: give integer class labels")
    if y.shape != (n,):
        raise InputError(f"y has shape {tuple(y.shape)} for {n} images: give one label per image, shape ({n},)")
    y = y.long()  # PyTorch finds no extremes of uint16
    check_label_values(y, num_classes)
    return y


def check_label_values(y: Tensor, count: int, least: int = 0, name: str = "y") -> None:
    """Raise an InputError where ``y``, int64, is not in [``least``, ``count``); ``least`` is −1 where labels may be unknown."""
    if y.numel() and values_known(y):
        low, high = torch.stack(torch.aminmax(y)).tolist()
        if low < least or high >= count:
            wrong, unknown = low if low < least else high, ", or -1 for unknown" if least < 0 else ""
            what = "the label" if name == "y" else "the number"
            raise InputError(f"{name} holds {what} {wrong}: give 0 to {count - 1}{unknown}")


def batches_of(x: Any, y: Any, batch_size: int, num_classes: int) -> Iterable[Any]:
    """The batches of a tensor of images, with their labels where there are some; or batches as they are given.

    Args:
        x: images, shape (N, ...), or an iterable of batches, or of (images, labels), as a DataLoader gives them.
        y: labels of a tensor's images, one an image; of batches each has its own. None: there are none.
        batch_size: into which a tensor is split.
        num_classes: see :func:`as_labels`.

    Raises:
        InputError: neither, or labels that don't go with ``x``.
    """
    check_whole("batch_size", batch_size, 1)
    if isinstance(x, Tensor):
        parts = x.split(batch_size) if x.ndim else [x]
        if y is None:
            return parts
        y = as_labels(y, num_classes)
        if y.shape != x.shape[:1]:
            raise InputError(f"y has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}: give one label per image")
        return list(zip(parts, y.split(batch_size), strict=True))
    if not isinstance(x, Iterable) or isinstance(x, (str, bytes, Mapping, np.ndarray)):
        raise InputError(f"x is {kind(x)}: give model input, shape (N, C, H, W), or batches of it, e.g. a DataLoader")
    if y is not None:
        raise InputError("y goes with a tensor x: of images in batches, let each batch be (x, y)")
    return x


def of_batch(batch: Any) -> tuple[Tensor, Any]:
    """Images and labels, or None, of a batch: images, (images,) or (images, labels).

    Raises:
        InputError: something else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise InputError(f"a batch of images is {kind(batch)}: give model input, or (x, y)")


def checked_names(class_names, num_classes: int) -> list[str] | None:
    """The names of ``num_classes`` classes in order, or None.

    Raises:
        InputError: no sequence of names, or another number of them.
    """
    if class_names is None:
        return None
    names = class_names.tolist() if isinstance(class_names, np.ndarray) else class_names
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise InputError(f"class_names is a {type(names).__name__}: give a list of {num_classes} names, in the classes' order")
    if len(names) != num_classes:
        raise InputError(f"{len(names)} class names for {num_classes} classes: give one name per class")
    return [str(name) for name in names]


def check_drawing(init, generator, seeds, batch_size, on_step) -> None:
    """Raise an InputError for what ``JEM.sample`` can't start from, draw with, or report to."""
    if not (init is None or isinstance(init, Tensor) or (isinstance(init, str) and init in ("buffer", "noise"))):
        what = quoted(init) if isinstance(init, str) else f"a {type(init).__name__}"
        raise InputError(f"init is {what}: give a tensor of model input, shape (n, C, H, W), 'buffer', 'noise' or None")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
    if seeds is not None and generator is not None:
        raise InputError("both generator and seeds are given: give seeds for images of your choice, or generator to draw them")
    if seeds is not None and isinstance(init, str) and init == "buffer":
        raise InputError("seeds don't choose among published chains: give generator=torch.Generator().manual_seed(seed)")
    check_whole("batch_size", batch_size, 1)
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step is {quoted(on_step)}: give a function of (steps done, pixels)")


def how_many(
    n: int | None, init: Tensor | str | None, y: Tensor | None, seeds: Sequence | None, image_shape: Sequence[int]
) -> int:
    """The number of images to draw: ``n``, or that of the images they start from, of their classes, or of their seeds.

    Raises:
        InputError: nothing tells it, they are more than any memory holds at once, or there are more or fewer images to
            start from, or seeds. Labels are left to :func:`check_labels`.
    """
    images = len(init) if isinstance(init, Tensor) and init.ndim else None
    labels = len(y) if y is not None and y.ndim else None
    chains = None if seeds is None else len(seeds)
    if n is None:
        n = next((count for count in (images, labels, chains) if count is not None), None)
    if n is None:
        raise InputError("sample doesn't know how many images to draw: give n")
    check_whole("n", n, 1)
    n = int(n)  # numpy's overflow
    if n * math.prod(image_shape) > MOST_NUMBERS:
        raise InputError(
            f"{quoted(n)} images of {tuple(image_shape)} are more than {MOST_NUMBERS:,} numbers: draw fewer at a time"
        )
    if images not in (None, n):
        raise InputError(f"init holds {images} images and n is {n}: make them agree")
    if chains not in (None, n):
        raise InputError(f"there are {chains} seeds for {n} images: give one seed per image")
    return n
