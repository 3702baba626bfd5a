"""Methods of joint training: what one is, and maximum likelihood by SGLD, of which JEM, JEM++ and SADA-JEM are settings."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from timm_jem.captured import CapturedEnergy
from timm_jem.energy import energy
from timm_jem.errors import InputError, quoted
from timm_jem.evaluation.attacks import PGDConfig, pgd_end
from timm_jem.model import JEM
from timm_jem.modes import batch_norms, checkpointed, frozen, in_eval_mode, statistics_kept
from timm_jem.noise import draw_classes
from timm_jem.objectives import ObjectiveConfig, energy_where_known, joint_loss
from timm_jem.pixels import from_unit
from timm_jem.replay_buffer import ReplayBuffer
from timm_jem.sampling import SGLDConfig, sgld
from timm_jem.training.balance import gradient_ratio
from timm_jem.training.batches import Batch
from timm_jem.training.chain_ramp import ChainRamp
from timm_jem.training.remedy import Remedy
from timm_jem.training.state import local
from timm_jem.training.step_size import StepSize

__all__ = ["Drawn", "MaximumLikelihood", "Method"]


@dataclass
class Drawn:
    """All that a loss needs of one batch; no graph.

    Attributes:
        batch: the images.
        u_neg: negatives, pixels, shape (M, C, H, W), or None.
        y_neg: their classes, int64, shape (M,), or None.
        info: scalars about them, on their device: they are logged, and the guard watches some.
    """

    batch: Batch
    u_neg: Tensor | None = None
    y_neg: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """What :class:`timm_jem.training.Learner` trains by. Any object with these members is one; there is nothing to inherit.

    recipes/train.py takes the one that :func:`timm_jem.training.build.build_method` returns. In a batch ``y`` is −1 where an
    image has no label.

    Attributes:
        watched: names of terms that must not run away from their own past; see
            :class:`timm_jem.training.DivergenceGuard`.
        buffer: persistent chains, which the learner saves, reseeds and deals out; None: there are none.

    It may also have ``heeds``, names of those parts of a :class:`timm_jem.training.Remedy` that reach it, so that a run
    changes, and tells of, no others; and ``adapted(sgld, step)``, which puts what training found in ``step`` steps into
    the settings by which the model draws.
    """

    watched: Sequence[str]
    buffer: ReplayBuffer | None

    def draw(self, model: nn.Module, batch: Batch, *, step: int, remedy: Remedy, generator: torch.Generator) -> Drawn:
        """What the loss of ``batch`` needs besides it, drawn by ``generator`` alone.

        Args:
            model: the model as the training loop runs it (prepared, compiled): model input to logits.
            batch: images, pixels in [-1, 1].
            step: optimiser steps done.
            remedy: what rollbacks changed so far.
            generator: this process's, on its device.
        """

    def loss(self, model: nn.Module, drawn: Drawn, *, remedy: Remedy) -> dict[str, Tensor]:
        """Scalars by name: ``loss`` with its graph, others detached. The forward goes through ``model``."""

    def state_dict(self) -> dict[str, Any]:
        """What it carries from step to step besides the buffer: tensors, numbers and text. The same in all processes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""


class MaximumLikelihood:
    """Cross-entropy plus maximum likelihood by SGLD chains from a replay buffer (JEM, arXiv 1912.03263, algorithm 1).

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

    With ``attack`` the cross-entropy is that of attacked images, and the likelihood that of the images themselves, as in DAT
    (arXiv 2510.13872): adversarial training (Madry et al., arXiv 1706.06083). The attacker meets the network in eval mode.

    With ``balance`` the ``w_x`` and ``w_xy`` terms are multiplied by c = ‖∇CE‖ / ‖∇gap‖, as in arXiv 2605.23819, so that
    their gradient is (w_x + w_xy) / w_ce times as long as the cross-entropy's, whatever the energies' scale; gap is the mean of
    the two terms by their weights, and ``energy_l2`` stays as it is. What the softplus contrast lets go of is so undone, and
    where the cross-entropy has nothing to learn, in a batch without labels say, the energies learn nothing either. c is that of
    a batch of all processes, with gradient accumulation each batch's own, and both passes of SAM have that of the first.

    Args:
        jem: for its normalisation.
        buffer: with classes where ``objective.w_xy`` > 0; None: for cross-entropy alone.
        sgld: how chains move.
        objective: weights of the loss.
        batch_norm: "eval", "frozen" or "train"; see above.
        class_frequencies: p(y) of images without a label, up to a factor, shape (num_classes,); None: uniform.
        ramp_from, ramp_steps, ramp_auc: how K goes from ``ramp_from`` to ``sgld.num_steps``, see :class:`ChainRamp`.
        step_cosine: what :class:`StepSize` aims at; None: the step size stays.
        grad_accum: how many batches make an optimiser step, by which chains grow longer and the step size adapts.
        attack: on the images of the cross-entropy; None: none.
        balance: see above.
        capture: launch a step's passes as one CUDA graph, see :class:`timm_jem.captured.CapturedEnergy`.

    Raises:
        InputError: no buffer, or ``w_xy`` > 0 and one without classes; an unknown ``batch_norm``; class frequencies of wrong
            shape; ``balance`` without a cross-entropy, or of sharded weights.
    """

    # Energies that sharpen or drift without end; the classifier's loss runs away with them.
    watched = ("gap", "gap_xy", "energy_data", "energy_neg", "ce")

    def __init__(
        self,
        jem: JEM,
        buffer: ReplayBuffer | None,
        *,
        sgld: SGLDConfig,
        objective: ObjectiveConfig,
        batch_norm: str = "eval",
        class_frequencies: Tensor | None = None,
        ramp_from: int = 1,
        ramp_steps: int = 0,
        ramp_auc: float | None = None,
        step_cosine: float | None = None,
        grad_accum: int = 1,
        attack: PGDConfig | None = None,
        balance: bool = False,
        capture: bool = False,
    ) -> None:
        if batch_norm not in ("eval", "frozen", "train"):
            raise InputError(f"batch_norm is {quoted(batch_norm)}: give eval, frozen or train")
        if objective.needs_chains and buffer is None:
            raise InputError("the objective needs chains and there is no replay buffer: build one")
        if objective.w_xy and buffer.labels is None:
            raise InputError("objective w_xy is above 0 and the replay buffer has no classes: build it with num_classes")
        if balance and not objective.w_ce:
            raise InputError("balance measures the energy terms by the cross-entropy, and objective w_ce is 0: raise it")
        if balance and any(local(parameter) is not parameter for parameter in jem.parameters()):
            raise InputError("balance compares gradients of whole weights, and these are sharded: leave it out")
        if buffer is not None and buffer.labels is not None:
            if class_frequencies is None:
                class_frequencies = torch.ones(buffer.num_classes)
            if class_frequencies.shape != (buffer.num_classes,):
                raise InputError(
                    f"class_frequencies has shape {tuple(class_frequencies.shape)}: give one per class, "
                    f"shape ({buffer.num_classes},)"
                )
            class_frequencies = class_frequencies.to(buffer.chains.device)
        if not objective.w_ce:  # what the loss has not may go where it will
            self.watched = tuple(name for name in self.watched if name != "ce")
        self.jem, self.buffer, self.sgld, self.objective = jem, buffer, sgld, objective
        self.batch_norm, self.class_frequencies, self.balance = batch_norm, class_frequencies, balance
        self.ramp = ChainRamp(sgld.num_steps, ramp_from, ramp_steps, ramp_auc, grad_accum)
        self.step_size, self.attack = StepSize(step_cosine, sgld.pixel_clamp, grad_accum), attack
        self.capture: bool = capture
        self._captured: tuple[nn.Module, CapturedEnergy] | None = None

    @property
    def heeds(self) -> tuple[str, ...]:
        """Cross-entropy alone has neither chains nor energies, and a step size that adapts would grow back."""
        if not self.objective.needs_chains:
            return ()
        return ("num_steps", "energy_l2") if self.step_size.adapts else ("num_steps", "step_size", "energy_l2")

    def draw(self, model: nn.Module, batch: Batch, *, step: int, remedy: Remedy, generator: torch.Generator) -> Drawn:
        """Attack the images of the cross-entropy, where that is asked for; draw chains, move them by SGLD, and put them back.

        Returns:
            The chains, of class −1 as a negative of x alone for an image without a label, and, pixels: ``chain_rms``
            (their root mean square), ``chain_moved`` (root mean square of their displacement in this iteration),
            ``chain_spread`` (mean over pixels of the standard deviation over chains, where there are several), with a
            ``pixel_clamp`` ``chain_saturated`` (share of values at 0.999 of the clamp or beyond, less the same share of the
            images without noise), where it adapts ``step_size``, that of the next iteration, and with ``ramp_auc``
            ``num_steps`` and ``auc``, by how much their energies tell images from chains.
        """
        if self.attack is not None:
            batch = self._attacked(model, batch, self.attack, generator)
        if not self.objective.needs_chains:
            return Drawn(batch)
        y, y_chain, config = batch.y, None, self.sgld_at(step, remedy)
        if self.buffer.labels is not None:
            y_chain = torch.where(y == -1, draw_classes(len(y), self.class_frequencies, generator=generator), y)
        start, slots = self.buffer.draw(len(y), y_chain)
        with frozen(model, "train" if self.batch_norm == "train" else "eval"), _unsynchronised(model):
            u_neg = sgld(
                self._energy_fn(model),
                start,
                config,
                y=y_chain,
                generator=generator,
                step_scale=self.step_size.scale,
                on_gradient=self.step_size.see if self.step_size.adapts else None,
            )
        self.buffer.put(slots, u_neg)
        clean = batch.u if batch.clean is None else batch.clean
        terms = _chain_terms(start, u_neg, clean, config.pixel_clamp)
        if self.ramp.auc is not None:
            terms["num_steps"] = torch.full((), float(config.num_steps), device=u_neg.device)
            terms["auc"] = self._told_apart(model, batch.u, u_neg, None if y_chain is None else y)
        if self.step_size.adapts:
            terms["step_size"] = self.step_size.adapt() * config.step_size
        return Drawn(batch, u_neg, y, terms)

    def _energy_fn(self, model: nn.Module) -> Callable[..., Tensor]:
        energy_fn = lambda u, *labels: energy(model(self.jem.normalize(u)), *labels)  # noqa: E731
        if not self.capture:
            return energy_fn
        if self._captured is None or self._captured[0] is not model:
            self._captured = model, CapturedEnergy(energy_fn)
        return self._captured[1]

    @torch.no_grad()
    def _told_apart(self, model: nn.Module, u: Tensor, u_neg: Tensor, y: Tensor | None) -> Tensor:
        with in_eval_mode(model.modules()):
            logits = model(self.jem.normalize(torch.cat([u, u_neg]))).float()
        energies = energy(logits) if y is None else energy_where_known(logits, torch.cat([y, y]))
        return self.ramp.see(*energies.split([len(u), len(u_neg)]))

    def _attacked(self, model: nn.Module, batch: Batch, attack: PGDConfig, generator: torch.Generator) -> Batch:
        u, y = (batch.u, batch.y) if batch.u_ce is None else (batch.u_ce, batch.y if batch.y_ce is None else batch.y_ce)
        with frozen(model), _unsynchronised(model):
            classify = lambda images: model(self.jem.normalize(from_unit(images)))  # noqa: E731
            images = pgd_end(classify, ((u + 1) / 2).clamp(0, 1), y, attack, generator=generator)
        return replace(batch, u_ce=from_unit(images), y_ce=y)

    def loss(self, model: nn.Module, drawn: Drawn, *, remedy: Remedy) -> dict[str, Tensor]:
        """Terms of :func:`timm_jem.joint_loss`, of which ``loss`` has the graph; c becomes ``balance`` of ``drawn.info``."""
        batch, objective = drawn.batch, remedy.objective(self.objective)
        if drawn.u_neg is None:
            (logits,) = self._logits(model, [batch.u if batch.u_ce is None else batch.u_ce])
            return joint_loss(logits, batch.y if batch.y_ce is None else batch.y_ce, config=objective)
        parts = [batch.u, drawn.u_neg] + ([] if batch.u_ce is None else [batch.u_ce])
        logits, logits_neg, *of_ce = self._logits(model, parts)
        logits_ce = of_ce[0] if of_ce else None
        terms = partial(joint_loss, logits, batch.y, logits_neg, drawn.y_neg, logits_ce=logits_ce, y_ce=batch.y_ce)
        if self.balance and "balance" not in drawn.info:  # a second pass over what was drawn descends the same loss
            drawn.info["balance"] = _balance(terms, objective, list(model.parameters()))
        return terms(objective, balance=drawn.info.get("balance"))

    def sgld_at(self, step: int, remedy: Remedy) -> SGLDConfig:
        """The chains' settings at a step: ramp and remedies included, and none of what is for drawing alone."""
        config = replace(self.sgld, num_steps=self.ramp.num_steps(step), jitter=0)
        return remedy.chains(config)

    def adapted(self, sgld: SGLDConfig, step: int) -> SGLDConfig:
        """``sgld`` with the step size that training came to by ``step``, and no longer chains than it had while they grow."""
        scale, longest = self.step_size.scale, self.ramp.num_steps(max(step - 1, 0))
        if longest < self.ramp.last:
            sgld = replace(sgld, num_steps=min(sgld.num_steps, longest))
        return sgld if scale is None else replace(sgld, step_size=sgld.step_size * float(scale))

    def state_dict(self) -> dict[str, Any]:
        """The step size, where it has adapted, and how long chains have become; what else persists are the chains."""
        return {**self.step_size.state_dict(), **self.ramp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the step size and the length of chains of ``state``."""
        self.step_size.load_state_dict(state, self.jem.device)
        self.ramp.load_state_dict(state, self.jem.device)

    def _logits(self, model: nn.Module, parts: list[Tensor]) -> list[Tensor]:
        mixing = batch_norms(model)
        if mixing and checkpointed(model):
            raise InputError(
                "gradient checkpointing runs BatchNorm layers again after the loss, by other statistics: "
                "call set_grad_checkpointing(False), or take a model without BatchNorm"
            )
        if mixing and self.batch_norm != "frozen":
            logits = [model(self.jem.normalize(parts[0]))]
            with statistics_kept(mixing):
                return logits + [model(self.jem.normalize(part)) for part in parts[1:]]
        with in_eval_mode(mixing):
            return list(model(self.jem.normalize(torch.cat(parts))).split([len(part) for part in parts]))


def _balance(terms: Callable[..., dict[str, Tensor]], objective: ObjectiveConfig, weights: list[nn.Parameter]) -> Tensor:
    ce = terms(replace(objective, w_ce=1.0, w_x=0.0, w_xy=0.0, energy_l2=0.0))["loss"]
    both = objective.w_x + objective.w_xy
    gap = terms(replace(objective, w_ce=0.0, w_x=objective.w_x / both, w_xy=objective.w_xy / both, energy_l2=0.0))["loss"]
    return gradient_ratio(ce, gap, weights)


def _unsynchronised(model: nn.Module) -> contextlib.AbstractContextManager:
    """Outside of it DistributedDataParallel would wait for gradients that are never made."""
    return getattr(model, "no_sync", contextlib.nullcontext)()


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
