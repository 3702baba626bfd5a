import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import push
import pytest
import stability
import timm
import torch
import train
import yaml
from datasets import DatasetDict, Image
from PIL import Image as PILImage
from recipe_processes import ROOT, exit_status, launch, start_recipe
from safetensors.torch import load_file
from sklearn.svm import SVC
from timm.data import create_transform, resolve_model_data_config

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, StreamedSet, digits, load_splits
from timm_jem.evaluation import frechet_distance
from timm_jem.files import fingerprint
from timm_jem.pixels import to_pixels
from timm_jem.training import ModelConfig, Settings, TrainConfig, check_plan, damage, parse_settings, record
from timm_jem.training.learner import Learner
from timm_jem.training.run_folder import RunFolder

SHORT = (
    "--train.threads 1 --train.steps 4 --train.batch_size 16 --train.sample_steps [1,2] "
    "--train.sample_count 40 --sgld.num_steps 5"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = "--train.sample_every 2 --train.eval_every 2 --train.log_every 1"
    output = folder / "output.txt"
    process = start_recipe("train.py", shlex.split(f"{SHORT} {flags}"), folder, {"ACCELERATE_USE_CPU": "true"}, output)
    assert exit_status(process) == 0, output.read_text()
    assert "test accuracy" in output.read_text()
    return folder / "runs" / "digits"


def test_everything_is_written(run):
    names = {"buffer.png", "checkpoints", "config.yaml", "metrics.jsonl", "model", "samples.png", "summary.json"}
    assert set(os.listdir(run)) == names | {"samples_000002.png", "samples_000004.png"}
    summary = json.loads((run / "summary.json").read_text())
    assert {"test_accuracy", "test_ece", "val_accuracy", "seconds", "seconds_per_step"} <= set(summary)
    assert summary["steps"] == 4
    assert summary["sample_steps"] in (5, 10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_accuracy" in line] == [2, 4]
    assert {"ce", "gap_xy", "energy_data", "energy_neg", "lr"} <= set(lines[0])
    assert all(line["lr"] > 0 for line in lines if "loss" in line)  # of the step itself: the cosine is 0 after the last
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["train"]["steps"], config["sgld"]["num_steps"], config["model"]["name"]) == (4, 5, "wrn_10_1")
    picture = PILImage.open(run / "samples.png")
    assert picture.height == 10 * 42 + 2  # one row a class


def test_a_stopped_run_is_saved_where_there_is_no_room_for_its_snapshots():
    def write(extra, *, snapshots=True, interim):
        assert interim
        if snapshots:
            raise InputError("no room")
        written.append(extra)

    written, said = [], []
    stopped = SimpleNamespace(step=3, save=write)
    of_run = SimpleNamespace(
        settings=Settings(), state_dict=lambda: {"seconds": 1.0}, say=said.append, patiently=lambda tried: tried()
    )
    train.save(stopped, of_run, needed=False, interim=True)
    assert (written, said) == ([], ["no room; training goes on"])
    train.save(stopped, of_run, needed=True, interim=True)
    assert written == [{"seconds": 1.0}]


def test_what_is_reported_is_what_is_saved(run):
    summary = json.loads((run / "summary.json").read_text())
    jem = timm_jem.from_pretrained(run / "model")
    assert jem.provenance["results_of"] == fingerprint(jem.backbone.state_dict())
    plain = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    test = load_splits(DataConfig()).test
    with torch.no_grad():
        logits = jem(jem.normalize(to_pixels(test.images)))
        assert torch.equal(logits, plain(jem.normalize(to_pixels(test.images))))
    assert (logits.argmax(1) == test.labels).double().mean().item() == summary["test_accuracy"]
    assert jem.sgld.sample_steps == summary["sample_steps"]
    assert jem.sgld.num_steps == 5
    assert jem.class_names == [str(i) for i in range(10)]
    assert jem.provenance["dataset"] == "digits"


def test_timms_own_transform_sees_what_training_saw(run):
    jem, plain = timm_jem.from_pretrained(run / "model"), timm.create_model(f"local-dir:{run / 'model'}")
    transform = create_transform(**resolve_model_data_config(plain))
    noise = torch.randint(256, (24, 17), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for size in ((17, 24), (8, 8), (30, 8)):
        photo = PILImage.fromarray(noise.numpy()).resize(size)
        apart = (transform(photo) - jem.model_input(photo)[0]).abs().max() * 127.5
        assert apart < 1.5  # grey levels: PIL and PyTorch round apart


def test_a_run_repeats_from_its_own_config(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--config", f"{run}/config.yaml", "--output_dir", "again"])
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_broken_images_that_are_met_after_training_are_found_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = digits().select(range(200)).cast_column("image", Image(decode=False))
    junk = rows.select(range(40)).map(lambda _: {"image": {"bytes": b"junk", "path": "a.png"}})
    DatasetDict(train=rows, test=junk).save_to_disk("rows")
    with pytest.raises(InputError, match=r"row 0 of split test \(a\.png\) .* 39 more cannot be read: .*skip_broken true$"):
        train.main(shlex.split(f"{SHORT} --model.name wrn_10_1 --data.dataset ./rows --data.cache_gib 0 --output_dir run"))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config {tmp}/typo.yaml", "stepz"),  # a setting; all others are in test_settings.py
        ("--train.batch_size 5000", "lower it"),  # what does not fit the data; see test_plan.py
        ("--data.val_fraction 0.0001", "raise data.val_fraction"),
        ("--data.dataset {tmp}/nowhere.parquet", "no data set at"),
        ("--model.name vgg11 --data.image_size 1", "can't take images"),  # what can't be built
        ("--train.ce_auto_augment rnd-m9", "rnd-m9"),
        ("--output_dir {tmp}", "new folder"),
        ("--output_dir {tmp}/typo.yaml/x", "can't be made"),
        ("--resume {tmp}/nowhere", "has no checkpoints"),
        ("--resume auto --output_dir {tmp}", "new folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("train:\n  stepz: 3\n")
    argv = ["--train.steps", "1", *shlex.split(flags.format(tmp=tmp_path))]
    if not {"--output_dir", "--resume"} & set(argv):
        argv += ["--output_dir", "out"]
    with pytest.raises(InputError, match=re.escape(message)) as error:
        train.main(argv)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["typo.yaml"]


def test_a_folder_that_another_run_took_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    """Between choosing a folder and making it lie minutes of loading data and building a network."""
    monkeypatch.chdir(tmp_path)
    claimed = RunFolder.claimed

    def too_late(folder, accelerator):
        Path("runs/digits").mkdir(parents=True)
        return claimed(folder, accelerator)

    monkeypatch.setattr(RunFolder, "claimed", too_late)
    train.main([*shlex.split(SHORT), "--resume", "auto", "--train.sample_every", "2"])
    assert os.listdir("runs/digits") == []
    names = ["buffer.png", "checkpoints", "config.yaml", "metrics.jsonl", "model", "samples.png", "samples_000002.png"]
    assert sorted(os.listdir("runs/digits-2")) == [*names, "samples_000004.png", "summary.json"]


def test_errors_reach_the_shell_as_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / "train.py", "--model.name", "wrn_10_11"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown model 'wrn_10_11': did you mean wrn_10_1")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_the_shipped_configs_are_what_they_say():
    settings, _ = parse_settings(["--config", str(ROOT / "recipes/configs/cifar10_jem.yaml")])
    paper = TrainConfig()
    assert settings.train == replace(paper, warmup_steps=1000, buffer_size=10_000)  # as for the paper's data without a word
    planned = check_plan(settings, replace(load_splits(DataConfig()), image_shape=(3, 32, 32)), 1).train
    assert (planned.warmup_steps, planned.buffer_size) == (1000, 10_000)
    assert settings.sgld == timm_jem.SGLDConfig()
    assert settings.model == ModelConfig()
    digits_, _ = parse_settings([], train.DIGITS_CONFIG)
    assert digits_.data.dataset == "digits"
    assert digits_.train.data_noise > digits_.sgld.noise_std


def test_the_first_lines_tell_what_will_happen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # what accelerate launch leaves where several processes become one
    train.main(shlex.split(f"{SHORT} --train.epochs 0.2 --train.batch_size 32 --hub.every 2 --output_dir run"))
    said = capsys.readouterr()
    lines = (said.out + said.err).replace("\r", "\n").splitlines()
    told = {
        line.split()[0]: line
        for line in lines
        if line.startswith(("data ", "model ", "method ", "training  ", "memory ", "writes "))
    }
    assert told["data"].startswith("data      digits: 10 classes, 1,295 training / 143 validation / 359 test images, grey 8×8")
    assert told["model"] == "model     wrn_10_1, 77,418 parameters"
    assert told["method"].startswith(
        "method    cross-entropy + likelihood of (x, y) + 0.1 × squared energies; class-conditional"
    )
    assert told["training"] == "training  8 steps of 32 images (0.198 epochs), 0 of them to warm up; cpu, 1 process, fp32"
    assert told["memory"].startswith("memory    replay buffer of 1,000 chains 256.0 kB; about ")
    assert told["writes"] == "writes to run"
    notes = [line for line in lines if line.startswith("note: ")]
    assert notes[0] == "note: train.warmup_steps 100 would be the whole run of 8 steps: it is 0"
    assert notes[1] == "note: hub.every 2 publishes nothing without hub.push_to"
    assert notes[2].startswith("note: one process trains, though accelerate launch was asked for several")


def test_a_run_goes_on_without_what_it_started_from(tmp_path, monkeypatch, capsys):
    """Its own folder has all that rebuilds the network; the source may be moved, or the Hub away."""
    monkeypatch.chdir(tmp_path)
    silu = {"act_layer": "silu"}
    timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8), **silu).eval().save_pretrained("source")
    flags = f"{SHORT} --model.name source --train.checkpoint_every 2 --train.freeze stem --output_dir run"
    train.main(shlex.split(flags))
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"step", "val_accuracy", "val_ece"}
    assert first["step"] == 0
    said = capsys.readouterr()
    assert f"validation accuracy before the first step: {first['val_accuracy']:.4f}" in said.out + said.err
    whole = {name: Path("run", name).read_bytes() for name in ("model/model.safetensors", "metrics.jsonl", "samples.png")}
    config = json.loads(Path("run/model/config.json").read_text())
    assert config["model_args"]["act_layer"] == "silu"
    kept, saved = load_file("run/model/model.safetensors"), load_file("source/model.safetensors")
    assert torch.equal(kept["stem.weight"], saved["stem.weight"])
    shutil.rmtree("source")
    shutil.rmtree("run/checkpoints/step_00000004")
    os.unlink("run/summary.json")
    os.rename("run", "moved")
    train.main(["--resume", "moved"])
    assert "before the first step" not in "".join(capsys.readouterr())
    for name, content in whole.items():
        assert Path("moved", name).read_bytes() == content, name
    again = json.loads(Path("moved/model/config.json").read_text())
    assert {**again, "timm_jem": None} == {**config, "timm_jem": None}
    # Without a checkpoint there is nothing to go on with, and the source is asked for.
    shutil.rmtree("moved/checkpoints")
    os.unlink("moved/summary.json")
    with pytest.raises(InputError, match=r"there is no config\.json"):
        train.main(["--output_dir", "moved", "--resume", "auto"])


@pytest.mark.slow
def test_the_digits_come_out_as_the_readme_says(tmp_path):
    done = launch(f"{ROOT}/recipes/train.py", tmp_path)
    assert done.returncode == 0, done.stderr
    splits = load_splits(DataConfig())
    real = to_pixels(splits.train.images).flatten(1)
    reader = SVC(C=10).fit(real, splits.train.labels)
    jem = timm_jem.from_pretrained(tmp_path / "runs" / "digits" / "model")
    y = torch.arange(1000) % 10
    drawn = jem.denormalize(jem.sample(y=y, generator=torch.Generator().manual_seed(7))).flatten(1)
    summary = json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())
    read = (torch.from_numpy(reader.predict(drawn)) == y).float().mean().item()
    distance = frechet_distance(drawn, real)
    print(f"accuracy {summary['test_accuracy']:.3f}, ECE {summary['test_ece']:.3f}, read {read:.3f}, distance {distance:.2f}")
    assert summary["test_accuracy"] >= 0.97
    assert summary["test_ece"] < 0.06
    assert read >= 0.95
    assert distance <= 2.5


TINY = f"{SHORT} --train.steps 24 --train.warmup_steps 0 --guard.check_every 2 --guard.snapshot_every 4 --train.grad_clip 0"


def test_training_that_breaks_goes_back_and_on(tmp_path, monkeypatch):
    """A learning rate of 10,000 makes real NaNs; a remedy that is strong enough ends them."""
    monkeypatch.chdir(tmp_path)
    train.main(shlex.split(f"{TINY} --output_dir run --train.opt sgd --train.lr 1e4 --guard.ladder '[{{lr: 1.0e-7}}]'"))
    summary = json.loads(Path("run/summary.json").read_text())
    (event,) = summary["rollbacks"]
    assert summary["outcome"] == "finished"
    assert summary["steps"] == 24
    assert event["to_step"] == 0
    assert "not finite" in event["reason"]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if line.get("event") == "rollback"] == [event["reason"]]
    jem = timm_jem.from_pretrained("run/model")
    assert all(parameter.isfinite().all() for parameter in jem.parameters())
    assert jem.provenance["rollbacks"] == summary["rollbacks"]


def test_a_run_that_is_stopped_while_it_breaks_goes_back_and_on(tmp_path, monkeypatch):
    """Between two looks of the guard, which sees it only after the run has gone on."""
    iterate = Learner.iterate

    def spoiled(learner, batches):
        terms = iterate(learner, batches)
        if learner.step == 7 and learner.remedy.lr == 1:
            with torch.no_grad():
                for parameter in learner.jem.parameters():
                    parameter.mul_(1e30)
            signal.raise_signal(signal.SIGTERM)
        return terms

    monkeypatch.setattr(Learner, "iterate", spoiled)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        train.main(shlex.split(f"{TINY} --output_dir run --train.steps 12 --guard.check_every 5 --guard.snapshot_every 5"))
    assert not Path("run/summary.json").exists()
    train.main(["--resume", "run"])
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["outcome"], [event["to_step"] for event in summary["rollbacks"]]) == ("finished", [5])


def test_a_stream_that_can_not_be_read_on_leaves_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits().select(range(300)).save_to_disk("rows")
    flags = (
        f"{SHORT} --model.name wrn_10_1 --data.dataset ./rows --data.streaming true --data.stream_held_out 50 --train.workers 0"
    )
    epoch = StreamedSet.epoch

    def cut_short(stream, generator):
        yield from islice(epoch(stream, generator), 40 if stream.held_out else None)
        if stream.held_out:
            raise OSError("Couldn't deserialize thrift")

    with monkeypatch.context() as patched:
        patched.setattr(StreamedSet, "epoch", cut_short)
        message = r"can't be read on \(Couldn't .*\): .*; stopped at step 2, go on with --resume .*run$"
        with pytest.raises(InputError, match=message):
            train.main(shlex.split(f"{flags} --output_dir run"))
    assert os.listdir("run/checkpoints") == ["step_00000002"]
    train.main(["--resume", "run"])
    train.main(shlex.split(f"{flags} --output_dir whole"))
    first, second = (load_file(f"{name}/model/model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_that_can_not_be_mended_stops_with_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--train.opt sgd --train.lr 1e4 --guard.ladder '[{lr: 1.0}]' --guard.max_rollbacks 2 --train.ema_decay 0.9"
    with pytest.raises(InputError, match=r"gave up after 2 rollbacks at step \d+: .*not finite; lower train.lr"):
        train.main(shlex.split(f"{TINY} --output_dir run {flags}"))
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["outcome"] == "stopped"
    assert len(summary["rollbacks"]) == 2
    jem = timm_jem.from_pretrained("run/model")
    assert all(parameter.isfinite().all() for parameter in jem.parameters())
    # Asked to go on, it says the same.
    with pytest.raises(InputError, match="has ended: gave up"):
        train.main(["--output_dir", "run", "--resume", "auto"])


def test_every_option_at_once(tmp_path, monkeypatch):
    """What timm users expect, on few labels, with all views, trackers and schedules there are."""
    flags = (
        "--data.labels_per_class 8 --data.flip true --data.crop_padding 1 --train.ce_auto_augment rand-m5-mstd0.5 "
        "--train.ce_batch_size 12 --train.px_augment flip --train.grad_accum 2 --train.opt adamw "
        "--train.opt_kwargs.betas [0.9,0.95] --train.sched poly --train.warmup_steps 1 --train.ema_decay 0.9 "
        "--train.objective.label_smoothing 0.1 --model.drop_rate 0.1 "
        "--model.kwargs.block_drop_rate 0.1 "
        "--train.trackers [tensorboard] --train.epochs 0.1 --train.best_k 1 --train.eval_every 1 --train.sample_every 2 "
        "--train.init gaussian --train.ramp_steps 3 --train.step_cosine 0.5 --sgld.pixel_clamp 1 --sgld.grad_clamp 1 "
        "--sgld.noise_std 0 --sgld.step_decay true --train.balance true --train.sam_rho 0.1 "
        "--train.batch_norm train --model.kwargs.norm_layer batchnorm2d --train.restart_prob 0.5 --train.log_every 1"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="train.batch_norm is 'train'"):
        train.main(shlex.split(f"{SHORT} --output_dir run {flags}"))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == round(0.1 * 1295 / 32)
    (kept,) = summary["best"]
    assert os.listdir(run / "best") == [Path(kept["model"]).name]
    timm.create_model(f"local-dir:{run / kept['model']}", pretrained=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"chain_saturated", "balance", "sharpness"} <= set(next(line for line in lines if "loss" in line))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "timm_jem")).Reload()
    assert [event.step for event in events.Scalars("val_accuracy")] == list(range(1, summary["steps"] + 1))
    assert "samples" in events.Tags()["images"]


@pytest.mark.usefixtures("precision_of_its_own")
def test_bf16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--train.steps 2 --train.batch_size 4 --sgld.num_steps 1 --sgld.denoise_steps 0 --train.sample_count 4"
    train.main(shlex.split(f"{SHORT} {flags} --train.mixed_precision bf16 --output_dir run"))
    jem = timm_jem.from_pretrained("run/model")
    assert jem.provenance["mixed_precision"] == "bf16"
    assert jem.dtype == torch.float32  # the weights are; only the passes are not


@pytest.mark.parametrize("config", sorted((ROOT / "recipes/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_parse(config):
    parse_settings(["--config", str(config)])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/variants").glob("*.yaml")), ids=lambda path: path.stem)
def test_variants_parse(path):
    variants = stability.read_variants(str(path), [])
    assert stability.plan(stability.StabilityConfig(seeds=1), variants)


def test_a_stream_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits().select(range(300)).to_parquet("train-0.parquet")
    flags = "--data.dataset train-0.parquet --data.streaming true --data.stream_held_out 40 --model.name wrn_10_1"
    train.main(shlex.split(f"{SHORT} --output_dir run {flags} --train.buffer_size 200 --train.warmup_steps 0"))
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 4


def test_the_best_are_those_of_the_run_as_it_ended(tmp_path, monkeypatch):
    """A rollback goes back behind a validation; a longer run and an older checkpoint go on from what is there."""
    monkeypatch.chdir(tmp_path)
    # Breaks at the first look after the validation of step 3.
    flags = f"{TINY} --output_dir run --train.steps 8 --train.best_k 1 --train.eval_every 3 --guard.check_every 4 "
    flags += "--guard.snapshot_every 8 --train.opt sgd --train.lr 30 --guard.ladder '[{lr: 1.0e-4}]'"
    train.main(shlex.split(flags))
    summary = json.loads(Path("run/summary.json").read_text())
    assert [event["to_step"] for event in summary["rollbacks"]] == [0]
    (kept,) = summary["best"]
    assert os.listdir("run/best") == [Path(kept["model"]).name]
    timm.create_model(f"local-dir:run/{kept['model']}", pretrained=True)
    metrics = Path("run/metrics.jsonl").read_text().splitlines()
    # Longer, from its own config, in a folder that was moved; the card keeps the first command.
    os.rename("run", "moved")
    train.main(["--resume", "moved", "--train.steps", "12", "--train.checkpoint_every", "2", "--train.keep_checkpoints", "1"])
    assert Path("moved/metrics.jsonl").read_text().splitlines()[: len(metrics)] == metrics
    jem = timm_jem.from_pretrained("moved/model")
    assert (jem.provenance["steps"], "--train.lr 30" in jem.provenance["command"]) == (12, True)
    assert not Path("run").exists()
    # From an older checkpoint than the newest.
    os.unlink("moved/summary.json")
    shutil.copytree("moved/checkpoints/step_00000012", "step_00000012")
    train.main(["--resume", "moved/checkpoints/step_00000012", "--train.steps", "16", "--train.checkpoint_every", "2"])
    os.unlink("moved/summary.json")
    shutil.copytree("step_00000012", "moved/checkpoints/step_00000012")
    train.main(["--resume", "moved/checkpoints/step_00000012", "--train.steps", "14", "--train.checkpoint_every", "1"])
    assert sorted(os.listdir("moved/checkpoints")) == ["step_00000014"]  # its own keep_checkpoints
    for line in Path("moved/metrics.jsonl").read_text().splitlines():
        json.loads(line)
    # Another seed, other data, the same data elsewhere, and a finished run without checkpoints.
    os.unlink("moved/summary.json")
    config = Path("moved/config.yaml").read_text()
    with pytest.raises(InputError, match=r"train\.seed is 5 now and was 0, and a run that goes on can't"):
        train.main(["--resume", "moved", "--train.seed", "5"])
    rows = digits()
    for name, which in (("fewer", range(1700)), ("mixed", [0, 2, 1, *range(3, 1797)]), ("elsewhere", range(1797))):
        rows.select(which).to_parquet(f"{name}.parquet")
    for name in ("fewer", "mixed"):
        with pytest.raises(
            InputError, match=f"{name}.parquet is not the data of this run .*test images could move into"
        ) as error:
            train.main(["--resume", "moved", "--data.dataset", f"{name}.parquet"])
        assert "\n" not in str(error.value)
    assert Path("moved/config.yaml").read_text() == config
    elsewhere = Path("elsewhere.parquet").resolve()
    train.main(["--resume", "moved", "--data.dataset", "elsewhere.parquet", "--train.steps", "15"])
    after = yaml.safe_load(Path("moved/config.yaml").read_text())
    assert (after["data"]["dataset"], after["train"]["opt"], after["train"]["steps"]) == (str(elsewhere), "sgd", 15)
    assert timm_jem.from_pretrained("moved/model").provenance["data"] == jem.provenance["data"]
    shutil.rmtree("moved/checkpoints")
    Path("moved/summary.json").write_text('{"outcome": "finished", "steps": 14}')
    with pytest.raises(InputError, match="no complete checkpoint"):
        train.main(["--output_dir", "moved", "--resume", "auto", "--train.steps", "20"])
    assert metrics[0] in Path("moved/metrics.jsonl").read_text()


def test_an_image_that_breaks_late_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    """Images of sets that are not kept in memory are decoded when they come up."""
    monkeypatch.chdir(tmp_path)
    rows = digits().select(range(200)).cast_column("image", Image(decode=False))
    rows.to_parquet("rows.parquet")
    config = DataConfig("rows.parquet", cache_gib=0.0)
    order = np.random.default_rng([0, 0]).permutation(len(load_splits(config).train))  # seed 0, epoch 0
    ((_, numbers),) = load_splits(config).train.parts
    row = int(numbers[order[3 * 16 + 5]])  # in the fourth batch
    rows.map(
        lambda cell, i: {"image": {"bytes": b"no image", "path": None}} if i == row else cell, with_indices=True
    ).to_parquet("rows.parquet")
    flags = f"{SHORT} --output_dir run --data.dataset rows.parquet --model.name wrn_10_1 --data.cache_gib 0 "
    flags += "--train.buffer_size 200 --train.checkpoint_every 1 --train.workers 1"
    with pytest.raises(InputError, match=f"row {row} of split train has an image that can't be decoded") as error:
        train.main(shlex.split(flags))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir("run/checkpoints")) == ["step_00000002", "step_00000003"]
    assert damage("run/checkpoints/step_00000003") is None


def on_a_full_disk():
    """The kernel itself refuses to write files above a size; checkpoints have more, metrics and pictures less."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    record.WAITS = (0.01, 0.01)


def test_a_full_disk_is_one_line_and_nothing_earlier_is_lost(tmp_path, monkeypatch):
    """And with more room, it goes on."""
    flags = f"{SHORT} --output_dir run --resume auto --train.checkpoint_every 2 --train.buffer_size 200 --train.steps 6"
    output = tmp_path / "output.txt"
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONDONTWRITEBYTECODE": "1"}
    process = start_recipe("train.py", shlex.split(flags), tmp_path, environment, output, before=on_a_full_disk)
    assert exit_status(process) == 1
    assert "Traceback" not in output.read_text()
    said = output.read_text().replace("\r", "\n").splitlines()
    assert [line for line in said if "can't be written (" in line and "training goes on" in line]
    assert said[-1].startswith("error: the model can't be written")
    assert said[-1].endswith("; nothing is saved")
    for what in ("checkpoint run/checkpoints/step_00000006", "the model"):
        assert len([line for line in said if line.startswith(what) and line.endswith("trying again in 0.01 s")]) == 2
    assert not (tmp_path / "run" / "model").exists()
    assert [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")] == []
    monkeypatch.chdir(tmp_path)
    train.main(shlex.split(flags))
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_publishes_itself_and_a_run_already_done_too(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--hub.push_to user/first --hub.every 2 --hub.private true --output_dir runs/digits"
    train.main(shlex.split(f"{SHORT} {flags}"))
    said = capsys.readouterr()
    assert "pushed to" in said.err + said.out
    assert len(hub.revisions["user/first"]) == 3  # the new repository, step 2, the end
    assert "user/first" in hub.private
    hub.visibility = "private"
    assert "model-index" not in hub.find("user/first", hub.revisions["user/first"][1][0])[1]["README.md"].decode()
    card = hub.files("user/first")["README.md"].decode()
    summary = json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())
    assert f"value: {summary['test_accuracy']}" in card
    assert "samples.png" in card
    assert "--hub.push_to user/first" in card
    assert "steps: 4" in card
    assert "runs/digits" not in card
    assert f"in {summary['seconds']:.0f} s" in card
    first = timm_jem.from_pretrained("user/first")
    assert len(first.chains) == 1000
    output = tmp_path / "push.txt"
    process = start_recipe("push.py", ["runs/digits", "user/second"], tmp_path, {}, output)
    assert exit_status(process) == 0, output.read_text()
    assert "user/second" in hub.private
    first_files, second_files = hub.files("user/first"), hub.files("user/second")
    assert set(first_files) == set(second_files)
    assert all(first_files[name] == second_files[name] for name in first_files if name != "README.md")
    test = load_splits(DataConfig()).test
    logits = timm_jem.from_pretrained("user/second")(to_pixels(test.images))
    assert (logits.argmax(1) == test.labels).double().mean().item() == summary["test_accuracy"]


def test_a_card_shows_no_pictures_of_other_weights(hub, tmp_path, monkeypatch):
    """A finished run has samples.png; one that goes on from there publishes other weights on the way."""
    monkeypatch.chdir(tmp_path)
    hub.visibility = "private"
    train.main(shlex.split(f"{SHORT} --output_dir run"))
    longer = "--resume run --train.sample_every 0 --hub.push_to user/name --hub.every 5"
    for steps, pushed in ((6, 5), (11, 10)):
        train.main(shlex.split(f"{longer} --train.steps {steps}"))
        assert "user/name" in hub.private
        (before, _), (last, _) = hub.revisions["user/name"][-2:]
        on_the_way, files = hub.files("user/name", before), hub.files("user/name", last)
        assert "samples.png" in on_the_way["README.md"].decode()
        assert on_the_way["samples.png"] == Path(f"run/samples_{pushed:06d}.png").read_bytes()
        assert on_the_way["samples.png"] != files["samples.png"]
        assert files["samples.png"] == Path("run/samples.png").read_bytes()


def test_a_run_that_goes_on_is_pushed_without_pictures_of_later_weights(hub, tmp_path, monkeypatch, capsys):
    """Its model is of its earlier end until the next one."""
    monkeypatch.chdir(tmp_path)
    train.main(shlex.split(f"{SHORT} --output_dir run"))
    push.main(["run", "user/name"])
    assert {"samples.png", "buffer.png"} <= set(hub.files("user/name"))
    monkeypatch.setattr(train, "finish", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main(shlex.split("--resume run --train.steps 6 --train.sample_every 5"))
    capsys.readouterr()
    push.main(["run", "user/other"])
    assert not [name for name in hub.files("user/other") if name.endswith(".png")]
    assert "run has not come to its end" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "evaluate", "push", "stability", "benchmark"])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_what_ends_any_recipe_early_is_one_line(name, error, code, monkeypatch, capsys):
    for module in ("timm_jem.command_line", "timm_jem.training.parsing"):
        monkeypatch.setattr(f"{module}.make_parser", Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == code
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_push_that_can_not_be_is_found_before_any_work(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.fail("POST /api/repos/create", 403)
    with pytest.raises(InputError, match="403"):
        train.main(["--train.steps", "1", "--hub.push_to", "user/name"])
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="no folder 'model'"):
        push.main(["runs/digits", "user/name"])
