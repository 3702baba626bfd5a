import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from timm_jem import InputError, ReplayBuffer, uniform_noise
from timm_jem.training import Remedy, Rollback, Settings, TrainConfig, parse_settings
from timm_jem.training.record import Record, _flat
from timm_jem.training.run_folder import RunFolder


def make(path: Path, command=(), **train) -> Record:
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    return Record(folder, Accelerator(cpu=True), Settings(train=TrainConfig(**{"steps": 10, **train})), command)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class Model:
    """Saved as a folder with its name in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder, *, replay_buffer):
        assert not replay_buffer
        folder.mkdir(parents=True)
        (folder / "name").write_text(self.name)


def test_an_opened_record_has_settings_and_metrics_alone(tmp_path):
    record = make(tmp_path / "a")
    record.open(0)
    record.close()
    assert sorted(os.listdir(tmp_path / "a")) == ["config.yaml", "metrics.jsonl"]
    assert (tmp_path / "a" / "config.yaml").read_text() == (f"# 1 process on cpu, precision no\n{record.settings.as_yaml()}")
    assert lines(tmp_path / "a") == []


def test_steps_that_a_run_was_told_later_are_those_of_its_command(tmp_path):
    first, then = make(tmp_path / "a", ["--train.epochs", "1"]), make(tmp_path / "b", ["--train.steps=7"])
    first.open(0)
    then.load_state_dict(first.state_dict())
    first.close()
    assert then.command == ["--train.epochs", "1", "--train.epochs", "null", "--train.steps=7"]
    told, _ = parse_settings(["--data.dataset", "digits", *then.command])
    assert (told.train.steps, told.train.epochs) == (7, None)


def test_metrics_are_lines_of_json(tmp_path):
    record = make(tmp_path / "a")
    record.open(0)
    record.log(1, {"loss": torch.tensor(0.5), "val_accuracy": 0.25}, lr=0.125)
    record.log(2, {"loss": torch.tensor(1.5)})
    assert lines(tmp_path / "a") == [  # on disk at once
        {"step": 1, "lr": 0.125, "loss": 0.5, "val_accuracy": 0.25},
        {"step": 2, "loss": 1.5},
    ]
    record.close()


def test_lines_that_a_full_disk_does_not_take_wait(tmp_path, capsys):
    record = make(tmp_path / "a")
    record.open(0)
    record.log(1, {"loss": 0.5})
    file, room = record._metrics, [5]  # bytes

    def write(content):
        if not room:
            return file.write(content)
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        taken = file.write(content[: room[0]])
        room[0] -= taken
        return taken

    record._metrics = SimpleNamespace(
        closed=False, write=write, tell=file.tell, truncate=file.truncate, seek=file.seek, fileno=file.fileno, close=file.close
    )
    for step in (2, 3):
        record.log(step, {"loss": 0.5})
        assert [line["step"] for line in lines(tmp_path / "a")] == [1]
    assert record.state_dict()["metrics_bytes"] == (tmp_path / "a" / "metrics.jsonl").stat().st_size
    said = capsys.readouterr()
    assert (said.out + said.err).count("can't be written ([Errno 28] No space left on device): its lines wait") == 1
    room.clear()
    record.log(4, {"loss": 0.5})
    record.close()
    assert [line["step"] for line in lines(tmp_path / "a")] == [1, 2, 3, 4]


def test_what_the_disk_refuses_is_tried_again(tmp_path, monkeypatch, capsys):
    record = make(tmp_path / "a")
    record.open(0)
    waited, tries = [], []
    monkeypatch.setattr("timm_jem.training.record.time.sleep", waited.append)

    def write(error, cause, succeeds_at):
        tries.append(0)
        if len(tries) < succeeds_at:
            raise error from cause
        return "written"

    full = OSError(28, "No space left on device")
    assert record.patiently(lambda: write(InputError("no model"), full, 3)) == "written"
    assert waited == [1, 5]
    said = capsys.readouterr()
    assert "no model; trying again in 5 s" in said.out + said.err
    tries.clear()
    with pytest.raises(OSError, match="No space left"):
        record.patiently(lambda: write(full, None, 9))
    assert (len(tries), len(waited)) == (4, 5)
    tries.clear()
    with pytest.raises(InputError, match="no model"):  # no disk's fault
        record.patiently(lambda: write(InputError("no model"), None, 9))
    assert len(tries) == 1
    record.close()


def test_pictures_that_can_not_be_written_are_left_out(tmp_path, monkeypatch, capsys):
    record = make(tmp_path / "a")
    record.open(0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    record.picture(1, "samples.png", Image.new("L", (2, 2)))
    record.close()
    said = capsys.readouterr()
    assert "samples.png can't be written ([Errno 28] No space left on device) and is left out" in said.out + said.err
    assert sorted(os.listdir(tmp_path / "a")) == ["config.yaml", "metrics.jsonl"]


def test_settings_that_can_not_be_written_are_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    record = make(tmp_path / "a")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"config\.yaml can't be written \(.*No space left on device\): make room"):
        record.open(0)


def test_numbers_go_to_trackers_as_well(tmp_path):
    record = make(tmp_path / "a")
    record.open(0)
    seen, pictures = [], []
    record.accelerator = SimpleNamespace(
        is_main_process=True,
        log=lambda values, step: seen.append((step, values)),
        reduce=lambda tensor, how: tensor,
        trackers=[
            SimpleNamespace(name="tensorboard", log_images=lambda images, step, **how: pictures.append((images, step, how)))
        ],
    )
    record.log(3, {"loss": torch.tensor(0.5), "event": "rollback"}, lr=0.25)
    assert seen == [(3, {"loss": 0.5, "lr": 0.25})]
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    record.picture(7, "samples_000007.png", picture)
    ((images, step, how),) = pictures
    assert (list(images), step, how) == (["samples"], 7, {"dataformats": "NHWC"})
    assert (images["samples"][0] == np.asarray(picture)).all()
    assert (np.asarray(Image.open(tmp_path / "a" / "samples_000007.png")) == np.asarray(picture)).all()
    buffer = ReplayBuffer((1, 8, 8), init=uniform_noise, generator=torch.Generator(), capacity=3)
    record.chains(8, buffer)
    assert list(pictures[-1][0]) == ["buffer"]
    record.settings.data.starts = "user/photos"  # which chains may show
    record.chains(9, buffer)
    assert [step for _, step, _ in pictures] == [7, 8]
    assert (tmp_path / "a" / "chains.png").is_file()
    record.close()


def test_a_run_that_goes_on_the_same_way_has_the_same_command(tmp_path, capsys):
    saved = make(tmp_path / "a", ["--train.lr", "1"])
    saved.settings.hub.push_to = "user/name"
    saved.open(0)
    state = saved.state_dict()
    saved.close()
    for flags in (["--train.lr", "1"], []):
        again = make(tmp_path / "a", flags)
        again.load_state_dict(state)
        assert again.command == ["--train.lr", "1"]
    assert "give --hub.push_to user/name again" in capsys.readouterr().out


def test_a_run_that_goes_on_cuts_its_metrics_to_the_checkpoint(tmp_path):
    record = make(tmp_path / "a", ["--train.lr", "1"])
    record.open(0)
    for step in (1, 2):
        record.log(step, {"loss": torch.tensor(float(step))})
    saved = record.state_dict()
    record.log(3, {"loss": torch.tensor(3.0)})
    record._metrics.write(b'{"step": 4, "lo')  # killed while it wrote
    record.close()
    again = make(tmp_path / "a", ["--other"])
    again.load_state_dict(saved)
    again.open(2)
    again.log(3, {"loss": torch.tensor(-3.0)})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "a")] == [(1, 1.0), (2, 2.0), (3, -3.0)]
    assert again.command == ["--train.lr", "1", "--other"]  # what was said later counts
    # A run that starts anew in the folder has metrics of its own; one whose file was shortened goes on at its end.
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    shorter = make(tmp_path / "a")
    shorter.load_state_dict(saved)
    shorter.open(2)
    shorter.log(3, {})
    shorter.close()
    assert lines(tmp_path / "a") == [{"step": 1}, {"step": 3}]
    anew = make(tmp_path / "a")
    anew.open(0)
    anew.close()
    assert lines(tmp_path / "a") == []


def test_a_run_that_goes_on_counts_the_best_models_that_are_there(tmp_path):
    """One that was displaced after the checkpoint, by a better one that is forgotten now, keeps no place."""
    record = make(tmp_path / "a", best_k=1)
    record.open(0)
    record.keep_best(4, 0.5, lambda: Model("4"))
    saved = record.state_dict()
    record.keep_best(8, 0.6, lambda: Model("8"))
    record.close()
    again = make(tmp_path / "a", best_k=1)
    again.load_state_dict(saved)
    again.open(5)
    assert again.best == []
    again.keep_best(8, 0.4, lambda: Model("8"))
    assert again.best == [[0.4, 8]]
    again.close()


@pytest.mark.parametrize(
    "odd",
    [{"seconds": "x"}, {"metrics_bytes": -5}, {"metrics_bytes": "q"}, {"best": [[0.5, "1"]]}, {"best": [[None, 1]]}],
    ids=str,
)
def test_a_record_of_a_checkpoint_that_was_changed_is_refused(tmp_path, odd):
    record = make(tmp_path / "a")
    record.open(0)
    state = record.state_dict()
    record.close()
    with pytest.raises(InputError, match="in the checkpoint"):
        make(tmp_path / "a").load_state_dict(state | odd)


def test_what_was_set_otherwise_is_said(tmp_path, capsys):
    saved = make(tmp_path / "a", lr=0.5, opt_kwargs={"betas": [0.9, 0.95]})
    saved.open(0)
    state = saved.state_dict()
    saved.close()
    capsys.readouterr()
    make(tmp_path / "a", lr=0.25).load_state_dict(state)
    assert capsys.readouterr().out.splitlines() == [
        "note: train.lr is 0.25 now and was 0.5",
        "note: train.opt_kwargs.betas was [0.9, 0.95] and is not set now",
    ]


def test_the_best_models_are_kept_and_others_removed(tmp_path):
    record = make(tmp_path / "a", best_k=2)
    record.open(0)

    def validate(step, value):
        record.keep_best(step, value, lambda: Model(str(step)))
        return sorted(int((folder / "name").read_text()) for folder in (tmp_path / "a" / "best").iterdir())

    assert validate(1, 0.5) == [1]
    assert validate(2, 0.7) == [1, 2]
    assert validate(3, 0.5) == [1, 2]  # of equals, the earlier
    assert validate(4, 0.6) == [2, 4]
    assert validate(5, 0.1) == [2, 4]
    assert record.best == [[0.7, 2], [0.6, 4]]
    # Training goes back behind one of them.
    record.rollback(Rollback(6, 3, "loss not finite", Remedy(lr=0.5)))
    assert record.best == [[0.7, 2]]
    assert os.listdir(tmp_path / "a" / "best") == ["step_00000002"]
    assert validate(4, 0.2) == [2, 4]
    record.close()
    # A run resumed from step 2 has them as they were then.
    again = make(tmp_path / "a", best_k=2)
    again.best = [[0.7, 2]]
    again.open(2)
    again.close()
    assert os.listdir(tmp_path / "a" / "best") == ["step_00000002"]


def test_rollbacks_are_in_the_metrics_and_the_last_word_is_not(tmp_path):
    record = make(tmp_path / "a")
    record.open(0)
    record.rollback(Rollback(6, 3, "loss not finite", Remedy(lr=0.5)))
    event = {"step": 6, "event": "rollback", "to_step": 3, "reason": "loss not finite", "remedy": "lr × 0.5"}
    assert lines(tmp_path / "a") == [event]
    record.rollback(Rollback(6, 3, "loss not finite", None))
    assert lines(tmp_path / "a") == [event]
    record.close()


def test_seconds_are_those_of_training(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("timm_jem.training.record.time.perf_counter", lambda: now[0])
    record = make(tmp_path / "a")
    now[0] += 50  # resuming, say
    record.open(0)
    now[0] += 10
    with record.not_training():
        now[0] += 1000
    now[0] += 5
    state = record.state_dict()
    assert state["seconds"] == 15
    now[0] += 2
    record.close()
    assert record.seconds == 17
    again = make(tmp_path / "a")
    again.load_state_dict(state)
    again.open(3)
    now[0] += 4
    again.close()
    assert again.seconds == 19


def test_pictures_of_chains(tmp_path):
    record = make(tmp_path / "a", batch_size=7)
    record.open(0)
    record.chains(1, None)  # a method without any
    assert not (tmp_path / "a" / "buffer.png").exists()
    rng = torch.Generator().manual_seed(0)
    for capacity, rows in ((1000, 10), (30, 3)):
        record.chains(1, ReplayBuffer((1, 8, 8), init=uniform_noise, generator=rng, capacity=capacity, restart_prob=0.0))
        assert Image.open(tmp_path / "a" / "buffer.png").height > 8 * rows
    asked = []

    def sample(**how):
        asked.append(how)
        return torch.zeros(len(how["y"]), 1, 8, 8)

    jem = SimpleNamespace(num_classes=30, class_names=None, sample=sample, denormalize=lambda x: x)
    record.samples(4, jem, "samples.png")
    (how,) = asked
    assert how["y"].tolist() == [c for c in range(20) for _ in range(10)]
    assert (how["batch_size"], list(how["seeds"])) == (7, list(range(200)))
    assert (tmp_path / "a" / "samples.png").is_file()
    record.close()


def test_a_best_model_that_the_disk_does_not_take_ends_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_jem.training.record.WAITS", (0.0,))
    record = make(tmp_path / "a", best_k=1)
    record.open(0)
    record.keep_best(1, 0.5, lambda: Model("1"))

    class Refused(Model):
        def save_pretrained(self, folder, *, replay_buffer):
            raise self.error from self.cause

    full = Refused("2")
    full.error, full.cause = InputError("the model can't be written"), OSError(28, "No space left on device")
    record.keep_best(2, 0.7, lambda: full)
    assert "the model can't be written; training goes on" in "".join(capsys.readouterr())
    assert record.best == [[0.5, 1]]
    assert os.listdir(tmp_path / "a" / "best") == ["step_00000001"]
    full.error, full.cause = InputError("this backbone can't be saved for timm"), None  # nor can it be at the end
    with pytest.raises(InputError, match="for timm"):
        record.keep_best(3, 0.8, lambda: full)
    record.close()


def test_another_process_writes_nothing(tmp_path):
    record = make(tmp_path / "a")
    accelerator = SimpleNamespace(is_main_process=False, trackers=[], log=pytest.fail, reduce=lambda tensor, how: tensor)
    record.accelerator = accelerator
    record.open(0)
    record.log(1, {"loss": torch.tensor(1.0)})
    record.say("a word")
    record.rollback(Rollback(6, 3, "loss not finite", Remedy(lr=0.5)))
    record.keep_best(1, 0.5, lambda: Model("1"))
    record.chains(1, None)
    assert record.state_dict()["metrics_bytes"] == 0
    record.close()
    assert os.listdir(tmp_path / "a") == []


def test_trackers_see_no_local_path(tmp_path, monkeypatch):
    record = make(tmp_path / "a")
    record.settings.data.dataset, record.settings.train.trackers = str(tmp_path / "acme" / "photos"), ["wandb"]
    told = {}
    monkeypatch.setattr(record.accelerator, "init_trackers", lambda _, config, **__: told.update(config), raising=False)
    monkeypatch.setattr(record.accelerator, "project_configuration", SimpleNamespace(), raising=False)
    record.open(0)
    assert told["data.dataset"] == "./photos"
    record.close()


def test_settings_are_flat_for_trackers():
    assert _flat({"a": {"b": 1, "c": {"d": None, "e": [1]}}, "f": True}) == {
        "a.b": 1,
        "a.c.d": "None",
        "a.c.e": "[1]",
        "f": True,
    }
