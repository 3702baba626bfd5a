"""Cross-entropy alone, then joint training from what it gave, in one command."""

import contextlib
import json
import shlex
import shutil
import signal

import pytest
import torch
import train
from accelerate import Accelerator
from safetensors.torch import load_file

from timm_jem import InputError
from timm_jem.training import Settings, TrainConfig
from timm_jem.training.classifier import classifier_settings
from timm_jem.training.publish import of_classifier
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import ClassifierConfig, ModelConfig

FLAGS = shlex.split(
    "--train.threads 1 --train.steps 4 --train.batch_size 16 --train.warmup_steps 0 --train.sample_steps [1] "
    "--train.sample_count 2 --train.checkpoint_every 2 --train.keep_checkpoints 9 --sgld.num_steps 5 --classifier.steps 4 "
    "--classifier.batch_size 32 --train.init gaussian --train.batch_norm frozen --train.log_every 1"
)
JOINT = ("checkpoints", "model", "metrics.jsonl", "summary.json", "samples.png", "buffer.png")


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def remove(folder, *names):
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def at_the_border(whole, tmp_path):
    """A copy of a run that ended when its classifier was done."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    remove(folder, *JOINT)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*FLAGS, "--output_dir", str(folder)])
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_are_runs(whole):
    classifier = whole / "classifier"
    assert {"config.yaml", "metrics.jsonl", "summary.json", "model", "checkpoints"} == {
        path.name for path in classifier.iterdir()
    }
    assert all("energy_data" not in line for line in lines(classifier))
    assert all("energy_data" in line for line in lines(whole) if "loss" in line)
    of_classifier = json.loads((classifier / "summary.json").read_text())
    told = json.loads((whole / "summary.json").read_text())["classifier"]
    assert told == {name: of_classifier[name] for name in told} | {"rollbacks": 0}
    assert {"test_accuracy", "test_ece", "steps", "seconds"} <= set(told)
    assert lines(whole)[0] == {"step": 0, **{name: told[name] for name in ("val_accuracy", "val_ece")}}


def test_joint_training_starts_from_the_classifier(whole, tmp_path):
    train.main([*FLAGS, "--train.lr", "1e-30", "--train.ema_decay", "0", "--output_dir", str(tmp_path / "run")])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "run" / "classifier"))
    assert same(weights(tmp_path / "run"), weights(whole / "classifier"))
    assert not same(weights(whole), weights(whole / "classifier"))


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_ended_in_the_classifier_goes_on_to_the_bit(step, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = at_the_border(whole, tmp_path)
    if step == 2:
        remove(folder / "classifier", "summary.json", "model", "checkpoints/step_00000004")
    train.main(["--resume", str(folder)])
    assert same(weights(folder), weights(whole))
    assert same(weights(folder / "classifier"), weights(whole / "classifier"))
    for part in ("", "classifier"):
        assert lines(folder / part) == lines(whole / part)


def test_a_run_that_ended_in_joint_training_goes_on_to_the_bit(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    remove(folder, *JOINT[1:], "checkpoints/step_00000004", "classifier")  # which is not needed any more
    (folder / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    train.main(["--resume", str(folder)])
    assert same(weights(folder), weights(whole))


def test_stopped_in_the_classifier(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
        with pytest.raises(SystemExit) as stopped:
            train.main([*FLAGS, "--output_dir", str(folder)])
    assert stopped.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert f"SIGTERM: stopped at step 1; go on with --resume {folder}\n" in said.out
    assert " nothing: " not in said.out + said.err  # joint training's settings are none of the classifier's
    train.main(["--resume", str(folder)])
    assert same(weights(folder), weights(whole))


def test_changes_at_the_border(whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    with pytest.raises(InputError, match=r"model\.kwargs is .* can't change it"):
        train.main(["--resume", str(folder), "--model.kwargs", "{act_layer: relu}"])
    assert "relu" not in (folder / "config.yaml").read_text()
    train.main(["--resume", str(folder), "--train.steps", "2"])
    with pytest.raises(InputError, match=r"classifier\.lr is 0\.5 .*joint training has started"):
        train.main(["--resume", str(folder), "--train.steps", "3", "--classifier.lr", "0.5"])


@pytest.mark.parametrize("told", ["--classifier.lr 0.5", "--classifier.noise 0.9", "--classifier.steps 2"])
def test_a_classifier_that_is_done_is_told_of_as_it_was_trained(told, whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    config = (folder / "config.yaml").read_text()
    with pytest.raises(InputError, match=rf"{told.split()[0].removeprefix('--')} is .* can't change it"):
        train.main(["--resume", str(folder), *told.split()])
    assert (folder / "config.yaml").read_text() == config


def test_changes_of_the_classifier_are_called_as_they_are_told(whole, tmp_path, capsys):
    folder = at_the_border(whole, tmp_path)
    remove(folder / "classifier", "summary.json", "model", "checkpoints/step_00000004")
    with pytest.raises(InputError, match=r"classifier\.opt is 'sgd' now"):
        train.main(["--resume", str(folder), "--classifier.opt", "sgd"])
    train.main(["--resume", str(folder), "--classifier.lr", "0.5", "--classifier.noise", "0.2"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "now" in line]
    assert [note.split()[1] for note in notes] == ["classifier.lr", "classifier.noise"]


def test_a_run_that_is_finished_refuses_what_it_would_refuse_before(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for told in ("--train.seed 4", "--model.name resnet18", "--classifier.lr 0.5"):
        with pytest.raises(InputError, match=rf"{told.split()[0].removeprefix('--')} is .* can't change it"):
            train.main(["--resume", str(folder), *told.split()])
    capsys.readouterr()
    train.main(["--resume", str(folder), "--sgld.num_steps", "99"])
    first, last = capsys.readouterr().out.splitlines()
    assert first == "note: sgld.num_steps is 99 now and was 5, and does nothing any more"
    assert last.startswith(f"{folder} is finished: 4 steps")
    train.main(["--resume", str(folder)])
    assert "note" not in capsys.readouterr().out


def test_what_joint_training_refuses_is_found_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        ("--train.freeze [nowhere]", "train.freeze"),
        ("--train.opt nothing", "train.opt"),
        ("--train.buffer_size 10", "train.buffer_size"),
        ("--classifier.batch_size 5000", "classifier.batch_size"),
        ("--classifier.opt nothing", r"^classifier\.opt is 'nothing'"),
    ):
        with pytest.raises(InputError, match=message):
            train.main([*FLAGS, *shlex.split(flags)])
    assert not list(tmp_path.iterdir())


def command(folder):
    return json.loads((folder / "model" / "config.json").read_text())["timm_jem"]["provenance"]["command"]


@pytest.mark.parametrize("lost", ["checkpoints", "model"])
def test_a_classifier_that_is_done_needs_no_more_than_its_model_or_checkpoints(lost, whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    remove(folder / "classifier", lost)
    train.main(["--resume", str(folder)])
    assert same(weights(folder), weights(whole))


def test_the_card_of_a_run_that_ended_in_the_classifier_repeats_it(whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    train.main(["--resume", str(folder), "--train.steps", "2"])
    assert command(folder) == f"{command(whole)} --train.steps 2"


def test_a_classifier_whose_weights_are_cut_is_made_again(whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    (folder / "classifier" / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"no weights of wrn_10_1 .*: remove it, and --resume makes it again"):
        train.main(["--resume", str(folder)])


def test_a_classifier_that_diverges(tmp_path, capsys):
    wild = "--classifier.opt sgd --classifier.lr 1e30 --guard.check_every 1 --guard.max_rollbacks 0"
    with pytest.raises(InputError, match=r"gave up .* lower classifier\.lr"):
        train.main([*FLAGS, *shlex.split(wild), "--output_dir", str(tmp_path / "run")])
    assert "no energies follow" in capsys.readouterr().out


def test_what_is_no_number_is_not_told_of_the_classifier(tmp_path):
    folder = RunFolder(tmp_path)
    for told, expected in (({"steps": 4, "val_ece": "x"}, {"classifier": {"steps": 4}}), ({"test_accuracy": None}, {})):
        folder.classifier.path.mkdir(exist_ok=True)
        folder.classifier.summary_file.write_text(json.dumps(told))
        assert of_classifier(folder) == expected


@pytest.mark.parametrize("flags", ["--classifier.steps 0", "--model.name resnet10t --model.pretrained true"])
def test_joint_training_does_not_forget_its_classifier(flags, whole, tmp_path):
    folder = at_the_border(whole, tmp_path)
    with pytest.raises(InputError, match="starts from its classifier"):
        train.main(["--resume", str(folder), *shlex.split(flags)])
    assert not (folder / "metrics.jsonl").exists()


def test_killed_before_the_first_step_of_the_classifier(tmp_path, monkeypatch):
    folder, flags = tmp_path / "run", [*FLAGS, "--resume", "auto", "--output_dir", str(tmp_path / "run")]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "perform", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    assert (folder / "classifier").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(train, "perform", killed)
        with pytest.raises(KeyboardInterrupt):  # and no error that the folder is another's
            train.main(flags)


def test_all_processes_wait_for_the_classifiers_model(tmp_path, monkeypatch):
    order, finish, build, wait = [], train.finish, train.build, Accelerator.wait_for_everyone
    monkeypatch.setattr(train, "finish", lambda *args: (finish(*args), order.append("finish")))
    monkeypatch.setattr(train, "build", lambda *args, **kwargs: (order.append("build"), build(*args, **kwargs))[1])
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: (order.append("wait"), wait(self)))
    train.main([*FLAGS, "--train.steps", "1", "--classifier.steps", "1", "--output_dir", str(tmp_path / "run")])
    first = order.index("finish")
    assert order[first : order.index("build", first)].count("wait") == 1


def test_a_source_that_is_gone_when_joint_training_starts(whole, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(whole / "model", source)
    train.main([*FLAGS, "--model.name", str(source), "--model.pretrained", "false", "--output_dir", str(folder)])
    there = weights(folder)
    remove(folder, *JOINT, "backbone")
    remove(tmp_path, "source")
    train.main(["--resume", str(folder)])
    assert same(weights(folder), there)


def test_trained_weights_need_no_classifier(whole, tmp_path):
    folder = tmp_path / "run"
    train.main([*FLAGS, "--model.name", str(whole / "classifier"), "--output_dir", str(folder)])
    assert not (folder / "classifier").exists()
    assert same(weights(folder), weights(whole))


def test_settings_of_the_classifier():
    told = Settings(
        classifier=ClassifierConfig(steps=7, lr=0.1, noise=0.2), train=TrainConfig(freeze=["stem"], best_k=3, sam_rho=2.0)
    )
    of_classifier = classifier_settings(told)
    train_config = of_classifier.train
    assert (train_config.steps, train_config.lr, train_config.data_noise, train_config.freeze) == (7, 0.1, 0.2, [])
    assert train_config.sam_rho == 0  # joint training's own
    assert not train_config.objective.needs_chains
    assert classifier_settings(of_classifier) is None
    assert classifier_settings(Settings()) is None
    assert classifier_settings(Settings(classifier=ClassifierConfig(epochs=0.5))).train.epochs == 0.5
    pretrained = ModelConfig(name="resnet18", pretrained=True)
    assert classifier_settings(Settings(model=pretrained, classifier=ClassifierConfig(steps=7))) is None


@pytest.mark.parametrize(
    "wrong",
    [{"steps": -1}, {"steps": 1.5}, {"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"lr": float("nan")}, {"weight_decay": -1},
     {"ema_decay": 2}, {"noise": -0.1}],
)  # fmt: skip
def test_wrong_values(wrong):
    with pytest.raises(InputError, match=f"classifier {next(iter(wrong))}"):
        ClassifierConfig(**wrong)
