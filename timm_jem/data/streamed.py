"""Training images that are read one after another."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import IterableDataset
from torch import Tensor

from timm_jem.data.images import SKIP_HINT, located
from timm_jem.decoding import BrokenImage, Fit, decode, fitted
from timm_jem.errors import InputError, quoted

__all__ = ["Labelling", "StreamedImage", "StreamedSet", "digest", "is_missing"]


@dataclass(frozen=True)
class Labelling:
    """How the values of a label column become classes, found by name: splits may number theirs in another order.

    Attributes:
        column: the label column.
        names: names of a ClassLabel column's values; None: other values are their own names.
        classes: class of each name.
        missing: how to fix a row without a label, for messages; None: such rows are unlabelled images, of class −1.
    """

    column: str
    names: dict[int, str] | None
    classes: dict[str, int]
    missing: str | None

    def of(self, value, what: str) -> int:
        """Class of ``value``, found in the row ``what``.

        Raises:
            InputError: no class of the train split.
        """
        missing = is_missing(value)
        if missing and self.missing is None:
            return -1
        name = str(value) if self.names is None else self.names.get(value)
        if missing or name not in self.classes:
            remedy = self.missing if missing else "fix or remove the row"
            raise InputError(
                f"{what}, has the label {quoted(value)}, none of the train split's {len(self.classes)} classes: {remedy}"
            )
        return self.classes[name]


@dataclass(frozen=True)
class StreamedSet:
    """Training images that are read one after another, those held out left out.

    Attributes:
        rows: image and label column, images not decoded.
        image_column: its image column.
        labelling: classes of its label column.
        channels: 1 or 3.
        size: (H, W).
        name: of the stream, for messages.
        shuffle_buffer: see :class:`timm_jem.data.DataConfig`.
        held_out: digests of the images held out, by which they are known wherever a shuffled and split stream has them:
            images within rows, and any copies of them, by their content; files by their paths alone, for a stream that goes
            to a place reads none of those before it. A copy under another name is an image of its own, as in stored sets.
        labelled_only: leave unlabelled images out.
        skip_broken: leave out, with a warning each, images that can't be decoded.
        fit: how images become pixels of this size.
    """

    rows: IterableDataset
    image_column: str
    labelling: Labelling
    channels: int
    size: tuple[int, int]
    name: str
    shuffle_buffer: int
    held_out: frozenset[bytes] = frozenset()
    labelled_only: bool = False
    skip_broken: bool = False
    fit: Fit = fitted

    def epoch(self, generator: np.random.Generator) -> Iterator["StreamedImage"]:
        """Every image once, shuffled by ``generator`` alone, not yet decoded."""
        shuffled, number = self.rows.shuffle(generator=generator, buffer_size=self.shuffle_buffer), 0
        # Not `for row in shuffled`: in a DataLoader's worker, datasets would shuffle otherwise than outside of one.
        for batch in shuffled.iter(batch_size=32):
            for stored, value in zip(batch[self.image_column], batch[self.labelling.column], strict=True):
                what = located(f"row {number} of {self.name}", stored)
                number += 1
                image = StreamedImage(stored, self.labelling.of(value, what), digest(stored), what)
                if image.digest not in self.held_out and not (self.labelled_only and image.label < 0):
                    yield image

    def decode(self, image: "StreamedImage") -> Tensor | None:
        """8-bit pixels of an image, shape (C, H, W); None: it is broken, and left out.

        Raises:
            InputError: it is broken.
        """
        try:
            return decode(image.stored, self.channels, self.size, image.what, self.fit)
        except BrokenImage as error:
            if not self.skip_broken:
                raise InputError(f"{error}, {SKIP_HINT}") from error
            warnings.warn(f"left out: {error}", stacklevel=2)
            return None


@dataclass(frozen=True)
class StreamedImage:
    """An undecoded image of a stream, its class or −1, the digest of its content, and its name for messages."""

    stored: dict
    label: int
    digest: bytes
    what: str


def is_missing(value: str | int | None) -> bool:
    """Whether a value says that there is no label: none, −1, or a blank."""
    return value is None or value == -1 or (isinstance(value, str) and not value.strip())


def digest(stored: dict | None) -> bytes:
    """Eight bytes that tell an undecoded image cell from others: of its content, or of its path if it is a file."""
    content = b"" if stored is None else stored["bytes"] if stored["bytes"] is not None else str(stored["path"]).encode()
    return hashlib.blake2b(content, digest_size=8).digest()
