"""SGLD refinement before classifying (JEM-k), as a classifier that can be attacked with and without its own gradient.

The paper's authors attack it with the gradient of f at the refined image, as if refinement were the identity: the steps
move the image's data behind autograd's back. Such a gradient is wrong (obfuscated, in the words of Athalye et al., ICML
2018, arXiv 1802.00420), and accuracies under it overstate robustness. Here the gradient can flow through every step.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole, one_line, quoted
from timm_jem.evaluation.attacks import Classifier
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.pixels import from_unit
from timm_jem.refinement import refine
from timm_jem.sampling import SGLDConfig

__all__ = ["RefinementConfig", "check_second_derivatives", "refined_classifier"]


@dataclass(frozen=True)
class RefinementConfig:
    """JEM-k (arXiv 1912.03263, section 5.4): k steps of SGLD on E(x) from the image, then p(y|x).

    Attributes:
        steps: k (paper: 0, 1, 10).
        chains: whose p(y|x) are averaged (paper: 1).
        sgld: step size, noise and clamps; None: the model's own.

    Raises:
        InputError: a value outside its range.
    """

    steps: int = 10
    chains: int = 1
    sgld: SGLDConfig | None = None

    def __post_init__(self) -> None:
        check_whole("refinement steps", self.steps, 1)
        check_whole("refinement chains", self.chains, 1)
        if not (self.sgld is None or isinstance(self.sgld, SGLDConfig)):
            raise InputError(
                f"sgld of a refinement is a {type(self.sgld).__name__}: give a timm_jem.SGLDConfig, or None for the model's"
            )


def refined_classifier(
    jem: JEM,
    config: RefinementConfig,
    *,
    generator: torch.Generator | None = None,
    gradient: Literal["identity", "through"] = "through",
) -> Classifier:
    """The classifier of images in [0, 1] that refines them first; every call draws new noise.

    Args:
        jem: the model; its flags are left as they were.
        config: see :class:`RefinementConfig`.
        generator: the only source of its noise; None: PyTorch's global one.
        gradient: what an attacker sees of the refinement. "through": its exact gradient, by double backward.
            "identity": none, as in the paper's code: the gradient of f at the refined image. Values are the same, but
            such an attacker does not see that the steps will undo, or amplify, what it changes; accuracies under it
            are too high.

    Returns:
        A function from images, (B, C, H, W), to log p(y|x), p averaged over the chains: (B, num_classes). It works
        under ``no_grad`` and ``inference_mode`` too.

    Raises:
        InputError: another ``gradient``; "through" with a backbone that has no second derivatives.
    """
    if gradient not in ("identity", "through"):
        raise InputError(f"gradient of a refinement is {quoted(gradient)}: give 'identity' or 'through'")
    settings = jem.sgld if config.sgld is None else config.sgld
    if gradient == "through":
        check_second_derivatives(jem)

    def classify(images: Tensor) -> Tensor:
        attacked = images.requires_grad and torch.is_grad_enabled()
        through = attacked and gradient == "through"
        start = from_unit(images.to(jem.device))
        with frozen(jem):
            parts = []
            for _ in range(config.chains):
                with torch.inference_mode(False), torch.enable_grad():
                    u = refine(jem.pixel_energy, start, settings, steps=config.steps, generator=generator, create_graph=through)
                if not through:
                    u = u + (start - start.detach())  # the value of u, and the gradient of the identity
                logits = jem(jem.normalize(u))
                parts.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1))
        return torch.stack(parts).logsumexp(0) - math.log(config.chains)

    return classify


def check_second_derivatives(jem: JEM, remedy: str = "call timm.layers.set_fused_attn(False) before building it") -> None:
    """Take a second derivative of E(x), with one image: PyTorch says only then that there is none.

    Raises:
        InputError: the backbone has none; the message ends in ``remedy``.
    """
    with frozen(jem), torch.inference_mode(False), torch.enable_grad():
        u = torch.zeros(1, *jem.input_size, device=jem.device, dtype=jem.mean.dtype, requires_grad=True)
        slope = torch.autograd.grad(jem.pixel_energy(u).sum(), u, create_graph=True)[0]
        if not slope.requires_grad:  # of a piecewise linear energy
            return
        try:
            torch.autograd.grad(slope.sum(), u, allow_unused=True)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("is not implemented", "once_differentiable")):
                raise
            raise InputError(
                f"this backbone has no second derivatives ({one_line(error)}), which the gradient through a refinement "
                f"needs: {remedy}"
            ) from error
