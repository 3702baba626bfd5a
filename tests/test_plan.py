"""What settings and data must agree on, and what can't be built, in milliseconds."""

import copy
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import stability
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.training import Batch, MaximumLikelihood, check_plan, parse_settings
from timm_jem.training.build import _scheduler, build_learner, build_model, build_stream
from timm_jem.training.start import without_effect

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
DIGITS = CONFIGS / "digits.yaml"


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
        ("--train.buffer_size 100", 1, "a batch may need 64 chains of one class: raise it to 640"),
        ("--train.buffer_size 60 --train.objective.w_xy 0 --train.objective.w_x 1", 1, "64 chains: raise it to 64"),
        ("--train.attack_norm linf --train.attack_eps 8", 1, "further apart than 1 (linf, pixels in [0, 1]): grey levels"),
        ("--train.attack_norm l2 --train.attack_eps 128", 1, "further apart than 8 (l2, pixels in [0, 1]): grey levels"),
        ("--train.batch_size 600 --train.buffer_size 1000", 1, "of one class: raise it to 2620, or lower"),
    ],
)
def test_what_does_not_fit_the_data_is_said(splits, flags, world, message):
    with pytest.raises(InputError) as error:
        check_plan(settings(flags), splits, world)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_gradients_are_not_for_shards(splits):
    with pytest.raises(InputError, match=r"train\.balance compares gradients of whole weights"):
        check_plan(settings("--train.ema_decay 0 --train.balance true"), splits, 2, sharded=True)


def test_what_fits(splits):
    told = settings()
    assert check_plan(told, splits, 1) == told
    most = 2 * int(splits.train.labels.bincount().max())
    for flags, world in (
        ("--train.batch_size 647 --train.buffer_size 2640", 2),
        (f"--train.batch_size 1000 --train.buffer_size {most * 10}", 1),
        ("--train.buffer_size 64 --train.objective.w_xy 0 --train.objective.w_x 1", 1),
        ("--train.buffer_size 1 --train.objective.w_xy 0", 1),  # cross-entropy alone
        ("--train.ema_decay 0", 1),
        ("--train.attack_norm l2 --train.attack_eps 8", 1),
        ("--train.attack_eps 128", 1),  # nothing is attacked
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
        ("--data.labels_per_class 10 --train.epochs 10", 1, 202),
        ("--data.labels_per_class 10 --train.epochs 10 --train.objective.w_xy 0", 1, 16),  # 100 / 64
    ],
)
def test_epochs_become_steps(splits, flags, world, steps):
    told = settings(flags)
    planned = check_plan(told, splits if told.data.labels_per_class is None else load_splits(told.data), world)
    assert planned.train.steps == steps
    assert told == settings(flags)  # pure
    assert planned.train.epochs is None


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [
        ("--train.steps 800", 100),
        ("--train.steps 101", 100),
        ("--train.steps 100", 10),  # as told it would be the whole run
        ("--train.steps 4", 0),
        ("--data.dataset digits", 1000),
        ("--data.dataset digits --train.steps 300", 30),
        ("--data.dataset digits --train.epochs 10", 20),
    ],
)
def test_a_short_run_has_a_short_warm_up(splits, flags, warmup):
    assert check_plan(settings(flags), splits, 1).train.warmup_steps == warmup


@pytest.mark.parametrize(
    ("shape", "flags", "chains"),
    [
        ((3, 32, 32), "", 10_000),
        ((3, 96, 96), "", 9709),
        ((3, 224, 224), "", 1783),  # a gibibyte of float32
        ((3, 224, 224), "--train.objective.w_xy 1 --train.batch_size 200", 2000),  # as many as a batch may need
        ((3, 224, 224), "--train.buffer_size 5000", 5000),
    ],
)
def test_large_images_have_few_chains(splits, shape, flags, chains):
    told = settings(f"--data.dataset digits {flags}")
    assert check_plan(told, replace(splits, image_shape=shape), 1).train.buffer_size == chains


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
        ("--train.opt adahessian", "adahessian needs second derivatives"),
        ("--train.sched_kwargs.colour 3", "colour"),
        ("--train.opt_kwargs.betas [0.9]", "train.opt is 'adam'"),
        ("--train.opt fusedadam", "train.opt is 'fusedadam' (CUDA required"),
        ("--train.sched step --train.sched_kwargs.decay_epochs 0", "step does not fit"),
        ("--train.steps 1 --train.sched wsd", "wsd does not fit"),
        ("--train.ce_auto_augment rnd-m9", "rnd-m9"),
        ("--train.restart_prob 2", "restart_prob"),
        ("--train.restart_least 0.2", "restart_least"),
        ("--train.restart_least 0", "restart_least"),
        ("--train.buffer_size 100000000000", "so many chains take 25.6 TB of the"),
        ("--train.freeze stage9", "train.freeze has 'stage9': give some of stem, "),
        ("--model.name resnet10t --train.freeze [stem,layer1,layer2,layer3,layer4,fc]", "leaves nothing to train"),
        ("--model.name resnet10t --train.batch_size 1", "raise train.batch_size, or set train.batch_norm frozen"),
        ("--model.name resnet10t --train.ce_batch_size 1", "a batch of 1 image"),
        ("--model.name local-dir:/nowhere", "there is no config.json"),
        ("--model.name samvit_base_patch16", "for images of (1, 8, 8)"),
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


def rates_of(flags: str) -> list[float]:
    """The learning rate of each step."""
    told, optimizer, rates = settings(flags), torch.optim.SGD([torch.zeros(1)], 1.0), []
    scheduler = _scheduler(told.train, optimizer)
    for step in range(told.train.steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("flags", "decays"),
    [
        ("--train.sched step", [100, 200]),
        ("--train.sched step --train.steps 301", [101, 202]),  # and not a third time at the end
        ("--train.sched multistep --train.milestones [0.9,0.2]", [60, 270]),
    ],
)
def test_steps_of_the_learning_rate_are_where_they_are_told(flags, decays):
    rates = rates_of(f"--train.steps 300 {flags} --train.warmup_steps 0 --train.lr 1.0 --train.decay_rate 0.5")
    assert rates == [0.5 ** sum(step >= decay for decay in decays) for step in range(len(rates))]


@pytest.mark.parametrize("sched", ["wsd", "rsqrt"])
def test_a_schedule_that_is_stable_decays_over_the_last_fifth(sched):
    rates = rates_of(f"--train.sched {sched} --train.steps 120 --train.warmup_steps 20 --train.lr 1.0")
    stable = [1.0 if sched == "wsd" else (20 / max(step, 20)) ** 0.5 for step in range(20, 101)]
    assert rates[20:101] == pytest.approx(stable)
    assert rates[-1] < 0.1 * rates[100]


def test_a_backbone_that_can_not_take_such_images_is_said(splits):
    tiny = replace(splits, image_shape=(1, 1, 1))
    with pytest.raises(InputError, match="vgg11 can't take images of"):
        build_model(settings("--model.name vgg11"), tiny, Accelerator(cpu=True).device)


@pytest.mark.parametrize(("side", "sizes"), [(20, "16 or 32"), (37, "32 or 48")])
def test_pixels_that_a_backbone_does_not_see_are_refused(splits, side, sizes):
    """Chains could never move them. Cross-entropy alone may train on what it likes."""
    odd, device = replace(splits, image_shape=(3, side, side)), torch.device("cpu")
    small = "--model.name vit_tiny_patch16_224 --model.kwargs.depth 1"
    unseen = 1 - (side // 16 * 16 / side) ** 2
    with pytest.raises(InputError, match=rf"does not look at {unseen:.0%} of the pixels .*, such as {sizes}$"):
        build_model(settings(small), odd, device)
    build_model(settings(f"{small} --train.objective.w_xy 0"), odd, device)
    build_model(settings(small), replace(splits, image_shape=(3, 32, 32)), device)


@pytest.mark.parametrize("name", ["resnet18", "mixer_s32_224"])
def test_what_starts_as_zero_hides_no_pixel(splits, name):
    """The shortcuts alone see one pixel of many, and a head of zeros none; training ends that. All is as it was before."""
    state, told = torch.get_rng_state(), settings(f"--model.name {name}")
    torch.manual_seed(0)
    plain = timm_jem.create_model(name, num_classes=10, input_size=(3, 32, 32)).state_dict()
    torch.manual_seed(0)
    built = build_model(told, replace(splits, image_shape=(3, 32, 32)), torch.device("cpu")).state_dict()
    assert all(torch.equal(plain[key], built[key]) for key in plain)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A saved classifier of three other classes."""
    folder = tmp_path_factory.mktemp("source")
    timm_jem.create_model("resnet10t", num_classes=3, input_size=(3, 32, 32)).eval().save_pretrained(folder / "model")
    return folder / "model"


def test_a_folder_is_started_from_with_another_head(splits, source):
    saved, device = load_file(source / "model.safetensors"), torch.device("cpu")
    colour = replace(splits, image_shape=(3, 32, 32))
    loaded = build_model(settings(f"--model.name {source}"), colour, device).backbone.state_dict()
    assert loaded["fc.weight"].shape == (10, 512)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved if not name.startswith("fc."))
    afresh = build_model(settings(f"--model.name {source} --model.pretrained false"), colour, device).backbone.state_dict()
    assert not torch.equal(afresh["conv1.0.weight"], saved["conv1.0.weight"])


def test_a_head_of_other_classes_is_new_where_there_are_as_many(splits, tmp_path):
    names, colour = splits.class_names, replace(splits, image_shape=(3, 32, 32))
    for told, kept in ((names, True), (None, True), (names[::-1], False), ([f"{name}x" for name in names], False)):
        jem = timm_jem.create_model("resnet10t", num_classes=10, input_size=(3, 32, 32), class_names=told).eval()
        jem.save_pretrained(tmp_path)
        state = build_model(settings(f"--model.name {tmp_path}"), colour, torch.device("cpu")).backbone.state_dict()
        for name, saved in load_file(tmp_path / "model.safetensors").items():
            assert torch.equal(state[name], saved) is (kept or not name.startswith("fc.")), name


def test_weights_that_are_cut_off_or_pickled_are_one_line(splits, source, tmp_path):
    for name in ("cut", "pickled"):
        shutil.copytree(source, tmp_path / name)
    content = (source / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:5000])
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    for name, message in (("cut", "can't be read"), ("pickled", "there is no model.safetensors in it")):
        with pytest.raises(InputError, match=message) as error:
            build_model(settings(f"--model.name {tmp_path / name}"), splits, torch.device("cpu"))
        assert "\n" not in str(error.value)


def test_what_is_trained_is_not_called_what_timm_published(splits):
    jem = build_model(settings("--model.name resnet10t.c3_in1k"), splits, torch.device("cpu"))
    assert timm.get_pretrained_cfg("resnet10t.c3_in1k").license is not None
    assert not {"tag", "hf_hub_id", "url", "file", "license", "origin_url"} & set(jem.backbone.pretrained_cfg)
    assert jem.backbone.pretrained_cfg["architecture"] == "resnet10t"


def test_frozen_parts_stay_as_they_are(splits):
    told = settings("--model.name resnet10t --train.freeze [stem,layer1] --train.batch_size 8 --sgld.num_steps 1")
    colour = replace(splits, image_shape=(3, 32, 32))
    learner = build_learner(told, colour, Accelerator(cpu=True))
    before = {name: tensor.clone() for name, tensor in learner.jem.backbone.state_dict().items()}
    learner.optimizer.param_groups[0]["lr"] = 0.1
    u, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.arange(8)
    learner.iterate([Batch(u, y)])
    learner.step = 500  # past the warm-up
    learner._set_lr()
    learner.iterate([Batch(u, y)])
    after = learner.jem.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    still = {name for name in before if name.startswith(("conv1.", "bn1.", "layer1."))}
    assert len(still) > 20
    assert not changed & still
    assert {"fc.weight", "layer2.0.bn1.running_mean"} <= changed


def test_layers_learn_at_rates_of_their_own(splits):
    told = settings("--model.name resnet10t --train.opt adamw --train.opt_kwargs.layer_decay 0.5 --train.warmup_steps 0")
    learner = build_learner(told, replace(splits, image_shape=(3, 32, 32)), Accelerator(cpu=True))
    rates = sorted({group["lr"] for group in learner.optimizer.param_groups})
    assert rates[-1] == told.train.lr
    assert rates[-2] == told.train.lr / 2
    assert len(rates) > 3


@pytest.mark.parametrize(
    ("flags", "fused"),
    [("--train.opt AdamW", True), ("--train.opt lamb", None), ("--train.opt sgd --train.opt_kwargs.foreach false", None)],
)
def test_what_can_updates_in_one_kernel_unless_told_how(flags, fused, splits):
    learner = build_learner(settings(flags), splits, Accelerator(cpu=True))
    assert {group.get("fused") for group in learner.optimizer.param_groups} == {fused}


def test_cross_entropy_alone_keeps_no_chains(splits):
    learner = build_learner(settings("--train.objective.w_xy 0 --train.buffer_size 1"), splits, Accelerator(cpu=True))
    assert learner.method.buffer is None
    with pytest.raises(InputError, match="there is no replay buffer"):
        MaximumLikelihood(learner.jem, None, sgld=timm_jem.SGLDConfig(), objective=timm_jem.ObjectiveConfig())


def test_batch_statistics_are_warned_of_where_there_are_some(splits, recwarn):
    build_learner(settings("--train.batch_norm train"), splits, Accelerator(cpu=True))
    assert not [warning for warning in recwarn if "batch_norm" in str(warning.message)]
    with pytest.warns(UserWarning, match="train.batch_norm is 'train'"):
        build_learner(settings("--train.batch_norm train --model.kwargs.norm_layer batchnorm2d"), splits, Accelerator(cpu=True))


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


METHODS = stability.read_variants(CONFIGS.parent / "variants" / "fashion_mnist_methods.yaml", [])


@pytest.mark.filterwarnings("ignore:train.batch_norm is 'train'")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_each_method(splits, method):
    small = "--model.name wrn_10_1 --train.batch_size 4 --train.mixed_precision no --sgld.num_steps 2"
    told, _ = parse_settings([*METHODS[method], *small.split()], DIGITS)
    assert told.data.dataset == "zalando-datasets/fashion_mnist"
    assert without_effect(told) == []
    planned = check_plan(told, splits, 1)
    learner = build_learner(planned, splits, Accelerator(cpu=True))
    terms = learner.iterate([next(build_stream(planned, splits, learner))])
    assert all(term.isfinite() for term in terms.values())
