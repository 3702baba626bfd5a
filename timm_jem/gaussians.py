"""Where chains start: Gaussians fitted to the images of each class."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_jem.errors import InputError, check_whole, one_line, quoted
from timm_jem.inputs import FAR_FROM_PIXELS, MOST_NUMBERS, check_label_values, is_floats, is_labels, kind
from timm_jem.sampling import Generators, draw_classes, randn

__all__ = ["MAX_STARTS_BYTES", "STARTS_FILE", "ClassGaussians"]

STARTS_FILE = "chain_starts.safetensors"
_MAX_BYTES = 256 * 2**20  # that the tensors may take
MAX_STARTS_BYTES = _MAX_BYTES + 2**20  # of the file: with what names them

_CHUNK = 256  # images or chains in float at once
_MAX_IMAGES = 1000  # of a class, for the principal components


@dataclass(frozen=True, eq=False)
class ClassGaussians:
    """One Gaussian a class over pixels, low rank plus diagonal: the informative initial distribution of JEM++.

    Source: JEM++ (arXiv 2109.09032), and SADA-JEM (arXiv 2209.07959), which start chains from class-wise Gaussians of the
    images' mean and covariance. Theirs have the full covariance, D × D for D = C·H·W (72 MB a class at 3×32×32 and as much
    work a draw); here it is F Fᵀ + diag(s²), with F the principal components of largest variance, and s such that each
    pixel's variance is exactly the images'. As in their released code samples are clamped to [-1, 1], and the covariance
    is the mean over images, without Bessel's correction.

    An initial distribution for :class:`timm_jem.ReplayBuffer`, and for fresh chains of a model that carries it
    (``JEM.starts``); see :meth:`__call__`. It holds D · (rank + 2) floats a class, averages of images and not images.

    Attributes:
        means: pixels, shape (K, C, H, W).
        factors: F, pixels, shape (K, D, rank).
        residual_std: s, pixels, shape (K, C, H, W).
        weights: the classes' shares of the labelled images, shape (K,).

    Raises:
        InputError: tensors that are not floating-point, or whose shapes disagree.
    """

    means: Tensor
    factors: Tensor
    residual_std: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_floats(value) or not value.ndim:
                raise InputError(f"{field.name} of class Gaussians is {kind(value)}: give a floating-point tensor")
        classes, pixels = len(self.weights), self.means[:1].numel()
        agree = self.means.ndim == 4 and self.means.shape == self.residual_std.shape and self.weights.ndim == 1
        if not (agree and self.means.numel() and self.factors.ndim == 3 and self.factors.shape[:2] == (classes, pixels)):
            shapes = ", ".join(f"{field.name} {tuple(getattr(self, field.name).shape)}" for field in fields(self))
            raise InputError(f"the shapes of class Gaussians disagree ({shapes}): take them from ClassGaussians.fit")

    def check_fit(self, image_shape: Sequence[int], num_classes: int) -> None:
        """Raise an InputError unless chains of a model of such images and classes can start here."""
        if tuple(self.means.shape[1:]) != tuple(image_shape) or len(self.means) not in (1, num_classes):
            raise InputError(
                f"class Gaussians are {len(self.means)} of images of {tuple(self.means.shape[1:])}: this model has "
                f"{num_classes} classes and images of {tuple(image_shape)}"
            )

    def save(self, file: str | os.PathLike) -> None:
        """Write them as safetensors."""
        save_file({field.name: getattr(self, field.name).detach().cpu().contiguous() for field in fields(self)}, file)

    @classmethod
    def load(cls, file: str | os.PathLike, image_shape: Sequence[int], num_classes: int) -> "ClassGaussians":
        """Read them for a model of these images and classes.

        Raises:
            InputError: a file that is broken, too large, or of other images or classes, or that holds NaN.
        """
        file = Path(file)
        if file.stat().st_size > MAX_STARTS_BYTES:
            raise InputError(f"{file.name} is larger than {_MAX_BYTES >> 20} MiB: remove it, and chains start from noise")
        try:
            tensors = load_file(file)
            if (keys := set(tensors)) != {field.name for field in fields(cls)}:
                raise InputError(f"it holds {quoted(sorted(keys)) if keys else 'nothing'}")
            found = cls(**{name: tensor.float() if is_floats(tensor) else tensor for name, tensor in tensors.items()})
            if not all(tensor.numel() == 0 or tensor.abs().max() <= FAR_FROM_PIXELS for tensor in vars(found).values()):
                raise InputError("it holds NaN, or numbers far outside of pixels")
            if found.weights.min() < 0 or not found.weights.sum() > 0:
                raise InputError("its classes have weights below 0, or none above it")
            found.check_fit(image_shape, num_classes)
        except (InputError, SafetensorError) as error:
            raise InputError(f"{file.name} has no class Gaussians of this model: {one_line(error)}") from error
        return found

    @classmethod
    def fit(
        cls, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None, rank: int = 16
    ) -> "ClassGaussians":
        """Fit to images; deterministic.

        Means and variances take all images of a class, a few hundred at a time; principal components at most 1,000, evenly
        spaced among them. A class of fewer than two images gets the Gaussian of all images.

        Args:
            images: uint8, or floating-point pixels in [-1, 1]; shape (N, C, H, W).
            labels: int64, shape (N,); −1: unknown, counts among all images only. Needed where ``num_classes`` is given.
            num_classes: K; None: one Gaussian of all images, K = 1.
            rank: columns of F; directions that so few images don't have are zero.

        Raises:
            InputError: fewer than two images, images or labels of wrong shape or range, a negative rank.
        """
        check_whole("rank of the class Gaussians", rank, 0, 10_000)
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < 2 or not images.numel() or images.is_meta:
            raise InputError(f"images are {kind(images)}: give at least two images, shape (N, C, H, W)")
        if not (images.dtype == torch.uint8 or is_floats(images)):
            raise InputError(f"images are {kind(images)}: give uint8, or floating-point pixels in [-1, 1]")
        low, high = (float(v) for v in images.aminmax())
        if images.is_floating_point() and not (low >= -FAR_FROM_PIXELS and high <= FAR_FROM_PIXELS):
            raise InputError(f"images hold {low:.3g} to {high:.3g}: give pixels in [-1, 1], e.g. images / 127.5 - 1, or uint8")
        needed = 4 * (num_classes or 1) * (rank + 2) * math.prod(images.shape[1:])
        if needed > _MAX_BYTES:
            raise InputError(
                f"Gaussians of {num_classes or 1} classes of images of {tuple(images.shape[1:])} take {needed >> 20} MiB, "
                f"above {_MAX_BYTES >> 20}: take smaller images, or start chains from noise"
            )
        n = len(images)
        if num_classes is None:
            groups, counts = [torch.arange(n)], torch.tensor([n])
        else:
            check_whole("num_classes of the class Gaussians", num_classes, 1)
            if num_classes * images[0].numel() * (rank + 2) > MOST_NUMBERS:
                raise InputError(
                    f"{quoted(num_classes)} class Gaussians of rank {quoted(rank)} hold too many numbers: take fewer"
                )
            if not is_labels(labels, n, images):
                raise InputError(f"labels are {kind(labels)} for {n} images: give one label per image, int64, shape ({n},)")
            labels = labels.cpu()
            check_label_values(labels, num_classes, least=-1)
            groups = [(labels == c).nonzero().squeeze(1) for c in range(num_classes)]
            counts = torch.tensor([len(group) for group in groups])
            if not counts.any():
                raise InputError("no image has a label: give num_classes=None for one Gaussian of all")
        overall = None
        gaussians = []
        for group in groups:
            if len(group) < 2 and overall is None:
                overall = _fit_one(images, torch.arange(n), rank)
            gaussians.append(overall if len(group) < 2 else _fit_one(images, group, rank))
        means, factors, residual_std = (torch.stack(tensors) for tensors in zip(*gaussians, strict=True))
        return cls(means, factors, residual_std, counts.to(means) / counts.sum())

    def __call__(
        self,
        shape,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Draw initial chains; only what is asked for is drawn, and nothing waits for the device.

        Args:
            shape: (n, C, H, W).
            generator: the only source of randomness, or a list of them, one a chain; None: PyTorch's global one.
            device: where the chains go; None: where the Gaussians are.
            y: classes of the chains, int64, shape (n,); None: drawn by ``weights``. One Gaussian of all serves any class.

        Returns:
            Pixels in [-1, 1], shape (n, C, H, W), float32.

        Raises:
            InputError: chains of another image shape than the fitted images, another number of generators or classes than of
                chains, or, on the CPU, classes that there are not.
        """
        if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 4:
            raise InputError(f"the shape of chains is {quoted(shape)}: give (n, C, H, W)")
        n, *image_shape = shape
        check_whole("number of chains", n, 0)
        num_classes, *fitted = self.means.shape
        if image_shape != fitted:
            raise InputError(f"chains of shape {tuple(image_shape)} from Gaussians of {tuple(fitted)}: fit them to such images")
        home = self.means.device
        if y is not None:
            if not is_labels(y, n, self.means):
                raise InputError(f"y is {kind(y)} for {n} chains: give classes, int64, shape ({n},)")
            if y.device.type == "cpu" and num_classes > 1:
                check_label_values(y, num_classes)
        if num_classes == 1:
            y = torch.zeros(n, dtype=torch.long, device=home)
        elif y is None:
            y = draw_classes(n, self.weights, generator=generator)
        else:
            y = y.to(home)
        z = randn((n, self.factors.shape[2]), generator=generator, device=home)
        u = randn((n, *fitted), generator=generator, device=home)
        for start in range(0, n, _CHUNK):  # so that no more than a chunk's factors are gathered
            part = slice(start, start + _CHUNK)
            c = y[part]
            common = torch.einsum("ndr,nr->nd", self.factors[c], z[part]).view_as(u[part])
            u[part] = (self.means[c] + common + self.residual_std[c] * u[part]).clamp_(-1, 1)
        return u if device is None else u.to(device)

    def to(self, device: torch.device | str) -> "ClassGaussians":
        """The same Gaussians on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _fit_one(images: Tensor, group: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = sum(_pixels(images, part).sum(0) for part in group.split(_CHUNK)) / len(group)
    variance = sum((_pixels(images, part) - mean).square().sum(0) for part in group.split(_CHUNK)) / len(group)
    evenly = group[torch.linspace(0, len(group) - 1, min(len(group), _MAX_IMAGES)).round().long()]
    centred = (_pixels(images, evenly) - mean).flatten(1)
    # The covariance's leading eigenvectors from the images' Gram matrix, n × n instead of D × D.
    _, eigenvectors = torch.linalg.eigh(centred @ centred.T)
    # For an eigenvector v of XXᵀ, Xᵀv / √λ is one of the covariance XᵀX / n, with eigenvalue λ / n: so F = Xᵀv / √n.
    factors = centred.new_zeros(centred.shape[1], rank)
    kept = min(rank, len(evenly))
    factors[:, :kept] = centred.T @ eigenvectors.flip(1)[:, :kept] / len(evenly) ** 0.5
    # Some of the images may vary more than all of them do, in a pixel.
    explained, total = factors.square().sum(1), variance.flatten()
    factors *= (total / explained.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1).sqrt().unsqueeze(1)
    residual = (total - factors.square().sum(1)).clamp(min=0).sqrt().view_as(mean)
    return mean.float(), factors.float(), residual.float()


def _pixels(images: Tensor, which: Tensor) -> Tensor:
    images = images[which.to(images.device)]
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
