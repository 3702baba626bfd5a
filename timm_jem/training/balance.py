"""How much harder one part of a loss pulls at the weights than another."""

from collections.abc import Sequence

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from timm_jem.errors import InputError

__all__ = ["gradient_ratio"]

_MOST = 1e4  # as in VQ-GAN's released code


def gradient_ratio(part: Tensor, other: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """‖∇part‖₂ / ‖∇other‖₂ over all ``parameters`` together: the factor of ``other`` that makes both pull alike.

    VQ-GAN (arXiv 2012.09841, equation 7) takes the last layer's weights alone for such a factor; here it is all of them, as
    what is balanced is a step of the network. It costs a backward pass for each part. Of several processes the gradients'
    means are compared, which are those that the optimiser gets, so that all have the same ratio: that of one process with all
    of their images. No parameter's ``grad`` changes, graphs are kept, and nothing waits for the device.

    Args:
        part, other: scalars with a graph.
        parameters: of them all; those without gradients don't count.

    Returns:
        Shape (), detached; at most 10,000, and 0 where ``part`` has no slope. A slope that is not finite is not hidden.

    Raises:
        InputError: parameters that one of them doesn't depend on.
    """
    above, below = _norm(part, parameters), _norm(other, parameters)
    return (above / below.clamp(min=torch.finfo(below.dtype).tiny)).clamp(max=_MOST)


def _norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise InputError("no weight has a gradient to balance the loss by: give a loss with the graph that leads to them")
    # One exchange for all; a weight that one process's images left alone may have a gradient in another.
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
    return reduce(torch.cat([gradient.flatten() for gradient in flat]), "mean").norm()
