"""How close drawn images are to real ones, and how long chains should be for that."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.model import JEM
from timm_jem.sampling import frozen, sgld, uniform_noise

__all__ = ["best_num_steps", "frechet_distance", "thumbnails"]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features (Heusel et al., NeurIPS 2017, eq. 6).

    |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½), in float64; the last trace is the sum of the roots of the product's
    eigenvalues.

    Args:
        a, b: features, shapes (N, D) and (M, D), at least two rows each.

    Returns:
        The distance; NaN where a feature is not finite.

    Raises:
        InputError: fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise InputError(f"the Fréchet distance of {len(a)} and {len(b)} images is undefined: give two of each at least")
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan  # LAPACK would not survive it
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    # Eigenvalues of a product of covariances are real and at least zero, up to rounding.
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * roots).item()


def thumbnails(u: Tensor) -> Tensor:
    """Pixels averaged down to 8×8 at most, clamped to [-1, 1], flattened: (N, C, H, W) to (N, C · 64 or less)."""
    size = [min(side, 8) for side in u.shape[-2:]]
    return F.adaptive_avg_pool2d(u.clamp(-1, 1), size).flatten(1)


@torch.no_grad()
def best_num_steps(
    jem: JEM, real: Tensor, y: Tensor, candidates: Sequence[int], *, generator: torch.Generator, batch_size: int = 256
) -> tuple[int, dict[int, float]]:
    """The length of fresh chains whose images are nearest to ``real`` ones.

    Near by the Fréchet distance of thumbnails: no extractor, and for images up to 8×8 the pixels themselves. Each
    candidate's last ``jem.sgld.denoise_steps`` steps are noise-free, as in ``jem.sample``.

    Args:
        jem: the model; its flags are left as they were.
        real: held-out images, pixels in [-1, 1], shape (N, C, H, W).
        y: classes of the chains, int64, shape (M,).
        candidates: numbers of steps, each above ``denoise_steps``.
        generator: the only source of randomness.
        batch_size: chains through the network at once.

    Returns:
        The best of ``candidates``, and the distance of each; NaN for chains that ran away, which are never the best of
        several.
    """
    config, device = jem.sgld, jem.mean.device
    real = thumbnails(real.to(device))
    y = y.to(device)
    u = uniform_noise((len(y), *jem.input_size), generator=generator, device=device)
    distances, done = {}, 0
    with frozen(jem):
        for steps in sorted(candidates):
            noisy = steps - config.denoise_steps
            u = sgld(jem.pixel_energy, u, config, y=y, generator=generator, num_steps=noisy - done, batch_size=batch_size)
            done = noisy
            final = sgld(
                jem.pixel_energy,
                u,
                config,
                y=y,
                num_steps=config.denoise_steps,
                denoise_steps=config.denoise_steps,
                batch_size=batch_size,
            )
            distances[steps] = frechet_distance(thumbnails(final), real)
    return min(distances, key=lambda steps: (math.isnan(distances[steps]), distances[steps], steps)), distances
