import contextlib
import os
from pathlib import Path

import pytest

from timm_jem import ClassGaussians, InputError, PublishedChains
from timm_jem.files import as_path, files_left_aside, folder_aside, move_in, replaced_file
from timm_jem.gaussians import MAX_STARTS_BYTES
from timm_jem.hub.published_chains import MAX_FILE_BYTES
from timm_jem.ood import stored


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_file(file) as aside:
        aside.write_text(f"half of the n{1 / 0}")
    with pytest.raises(FileNotFoundError), replaced_file(file):
        pass  # nothing was written
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["figures.json"])
    with replaced_file(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert (file.read_text(), os.listdir(tmp_path)) == ("new", ["figures.json"])


def test_two_writers_of_a_file_and_a_hidden_one_do_not_meet(tmp_path):
    file, hidden = tmp_path / "table.csv", tmp_path / ".table.csv"
    hidden.write_text("mine")
    with replaced_file(file) as first:
        first.write_text("first")
        with replaced_file(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
        assert first.suffix == ".csv"  # which may tell what is written
        assert files_left_aside(tmp_path, r"(table|other)\.csv") == [first]
        assert files_left_aside(tmp_path, r"other\.csv") == []
    assert (file.read_text(), hidden.read_text()) == ("first", "mine")
    assert sorted(os.listdir(tmp_path)) == [".table.csv", "table.csv"]
    with replaced_file(tmp_path / ("名" * 85)) as aside:  # 255 bytes
        aside.write_text("long")


def test_a_folder_aside_is_where_its_target_can_be_written(tmp_path):
    with folder_aside(tmp_path / "a" / "b" / "model") as aside:
        assert aside.parent == tmp_path / "a" / "b"
        (aside / "weights").write_text("half")
    assert os.listdir(tmp_path) == []  # what was made for it is gone as well
    (tmp_path / "mount").mkdir()  # its parent may be another file system, or not ours to write to
    with folder_aside(tmp_path / "mount") as aside:
        assert aside.parent == tmp_path / "mount"
        assert aside.stat().st_mode & 0o777 == (tmp_path / "mount").stat().st_mode & 0o777
    assert os.listdir(tmp_path / "mount") == []
    with folder_aside(tmp_path / ("名" * 85)) as aside:  # 255 bytes
        assert aside.is_dir()


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000 + "b"])
def test_folders_that_can_not_be_made(tmp_path, name):
    with pytest.raises(InputError, match="can't be made"), folder_aside(tmp_path / name):
        pass
    with pytest.raises(InputError, match="can't be made"), folder_aside("/proc/nowhere/x"):
        pass


@pytest.mark.parametrize("name", [None, 5, b"", "", "x\0y", ["a"], "\ud800"])
def test_names_of_no_folder(name):
    with pytest.raises(InputError, match="is not the name of a folder") as error:
        as_path(name)
    assert str(error.value).isprintable()


def folder_with(path, text, names):
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).write_text(text)


def contents(path):
    return {file.name: file.read_text() for file in path.iterdir() if file.is_file()}


def test_a_folder_is_moved_in_whole(tmp_path):
    target = tmp_path / "m"
    with folder_aside(target) as aside:
        folder_with(aside, "old", ["config", "weights", "chains"])
        move_in(aside, target, last="config")
    assert (os.listdir(tmp_path), contents(target)) == (["m"], dict.fromkeys(["config", "weights", "chains"], "old"))
    (target / "notes").write_text("mine")
    with folder_aside(target) as aside:
        folder_with(aside, "new", ["config", "weights"])
        move_in(aside, target, last="config", stale=["chains", "nothing"])
    assert contents(target) == {"config": "new", "weights": "new", "notes": "mine"}
    assert len(os.listdir(target)) == 3


@pytest.mark.parametrize("fails", range(6))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_move_that_fails_half_way_is_undone(tmp_path, monkeypatch, fails, error):
    target, rename, moves, seen = tmp_path / "m", Path.rename, [], []
    old = dict.fromkeys(["config", "weights", "chains", "notes"], "old")
    folder_with(target, "old", old)

    def failing(self, place):
        moves.append(place)
        if len(moves) == fails + 1:
            raise error("no")
        rename(self, place)
        seen.append(contents(target))

    with pytest.raises(error) if fails < 5 else contextlib.nullcontext(), folder_aside(target) as aside:
        folder_with(aside, "new", ["weights", "config"])
        monkeypatch.setattr(Path, "rename", failing)
        move_in(aside, target, last="config", stale=["chains"])
    assert contents(target) == (old if fails < 5 else {"config": "new", "weights": "new", "notes": "old"})
    assert len(os.listdir(target)) == len(contents(target))
    # Whenever the process were killed: the old files, the new ones, or no config.
    for files in seen:
        assert "config" not in files or files["config"] == files["weights"] == files.get("chains", files["config"])


def test_a_folder_in_the_way_is_not_moved_out(tmp_path):
    target = tmp_path / "m"
    folder_with(target, "old", ["weights"])
    (target / "config").mkdir()
    with folder_aside(target) as aside:
        folder_with(aside, "new", ["weights", "config"])
        with pytest.raises(IsADirectoryError):
            move_in(aside, target, last="config")
    assert (contents(target), sorted(os.listdir(target))) == ({"weights": "old"}, ["config", "weights"])


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(InputError("a\nb \x1b[2J \ud800: give another")) == "a b  [2J  : give another"


@pytest.mark.parametrize(
    ("load", "most", "otherwise"),
    [
        (lambda file: ClassGaussians.load(file, (1, 8, 8), 3), MAX_STARTS_BYTES, "remove it, and chains start from noise"),
        (lambda file: PublishedChains.load(file, (1, 8, 8), 3), MAX_FILE_BYTES, "load the model with replay_buffer=False"),
        (stored.read, stored._MOST_BYTES, "no detector's file is"),
    ],
)
def test_a_file_that_is_too_large_is_not_read(tmp_path, load, most, otherwise):
    file = tmp_path / "large.safetensors"
    file.touch()
    os.truncate(file, most + 1)
    with pytest.raises(InputError, match=rf"^large.safetensors is larger than [\d,]+ MiB: {otherwise}$"):
        load(file)
