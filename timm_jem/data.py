"""Hugging Face image data sets, split into train, validation and test."""

import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from torch import Tensor

from timm_jem.augmentation import augment
from timm_jem.errors import InputError, check_number, check_whole, one_line
from timm_jem.images import ImageSet, open_image, to_pixels
from timm_jem.streamed import Labelling, StreamedImage, StreamedSet

__all__ = ["DataConfig", "ImageSet", "Splits", "StreamedSet", "augment", "digits", "load_images", "load_splits", "to_pixels"]

_LABEL_COLUMNS = ("label", "fine_label", "labels")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_LOADING_ERRORS = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError)
_STREAM_SHARDS = 64  # of a stored set that is read as a stream: many numbers of processes divide it


@dataclass
class DataConfig:
    """Which images, and how they become pixels.

    Attributes:
        dataset: "digits" (scikit-learn's 1,797 handwritten digits of 8×8, no network), a Hub name, a local folder (of
            ``save_to_disk``, of parquet files, or an imagefolder), or a .parquet file.
        config_name: the Hub data set's configuration, where it has several.
        train_split: split to train on.
        test_split: split that is only reported; None: the first of test, validation that has labels, or, where there is
            none, ``test_fraction`` of the train split.
        test_fraction: see ``test_split``.
        val_fraction: part of the train split held out for everything that is chosen.
        split_seed: seed of the held-out parts: the same images are held out whatever ``train.seed``.
        image_column: None: the only image column.
        label_column: None: ``label``, ``fine_label``, ``labels``, or the only column of class labels.
        channels: 1 (grey) or 3 (RGB); None: as the first image is.
        image_size: side in pixels; None: the first image's size. Others are resized to cover it, and centre-cropped.
        crop_padding: random crops after reflective padding by this many pixels (paper, CIFAR-10: 4); None: an eighth
            of the side from 16 pixels up, none below.
        flip: random horizontal flips; None: yes, unless the class names are single characters or numbers.
        cache_gib: data sets that take less than this as 8-bit pixels are decoded once and kept in memory.
        labels_per_class: keep the labels of so many training images of each class, chosen by ``split_seed`` after
            validation and test images were held out; the others become unlabelled, and serve p(x) alone. Fewer are a
            part of more. None: all.
        unlabeled_rows: keep the train split's rows without a label (none, or −1) as unlabelled images. They are never
            held out.
        unlabeled: a second data set, as ``dataset``, whose images join the unlabelled ones; its labels are ignored.
        unlabeled_split: its split.
        streaming: read the rows one after another, as a Hub data set too large for the disk needs it. Classes must have
            names in the data set's features. Not with ``labels_per_class`` and ``unlabeled``.
        stream_held_out: how many labelled images of the shuffled train stream are held out for validation, and the
            most that are read of the test split; where there is none, as many more are held out as test images.
        shuffle_buffer: how many undecoded images of a stream are kept in memory to shuffle among. Where the rows are
            sorted by class it must span many classes, also for the held-out images.
    """

    dataset: str = "digits"
    config_name: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_fraction: float = 0.2
    val_fraction: float = 0.1
    split_seed: int = 0
    image_column: str | None = None
    label_column: str | None = None
    channels: int | None = None
    image_size: int | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    cache_gib: float = 2.0
    labels_per_class: int | None = None
    unlabeled_rows: bool = False
    unlabeled: str | None = None
    unlabeled_split: str = "train"
    streaming: bool = False
    stream_held_out: int = 2000
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        for name in ("test_fraction", "val_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data {name} is {getattr(self, name)}: give a fraction between 0 and 1")
        check_whole("data split_seed", self.split_seed, 0)
        check_number("data cache_gib", self.cache_gib, least=0)
        if self.test_split == self.train_split:
            raise InputError(f"data test_split is {self.test_split!r}, the train split: leave it out, and a part is held out")
        if self.channels not in (None, 1, 3):
            raise InputError(f"data channels is {self.channels}: give 1 (grey) or 3 (RGB)")
        if self.image_size is not None:
            check_whole("data image_size", self.image_size, 1)
        if self.crop_padding is not None:
            check_whole("data crop_padding", self.crop_padding, 0)
        if self.labels_per_class is not None:
            check_whole("data labels_per_class", self.labels_per_class, 1)
        check_whole("data stream_held_out", self.stream_held_out, 1)
        check_whole("data shuffle_buffer", self.shuffle_buffer, 1)
        for name in ("labels_per_class", "unlabeled"):
            if self.streaming and getattr(self, name) is not None:
                raise InputError(f"data {name} is {getattr(self, name)!r}, which goes not with data.streaming: leave one out")
        if (self.unlabeled, self.unlabeled_split) == (self.dataset, self.train_split):
            raise InputError("data unlabeled is the train split itself: give other images, or labels_per_class")


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 with 17 levels, in 10 classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.round(data.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(image) for image in levels], "label": data.target.tolist()}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])}))


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


def load_splits(config: DataConfig) -> Splits:
    """Load a data set and split it into train, validation and test.

    Small sets are decoded at once (see ``DataConfig.cache_gib``), so that a broken image is found before any training.

    Raises:
        InputError: an unknown data set, split or column, labels out of range, or images that can't be decoded.
    """
    loaded = _load(config.dataset, config.config_name, config.train_split, config.streaming)
    if config.train_split not in loaded:
        raise InputError(f"{config.dataset} has no split {config.train_split!r}: choose train_split from {', '.join(loaded)}")
    train = loaded[config.train_split]
    if train.features is None:
        raise InputError(f"{config.dataset} doesn't tell its columns before its rows are read: leave data.streaming out")
    image_column = _image_column(train.features, config.dataset, config.image_column, "choose one with --data.image_column")
    label_column = _label_column(train.features, config)
    if config.streaming and not isinstance(train.features[label_column], ClassLabel):
        raise InputError(
            f"{config.dataset} has no class names for {label_column!r} in its features, and data.streaming can't look for "
            "them in the rows: leave data.streaming out"
        )
    class_names = _class_names(train, label_column)
    split = _split_stream if config.streaming else _split_stored
    sets, labeled = split(config, loaded, image_column, label_column, class_names)
    train = sets["train"]

    stored = [image_set for image_set in sets.values() if isinstance(image_set, ImageSet)]
    if sum(image_set.nbytes for image_set in stored) <= config.cache_gib * 2**30:
        for image_set in stored:
            image_set.cache()
    if isinstance(labeled, int):
        labeled = None if labeled == len(train) else train.head(labeled)
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
    loaded = _load(name, config_name, split or "test", streaming=False)
    split = split or next((s for s in (*_TEST_SPLITS, "train") if s in loaded), next(iter(loaded), None))
    if split not in loaded:
        raise InputError(f"{name} has no split {split!r}: choose split from {', '.join(loaded)}")
    data = loaded[split]
    column = _image_column(data.features, name, image_column, "choose one with image_column")
    if len(data) == 0:
        raise InputError(f"split {split} of {name} is empty: choose another")
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    unknown = np.full(len(rows), -1)
    return ImageSet(data.select(rows), column, unknown, channels, tuple(size), f"{name}, split {split}", rows).cache().images


def _split_stored(
    config: DataConfig, loaded: dict[str, Dataset], image_column: str, label_column: str, class_names: list[str]
) -> tuple[dict[str, ImageSet], int]:
    """The three image sets, and how many of the training images are labelled: those come first."""
    train = loaded[config.train_split]
    test_split = _test_split(config, loaded, image_column, label_column)
    labels = _labels(train, config, config.train_split, label_column, class_names)
    rng = np.random.default_rng(config.split_seed)
    rows_of, unlabeled = {"train": np.flatnonzero(labels >= 0)}, np.flatnonzero(labels < 0)
    if len(rows_of["train"]) < 3:
        raise InputError(f"{config.dataset} has {len(rows_of['train'])} images with labels to train on: three splits need more")
    if test_split is None:
        rows_of["train"], rows_of["test"] = _hold_out(rows_of["train"], labels, config.test_fraction, rng)
    rows_of["train"], rows_of["val"] = _hold_out(rows_of["train"], labels, config.val_fraction, rng)
    if config.labels_per_class is not None:
        kept = _some_of_each(rows_of["train"], labels, config.labels_per_class, class_names, rng)
        unlabeled = np.union1d(unlabeled, np.setdiff1d(rows_of["train"], kept))
        labels[unlabeled], rows_of["train"] = -1, kept
    labeled = len(rows_of["train"])
    rows_of["train"] = np.concatenate([rows_of["train"], unlabeled])

    channels, size = _channels_and_size(
        config, train.cast_column(image_column, Image(decode=False))[0][image_column], f"row 0 of split {config.train_split}"
    )
    sets = {
        name: ImageSet(train.select(rows), image_column, labels[rows], channels, size, f"split {config.train_split}", rows)
        for name, rows in rows_of.items()
    }
    if test_split is not None:
        test = loaded[test_split]
        classes = _labels(test, config, test_split, label_column, class_names)
        sets["test"] = ImageSet(test, image_column, classes, channels, size, f"split {test_split}", range(len(test)))
    if config.unlabeled is not None:
        more = _load(config.unlabeled, None, config.unlabeled_split, streaming=False)
        if config.unlabeled_split not in more:
            raise InputError(
                f"{config.unlabeled} has no split {config.unlabeled_split!r}: choose unlabeled_split from {', '.join(more)}"
            )
        more = more[config.unlabeled_split]
        column = _image_column(more.features, config.unlabeled, None, "data.unlabeled needs exactly one")
        name = f"{config.unlabeled}, split {config.unlabeled_split}"
        nothing = np.full(len(more), -1)
        sets["train"] = sets["train"].joined(ImageSet(more, column, nothing, channels, size, name, range(len(more))))
    return sets, labeled


def _split_stream(
    config: DataConfig, loaded: dict[str, IterableDataset], image_column: str, label_column: str, class_names: list[str]
) -> tuple[dict[str, ImageSet | StreamedSet], StreamedSet | None]:
    """The training stream and the two held-out sets, and the stream of labelled images where there may be others."""
    test_split = _test_split(config, loaded, image_column, label_column)

    def stream(split: str) -> StreamedSet:
        rows = loaded[split].select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))
        labelling = _labelling(loaded[split].features, config, split, label_column, class_names)
        name = f"the shuffled split {split} of {config.dataset}"
        return StreamedSet(rows, image_column, labelling, 0, (0, 0), name, config.shuffle_buffer, labelled_only=True)

    def front(split: str, count: int) -> list[StreamedImage]:
        try:
            return list(islice(stream(split).epoch(np.random.default_rng(config.split_seed)), count))
        except InputError:
            raise
        except _LOADING_ERRORS as error:
            raise InputError(f"split {split} of {config.dataset} can't be read ({one_line(error)})") from error

    count = config.stream_held_out
    wanted = count if test_split is not None else 2 * count
    held_out = front(config.train_split, wanted + 1)
    if len(held_out) <= wanted:
        raise InputError(
            f"split {config.train_split} of {config.dataset} has {len(held_out)} labelled images, and {wanted} are to be held "
            "out: lower data.stream_held_out, or leave data.streaming out"
        )
    held_out = held_out[:wanted]
    tested = held_out[count:] if test_split is None else front(test_split, count)
    if not tested:
        raise InputError(f"split {test_split} of {config.dataset} is empty: choose another")
    channels, size = _channels_and_size(config, held_out[0].stored, held_out[0].what)

    def image_set(images: list[StreamedImage], split: str) -> ImageSet:
        rows = Dataset.from_dict({image_column: [i.stored for i in images]}, Features({image_column: Image(decode=False)}))
        classes, name = [i.label for i in images], stream(split).name
        return ImageSet(rows, image_column, classes, channels, size, name, range(len(images)))

    labeled = replace(
        stream(config.train_split), channels=channels, size=size, held_out=frozenset(image.digest for image in held_out)
    )
    train = replace(labeled, labelled_only=False)
    sets = {
        "train": train,
        "val": image_set(held_out[:count], config.train_split),
        "test": image_set(tested, test_split or config.train_split),
    }
    return sets, labeled if config.unlabeled_rows else None


def _channels_and_size(config: DataConfig, stored: dict | None, what: str) -> tuple[int, tuple[int, int]]:
    first = open_image(stored, what)
    channels = config.channels or (1 if first.mode in ("1", "L", "LA") else 3)
    return channels, (config.image_size, config.image_size) if config.image_size else (first.height, first.width)


def _load(name: str, config_name: str | None, split: str, streaming: bool) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """The splits of a data set; one without splits, or in a single file, has all its rows in ``split``."""
    path = Path(name)
    local = path.exists() or name.startswith((".", os.sep)) or name.endswith(".parquet")
    if name != "digits" and local and not path.exists():
        raise InputError(f"there is no data set at {name}: give a folder, a .parquet file or a Hub name")
    try:
        if name == "digits":
            loaded = {"train": digits()}
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files={split: str(path)}, streaming=streaming)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(name, config_name, streaming=streaming)
    except _LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "from this folder or file" if local else "from the Hub; give its exact name, a local folder or a .parquet file"
        raise InputError(f"data set {name!r} can't be loaded {where} ({reason})") from error
    loaded = loaded if isinstance(loaded, dict) else {split: loaded}
    if not streaming:
        return loaded
    return {
        key: rows.to_iterable_dataset(min(_STREAM_SHARDS, len(rows))) if isinstance(rows, Dataset) and len(rows) else rows
        for key, rows in loaded.items()
    }


def _test_split(
    config: DataConfig, loaded: dict[str, Dataset] | dict[str, IterableDataset], image_column: str, label_column: str
) -> str | None:
    """The split to report on, checked; None: part of the train split."""
    candidates = (s for s in _TEST_SPLITS if s in loaded and s != config.train_split)
    test_split = config.test_split or next((s for s in candidates if _labelled(loaded[s], label_column, config)), None)
    if test_split is not None and test_split not in loaded:
        raise InputError(f"{config.dataset} has no split {test_split!r}: choose test_split from {', '.join(loaded)}")
    for split in (config.train_split, *([test_split] if test_split is not None else [])):
        rows = loaded[split]
        for column in (image_column, label_column):
            if column not in rows.features:
                raise InputError(f"split {split} of {config.dataset} has no column {column!r}: choose another test_split")
        if isinstance(rows, Dataset) and len(rows) == 0:
            raise InputError(f"split {split} of {config.dataset} is empty: choose another")
    return test_split


def _image_column(features: Features, dataset: str, column: str | None, remedy: str) -> str:
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    if column is None and len(images) != 1:
        found = f"image columns {', '.join(images)}" if images else f"no image column among {', '.join(features)}"
        raise InputError(f"{dataset} has {found}: {remedy}")
    if column is not None and column not in images:
        raise InputError(f"{dataset} has no image column {column!r}: its image columns are {', '.join(images) or 'none'}")
    return column or images[0]


def _label_column(features: Features, config: DataConfig) -> str:
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    column = config.label_column or next((c for c in _LABEL_COLUMNS if c in features), None)
    if column is None and len(classes) == 1:
        column = classes[0]
    if column is None:
        raise InputError(f"{config.dataset} has no single label column among {', '.join(features)}: use --data.label_column")
    feature = features.get(column)
    if isinstance(feature, ClassLabel):
        return column
    if isinstance(feature, Value) and ("string" in feature.dtype or "int" in feature.dtype or feature.dtype == "bool"):
        return column
    kind = "it is not there" if feature is None else "it holds neither classes, integers nor names"
    raise InputError(f"{config.dataset} can't be labelled by {column!r}, {kind}: its columns are {', '.join(features)}")


def _class_names(train: Dataset | IterableDataset, column: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(train[column]) - {None}
    if not all(isinstance(value, str) for value in values):
        values = {value for value in values if value >= 0}  # −1 is how "no label" is written
    return [str(value) for value in sorted(values)]


def _labelled(rows: Dataset | IterableDataset, column: str, config: DataConfig) -> bool:
    """Whether the split is one to measure on: the Hub's public test splits often have −1 for every label."""
    if column not in (rows.features or {}):
        return False
    if isinstance(rows, Dataset):
        return any(value not in (None, -1) for value in rows[column])
    first = rows.select_columns([column]).take(config.stream_held_out)
    return any(row[column] not in (None, -1) for row in first)


def _labelling(features: Features, config: DataConfig, split: str, column: str, class_names: list[str]) -> Labelling:
    feature = features[column]
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    if split == config.train_split:
        remedy = "mend or remove the row, or keep rows without labels as unlabelled images with --data.unlabeled_rows true"
        missing = None if config.unlabeled_rows else remedy
    else:
        missing = "mend or remove the row, or choose another test_split"
    return Labelling(column, names, {name: i for i, name in enumerate(class_names)}, missing)


def _labels(rows: Dataset, config: DataConfig, split: str, column: str, class_names: list[str]) -> np.ndarray:
    labelling = _labelling(rows.features, config, split, column, class_names)
    what = f"split {split} of {config.dataset}"
    return np.array([labelling.of(value, f"{what}, row {row}") for row, value in enumerate(rows[column])], dtype=np.int64)


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
