"""How far features of images are from those of the classes: a score of outliers that any classifier gives."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timm_jem.errors import InputError
from timm_jem.inputs import kind

__all__ = ["ClassFeatures"]


@dataclass(frozen=True)
class ClassFeatures:
    """Gaussians of the classes' features with one covariance for all (Lee et al., NeurIPS 2018, arXiv 1807.03888, section 2.1).

    Attributes:
        means: float64, shape (K, D), of the K classes that had images.
        precision: inverse of the covariance, float64, shape (D, D).
    """

    means: Tensor
    precision: Tensor

    @classmethod
    def fit(cls, features: Tensor, y: Tensor) -> "ClassFeatures":
        """Fit to images in distribution; held-out ones, since a network's features of those it was trained on are too good.

        The covariance is scikit-learn's Ledoit-Wolf estimate, which has an inverse however few the images are.

        Args:
            features: shape (N, D).
            y: labels, int64, shape (N,); images of unknown class, below 0, are left out.

        Raises:
            InputError: features of another shape or not finite, fewer than two images with a label, or images that
                don't differ within their classes.
        """
        from sklearn.covariance import LedoitWolf

        features = _features(features)
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (len(features),):
            raise InputError(f"labels of {len(features)} images are {kind(y)}: give int64, shape ({len(features)},)")
        y = y.cpu()
        features, y = features[y >= 0], y[y >= 0]
        if len(y) < 2:
            raise InputError(f"{len(y)} images with a label are too few for the features of classes: give at least two")
        if not features.isfinite().all():
            raise InputError("features of images in distribution are not finite: the model is broken")
        classes, y = y.unique(return_inverse=True)
        means = torch.stack([features[y == c].mean(0) for c in range(len(classes))])
        covariance = LedoitWolf(assume_centered=True).fit((features - means[y]).numpy())
        if not covariance.precision_.any():
            raise InputError(f"the features of {len(y)} images are those of their classes' means: give images that differ")
        return cls(means, torch.from_numpy(covariance.precision_))

    @cached_property
    def _whitening(self) -> Tensor:
        """W, shape (D, D), with W Wᵀ the precision, so that distances are Euclidean after it."""
        values, vectors = torch.linalg.eigh(self.precision)
        return vectors * values.clamp(min=0).sqrt()

    def distance(self, features: Tensor) -> Tensor:
        """The squared Mahalanobis distance to the nearest class mean (eq. 2 there, negated): higher = further out.

        Args:
            features: shape (N, D).

        Returns:
            float64, shape (N,), on the CPU; what is not finite stays so.

        Raises:
            InputError: features of another shape.
        """
        features = _features(features)
        if features.shape[1] != self.means.shape[1]:
            raise InputError(
                f"features have {features.shape[1]} dimensions and the classes' {self.means.shape[1]}: give the same"
            )
        return torch.cdist(features @ self._whitening, self.means @ self._whitening).amin(1).square()


def _features(features: Tensor) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.shape[1]:
        raise InputError(f"features are {kind(features)}: give a tensor, (N, D)")
    return features.detach().cpu().double()
