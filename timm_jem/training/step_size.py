"""An SGLD step size that follows the energies while they are trained."""

import math
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.linalg import vector_norm

__all__ = ["StepSize"]

_RATE = 0.05  # of the logarithm: e-fold in 20 iterations at most
_FARTHEST = math.log(1000)


class StepSize:
    """A factor of the step size, from the cosine between a chain's gradients of one step and of the next.

    Steps that are short against the energy's curvature leave the gradient's direction as it is: cosine 1. A step that ends
    where the energy is lowest along it makes the two orthogonal; a longer one meets a slope that points back, and a still
    longer one ends higher than it began. So after each iteration the logarithm of the factor grows by 0.05 times what the
    mean cosine, over its chains and steps, is above ``cosine``. (Hypergradient descent, Baydin et al., arXiv 1703.04782,
    section 2, adapts a learning rate by the same product of gradients.) Pixels whose way is barred by ``pixel_clamp`` don't
    count, nor do chains that have no slope left. All processes have the same factor, and nothing waits for the device.

    Args:
        cosine: above −1 and below 1, or None: nothing adapts, and a factor that was loaded stays.
        pixel_clamp: that of the chains.
        batches: how many, each with chains of its own, make an iteration: each moves the factor by its share.

    Attributes:
        scale: the factor, shape (), on the chains' device, from 1/1000 to 1000; None: 1.
    """

    def __init__(self, cosine: float | None, pixel_clamp: float | None = None, batches: int = 1) -> None:
        self.cosine, self.scale, self._rate = cosine, None, _RATE / batches
        self._clamp = math.inf if pixel_clamp is None else pixel_clamp
        self._last: tuple[Tensor, Tensor] | None = None
        self._cosines: list[Tensor] = []

    @property
    def adapts(self) -> bool:
        """Whether there is something to aim at."""
        return self.cosine is not None

    def see(self, u: Tensor, grad: Tensor) -> None:
        """Chains, pixels, and ∇E by which they take their next step, both of shape (B, C, H, W)."""
        grad = grad.flatten(1).float()
        if self._last is not None:
            before, free, length = self._last
            now = _scaled(grad * free)
            self._cosines.append((now * before).sum(1) / (vector_norm(now, dim=1) * length))
        free = (u.flatten(1).abs() < self._clamp) | (u.flatten(1) * grad >= 0)
        now = _scaled(grad * free)
        self._last = now, free, vector_norm(now, dim=1)

    def adapt(self) -> Tensor:
        """The factor of the next iteration, by what was seen in this one; a single step tells nothing."""
        if self.scale is None:
            self.scale = torch.ones((), device=self._last[0].device)
        if self._cosines:
            cosines = torch.cat(self._cosines)
            known = ~cosines.isnan()  # zeros have no direction
            total, count = reduce(torch.stack([cosines.where(known, 0).sum(), known.float().sum()]), "sum")
            scale = (self.scale.log() + self._rate * (total / count - self.cosine)).clamp(-_FARTHEST, _FARTHEST).exp()
            self.scale = scale.where(count > 0, self.scale)
        self._last = None
        self._cosines.clear()
        return self.scale

    def state_dict(self) -> dict[str, Any]:
        """The factor, where there is one."""
        return {} if self.scale is None else {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with the factor of ``state``, on the chains' device."""
        self.scale = state["scale"].to(device) if "scale" in state else None


def _scaled(grad: Tensor) -> Tensor:
    """Each row by the power of two, which rounds nothing, that keeps its squares from overflow and from vanishing."""
    largest = grad.abs().amax(1, keepdim=True)
    # As grad.ldexp would, which takes twenty times as long.
    return grad * torch.ones_like(largest).ldexp(-largest.frexp().exponent.clamp(-126, 126))
