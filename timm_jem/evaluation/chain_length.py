"""Chains seen at several lengths, and which of these is best."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.generation import frechet_distance, pyramid
from timm_jem.evaluation.labelled import labels
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.noise import chain_generators, draw_seeds
from timm_jem.progress import tqdm
from timm_jem.sampling import FEWEST, sgld

__all__ = ["best_num_steps", "chains_by_length"]


def chains_by_length(
    jem: JEM,
    lengths: Sequence[int],
    *,
    y: Tensor,
    generator: torch.Generator,
    batch_size: int = 256,
) -> Iterator[tuple[int, Tensor]]:
    """One set of fresh chains of E(x, y) seen at several lengths.

    Each time the last ``jem.sgld.denoise_steps`` steps are noise-free, as in ``jem.sample``, and belong to the view:
    the chains themselves go on with noise. With ``jem.sgld.step_decay`` shorter chains are no part of longer ones, and each
    length is run from the start.

    Args:
        jem: the model; its flags are as they were between two views, too.
        lengths: numbers of steps, each above ``denoise_steps``.
        y: classes of the chains, int64, shape (N,).
        generator: the only source of randomness. It draws the seeds that ``jem.sample`` would draw: the same chains.
        batch_size: chains on the model's device at once, though never fewer than four are.

    Yields:
        A length, in increasing order, and pixels, shape (N, C, H, W), on the CPU.

    Raises:
        InputError: a length that the noise-free steps use up, or classes that are none.
    """
    for steps in lengths:
        check_whole("length of chains", steps, jem.sgld.denoise_steps + 1)
    check_whole("batch_size", batch_size, 1)
    y = labels(y, num_classes=jem.num_classes, what="classes of chains")
    return _views(jem, sorted(lengths), y, generator, batch_size)


def _views(
    jem: JEM, lengths: list[int], y: Tensor, generator: torch.Generator, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    config, n, done = jem.sgld, len(y), 0
    rest_at = jem.rest_at(n, config, y=y)
    generators = chain_generators(draw_seeds(n, generator))  # as in jem.sample
    u = jem.fresh(n, y=y, generator=generators)
    last, size = config.denoise_steps, max(batch_size, FEWEST)  # as many as sgld takes at once, so that they round alike
    parts = [(slice(start, start + size), generators[start : start + size]) for start in range(0, n, size)]
    total = sum(lengths) if config.step_decay else len(lengths) * last + max(lengths, default=last) - last
    with tqdm(total=len(parts) * total, desc="chains", leave=False) as bar:
        for steps in lengths:
            chains, views = [], []
            with frozen(jem):
                for rows, own in parts:
                    options = {"y": y[rows].to(jem.device), "batch_size": batch_size, "on_step": lambda *_: bar.update()}
                    options["rest_at"] = None if rest_at is None else rest_at[rows]
                    now = u[rows].to(jem.device)
                    if config.step_decay:
                        options["generator"] = [each.clone_state() for each in own]
                        view = sgld(jem.pixel_energy, now, config, num_steps=steps, denoise_steps=last, **options)
                    else:
                        more = {"num_steps": steps - last - done, "first_step": done}
                        now = sgld(jem.pixel_energy, now, config, generator=own, **more, **options)
                        more = {"num_steps": last, "first_step": steps - last}
                        view = sgld(jem.pixel_energy, now, config, denoise_steps=last, **more, **options)
                    chains.append(now.cpu())
                    views.append(view.cpu())
            u, done = torch.cat(chains), steps - last
            yield steps, torch.cat(views)


@torch.no_grad()
def best_num_steps(
    jem: JEM,
    real: Tensor | Iterable[Tensor],
    y: Tensor,
    candidates: Sequence[int],
    *,
    generator: torch.Generator,
    batch_size: int = 256,
) -> tuple[int, dict[int, float]]:
    """The length of fresh chains whose images are nearest to ``real`` ones.

    Near by the Fréchet distance in the features of :func:`pyramid`, which need no network, see noise and blur, and of images
    up to 8×8 are the pixels themselves. Each candidate's last ``jem.sgld.denoise_steps`` steps are noise-free, as in
    ``jem.sample``.

    Args:
        jem: the model; its flags are left as they were.
        real: held-out images, pixels in [-1, 1], shape (N, C, H, W), or batches of them, one in memory at a time.
        y: classes of the chains, int64, shape (M,).
        candidates: numbers of steps, each above ``denoise_steps``.
        generator: the only source of randomness.
        batch_size: chains through the network at once.

    Returns:
        The best of ``candidates``, and the distance of each; NaN for chains that ran away, which are never the best of
        several.

    Raises:
        InputError: no candidates, or one that the noise-free steps use up.
    """
    if len(candidates) == 0:
        raise InputError("there are no lengths of chains to choose from: give at least one")
    if isinstance(real, Tensor):
        real = real.split(batch_size) if real.ndim else [real]
    features = [_features(part, jem) for part in (real if isinstance(real, Iterable) else [real])]
    if (count := sum(map(len, features))) < 2:
        raise InputError(f"images to be near to are {count}: give at least two")
    features = torch.cat(features)
    chains = chains_by_length(jem, candidates, y=y, generator=generator, batch_size=batch_size)
    # Features are of pixels cut to [-1, 1], in which infinite ones would look like others.
    distances = {steps: frechet_distance(pyramid(u), features) if u.isfinite().all() else math.nan for steps, u in chains}
    return min(distances, key=lambda steps: (math.isnan(distances[steps]), distances[steps], steps)), distances


def _features(real: Tensor, jem: JEM) -> Tensor:
    if not isinstance(real, Tensor) or real.shape[1:] != jem.input_size or not real.is_floating_point():
        raise InputError(f"images to be near to are no pixels: give floats, (N, {', '.join(map(str, jem.input_size))})")
    if not real.isfinite().all():
        raise InputError("images to be near to are not finite: give pixels in [-1, 1]")
    return pyramid(real.cpu())
