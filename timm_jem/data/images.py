"""Images of a data set as 8-bit pixels."""

import io
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import torch
from accelerate.utils import tqdm
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from timm_jem.errors import InputError, one_line

__all__ = ["ImageSet", "cache_small", "decode", "open_image"]

_MODES = {1: "L", 3: "RGB"}


class ImageSet(torch.utils.data.Dataset):
    """Images and labels of one split, fetched a batch at a time: 8-bit images (B, C, H, W) and int64 labels (B,).

    Args:
        data: rows of the split.
        image_column: its image column.
        labels: class of each row, in [0, number of classes), or −1: unknown.
        channels: 1 or 3.
        size: (H, W).
        name: of the split they come from, for messages.
        numbers: the rows' numbers in that split, for messages.
    """

    def __init__(
        self,
        data: Dataset,
        image_column: str,
        labels: Sequence[int],
        channels: int,
        size: tuple[int, int],
        name: str,
        numbers: Sequence[int],
    ) -> None:
        self.data = data.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self.image_column, self.channels, self.size = image_column, channels, size
        self.parts = [(name, numbers)]
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return len(self) * self.channels * self.size[0] * self.size[1]

    def cache(self) -> "ImageSet":
        """Decode every image now and keep it in memory, 8 bits a pixel; returns itself."""
        images = torch.empty(len(self), self.channels, *self.size, dtype=torch.uint8)
        for row in tqdm(range(len(self)), desc=f"decoding images of {self.parts[0][0]}", leave=False):
            images[row] = self._decode(row)
        self.images = images
        return self

    def head(self, count: int) -> "ImageSet":
        """The first ``count`` images; decoded ones are shared, not copied."""
        (name, numbers), *_ = self.parts
        data = self.data.select(range(count))
        head = ImageSet(data, self.image_column, self.labels[:count], self.channels, self.size, name, numbers[:count])
        head.images = None if self.images is None else self.images[:count]
        return head

    def joined(self, other: "ImageSet") -> "ImageSet":
        """These images and then ``other``'s, of the same channels and size, none decoded yet."""
        data = other.data
        if other.image_column != self.image_column:
            data = data.rename_column(other.image_column, self.image_column)
        joined = ImageSet(
            datasets.concatenate_datasets([self.data, data]),
            self.image_column,
            torch.cat([self.labels, other.labels]),
            self.channels,
            self.size,
            *self.parts[0],
        )
        joined.parts = self.parts + other.parts
        return joined

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = list(rows)
        images = torch.stack([self._decode(row) for row in rows]) if self.images is None else self.images[rows]
        return images, self.labels[rows]

    def _decode(self, row: int) -> Tensor:
        return decode(self.data[row][self.image_column], self.channels, self.size, self._named(row))

    def _named(self, row: int) -> str:
        for name, numbers in self.parts:
            if row < len(numbers):
                return f"row {numbers[row]} of {name}"
            row -= len(numbers)
        raise IndexError(row)


def cache_small(sets: Iterable[ImageSet], gib: float) -> None:
    """Decode all images of ``sets`` now and keep them, where they take no more than ``gib`` GiB together."""
    sets = list(sets)
    if sum(image_set.nbytes for image_set in sets) <= gib * 2**30:
        for image_set in sets:
            image_set.cache()


def decode(stored: dict | None, channels: int, size: tuple[int, int], what: str) -> Tensor:
    """Decode an undecoded image cell of ``datasets`` to 8-bit pixels of shape (C, H, W).

    Images of another size are resized to cover it, and centre-cropped.

    Raises:
        InputError: as :func:`open_image`.
    """
    pixels = tvf.pil_to_tensor(open_image(stored, what).convert(_MODES[channels]))
    if pixels.shape[1:] != size:
        scale = max(side / old for side, old in zip(size, pixels.shape[1:], strict=True))
        covering = [max(side, round(scale * old)) for side, old in zip(size, pixels.shape[1:], strict=True)]
        pixels = tvf.center_crop(tvf.resize(pixels, covering, antialias=True), list(size))
    return pixels


def open_image(stored: dict | None, what: str) -> PILImage.Image:
    """Decode an undecoded image cell of ``datasets``, upright, to 8 bits a channel.

    Raises:
        InputError: no image there, or not one that can be decoded.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise InputError(f"{what} has no image: remove the row")
    try:
        if stored["bytes"] is None and "://" in stored["path"]:
            image = Image().decode_example(stored)  # a file on the Hub
        else:
            image = PILImage.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
        image = ImageOps.exif_transpose(image)
        image.load()
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise InputError(f"{what} has an image that can't be decoded ({one_line(error)}): repair or remove it") from error
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{what} has an image of 32-bit numbers, whose range is unknown: convert it to 8 or 16 bits")
    return image
