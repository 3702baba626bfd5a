"""How many SGLD steps chains make while they get longer."""

from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from timm_jem.errors import check_number, check_whole

__all__ = ["ChainRamp"]

_WINDOW = 8  # iterations, after which chains may be one step longer (DAT: the mean over as many)


class ChainRamp:
    """The number of steps K of an iteration: from ``first`` to ``last``, by the clock or by what the energies tell apart.

    By the clock, it grows evenly over ``steps`` iterations. With ``auc`` it grows by one where images and chains have been
    told apart by their energies with at least that AUROC, in the mean of eight iterations: chains get longer as short ones
    no longer deceive the model (DAT, arXiv 2510.13872: from 0, with 0.8 on CIFAR-10). All processes have the same K; with
    ``auc`` the host waits for the device at every eighth iteration.

    Args:
        last: K in the end.
        first: K at first, at most ``last``.
        steps: iterations from one to the other; 0: ``last`` from the start, unless ``auc`` is given.
        auc: see above; None: by the clock.
        batches: how many, each with chains of its own, make an iteration.

    Raises:
        InputError: numbers out of range.
    """

    def __init__(self, last: int, first: int = 1, steps: int = 0, auc: float | None = None, batches: int = 1) -> None:
        check_whole("the last number of SGLD steps of a ramp", last, 1)
        check_whole("steps of a ramp", steps, 0)
        check_whole("the first number of SGLD steps of a ramp", first, 1, last if steps or auc is not None else None)
        if auc is not None:
            check_number("auc of a ramp", auc, least=0, most=1)
        self.last, self.first, self.steps, self.auc = last, first, steps, auc
        self._window = _WINDOW * batches
        self._grown, self._seen, self._sum = 0, 0, None

    def num_steps(self, step: int) -> int:
        """K of an iteration, when ``step`` optimiser steps are done."""
        if self.auc is not None:
            return min(self.first + self._grown, self.last)
        if step < self.steps:
            return round(self.first + (self.last - self.first) * step / self.steps)
        return self.last

    def see(self, energy_data: Tensor, energy_neg: Tensor) -> Tensor:
        """Energies of a batch's images and chains, shapes (B,) and (M,), in this process.

        Returns:
            Their AUROC over all processes, shape (), 1 where every image lies lower than every chain.
        """
        higher = gather(energy_neg)[:, None] - gather(energy_data)
        auc = ((higher > 0).float() + (higher == 0).float() / 2).mean()
        self._sum = auc if self._sum is None else self._sum + auc
        self._seen += 1
        if self._seen >= self._window:  # more, where the iterations had more batches before
            self._grown = min(self._grown + int(self._sum >= self.auc * self._seen), self.last - self.first)
            self._seen, self._sum = 0, None
        return auc

    def state_dict(self) -> dict[str, Any]:
        """What chains have grown by, and what has been seen since."""
        seen = {} if self._sum is None else {"seen": self._seen, "sum": self._sum}
        return {} if self.auc is None else {"grown": self._grown, **seen}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on where ``state`` was taken."""
        self._grown, self._seen = state.get("grown", 0), state.get("seen", 0)
        self._sum = state["sum"].to(device) if "sum" in state else None
