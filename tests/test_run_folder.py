import contextlib
import errno
import json
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from recipe_processes import FORKS

from timm_jem import InputError, lock
from timm_jem.files import folder_aside
from timm_jem.training.run_folder import RunFolder

ALONE = Accelerator(cpu=True)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_at(path: str, *, checkpoints: bool = True) -> Path:
    """What a run has that was killed."""
    (Path(path) / "checkpoints").mkdir(parents=True) if checkpoints else Path(path).mkdir(parents=True)
    (Path(path) / "config.yaml").write_text("train: {steps: 3}\n")
    return Path(path)


def test_a_new_run_takes_the_first_free_number():
    assert RunFolder.choose(None, "digits", None).path == Path("runs/digits")
    Path("runs/digits").mkdir(parents=True)
    assert RunFolder.choose(None, "digits", None).path == Path("runs/digits-2")
    Path("runs/digits-3").mkdir()
    assert RunFolder.choose(None, "digits", None).path == Path("runs/digits-2")
    assert RunFolder.choose(None, "my/photos.parquet", None).path == Path("runs/photos")
    assert sorted(os.listdir("runs")) == ["digits", "digits-3"]  # choosing writes nothing


def test_a_folder_of_ones_own_must_be_new_or_empty():
    Path("empty").mkdir()
    for name in ("empty", "new/deep"):
        assert RunFolder.choose(name, "digits", None).path == Path(name)
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    for name, why in (("file", "is a file: give a folder$"), ("full", "holds other files: give a new folder$")):
        for resume in (None, "auto"):  # what has no config.yaml is no run, and a stranger's files stay
            with pytest.raises(InputError, match=f"output_dir {name} {why}"):
                RunFolder.choose(name, "digits", resume)
    Path("full/config.yaml").write_text("")
    with pytest.raises(InputError, match=r"output_dir full holds another run: give a new folder, or --resume auto$"):
        RunFolder.choose("full", "digits", None)


def test_auto_goes_on_where_there_is_a_run():
    assert RunFolder.find(None, "digits", "auto") is None
    assert RunFolder.find("a", "digits", "auto") is None
    assert RunFolder.choose("a", "digits", "auto").path == Path("a")
    run_at("a", checkpoints=False)
    assert RunFolder.find("a", "digits", "auto").path == Path("a")
    assert RunFolder.find("a", "digits", None) is None
    run_at("runs/digits")
    run_at("runs/digits-2")
    assert RunFolder.choose(None, "digits", "auto").path == Path("runs/digits-2")
    assert RunFolder.choose(None, "cifar10", "auto").path == Path("runs/cifar10")


def test_auto_leaves_a_strangers_numbered_folder_alone():
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/mine.txt").write_text("")
    folder = RunFolder.choose(None, "digits", "auto")
    with folder.claimed(ALONE):
        pass
    assert folder.path == Path("runs/digits-2")
    assert RunFolder.choose(None, "digits", "auto").path == Path("runs/digits-2")  # killed before it wrote anything
    Path("runs/digits-3").mkdir()
    Path("runs/digits-3/mine.txt").write_text("")
    folder.config_file.write_text("train: {steps: 3}\n")
    assert RunFolder.choose(None, "digits", "auto").path == Path("runs/digits-2")


def test_a_run_goes_on_by_its_folder_or_one_of_its_checkpoints():
    run_at("a")
    for resume in ("a", "a/", str(Path("a").resolve())):
        folder = RunFolder.choose(None, "digits", resume)
        assert (folder.path, folder.checkpoint) == (Path(resume), None)
    for resume in ("a/checkpoints/step_00000004", "a/checkpoints/step_00000004/"):
        folder = RunFolder.choose("a", "digits", resume)
        assert (folder.path, folder.checkpoint) == (Path("a"), Path("a/checkpoints/step_00000004"))
    with pytest.raises(InputError, match="in its own folder: leave output_dir b out"):
        RunFolder.choose("b", "digits", "a")
    run_at("fresh", checkpoints=False)
    for name in ("fresh", "nowhere"):
        with pytest.raises(InputError, match=f"{name} has no checkpoints: give a run's folder"):
            RunFolder.choose(None, "digits", name)


def test_runs_that_claim_at_once_get_folders_of_their_own():
    folders = [RunFolder.choose(None, "digits", None) for _ in range(8)]
    assert {folder.path for folder in folders} == {Path("runs/digits")}
    together = threading.Barrier(len(folders))

    def claim(folder):
        together.wait()
        with folder.claimed(ALONE):
            together.wait()

    threads = [threading.Thread(target=claim, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"digits", *(f"digits-{n}" for n in range(2, 9))}
    assert {folder.path.name for folder in folders} == set(os.listdir("runs")) == names


def test_a_folder_that_can_not_be_made_is_said():
    Path("file").write_text("")
    Path("runs").write_text("")
    for folder in (RunFolder("file/x"), RunFolder.choose(None, "digits", None)):
        with pytest.raises(InputError, match=f"output_dir {folder} can't be made"), folder.claimed(ALONE):
            pass


def another_holds(folder: str, ready, stop) -> None:
    with RunFolder(folder, goes_on=True).claimed(ALONE):
        ready.set()
        stop.wait()


def test_one_process_writes_to_a_folder():
    """Another one is told who does, until that one ends; killed, it leaves a file that holds nothing."""
    run_at("a")
    for how in ("ends", "is killed"):
        ready, stop = FORKS.Event(), FORKS.Event()
        other = FORKS.Process(target=another_holds, args=(str(Path("a").resolve()), ready, stop))
        other.start()
        assert ready.wait(60)
        for folder in (RunFolder.choose(None, "digits", "a"), RunFolder.choose("a", "digits", "auto")):
            with pytest.raises(InputError) as refused, folder.claimed(ALONE):
                pass
            told = f"another process, pid {other.pid} on {socket.gethostname()}, is writing to a: "
            assert str(refused.value).startswith(told)
            assert "\n" not in str(refused.value)
        stop.set() if how == "ends" else other.kill()
        other.join()
        assert (".lock" in os.listdir("a")) == (how == "is killed")
        with RunFolder.choose(None, "digits", "a").claimed(ALONE):
            assert Path("a/.lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"
        assert ".lock" not in os.listdir("a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_keeps_no_lock():
    """As those that decode images: they outlive a killed run by seconds."""
    with RunFolder("a").claimed(ALONE):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    with RunFolder("a").claimed(ALONE):
        assert child.is_alive()
    child.kill()
    child.join()


def test_a_lock_that_is_removed_while_another_waits_holds_nothing(monkeypatch):
    """The holder ends between another one's opening of the file and its lock: the file that was opened is none any more."""
    Path("a").mkdir()
    first, flock, opened = contextlib.ExitStack(), lock.fcntl.flock, []
    first.enter_context(lock.locked(Path("a")))

    def late(descriptor, how):
        if not opened:
            opened.append(descriptor)
            first.close()
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.locked(Path("a")):
        with pytest.raises(InputError, match="another process"), lock.locked(Path("a")):
            pass
        assert Path("a/.lock").is_file()


def test_a_file_system_without_locks_is_said_and_used(monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with RunFolder("a").claimed(ALONE):
        Path("a/config.yaml").write_text("")
    assert capsys.readouterr().out.startswith("note: this file system has no locks, so nothing keeps a second run from")
    assert os.listdir("a") == ["config.yaml"]
    monkeypatch.undo()


def test_a_run_that_began_meanwhile_keeps_its_folder():
    early, late = (RunFolder.choose("a", "digits", resume) for resume in ("auto", None))
    with early.claimed(ALONE):
        Path("a/config.yaml").write_text("")
    with pytest.raises(InputError, match="output_dir a holds another run"), late.claimed(ALONE):
        pass


def test_only_an_error_of_the_runs_own_files_says_that_they_are_whole():
    Path("elsewhere").write_text("")
    told = r"No such file.*a/x/y'; what was written before is whole: .* --resume a$"
    with pytest.raises(InputError, match=told), RunFolder("a").claimed(ALONE):
        Path("a/x/y").read_text()
    for mine in (Path("a/../nowhere").read_text, lambda: os.close(10**6), lambda: os.listdir("elsewhere")):
        with pytest.raises(OSError, match=r"No such file|Bad file|Not a directory"), RunFolder("a").claimed(ALONE):
            mine()


def test_a_finished_run_has_nothing_more_to_do():
    folder = RunFolder("a")
    folder.path.mkdir()
    assert (folder.summary(), folder.finished(4)) == (None, None)
    folder.write_json(folder.summary_file, {"outcome": "finished", "steps": 4})
    assert folder.summary() == {"outcome": "finished", "steps": 4}
    assert [folder.finished(steps) for steps in (3, 4, 5)] == [4, 4, None]
    folder.write_json(folder.summary_file, {"outcome": "stopped", "steps": 4, "explanation": "gave up"})
    with pytest.raises(InputError, match="a has ended: gave up; it has no checkpoint to go on from: start anew"):
        folder.finished(4)
    assert sorted(os.listdir("a")) == ["summary.json"]
    folder.checkpoints.mkdir()
    with pytest.raises(InputError, match=r"a has ended: gave up; without its summary\.json it goes on"):
        folder.finished(4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "can't be read"),
        ("", "can't be read"),
        ("[1]", "holds a list"),
        ('{"outcome": "finished"}', "says None for its steps"),
        ('{"outcome": "finished", "steps": "12"}', "says '12' for its steps"),
        ('{"steps": null}', "says None for its steps"),
        ("[" * 100_000, "can't be read"),
    ],
)
def test_a_broken_summary_is_said_in_a_line(content, reason):
    Path("a").mkdir()
    Path("a/summary.json").write_text(content)
    with pytest.raises(InputError, match=f"a/summary.json {reason}.*: remove it, and the run goes on") as error:
        RunFolder("a").finished(4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_name_that_no_folder_can_have_is_said(name):
    for choice in ({"output_dir": name, "resume": None}, {"output_dir": None, "resume": name}):
        with pytest.raises(InputError, match="is not the name of a folder"):
            RunFolder.choose(dataset="digits", **choice)


def test_a_summary_that_can_not_be_read_is_said():
    Path("a/summary.json").mkdir(parents=True)
    with pytest.raises(InputError, match="can't be read"):
        RunFolder("a").summary()


def test_tidy_leaves_strangers_files_alone():
    folder = RunFolder("a")
    for name in (
        "best/step_00000004", "best/step_00000008", "best/.step_00000008-0a1b2c3d", ".model-12ab34cd", "model",
        "model/.model-ab12cd34",
        "best/my_step_notes", "best/step_00000012.bak", "best/backup_step_00000012", ".model-Of mine", ".model",
        "step_00000008",
    ):  # fmt: skip
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "file").write_text("")
    for name in ("best/step_00000016", ".model-file", ".samples.png", ".notes-20261127.txt",
        ".samples.aside-0a1b2c3d.png", ".samples_000020.aside-0a1b2c3d.png", ".predictions.aside-0a1b2c3d.csv",
    ):  # fmt: skip
        (folder.path / name).write_text("")
    Path("elsewhere").mkdir()
    Path("elsewhere/file").write_text("")
    Path("a/best/step_00000020").symlink_to(Path("elsewhere").resolve())
    folder.tidy([4])
    assert sorted(os.listdir("a/best")) == [
        "backup_step_00000012", "my_step_notes", "step_00000004", "step_00000012.bak", "step_00000016", "step_00000020",
    ]  # fmt: skip
    assert sorted(os.listdir("a")) == [
        ".model", ".model-Of mine", ".model-file", ".notes-20261127.txt", ".predictions.aside-0a1b2c3d.csv", ".samples.png",
        "best", "model", "step_00000008",
    ]  # fmt: skip
    assert os.listdir("a/model") == ["file"]
    assert Path("elsewhere/file").exists()
    RunFolder("nowhere").tidy([])  # nothing there yet


def test_what_a_killed_writer_leaves_has_the_names_that_tidy_removes(monkeypatch):
    folder = RunFolder("a")
    with monkeypatch.context() as killed:
        killed.setattr("timm_jem.files.shutil.rmtree", lambda *_, **__: None)
        for target in (folder.model, folder.best(12)):
            with folder_aside(target):
                pass
    assert len(list(Path("a").rglob(".*-*"))) == 2
    folder.tidy([12])
    assert list(Path("a").rglob(".*-*")) == []


def test_files_are_whole_or_as_they_were():
    folder = RunFolder("a")
    folder.path.mkdir()
    folder.write_json(folder.summary_file, {"steps": 4})
    with pytest.raises(TypeError):
        folder.write_json(folder.summary_file, {"steps": {1}})
    assert json.loads(folder.summary_file.read_text()) == {"steps": 4}
    folder.write_picture("samples.png", Image.new("L", (2, 2)))
    folder.write_picture("notes.png", Image.new("L", (2, 2)))
    assert folder.pictures() == {"samples.png": Path("a/samples.png")}
    assert sorted(os.listdir("a")) == ["notes.png", "samples.png", "summary.json"]
