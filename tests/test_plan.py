"""What settings and data must agree on, and what can't be built, in milliseconds."""

import copy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.training import check_plan, parse_settings
from timm_jem.training.build import build_learner, build_model, build_stream

DIGITS = Path(__file__).parent.parent / "recipes" / "configs" / "digits.yaml"


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig())


def settings(flags=""):
    return parse_settings(shlex.split(flags), DIGITS)[0]


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ("--train.batch_size 5000", 1, "is 5000 with 1295 training images: lower it"),
        ("--train.batch_size 650", 2, "is 1300 with 1295 training images: lower it"),
        ("--model.num_classes 7", 1, "digits has 10 classes: leave it out"),
        ("--train.buffer_size 100", 1, "a batch may need 64 chains of one class: raise it to 640"),
        ("--train.buffer_size 60 --train.objective.w_xy 0 --train.objective.w_x 1", 1, "64 chains: raise it to 64"),
        ("--train.batch_size 600 --train.buffer_size 1000", 1, "of one class: raise it to 2620, or lower"),
    ],
)
def test_what_does_not_fit_the_data_is_said(splits, flags, world, message):
    with pytest.raises(InputError) as error:
        check_plan(settings(flags), splits, world)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fits(splits):
    told = settings()
    assert check_plan(told, splits, 1) == told
    most = 2 * int(splits.train.labels.bincount().max())
    for flags, world in (
        ("--train.batch_size 647 --train.buffer_size 2640", 2),
        ("--model.num_classes 10", 1),
        (f"--train.batch_size 1000 --train.buffer_size {most * 10}", 1),
        ("--train.buffer_size 64 --train.objective.w_xy 0 --train.objective.w_x 1", 1),
        ("--train.buffer_size 1 --train.objective.w_xy 0", 1),  # cross-entropy alone
        ("--train.ema_decay 0", 1),
    ):
        check_plan(settings(flags), splits, world, sharded=told.train.ema_decay == 0)


def test_few_validation_images_are_too_few(splits):
    few = replace(splits, val=copy.copy(splits.val))
    few.val.labels = few.val.labels[:1]
    with pytest.raises(InputError, match=r"1 validation images are too few .*: raise data\.val_fraction"):
        check_plan(settings(), few, 1)


def test_an_average_of_shards_is_refused(splits):
    with pytest.raises(InputError, match="FSDP shards them: set it to 0"):
        check_plan(settings(), splits, 1, sharded=True)
    check_plan(settings("--train.ema_decay 0"), splits, 1, sharded=True)


@pytest.mark.parametrize(
    ("flags", "world", "steps"),
    [
        ("--train.epochs 1", 1, 20),  # 1295 / 64
        ("--train.epochs 2", 2, 20),
        ("--train.epochs 2.5 --train.batch_size 37 --train.grad_accum 5", 7, 2),
        ("--train.epochs 1e-9", 1, 1),
        ("--train.epochs 3 --train.steps 7", 1, 61),
        ("--train.steps 7", 3, 7),
    ],
)
def test_epochs_become_steps(splits, flags, world, steps):
    told = settings(flags)
    planned = check_plan(told, splits, world)
    assert planned.train.steps == steps
    assert told == settings(flags)  # pure
    assert planned.train.epochs is None


def test_a_run_of_epochs_goes_on_for_as_many_steps_as_it_is_told(splits, tmp_path):
    planned = check_plan(settings("--train.epochs 1"), splits, 1)
    (tmp_path / "config.yaml").write_text(planned.as_yaml())
    longer, _ = parse_settings(["--resume", str(tmp_path), "--train.steps", "50"])
    assert check_plan(longer, splits, 1).train.steps == 50
    longer, _ = parse_settings(["--resume", str(tmp_path), "--train.epochs", "2"])
    assert check_plan(longer, splits, 1).train.steps == 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.kwargs.colour 3", "colour"),
        ("--model.name vit_tiny_patch16_224", "8"),
        ("--train.opt foo", "foo"),
        ("--train.opt_kwargs.colour 3", "colour"),
        ("--train.sched_kwargs.colour 3", "colour"),
        ("--train.steps 1 --train.sched wsd", "wsd does not fit"),
        ("--train.ce_auto_augment rnd-m9", "rnd-m9"),
        ("--train.restart_prob 2", "restart_prob"),
    ],
)
def test_what_can_not_be_built_is_said(splits, flags, message):
    told = settings(flags)

    def build():
        build_stream(told, splits, build_learner(told, splits, Accelerator(cpu=True)))

    with pytest.raises(InputError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_backbone_that_can_not_take_such_images_is_said(splits):
    tiny = replace(splits, image_shape=(1, 1, 1))
    with pytest.raises(InputError, match="vgg11 can't take images of"):
        build_model(settings("--model.name vgg11"), tiny, Accelerator(cpu=True).device)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_column": "photo"}, "no image column 'photo'"),
        ({"dataset": "nowhere.parquet"}, "no data set at"),
        ({"labels_per_class": 500}, "500"),
    ],
)
def test_data_that_are_not_there_are_said(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_splits(DataConfig(**config))
    assert "\n" not in str(error.value)
