"""What a process does with the memory that it freed, counted by the pages that the system gives it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import timm_jem.heap

FILE, BLOCK, TIMES = Path(timm_jem.heap.__file__), 64 * 2**20, 20
SCRIPT = f"""
import resource, runpy
told = runpy.run_path({str(FILE)!r})["keep_freed_memory"]() if {{keep}} else None
b"x" * {BLOCK}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    b"x" * {BLOCK}
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _printed(keep: bool, **environment: str) -> tuple[str, int]:
    """What it returned, and how many pages were taken for blocks of memory, each freed before the next."""
    command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    told, pages = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return told, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries can't be told")
def test_freed_memory_is_taken_again_without_asking_the_system():
    _, asked_for = _printed(keep=False)
    told, kept = _printed(keep=True)
    assert asked_for >= TIMES  # a page may be as large as a block
    assert told == "True"
    assert kept < asked_for / 10


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_the_environment_has_the_last_word(environment):
    assert _printed(keep=True, **environment)[0] == "False"
