"""Checkpoints of PyTorch, of today and of 2018, from anybody: checked against the file's size, then read as weights only."""

import mmap
import os
import stat
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch._C import PyTorchFileReader

from timm_jem.conversion.claims import ClaimedStorage, read_claims
from timm_jem.errors import InputError, one_line, quoted

__all__ = ["read_checkpoint"]

_MOST_BYTES = 8 * 2**30
_MOST_PICKLED = 16 * 2**20
# How files of PyTorch before 1.6 begin: a pickle of the number that marks them.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"


def read_checkpoint(file: str | os.PathLike) -> dict[str | int, Any]:
    """What ``torch.save`` wrote: a dict of tensors on the CPU, numbers, text, and containers of them.

    No code of the file is run. Everything that it claims is compared with its size first (see
    :mod:`timm_jem.conversion.claims`), so that it can't take more memory than it has bytes; PyTorch then reads it as weights
    only. Tensors of a file of PyTorch 1.6 or later are mapped, and so read where they are used: keep the file as it is.

    Raises:
        InputError: no such file, or one that is broken, or that holds other things.
    """
    file = Path(file)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
            raise InputError(f"it is {what}: give the authors' .pt or .pth file")
        if status.st_size > _MOST_BYTES:
            raise InputError(f"it is larger than {_MOST_BYTES >> 30} GiB, as no checkpoint of these methods is")
        with file.open("rb") as stream:
            begin = stream.read(len(_LEGACY))
        zipped = begin.startswith(_ZIP)
        if not (zipped or begin == _LEGACY):
            raise InputError("it is not what torch.save writes: give the authors' .pt or .pth file, unpacked")
        claimed = _claims_of_zip(file) if zipped else _claims_of_legacy(file)
        if not isinstance(claimed, dict):
            raise InputError(f"it holds a {type(claimed).__name__.removeprefix('Claimed').lower()}: a checkpoint is a dict")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except OSError as error:
        raise InputError(f"{file} can't be read ({one_line(error)})") from error
    except Exception as error:  # whatever PyTorch makes of a file that somebody may have built to break it
        raise InputError(f"{file} is not a checkpoint that PyTorch reads as weights only ({one_line(error)})") from error


def _claims_of_zip(file: Path) -> Any:
    """The object in a file as PyTorch writes it since 1.6: stored, not packed, with one record for each storage."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            sizes = {record.filename: record.file_size for record in records}
            pickles = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in sizes):
                raise InputError("it is a TorchScript program: give a file of weights")
            if len(pickles) != 1 or len({name.lower() for name in sizes}) != len(records):  # PyTorch finds either case
                raise InputError("it is not a zip as torch.save writes it: give the authors' file, unpacked")
            if archive.comment or any(r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1 for r in records):
                raise InputError("its records are packed or encrypted, as torch.save writes none: give the authors' file")
            if sizes[pickles[0]] > _MOST_PICKLED or sum(sizes.values()) > file.stat().st_size:
                raise InputError("its records are larger than it is, or its pickle than any checkpoint's: it is broken")
            pickled, begin = archive.read(pickles[0]), min(record.header_offset for record in records)
            # Of a zip with two tables of contents each reader may take another one.
            if begin or _has_far_directory(file) or pickled != PyTorchFileReader(str(file)).get_record("data.pkl"):
                raise InputError("it has two tables of contents, as torch.save writes none: give the authors' file")
            claimed, storages = read_claims(BytesIO(pickled))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"it is a zip that is broken or cut off ({one_line(error)}): get it again") from error
    prefix = pickles[0].removesuffix("data.pkl")
    for storage in storages:
        _check_bytes(storage, sizes.get(f"{prefix}data/{storage.key}", -1))
    return claimed


def _has_far_directory(file: Path) -> bool:
    """Whether a zip's locator of its 64-bit end record points elsewhere than just before it, where Python reads it."""
    with file.open("rb") as stream:
        stream.seek(-42, os.SEEK_END)
        place, locator = stream.tell(), stream.read(20)
    return locator.startswith(b"PK\x06\x07") and int.from_bytes(locator[8:16], "little") != place - 56


def _claims_of_legacy(file: Path) -> Any:
    """The object in a file of PyTorch before 1.6: five pickles one after another, then the storages, each with its length."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for _ in ("mark", "version", "system"):
            read_claims(mapped)
        claimed, storages = read_claims(mapped)
        keys, _ = read_claims(mapped)
        by_key = {storage.key: storage for storage in storages}
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(by_key):
            raise InputError("its list of tensors is not that of its contents: it is broken")
        for key in keys:
            storage = by_key[key]
            items, bytes_left = int.from_bytes(mapped.read(8), "little", signed=True), len(mapped) - mapped.tell()
            _check_bytes(storage, min(items * storage.item_bytes, bytes_left))
            mapped.seek(items * storage.item_bytes, os.SEEK_CUR)
    return claimed


def _check_bytes(storage: ClaimedStorage, there: int) -> None:
    claimed = storage.items * storage.item_bytes
    if there != claimed:
        raise InputError(
            f"it claims {claimed:,} bytes for the tensor {quoted(storage.key)} and has {max(there, 0):,}: it is broken or cut "
            "off, get it again"
        )
