"""Logits of a set, and their accuracy."""

from collections.abc import Iterable

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_whole
from timm_jem.evaluation.labelled import eight_bit_images, labelled_logits, labels
from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels
from timm_jem.progress import tqdm

__all__ = ["accuracy", "in_batches", "predict", "top_correct"]


def in_batches(images: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels in parts of ``size``, as :func:`predict` takes them."""
    check_whole("batch_size", size, 1)
    return list(zip(images.split(size), y.split(size), strict=True))


@torch.no_grad()
def predict(jem: JEM, batches: Iterable[tuple[Tensor, Tensor]], *, desc: str = "predicting") -> tuple[Tensor, Tensor]:
    """Logits of every image, in eval mode, without noise: the same at every call.

    Args:
        jem: the model; its train or eval flags are left as they were.
        batches: 8-bit images, shape (B, C, H, W), and labels, shape (B,).
        desc: of the progress bar.

    Returns:
        Logits, float32, shape (N, num_classes), and labels, int64, shape (N,), on the CPU.

    Raises:
        InputError: images that are not 8-bit, other numbers of labels, or no images.
    """
    logits, ys = [], []
    with frozen(jem):
        for images, y in tqdm(batches, desc=desc, leave=False):
            eight_bit_images(images, channels=jem.input_size[0])
            logits.append(jem(jem.normalize(to_pixels(images.to(jem.device)))).float().cpu())
            ys.append(labels(y, len(images)))
    if not logits:
        raise InputError("there are no images to predict: give at least one batch")
    return torch.cat(logits), torch.cat(ys)


def top_correct(logits: Tensor, y: Tensor, top: int = 1) -> Tensor:
    """Whether an image's label is among its ``top`` largest logits: bool, shape (N,), on the CPU.

    Of equal logits the lower class comes first.

    Args:
        logits: shape (N, num_classes), −inf where a class is ruled out.
        y: labels, whole numbers, shape (N,).
        top: at most num_classes.

    Raises:
        InputError: labels that don't fit, ``top`` out of range, or logits that are NaN, +inf, or all −inf.
    """
    check_whole("top", top, 1)
    logits, y = labelled_logits(logits, y)
    if top > logits.shape[1]:
        raise InputError(f"top is {top} and there are {logits.shape[1]} classes: give at most so many")
    own = logits.gather(1, y[:, None])
    earlier = torch.arange(logits.shape[1]) < y[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1) < top


def accuracy(logits: Tensor, y: Tensor, top: int = 1) -> float:
    """Part of the images whose label is among the ``top`` largest logits; arguments and errors as :func:`top_correct`'s."""
    return top_correct(logits, y, top).double().mean().item()
