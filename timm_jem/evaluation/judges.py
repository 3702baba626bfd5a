"""An independent classifier that reads samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.evaluation.labelled import eight_bit_images, labels
from timm_jem.pixels import to_pixels

__all__ = ["Judge", "fit_judge"]

_SIDE = 16


@dataclass(frozen=True)
class Judge:
    """A support vector classifier on pixels.

    Attributes:
        name: what it is, and what it was fitted to.
        classifier: scikit-learn's.
    """

    name: str
    classifier: Any

    def predict(self, images: Tensor) -> Tensor:
        """Classes of 8-bit images, uint8, shape (N, C, H, W): int64, shape (N,).

        Raises:
            InputError: images that are not 8-bit, or of another shape than it was fitted to.
        """
        pixels = _pixels(images)
        if pixels.shape[1] != self.classifier.n_features_in_:
            raise InputError(f"images have shape {tuple(images.shape[1:])}, and the judge was fitted to others")
        return torch.from_numpy(self.classifier.predict(pixels)).long()

    def accuracy(self, images: Tensor, y: Tensor) -> float:
        """Share of the images that it reads as their labels, shape (N,); errors as :meth:`predict`."""
        found = self.predict(images)
        return (found == labels(y, len(found))).double().mean().item()


def fit_judge(images: Tensor, y: Tensor, *, max_images: int = 5000, seed: int = 0) -> Judge:
    """scikit-learn's SVC with C = 10 and else its defaults, on pixels in [-1, 1] averaged to 16×16 at most.

    Args:
        images: 8-bit training images, uint8, shape (N, C, H, W).
        y: their labels, shape (N,).
        max_images: at most so many, chosen by ``seed``.
        seed: of the choice.

    Raises:
        InputError: images that are not 8-bit, or of fewer than two classes; labels that don't fit, or are unknown.
    """
    y = labels(y, len(eight_bit_images(images, "images for a judge")), what="labels for a judge")
    if (y < 0).any():
        raise InputError(f"{int((y < 0).sum())} of {len(y)} images for a judge have no label: leave them out")
    rows = np.random.default_rng(seed).permutation(len(y))[:max_images]
    if len(y[rows].unique()) < 2:
        raise InputError(f"a judge needs images of two classes at least, and has {len(rows)} of {len(y[rows].unique())}")
    sides = "×".join(str(min(side, _SIDE)) for side in images.shape[2:])
    name = f"a support vector classifier (C = 10) on {sides} pixels of {len(rows):,} training images"
    return Judge(name, SVC(C=10).fit(_pixels(images[rows]), y[rows].numpy()))


def _pixels(images: Tensor) -> np.ndarray:
    eight_bit_images(images, "images for a judge")
    sides = [min(side, _SIDE) for side in images.shape[2:]]
    parts = [F.adaptive_avg_pool2d(to_pixels(part.cpu()), sides).flatten(1) for part in images.split(256)]
    return torch.cat(parts).numpy()
