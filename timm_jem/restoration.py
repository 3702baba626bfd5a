"""Inpainting and denoising by SGLD chains over any callable energy: what is known of an image holds the chain."""

from collections.abc import Callable

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole
from timm_jem.inputs import is_floats, kind
from timm_jem.sampling import MOST_STEPS, Generators, SGLDConfig, sgld

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
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.is_meta or tuple(mask.shape) not in shapes:
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

    Without ``noise`` the known pixels are put back after each step. With it a chain descends the posterior energy
    E(v) + ‖v − u‖² / (2 · noise²), the sum over the known pixels, and all pixels move. That second term takes an implicit
    step, (v + r · u) / (1 + r) with r = step size / noise², which is stable however small ``noise`` is and becomes the
    former as it goes to zero; on a Gaussian energy the chains' mean is that of the posterior. As with all SGLD of untied
    step and noise (JEM, arXiv 1912.03263, eq. 3), chains are colder or warmer than the posterior, likelihood and all.

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
        InputError: a noise out of range, or as :func:`timm_jem.sgld`.
    """
    if noise is not None:
        check_number("noise of the known pixels", noise, above=0, most=2)
    if not is_floats(start) or start.shape != u.shape:
        raise InputError(f"the start of a restoration is {kind(start)}: give pixels of shape {tuple(u.shape)}")
    num_steps = config.num_steps if num_steps is None else num_steps
    check_whole("num_steps of a restoration", num_steps, 1, MOST_STEPS)
    v, pull = torch.where(mask, start.to(u), u), torch.zeros(())

    def measure(chains: Tensor, gradient: Tensor) -> None:
        """How hard the known pixels pull in this step: as far as the energy's gradient goes, if that is normalised."""
        nonlocal pull
        pull = torch.full((), config.step_size / noise**2, dtype=u.dtype, device=u.device)
        if config.normalize_grad:
            pull = pull / gradient.flatten(1).norm(dim=1)[:, None, None, None] * gradient[0].numel() ** 0.5

    options = {"y": y, "generator": generator, "batch_size": batch_size, "num_steps": 1}
    for step in range(num_steps):
        quiet = int(step >= num_steps - denoise_steps)
        v = sgld(energy_fn, v, config, **options, denoise_steps=quiet, on_gradient=None if noise is None else measure)
        held = u if noise is None else torch.lerp(v, u, 1 - 1 / (1 + pull))  # the whole way where the pull has no end
        v = torch.where(mask, v, held)
        if on_step is not None:
            on_step(step + 1, v)
    return v
