"""Images of a data set as 8-bit pixels."""

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor

from timm_jem.decoding import UNREADABLE, BrokenImage, Fit, check_file, decode, fitted
from timm_jem.errors import InputError
from timm_jem.files import cores
from timm_jem.progress import tqdm

__all__ = ["SKIP_HINT", "ImageSet", "cache_small", "check_others", "evenly", "located", "stored_bytes"]

SKIP_HINT = "or leave out all such images with --data.skip_broken true"
_AT_ONCE = 64  # rows of small images: one by one they would take longer to fetch than to decode
_SMALL = 4096  # bytes of an encoded image whose decoding is mostly Python: threads would wait for one another


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
        fit: how images become pixels of this size.

    Attributes:
        whole: these with the images that were left out of them, none decoded; None: none were.
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
        fit: Fit = fitted,
    ) -> None:
        self.data = data.select_columns([image_column]).cast_column(image_column, Image(decode=False))
        self.image_column, self.channels, self.size, self.fit = image_column, channels, size, fit
        self.parts = [(name, numbers)]
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.images: Tensor | None = None
        self.whole: ImageSet | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return len(self) * self.channels * self.size[0] * self.size[1]

    def cache(self) -> dict[int, BrokenImage]:
        """Decode every image now and keep it in memory, 8 bits a pixel; returns what is wrong, by row."""
        self.images = torch.zeros(len(self), self.channels, *self.size, dtype=torch.uint8)
        return self._decode_all(self.images)

    def check(self) -> dict[int, BrokenImage]:
        """Decode every image once and keep none; returns what is wrong, by row."""
        return self._decode_all(None)

    def _decode_all(self, images: Tensor | None) -> dict[int, BrokenImage]:
        def decode_some(rows: range) -> dict[int, BrokenImage]:
            broken = {}
            for row, stored in zip(rows, self.data[rows.start : rows.stop][self.image_column], strict=True):
                try:
                    pixels = self._decode(row, stored)
                except BrokenImage as error:
                    broken[row] = error
                    continue
                if images is not None:
                    images[row] = pixels
            return broken

        threads, at_once = (1, _AT_ONCE) if self._are_small() else (cores(), 1)
        some = [range(len(self))[start : start + at_once] for start in range(0, len(self), at_once)]
        pool = ThreadPoolExecutor(threads)
        broken = {}
        try:
            with tqdm(total=len(self), desc=f"decoding images of {self.parts[0][0]}", leave=False) as progress:
                for rows, outcome in zip(some, pool.map(decode_some, some), strict=True):
                    broken |= outcome
                    progress.update(len(rows))
        finally:
            pool.shutdown(cancel_futures=True)
        return broken

    def _are_small(self) -> bool:
        files = [(stored or {}).get("bytes") for stored in self.data[evenly(len(self), 8)][self.image_column]]
        return all(data is not None and len(data) < _SMALL for data in files)

    def without(self, rows: Iterable[int]) -> "ImageSet":
        """The other images; decoded ones are copied."""
        kept = np.setdiff1d(np.arange(len(self)), list(rows))
        others = self._of_rows(self.data.select(kept), self.labels[kept], "", ())
        others.images = None if self.images is None else self.images[kept]
        others.whole = copy.copy(self) if self.whole is None else self.whole
        others.whole.images = None
        ends = np.cumsum([0, *(len(numbers) for _, numbers in self.parts)])
        others.parts = [
            (name, np.asarray(numbers)[kept[(kept >= start) & (kept < end)] - start])
            for (name, numbers), start, end in zip(self.parts, ends, ends[1:], strict=False)
        ]
        return others

    def head(self, count: int) -> "ImageSet":
        """The first ``count`` images; decoded ones are shared, not copied."""
        (name, numbers), *_ = self.parts
        head = self._of_rows(self.data.select(range(count)), self.labels[:count], name, numbers[:count])
        head.images = None if self.images is None else self.images[:count]
        return head

    def joined(self, other: "ImageSet") -> "ImageSet":
        """These images and then ``other``'s, of the same channels and size, none decoded yet."""
        data = other.data
        if other.image_column != self.image_column:
            data = data.rename_column(other.image_column, self.image_column)
        labels = torch.cat([self.labels, other.labels])
        joined = self._of_rows(datasets.concatenate_datasets([self.data, data]), labels, *self.parts[0])
        joined.parts = self.parts + other.parts
        return joined

    def _of_rows(self, data: Dataset, labels: Tensor, name: str, numbers: Sequence[int]) -> "ImageSet":
        """Others that become pixels as these do."""
        return ImageSet(data, self.image_column, labels, self.channels, self.size, name, numbers, self.fit)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = list(rows)
        if self.images is not None:
            return self.images[rows], self.labels[rows]
        # A whole batch of encoded photographs could be a GB.
        return torch.stack([self._decode(row, self.data[row][self.image_column]) for row in rows]), self.labels[rows]

    def _decode(self, row: int, stored: dict | None) -> Tensor:
        return decode(stored, self.channels, self.size, located(self._named(row), stored), self.fit)

    def _named(self, row: int) -> str:
        for name, numbers in self.parts:
            if row < len(numbers):
                return f"row {numbers[row]} of {name}"
            row -= len(numbers)
        raise IndexError(row)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` rows, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def cache_small(sets: Mapping[str, ImageSet], gib: float, *, skip_broken: bool | None) -> tuple[dict[str, ImageSet], int]:
    """Decode all images of ``sets`` now and keep them, where they take no more than ``gib`` GiB together.

    Args:
        sets: by name.
        gib: see above.
        skip_broken: decode them in any case, and leave out those that can't be; None: there is no such choice.

    Returns:
        The sets, and how many images were left out.

    Raises:
        InputError: images that can't be decoded, all of them named.
    """
    keep = sum(image_set.nbytes for image_set in sets.values()) <= gib * 2**30
    if not (keep or skip_broken):
        return dict(sets), 0
    broken = {name: image_set.cache() if keep else image_set.check() for name, image_set in sets.items()}
    errors = [error for of_set in broken.values() for error in of_set.values()]
    if not errors:
        return dict(sets), 0
    if not skip_broken:
        raise InputError(_all_of(errors) + ("" if skip_broken is None else f", {SKIP_HINT}"))
    return {name: image_set.without(broken[name]) for name, image_set in sets.items()}, len(errors)


def check_others(sets: Iterable[ImageSet]) -> None:
    """Decode each image that isn't in memory once.

    Raises:
        InputError: images that can't be decoded, all of them named.
    """
    if errors := [error for image_set in sets if image_set.images is None for error in image_set.check().values()]:
        raise InputError(f"{_all_of(errors)}, {SKIP_HINT}")


def _all_of(errors: Sequence[BrokenImage]) -> str:
    first, *others = errors
    if not others:
        return str(first)
    named = ", ".join(error.what for error in others[:20]) + (f" and {len(others) - 20} more" if len(others) > 20 else "")
    return f"{first}; {len(others)} more cannot be read: {named}"


def located(what: str, stored: dict | None) -> str:
    """``what`` and the file that an undecoded image cell is or was, where it has a name."""
    path = (stored or {}).get("path")
    return f"{what} ({path})" if path else what


def stored_bytes(stored: Mapping[str, Any] | None) -> bytes | None:
    """What the file of an undecoded image cell holds; None: there is none here, which is named when it is decoded."""
    data, path = (stored or {}).get("bytes"), (stored or {}).get("path")
    if data is None and path is not None and "://" not in path:
        with contextlib.suppress(UNREADABLE):
            check_file(path)
            data = Path(path).read_bytes()
    return data
