"""Three spaces of images: 8 bits (0 to 255), pixels in [-1, 1], and [0, 1], in which sizes of attacks are told."""

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.inputs import is_floats, kind

__all__ = ["eight_bit", "from_unit", "to_pixels"]


def to_pixels(images: Tensor) -> Tensor:
    """8-bit images to pixels in [-1, 1]: u / 127.5 − 1, float32, same shape.

    Raises:
        InputError: no tensor, or one of booleans or complex numbers.
    """
    if not isinstance(images, Tensor) or images.layout != torch.strided or images.dtype == torch.bool or images.is_complex():
        raise InputError(f"images are {kind(images)}: give a tensor of 8-bit ones")
    return images.float().div(127.5).sub_(1)


def eight_bit(u: Tensor) -> Tensor:
    """Pixels as 8-bit images, uint8, same shape: cut to [-1, 1] and rounded, as what is published or shown is.

    Raises:
        InputError: a pixel is NaN, which no 8-bit image can say; or no tensor of floating-point pixels.
    """
    if not is_floats(u) or u.is_meta:
        raise InputError(f"pixels are {kind(u)}: give floating-point ones in [-1, 1], e.g. images / 127.5 - 1")
    if u.isnan().any():
        broken = int(u.flatten(1).isnan().any(1).sum())
        raise InputError(f"{broken} of {len(u)} images have pixels that are NaN: their chains ran away, so use fewer steps")
    return u.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_unit(images: Tensor) -> Tensor:
    """Images in [0, 1] to pixels in [-1, 1], same shape.

    Raises:
        InputError: no tensor of floating-point images.
    """
    if not is_floats(images):
        raise InputError(f"images are {kind(images)}: give floating-point ones in [0, 1], e.g. images / 255")
    return 2 * images - 1
