"""Accuracy and calibration of a split, by all processes together."""

from accelerate import Accelerator
from timm.utils import distribute_bn
from torch.utils.data import DataLoader, Subset

from timm_jem.data import ImageSet
from timm_jem.data.loader import data_loader
from timm_jem.evaluation import accuracy, expected_calibration_error, predict
from timm_jem.model import JEM

__all__ = ["in_batches", "measure"]


def in_batches(images: ImageSet | Subset, workers: int) -> DataLoader:
    """8-bit images and labels in order, 256 at once; ``workers`` processes decode those that aren't decoded yet."""
    workers = workers if getattr(images, "dataset", images).images is None else 0
    return data_loader(images, workers, batch_size=256)


def measure(jem: JEM, images: ImageSet, name: str, accelerator: Accelerator, *, workers: int = 0) -> dict[str, float]:
    """``<name>_accuracy`` and ``<name>_ece`` of the split ``name``; all processes call it, and get the same.

    BatchNorm's statistics become those of the main process in all: its model is the one that is saved.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if world > 1:
        distribute_bn(jem, world)
    # Each process predicts every world-th image; a few are predicted twice so that all have as many.
    rows = [min(rank + world * i, len(images) - 1) for i in range(-(-len(images) // world))]
    mine, _ = predict(jem, in_batches(Subset(images, rows), workers), desc=name)
    logits = accelerator.gather(mine.to(accelerator.device)).cpu().view(world, len(rows), -1).transpose(0, 1).flatten(0, 1)
    logits = logits[: len(images)]
    return {
        f"{name}_accuracy": accuracy(logits, images.labels),
        f"{name}_ece": expected_calibration_error(logits.softmax(1), images.labels),
    }
