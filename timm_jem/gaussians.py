"""Where chains start: Gaussians fitted to the images of each class."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from timm_jem.errors import InputError, check_number, check_whole, quoted
from timm_jem.files import read_tensors, write_tensors
from timm_jem.inputs import FAR_FROM_PIXELS, check_label_values, is_floats, is_labels, kind
from timm_jem.noise import Generators, draw_classes, randn
from timm_jem.sampling import filled

__all__ = ["FEWEST_IMAGES", "MAX_STARTS_BYTES", "STARTS_FILE", "ClassGaussians"]

STARTS_FILE = "chain_starts.safetensors"
_MAX_BYTES = 256 * 2**20  # that the tensors may take
MAX_STARTS_BYTES = _MAX_BYTES + 2**20  # of the file: with what names them

FEWEST_IMAGES = 8  # that a mean is taken of, and for each principal component of a class: see ClassGaussians
_FEWEST_COMPONENTS = 4  # below which a Gaussian is hardly more than a mean in noise
_CHUNK = 256  # images or chains at once
_MAX_IMAGES = 6000  # of a class, for its principal components
_MAX_NUMBERS = 2**27  # that those images hold, and so half a GiB
_GATHERED = 2**24  # numbers of the factors that are gathered at once on a GPU
_BEYOND = 64  # dimensions of the sketch beyond the components that are kept


@dataclass(frozen=True, eq=False)
class ClassGaussians:
    """One Gaussian a class over pixels, low rank plus diagonal: the informative initial distribution of JEM++.

    Source: JEM++ (arXiv 2109.09032), and SADA-JEM (arXiv 2209.07959), which start chains from class-wise Gaussians of the
    images' mean and covariance. Theirs have the full covariance, D × D for D = C·H·W (72 MB a class at 3×32×32 and as much
    work a draw); here it is F Fᵀ + diag(s²), with F the principal components of largest variance, in 8 bits, and s such
    that each pixel's variance is exactly the images', what the 8 bits leave out included. As in their released code samples
    are clamped to [-1, 1], and the covariance is the mean over images, without Bessel's correction.

    An initial distribution for :class:`timm_jem.ReplayBuffer`, and for fresh chains of a model that carries it
    (``JEM.starts``); see :meth:`__call__`. It holds D · (rank + 8) bytes a class, which are published with the model.

    **Privacy.** As many components as images would span the images themselves. A mean is of eight images at least, and a
    class has one component for every eight of its images at most, so that each is an average of many. They tell all the
    same a little of who was among them: at one for eight of 500 images, those images lie nearer to the components than
    others of their class do with AUROC 0.65 to 0.7 on Fashion-MNIST and CIFAR-10, and 0.83 to 0.88 on MNIST (chance: 0.5;
    with one for two images it is 0.95 on the former). Don't publish them where that must not be known.

    Attributes:
        means: pixels, shape (K, C, H, W).
        factors: F in units of ``scales``, int8, shape (K, D, rank); a class with fewer components has zeros.
        scales: pixels, of each column of F, shape (K, rank).
        residual_std: s, pixels, shape (K, C, H, W).
        weights: the classes' shares of the labelled images, shape (K,).

    Raises:
        InputError: tensors of other types, or whose shapes disagree.
    """

    means: Tensor
    factors: Tensor
    scales: Tensor
    residual_std: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name in ("means", "scales", "residual_std", "weights"):
            if not is_floats(value := getattr(self, name)) or not value.ndim:
                raise InputError(f"{name} of class Gaussians is {kind(value)}: give a floating-point tensor")
        factors, (classes, *_) = self.factors, self.weights.shape
        if getattr(factors, "dtype", None) != torch.int8 or factors.ndim != 3:
            raise InputError(f"factors of class Gaussians is {kind(factors)}: give int8, shape (K, D, rank)")
        agree = self.means.ndim == 4 and self.means.shape == self.residual_std.shape and self.weights.ndim == 1
        expected = (classes, self.means[:1].numel(), self.scales.shape[-1])
        if not (agree and self.means.numel() and factors.shape == expected and self.scales.shape == (classes, expected[2])):
            shapes = ", ".join(f"{field.name} {tuple(getattr(self, field.name).shape)}" for field in fields(self))
            raise InputError(f"the shapes of class Gaussians disagree ({shapes}): take them from ClassGaussians.fit")

    def check_fit(self, image_shape: Sequence[int], num_classes: int) -> None:
        """Raise an InputError unless chains of a model of such images and classes can start here."""
        if tuple(self.means.shape[1:]) != tuple(image_shape) or len(self.means) not in (1, num_classes):
            raise InputError(
                f"class Gaussians are {len(self.means)} of images of {tuple(self.means.shape[1:])}, and this model has "
                f"{num_classes} classes and images of {tuple(image_shape)}: set jem.starts = None, or to some of this model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`save` writes."""
        return {field.name: getattr(self, field.name).detach().cpu().contiguous() for field in fields(self)}

    def save(self, file: str | os.PathLike) -> None:
        """Write them as safetensors.

        Raises:
            InputError: the file can't be written; one that was there is as before.
        """
        write_tensors(file, self.tensors())

    @classmethod
    def load(cls, file: str | os.PathLike, image_shape: Sequence[int], num_classes: int) -> "ClassGaussians":
        """Read them for a model of these images and classes.

        Raises:
            InputError: a file that is missing, broken, too large, or of other images or classes, or that holds NaN.
        """
        file = Path(file)
        tensors, _ = read_tensors(file, MAX_STARTS_BYTES, "ClassGaussians.save", "remove it, and chains start from noise")
        try:
            if (keys := set(tensors)) != {field.name for field in fields(cls)}:
                raise InputError(f"it holds {quoted(sorted(keys)) if keys else 'nothing'}")
            found = cls(**{name: tensor.float() if is_floats(tensor) else tensor for name, tensor in tensors.items()})
            for name, tensor in tensors.items():  # int8 holds neither NaN nor large numbers
                if is_floats(tensor) and tensor.numel() and not tensor.abs().max() <= FAR_FROM_PIXELS:
                    raise InputError(f"{name} holds NaN, or numbers far outside of pixels")
                if name not in ("means", "factors") and tensor.numel() and tensor.min() < 0:
                    raise InputError(f"{name} holds numbers below 0")
            if not found.weights.sum() > 0:
                raise InputError("none of its classes has a weight above 0")
            found.check_fit(image_shape, num_classes)
        except InputError as error:
            raise InputError(f"{file.name} has no class Gaussians of this model: {error}") from error
        return found

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        num_classes: int | None = None,
        rank: int | None = None,
        explained: float = 0.99,
    ) -> "ClassGaussians":
        """Fit to images; deterministic, and apart from PyTorch's global generator.

        Means and variances take all images of a class, a few hundred at a time; principal components at most 6,000, evenly
        spaced among them, by a randomised range finder. A class of fewer than eight images gets the Gaussian of all images.

        Args:
            images: uint8, or floating-point pixels in [-1, 1]; shape (N, C, H, W).
            labels: int64, shape (N,); −1: unknown, counts among all images only. Needed where ``num_classes`` is given.
            num_classes: K; None: one Gaussian of all images, K = 1.
            rank: columns of F; those beyond one for every eight images of a class are zero. None: the fewest that explain
                ``explained``, or else as many as eight images each, and 256 MiB for all classes, allow.
            explained: share of a class's variance, summed over pixels, that its components are to have, 0 to 1.

        Raises:
            InputError: fewer than eight images, images or labels of wrong shape or range, a rank or share out of range, or
                so many classes of such large images that no four components of each fit into 256 MiB.
        """
        _check_images(images)
        check_number("share of the variance that class Gaussians explain", explained, least=0, most=1)
        n = len(images)
        if num_classes is None:
            groups, counts = [torch.arange(n)], torch.tensor([n])
            most = _most_components(1, images.shape[1:])
        else:
            check_whole("num_classes of the class Gaussians", num_classes, 1)
            most = _most_components(num_classes, images.shape[1:])
            if not is_labels(labels, n, images):
                raise InputError(f"labels are {kind(labels)} for {n} images: give one label per image, int64, shape ({n},)")
            labels = labels.cpu()
            check_label_values(labels, num_classes, least=-1)
            groups = [(labels == c).nonzero().squeeze(1) for c in range(num_classes)]
            counts = torch.tensor([len(group) for group in groups])
            if not counts.any():
                raise InputError("no image has a label: give num_classes=None for one Gaussian of all")
        if rank is not None:
            check_whole("rank of the class Gaussians", rank, 0, most)
            most, explained = rank, 1.0
        overall = None
        gaussians = []
        for group in groups:
            if len(group) < FEWEST_IMAGES and overall is None:
                overall = _fit_one(images, torch.arange(n), most, explained)
            gaussians.append(overall if len(group) < FEWEST_IMAGES else _fit_one(images, group, most, explained))
        means, factors, scales, residual_std = zip(*gaussians, strict=True)
        width = max(len(of_class) for of_class in scales) if rank is None else rank
        factors, scales = ([pad(t, (0, width - t.shape[-1])) for t in tensors] for tensors in (factors, scales))
        means, factors, scales, residual_std = map(torch.stack, (means, factors, scales, residual_std))
        return cls(means, factors, scales, residual_std, counts.to(means) / counts.sum())

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
        z = randn((n, self.scales.shape[1]), generator=generator, device=home, dtype=torch.float32) * self.scales[y]
        u = randn((n, *fitted), generator=generator, device=home, dtype=torch.float32)
        kind_of_device = "cpu" if home.type == "meta" else home.type
        with torch.autocast(kind_of_device, enabled=False):  # in half precision they would be others
            for part, c, common in (_by_class if home.type == "cpu" else _by_chain)(self.factors, z, y):
                u[part] = (self.means[c] + common.view(-1, *fitted) + self.residual_std[c] * u[part]).clamp_(-1, 1)
        return u if device is None else u.to(device)

    def to(self, device: torch.device | str) -> "ClassGaussians":
        """The same Gaussians on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _by_class(factors: Tensor, z: Tensor, y: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """F z, class by class: which chains, their class, and F z, shape (n, D). It waits for the device."""
    for c in y.unique().tolist():
        of_class = factors[c].T.float()
        for chains in (y == c).nonzero().squeeze(1).split(_CHUNK):
            yield chains, c, (filled(z[chains]) @ of_class)[: len(chains)]


def _by_chain(factors: Tensor, z: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As :func:`_by_class`, some chains at a time, whatever their classes. It gathers the factors, and doesn't wait."""
    size = max(1, _GATHERED // max(1, factors[0].numel()))
    for start in range(0, len(y), size):
        part = slice(start, start + size)
        yield part, y[part], torch.bmm(factors[y[part]].float(), z[part].unsqueeze(2)).squeeze(2)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel() or images.is_meta:
        raise InputError(f"images are {kind(images)}: give at least {FEWEST_IMAGES} images, shape (N, C, H, W)")
    if len(images) < FEWEST_IMAGES:
        raise InputError(f"class Gaussians of {len(images)} images: give at least {FEWEST_IMAGES}, or start chains from noise")
    if not (images.dtype == torch.uint8 or is_floats(images)):
        raise InputError(f"images are {kind(images)}: give uint8, or floating-point pixels in [-1, 1]")
    low, high = (float(v) for v in images.aminmax())
    if images.is_floating_point() and not (low >= -FAR_FROM_PIXELS and high <= FAR_FROM_PIXELS):
        raise InputError(f"images hold {low:.3g} to {high:.3g}: give pixels in [-1, 1], e.g. images / 127.5 - 1, or uint8")


def _most_components(num_classes: int, image_shape: Sequence[int]) -> int:
    """How many components of each class fit into a file, beside its mean, its residuals, its weight and their scales."""
    pixels = math.prod(image_shape)
    most = (_MAX_BYTES // num_classes - 8 * pixels - 4) // (pixels + 4)
    if most < _FEWEST_COMPONENTS:
        raise InputError(
            f"Gaussians of {quoted(num_classes)} classes of images of {tuple(image_shape)} take more than "
            f"{_MAX_BYTES >> 20} MiB: take smaller images, or start chains from noise"
        )
    return most


def _fit_one(images: Tensor, group: Tensor, most: int, explained: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, factors, their scales and residual_std of the images in ``group``, with ``most`` components at most."""
    mean = sum(_pixels(images, part).sum(0) for part in group.split(_CHUNK)) / len(group)
    variance = sum((_pixels(images, part) - mean).square().sum(0) for part in group.split(_CHUNK)) / len(group)
    count = min(len(group), _MAX_IMAGES, max(FEWEST_IMAGES, _MAX_NUMBERS // mean.numel()))
    evenly = group[torch.linspace(0, len(group) - 1, count, dtype=torch.float64).round().long()]
    centred = torch.cat([(_pixels(images, part) - mean).float().flatten(1) for part in evenly.split(_CHUNK)])
    with torch.autocast(centred.device.type, enabled=False):  # in half precision they would be others
        factors = _components(centred, min(most, count // FEWEST_IMAGES), explained)
    # Some of the images may vary more than all of them do, in a pixel.
    total = variance.flatten().float()
    sum_of_squares = factors.square().sum(1).clamp(min=torch.finfo(total.dtype).tiny)
    factors *= (total / sum_of_squares).clamp(max=1).sqrt().unsqueeze(1)
    factors, scales = _eight_bits(factors, total)
    residual = (total - (factors * scales).square().sum(1)).clamp(min=0).sqrt().view_as(mean)
    return mean.float(), factors, scales, residual


def _components(x: Tensor, most: int, explained: float) -> Tensor:
    """Principal components of rows of mean 0, shape (n, D), each as long as its standard deviation: the fewest that explain
    ``explained`` of the variance, or else ``most``; shape (D, rank).

    Source: the randomised range finder of Halko, Martinsson and Tropp (SIAM Review 2011, algorithms 4.3 and 5.3), which
    starts here from sums of rows of random signs (Clarkson and Woodruff, STOC 2013): they cost next to nothing, and are as
    good as half a power iteration.
    """
    n, pixels = x.shape
    size = min(most + _BEYOND, n, pixels)
    signs = torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
    sums = x.new_zeros(size, pixels)
    for rows, of_rows in zip(x.split(size), signs.split(size), strict=True):
        sums[: len(rows)] += rows * of_rows
    basis = torch.linalg.qr(x.T @ (x @ sums.T)).Q
    seen = x @ basis
    variances, vectors = torch.linalg.eigh(seen.T @ seen / n)
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    before = variances.cumsum(0) - variances
    rank = min(most, int((before < explained * x.square().sum() / n).sum()))
    return basis @ vectors[:, :rank] * variances[:rank].sqrt()


def _eight_bits(factors: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Factors, shape (D, rank), in 8 bits, and their columns' scales, shape (rank,).

    The squares of no row sum to above ``most``, shape (D,), as those of the factors don't: what rounding would make so is
    cut instead.
    """
    scales = factors.abs().amax(0) / 127
    levels = factors / scales.clamp(min=torch.finfo(scales.dtype).tiny)
    rounded = levels.round()
    above = ((rounded * scales).square().sum(1) > most).unsqueeze(1)
    return torch.where(above, levels.trunc(), rounded).to(torch.int8), scales


def _pixels(images: Tensor, which: Tensor) -> Tensor:
    images = images[which.to(images.device)]
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
