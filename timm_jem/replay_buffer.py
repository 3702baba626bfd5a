"""The replay buffer: chains that persist between training iterations."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, check_whole, one_line, quoted
from timm_jem.inputs import MOST_NUMBERS, check_label_values, is_floats, is_labels, kind

__all__ = ["ReplayBuffer", "redistribute"]

_GOLDEN = 0.618034  # whose multiples, but for their whole parts, are spread evenly over any run of slots


class ReplayBuffer:
    """Persistent chains on the training device (JEM, arXiv 1912.03263, appendix A; after Tieleman, ICML 2008).

    ``draw`` hands out chains from distinct slots, each restarted from the initial distribution with probability
    ``restart_prob``; ``put`` writes them back to the same slots. The host itself draws how many chains restart, so
    that no more than those are made anew, and a draw doesn't wait for the device; only one of more chains than a class has
    slots does, to check that the slots suffice.

    With one probability for all, hardly a chain gets older than a few times its inverse, and what longer chains do is
    never trained. ``restart_least`` gives each slot a probability of its own, spread evenly on a logarithmic scale, so that
    there are chains of every age: about as many that were drawn 10 to 20 times as 20 to 40 times. As many chains are then made
    anew as if all restarted with ``restart_prob``, and each slot takes its share of its own.

    Args:
        image_shape: (C, H, W).
        init: ``init((n, C, H, W), generator=..., device=..., y=...)`` returns new chains, pixels, on ``device``; ``y`` are
            their classes, int64, shape (n,), or None.
        generator: the only source of randomness, with a generator of the host that starts from its seed; lives on
            ``device``.
        capacity: number of chains (paper: 10,000).
        restart_prob: probability that a drawn chain starts anew (paper: 0.05).
        restart_least: where given, that of the slot whose chains get oldest, above 0 and at most ``restart_prob``, which then
            is that of the slot whose chains stay youngest (paper: None, the same for all).
        num_classes: when given, every slot belongs to one class for good, classes evenly: chains of E(x, y).
        device: where chains live.

    Attributes:
        chains: pixels, shape (capacity, C, H, W), float32.
        labels: classes of the slots, int64, shape (capacity,), or None.

    Raises:
        InputError: a capacity, probability, class count or image shape out of range, or an ``init`` that gives other chains.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        init: Callable[..., Tensor],
        generator: torch.Generator,
        capacity: int = 10_000,
        restart_prob: float = 0.05,
        restart_least: float | None = None,
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_size(capacity, num_classes)
        check_number("replay buffer restart_prob", restart_prob, least=0, most=1)
        if restart_least is not None:
            check_number("replay buffer restart_least", restart_least, above=0, most=restart_prob)
        if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
            raise InputError(f"the image shape of a replay buffer is {quoted(image_shape)}: give (C, H, W)")
        for side in image_shape:
            check_whole("a side of a replay buffer's images", side, 1)
        if capacity * math.prod(image_shape) > MOST_NUMBERS:
            raise InputError(
                f"{capacity} chains of {tuple(image_shape)} are above {MOST_NUMBERS:,} numbers: lower the capacity"
            )
        if not callable(init):
            raise InputError(f"init of a replay buffer is {quoted(init)}: give a function such as timm_jem.uniform_noise")
        if not isinstance(generator, torch.Generator):
            raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
        self.init, self.generator, self.num_classes = init, generator, num_classes
        self.restart_prob, self.restart_least = restart_prob, restart_least
        self.host_generator = torch.Generator().manual_seed(generator.initial_seed())
        with torch.inference_mode(False):  # outside of which nothing may be put into what is made in it
            self.labels = None if num_classes is None else _slot_classes(capacity, num_classes, device)
            self.chains = self._fresh((capacity, *image_shape), torch.device(device), self.labels)

    def _fresh(self, shape: tuple[int, ...], device: torch.device, y: Tensor | None) -> Tensor:
        chains = self.init(shape, generator=self.generator, device=device, y=y)
        if not is_floats(chains) or chains.shape != shape:
            raise InputError(f"init gives {kind(chains)}: a replay buffer's is to give pixels of shape {shape}")
        return chains.float()

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
            InputError: more chains than there are slots, or ``y`` of wrong shape or type, for a buffer without classes, or, on
                the CPU, of classes that there are not.
        """
        check_whole("number of chains to draw", n, 0)
        if n > len(self):
            raise InputError(
                f"{quoted(n)} chains from a replay buffer of {len(self)}: raise its capacity or lower the batch size"
            )
        if y is not None and not is_labels(y, n, self.chains):
            raise InputError(f"y is {kind(y)} for {n} chains: give one label per chain, int64, shape ({n},)")
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
            fresh = self._fresh((count, *chains.shape[1:]), device, classes).to(chains.dtype)
            if self.restart_least is not None:  # only the slot's share of them
                share = (self.restart_least / self.restart_prob) ** (slots[places] * _GOLDEN % 1)
                restarts = torch.rand(count, generator=self.generator, device=device) < share
                fresh = torch.where(restarts.view(-1, 1, 1, 1), fresh, chains[places])
            chains[places] = fresh
        return chains, slots

    def _slots_of_classes(self, y: Tensor) -> Tensor:
        if self.labels is None:
            raise InputError("this replay buffer has no classes: build it with num_classes, or draw without y")
        if y.device.type == "cpu":  # elsewhere it would have to be waited for
            check_label_values(y, self.num_classes)
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
        """Write ``chains`` (pixels, shape (n, C, H, W)) back to their ``slots``, shape (n,).

        Raises:
            InputError: slots or chains of wrong shape or type, or, on the CPU, slots that there are not.
        """
        if not isinstance(slots, Tensor) or slots.ndim != 1 or not is_labels(slots, len(slots), self.chains):
            raise InputError(f"slots are {kind(slots)}: give those that draw gave, int64, shape (n,)")
        if not is_floats(chains) or chains.is_meta or chains.shape != (len(slots), *self.chains.shape[1:]):
            raise InputError(
                f"chains are {kind(chains)} for {len(slots)} slots: give shape {(len(slots), *self.chains.shape[1:])}"
            )
        if slots.device.type == "cpu":
            check_label_values(slots, len(self), name="slots")
        self.chains[slots] = chains.detach().to(self.chains.dtype)

    def reseed(self, seed: int) -> None:
        """Start all randomness anew from ``seed``, after a rollback say; chains stay."""
        check_whole("seed of a replay buffer", seed, -(2**63), 2**64 - 1)
        self.generator.manual_seed(int(seed))
        self.host_generator.manual_seed(int(seed))

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs: chains, labels and the generators' states. Tensors are live: copy them."""
        state = {
            "chains": self.chains,
            "generator": self.generator.get_state(),
            "host_generator": self.host_generator.get_state(),
        }
        return state if self.labels is None else {**state, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            InputError: no such state, chains of another shape, or with classes where this buffer has none (or the reverse);
                the buffer is as before.
        """
        _check_state(state)
        if state["chains"].shape != self.chains.shape:
            raise InputError(
                f"saved chains have shape {tuple(state['chains'].shape)}, this replay buffer {tuple(self.chains.shape)}: "
                "build it as it was saved"
            )
        if (state.get("labels") is None) != (self.labels is None):
            raise InputError("saved chains and this replay buffer differ in having classes: build it as it was saved")
        if self.labels is not None and not torch.equal(state["labels"].to(self.labels), self.labels):
            raise InputError(f"the saved chains are not of {self.num_classes} classes: build it as it was saved")
        before = self.generator.get_state()
        try:
            self.generator.set_state(state["generator"])
            self.host_generator.set_state(state["host_generator"])
        except (KeyError, RuntimeError, TypeError) as error:
            self.generator.set_state(before)
            raise InputError(f"the generators of the saved chains are not this device's ({one_line(error)})") from error
        self.chains.copy_(state["chains"])


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
        InputError: no states, states of images of several shapes, or of other classes than ``num_classes``, or a ``rank``,
            ``world`` or ``capacity`` out of range.
    """
    check_whole("world", world, 1)
    check_whole("rank", rank, 0, world - 1)
    _check_size(capacity, num_classes)
    if not isinstance(states, (list, tuple)):
        raise InputError(f"the saved chains are a {type(states).__name__}: give a list of replay buffers' states")
    for state in states:
        _check_state(state)
    shapes = {tuple(state["chains"].shape[1:]) for state in states}
    if len(shapes) != 1:
        raise InputError(f"the saved chains have {len(shapes)} image shapes: give the replay buffers of one run")
    if any((state.get("labels") is None) != (num_classes is None) for state in states):
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


def _check_size(capacity: int, num_classes: int | None) -> None:
    check_whole("replay buffer capacity", capacity, 1, MOST_NUMBERS)
    if num_classes is not None:
        check_whole("replay buffer num_classes", num_classes, 1)
        if capacity < num_classes:
            raise InputError(f"replay buffer capacity {capacity} is below {quoted(num_classes)} classes: raise it")


def _check_state(state: Any) -> None:
    chains, labels = (state.get(name) if isinstance(state, Mapping) else None for name in ("chains", "labels"))
    whole = is_floats(chains) and chains.ndim == 4 and not chains.is_meta
    if not whole or (labels is not None and not is_labels(labels, len(chains), chains)):
        raise InputError(f"{quoted(state)} is no saved replay buffer: give what ReplayBuffer.state_dict returned")


def _slot_classes(capacity: int, num_classes: int, device: torch.device | str) -> Tensor:
    # Class by class, so that the slots of class c are one range.
    return torch.arange(capacity, device=device) * num_classes // capacity
