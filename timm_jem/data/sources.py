"""Data sets by name: the embedded digits, the Hub's, folders and files."""

import os
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage

from timm_jem.errors import InputError

__all__ = ["LOADING_ERRORS", "digits", "hub_id", "load"]

LOADING_ERRORS = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError)
_STREAM_SHARDS = 64  # of a stored set that is read as a stream: many numbers of processes divide it


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 with 17 levels, in 10 classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.round(data.images * (255 / 16)).astype(np.uint8)
    columns = {"image": [PILImage.fromarray(image) for image in levels], "label": data.target.tolist()}
    return Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])}))


def load(name: str, config_name: str | None, split: str, streaming: bool) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """The splits of a data set; one without splits, or in a single file, has all its rows in ``split``."""
    path, local = Path(name), _is_local(name)
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
    except LOADING_ERRORS as error:
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


def hub_id(name: str) -> str | None:
    """The Hub's id of the data set that :func:`load` reads by this name; None: it comes from elsewhere."""
    return None if name == "digits" or _is_local(name) else name


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", os.sep)) or name.endswith(".parquet")
