"""Hugging Face image data sets, split into train, validation and test."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from torch import Tensor

from timm_jem.data.columns import (
    TEST_SPLITS,
    channels_and_size,
    find_class_names,
    find_image_column,
    find_label_column,
    find_test_split,
    labels_of,
)
from timm_jem.data.config import DataConfig
from timm_jem.data.images import ImageSet, cache_small
from timm_jem.data.sources import load
from timm_jem.data.stream_splits import split_stream
from timm_jem.data.streamed import StreamedSet
from timm_jem.errors import InputError, check_whole

__all__ = ["Splits", "load_images", "load_splits"]


@dataclass
class Splits:
    """The splits of a data set and what they have in common.

    Attributes:
        train: all images to learn p(x) from; labels are −1 where unknown.
        val, test: see :class:`DataConfig`.
        class_names: names of the classes, in order.
        image_shape: (C, H, W).
        crop_padding, flip: the augmentation that suits the data.
        class_frequencies: how frequent each class is among the labelled training images, shape (number of classes,),
            float32, sum 1; the same for all classes of a stream.
        labeled: the labelled training images, where ``train`` has (or, a stream, may have) unlabelled ones as well;
            None: ``train`` itself.
    """

    train: ImageSet | StreamedSet
    val: ImageSet
    test: ImageSet
    class_names: list[str]
    image_shape: tuple[int, int, int]
    crop_padding: int
    flip: bool
    class_frequencies: Tensor
    labeled: ImageSet | StreamedSet | None = None

    def summary(self) -> str:
        """One line that says what was loaded, for people."""
        channels, height, width = self.image_shape
        train = f"{len(self.train):,}" if isinstance(self.train, ImageSet) else "a stream of"
        counts = f"{train} training / {len(self.val):,} validation / {len(self.test):,} test images"
        return f"{len(self.class_names)} classes, {counts}, {'grey' if channels == 1 else 'RGB'} {height}×{width}"


def load_splits(config: DataConfig) -> Splits:
    """Load a data set and split it into train, validation and test.

    Small sets are decoded at once (see ``DataConfig.cache_gib``), so that a broken image is found before any training.

    Raises:
        InputError: an unknown data set, split or column, labels out of range, or images that can't be decoded.
    """
    loaded = load(config.dataset, config.config_name, config.train_split, config.streaming)
    if config.train_split not in loaded:
        raise InputError(f"{config.dataset} has no split {config.train_split!r}: choose train_split from {', '.join(loaded)}")
    train = loaded[config.train_split]
    if train.features is None:
        raise InputError(f"{config.dataset} does not list its columns before its rows are read: leave data.streaming out")
    image_column = find_image_column(train.features, config.dataset, config.image_column, "choose one with --data.image_column")
    label_column = find_label_column(train.features, config)
    if config.streaming and not isinstance(train.features[label_column], ClassLabel):
        raise InputError(
            f"{config.dataset} has no class names for {label_column!r} in its features, and data.streaming can't look for "
            "them in the rows: leave data.streaming out"
        )
    class_names = find_class_names(train, label_column)
    split = split_stream if config.streaming else _split_stored
    sets, labeled = split(config, loaded, image_column, label_column, class_names)
    train = sets["train"]

    if isinstance(train, StreamedSet):
        frequencies = torch.full((len(class_names),), 1 / len(class_names))
    else:
        frequencies = (train if labeled is None else labeled).labels.bincount(minlength=len(class_names)).float()
    channels, size = train.channels, train.size
    flip = not all(len(name) == 1 or name.isdigit() for name in class_names) if config.flip is None else config.flip
    padding = (size[0] // 8 if size[0] >= 16 else 0) if config.crop_padding is None else config.crop_padding
    if padding >= min(size):
        raise InputError(f"data crop_padding is {padding} for images of {size[0]}×{size[1]}: give less than the side")
    return Splits(
        **sets,
        class_names=class_names,
        image_shape=(channels, *size),
        crop_padding=padding,
        flip=flip,
        class_frequencies=frequencies / frequencies.sum(),
        labeled=labeled,
    )


def load_images(
    name: str,
    *,
    channels: int,
    size: tuple[int, int],
    count: int,
    seed: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    config_name: str | None = None,
) -> Tensor:
    """Images of any data set, without labels: what a model of other images is tried on.

    Args:
        name: as ``DataConfig.dataset``.
        channels: 1 (grey) or 3 (RGB); images are converted.
        size: (H, W); images of another size are resized to cover it, and centre-cropped.
        count: at most so many, chosen by ``seed`` where there are more; in the rows' order.
        seed: see ``count``.
        split: None: the first of test, validation, valid, val and train that is there, or else the first.
        image_column: None: the only image column.
        config_name: the Hub data set's configuration, where it has several.

    Returns:
        8-bit images, shape (n, C, H, W).

    Raises:
        InputError: an unknown data set, split or column, no images, or images that can't be decoded.
    """
    if channels not in (1, 3):
        raise InputError(f"images of {name} have {channels!r} channels asked for: give 1 (grey) or 3 (RGB)")
    for what, value, least in (("height", size[0], 1), ("width", size[1], 1), ("count", count, 1), ("seed", seed, 0)):
        check_whole(what, value, least)
    loaded = load(name, config_name, split or "test", streaming=False)
    split = split or next((s for s in (*TEST_SPLITS, "train") if s in loaded), next(iter(loaded), None))
    if split not in loaded:
        raise InputError(f"{name} has no split {split!r}: choose split from {', '.join(loaded)}")
    data = loaded[split]
    column = find_image_column(data.features, name, image_column, "choose one with image_column")
    if len(data) == 0:
        raise InputError(f"split {split} of {name} is empty: choose another")
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    unknown = np.full(len(rows), -1)
    return ImageSet(data.select(rows), column, unknown, channels, tuple(size), f"{name}, split {split}", rows).cache().images


def _split_stored(
    config: DataConfig, loaded: dict[str, Dataset], image_column: str, label_column: str, class_names: list[str]
) -> tuple[dict[str, ImageSet], ImageSet | None]:
    """The three image sets, and the labelled training images where there are others: they come first."""
    train = loaded[config.train_split]
    test_split = find_test_split(config, loaded, image_column, label_column)
    labels = labels_of(train, config, config.train_split, label_column, class_names)
    rng = np.random.default_rng(config.split_seed)
    rows_of, unlabeled = {"train": np.flatnonzero(labels >= 0)}, np.flatnonzero(labels < 0)
    if len(rows_of["train"]) < 3:
        raise InputError(f"{config.dataset} has {len(rows_of['train'])} labelled images, too few for three splits")
    if test_split is None:
        rows_of["train"], rows_of["test"] = _hold_out(rows_of["train"], labels, config.test_fraction, rng)
    rows_of["train"], rows_of["val"] = _hold_out(rows_of["train"], labels, config.val_fraction, rng)
    if config.labels_per_class is not None:
        kept = _some_of_each(rows_of["train"], labels, config.labels_per_class, class_names, rng)
        unlabeled = np.union1d(unlabeled, np.setdiff1d(rows_of["train"], kept))
        labels[unlabeled], rows_of["train"] = -1, kept
    labeled = len(rows_of["train"])
    rows_of["train"] = np.concatenate([rows_of["train"], unlabeled])

    channels, size = channels_and_size(
        config, train.cast_column(image_column, Image(decode=False))[0][image_column], f"row 0 of split {config.train_split}"
    )
    sets = {
        name: ImageSet(train.select(rows), image_column, labels[rows], channels, size, f"split {config.train_split}", rows)
        for name, rows in rows_of.items()
    }
    if test_split is not None:
        test = loaded[test_split]
        classes = labels_of(test, config, test_split, label_column, class_names)
        sets["test"] = ImageSet(test, image_column, classes, channels, size, f"split {test_split}", range(len(test)))
    if config.unlabeled is not None:
        more = load(config.unlabeled, None, config.unlabeled_split, streaming=False)
        if config.unlabeled_split not in more:
            raise InputError(
                f"{config.unlabeled} has no split {config.unlabeled_split!r}: choose unlabeled_split from {', '.join(more)}"
            )
        more = more[config.unlabeled_split]
        column = find_image_column(more.features, config.unlabeled, None, "data.unlabeled needs exactly one")
        name = f"{config.unlabeled}, split {config.unlabeled_split}"
        nothing = np.full(len(more), -1)
        sets["train"] = sets["train"].joined(ImageSet(more, column, nothing, channels, size, name, range(len(more))))
    cache_small(sets.values(), config.cache_gib)
    return sets, None if labeled == len(sets["train"]) else sets["train"].head(labeled)


def _some_of_each(
    rows: np.ndarray, labels: np.ndarray, count: int, class_names: list[str], rng: np.random.Generator
) -> np.ndarray:
    """``count`` of ``rows`` of each class, in the rows' order."""
    kept = []
    for label, name in enumerate(class_names):
        of_class = rng.permutation(rows[labels[rows] == label])
        if len(of_class) < count:
            raise InputError(
                f"data labels_per_class is {count}, and class {name!r} has {len(of_class)} training images: lower it"
            )
        kept.append(of_class[:count])
    return np.sort(np.concatenate(kept))


def _hold_out(rows: np.ndarray, labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split ``rows`` into (kept, held out), the same fraction of each class held out, in the rows' order."""
    held = []
    for label in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == label])
        held.append(of_class[: round(len(of_class) * fraction)])
    held = np.sort(np.concatenate(held))
    if len(held) == 0:
        held = rng.permutation(rows)[:1]
    if len(held) == len(rows):
        raise InputError(f"a fraction of {fraction} holds out all {len(rows)} images: lower it")
    return np.setdiff1d(rows, held), held
