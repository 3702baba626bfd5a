"""Out-of-distribution sets: those that need no download, and any other data set's images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_jem.data import load_images
from timm_jem.decoding import Fit, fitted
from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.labelled import eight_bit_images
from timm_jem.evaluation.labelled import labels as class_labels

__all__ = ["constant_images", "interpolations", "outlier_sets", "uniform_images"]


def interpolations(images: Tensor, labels: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """The means of two images of different classes: between the modes of the data.

    JEM (arXiv 1912.03263, section 5.3, "CIFAR-10 Interp"): its released code averages two test images as well, but adds
    noise to them, and takes pairs of the same class too.

    Args:
        images: 8-bit images in distribution, shape (N, C, H, W).
        labels: their classes, integers, shape (N,).
        n: how many; each image is the first of a pair once before it is again. The second is any of another class.
        generator: on the CPU; the only source of randomness.

    Returns:
        uint8, shape (n, C, H, W); halves are rounded to the even level, so that the mean stays.

    Raises:
        InputError: images that are not 8-bit, other shapes, or images of one class.
    """
    check_whole("n", n, 1)
    device, labels = eight_bit_images(images).device, class_labels(labels, len(images))
    classes, label, count = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"interpolations need images of two classes, and these have {len(classes)}: give more images")
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))])
    first = order[:n]
    # Others of image i: all rows sorted by class, without the block of its own class.
    start, size = (count.cumsum(0) - count)[label[first]], count[label[first]]
    draws = torch.rand(n, generator=generator, dtype=torch.float64)
    other = (draws * (len(images) - size)).long()
    second = label.argsort(stable=True)[other + size * (other >= start)]
    first, second = first.to(device), second.to(device)
    return torch.lerp(images[first].float(), images[second].float(), 0.5).round().to(torch.uint8)


def uniform_images(n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Images whose levels are all independent, uniform in 0..255: what JEM's chains start from, in 8 bits.

    Args:
        n: how many.
        shape: (C, H, W).
        generator: on the CPU; the only source of randomness.

    Returns:
        uint8, shape (n, C, H, W).
    """
    check_whole("n", n, 1)
    return torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8)


def constant_images(n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Images of one colour, each channel uniform in 0..255; arguments and result as :func:`uniform_images`'.

    Smooth images get high densities from likelihood models (Serrà et al., ICLR 2020, arXiv 1909.11480; constant images
    are their limit).
    """
    return uniform_images(n, (shape[0], 1, 1), generator).expand(n, *shape).contiguous()


def outlier_sets(
    specs: Sequence[str], images: Tensor, labels: Tensor, *, count: int, seed: int, fit: Fit = fitted
) -> dict[str, Tensor]:
    """The sets that are asked for, by the names that reports give them.

    Args:
        specs: interpolation, uniform, constant, or the Hub names, folders or .parquet files of data sets.
        images: 8-bit images in distribution, shape (N, C, H, W), in a random order.
        labels: their classes, integers, shape (N,).
        count: images in a set; a data set may have fewer, and so have interpolations of few images.
        seed: of all sets.
        fit: how images of data sets become pixels of this size.

    Returns:
        For each set uint8, shape (n, C, H, W).

    Raises:
        InputError: no sets, or a data set that can't be read.
    """
    shape = images.shape[1:]
    sets: dict[str, Tensor] = {}
    for i, spec in enumerate(specs):
        generator = torch.Generator().manual_seed(seed + i)
        if spec == "interpolation":
            mixed = interpolations(images, labels, count, generator)
            pairs = (len(labels) ** 2 - int(labels.unique(return_counts=True)[1].square().sum())) // 2
            # Of few images many pairs come twice, which are no more images; else one in twenty does at most.
            sets[spec] = mixed.unique(dim=0) if pairs < 10 * count else mixed
        elif spec == "uniform":
            sets["uniform noise"] = uniform_images(count, shape, generator)
        elif spec == "constant":
            sets["constant colours"] = constant_images(count, shape, generator)
        else:
            dataset, mark, choice = spec.partition("?")  # ?split=NAME and the like stay in the name
            name = f"{Path(dataset).name.removesuffix('.parquet')}{mark}{choice}"
            numbered = (f"{name} ({number})" for number in range(2, len(specs) + 1))  # its folder is nobody's business
            name = next(free for free in (name, *numbered) if free not in sets)
            sets[name] = load_images(spec, channels=shape[0], size=tuple(shape[1:]), count=count, seed=seed, fit=fit)
    if not sets:
        raise InputError("ood is empty: give some of interpolation, uniform, constant, or data sets; or leave the section out")
    return sets
