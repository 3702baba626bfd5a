"""The replay buffer: chains that persist between training iterations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole

__all__ = ["ReplayBuffer", "redistribute"]


class ReplayBuffer:
    """Persistent chains on the training device (JEM, arXiv 1912.03263, appendix A; after Tieleman, ICML 2008).

    ``draw`` hands out chains from distinct slots, each restarted from the initial distribution with probability
    ``restart_prob``; ``put`` writes them back to the same slots. The host itself draws how many chains restart, so
    that no more than those are made anew, and a draw doesn't wait for the device; only one of more chains than a class has
    slots does, to check that the slots suffice.

    Args:
        image_shape: (C, H, W).
        init: ``init((n, C, H, W), generator=..., device=..., y=...)`` returns new chains, pixels, on ``device``; ``y`` are
            their classes, int64, shape (n,), or None.
        generator: the only source of randomness, with a generator of the host that starts from its seed; lives on
            ``device``.
        capacity: number of chains (paper: 10,000).
        restart_prob: probability that a drawn chain starts anew (paper: 0.05).
        num_classes: when given, every slot belongs to one class for good, classes evenly: chains of E(x, y).
        device: where chains live.

    Attributes:
        chains: pixels, shape (capacity, C, H, W), float32.
        labels: classes of the slots, int64, shape (capacity,), or None.

    Raises:
        InputError: a capacity, probability or class count out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        init: Callable[..., Tensor],
        generator: torch.Generator,
        capacity: int = 10_000,
        restart_prob: float = 0.05,
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_whole("replay buffer capacity", capacity, 1)
        check_number("replay buffer restart_prob", restart_prob, least=0, most=1)
        if num_classes is not None and capacity < num_classes:
            raise InputError(f"replay buffer capacity {capacity} is below {num_classes} classes: raise it")
        self.init, self.generator, self.restart_prob, self.num_classes = init, generator, restart_prob, num_classes
        self.host_generator = torch.Generator().manual_seed(generator.initial_seed())
        self.labels = None if num_classes is None else _slot_classes(capacity, num_classes, device)
        self.chains = init((capacity, *image_shape), generator=generator, device=device, y=self.labels)

    def __len__(self) -> int:
        return len(self.chains)

    def draw(self, n: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw ``n`` chains from distinct slots.

        Args:
            n: how many, at most the capacity.
            y: classes wanted, int64, shape (n,), for a buffer with classes; None: slots of any class.

        Returns:
            Chains (a copy), pixels, shape (n, C, H, W), and their slots, int64, shape (n,).

        Raises:
            InputError: more chains than there are slots, or ``y`` of wrong shape or for a buffer without classes.
        """
        if n > len(self):
            raise InputError(f"{n} chains from a replay buffer of {len(self)}: raise its capacity or lower the batch size")
        if y is not None and y.shape != (n,):
            raise InputError(f"y has shape {tuple(y.shape)} for {n} chains: give one label per chain, shape ({n},)")
        device = self.chains.device
        if y is None:
            slots = torch.randperm(len(self), generator=self.generator, device=device)[:n]
        else:
            slots = self._slots_of_classes(y)
        chains = self.chains[slots]
        # A binomial number of restarts at random places: each chain restarts on its own with restart_prob.
        count = int((torch.rand(n, generator=self.host_generator, dtype=torch.float64) < self.restart_prob).sum())
        if count:
            places = torch.randperm(n, generator=self.generator, device=device)[:count]
            classes = None if self.labels is None else self.labels[slots[places]]
            fresh = self.init((count, *chains.shape[1:]), generator=self.generator, device=device, y=classes)
            chains[places] = fresh.to(chains.dtype)
        return chains, slots

    def _slots_of_classes(self, y: Tensor) -> Tensor:
        if self.labels is None:
            raise InputError("this replay buffer has no classes: build it with num_classes, or draw without y")
        # The k-th wish for a class gets the k-th slot of that class in a random order of all slots.
        order = torch.randperm(len(self), generator=self.generator, device=self.chains.device)
        order = order[self.labels[order].argsort(stable=True)]
        classes = torch.arange(self.num_classes, device=y.device)
        wish = (y.unsqueeze(1) == classes).long()
        nth = (wish.cumsum(0) - 1).gather(1, y.unsqueeze(1)).squeeze(1)
        if len(y) > len(self) // self.num_classes and bool((nth >= self.labels.bincount()[y]).any()):
            raise InputError(f"more chains of one class than its slots among {len(self)}: raise the replay buffer's capacity")
        first = torch.searchsorted(self.labels, classes)
        return order[first[y] + nth]

    def put(self, slots: Tensor, chains: Tensor) -> None:
        """Write ``chains`` (pixels, shape (n, C, H, W)) back to their ``slots``, shape (n,)."""
        self.chains[slots] = chains.detach().to(self.chains.dtype)

    def reseed(self, seed: int) -> None:
        """Start all randomness anew from ``seed``, after a rollback say; chains stay."""
        self.generator.manual_seed(seed)
        self.host_generator.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs: chains, labels and the generators' states."""
        state = {
            "chains": self.chains,
            "generator": self.generator.get_state(),
            "host_generator": self.host_generator.get_state(),
        }
        return state if self.labels is None else {**state, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            InputError: chains of another shape, or with classes where this buffer has none (or the reverse).
        """
        if state["chains"].shape != self.chains.shape:
            raise InputError(
                f"saved chains have shape {tuple(state['chains'].shape)}, this replay buffer {tuple(self.chains.shape)}: "
                "build it as it was saved"
            )
        if ("labels" in state) != (self.labels is not None):
            raise InputError("saved chains and this replay buffer differ in having classes: build it as it was saved")
        self.chains.copy_(state["chains"])
        if self.labels is not None:
            self.labels.copy_(state["labels"])
        self.generator.set_state(state["generator"])
        self.host_generator.set_state(state["host_generator"])


def redistribute(states: list[dict[str, Any]], rank: int, world: int, capacity: int, num_classes: int | None = None) -> Tensor:
    """Deal the chains of several processes' buffers out to another number of processes.

    The chains are put in a row, and the slots of the new buffers in another, and the row of chains is repeated until all
    slots have one: every chain is used where there are slots enough, and none is used twice before all are used once;
    chains beyond the slots are left out, the last processes' first. With classes this is done class by class, so that a
    chain stays in its class.

    Args:
        states: ``ReplayBuffer.state_dict()`` of every old process, in order.
        rank: the new process that asks, in [0, ``world``).
        world: how many processes there are now.
        capacity: slots of each new buffer.
        num_classes: of the new buffers, or None.

    Returns:
        Chains for the slots of ``ReplayBuffer(..., capacity=capacity, num_classes=num_classes)``, pixels, shape
        (capacity, C, H, W).

    Raises:
        InputError: no states, states of images of several shapes, or of other classes than ``num_classes``.
    """
    shapes = {tuple(state["chains"].shape[1:]) for state in states}
    if len(shapes) != 1:
        raise InputError(f"the saved chains have {len(shapes)} image shapes: give the replay buffers of one run")
    if any(("labels" in state) != (num_classes is not None) for state in states):
        raise InputError("saved chains and this replay buffer differ in having classes: build it as it was saved")
    pool = torch.cat([state["chains"] for state in states])
    if num_classes is None:
        return pool[(rank * capacity + torch.arange(capacity, device=pool.device)) % len(pool)]
    labels = torch.cat([state["labels"] for state in states])
    if labels.unique().tolist() != list(range(num_classes)):
        raise InputError(f"the saved chains are not of {num_classes} classes: build the replay buffer as it was saved")
    parts = []
    for c, slots in enumerate(_slot_classes(capacity, num_classes, pool.device).bincount(minlength=num_classes).tolist()):
        of_class = (labels == c).nonzero().squeeze(1)
        parts.append(of_class[(rank * slots + torch.arange(slots, device=pool.device)) % len(of_class)])
    return pool[torch.cat(parts)]


def _slot_classes(capacity: int, num_classes: int, device: torch.device | str) -> Tensor:
    # Class by class, so that the slots of class c are one range.
    return torch.arange(capacity, device=device) * num_classes // capacity
