"""Counterfactuals: the least change that takes images to other classes under a classifier's joint energy."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_jem.energy import energy
from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.inputs import is_floats, is_labels, kind
from timm_jem.sampling import MOST_STEPS, filled

__all__ = ["Counterfactual", "counterfactual"]

_OUTSIDE = 1 / 127.5  # of [-1, 1], by which rounding, of bfloat16 say, may take a pixel there: a grey level
_LARGEST = 1e9  # step size, however flat the energy
_GROWTH = 1.2  # of the step size after a step that was taken; one that was not halves it


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Images changed to other classes.

    Attributes:
        images: what they became, shape (B, C, H, W).
        probability: p(y|x) of them under the classes asked for, shape (B,); ``probability_before``: of what was given.
        energies: E(x) along the way, shape (B, S + 1): first that of what was given, last that of ``images``. A step that an
            image didn't take repeats its energy.
        distance: ℓ2 from what was given, pixels in [-1, 1], shape (B,); that of images in half precision before these were
            rounded.
        reached: whether the class asked for is the likeliest, with the confidence asked for; bool, shape (B,).
    """

    images: Tensor
    probability: Tensor
    probability_before: Tensor
    energies: Tensor
    distance: Tensor
    reached: Tensor


def counterfactual(
    logits_fn: Callable[[Tensor], Tensor],
    u: Tensor,
    y: Tensor,
    *,
    confidence: float | None = 0.5,
    weight: float = 0.05,
    sparsity: float = 0.0,
    limit: float | None = None,
    steps: int = 200,
    step_size: float | None = None,
    batch_size: int = 256,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Counterfactual:
    """Descend E(v, y) + weight/2 · ‖v − u‖₂² + sparsity · ‖v − u‖₁ from v = u within [-1, 1]; each image stops when sure.

    Wachter et al. (arXiv 1711.00399) weigh a prediction's loss against a distance. Here −log p(v, y) takes the loss's
    place, so that images become likely under the class instead of fooling the classifier soonest: Schut et al. (AISTATS
    2021) let a certain classifier make counterfactuals plausible, and the energy is what ECCCo (AAAI 2024, arXiv
    2312.10648) adds to the loss. Stopping at p(y|v) is JEM's (arXiv 1912.03263, section 5.4). The steps are proximal
    gradient descent, ours: one that would raise an image's sum is not taken and halves that image's step. The minimum is
    a local one.

    Args:
        logits_fn: pixels to logits, shape (B, num_classes).
        u: pixels in [-1, 1], shape (B, C, H, W); not changed.
        y: the classes to change to, int64, shape (B,).
        confidence: p(y|v) at which an image stops, if no other class is likelier; None: none stops before the last step,
            near the minimum. A calibrated model need not be surer than 0.6 even there: on the digits p was 0.58 to 0.99.
        weight: price of distance, nats per squared pixel.
        sparsity: price of each pixel's change, nats per pixel; pixels that matter least stay exactly as they were.
        limit: the largest ℓ2 distance from ``u``, pixels; None: any. In half precision rounding may add to it.
        steps: the most steps, those not taken included.
        step_size: ℓ2 length of the first step and of the longest, pixels; None: 0.02 · √(C·H·W).
        batch_size: images through the network at once, though never fewer than four are.
        on_step: called with (steps done, pixels) after each step.

    Returns:
        A :class:`Counterfactual` in pixels.

    Raises:
        InputError: no pixels in [-1, 1], no such classes, or a setting out of range.
    """
    _check_images(u, y)
    if confidence is not None:
        check_number("confidence of a counterfactual", confidence, above=0, most=1)
    check_number("weight of a counterfactual", weight, least=0)
    check_number("sparsity of a counterfactual", sparsity, least=0)
    if limit is not None:
        check_number("limit of a counterfactual", limit, above=0)
    check_whole("steps of a counterfactual", steps, 1, MOST_STEPS)
    longest = 0.02 * math.sqrt(u[0].numel()) if step_size is None else step_size
    check_number("step_size of a counterfactual", longest, above=0)
    check_whole("batch_size", batch_size, 1)
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step is {quoted(on_step)}: give a function of (steps done, pixels)")

    def at(v: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        parts = zip(v.split(batch_size), rows.split(batch_size), strict=True)
        found = [_state(logits_fn, w, u[own], y[own], weight, sparsity, confidence) for w, own in parts]
        return tuple(torch.cat(values) for values in zip(*found, strict=True))

    with torch.inference_mode(False), torch.enable_grad():
        u, y = u.detach().clone(), y.clone()
        v, rows = u.clamp(-1, 1), torch.arange(len(u), device=u.device)
        state = at(v, rows)  # changed in place from here on
        cost, slope, e, p, sure = state
        before, energies = p.clone(), [e.clone()]
        size = longest / _length(slope).clamp(min=longest / _LARGEST)
        for step in range(1, steps + 1):
            if confidence is not None:
                rows = (~sure).nonzero().flatten()
            if not len(rows):
                break
            next_v, size[rows] = _step(v[rows], u[rows], slope[rows], size[rows], longest, sparsity, limit)
            found = at(next_v, rows)
            better = found[0] <= cost[rows]
            taken, refused = rows[better], rows[~better]
            v[taken], size[taken], size[refused] = (
                next_v[better],
                (size[taken] * _GROWTH).clamp(max=_LARGEST),
                size[refused] / 2,
            )
            for kept, new in zip(state, found, strict=True):
                kept[taken] = new[better]
            energies.append(e.clone())
            if on_step is not None:
                on_step(step, v.clone())
    return Counterfactual(v, p, before, torch.stack(energies, 1), _length(v - u).flatten(), sure)


def _check_images(u: Tensor, y: Tensor) -> None:
    if not is_floats(u) or u.ndim != 4 or not u.numel():
        raise InputError(f"images to change are {kind(u)}: give pixels in [-1, 1], shape (B, C, H, W), at least one image")
    if not is_labels(y, len(u), u):
        raise InputError(f"y is {kind(y)}: give the classes to change to, int64, shape ({len(u)},)")
    if not u.abs().max() <= 1 + _OUTSIDE:  # NaN, too
        raise InputError(f"images to change have pixels of up to {u.abs().max():.4g}: cut them, jem.normalize(u.clamp(-1, 1))")


def _state(
    logits_fn: Callable[[Tensor], Tensor],
    v: Tensor,
    u: Tensor,
    y: Tensor,
    weight: float,
    sparsity: float,
    confidence: float | None,
) -> tuple[Tensor, ...]:
    """Of images on the way: what is minimised, its smooth part's slope, E(v), p(y|v), and whether the class is reached."""
    count, v, u, y = len(v), filled(v).detach().requires_grad_(True), filled(u), filled(y)
    logits, away = logits_fn(v), v - u
    smooth = energy(logits, y) + weight / 2 * away.square().flatten(1).sum(1)
    slope = torch.autograd.grad(smooth.sum(), v)[0]
    with torch.no_grad():
        cost = smooth + sparsity * away.abs().flatten(1).sum(1)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        p = probabilities.gather(1, y[:, None]).squeeze(1)
        sure = (probabilities.argmax(1) == y) & (p >= (confidence or 0))
        return tuple(values[:count].detach() for values in (cost, slope, energy(logits), p, sure))


def _step(
    v: Tensor, u: Tensor, slope: Tensor, size: Tensor, longest: float, sparsity: float, limit: float | None
) -> tuple[Tensor, Tensor]:
    """A proximal step no longer than ``longest``, and the sizes, shape (B, 1, 1, 1), that made it."""
    for _ in range(2):  # once more where it was too long
        next_v = _nearer(v - size * slope, u, size * sparsity, limit)
        far = _length(next_v - v)
        size = torch.where(far > longest, size * (longest / far), size)
    return torch.where(far > longest, v + (next_v - v) * (longest / far), next_v), size


def _nearer(v: Tensor, u: Tensor, threshold: Tensor, limit: float | None) -> Tensor:
    """``v`` with the change of each pixel of ``u`` less by ``threshold``, cut to [-1, 1] and the whole of it to ``limit``."""
    away = v - u
    v = torch.where(away.abs() <= threshold, u, v - threshold * away.sign()).clamp(-1, 1)
    if limit is None:
        return v
    far = _length(v - u)
    return torch.where(far > limit, u + (v - u) * (limit / far.clamp(min=limit)), v)


def _length(change: Tensor) -> Tensor:
    """ℓ2 of each image, shape (B, 1, 1, 1)."""
    return change.flatten(1).norm(dim=1)[:, None, None, None]
