"""Three spaces of images: 8 bits (0 to 255), pixels in [-1, 1], and [0, 1], in which sizes of attacks are told."""

import torch
from torch import Tensor

from timm_jem.errors import InputError

__all__ = ["FAR_FROM_PIXELS", "eight_bit", "from_unit", "to_pixels"]

# Chains and noise leave [-1, 1] by a little, images in 0..255 by far.
FAR_FROM_PIXELS = 20.0


def to_pixels(images: Tensor) -> Tensor:
    """8-bit images to pixels in [-1, 1]: u / 127.5 − 1, float32, same shape."""
    return images.float().div_(127.5).sub_(1)


def eight_bit(u: Tensor) -> Tensor:
    """Pixels as 8-bit images, uint8, same shape: cut to [-1, 1] and rounded, as what is published or shown is.

    Raises:
        InputError: a pixel is NaN, which no 8-bit image can say.
    """
    if u.isnan().any():
        broken = int(u.flatten(1).isnan().any(1).sum())
        raise InputError(f"{broken} of {len(u)} images have pixels that are NaN: their chains ran away, so use fewer steps")
    return u.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_unit(images: Tensor) -> Tensor:
    """Images in [0, 1] to pixels in [-1, 1], same shape."""
    return 2 * images - 1
