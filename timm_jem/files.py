"""Files and folders that are there whole or as they were before, and the machine's cores."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_jem.errors import InputError, one_line, quoted

__all__ = [
    "as_path",
    "check_header",
    "cores",
    "files_left_aside",
    "fingerprint",
    "folder_aside",
    "folder_there",
    "left_aside",
    "move_in",
    "read_tensors",
    "replaced_file",
    "sha256",
    "write_tensors",
]


def as_path(name: str | os.PathLike) -> Path:
    """A path, or an InputError where ``name`` can't be one."""
    try:
        path = Path(name)
    except TypeError as error:
        raise InputError(f"{quoted(name)} is not the name of a folder: give text or a path") from error
    if not str(name) or "\0" in str(name) or any("\ud800" <= character <= "\udfff" for character in str(name)):
        raise InputError(f"{quoted(name)} is not the name of a folder: give one of characters, none of them a zero byte")
    return path


def check_header(file: Path, most: int = 2**16) -> None:
    """Raise an InputError where the header of a safetensors file has more than ``most`` bytes; of a few tensors it has one KiB.

    Reading one of a hundred thousand empty tensors takes minutes and gigabytes. A length that the file doesn't have is left
    to safetensors, which finds the file incomplete.

    Raises:
        OSError: the file can't be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if most < length <= file.stat().st_size:
        raise InputError(
            f"{file.name} has a header of {length >> 10:,} KiB: above {most >> 10:,} it is no such file, get it again"
        )


def read_tensors(file: Path, most: int, writer: str, otherwise: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file of at most ``most`` bytes and the texts of its header, all still unchecked.

    Raises:
        InputError: a file that is missing, larger, or broken; ``writer`` is what writes such files and ``otherwise`` what to do
            without one that is too large, for the message.
    """
    if not file.is_file():
        raise InputError(f"there is no file {file}: give one that {writer} wrote")
    if file.stat().st_size > most:
        raise InputError(f"{file.name} is larger than {most >> 20:,} MiB: {otherwise}")
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file.name} is not a complete safetensors file ({one_line(error)}): get it again") from error


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the context ends well; otherwise ``path`` is as before.

    No other writer of ``path`` has it, and it ends as ``path`` does.

    Raises:
        OSError: whatever the file system says; nothing partial stays.
    """
    path = Path(path)
    # A name may have 255 bytes, and a character up to four.
    aside = path.with_name(f".{path.stem[:40]}.aside-{secrets.token_hex(4)}{path.suffix[:20]}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(file: str | os.PathLike, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write tensors of the CPU, contiguous, as a safetensors file with texts in its header, whole or not at all.

    Raises:
        InputError: the file can't be written; one that was there is as before.
    """
    try:
        with replaced_file(as_path(file)) as aside:
            aside.touch()
            mode = aside.stat().st_mode  # safetensors gives its files to their owner alone
            save_file(tensors, aside, header)
            aside.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} can't be written ({one_line(error)}): give a file in a folder that is there") from error


@contextlib.contextmanager
def folder_there(folder: Path) -> Iterator[None]:
    """Within the context there is this folder; what was made for it and holds nothing in the end is removed.

    Raises:
        OSError: it can't be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def folder_aside(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder on ``target``'s file system, removed when the context ends.

    It is in ``target`` where that is there, which may be a mount point or the only folder that may be written; otherwise it
    is beside it, and folders that were made for it and hold nothing in the end are removed as well.

    Raises:
        InputError: it can't be made.
    """
    target = Path(target)
    with contextlib.ExitStack() as held:
        try:
            place = target if target.is_dir() else target.parent
            held.enter_context(folder_there(place))
            # A name may have 255 bytes, and a character up to four.
            aside = place / f".{target.name[:40]}-{secrets.token_hex(4)}"
            aside.mkdir()
        except (OSError, ValueError) as error:
            raise InputError(f"the folder {target} can't be made ({one_line(error)}): give another") from error
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def left_aside(target: Path) -> list[Path]:
    """What :func:`folder_aside` made for ``target`` in processes that were killed."""
    ours = re.compile(rf"\.{re.escape(target.name[:40])}-[0-9a-f]{{8}}")
    places = [place for place in (target, target.parent) if place.is_dir()]
    found = [path for place in places for path in place.iterdir() if ours.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def files_left_aside(folder: Path, names: str) -> list[Path]:
    """What :func:`replaced_file` made in ``folder`` in processes that were killed, for files whose ``names`` match so."""
    found = re.compile(r"\.(.{1,40})\.aside-[0-9a-f]{8}(\.\w+)?")
    matches = [(path, found.fullmatch(path.name)) for path in folder.glob(".*.aside-*")]
    ours = [path for path, match in matches if match and re.fullmatch(names, f"{match[1]}{match[2] or ''}")]
    return [path for path in ours if path.is_file() and not path.is_symlink()]


def move_in(aside: Path, target: Path, *, last: str, stale: Iterable[str] = ()) -> None:
    """Give ``target`` the files of ``aside``, all of them or none; its other files are left alone.

    A target that isn't there is made by one rename. Of one that is, the file ``last``, without which nobody takes the folder
    for whole, goes first and comes last: where a process is killed in between, the folder is incomplete, not a mixture.

    Args:
        aside: a folder of files, as :func:`folder_aside` makes it for ``target``.
        target: a folder, or where one is to be.
        last: the name of one of the files.
        stale: names of files of ``target`` that go, if they are there.

    Raises:
        OSError: whatever the file system says; ``target`` is as before.
    """
    if not target.exists():
        aside.rename(target)
        return
    names = sorted((file.name for file in aside.iterdir()), key=lambda name: name == last)
    leaving = [name for name in (last, *(name for name in names if name != last), *stale) if os.path.lexists(target / name)]
    if folders := [target / name for name in leaving if (target / name).is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder")
    before = aside / ".before"
    before.mkdir()
    moves = [(target / name, before / name) for name in leaving] + [(aside / name, target / name) for name in names]
    try:
        for source, place in moves:
            source.rename(place)
    except BaseException:
        for source, place in reversed(moves):
            if os.path.lexists(place) and not os.path.lexists(source):
                place.rename(source)
        raise


def sha256(file: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, a state dict say: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
