"""Sharpness-aware minimisation: gradients from where the loss is worst nearby."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from timm_jem.errors import check_number

__all__ = ["SAM"]


@dataclass(frozen=True)
class SAM:
    """How far away, and in which metric, the worst loss is looked for.

    A step along the gradient g raises the loss to first order the most within ρ: e(w) = ρ · g / ‖g‖₂ (SAM, arXiv 2010.01412,
    equation 2), or, adaptive, in units of the weights themselves, e(w) = ρ · w² g / ‖|w| g‖₂ (ASAM, arXiv 2102.11600,
    equation 9, without its bias η), which doesn't change with a rescaling that leaves the network's function as it is. The
    optimiser then steps from w by the gradient at w + e(w). SADA-JEM (arXiv 2209.07959) takes the adaptive one with ρ = 2.

    Attributes:
        rho: ρ, above 0.
        adaptive: see above.

    Raises:
        InputError: a ρ that is no number above 0.
    """

    rho: float = 2.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        check_number("rho of SAM", self.rho, above=0)

    @contextlib.contextmanager
    def ascended(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within the context ``parameters`` are at w + e(w), by the gradients they have; then at w again, to the bit.

        Nothing waits for the device. Of sharded parameters each process moves its part, by the norm of the whole.
        """
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        with torch.no_grad():
            before = [parameter.detach().clone() for parameter in moved]
            slopes = [p.abs() * p.grad if self.adaptive else p.grad for p in moved]
            norm = torch.nn.utils.get_total_norm(slopes)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            # Smaller norms have no digits left, as their squares underflow: such a slope leads nowhere.
            scale = torch.where(norm < torch.finfo(norm.dtype).tiny ** 0.5, 0.0, self.rho / norm)
            for parameter, slope in zip(moved, slopes, strict=True):
                parameter.add_((parameter.abs() * slope if self.adaptive else slope) * scale)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(moved, before, strict=True):
                    parameter.copy_(value)
