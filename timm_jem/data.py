"""Hugging Face image data sets as pixel batches."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import tqdm
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from timm_jem.errors import InputError, check_number, check_whole, one_line

__all__ = ["DataConfig", "ImageSet", "Splits", "augment", "digits", "load_splits", "to_pixels"]

_LABEL_COLUMNS = ("label", "fine_label", "labels")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_MODES = {1: "L", 3: "RGB"}


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


def to_pixels(images: Tensor) -> Tensor:
    """8-bit images to pixels in [-1, 1]: u / 127.5 − 1, float32, same shape."""
    return images.float().div_(127.5).sub_(1)


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 with 17 levels, in 10 classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.round(data.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(image) for image in levels], "label": data.target.tolist()}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])}))


class ImageSet(torch.utils.data.Dataset):
    """Images and labels of one split, fetched a batch at a time: 8-bit images (B, C, H, W) and int64 labels (B,).

    Args:
        data: rows of the split.
        image_column: its image column.
        labels: class of each row, in [0, number of classes).
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
        self.image_column, self.channels, self.size, self.name, self.numbers = image_column, channels, size, name, numbers
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
        for row in tqdm(range(len(self)), desc=f"decoding images of {self.name}", leave=False):
            images[row] = self._decode(row)
        self.images = images
        return self

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = list(rows)
        images = torch.stack([self._decode(row) for row in rows]) if self.images is None else self.images[rows]
        return images, self.labels[rows]

    def _decode(self, row: int) -> Tensor:
        stored = self.data[row][self.image_column]
        image = open_image(stored, f"row {self.numbers[row]} of {self.name}")
        pixels = tvf.pil_to_tensor(image.convert(_MODES[self.channels]))
        if pixels.shape[1:] != self.size:
            scale = max(side / old for side, old in zip(self.size, pixels.shape[1:], strict=True))
            covering = [max(side, round(scale * old)) for side, old in zip(self.size, pixels.shape[1:], strict=True)]
            pixels = tvf.center_crop(tvf.resize(pixels, covering, antialias=True), list(self.size))
        return pixels


def open_image(stored: dict, what: str) -> PILImage.Image:
    """Decode an undecoded image cell of ``datasets``, upright, to 8 bits a channel.

    Raises:
        InputError: no image there, or not one that can be decoded.
    """
    if stored is None:
        raise InputError(f"{what} has no image: remove the row")
    try:
        image = PILImage.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
        image = ImageOps.exif_transpose(image)
        image.load()
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise InputError(f"{what} has an image that can't be decoded ({one_line(error)}): mend or remove it") from error
    if image.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{what} has an image of 32-bit numbers, whose range nobody tells: convert it to 8 or 16 bits")
    return image


@dataclass
class Splits:
    """The splits of a data set and what they have in common.

    Attributes:
        train, val, test: see :class:`DataConfig`.
        class_names: names of the classes, in order.
        image_shape: (C, H, W).
        crop_padding, flip: the augmentation that suits the data.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: list[str]
    image_shape: tuple[int, int, int]
    crop_padding: int
    flip: bool


def load_splits(config: DataConfig) -> Splits:
    """Load a data set and split it into train, validation and test.

    Small sets are decoded at once (see ``DataConfig.cache_gib``), so that a broken image is found before any training.

    Raises:
        InputError: an unknown data set, split or column, labels out of range, or images that can't be decoded.
    """
    loaded = _load(config)
    if config.train_split not in loaded:
        raise InputError(f"{config.dataset} has no split {config.train_split!r}: choose train_split from {', '.join(loaded)}")
    train = loaded[config.train_split]
    if len(train) < 3:
        raise InputError(f"{config.dataset} has {len(train)} images to train on: three splits need more")
    image_column = _image_column(train.features, config)
    label_column = _label_column(train.features, config)
    class_names = _class_names(train, label_column)
    candidates = [s for s in _TEST_SPLITS if s in loaded and s != config.train_split and _labelled(loaded[s], label_column)]
    test_split = config.test_split or next(iter(candidates), None)
    if test_split is not None and test_split not in loaded:
        raise InputError(f"{config.dataset} has no split {test_split!r}: choose test_split from {', '.join(loaded)}")
    labels = {}
    for split in {config.train_split, test_split} - {None}:
        rows = loaded[split]
        for column in (image_column, label_column):
            if column not in rows.features:
                raise InputError(f"split {split} of {config.dataset} has no column {column!r}: choose another test_split")
        if len(rows) == 0:
            raise InputError(f"split {split} of {config.dataset} is empty: choose another")
        labels[split] = _labels(rows, label_column, class_names, f"split {split} of {config.dataset}")

    rng = np.random.default_rng(config.split_seed)
    rows_of = {"train": np.arange(len(train))}
    if test_split is None:
        rows_of["train"], rows_of["test"] = _hold_out(rows_of["train"], labels[config.train_split], config.test_fraction, rng)
    rows_of["train"], rows_of["val"] = _hold_out(rows_of["train"], labels[config.train_split], config.val_fraction, rng)

    first = train.cast_column(image_column, Image(decode=False))[0][image_column]
    first = open_image(first, f"row 0 of split {config.train_split}")
    channels = config.channels or (1 if first.mode in ("1", "L", "LA") else 3)
    size = (config.image_size, config.image_size) if config.image_size else (first.height, first.width)

    def image_set(name: str) -> ImageSet:
        if name == "test" and test_split is not None:
            numbers, rows, classes, split = range(len(loaded[test_split])), loaded[test_split], labels[test_split], test_split
        else:
            numbers, split = rows_of[name], config.train_split
            rows, classes = train.select(numbers), labels[split][numbers]
        return ImageSet(rows, image_column, classes, channels, size, f"split {split}", numbers)

    sets = {name: image_set(name) for name in ("train", "val", "test")}
    if sum(s.nbytes for s in sets.values()) <= config.cache_gib * 2**30:
        for image_set_ in sets.values():
            image_set_.cache()
    flip = not all(len(name) == 1 or name.isdigit() for name in class_names) if config.flip is None else config.flip
    padding = (size[0] // 8 if size[0] >= 16 else 0) if config.crop_padding is None else config.crop_padding
    if padding >= min(size):
        raise InputError(f"data crop_padding is {padding} for images of {size[0]}×{size[1]}: give less than the side")
    return Splits(**sets, class_names=class_names, image_shape=(channels, *size), crop_padding=padding, flip=flip)


def augment(u: Tensor, *, crop_padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops after reflective padding, and horizontal flips, each image its own (JEM's, for CIFAR-10).

    Args:
        u: images, shape (B, C, H, W), on ``generator``'s device.
        crop_padding: pixels on each side; 0: no crops.
        flip: flip every other image, at random.
        generator: the only source of randomness.

    Returns:
        Images of the same shape.
    """
    batch, _, height, width = u.shape
    if crop_padding:
        padded = torch.nn.functional.pad(u, [crop_padding] * 4, mode="reflect")
        offsets = torch.randint(2 * crop_padding + 1, (2, batch, 1), generator=generator, device=u.device)
        rows = (offsets[0] + torch.arange(height, device=u.device)).view(batch, 1, height, 1)
        columns = (offsets[1] + torch.arange(width, device=u.device)).view(batch, 1, 1, width)
        images = torch.arange(batch, device=u.device).view(batch, 1, 1, 1)
        channels = torch.arange(u.shape[1], device=u.device).view(1, -1, 1, 1)
        u = padded[images, channels, rows, columns]
    if flip:
        flipped = torch.rand(batch, 1, 1, 1, generator=generator, device=u.device) < 0.5
        u = torch.where(flipped, u.flip(-1), u)
    return u


def _load(config: DataConfig) -> DatasetDict | dict[str, Dataset]:
    name = config.dataset
    if name == "digits":
        return {"train": digits()}
    path = Path(name)
    local = path.exists() or name.startswith((".", os.sep)) or name.endswith(".parquet")
    if local and not path.exists():
        raise InputError(f"there is no data set at {name}: give a folder, a .parquet file or a Hub name")
    try:
        if path.is_file():
            loaded = datasets.load_dataset("parquet", data_files={config.train_split: str(path)})
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(name, config.config_name)
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "from this folder or file" if local else "from the Hub; give its exact name, a local folder or a .parquet file"
        raise InputError(f"data set {name!r} can't be loaded {where} ({reason})") from error
    return loaded if isinstance(loaded, dict) else {config.train_split: loaded}


def _image_column(features: Features, config: DataConfig) -> str:
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    column = config.image_column or (images[0] if len(images) == 1 else None)
    if column is None:
        found = f"image columns {', '.join(images)}" if images else f"no image column among {', '.join(features)}"
        raise InputError(f"{config.dataset} has {found}: choose one with --data.image_column")
    if column not in images:
        raise InputError(
            f"{config.dataset} has no image column {column!r}: its image columns are {', '.join(images) or 'none'}"
        )
    return column


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


def _class_names(train: Dataset, column: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(train[column]) - {None}
    if not all(isinstance(value, str) for value in values):
        values = {value for value in values if value >= 0}  # −1 is how "no label" is written
    return [str(value) for value in sorted(values)]


def _labelled(rows: Dataset, column: str) -> bool:
    """Whether the split is one to measure on: the Hub's public test splits often have −1 for every label."""
    return column in rows.features and any(value not in (None, -1) for value in rows[column])


def _labels(rows: Dataset, column: str, class_names: list[str], what: str) -> np.ndarray:
    """Classes of the rows, found by name: splits may number theirs in another order."""
    feature, index = rows.features[column], {name: i for i, name in enumerate(class_names)}
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    labels = np.empty(len(rows), dtype=np.int64)
    for row, value in enumerate(rows[column]):
        name = str(value) if names is None else names.get(value)
        if value is None or name not in index:
            raise InputError(
                f"{what}, row {row}, has the label {value!r}, none of the train split's {len(class_names)} classes: "
                "mend or remove the row"
            )
        labels[row] = index[name]
    return labels


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
