"""What the columns of a data set hold: images, and labels that become classes."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from timm_jem.data.config import DataConfig
from timm_jem.data.streamed import Labelling
from timm_jem.errors import InputError

__all__ = [
    "TEST_SPLITS",
    "find_class_names",
    "find_image_column",
    "find_label_column",
    "find_test_split",
    "labelling_of",
    "labels_of",
]

TEST_SPLITS = ("test", "validation", "valid", "val")
_LABEL_COLUMNS = ("label", "fine_label", "labels")


def find_image_column(features: Features, dataset: str, column: str | None, remedy: str) -> str:
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    if column is None and len(images) != 1:
        found = f"image columns {', '.join(images)}" if images else f"no image column among {', '.join(features)}"
        raise InputError(f"{dataset} has {found}: {remedy}")
    if column is not None and column not in images:
        raise InputError(f"{dataset} has no image column {column!r}: its image columns are {', '.join(images) or 'none'}")
    return column or images[0]


def find_label_column(features: Features, config: DataConfig) -> str:
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


def find_class_names(train: Dataset | IterableDataset, column: str) -> list[str]:
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = set(train[column]) - {None}
    if not all(isinstance(value, str) for value in values):
        values = {value for value in values if value >= 0}  # −1 is how "no label" is written
    return [str(value) for value in sorted(values)]


def _has_labels(rows: Dataset | IterableDataset, column: str, config: DataConfig) -> bool:
    """Whether the split is one to measure on: the Hub's public test splits often have −1 for every label."""
    if column not in (rows.features or {}):
        return False
    if isinstance(rows, Dataset):
        return any(value not in (None, -1) for value in rows[column])
    first = rows.select_columns([column]).take(config.stream_held_out)
    return any(row[column] not in (None, -1) for row in first)


def find_test_split(
    config: DataConfig, loaded: dict[str, Dataset] | dict[str, IterableDataset], image_column: str, label_column: str
) -> str | None:
    """The split to report on, checked; None: part of the train split."""
    candidates = (s for s in TEST_SPLITS if s in loaded and s != config.train_split)
    test_split = config.test_split or next((s for s in candidates if _has_labels(loaded[s], label_column, config)), None)
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
    return np.array([labelling.of(value, f"{what}, row {row}") for row, value in enumerate(rows[column])], dtype=np.int64)

