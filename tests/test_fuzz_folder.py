"""Folders broken at random: each loads as it is, or is refused in one line; none costs much.

``TIMM_JEM_FUZZ=5000:6000 pytest -m slow tests/test_fuzz_folder.py`` runs a part of the cases, or others.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from folder_fuzz import run_cases

FIRST, LAST = (int(number) for number in os.environ.get("TIMM_JEM_FUZZ", "0:20000").split(":"))


def test_a_hundred_broken_folders(tmp_path):
    faults, counts = run_cases(tmp_path, range(100))
    assert faults == []
    assert counts["loads"] > 5
    assert counts["refused"] > 50


@pytest.mark.slow
def test_twenty_thousand_broken_folders(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as workers:
        parts = workers.map(run_cases, (tmp_path / "a", tmp_path / "b"), (range(FIRST, LAST, 2), range(FIRST + 1, LAST, 2)))
        faults = [fault for part, _ in parts for fault in part]
    assert faults == []
