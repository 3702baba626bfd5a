"""Whether images without a label, which are trained on, are held-out ones."""

import contextlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timm_jem.data.images import ImageSet, evenly, stored_bytes

__all__ = ["held_out_among"]


def held_out_among(others: ImageSet, sets: dict[str, ImageSet]) -> dict[str, float]:
    """The shares of some validation and some test images that are among the images without a label, too.

    Args:
        others: images without a label, none decoded.
        sets: "train", which has them all, "val" and "test".
    """
    return _trained_on(sets) if sets["train"].images is not None else _files_among(others, sets)


def _trained_on(sets: dict[str, ImageSet]) -> dict[str, float]:
    """As :func:`held_out_among`, of images in memory: pixel for pixel."""
    train, shares = sets["train"], {}
    sums = train.images.flatten(1).sum(1).masked_fill(train.labels != -1, -1)  # few have that of an image
    for name, held_out in (("validation", sets["val"]), ("test", sets["test"])):
        some = held_out.images[evenly(len(held_out), 64)]
        found = [bool((train.images[sums == one.sum()] == one).flatten(1).all(1).any()) for one in some]
        shares[name] = sum(found) / len(found)
    return shares


def _files_among(others: ImageSet, sets: dict[str, ImageSet]) -> dict[str, float]:
    """As :func:`held_out_among`, of others: file for file. Only those as long as one of a held-out image are read; images that
    lie on the Hub are none."""
    cells, wanted = others.data.data.column(others.image_column), {}
    for name, held_out in (("validation", sets["val"]), ("test", sets["test"])):
        stored = (held_out.data[row][held_out.image_column] for row in evenly(len(held_out), 64))
        wanted[name] = [stored_bytes(cell) for cell in stored]
    files = {file for of_set in wanted.values() for file in of_set if file}
    alike = np.flatnonzero(np.isin(_file_sizes(cells), [len(file) for file in files]))
    found = {file for row in alike.tolist() if (file := stored_bytes(cells[row].as_py())) in files}
    return {name: sum(file in found for file in of_set) / len(of_set) for name, of_set in wanted.items()}


def _file_sizes(cells: pa.ChunkedArray) -> np.ndarray:
    """How many bytes the file of each undecoded image has, without reading any; −1: unknown."""
    sizes = pc.fill_null(pc.binary_length(pc.struct_field(cells, "bytes")), -1).to_numpy().copy()
    paths = pc.struct_field(cells, "path")
    for row in np.flatnonzero(sizes < 0).tolist():
        with contextlib.suppress(OSError, TypeError, ValueError):  # none, or none here: those are named when decoded
            sizes[row] = os.stat(paths[row].as_py()).st_size
    return sizes
