"""One writer for each folder: a lock that the kernel lets go when its process ends, however it ends."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from timm_jem.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["LOCK_FILE", "locked"]

LOCK_FILE = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_held: set[int] = set()


def _let_go() -> None:
    """A forked process, of a DataLoader say, would keep the lock of one that was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Within the context no other process has this folder.

    The lock is flock's, on a file that says who holds it, and that is removed at the end. One that a killed process left
    holds nothing.

    Gives:
        None, or a line that says that this file system has no locks.

    Raises:
        InputError: another process has it.
        OSError: the lock's file can't be made.
    """
    descriptor, note = _take(folder)
    _held.add(descriptor)
    try:
        yield note
    finally:
        with contextlib.suppress(OSError):  # a folder that was taken away meanwhile
            (folder / LOCK_FILE).unlink()  # while it is held: the next one to come makes its own
        _held.remove(descriptor)
        os.close(descriptor)


def _take(folder: Path) -> tuple[int, str | None]:
    file, note = folder / LOCK_FILE, None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                holder = os.read(descriptor, 300).decode(errors="replace")
                os.close(descriptor)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise InputError(
                    f"another process{', ' * bool(holder)}{holder}, is writing to {folder}: wait for its end, stop it, or give "
                    "another output_dir"
                ) from error
            note = f"note: this file system has no locks, so nothing keeps a second run from writing to {folder}"
        if note is not None or _is(descriptor, file):
            break
        os.close(descriptor)  # its holder removed it at its end, just now
    with contextlib.suppress(OSError):  # a full disk: nobody is told who holds it, and it is held all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor, note


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
