"""What chains draw at random: noise, classes and seeds, by one generator for all or one a chain."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole, quoted
from timm_jem.inputs import MOST_NUMBERS, is_floats, kind

__all__ = [
    "Generators",
    "chain_generators",
    "check_generators",
    "draw_classes",
    "draw_seeds",
    "randn",
    "uniform_noise",
]

# One stream of numbers for all chains, or one a chain, all of one device; None: PyTorch's global one.
Generators = torch.Generator | Sequence[torch.Generator] | None


def chain_generators(seeds: Sequence[int] | Tensor) -> list[torch.Generator]:
    """One generator a chain, so that what a chain draws is a function of its seed alone, whatever is drawn beside it.

    They live on the CPU, and so give the same noise to chains on any device.

    Args:
        seeds: whole numbers from 0 to 2³² − 1, all that PyTorch's generator of the CPU tells apart.

    Raises:
        InputError: seeds of another range or type.
    """
    try:
        seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    except RuntimeError as error:  # a tensor without values
        raise InputError(f"seeds is {kind(seeds)} without values: give whole numbers, one seed per image") from error
    if isinstance(seeds, str) or not isinstance(seeds, Sequence):
        raise InputError(f"seeds is {quoted(seeds)}: give a list of whole numbers, one seed per image")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise InputError(f"a seed is {quoted(seed)}: give whole numbers from 0 to {2**32 - 1}")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_seeds(n: int, generator: torch.Generator | None = None) -> list[int]:
    """``n`` distinct seeds for :func:`chain_generators`; the first of them are the same however many are drawn."""
    check_whole("number of seeds", n, 0, 2**31)  # half of them all, beyond which distinct ones are hard to find
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise InputError(f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(seed)")
    device = "cpu" if generator is None else generator.device
    seeds: dict[int, None] = {}
    while len(seeds) < n:  # one by one: what CUDA draws at once depends on how much that is
        seeds[int(torch.randint(2**32, (), generator=generator, device=device))] = None
    return list(seeds)


def randn(shape, *, generator: Generators = None, device=None, dtype=None) -> Tensor:
    """Standard normal noise on ``device``, drawn where ``generator`` lives, so that a CPU generator serves any device.

    Of a sequence of generators, one for each of the ``shape[0]`` chains, the i-th alone draws the noise of chain i.

    Raises:
        InputError: another number of generators than of chains, or something else than generators.
    """
    return _drawn("normal_", shape, generator, device, dtype)


def uniform_noise(
    shape,
    *,
    generator: Generators = None,
    device=None,
    dtype=None,
    y: Tensor | None = None,
) -> Tensor:
    """Uniform noise in [-1, 1] pixels: the initial distribution of JEM's chains (arXiv 1912.03263, appendix A).

    ``y``, the classes of the new chains, is that of every initial distribution, and makes no difference to this one.
    ``generator`` and errors as of :func:`randn`.
    """
    return _drawn("uniform_", shape, generator, device, dtype).mul_(2).sub_(1)


def draw_classes(n: int, weights: Tensor, *, generator: Generators = None) -> Tensor:
    """``n`` classes, int64, shape (n,), drawn by ``weights``, shape (num_classes,), on their device; nothing waits for it.

    ``generator`` and errors as of :func:`randn`.
    """
    check_whole("number of classes to draw", n, 0)
    if not is_floats(weights) or weights.ndim != 1 or not len(weights):
        raise InputError("the weights of classes are no row of floating-point numbers: give one a class")
    # An exponential race: the first of arrivals at rates p is class c with probability p[c]. torch.multinomial checks its
    # input on the host where n is 1.
    times = _drawn("exponential_", (n, len(weights)), generator, weights.device, None)
    return (weights / times).argmax(1)


def _drawn(fill: str, shape, generator: Generators, device, dtype) -> Tensor:
    """A new tensor filled by its method ``fill``: all at once by one generator, or row by row by as many as it has rows."""
    _check_shape(shape, dtype)
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return getattr(torch.empty(shape, device=source, dtype=dtype), fill)(generator=generator).to(device)
    check_generators(generator, shape[0])
    source = generator[0].device if len(generator) else device
    numbers = torch.empty(shape, device=source, dtype=dtype)
    for row, own in zip(numbers, generator, strict=True):
        getattr(row, fill)(generator=own)
    return numbers.to(device)


def _check_shape(shape, dtype: torch.dtype | None) -> None:
    if not isinstance(shape, (tuple, list)) or not shape:
        raise InputError(f"the shape of chains is {quoted(shape)}: give (n, C, H, W)")
    for side in shape:
        check_whole("a side of the shape of chains", side, 0)
    if math.prod(map(int, shape)) > MOST_NUMBERS:
        raise InputError(f"chains of shape {quoted(tuple(shape))} are more than {MOST_NUMBERS:,} numbers: make fewer at a time")
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise InputError(f"the dtype of noise is {quoted(dtype)}: give a floating-point one, or None")


def check_generators(generator: Generators, n: int) -> None:
    """Raise an InputError unless there is one generator for all ``n`` chains, or one for each."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not (isinstance(generator, Sequence) and all(isinstance(own, torch.Generator) for own in generator)):
        raise InputError(f"generator is a {type(generator).__name__}: give a torch.Generator, or a list of one per chain")
    if len(generator) != n:
        raise InputError(f"{len(generator)} generators for {n} chains: give one for all, or one per chain")
