"""Where chains start in training, where that is learnt from images or at images themselves."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset

from timm_jem.data import Splits, load_images
from timm_jem.data.images import evenly
from timm_jem.data.sources import read_name
from timm_jem.errors import InputError, quoted
from timm_jem.gaussians import FEWEST_IMAGES, ClassGaussians
from timm_jem.pixels import to_pixels
from timm_jem.training.measure import in_batches
from timm_jem.training.settings import Settings

__all__ = ["ImageStarts", "class_gaussians", "image_starts"]


class ImageStarts:
    """An initial distribution for :class:`timm_jem.ReplayBuffer`: each new chain starts at an image, drawn with replacement.

    DAT (arXiv 2510.13872) starts chains at natural images of another data set, which they then change into those of its own.

    Args:
        images: 8-bit, shape (N, C, H, W), on the chains' device.

    Raises:
        InputError: something else.
    """

    def __init__(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
            raise InputError("images to start chains at are not 8-bit: give a uint8 tensor, shape (N, C, H, W), at least one")
        self.images = images

    def __call__(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Pixels in [-1, 1], float32, of ``shape`` (n, C, H, W), on ``device``.

        Which images they are is a function of ``generator``'s state alone; ``y``, the classes of the new chains, makes no
        difference.
        """
        if tuple(shape[1:]) != tuple(self.images.shape[1:]):
            raise InputError(f"chains of shape {quoted(tuple(shape[1:]))} at images of {tuple(self.images.shape[1:])}")
        rows = torch.randint(len(self.images), (shape[0],), generator=generator, device=generator.device)
        u = to_pixels(self.images[rows.to(self.images.device)])
        return u if device is None else u.to(device)


def image_starts(settings: Settings, splits: Splits, device: torch.device) -> tuple[ImageStarts, ClassGaussians]:
    """The images of ``data.starts``, resized and converted as the run's own, as many as memory allows, for chains of training;
    and their one Gaussian, for the model to draw from without them.

    Raises:
        InputError: images that can't be loaded, or fewer than eight.
    """
    (channels, *size), name = splits.image_shape, settings.data.starts
    count = _most_images(splits)
    try:
        split = read_name(name).split or "train"
        images = load_images(name, channels=channels, size=tuple(size), count=count, split=split)
        return ImageStarts(images.to(device)), ClassGaussians.fit(images)
    except InputError as error:
        raise InputError(f"data.starts: {error}") from error


def class_gaussians(splits: Splits, workers: int) -> ClassGaussians:
    """The Gaussians of the training images of each class: of all of them up to 1 GiB, or else evenly spaced ones."""
    rows = evenly(len(splits.train), _most_images(splits))
    images = torch.cat([images for images, _ in in_batches(Subset(splits.train, rows), workers)])
    return ClassGaussians.fit(images, splits.train.labels[rows], len(splits.class_names))


def _most_images(splits: Splits) -> int:
    return max(2**30 // math.prod(splits.image_shape), FEWEST_IMAGES)
