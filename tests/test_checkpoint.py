"""Checkpoints that somebody built to break their reader end in one line, before PyTorch reads them or memory is taken."""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from timm_jem import InputError
from timm_jem.conversion import claims, convert, read_checkpoint

MEBIBYTES = 32  # that Python may take of a hostile file


class Storage:
    def __init__(self, items, key="0", kind=torch.FloatStorage, where="cpu"):
        self.id = ("storage", kind, key, where, items)


class Claims:
    """Pickles as a tensor of this shape, whatever is in its storage."""

    def __init__(self, shape, strides, storage, offset=0, extra=()):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict(), *extra)

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def __init__(self, file, legacy):
        super().__init__(file, 2)
        self.legacy = legacy

    def persistent_id(self, obj):
        return (*obj.id, *([None] if self.legacy else [])) if isinstance(obj, Storage) else None


def pickled(obj, legacy=False) -> bytes:
    if isinstance(obj, bytes):
        return obj
    buffer = io.BytesIO()
    Pickler(buffer, legacy).dump(obj)
    return buffer.getvalue()


def write_zip(file: Path, obj, storages=None, compress=zipfile.ZIP_STORED, extra=None) -> None:
    """As torch.save writes it since 1.6."""
    with zipfile.ZipFile(file, "w", compress) as archive:
        archive.writestr("archive/data.pkl", pickled(obj))
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
        for name, data in (extra or {}).items():
            archive.writestr(f"archive/{name}", data)


def two_tables(file: Path, obj, shown) -> None:
    """A zip of two tables of contents: its end record points at that of ``obj``, and just before it is that of ``shown``."""
    found = []
    for content in (obj, shown):
        write_zip(file, content)
        data = file.read_bytes()
        size, offset = struct.unpack("<II", data[-10:-2])
        found.append((data[:offset], data[offset : offset + size], data[-22:]))
    (first, table, end), (records, later, _) = found
    later, at = bytearray(later), 0
    while at < len(later):  # Python adds to these what it takes for a prefix of the file
        (offset,) = struct.unpack("<I", later[at + 42 : at + 46])
        later[at + 42 : at + 46] = struct.pack("<I", offset + len(first) - len(records))
        at += 46 + sum(struct.unpack("<HHH", later[at + 28 : at + 34]))
    end = end[:12] + struct.pack("<II", len(later), len(first)) + end[20:]
    file.write_bytes(first + table + records + later + end)


def write_legacy(file: Path, obj, storages=(), keys=None) -> None:
    """As torch.save wrote it before 1.6; ``storages``: key, number of items, bytes."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with file.open("wb") as stream:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(part, stream, 2)
        stream.write(pickled(obj, legacy=True))
        pickle.dump([key for key, *_ in storages] if keys is None else keys, stream, 2)
        for _, items, data in storages:
            stream.write(items.to_bytes(8, "little", signed=True) + data)


def one(shape, items, strides=(1,), **more):
    return {"w": Claims(shape, strides, Storage(items, **more))}


def recursive() -> dict:
    inner: dict = {}
    inner["self"] = [inner]
    return inner


def nested(depth: int = 60) -> tuple:
    """A tuple of twice the same tuple of twice the same ...: to hash it, or to write it, takes 2⁶⁰ steps."""
    return () if depth == 0 else (nested(depth - 1),) * 2


NESTED = b"\x80\x02)q\x00" + b"h\x00\x86q\x00" * 60  # the same, on the pickle's stack
MARKER = "timm_jem_hostile_marker"
HOSTILE = {
    # What executes.
    "a command": (lambda f: write_zip(f, {"w": Call(os.system, f"touch {MARKER}")}), r"a 'posix.system'|a 'nt.system'"),
    "a legacy command": (lambda f: write_legacy(f, Call(os.system, f"touch {MARKER}")), r"a 'posix.system'|a 'nt.system'"),
    "a bare pickle": (lambda f: f.write_bytes(pickle.dumps(Call(os.system, f"touch {MARKER}"))), "not what torch.save writes"),
    "an evaluation": (lambda f: write_zip(f, Call(eval, f"open('{MARKER}', 'w')")), r"a '__builtin__.eval'"),
    "an attribute": (
        lambda f: write_zip(f, b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."),
        "attributes of their",
    ),
    "a call of data": (lambda f: write_zip(f, b"\x80\x02X\x01\x00\x00\x00a)R."), "it calls a str"),
    "a call of tuples": (lambda f: write_zip(f, NESTED + b")R."), "it calls a tuple"),
    "sizes of tuples": (lambda f: write_zip(f, one(nested(), 4, nested()), {"0": b"0" * 16}), "it has a tuple for a size"),
    # What takes memory or time, though weights_only lets it through.
    "a terabyte": (lambda f: write_zip(f, one((2**38,), 2**38), {"0": b"0" * 16}), r"claims 1,099,511,627,776 bytes.* has 16"),
    "a legacy terabyte": (
        lambda f: write_legacy(f, one((2**38,), 2**38), [("0", 2**38, b"0" * 16)]),
        "claims 1,099,511,627,776",
    ),
    "more than its storage": (
        lambda f: write_zip(f, one((2**30,), 4), {"0": b"0" * 16}),
        r"\(1073741824,\) in memory of 4 numbers",
    ),
    "one number everywhere": (lambda f: write_zip(f, one((2**30,), 1, (0,)), {"0": b"0" * 4}), "memory of 1 numbers"),
    "far strides": (lambda f: write_zip(f, one((2,), 4, (2**40,)), {"0": b"0" * 16}), "memory of 4 numbers"),
    "negative sizes": (lambda f: write_zip(f, one((-1,), 4), {"0": b"0" * 16}), "it has -1 for a size"),
    "negative storage": (lambda f: write_zip(f, one((1,), -4), {"0": b"0" * 16}), "it has -4 for a size"),
    "many dimensions": (lambda f: write_zip(f, one((1,) * 99, 4, (1,) * 99), {"0": b"0" * 16}), "a tensor of shape"),
    "a flag": (
        lambda f: write_zip(f, {"w": Claims((1,), (1,), Storage(4), extra=({"conj": True},))}, {"0": b"0" * 16}),
        "a tensor of shape",
    ),
    "a bytearray": (lambda f: write_zip(f, Call(bytearray, 10**11)), r"a '__builtin__.bytearray'"),
    "a tensor class": (lambda f: write_zip(f, Call(torch.Tensor, 10**11)), r"a 'torch._tensor.Tensor'|a 'torch.Tensor'"),
    "a key of tuples": (lambda f: write_zip(f, b"\x80\x02}" + NESTED[2:] + b"K\x01s."), "a key in it is a tuple"),
    "mappings of lists": (lambda f: write_zip(f, Call(OrderedDict, [["a", 1]])), "as Python 2 wrote them"),
    "a long text": (lambda f: write_zip(f, b"\x80\x02X\xff\xff\xff\x7fabc."), "broken or cut off"),
    "a packed pickle": (
        lambda f: write_zip(f, b"\x80\x02}" + b"\0" * 2**24 + b".", compress=zipfile.ZIP_DEFLATED),
        "packed or encrypted",
    ),
    "two tables of contents": (lambda f: two_tables(f, {"w": Call(bytearray, 10**11)}, {}), "has two tables of contents"),
    # What is no checkpoint, or a broken one.
    "a counter": (
        lambda f: write_zip(f, Counter("abc")),
        r"a 'collections.Counter', which is not read; if you trust its author",
    ),
    "a numpy scalar": (
        lambda f: torch.save({"best": np.float64(0.9)}, f),
        r"a 'numpy\S*multiarray.scalar', which is not read; if you",
    ),
    "an array of objects": (lambda f: torch.save({"w": np.array([None])}, f), r"a 'numpy\S*_reconstruct', which is not read"),
    "a module": (lambda f: torch.save(torch.nn.Linear(2, 2), f), r"a 'torch.nn.modules.linear.Linear', which is not read"),
    "a sparse tensor": (lambda f: torch.save({"w": torch.eye(3).to_sparse()}, f), r"a 'torch._utils._rebuild_sparse_tensor'"),
    "a quantised tensor": (
        lambda f: write_zip(f, {"w": Call(torch._utils._rebuild_qtensor, 1)}),
        r"a 'torch._utils._rebuild_qtensor'",
    ),
    "complex numbers": (lambda f: torch.save({"w": torch.ones(2, dtype=torch.complex64)}, f), r"a 'torch.ComplexFloatStorage'"),
    "one tensor": (lambda f: torch.save(torch.ones(3), f), "it holds a tensor: a checkpoint is a dict"),
    "a list": (lambda f: torch.save([{"w": torch.ones(3)}], f), "it holds a list: a checkpoint is a dict"),
    "another protocol": (lambda f: torch.save({"w": 1}, f, pickle_protocol=4), "the opcode FRAME"),
    "short storage": (lambda f: write_zip(f, one((4,), 4), {"0": b"0" * 15}), "claims 16 bytes for the tensor '0' and has 15"),
    "no storage": (lambda f: write_zip(f, one((4,), 4)), "claims 16 bytes for the tensor '0' and has 0"),
    "a legacy storage that is not listed": (lambda f: write_legacy(f, one((4,), 4)), "not that of its contents"),
    "a legacy storage of another length": (
        lambda f: write_legacy(f, one((4,), 4), [("0", 5, b"0" * 20)]),
        "claims 16 bytes .* has 20",
    ),
    "a legacy file cut off": (lambda f: write_legacy(f, one((4,), 4), [("0", 4, b"0" * 9)]), "claims 16 bytes .* has 9"),
    "a legacy pickle cut off": (lambda f: write_legacy(f, b"\x80\x02}", keys=[]), "broken or cut off"),
    "one storage twice": (
        lambda f: write_zip(f, [Claims((1,), (1,), Storage(1)), Claims((1,), (1,), Storage(2))], {"0": b"0" * 4}),
        "different things of the same memory",
    ),
    "two pickles": (lambda f: write_zip(f, {}, extra={"DATA.PKL": b"."}), "not a zip as torch.save writes it"),
    "no pickle": (
        lambda f: zipfile.ZipFile(f, "w").writestr("a.txt", "hello"),
        "not a zip as torch.save writes it|broken or cut off",
    ),
    "a program": (lambda f: torch.jit.script(torch.nn.Linear(2, 2)).save(f), "a TorchScript program"),
    "text": (lambda f: f.write_text("hello"), "not what torch.save writes"),
    "nothing": (lambda f: f.write_bytes(b""), "not what torch.save writes"),
    "a folder": (lambda f: f.mkdir(), "it is a folder"),
    "a pipe": (lambda f: os.mkfifo(f), "no ordinary file"),
    "no file": (lambda f: None, "can't be read .*No such file"),
    "an empty stack": (lambda f: write_zip(f, b"\x80\x02."), "broken or cut off"),
    "an unknown opcode": (lambda f: write_zip(f, b"\x80\x02\xff."), "broken or cut off"),
    "a missing memo": (lambda f: write_zip(f, b"\x80\x02h\x07."), "broken or cut off"),
}


@pytest.mark.filterwarnings("ignore")  # of torch.jit's age
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files_are_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    build, message = HOSTILE[name]
    build(tmp_path / "x.pt")
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as refused:
        read_checkpoint(tmp_path / "x.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not read
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'x.pt'}")
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    assert not (tmp_path / MARKER).exists()
    assert peak < MEBIBYTES * 2**20


def test_endless_pickles_end(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_MOST_OPCODES", 1000)
    write_zip(tmp_path / "x.pt", b"\x80\x02" + b"]" * 999 + b".")
    with pytest.raises(InputError, match="more than 1,000 opcodes"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_one_line(tmp_path, legacy):
    whole = tmp_path / "whole.pt"
    torch.save(
        {"w": torch.arange(6.0).view(2, 3), "n": {"a": [1, 2.5, "x", None, True]}},
        whole,
        _use_new_zipfile_serialization=not legacy,
    )
    data = whole.read_bytes()
    assert read_checkpoint(whole)["n"] == {"a": [1, 2.5, "x", None, True]}
    for length in range(0, len(data), 7):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(InputError) as refused:
            read_checkpoint(tmp_path / "cut.pt")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_comes_back(tmp_path, legacy):
    base = torch.randn(4, 6)
    saved = {
        "weights": OrderedDict(a=base, b=base.t(), c=base[1:3, ::2], d=torch.tensor(7), e=torch.empty(0, 3)),
        "parameter": torch.nn.Parameter(base),
        "state": torch.nn.BatchNorm2d(2).state_dict(),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(base)], lr=1e-4).state_dict(),
        "types": [base.half(), base.bfloat16(), base.double(), base > 0, (base * 9).to(torch.int8)],
        "epoch": 2**40,
        "same": (base, base),
    }
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    again = read_checkpoint(tmp_path / "x.pt")
    for ours, theirs in zip(again["weights"].values(), saved["weights"].values(), strict=True):
        assert torch.equal(ours, theirs)
    assert [t.dtype for t in again["types"]] == [t.dtype for t in saved["types"]]
    assert again["optimizer"] == saved["optimizer"]
    assert again["epoch"] == 2**40
    assert torch.equal(again["parameter"], base)


def test_tensors_of_a_gpu_come_to_the_cpu(tmp_path):
    numbers = torch.arange(4.0)
    write_zip(tmp_path / "new.pt", one((4,), 4, where="cuda:0"), {"0": numbers.numpy().tobytes()})
    write_legacy(tmp_path / "old.pt", one((4,), 4, where="cuda:1"), [("0", 4, numbers.numpy().tobytes())])
    for name in ("new.pt", "old.pt"):
        assert torch.equal(read_checkpoint(tmp_path / name)["w"], numbers)


def test_a_recursive_container_is_walked_once(tmp_path):
    write_zip(tmp_path / "x.pt", {"a": recursive(), "b": [recursive()]})
    assert read_checkpoint(tmp_path / "x.pt")["a"]["self"]
    with pytest.raises(InputError, match="no network of jem"):
        convert(tmp_path / "x.pt")
