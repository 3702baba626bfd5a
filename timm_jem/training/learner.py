"""All that joint training carries from one step to the next."""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from timm_jem.errors import InputError, check_whole
from timm_jem.model import JEM
from timm_jem.modes import batch_norms, statistics_kept
from timm_jem.replay_buffer import redistribute
from timm_jem.training.batches import Batch
from timm_jem.training.method import Drawn, Method
from timm_jem.training.optimizer_state import OptimizerState
from timm_jem.training.remedy import Remedy
from timm_jem.training.sam import SAM
from timm_jem.training.state import copy_tree, load_tensors, local

__all__ = ["Learner"]


class Learner:
    """The model in training, with its method, optimiser, moving average and randomness.

    :meth:`iterate` is one optimiser step. :meth:`state_dict` is all that it needs to go on to the bit: a snapshot to roll
    back to, or a process's part of a checkpoint.

    Args:
        accelerator: whose ``prepare`` made ``model`` and ``optimizer``.
        model: the prepared ``jem``; losses and chains go through its forward, so that processes stay in step.
        jem: the joint energy model itself.
        optimizer: the prepared optimiser.
        scheduler: timm's, stepped by updates, or None: the learning rate stays.
        method: what the loss is, and what it draws.
        generator: this process's noise, on its device.
        grad_clip: bound of the gradient's norm; 0: none.
        sam: how far away the gradient is taken, with the same images and negatives; None: at the weights themselves.
        ema: timm's moving average of ``jem``, or None.

    Attributes:
        step: optimiser steps done.
        remedy: what rollbacks changed so far.
        shared: names of those parts of :meth:`state_dict` that are the same in all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        jem: JEM,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        method: Method,
        *,
        generator: torch.Generator,
        grad_clip: float = 0.0,
        sam: SAM | None = None,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        self.accelerator, self.model, self.jem, self.ema = accelerator, model, jem, ema
        self.optimizer, self.scheduler, self.method, self.generator = optimizer, scheduler, method, generator
        self.grad_clip, self.sam = grad_clip, sam
        self.step = 0
        self.remedy = Remedy()
        self._initial_lr = [group["lr"] for group in optimizer.param_groups]
        self._optimizer_state = OptimizerState(optimizer, jem.named_parameters())
        sharded = any(local(parameter) is not parameter for parameter in jem.parameters())
        self.shared = ("step", "remedy", "method") + (() if sharded else ("model", "ema", "optimizer"))
        self._as_saved, self._sgld = _without_casts(jem), jem.sgld
        self._set_lr()

    def published(self) -> JEM:
        """The model to evaluate, draw from and save, on the live weights: the moving average, where there is one.

        It computes in the precision in which it is saved, and samples by the settings that remedies and the method left, but
        without ``rest``: energies of held-out images to rest at are known at the end.
        """
        jem = self._as_saved if self.ema is None else self.ema.module
        adapted = getattr(self.method, "adapted", lambda sgld, step: sgld)
        jem.sgld = replace(self.remedy.chains(adapted(self._sgld, self.step)), rest=None)
        return jem

    def iterate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimiser step on the mean loss of ``batches`` (several: gradient accumulation).

        Returns:
            What the method tells of its draws and losses, ``grad_norm``, and with SAM ``sharpness``, by how much its step
            raised the loss: detached scalars on the device, means over the batches.
        """
        drawn = [
            self.method.draw(self.model, batch, step=self.step, remedy=self.remedy, generator=self.generator)
            for batch in batches
        ]
        terms = self._accumulate(drawn)
        if self.sam is not None:
            with self.sam.ascended(list(self.model.parameters())), statistics_kept(batch_norms(self.model)):
                self.optimizer.zero_grad()
                terms["sharpness"] = self._accumulate(drawn)["loss"] - terms["loss"]
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

    def _accumulate(self, drawn: Sequence[Drawn]) -> dict[str, Tensor]:
        """Mean losses, and gradients, which processes exchange with the last batch."""
        rows = []
        for number, of_batch in enumerate(drawn, 1):
            with contextlib.nullcontext() if number == len(drawn) else self.accelerator.no_sync(self.model):
                terms = self.method.loss(self.model, of_batch, remedy=self.remedy)
                self.accelerator.backward(terms["loss"] / len(drawn))
            rows.append({name: term.detach() for name, term in (terms | of_batch.info).items()})
        return rows[0] if len(rows) == 1 else {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}

    def _set_lr(self) -> None:
        """The learning rate of the next step: a function of ``step`` and ``remedy`` alone."""
        if self.scheduler is None:
            for group, lr in zip(self.optimizer.param_groups, self._initial_lr, strict=True):
                group["lr"] = lr
        else:
            self.scheduler.step_update(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] *= self.remedy.lr

    def apply(self, remedy: Remedy, seed: int) -> None:
        """After a rollback: change the settings, and start other chains and noise from ``seed``."""
        self.remedy = self.remedy.then(remedy)
        self._set_lr()
        self._reseed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next :meth:`iterate` depends on, but for its images. Tensors are live: copy them."""
        return {
            "step": self.step,
            "remedy": asdict(self.remedy),
            "model": dict(self.jem.state_dict()),
            "ema": None if self.ema is None else dict(self.ema.module.state_dict()),
            "optimizer": self._optimizer_state.state_dict(),
            "method": self.method.state_dict(),
            "buffer": None if self.method.buffer is None else self.method.buffer.state_dict(),
            "statistics": [dict(model.named_buffers()) for model in self._models()],
            "generator": self.generator.get_state(),
            "rng": _rng_state(self.accelerator.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            InputError: a state of another model, optimiser or replay buffer.
        """
        self._load_shared(state)
        # BatchNorm's are of this process's images, until DistributedDataParallel sends those of the first one around.
        for model, statistics in zip(self._models(), state["statistics"], strict=True):
            load_tensors(dict(model.named_buffers()), statistics, "model")
        buffer = self.method.buffer
        if buffer is not None:
            saved = state["buffer"]
            if len(saved["chains"]) != len(buffer):
                chains = redistribute([saved], 0, 1, len(buffer), buffer.num_classes)
                saved = {**saved, "chains": chains, **({} if buffer.labels is None else {"labels": buffer.labels})}
            buffer.load_state_dict(saved)
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
        if "model" not in self.shared:
            raise InputError(f"{count} processes wrote this checkpoint in shards: resume it with as many")
        self._load_shared(first)
        buffer = self.method.buffer
        if buffer is not None:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            states = [first["buffer"]] + [read(i)["buffer"] for i in range(1, count)]
            chains = redistribute(states, rank, world, len(buffer), buffer.num_classes)
            if chains.shape != buffer.chains.shape:
                raise InputError("the saved chains are of other images: resume with the settings of that run")
            buffer.chains.copy_(chains)
        self._reseed(seed)

    def _models(self) -> list[JEM]:
        return [self.jem] + ([] if self.ema is None else [self.ema.module])

    def _reseed(self, seed: int) -> None:
        if self.method.buffer is not None:
            self.method.buffer.reseed(seed)
        self.generator.manual_seed(seed + 1)

    def _load_shared(self, state: dict[str, Any]) -> None:
        if (state["ema"] is None) != (self.ema is None):
            raise InputError("the saved run and this one differ in having a moving average: resume with its settings")
        if (state["buffer"] is None) != (self.method.buffer is None):
            raise InputError("the saved run and this one differ in having a replay buffer: resume with its settings")
        self._optimizer_state.load_state_dict(state["optimizer"])
        load_tensors(self.jem.state_dict(), state["model"], "model")
        if self.ema is not None:
            load_tensors(self.ema.module.state_dict(), state["ema"], "moving average")
        self.method.load_state_dict(copy_tree(state["method"]))  # it may keep what it is given, and change it
        check_whole("the checkpoint's step", state["step"], 0)
        self.step, self.remedy = state["step"], Remedy(**state["remedy"])
        self._set_lr()


def _without_casts(jem: JEM) -> JEM:
    """The model on the same weights without accelerate's casts, which are in the forward of the object that it prepared."""
    if "forward" not in vars(jem) or isinstance(jem, FSDPModule):  # one that is sharded can't be told apart from its hooks
        return jem
    plain = copy.copy(jem)
    del plain.forward
    return plain


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
