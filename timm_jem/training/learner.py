"""All that joint training carries from one iteration to the next."""

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_jem.errors import InputError
from timm_jem.model import JEM
from timm_jem.objectives import ObjectiveConfig
from timm_jem.replay_buffer import ReplayBuffer, redistribute
from timm_jem.sampling import SGLDConfig
from timm_jem.training.guard import Remedy
from timm_jem.training.state import load_optimizer, load_tensors, local
from timm_jem.training.step import joint_step

__all__ = ["Batch", "Learner", "refuse_unsupported"]


@dataclass
class Batch:
    """Images of one iteration, pixels in [-1, 1].

    Attributes:
        u: for p(x), shape (B, C, H, W).
        y: their labels, int64, shape (B,); −1: unknown.
        u_ce, y_ce: for the cross-entropy, where it has views or images of its own, shapes (N, C, H, W) and (N,); None:
            ``u`` and ``y``.
    """

    u: Tensor
    y: Tensor
    u_ce: Tensor | None = None
    y_ce: Tensor | None = None


class Learner:
    """The model in training, with its optimiser, moving average, replay buffer and randomness.

    :meth:`iterate` is one optimiser step (JEM, arXiv 1912.03263, algorithm 1). :meth:`state_dict` is all that it needs to
    go on to the bit: a snapshot to roll back to, or a process's part of a checkpoint.

    Args:
        accelerator: whose ``prepare`` made ``model`` and ``optimizer``.
        model: the prepared ``jem``; losses and chains go through its forward, so that processes stay in step.
        jem: the joint energy model itself.
        optimizer: the prepared optimiser.
        scheduler: timm's, stepped by updates, or None.
        buffer: this process's replay buffer.
        sgld, objective: settings of the chains and the loss.
        generator: this process's noise, on its device.
        data_noise, batch_norm, class_frequencies: see :func:`timm_jem.training.joint_step`.
        grad_clip: bound of the gradient's norm; 0: none.
        ema: timm's moving average of ``jem``, or None.
        ramp_from, ramp_steps: K goes from ``ramp_from`` to ``sgld.num_steps`` over so many steps; 0 steps: no ramp.

    Attributes:
        step: optimiser steps done.
        remedy: what rollbacks changed so far.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        jem: JEM,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        buffer: ReplayBuffer,
        *,
        sgld: SGLDConfig,
        objective: ObjectiveConfig,
        generator: torch.Generator,
        data_noise: float = 0.03,
        batch_norm: str = "eval",
        class_frequencies: Tensor | None = None,
        grad_clip: float = 0.0,
        ema: ModelEmaV3 | None = None,
        ramp_from: int = 1,
        ramp_steps: int = 0,
    ) -> None:
        self.accelerator, self.model, self.jem, self.ema = accelerator, model, jem, ema
        self.optimizer, self.scheduler, self.buffer, self.generator = optimizer, scheduler, buffer, generator
        self.sgld, self.objective = sgld, objective
        self.data_noise, self.batch_norm, self.class_frequencies = data_noise, batch_norm, class_frequencies
        self.grad_clip, self.ramp_from, self.ramp_steps = grad_clip, ramp_from, ramp_steps
        self.step = 0
        self.remedy = Remedy(lr=1.0)
        self._set_lr()

    @property
    def averaged(self) -> JEM:
        """The model to evaluate and publish: the moving average, where there is one."""
        return self.jem if self.ema is None else self.ema.module

    def sgld_now(self) -> SGLDConfig:
        """The chains' settings at this step: ramp and remedies included."""
        num_steps = self.sgld.num_steps
        if self.step < self.ramp_steps:
            num_steps = round(self.ramp_from + (num_steps - self.ramp_from) * self.step / self.ramp_steps)
        return replace(
            self.sgld,
            num_steps=math.ceil(num_steps * self.remedy.num_steps),
            step_size=self.sgld.step_size * self.remedy.step_size,
        )

    def iterate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimiser step on the mean loss of ``batches`` (several: gradient accumulation).

        Returns:
            The terms of :func:`timm_jem.training.joint_step` and ``grad_norm``, detached scalars on the device, means
            over the batches.
        """
        sgld = self.sgld_now()
        objective = replace(self.objective, energy_l2=self.objective.energy_l2 + self.remedy.energy_l2)
        rows = []
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = joint_step(
                    self.model,
                    self.jem,
                    batch.u,
                    batch.y,
                    self.buffer,
                    sgld_config=sgld,
                    objective=objective,
                    data_noise=self.data_noise,
                    generator=self.generator,
                    u_ce=batch.u_ce,
                    y_ce=batch.y_ce,
                    class_frequencies=self.class_frequencies,
                    batch_norm=self.batch_norm,
                )
                self.accelerator.backward(terms["loss"] / len(batches))
            rows.append({name: term.detach() for name, term in terms.items()})
        terms = rows[0] if len(rows) == 1 else {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        # The norm is needed in any case: a gradient can be infinite where the loss is not.
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        terms["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._set_lr()
        if self.ema is not None:
            self.ema.update(self.jem, step=self.step)
        return terms

    def _set_lr(self) -> None:
        """The learning rate of the next step: a function of ``step`` and ``remedy`` alone."""
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] *= self.remedy.lr

    def apply(self, remedy: Remedy, seed: int) -> None:
        """After a rollback: change the settings, and start other chains and noise from ``seed``."""
        self.remedy = self.remedy.then(remedy)
        self._set_lr()
        self.buffer.reseed(seed)
        self.generator.manual_seed(seed + 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next :meth:`iterate` depends on, but for its images. Tensors are live: copy them."""
        return {
            "step": self.step,
            "remedy": asdict(self.remedy),
            "model": dict(self.jem.state_dict()),
            "ema": None if self.ema is None else dict(self.ema.module.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": _rng_state(self.accelerator.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            InputError: a state of another model, optimiser or replay buffer.
        """
        self._load_model(state)
        self.buffer.load_state_dict(state["buffer"])
        self.generator.set_state(state["generator"])
        _set_rng_state(state["rng"], self.accelerator.device)

    def load_state_dicts(self, count: int, read: Callable[[int], dict[str, Any]], seed: int) -> None:
        """Go on where ``count`` processes were, now with another number of them.

        Weights, optimiser and step are those they had in common. Their chains are dealt out to the processes there are
        now, and their randomness starts anew from ``seed``.

        Args:
            count: how many processes there were.
            read: gives the state of one of them.
            seed: differs by process.

        Raises:
            InputError: sharded states, or states of another model, optimiser or replay buffer.
        """
        first = read(0)
        if any(local(tensor) is not tensor for tensor in self.jem.state_dict().values()):
            raise InputError(f"{count} processes wrote this checkpoint in shards: resume it with as many")
        self._load_model(first)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        states = [first["buffer"]] + [read(i)["buffer"] for i in range(1, count)]
        chains = redistribute(states, rank, world, len(self.buffer), self.buffer.num_classes)
        if chains.shape != self.buffer.chains.shape:
            raise InputError("the saved chains are of other images: resume with the settings of that run")
        self.buffer.chains.copy_(chains)
        self.buffer.reseed(seed)
        self.generator.manual_seed(seed + 1)

    def _load_model(self, state: dict[str, Any]) -> None:
        if (state["ema"] is None) != (self.ema is None):
            raise InputError("the saved run and this one differ in having a moving average: resume with its settings")
        load_tensors(self.jem.state_dict(), state["model"], "model")
        if self.ema is not None:
            load_tensors(self.ema.module.state_dict(), state["ema"], "moving average")
        load_optimizer(getattr(self.optimizer, "optimizer", self.optimizer), state["optimizer"])
        self.step, self.remedy = state["step"], Remedy(**state["remedy"])
        self._set_lr()


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Raise an InputError for what ``accelerate launch`` offers and joint training can't use.

    SGLD takes gradients with respect to images through the prepared model, which DeepSpeed and Megatron don't give; fp16's
    gradient scaler covers ``backward`` only, so that the chains' gradients would underflow.
    """
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise InputError(f"{kind} gives no gradients for images, which SGLD needs: use DDP, or FSDP with fsdp_version: 2")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        raise InputError("FSDP 1 gives wrong gradients for images, which SGLD needs: set fsdp_version: 2")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise InputError(
            f"{accelerator.mixed_precision} is not for SGLD: the gradient scaler does not cover the chains' gradients, "
            "which underflow; use bf16 or no"
        )


def _rng_state(device: torch.device) -> dict[str, Any]:
    """The global generators, which dropout and stochastic depth use."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
