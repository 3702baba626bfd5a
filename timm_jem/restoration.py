"""Inpainting and denoising by SGLD chains over any callable energy: what is known of an image holds the chain."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole
from timm_jem.inputs import is_floats, kind
from timm_jem.noise import Generators
from timm_jem.sampling import MOST_STEPS, SGLDConfig, check_settings, sgld

__all__ = ["restore", "with_unknown"]


def with_unknown(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Images of which ``mask`` says what is unknown: with zeros there, and the mask as bool of their shape.

    Args:
        x: shape (B, C, H, W).
        mask: bool, True: unknown; shape (H, W) or (1, H, W) for all images alike, (B, 1, H, W) for all channels alike, or
            (B, C, H, W). None: all is known.

    Raises:
        InputError: no images, or a mask of another type or shape.
    """
    if not is_floats(x) or x.ndim != 4 or not x.numel():
        raise InputError(f"x is {kind(x)}: give model input, shape (B, C, H, W), at least one image")
    if mask is None:
        return x, torch.zeros_like(x, dtype=torch.bool)
    (batch, channels), size = x.shape[:2], tuple(x.shape[2:])
    shapes = [size, (1, *size), (batch, 1, *size), (batch, channels, *size)]
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.layout == torch.strided and not mask.is_meta
    if not is_mask or tuple(mask.shape) not in shapes:
        shown = ", ".join(map(str, dict.fromkeys(shapes)))
        raise InputError(f"mask is {kind(mask)}: give bool, True where pixels are unknown, of shape {shown}")
    mask = mask.to(x.device).expand(x.shape)
    return x.masked_fill(mask, 0), mask


def restore(
    energy_fn: Callable[..., Tensor],
    u: Tensor,
    mask: Tensor,
    start: Tensor,
    config: SGLDConfig,
    *,
    y: Tensor | None = None,
    noise: float | None = None,
    generator: Generators = None,
    num_steps: int | None = None,
    denoise_steps: int = 0,
    batch_size: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """SGLD chains of which part of the pixels is known, exactly or up to Gaussian noise.

    Without ``noise`` the known pixels are put back after each step. With it all pixels move, by the posterior of a density
    p(v) and a likelihood N(u; v, noise²) of the known ones, where p(v) is what the chains sample: of step α and noise s that
    is exp(−E(v) / T) with T = s² / (2α), colder than exp(−E(v)) where JEM's are (arXiv 1912.03263, eq. 3, untied). So the
    likelihood's Langevin step is of size s²/2, whatever α; it is taken implicitly, (v + r · u) / (1 + r) with
    r = s² / (2 · noise²), which is stable however small ``noise`` is, and puts the known pixels back as it goes to zero. On
    a Gaussian energy the chains' mean is the posterior's.

    Args:
        energy_fn: as of :func:`timm_jem.sgld`.
        u: what is known, pixels, shape (B, C, H, W); its other values are not looked at.
        mask: True where pixels are unknown, bool, shape (B, C, H, W).
        start: where unknown pixels start, pixels, shape (B, C, H, W).
        config: how chains move.
        y: classes, as of :func:`timm_jem.sgld`.
        noise: standard deviation of the known pixels' noise, pixels in [-1, 1]; None: none.
        generator, num_steps, denoise_steps, batch_size, on_step: as of :func:`timm_jem.sgld`.

    Returns:
        Pixels, shape (B, C, H, W); known ones are those of ``u`` unless they have ``noise``.

    Raises:
        InputError: a noise out of range, or one with chains that have none themselves, or as :func:`timm_jem.sgld`.
    """
    check_settings(config)
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == u.shape):
        raise InputError(f"the mask of a restoration is {kind(mask)}: give bool, shape {tuple(u.shape)}")
    if noise is not None:
        check_number("noise of the known pixels", noise, least=1e-6, most=2)
        if not config.noise_std:
            raise InputError("chains that make no noise sample no posterior: give a sgld_config whose noise_std is above 0")
    if not is_floats(start) or start.shape != u.shape:
        raise InputError(f"the start of a restoration is {kind(start)}: give pixels of shape {tuple(u.shape)}")
    num_steps = config.num_steps if num_steps is None else num_steps
    check_whole("num_steps of a restoration", num_steps, 1, MOST_STEPS)
    v = torch.where(mask, start.to(u), u)
    pull = 0.0 if noise is None else config.noise_std**2 / (2 * noise**2)
    options = {"y": y, "generator": generator, "batch_size": batch_size, "num_steps": 1}
    for step in range(num_steps):
        now = config.of_step(step, num_steps)
        v = sgld(energy_fn, v, now, **options, first_step=step, denoise_steps=int(step >= num_steps - denoise_steps))
        known = u
        if noise is not None:
            known = torch.lerp(v, u, pull / (1 + pull))
            if config.pixel_clamp is not None:  # u may lie outside
                known = known.clamp(-config.pixel_clamp, config.pixel_clamp)
        v = torch.where(mask, v, known)
        if on_step is not None:
            on_step(step + 1, v)
    return v
