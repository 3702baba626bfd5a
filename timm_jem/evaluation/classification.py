"""Logits of a set, and their accuracy."""

from collections.abc import Iterable

import torch
from accelerate.utils import tqdm
from torch import Tensor

from timm_jem.model import JEM
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels

__all__ = ["accuracy", "in_batches", "predict"]


def in_batches(images: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels in parts of ``size``, as :func:`predict` takes them."""
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
    """
    device = jem.mean.device
    logits, labels = [], []
    with frozen(jem):
        for images, y in tqdm(batches, desc=desc, leave=False):
            logits.append(jem(jem.normalize(to_pixels(images.to(device)))).float().cpu())
            labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, y: Tensor, top: int = 1) -> float:
    """Part of the images whose label is among the ``top`` largest logits: logits (N, num_classes), labels (N,)."""
    if top == 1:
        return (logits.argmax(1) == y).double().mean().item()
    return (logits.topk(top, dim=1).indices == y[:, None]).any(1).double().mean().item()
