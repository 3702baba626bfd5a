"""What the columns of a data set hold: images, and labels that become classes."""

import contextlib
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from timm_jem.data.config import DataConfig
from timm_jem.data.folders import find_image_files
from timm_jem.data.streamed import Labelling, is_missing
from timm_jem.errors import InputError

__all__ = [
    "TEST_SPLITS",
    "check_classes",
    "find_class_names",
    "find_image_column",
    "find_label_column",
    "find_test_split",
    "labelling_of",
    "labels_of",
    "with_images",
    "with_whole_labels",
]

TEST_SPLITS = ("test", "validation", "valid", "val")
Loaded = dict[str, Dataset] | dict[str, IterableDataset]
_LABEL_COLUMNS = ("label", "fine_label", "labels")


def with_images(loaded: Loaded, column: str | None) -> Loaded:
    """Files of images as pandas and pyarrow write them, bytes or {bytes, path}, become images: ``column``, or the only one."""
    cast = {}
    for split, rows in loaded.items():
        stored = [name for name, feature in (rows.features or {}).items() if _holds_files(feature)]
        known = any(isinstance(feature, Image) for feature in (rows.features or {}).values())
        chosen = column if column in stored else stored[0] if len(stored) == 1 and column is None and not known else None
        cast[split] = rows if chosen is None else rows.cast_column(chosen, Image())
    return cast


def _holds_files(feature: object) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _holds_files(feature["bytes"])
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def find_image_column(features: Features, dataset: str, column: str | None, remedy: str) -> str:
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    if column is None and len(images) != 1:
        found = [name for name in features if name in images or _holds_files(features[name])]
        if found:
            raise InputError(f"{dataset} has image columns {', '.join(found)}: {remedy}")
        raise InputError(f"{dataset} has no image column among {', '.join(features)}: give images or their files' bytes")
    if column is not None and column not in images:
        held = f", it holds {_kind(features[column])}" if column in features else ""
        raise InputError(
            f"{dataset} has no image column {column!r}{held}: its image columns are {', '.join(images) or 'none'} "
            f"among {', '.join(features)}"
        )
    return column or images[0]


def _kind(feature: object) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def _likely_label_column(features: Features, asked: str | None) -> str | None:
    classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    column = asked or next((c for c in _LABEL_COLUMNS if c in features), None)
    return classes[0] if column is None and len(classes) == 1 else column


def with_whole_labels(loaded: Loaded, asked: str | None) -> Loaded:
    """Labels that are 0.0, 1.0, ..., as pandas makes them where one is missing, become integers."""
    cast = {}
    for split, rows in loaded.items():
        column = _likely_label_column(rows.features or {}, asked)
        feature = (rows.features or {}).get(column)
        cast[split] = rows
        if isinstance(feature, Value) and feature.dtype in ("float32", "float64"):
            with contextlib.suppress(ValueError):  # other numbers stay, and are refused by name
                cast[split] = rows.cast_column(column, Value("int64"))
    return cast


def find_label_column(features: Features, config: DataConfig) -> str:
    column = _likely_label_column(features, config.label_column)
    if column is None:
        files = find_image_files(Path(config.dataset)) if Path(config.dataset).is_dir() else None
        others = [name for name, feature in features.items() if _can_label(feature)]
        remedy = f"choose one of {', '.join(others)} with --data.label_column" if others else "add a column of classes, label"
        raise InputError(
            (files and files.splits and files.why_no_classes())
            or f"{config.dataset} has no single label column among {', '.join(features)}: {remedy}"
        )
    feature = features.get(column)
    if _can_label(feature):
        return column
    kind = "it is not there" if feature is None else "it holds neither classes, integers nor names"
    raise InputError(f"{config.dataset} can't be labelled by {column!r}, {kind}: its columns are {', '.join(features)}")


def _can_label(feature: object) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    return isinstance(feature, Value) and ("string" in feature.dtype or "int" in feature.dtype or feature.dtype == "bool")


def find_class_names(train: Dataset | IterableDataset, column: str, dataset: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        values = set(train[column][:])
        if not all(isinstance(value, str) for value in values - {None}):
            values = {value for value in values if value is None or value >= 0}  # −1 is how "no label" is written
        names = [str(value) for value in sorted(value for value in values if not is_missing(value))]
    if any(is_missing(name) for name in names):
        raise InputError(f"class {next(i for i, n in enumerate(names) if is_missing(n))} of {dataset} has no name: give it one")
    if len(names) < 2:
        raise InputError(f"{dataset} has {f'one class, {names[0]!r}' if names else 'no labels'}: a classifier needs two")
    return names


def check_classes(labels: np.ndarray, class_names: list[str], dataset: str, column: str) -> None:
    """Raise an InputError unless labelled rows are of two classes at least, and of fewer than would be ids.

    Args:
        labels: class of each row, or −1: unknown; shape (N,).
        class_names: of all classes.
        dataset, column: for messages.
    """
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    if counts.sum() < 3:
        raise InputError(f"{dataset} has {counts.sum()} labelled images, too few for three splits")
    if len(present) < 2:
        raise InputError(f"{dataset} has images of one class, {class_names[present[0]]!r}: a classifier needs two")
    if counts.sum() < 2 * len(present) and len(present) > 3:
        raise InputError(
            f"{dataset} has {counts.sum()} labelled images of {len(present)} classes by {column!r}, too few of each: choose "
            "another --data.label_column, or give at least two of each class"
        )


def _has_labels(rows: Dataset | IterableDataset, column: str, config: DataConfig) -> bool:
    """Whether the split is one to measure on: the Hub's public test splits often have −1 for every label."""
    if column not in (rows.features or {}):
        return False
    if isinstance(rows, Dataset):
        return any(not is_missing(value) for value in rows[column])
    first = rows.select_columns([column]).take(config.stream_held_out)
    return any(not is_missing(row[column]) for row in first)


def find_test_split(config: DataConfig, loaded: Loaded, image_column: str, label_column: str) -> str | None:
    """The split to report on, checked; None: part of the train split."""
    candidates = (s for s in TEST_SPLITS if s in loaded and s != config.train_split)
    test_split = config.test_split or next((s for s in candidates if _has_labels(loaded[s], label_column, config)), None)
    if test_split is None:
        return None
    if test_split not in loaded:
        raise InputError(f"{config.dataset} has no split {test_split!r}: choose test_split from {', '.join(loaded)}")
    rows = loaded[test_split]
    for column in (image_column, label_column):
        if column not in rows.features:
            raise InputError(f"split {test_split} of {config.dataset} has no column {column!r}: choose another test_split")
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise InputError(f"split {test_split} of {config.dataset} is empty: choose another")
    return test_split


def labelling_of(features: Features, config: DataConfig, split: str, column: str, class_names: list[str]) -> Labelling:
    feature = features[column]
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    if split == config.train_split:
        remedy = "fix or remove the row, or keep rows without labels as unlabelled images with --data.unlabeled_rows true"
        missing = None if config.unlabeled_rows else remedy
    else:
        missing = "fix or remove the row, or choose another test_split"
    return Labelling(column, names, {name: i for i, name in enumerate(class_names)}, missing)


def labels_of(rows: Dataset, config: DataConfig, split: str, column: str, class_names: list[str]) -> np.ndarray:
    labelling = labelling_of(rows.features, config, split, column, class_names)
    what = f"split {split} of {config.dataset}"
    return np.array([labelling.of(value, f"{what}, row {row}") for row, value in enumerate(rows[column][:])], dtype=np.int64)
