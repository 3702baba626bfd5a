"""Stochastic gradient Langevin dynamics (SGLD) over any callable energy, in pixels.

Nothing here knows networks' heads or buffers: an energy is a function ``energy_fn(u)`` or ``energy_fn(u, y)`` that
returns shape (B,), and a chain's state is a plain tensor of pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_jem.errors import check_number, check_whole

__all__ = ["SGLDConfig", "draw_classes", "randn", "sgld", "sgld_step", "uniform_noise"]


@dataclass(frozen=True)
class SGLDConfig:
    """How chains move. Defaults are JEM's (arXiv 1912.03263, appendix A, and its released code).

    A step is ``u ← u − step_size · ∇E(u) + noise_std · N(0, I)`` in pixels in [-1, 1]. The paper's equation 3 ties the
    two (gradient times α/2, noise variance α); like the paper's experiments these settings untie them, and
    ``step_size`` multiplies the gradient itself, without the ½.

    Attributes:
        num_steps: steps K of a chain per training iteration (paper: 20).
        step_size: factor of the energy's gradient (paper: 1).
        noise_std: standard deviation of a step's Gaussian noise, pixels (paper: 0.01).
        grad_clamp: elementwise bound of the gradient, or None (paper: none; JEM++, arXiv 2109.09032: 1).
        pixel_clamp: elementwise bound of the chain after each step, or None (paper: none; JEM++: 1).
        sample_steps: steps of a fresh chain in ``JEM.sample``, ``denoise_steps`` included; None: ``num_steps``.
            The training recipe finds it on validation images.
        denoise_steps: how many of a fresh chain's last steps add no noise (paper: 0). They take away the noise that
            a chain always carries.

    Raises:
        InputError: a value outside its range, NaN included.
    """

    num_steps: int = 20
    step_size: float = 1.0
    noise_std: float = 0.01
    grad_clamp: float | None = None
    pixel_clamp: float | None = None
    sample_steps: int | None = None
    denoise_steps: int = 0

    def __post_init__(self) -> None:
        check_whole("sgld num_steps", self.num_steps, 1)
        if self.sample_steps is not None:
            check_whole("sgld sample_steps", self.sample_steps, 1)
        check_whole("sgld denoise_steps", self.denoise_steps, 0)
        check_number("sgld step_size", self.step_size, above=0)
        check_number("sgld noise_std", self.noise_std, least=0)
        for name in ("grad_clamp", "pixel_clamp"):
            if getattr(self, name) is not None:
                check_number(f"sgld {name}", getattr(self, name), above=0)


def randn(shape, *, generator: torch.Generator | None = None, device=None, dtype=None) -> Tensor:
    """Standard normal noise on ``device``, drawn where ``generator`` lives, so that a CPU generator serves any device."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def uniform_noise(
    shape, *, generator: torch.Generator | None = None, device=None, dtype=None, y: Tensor | None = None
) -> Tensor:
    """Uniform noise in [-1, 1] pixels: the initial distribution of JEM's chains (arXiv 1912.03263, appendix A).

    ``y``, the classes of the new chains, is that of every initial distribution, and makes no difference to this one.
    """
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device).mul_(2).sub_(1)


def draw_classes(n: int, weights: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """``n`` classes, int64, shape (n,), drawn by ``weights``, shape (num_classes,), on their device; nothing waits for it."""
    # An exponential race: the first of arrivals at rates p is class c with probability p[c]. torch.multinomial checks its
    # input on the host where n is 1.
    source = weights.device if generator is None else generator.device
    times = torch.empty(n, len(weights), device=source).exponential_(generator=generator)
    return (weights / times.to(weights.device)).argmax(1)


def sgld_step(u: Tensor, grad: Tensor, noise: Tensor | None, config: SGLDConfig) -> Tensor:
    """One step of SGLD, ``u − step_size · grad + noise_std · noise``, with the clamps of ``config``; pure.

    Args:
        u: chains, pixels, shape (B, C, H, W).
        grad: ∇E at ``u``, same shape.
        noise: standard normal, same shape; None for a noise-free step.
        config: see :class:`SGLDConfig`.

    Returns:
        The chains one step later, a new tensor. Source: JEM (arXiv 1912.03263), eq. 3, with untied step and noise.
    """
    if config.grad_clamp is not None:
        grad = grad.clamp(-config.grad_clamp, config.grad_clamp)
    u = torch.add(u, grad, alpha=-config.step_size)
    if noise is not None:
        u = u.add_(noise, alpha=config.noise_std)
    if config.pixel_clamp is not None:
        u = u.clamp_(-config.pixel_clamp, config.pixel_clamp)
    return u


def sgld(
    energy_fn: Callable[..., Tensor],
    u: Tensor,
    config: SGLDConfig,
    *,
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_steps: int | None = None,
    denoise_steps: int = 0,
    batch_size: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run SGLD chains. No graph outlives a step, no parameter gets a gradient, and nothing waits for the device.

    A step's noise is drawn for all chains at once, before the gradients are taken ``batch_size`` chains at a time:
    the same seed gives the same chains however they are split.

    Args:
        energy_fn: ``energy_fn(u)``, or ``energy_fn(u, y)`` when ``y`` is given, to energies of shape (B,).
        u: initial chains, pixels, shape (B, C, H, W); not changed.
        config: see :class:`SGLDConfig`.
        y: labels of the chains, shape (B,); chains of E(x, y) instead of E(x).
        generator: the only source of randomness; None: PyTorch's global one.
        num_steps: instead of ``config.num_steps``.
        denoise_steps: how many of the last steps are without noise.
        batch_size: chains per gradient evaluation; None: all.
        on_step: called with (steps done, chains) after each step.

    Returns:
        The final chains, pixels, detached, shape (B, C, H, W).
    """
    num_steps = config.num_steps if num_steps is None else num_steps
    with torch.inference_mode(False), torch.enable_grad():
        u = u.detach().clone()  # a clone of an inference tensor is an ordinary one
        y = None if y is None else y.clone()
        for step in range(num_steps):
            noisy = config.noise_std > 0 and step < num_steps - denoise_steps
            noise = randn(u.shape, generator=generator, device=u.device, dtype=u.dtype) if noisy else None
            u = sgld_step(u, _gradient(energy_fn, u, y, batch_size), noise, config)
            if on_step is not None:
                on_step(step + 1, u)
    return u


def _gradient(energy_fn: Callable[..., Tensor], u: Tensor, y: Tensor | None, batch_size: int | None) -> Tensor:
    gradients = []
    size = batch_size or max(len(u), 1)
    for start in range(0, len(u), size):
        part = u[start : start + size].detach().requires_grad_(True)
        args = (part,) if y is None else (part, y[start : start + size])
        gradients.append(torch.autograd.grad(energy_fn(*args).sum(), part)[0])
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)
