"""Data sets by name: the embedded digits, the Hub's, folders and files."""

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from huggingface_hub import HfApi, constants, metadata_load
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx
from PIL import Image as PILImage

from timm_jem.data.folders import find_image_files
from timm_jem.errors import InputError, one_line, quoted

__all__ = [
    "LOADING_ERRORS",
    "Asked",
    "absolute",
    "check_remote",
    "digits",
    "hub_id",
    "load",
    "public_name",
    "read_name",
    "told_kinds",
]

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
    """The splits of a data set; one without splits, or in a single file, has all its rows in ``split``.

    Raises:
        InputError: nothing there, or nothing that can be read.
    """
    name, local = absolute(name), _is_local(name)
    path = Path(name)
    if name != "digits" and local and not path.exists():
        raise InputError(f"there is no data set at {name}: give a folder, a .parquet file or a Hub name")
    if path.is_file() and path.suffix != ".parquet":
        raise InputError(
            f"data set {name} is a {path.suffix or 'nameless'} file: give a folder of images, with a metadata.csv of file_name "
            "and label or with a folder for each class, a .parquet file or a Hub name"
        )
    try:
        if name == "digits":
            loaded = {"train": digits()}
        elif local:
            loaded = _load_local(path, config_name, split, streaming)
        else:
            if name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}"):  # it would read the current folder
                raise InputError(f"no folder or file here is called {name}, a reader of datasets': give what it is to read")
            _look_for_the_hub(name)
            loaded = _load_remote(name, config_name, streaming)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(_why_not(name, local, error)) from error
    loaded = loaded if isinstance(loaded, dict) else {split: loaded}
    if not streaming:
        return loaded
    return {
        key: rows.to_iterable_dataset(min(_STREAM_SHARDS, len(rows))) if isinstance(rows, Dataset) and len(rows) else rows
        for key, rows in loaded.items()
    }


def check_remote(name: str, config_name: str | None) -> None:
    """Raise an InputError where a data set on the Hub is made of files of this machine, as ``datasets`` lets its README say.

    Raises:
        InputError: also where there is no such data set.
    """
    try:
        _builder(name, config_name)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(_why_not(name, False, error)) from error


def _builder(name: str, config_name: str | None) -> datasets.DatasetBuilder:
    builder = datasets.load_dataset_builder(name, config_name)
    for file in (str(file) for files in (builder.config.data_files or {}).values() for file in files):
        scheme, mark, _ = file.split("::")[-1].partition("://")
        if not mark or scheme.lower() in ("file", "local"):
            raise InputError(f"data set {name} on the Hub asks for {quoted(file)} of this machine: give another")
    return builder


def _load_remote(name: str, config_name: str | None, streaming: bool) -> dict[str, Dataset] | dict[str, IterableDataset]:
    """As ``datasets.load_dataset``, which builds the same, but of no files of this machine."""
    builder = _builder(name, config_name)
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    loaded = builder.as_dataset()
    for rows in loaded.values():
        _check_cells(rows, name)
    return loaded


def _check_cells(rows: Dataset, name: str) -> None:
    """Raise an InputError where cells of a data set from the Hub name files of this machine: its own are on the Hub, or in the
    caches."""
    places = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    caches = tuple(os.path.join(os.path.realpath(place), "") for place in places)
    for name_of_column in rows.column_names:
        for cells in rows.data.column(name_of_column).chunks:
            if not pa.types.is_struct(cells.type) or not {"bytes", "path"} <= {field.name for field in cells.type}:
                continue
            alone = pc.and_(cells.is_valid(), cells.field("bytes").is_null())
            paths = cells.field("path").filter(alone).drop_null()
            for path in paths.unique().to_pylist():
                if "://" not in path and not os.path.realpath(path).startswith(caches):
                    raise InputError(f"data set {name} on the Hub asks for {quoted(path)} of this machine: give another")


def _load_local(path: Path, config_name: str | None, split: str, streaming: bool) -> Dataset | dict:
    if path.is_file():
        return datasets.load_dataset("parquet", data_files={split: glob.escape(str(path))}, streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            return datasets.load_from_disk(str(path))
        except IndexError as error:  # of a split without a file
            raise ValueError("a split of it holds no rows: save it without that") from error
    files = find_image_files(path)
    images = sum(map(len, files.splits.values()))
    if config_name is None and (files.metadata or (files.splits and not files.told)):
        loaded, others = files.load(), dict(files.others)
        rows = sum(map(len, loaded.values()))
        if rows < images:
            others["images that no metadata tells of"] = images - rows
    elif config_name is None and files.parquet and not _card_tells_files(path):
        # By itself ``datasets`` goes by the most frequent kind of file, which may be a README's pictures.
        tables = files.parquet_splits()
        loaded = datasets.load_dataset("parquet", data_files=tables, streaming=streaming)
        used = Counter({".parquet": sum(map(len, tables.values())), ".md": files.others[".md"]})
        others = files.others + Counter(images=images) - used  # those that are left
    elif glob.escape(str(path)) != str(path):
        raise InputError(f"data set {path} has one of *, ? and [ in its name, which mean others than it: rename it")
    else:
        loaded, others = datasets.load_dataset(str(path), config_name, streaming=streaming), {}
    if others:
        _say(f"{path}: passed over {told_kinds(others)}")
    return loaded


def told_kinds(others: Mapping[str, int]) -> str:
    """How many files there are of each kind, in words; a kind is an extension, and may hold anything."""
    return ", ".join(f"{count:,} {kind if kind.isprintable() else quoted(kind)}" for kind, count in sorted(others.items())[:10])


def _card_tells_files(path: Path) -> bool:
    """Whether a data set's README.md says which of its files are which split."""
    card = path / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except yaml.YAMLError as error:
        raise InputError(f"{card} begins with what is no YAML ({one_line(error)}): mend it, or remove the file") from error


def _look_for_the_hub(name: str) -> None:
    """Say where a name is looked for, and don't wait for a Hub that is out of reach and was never asked for it."""
    _say(f"no folder or file here is called {name}: looking for it on the Hub")
    cached = (
        Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset")),
        Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")),
    )
    if any(folder.is_dir() for folder in cached):
        return
    try:
        HfApi().dataset_info(name, timeout=10)
    except httpx.TransportError as error:
        raise ConnectionError(f"the Hub is out of reach: {one_line(error)}") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
        return  # datasets says why


def _why_not(name: str, local: bool, error: Exception) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # whose own words tell nothing
        error = error.__cause__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "onfig name is missing" in lines[0]:
        found = re.search(r"\[.*\]", str(error), re.DOTALL)
        return (
            f"{name} has several configurations: choose one with --data.config_name, or where there is no such flag as "
            f"{name}?config_name=NAME, from {found[0] if found else lines[-1]}"
        )
    if local:
        return f"data set {name!r} can't be loaded from this folder or file ({lines[0]})"
    return (
        f"data set {name!r} can't be loaded from the Hub; give its exact name, a local folder or a .parquet file; "
        f"{Path.cwd()} has none called so ({lines[0]})"
    )


class Asked(NamedTuple):
    """A data set by one string, and which part of it."""

    name: str
    split: str | None
    config_name: str | None
    image_column: str | None


def read_name(text: str) -> Asked:
    """What "name?split=test&config_name=cropped&image_column=photo" asks for; each part may be left out.

    Raises:
        InputError: other parts.
    """
    name, mark, query = text.partition("?")
    if not mark or Path(text).exists():
        return Asked(text, None, None, None)
    parts, known = dict(parse_qsl(query, keep_blank_values=True)), Asked._fields[1:]
    if not parts or not set(parts) <= set(known) or not all(parts.values()):
        raise InputError(f"{text!r} is no data set's name: after ? give {', '.join(f'{part}=...' for part in known)}")
    return Asked(name, *map(parts.get, known))


def absolute(name: str) -> str:
    """The same name wherever the program runs: local paths from the root, others as they are."""
    if name == "digits" or not _is_local(name):
        return name
    return os.path.abspath(Path(name).expanduser())


def hub_id(name: str) -> str | None:
    """The Hub's id of the data set that :func:`load` reads by this name; None: it comes from elsewhere."""
    return None if name == "digits" or _is_local(name) else read_name(name).name


def public_name(name: str) -> str:
    """What strangers may read of a data set's name: a Hub id as it is, and the last part of a local path."""
    if name == "digits" or not _is_local(name):
        return name
    return Path(read_name(name).name).name or "a local data set"


def _is_local(name: str) -> bool:
    path = name if Path(name).exists() else name.partition("?")[0]
    return Path(path).expanduser().exists() or path.startswith((".", os.sep, "~")) or path.endswith(".parquet")


def _say(line: str) -> None:
    PartialState().print(line, file=sys.stderr)
