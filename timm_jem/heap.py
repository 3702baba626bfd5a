"""What a process does with the memory that it freed."""

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 2**31 - 1  # bytes at the heap's end: the most that mallopt, whose values are C's int, can be told
_OWN_MAPPINGS = (2**30, 2**25)  # glibc refused the first until about 2.35


def keep_freed_memory() -> bool:
    """Let this process keep about 2 GB of what it frees, for what it takes next. Networks run faster on CPUs, to the same bits.

    By itself glibc gives a large block back as soon as it is freed, and takes it anew from the system, which clears each of
    its pages: once a layer and pass. See ``mallopt(3)``. Call it before the work, as recipes do.

    Returns:
        Whether it does from now on: not where the C library isn't glibc, or refuses, nor where the environment says how
        (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, or ``glibc.malloc`` in ``GLIBC_TUNABLES``).
    """
    told = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    if platform.libc_ver()[0] != "glibc" or told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [any(mallopt(_MMAP_THRESHOLD, size) for size in _OWN_MAPPINGS), bool(mallopt(_TRIM_THRESHOLD, _KEPT))]
    return all(accepted)
