"""One iteration of joint training, up to the loss."""

import contextlib

import torch
from torch import Tensor, nn

from timm_jem.energy import energy
from timm_jem.errors import InputError
from timm_jem.model import JEM
from timm_jem.modes import batch_norms, frozen, in_eval_mode, statistics_kept
from timm_jem.objectives import ObjectiveConfig, joint_loss
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.sampling import SGLDConfig, draw_classes, randn, sgld

__all__ = ["BATCH_NORM", "joint_step"]

BATCH_NORM = ("eval", "frozen", "train")


def joint_step(
    model: nn.Module,
    jem: JEM,
    u: Tensor,
    y: Tensor,
    buffer: ReplayBuffer,
    *,
    sgld_config: SGLDConfig,
    objective: ObjectiveConfig,
    data_noise: float,
    generator: torch.Generator,
    u_ce: Tensor | None = None,
    y_ce: Tensor | None = None,
    class_frequencies: Tensor | None = None,
    batch_norm: str = "eval",
) -> dict[str, Tensor]:
    """Draw negatives, move them by SGLD, put them back, and return the joint loss (JEM, arXiv 1912.03263, algorithm 1).

    As many chains as images. A buffer without classes gives chains of E(x). One with classes gives chains of E(x, y),
    with the images' labels, so that the classes' frequencies cancel in the difference, and classes drawn from
    ``class_frequencies`` for images without a label: samples of p(x, y) for ``w_xy``, and of p(y) p(x|y) as negatives of
    E(x) for ``w_x`` and for images without a label (``class_cond_p_x_sample`` of JEM's released code). Without ``w_x``
    and ``w_xy`` it is cross-entropy alone, and no chain moves. Nothing waits for the device.

    Data and chains go through the network in one forward, or, where a BatchNorm in train mode would mix them, each in its
    own, and only the data's moves the running statistics: evaluation meets images, not chains. ``batch_norm`` says what
    BatchNorm layers in train mode do:

    - "eval": normalise the chains by running statistics while they move, all batches of the loss by their own (JEM).
    - "frozen": normalise everything by running statistics, which never move; as for fine-tuning.
    - "train": normalise the chains by their own statistics while they move, too (the released code of JEM++, arXiv
      2109.09032, and SADA-JEM, arXiv 2209.07959); other layers, dropout say, are in eval mode meanwhile. The density that
      is sampled then isn't quite the one that evaluation scores.

    Args:
        model: ``jem`` as the training loop runs it (prepared, compiled or ``jem`` itself): model input to logits. The
            loss goes through its forward, so that distributed wrappers see it.
        jem: for its normalisation.
        u: images, pixels in [-1, 1], shape (B, C, H, W).
        y: labels, int64, shape (B,); −1: unknown.
        buffer: with classes where ``objective.w_xy`` > 0.
        sgld_config: how chains move.
        objective: weights of the loss.
        data_noise: standard deviation of the Gaussian noise added to the images, pixels (paper: 0.03).
        generator: randomness of data noise, SGLD and drawn classes.
        u_ce: the images for the cross-entropy, where they are others than ``u`` or augmented otherwise (SADA-JEM takes
            un-augmented images for p(x) and a batch of its own for cross-entropy), pixels, shape (N, C, H, W); None:
            ``u`` with its noise.
        y_ce: labels for the cross-entropy, int64, shape (N,); −1: doesn't count; None: ``y``.
        class_frequencies: p(y) of images without a label, up to a factor, shape (num_classes,); None: uniform.
        batch_norm: "eval", "frozen" or "train"; see above.

    Returns:
        Named terms of :func:`timm_jem.joint_loss`, of which ``loss`` has the graph, and, where chains moved, detached
        scalars about them, pixels: ``chain_rms`` (their root mean square), ``chain_moved`` (root mean square of their
        displacement in this iteration), ``chain_spread`` (mean over pixels of the standard deviation over chains, where
        there are several), and with a ``pixel_clamp`` ``chain_saturated`` (share of values at 0.999 of the clamp or
        beyond, less the same share of the images without noise).

    Raises:
        InputError: ``w_xy`` > 0 and a buffer without classes, an unknown ``batch_norm``, labels or class frequencies of
            wrong shape.
    """
    if batch_norm not in BATCH_NORM:
        raise InputError(f"batch_norm is {batch_norm!r}: give one of {', '.join(BATCH_NORM)}")
    if objective.w_xy and buffer.labels is None:
        raise InputError("objective w_xy is above 0 and the replay buffer has no classes: build it with num_classes")
    clean = u
    if data_noise:
        u = u + data_noise * randn(u.shape, generator=generator, device=u.device, dtype=u.dtype)
    if not (objective.w_x or objective.w_xy):
        (logits,) = _logits(model, jem, [u if u_ce is None else u_ce], batch_norm)
        return joint_loss(logits, y if y_ce is None else y_ce, config=objective)
    y_neg = None
    if buffer.labels is not None:
        weights = torch.ones(buffer.num_classes, device=y.device) if class_frequencies is None else class_frequencies
        if weights.shape != (buffer.num_classes,):
            raise InputError(
                f"class_frequencies has shape {tuple(weights.shape)}: give one a class, shape ({buffer.num_classes},)"
            )
        y_neg = torch.where(y == -1, draw_classes(len(y), weights.to(y.device), generator=generator), y)
    start, slots = buffer.draw(len(u), y_neg)
    # Outside no_sync, DistributedDataParallel would wait for gradients that sampling never makes.
    with (
        frozen(model, "train" if batch_norm == "train" else "eval"),
        getattr(model, "no_sync", contextlib.nullcontext)(),
    ):
        u_neg = sgld(
            lambda u, *labels: energy(model(jem.normalize(u)), *labels), start, sgld_config, y=y_neg, generator=generator
        )
    buffer.put(slots, u_neg)
    parts = [u, u_neg] if u_ce is None else [u, u_neg, u_ce]
    logits = _logits(model, jem, parts, batch_norm)
    # The chain drawn for an image without a label is a negative of x alone, whatever its class.
    terms = joint_loss(logits[0], y, logits[1], y, objective, logits_ce=None if u_ce is None else logits[2], y_ce=y_ce)
    return terms | _chain_terms(start, u_neg, clean, sgld_config.pixel_clamp)


def _logits(model: nn.Module, jem: JEM, parts: list[Tensor], batch_norm: str) -> list[Tensor]:
    mixing = batch_norms(model)
    if mixing and batch_norm != "frozen":
        logits = [model(jem.normalize(parts[0]))]
        with statistics_kept(mixing):
            return logits + [model(jem.normalize(part)) for part in parts[1:]]
    with in_eval_mode(mixing):
        return list(model(jem.normalize(torch.cat(parts))).split([len(part) for part in parts]))


def _chain_terms(start: Tensor, chains: Tensor, images: Tensor, clamp: float | None) -> dict[str, Tensor]:
    terms = {
        "chain_rms": chains.square().mean().sqrt(),
        "chain_moved": (chains - start).square().mean().sqrt(),
    }
    if len(chains) > 1:
        terms["chain_spread"] = chains.std(0, correction=0).mean()
    if clamp is not None:
        at_clamp, of_images = ((pixels.detach().abs() >= 0.999 * clamp).float().mean() for pixels in (chains, images))
        terms["chain_saturated"] = at_clamp - of_images
    return terms
