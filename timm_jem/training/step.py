"""One iteration of joint training, up to the loss."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from timm_jem.energy import energy
from timm_jem.model import JEM
from timm_jem.objectives import ObjectiveConfig, joint_loss
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.sampling import SGLDConfig, frozen, randn, sgld

__all__ = ["joint_step"]


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
) -> dict[str, Tensor]:
    """Draw negatives, move them by SGLD, put them back, and return the joint loss (JEM, arXiv 1912.03263, algorithm 1).

    As many chains as images; with ``objective.w_xy`` > 0 they are chains of E(x, y) with the images' labels, so that
    the classes' frequencies cancel in the difference. Data and chains go through the network in one forward, or, where
    a BatchNorm in train mode would mix them, each in its own, and only the data's moves the running statistics:
    evaluation meets images, not chains. Without ``w_x`` and ``w_xy`` it is cross-entropy alone, and no
    chain moves.

    Args:
        model: ``jem`` as the training loop runs it (prepared, compiled or ``jem`` itself): model input to logits. The
            loss goes through its forward, so that distributed wrappers see it.
        jem: for its normalisation.
        u: images, pixels in [-1, 1], shape (B, C, H, W).
        y: labels, int64, shape (B,).
        buffer: with classes where ``objective.w_xy`` > 0.
        sgld_config: how chains move.
        objective: weights of the loss.
        data_noise: standard deviation of the Gaussian noise added to the images, pixels (paper: 0.03).
        generator: randomness of data noise and SGLD.
        u_ce: the images for the cross-entropy, where they are augmented otherwise than ``u`` (SADA-JEM, arXiv
            2209.07959, takes un-augmented images for p(x)), pixels, shape (B, C, H, W); None: ``u`` with its noise.

    Returns:
        Named terms of :func:`timm_jem.joint_loss`; ``loss`` has the graph.
    """
    if data_noise:
        u = u + data_noise * randn(u.shape, generator=generator, device=u.device, dtype=u.dtype)
    if not (objective.w_x or objective.w_xy):
        return joint_loss(model(jem.normalize(u if u_ce is None else u_ce)), y, config=objective)
    y_neg = y if objective.w_xy else None
    u_neg, slots = buffer.draw(len(u), y_neg)
    # Outside no_sync, DistributedDataParallel would wait for gradients that sampling never makes.
    with frozen(model), getattr(model, "no_sync", contextlib.nullcontext)():
        u_neg = sgld(
            lambda u, *labels: energy(model(jem.normalize(u)), *labels), u_neg, sgld_config, y=y_neg, generator=generator
        )
    buffer.put(slots, u_neg)
    parts = [u, u_neg] if u_ce is None else [u, u_neg, u_ce]
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if batch_norms:
        logits = [model(jem.normalize(u))]
        with _statistics_kept(batch_norms):
            logits += [model(jem.normalize(part)) for part in parts[1:]]
    else:
        logits = model(jem.normalize(torch.cat(parts))).split([len(part) for part in parts])
    return joint_loss(logits[0], y, logits[1], y_neg, objective, logits_ce=None if u_ce is None else logits[2])


@contextlib.contextmanager
def _statistics_kept(batch_norms: list[nn.Module]) -> Iterator[None]:
    """Batches are normalised by their own statistics still, but the running ones stay."""
    tracking = [m.track_running_stats for m in batch_norms]
    try:
        for m in batch_norms:
            m.track_running_stats = False
        yield
    finally:
        for m, flag in zip(batch_norms, tracking, strict=True):
            m.track_running_stats = flag
