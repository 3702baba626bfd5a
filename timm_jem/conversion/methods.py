"""What the authors of each method released: its layout, how its chains move, and what they claim of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_jem.sampling import SGLDConfig

__all__ = ["METHODS", "Method", "head_untouched", "methods_of"]

_CLAMPED = {"step_size": 1.0, "noise_std": 0.0, "grad_clamp": 1.0, "pixel_clamp": 1.0}
_SADA_STEPS = (5, 10, 20)
_FROM_GAUSSIANS = (
    "its chains started from Gaussians of the classes, which are not in the file, and from noise it draws no images: use "
    "init='buffer', or set jem.starts = timm_jem.ClassGaussians.fit(images, labels, num_classes) and save it"
)


@dataclass(frozen=True)
class Method:
    """One of the published methods.

    Attributes:
        title: with its paper.
        layout: of its files, of :data:`timm_jem.conversion.layouts.LAYOUTS`.
        normalised: whether its network has BatchNorm.
        sgld: settings of its chains, by the file's name and the images' shape (C, H, W), and where they are from.
        claims: what its authors measured on CIFAR-10.
        energies: whether its density is logsumexp of the logits; None: unless it was trained with the code's "uncond" flag.
        chains: whether chains of its energies were trained.
        samples: what one must know to draw images, if anything.
        mean, std: of its input, [0, 1] pixel units.
    """

    title: str
    layout: str
    normalised: bool
    sgld: Callable[[str, tuple[int, int, int]], tuple[SGLDConfig, str]]
    claims: str
    energies: bool | None = None
    chains: bool = True
    samples: str | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def _always(config: SGLDConfig, source: str) -> Callable[[str, tuple[int, int, int]], tuple[SGLDConfig, str]]:
    return lambda file_name, image_shape: (config, source)


def _of_sada(file_name: str, image_shape: tuple[int, int, int]) -> tuple[SGLDConfig, str]:
    """The number of steps is in some files' names, such as sadajem10."""
    match = re.search(r"sada(?:[-_]?jem)?[-_]?k?(\d+)(?!\d)", file_name.lower())
    steps = int(match[1]) if match and int(match[1]) in _SADA_STEPS else None
    source = "the paper's fewest steps" if steps is None else "steps by the file's name"
    return SGLDConfig(num_steps=steps or _SADA_STEPS[0], **_CLAMPED), f"the released code; {source}, --num_steps sets others"


def _of_dat(file_name: str, image_shape: tuple[int, int, int]) -> tuple[SGLDConfig, str]:
    """Steps of ℓ2 length 0.2 in [0, 1], and so 0.4 in [-1, 1]; ours are told as root mean squares."""
    numbers = image_shape[0] * image_shape[1] * image_shape[2]
    config = SGLDConfig(num_steps=33, step_size=0.4 / numbers**0.5, noise_std=0.0, normalize_grad=True, pixel_clamp=1.0)
    return config, "those of sampling in the released code, steps of ℓ2 length 0.2 in [0, 1], 32 to 35 of them"


METHODS = {
    "jem": Method(
        "JEM (arXiv 1912.03263)",
        "jem",
        False,
        _always(SGLDConfig(), "the paper, appendix A, and the released code"),
        "92.9 % test accuracy, with noise of 0.03 on the test images, FID 38.4",
    ),
    "jempp": Method(
        "JEM++ (arXiv 2109.09032)",
        "jempp",
        True,
        _always(
            SGLDConfig(num_steps=10, **_CLAMPED),
            "the released code, whose five inner steps of 0.2 around a linear layer are one step of 1",
        ),
        "93.7 to 94.1 % test accuracy, FID 37.1",
        samples=_FROM_GAUSSIANS,
    ),
    "sada": Method(
        "SADA-JEM (arXiv 2209.07959)",
        "jem",
        True,
        _of_sada,
        "94.8 % test accuracy of the README's file, 95.5 to 96 % in the paper by the number of steps",
        samples=_FROM_GAUSSIANS,
    ),
    "mjem": Method(
        "M-JEM and M-EBM",
        "jem",
        True,
        _always(SGLDConfig(num_steps=5, **_CLAMPED), "the released code's README; its script adds noise of 0.001"),
        "94.08 % test accuracy, FID 10.4 of all chains of the buffer",
        energies=False,
        samples=_FROM_GAUSSIANS.replace("Gaussians of the classes", "a Gaussian of all images").replace(
            "(images, labels, num_classes)", "(images)"
        ),
    ),
    "vera": Method(
        "VERA (arXiv 2010.04230)",
        "vera",
        False,
        _always(SGLDConfig(), "JEM: VERA trains with a generator instead of chains"),
        "93.2 % test accuracy, FID 30.5 of its generator",
        energies=True,
        chains=False,
        samples="its images came from its generator, which is left out: chains of these energies were never trained",
    ),
    "dat": Method(
        "DAT (arXiv 2510.13872)",
        "dat",
        True,
        _of_dat,
        "91.92 % test accuracy and 75.75 % under AutoAttack (ℓ2 0.5) with T = 40, 90.72 and 74.65 % with T = 50",
        energies=True,
        samples="its images start from photographs of other kinds, jem.sample(y=..., init=x); from noise, steps so few and "
        "short arrive nowhere",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
}


def methods_of(layout: str, weights: Mapping[str, Tensor]) -> list[str]:
    """The methods whose files have this layout, with or without BatchNorm as these weights are."""
    normalised = any(re.search(r"(^|\.)bn1\.running_mean$", name) for name in weights)
    return [name for name, method in METHODS.items() if method.layout == layout and method.normalised == normalised]


def head_untouched(weight: Tensor, bias: Tensor) -> bool:
    """Whether a linear layer, shapes (1, D) and (1,), is as PyTorch initialises it: uniform within ±1/√D.

    One that is trained leaves that; one that no loss reaches has no gradients, and optimisers pass over it.
    """
    values, bound = torch.cat([weight.flatten(), bias.flatten()]).double(), weight.shape[-1] ** -0.5
    spread = values.square().mean().sqrt() / (bound / 3**0.5)
    return bool(values.abs().max() <= 1.001 * bound and 0.85 < spread < 1.15)
