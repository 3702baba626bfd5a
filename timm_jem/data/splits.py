"""Hugging Face image data sets, split into train, validation and test."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from timm_jem.data.columns import (
    TEST_SPLITS,
    check_classes,
    find_class_names,
    find_image_column,
    find_label_column,
    find_test_split,
    labels_of,
    with_images,
    with_whole_labels,
)
from timm_jem.data.config import DataConfig
from timm_jem.data.headers import Headers, read_headers
from timm_jem.data.images import ImageSet, cache_small
from timm_jem.data.sources import Asked, load, read_name
from timm_jem.data.stream_splits import split_stream
from timm_jem.data.streamed import StreamedSet
from timm_jem.data.unlabeled import held_out_among
from timm_jem.decoding import Fit, fitted
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
        files: what the images are as they are stored, in words, beside what is made of them.
        left_out: how many broken images were left out (of a stream: of those held out).
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
    files: str = ""
    left_out: int = 0

    @property
    def test_of_train(self) -> bool:
        """Whether test images were held out of the train split, as those of ``val`` always are: there is no test split."""
        return self.test.parts[0][0] == self.val.parts[0][0]

    @property
    def tested_on(self) -> str:
        """What test images are, for people: the name of their split, or of which they were held out."""
        split = self.test.parts[0][0].removeprefix("split ")
        return f"held out of {split}" if self.test_of_train else split

    def summary(self) -> str:
        """One line that says what was loaded, for people."""
        classes = f"{len(self.class_names)} classes"
        if empty := [name for name, part in zip(self.class_names, self.class_frequencies, strict=True) if part == 0]:
            classes += f" ({len(empty)} without training images, such as {empty[0]!r})"
        train = "streamed"
        if isinstance(self.train, ImageSet):
            unlabeled = int((self.train.labels < 0).sum())
            train = f"{len(self.train):,}{f' ({unlabeled:,} without a label)' if unlabeled else ''}"
        counts = f"{train} training / {len(self.val):,} validation / {len(self.test):,} test images"
        left_out = f", {self.left_out:,} broken one{'s' * (self.left_out > 1)} left out" if self.left_out else ""
        return f"{classes}, {counts}, {self.files}{left_out}"


def load_splits(config: DataConfig, *, size: tuple[int, int] | None = None, fit: Fit = fitted) -> Splits:
    """Load a data set and split it into train, validation and test.

    Small sets are decoded at once (see ``DataConfig.cache_gib``), so that a broken image is found before any training.

    Args:
        config: which, and how.
        size: (H, W) of the images, instead of what ``config`` and the files say.
        fit: how images become pixels of this size; those of other models may be made otherwise than in training.

    Raises:
        InputError: an unknown data set, split or column, labels out of range, or images that can't be decoded.
    """
    loaded = load(config.dataset, config.config_name, config.train_split, config.streaming)
    loaded = with_whole_labels(with_images(loaded, config.image_column), config.label_column)
    if config.train_split not in loaded:
        raise InputError(f"{config.dataset} has no split {config.train_split!r}: choose train_split from {', '.join(loaded)}")
    train = loaded[config.train_split]
    if train.features is None:
        raise InputError(f"{config.dataset} does not list its columns before its rows are read: leave data.streaming out")
    if isinstance(train, Dataset) and len(train) == 0:
        raise InputError(f"split {config.train_split} of {config.dataset} is empty: choose another")
    image_column = find_image_column(train.features, config.dataset, config.image_column, "choose one with --data.image_column")
    label_column = find_label_column(train.features, config)
    if config.streaming and not isinstance(train.features[label_column], ClassLabel):
        raise InputError(
            f"{config.dataset} has no class names for {label_column!r} in its features, and data.streaming can't look for "
            "them in the rows: leave data.streaming out"
        )
    class_names = find_class_names(train, label_column, config.dataset)
    split = split_stream if config.streaming else _split_stored
    sets, labeled, headers, left_out = split(config, loaded, image_column, label_column, class_names, size, fit)
    train = sets["train"]

    if isinstance(train, StreamedSet):
        frequencies = torch.full((len(class_names),), 1 / len(class_names))
    else:
        frequencies = (train if labeled is None else labeled).labels.bincount(minlength=len(class_names)).float()
    if (frequencies > 0).sum() < 2 or not len(sets["val"]) or not len(sets["test"]):
        raise InputError(
            f"{config.dataset} has too few images{' that can be read' if left_out else ''}, for training on two classes, "
            f"validation and test: {f'repair some of the {left_out} broken ones, or ' if left_out else ''}give more"
        )
    test = sets["test"].labels
    if not (frequencies[test] > 0).any():
        raise InputError(
            f"no test image of {config.dataset} is of a class that training has, the first is of {class_names[test[0]]!r}: "
            "give others with --data.test_split, or remove them, and a part of the train split is held out"
        )
    asked = size is not None or config.image_size is not None
    channels, size = train.channels, train.size
    flip = not all(len(name) == 1 or name.isdigit() for name in class_names) if config.flip is None else config.flip
    side = min(size)
    padding = (side // 8 if side >= 16 else 0) if config.crop_padding is None else config.crop_padding
    if padding >= side:
        raise InputError(f"data crop_padding is {padding} for images of {size[0]}×{size[1]}: give less than the side")
    return Splits(
        **sets,
        class_names=class_names,
        image_shape=(channels, *size),
        crop_padding=padding,
        flip=flip,
        class_frequencies=frequencies / frequencies.sum(),
        labeled=labeled,
        files=headers.told(channels, size, asked=asked),
        left_out=left_out,
    )


def load_images(
    name: str,
    *,
    channels: int,
    size: tuple[int, int],
    count: int,
    seed: int = 0,
    split: str | None = None,
    fit: Fit = fitted,
) -> Tensor:
    """Images of any data set, without labels: what a model of other images is tried on.

    Args:
        name: as ``DataConfig.dataset``; ?split=NAME, ?image_column=NAME and ?config_name=NAME may follow, joined by &.
        channels: 1 (grey) or 3 (RGB); images are converted.
        size: (H, W); by default images of another size are resized to cover it, and centre-cropped.
        count: at most so many, chosen by ``seed`` where there are more; in the rows' order.
        seed: see ``count``.
        split: None: that of the name, or the first of test, validation, valid, val and train that is there, or else the first.
        fit: how images become pixels of this size.

    Returns:
        8-bit images, shape (n, C, H, W).

    Raises:
        InputError: an unknown data set, split or column, no images, or images that can't be decoded.
    """
    if channels not in (1, 3):
        raise InputError(f"images of {name} have {channels!r} channels asked for: give 1 (grey) or 3 (RGB)")
    for what, value, least in (("height", size[0], 1), ("width", size[1], 1), ("count", count, 1), ("seed", seed, 0)):
        check_whole(what, value, least)
    asked = read_name(name)
    data, column, what = _images_of(asked, split or asked.split)
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    images = ImageSet(data.select(rows), column, np.full(len(rows), -1), channels, tuple(size), what, rows, fit)
    cache_small({name: images}, math.inf, skip_broken=None)
    return images.images


def _images_of(asked: Asked, split: str | None) -> tuple[Dataset, str, str]:
    """The rows of a set whose labels don't matter, their image column, and what they are, for messages; split as
    :func:`load_images` takes it."""
    name = asked.name
    loaded = with_images(load(name, asked.config_name, split or "test", streaming=False), asked.image_column)
    split = split or next((s for s in (*TEST_SPLITS, "train") if s in loaded), next(iter(loaded), None))
    if split not in loaded:
        raise InputError(f"{name} has no split {split!r}: choose split from {', '.join(loaded)}, as {name}?split=NAME")
    rows = loaded[split]
    column = find_image_column(rows.features, name, asked.image_column, f"choose one, as {name}?image_column=NAME")
    if len(rows) == 0:
        raise InputError(f"split {split} of {name} is empty: choose another")
    return rows, column, f"{name}, split {split}"


def _split_stored(
    config: DataConfig,
    loaded: dict[str, Dataset],
    image_column: str,
    label_column: str,
    class_names: list[str],
    size: tuple[int, int] | None,
    fit: Fit,
) -> tuple[dict[str, ImageSet], ImageSet | None, Headers, int]:
    """The three image sets, the labelled training images where there are others (they come first), headers, and how many
    broken images were left out."""
    train = loaded[config.train_split]
    test_split = find_test_split(config, loaded, image_column, label_column)
    labels = labels_of(train, config, config.train_split, label_column, class_names)
    check_classes(labels, class_names, config.dataset, label_column)
    rng = np.random.default_rng(config.split_seed)
    rows_of, unlabeled = {"train": np.flatnonzero(labels >= 0)}, np.flatnonzero(labels < 0)
    if test_split is None:
        rows_of["train"], rows_of["test"] = _hold_out(rows_of["train"], labels, config.test_fraction, rng, class_names)
    rows_of["train"], rows_of["val"] = _hold_out(rows_of["train"], labels, config.val_fraction, rng, class_names)
    if config.labels_per_class is not None:
        kept = _some_of_each(rows_of["train"], labels, config.labels_per_class, class_names, rng)
        unlabeled = np.union1d(unlabeled, np.setdiff1d(rows_of["train"], kept))
        labels[unlabeled], rows_of["train"] = -1, kept
    rows_of["train"] = np.concatenate([rows_of["train"], unlabeled])

    headers = read_headers(train, image_column, f"split {config.train_split}")
    channels, size = headers.channels_for(config), size or headers.size_for(config)
    sets = {
        name: ImageSet(train.select(rows), image_column, labels[rows], channels, size, f"split {config.train_split}", rows, fit)
        for name, rows in rows_of.items()
    }
    if test_split is not None:
        test = loaded[test_split]
        classes = labels_of(test, config, test_split, label_column, class_names)
        sets["test"] = ImageSet(test, image_column, classes, channels, size, f"split {test_split}", range(len(test)), fit)
    if config.unlabeled is not None:
        asked = read_name(config.unlabeled)
        split = asked.split or "train"
        named = ((asked.name, asked.config_name), (config.dataset, config.config_name))
        of_this = len({(os.path.realpath(name), which or "default") for name, which in named}) == 1
        if of_this and (split in (config.train_split, test_split) or Path(asked.name).is_file()):
            raise InputError(
                f"data unlabeled is split {split} of {config.dataset}, whose validation or test images would "
                "be trained on: give other images, or labels_per_class"
            )
        more, column, name = _images_of(asked, split)
        others = ImageSet(more, column, np.full(len(more), -1), channels, size, name, range(len(more)))
        sets["train"] = sets["train"].joined(others)
    sets, left_out = cache_small(sets, config.cache_gib, skip_broken=config.skip_broken)
    if config.unlabeled is not None:
        for name, share in held_out_among(others, sets).items():
            if share > 0.5:
                raise InputError(
                    f"data unlabeled is {config.unlabeled}, in which {share:.0%} of the {name} images are: they would be "
                    "trained on; give other images, or labels_per_class"
                )
    labeled = int((sets["train"].labels >= 0).sum())
    return sets, None if labeled == len(sets["train"]) else sets["train"].head(labeled), headers, left_out


def _some_of_each(
    rows: np.ndarray, labels: np.ndarray, count: int, class_names: list[str], rng: np.random.Generator
) -> np.ndarray:
    """``count`` of ``rows`` of each class that has any, in the rows' order."""
    kept = []
    for label, name in enumerate(class_names):
        of_class = rng.permutation(rows[labels[rows] == label])
        if 0 < len(of_class) < count:
            raise InputError(
                f"data labels_per_class is {count}, and class {name!r} has {len(of_class)} training images: lower it"
            )
        kept.append(of_class[:count])
    return np.sort(np.concatenate(kept))


def _hold_out(
    rows: np.ndarray, labels: np.ndarray, fraction: float, rng: np.random.Generator, class_names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Split ``rows`` into (kept, held out), the same fraction of each class held out, in the rows' order.

    Of classes so small that the fraction is none of their images, as many images as it is of all of these are held out, at
    most one a class, and none of a class that has no other.
    """
    held, small = [], []
    for label in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == label])
        count = round(len(of_class) * fraction)
        if count == len(of_class):
            raise InputError(f"a fraction of {fraction} holds out all images of class {class_names[label]!r}: lower it")
        held.append(of_class[:count])
        if count == 0:
            small.append(of_class)
    wanted = round(sum(len(of_class) for of_class in small) * fraction)
    spare = [of_class[:1] for of_class in small if len(of_class) > 1]
    if wanted and spare:
        held += [spare[i] for i in rng.permutation(len(spare))[:wanted]]
    held = np.sort(np.concatenate(held))
    if len(held) == 0:
        held = rng.permutation(rows)[:1]
    return np.setdiff1d(rows, held), held
