"""The end of a run: what is reported is what is saved, and in which order."""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation import accuracy, expected_calibration_error, predict
from timm_jem.evaluation.calibration import fit_temperature
from timm_jem.models.names import weights_id
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels
from timm_jem.temperature import is_told
from timm_jem.training import Checkpoints, DivergenceGuard, Rollback, Run, check_plan, open_accelerator, parse_settings
from timm_jem.training import finish as end
from timm_jem.training.build import build_learner, build_stream
from timm_jem.training.measure import in_batches
from timm_jem.training.record import Record
from timm_jem.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("precision_of_its_own")

SHORT = (
    "--data.dataset digits --model.name wrn_10_1 --train.threads 1 --train.steps 2 --train.batch_size 8 "
    "--train.buffer_size 200 --train.sample_steps [1,2] --train.sample_count 20 --sgld.num_steps 2 --sgld.denoise_steps 1 "
    "--train.lr 0.01 --train.warmup_steps 0"
)


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig())


def trained(folder: Path, splits, flags: str = ""):
    """Settings, splits, run and record of a run whose steps are done."""
    settings, command = parse_settings(shlex.split(f"{SHORT} {flags}"))
    settings = check_plan(settings, splits, 1)
    accelerator = open_accelerator(settings.train)
    learner = build_learner(settings, splits, accelerator)
    run = Run(
        learner,
        build_stream(settings, splits, learner),
        DivergenceGuard(settings.guard, accelerator, 10, learner.method.watched),
        Checkpoints(folder / "checkpoints", accelerator),
    )
    record = Record(RunFolder(folder), accelerator, settings, command)
    record.folder.path.mkdir(parents=True)
    record.open(0)
    while run.step < settings.train.steps:
        run.advance()
        record.advanced()
    return settings, splits, run, record


@pytest.mark.parametrize("flags", ["", "--train.mixed_precision bf16", "--train.mixed_precision bf16 --train.ema_decay 0.5"])
def test_what_is_reported_is_what_is_saved(tmp_path, splits, flags):
    settings, _, run, record = trained(tmp_path / "run", splits, flags)
    in_training, published = run.learner.jem, run.learner.published()
    if "bf16" in flags and run.learner.ema is None:  # the same weights, in another precision
        x = published.normalize(to_pixels(splits.test.images[:8]))
        with torch.no_grad(), frozen(in_training):
            assert not torch.equal(in_training(x), published(x))
    end.finish(settings, splits, run, record)
    saved = timm_jem.from_pretrained(tmp_path / "run" / "model")
    assert saved.dtype == published.dtype == torch.float32
    saved.to(memory_format=torch.channels_last)  # the layout of training, which rounds sums in its own order
    logits, _ = predict(saved, in_batches(splits.test, 0))
    assert torch.equal(logits, predict(published, in_batches(splits.test, 0))[0])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] == accuracy(logits, splits.test.labels)
    assert summary["test_ece"] == expected_calibration_error(logits.softmax(1), splits.test.labels)
    assert (summary["outcome"], summary["explanation"], summary["steps"]) == ("finished", None, 2)
    assert summary["sample_steps"] == saved.sgld.sample_steps
    assert summary["sample_steps"] in (2, 4)
    assert summary["seconds_per_step"] == summary["seconds"] / 2
    assert saved.provenance["mixed_precision"] == ("bf16" if "bf16" in flags else "no")
    told = " --mixed_precision bf16" if "bf16" in flags else ""
    assert saved.provenance["command"].startswith(f"accelerate launch{told} recipes/train.py --data.dataset")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert config.startswith(f"# 1 process on cpu, precision {saved.provenance['mixed_precision']}\n")
    assert yaml.safe_load(config)["train"]["mixed_precision"] == saved.provenance["mixed_precision"]
    assert {result["value"] for result in saved.provenance["results"]} == {summary["test_accuracy"], summary["test_ece"]}


def test_chains_that_have_not_grown_yet_draw_with_a_step_of_noise_at_least(tmp_path, splits):
    flags = "--train.ramp_auc 1.0 --train.sample_steps [1] --sgld.num_steps 4 --sgld.denoise_steps 3"
    end.finish(*trained(tmp_path / "run", splits, flags))
    assert timm_jem.from_pretrained(tmp_path / "run" / "model").sgld.sample_steps == 4


def test_a_length_that_was_told_is_kept(tmp_path, splits):
    end.finish(*trained(tmp_path / "run", splits, "--sgld.sample_steps 7"))
    assert timm_jem.from_pretrained(tmp_path / "run" / "model").sgld.sample_steps == 7
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["sample_steps"], "val_frechet_by_steps" in summary) == (7, False)


def test_chains_rest_as_soon_as_it_is_known_where(tmp_path, splits):
    settings, _, run, record = trained(tmp_path / "run", splits, "--sgld.rest 0.2")
    record.samples(run.step, run.learner.published().eval(), "early.png")  # on the way
    end.finish(settings, splits, run, record)
    saved = timm_jem.from_pretrained(tmp_path / "run" / "model")
    assert saved.sgld.rest == 0.2
    assert len(saved.reference.medians) == 10
    assert saved.sample(y=[0, 1], seeds=[0, 1]).isfinite().all()


def test_a_run_leaves_a_reference_of_its_validation_images_and_nothing_else_changes(tmp_path, splits, monkeypatch):
    end.finish(*trained(tmp_path / "run", splits))
    saved = timm_jem.from_pretrained(tmp_path / "run" / "model")
    logits, y = predict(saved, in_batches(splits.val, 0))
    assert saved.reference.n == len(splits.val)
    assert saved.reference.temperature is None  # two steps leave nothing to calibrate
    assert not is_told(logits, y, fit_temperature(logits, y))
    assert saved.reference.medians is not None  # it has seen labels
    assert 0.95 <= (timm_jem.energy(logits) <= saved.reference.threshold + 1e-4).double().mean() < 0.97
    monkeypatch.setattr(timm_jem.JEM, "fit_reference", lambda self, batches: None)
    end.finish(*trained(tmp_path / "without", splits))
    for name in ("model/model.safetensors", "model/replay_buffer.safetensors", "samples.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_launchers_precision_is_kept_with_the_run(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settings, _ = parse_settings(shlex.split(SHORT))
    assert settings.train.mixed_precision is None
    open_accelerator(settings.train)
    assert settings.sections()["train"]["mixed_precision"] == "bf16"


@pytest.mark.parametrize(("chains", "advice"), [(True, "sgld.noise_std"), (False, "lower train.lr, or take a smooth")])
def test_advice_is_about_what_the_run_has(tmp_path, chains, advice):
    flags = "" if chains else "--train.objective.w_x 0"
    settings, _ = parse_settings(shlex.split(f"{SHORT} {flags}"))
    told = end._explanation(Rollback(7, 2, "gap not finite", None), SimpleNamespace(rollbacks=[]), settings)
    assert told.startswith("gave up after 0 rollbacks at step 7: gap not finite; lower train.lr")
    assert advice in told
    assert ("sgld" in told) == chains


def test_a_model_that_can_not_be_saved_says_what_there_is(tmp_path, splits, monkeypatch):
    settings, _, run, record = trained(tmp_path / "run", splits)
    monkeypatch.setattr("timm_jem.training.record.WAITS", (0.0,))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_jem.hub.folder.save_for_hf", full)
    run.save(record.state_dict())
    told = r"No space left on device.*; the checkpoint of step 2 is whole: go on with --resume \S+/run$"
    with pytest.raises(InputError, match=told):
        end.finish(settings, splits, run, record)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.yaml", "metrics.jsonl"]


def test_a_run_that_gave_up_leaves_its_last_good_model(tmp_path, splits, monkeypatch):
    settings, _, run, record = trained(tmp_path / "run", splits, "--hub.push_to user/name")
    monkeypatch.setattr(end, "push", pytest.fail)
    run.rollbacks = [{"step": 5, "to_step": 2, "reason": "loss not finite", "remedy": "lr × 0.5"}]
    with pytest.raises(
        InputError, match=r"training gave up after 1 rollback at step 7: gap not finite; lower .*, of step 2, is in"
    ):
        end.finish(settings, splits, run, record, Rollback(7, 2, "gap not finite", None))
    summary = record.folder.summary()
    assert (summary["outcome"], summary["steps"], summary["rollbacks"]) == ("stopped", 2, run.rollbacks)
    saved = timm_jem.from_pretrained(tmp_path / "run" / "model")
    assert (saved.provenance["outcome"], saved.provenance["explanation"]) == ("stopped", summary["explanation"])
    with pytest.raises(InputError, match="has ended: gave up"):
        record.folder.finished(2)


def test_the_model_is_on_disk_before_any_chain_is_drawn(tmp_path, splits, monkeypatch):
    settings, _, run, record = trained(tmp_path / "run", splits)

    def no_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(end, "best_num_steps", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        end.finish(settings, splits, run, record)
    assert timm_jem.from_pretrained(tmp_path / "run" / "model").provenance["steps"] == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", "metrics.jsonl", "model"]
    assert record.folder.finished(2) is None


@pytest.mark.parametrize(
    ("w_x", "what"), [(1, r"; look at \S+/run/samples\.png"), (0, r"; p\(x\) was not .* --model\.name \S+/run ")]
)
def test_a_classifiers_samples_are_not_shown_off(tmp_path, splits, capsys, w_x, what):
    end.finish(*trained(tmp_path / "run", splits, f"--train.objective.w_x {w_x}"))
    assert re.search(what, capsys.readouterr().out)


def test_a_hub_that_says_no_loses_nothing(tmp_path, splits, monkeypatch):
    settings, _, run, record = trained(tmp_path / "run", splits, "--hub.push_to user/name")
    asked = []

    def refuse(jem, settings, record, message, pictures):
        asked.append((message, dict(pictures)))
        raise InputError("the Hub answers 403: no")

    monkeypatch.setattr(end, "push", refuse)
    with pytest.raises(InputError, match=r"403: no; the run is whole: python recipes/push\.py \S+/run user/name"):
        end.finish(settings, splits, run, record)
    assert record.folder.finished(2) == 2
    pictures = {name: tmp_path / "run" / name for name in ("samples.png", "buffer.png")}
    assert asked == [("wrn_10_1 after 2 steps on digits", pictures)]


def test_a_revision_is_no_part_of_the_base_model():
    assert weights_id("hf-hub:user/name@main", {}) == weights_id("hf-hub:user/name", {}) == "user/name"


def test_the_base_model_is_that_of_the_weights():
    def base(**kwargs) -> str | None:
        return weights_id("resnet18", kwargs)

    assert base() == "timm/resnet18.a1_in1k"
    assert base(pretrained_cfg="tv_in1k") == "timm/resnet18.tv_in1k"
    for elsewhere in ({"file": "weights.safetensors"}, timm.get_pretrained_cfg("resnet18")):
        assert base(pretrained_cfg=elsewhere) is None
    assert base(checkpoint_path="model_best.pth.tar") is None
