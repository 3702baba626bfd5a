"""What ends a run early, as the shell sees it."""

import io
import json
import os
import sys
import time
from collections.abc import Callable

import pytest
import torch

from timm_jem import InputError, shell
from timm_jem.decoding import BrokenImage
from timm_jem.shell import one_line_errors


def ended(main: Callable[[], None]) -> int:
    with pytest.raises(SystemExit) as end, one_line_errors():
        main()
    return end.value.code


def left(error: BaseException, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return end.value.code, said.err.strip()


def test_names_that_are_no_text_can_be_told(monkeypatch):
    """Where standard output takes UTF-8 alone, as in most languages' settings."""
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, "utf-8", errors="strict"))
    with one_line_errors():
        print("other.\udcff")
    assert told.getvalue() == b"other.\\udcff\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("lower it"), "error: lower it"),
        (InputError("Traceback:\n  x\ntimm_jem.errors.InputError: row 3 is broken"), "error: row 3 is broken"),
        (BrokenImage("Traceback:\n  x\ntimm_jem.decoding.BrokenImage: row 3 is broken"), "error: row 3 is broken"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "error: [Errno 2] No such file or directory: 'x.png'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(error, line, capsys):
    assert left(error, capsys) == (1, line)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 79 GiB"),
    ],
)
def test_want_of_memory_names_what_takes_it(error, capsys):
    code, line = left(error, capsys)
    assert code == 1
    assert line.startswith("error: out of memory (")
    assert all(name in line for name in ("train.batch_size", "train.buffer_size", "train.grad_accum"))


def test_no_memory_in_truth(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        torch.empty(2**60)
    assert capsys.readouterr().err.startswith("error: out of memory (")


@pytest.mark.parametrize("also", [None, InputError("lower it")])
def test_a_reader_who_has_left_is_said_once(also, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)

    def main():
        print("much")
        if also is not None:
            raise also

    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        code = ended(main)
    assert code == 1
    assert capsys.readouterr().err == f"error: {also or '[Errno 32] Broken pipe'}\n"


def test_an_interrupt_is_no_traceback(capsys):
    assert left(KeyboardInterrupt(), capsys) == (130, "error: interrupted; a run that has a checkpoint goes on with --resume")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("bug"), OSError("a library's, without a number")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


@pytest.mark.parametrize(("rank", "waits"), [("0", False), ("1", True)])
def test_of_several_processes_the_main_one_speaks_first(rank, waits, tmp_path, monkeypatch, capsys):
    """The launcher ends the others when it has; and its own report ends with the line."""
    report = tmp_path / "error.json"
    monkeypatch.setattr(shell, "_PATIENCE", 0.2)
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "TORCHELASTIC_ERROR_FILE": str(report)}.items():
        monkeypatch.setenv(name, value)
    start = time.perf_counter()
    assert left(InputError("lower it"), capsys) == (1, "error: lower it")
    assert (time.perf_counter() - start > 0.2) is waits
    assert json.loads(report.read_text())["message"]["message"] == "error: lower it"
    assert os.listdir(tmp_path) == ["error.json"]
