"""Refinement of images before they are classified (JEM-k): a few steps of SGLD downhill in energy, over any callable energy."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.inputs import kind
from timm_jem.noise import Generators, randn
from timm_jem.sampling import MOST_STEPS, SGLDConfig, check_settings, sgld, sgld_step

__all__ = ["refine"]


def refine(
    energy_fn: Callable[[Tensor], Tensor],
    u: Tensor,
    config: SGLDConfig,
    *,
    steps: int,
    generator: Generators = None,
    batch_size: int | None = None,
    create_graph: bool = False,
) -> Tensor:
    """``steps`` steps of SGLD on E(u) from images: JEM-k of JEM (arXiv 1912.03263, section 5.4), k = ``steps``.

    Args:
        energy_fn: pixels to energies, shape (B,).
        u: pixels in [-1, 1], shape (B, C, H, W); not changed.
        config: step size, noise and clamps; its ``jitter`` is for drawing, and moves nothing here.
        steps: k (paper: 1 and 10).
        generator, batch_size: as of :func:`timm_jem.sgld`.
        create_graph: the result's gradient with respect to ``u``, which then requires one, flows through every step, by
            double backward; all images then go through the network at once.

    Returns:
        Pixels, shape (B, C, H, W).

    Raises:
        InputError: ``steps`` below 1, or as :func:`timm_jem.sgld`.
    """
    check_whole("steps of a refinement", steps, 1, MOST_STEPS)
    check_settings(config)
    config = replace(config, jitter=0)
    if not create_graph:
        return sgld(energy_fn, u, config, generator=generator, num_steps=steps, batch_size=batch_size)
    for step in range(steps):
        energies = energy_fn(u)
        if not (isinstance(energies, Tensor) and energies.shape == u.shape[:1] and u.requires_grad):
            raise InputError(
                f"energy_fn gives {kind(energies)} for {len(u)} images: give energies of shape ({len(u)},), of images that "
                "require a gradient"
            )
        slope = torch.autograd.grad(energies.sum(), u, create_graph=True)[0]
        noise = randn(u.shape, generator=generator, device=u.device, dtype=u.dtype) if config.noise_std else None
        u = sgld_step(u, slope, noise, config.of_step(step, steps))
    return u
