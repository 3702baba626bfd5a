"""Folders of image files: which split and which class each file is of, by where it lies."""

import contextlib
import glob
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from timm_jem.errors import InputError, one_line

__all__ = ["ImageFiles", "find_image_files", "is_image", "visible_files"]

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_IMAGES = frozenset((*ImageFolder.EXTENSIONS, ".avif"))
_NO_DATA = ("__MACOSX", "__pycache__")
_TABLES = (".arrow", ".parquet", ".tar")  # images beside them are those of a README


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder: CLASS/image.jpg, or train/CLASS/image.jpg and test/CLASS/image.jpg.

    torchvision takes the first folder as the class and timm the last: files for which they differ have none here. Folders
    are splits only where all at the top have such names: "train" may be a class among others, and "test 1.jpg" is an image.

    Attributes:
        root: the folder.
        splits: files of each split, relative to ``root``, sorted.
        depth: how many folders are above those of the classes: 1 where they are splits, else 0.
        others: how many visible files are no images, by their extension.
        metadata: files such as metadata.csv, relative to ``root``, sorted: where there are any, they tell which images there
            are, and of which class.
        tables: how many files of rows there are, which is what the folder holds where the images are those of a README.
        parquet: files of rows, which hold their images.
    """

    root: Path
    splits: dict[str, list[Path]]
    depth: int
    others: Counter
    metadata: list[Path]
    tables: int
    parquet: list[Path]

    @property
    def told(self) -> bool:
        """Whether it is other files that tell of classes."""
        return bool(self.metadata or (self.tables and self._why_no_classes()))

    def why_no_classes(self) -> str | None:
        """What is wrong with where the files lie, and the remedy; None: each has a class, or other files tell."""
        return None if self.told else self._why_no_classes()

    def _why_no_classes(self) -> str | None:
        within = {path: path.parts[self.depth :] for paths in self.splits.values() for path in paths}
        remedy = (
            "put the images of each class in a folder of its own, CLASS/image.jpg, or train/CLASS/image.jpg and "
            "test/CLASS/image.jpg; or add a metadata.csv with the columns file_name and label"
        )
        if all(len(parts) == 1 for parts in within.values()):
            return f"{self.root} has images and no class folders: {remedy}"
        for path, parts in within.items():
            if len(parts) != 2:
                where = "outside of the class folders" if len(parts) == 1 else "deeper than the class folders"
                return f"{self.root} has images {where}, such as {path}: {remedy}"
        if len(classes := {parts[0] for parts in within.values()}) == 1:
            return f"{self.root} has one class folder, {classes.pop()}, and a classifier needs two: {remedy}"
        return None

    def load(self) -> dict[str, Dataset]:
        """Rows of each split: images, and labels where each file has a class; or all that metadata tell."""
        if self.metadata:
            return self._load_metadata()
        columns = {
            split: {"image": [str(self.root / path) for path in paths], "label": [_class_of(path) for path in paths]}
            for split, paths in self.splits.items()
        }
        features = Features({"image": Value("string")})
        if self.why_no_classes() is None:
            names = sorted({name for of_split in columns.values() for name in of_split["label"]})
            features["label"] = ClassLabel(names=names)
        return {
            split: Dataset.from_dict({name: of_split[name] for name in features}, features).cast_column("image", Image())
            for split, of_split in columns.items()
        }

    def parquet_splits(self) -> dict[str, list[str]]:
        """The .parquet files by split, as patterns that mean these alone; none: there are none.

        Splits are words in their paths, as for ``datasets``: "train-2023.parquet", "test/0.parquet", and any in
        "data/WORD-00000-of-00001.parquet". Where some have one the others are no data; where none has they are all of "train".
        """
        splits: dict[str, list[str]] = {}
        for path in self.parquet:
            name = path.with_suffix("").as_posix()
            sharded = re.fullmatch(r"data/(\w+)-\d{5}-of-\d+", name)
            words = reversed(re.split(r"[-._ 0-9/]+", name.lower()))
            found = sharded[1] if sharded else next((_SPLITS[word] for word in words if word in _SPLITS), "")
            splits.setdefault(found, []).append(glob.escape(str(self.root / path)))
        rest = splits.pop("", [])
        return splits or ({"train": rest} if rest else {})

    def _load_metadata(self) -> dict[str, Dataset]:
        # As splits, since ``datasets`` reads several files of one in any order, and by itself makes splits of words in names.
        files = {f"part{i}": [glob.escape(str(self.root / file))] for i, file in enumerate(self.metadata)}
        try:
            parts = load_dataset("imagefolder", data_files=files)
            rows = concatenate_datasets([parts[name] for name in files])
        except (IndexError, ValueError) as error:
            empty = re.search(r'"part(\d+)" corresponds to no data', str(error))
            if empty or isinstance(error, IndexError):
                file = self.metadata[int(empty[1]) if empty else 0]
                raise InputError(f"{self.root} has {file}, which tells of no image: fill it in, or remove it") from error
            if "have different features" not in str(error):
                raise
            alone = (load_dataset("imagefolder", data_files={"train": pattern})["train"] for pattern in files.values())
            rows = concatenate_datasets([_without_gaps(part) for part in alone])
        columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        if not (self.depth and columns):
            return {"train": rows}
        splits: dict[str, list[int]] = {}
        for row, cell in enumerate(rows.select_columns(columns[0]).cast_column(columns[0], Image(decode=False))[columns[0]]):
            first = Path(os.path.relpath(cell["path"], self.root)).parts[0] if cell else ""
            splits.setdefault(_SPLITS.get(first.lower(), "train"), []).append(row)
        return {split: rows.select(numbers) for split, numbers in splits.items()}


def _without_gaps(rows: Dataset) -> Dataset:
    """Whole numbers stay so where one is missing, which pandas makes 1.0 of; a column of nothing is none, of any type."""
    for column, feature in rows.features.items():
        if isinstance(feature, Value) and feature.dtype == "float64":
            if rows.data.column(column).null_count == len(rows):
                rows = rows.remove_columns(column)
            else:
                with contextlib.suppress(ValueError):  # other numbers stay
                    rows = rows.cast_column(column, Value("int64"))
    return rows


def visible_files(folder: Path, refused: Callable[[Path, OSError], None] | None = None) -> Iterator[Path]:
    """Files in a folder and below, relative to it; links are followed, but not back to a folder they lie in.

    Args:
        folder: what has them.
        refused: called with each folder, relative to ``folder``, that can't be listed, and why; None: it is passed over.
    """
    rest = [(Path(), (os.path.realpath(folder),))]
    while rest:
        parent, above = rest.pop()
        try:
            with os.scandir(folder / parent) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if refused is not None:
                refused(parent, error)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _NO_DATA:
                continue
            if not _is_folder(entry):
                yield parent / entry.name
            elif (place := os.path.realpath(entry.path)) not in above:
                rest.append((parent / entry.name, (*above, place)))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_image(path: Path) -> bool:
    """Whether a file is called as images are."""
    return path.suffix.lower() in _IMAGES


def find_image_files(folder: Path) -> ImageFiles:
    """The visible image files in a folder.

    Raises:
        InputError: one whose name can't be read, or a folder that can't be listed.
    """

    def refuse(parent: Path, error: OSError) -> None:
        raise InputError(f"{folder / parent} can't be listed ({one_line(error)}): make it readable, or remove it") from error

    files, others, metadata, tables, parquet = [], Counter(), [], 0, []
    for path in visible_files(folder, refuse):
        extension = path.suffix.lower()
        if path.name in ImageFolder.METADATA_FILENAMES:
            metadata.append(path)
        elif is_image(path):
            files.append(path)
        else:
            others[extension or path.name] += 1
            tables += extension in _TABLES
            parquet += [path] * (extension == ".parquet")
    if odd := next((path for path in files if any("\ud800" <= letter <= "\udfff" for letter in str(path))), None):
        raise InputError(f"{folder} has the file {str(odd)!r}, whose name is not UTF-8: rename it")
    by_split = all(len(path.parts) > 1 and path.parts[0].lower() in _SPLITS for path in files)
    splits: dict[str, list[Path]] = {}
    for path in sorted(files, key=str):
        splits.setdefault(_SPLITS[path.parts[0].lower()] if by_split else "train", []).append(path)
    return ImageFiles(folder, splits, int(by_split), others, sorted(metadata, key=str), tables, sorted(parquet, key=str))


def _class_of(path: Path) -> str:
    return unicodedata.normalize("NFC", path.parent.name)  # archives made on macOS write é as two letters
