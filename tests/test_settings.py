import os
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import get_args

import pytest
import yaml

from timm_jem import InputError
from timm_jem.training import HubConfig, ModelConfig, Settings, TrainConfig, parse_settings
from timm_jem.training.resume import differences

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
DIGITS = CONFIGS / "digits.yaml"
CHANGED = [
    "--data.dataset", "2024", "--data.labels_per_class", "3", "--data.channels", "1", "--data.flip", "false",
    "--model.name", "resnet18", "--model.kwargs", '{"act_layer": "silu", "deep": {"a": [1, 2.5, null]}}',
    "--sgld.pixel_clamp", "1", "--sgld.step_size", "1e-5", "--train.mixed_precision", "no", "--train.ce_noise", "0",
    "--train.opt_kwargs.betas", "[0.9,0.95]", "--train.objective.w_xy", "0.25", "--train.milestones", "[0.5]",
    "--train.sample_steps", "[2,4]", "--train.epochs", "2.5", "--train.sched", "poly", "--train.trackers", "[tensorboard]",
    "--guard.ladder", "[{lr: 1.0e-7}, {step_size: 0.5, num_steps: 2}]", "--guard.max_energy", "1e9",
    "--hub.private", "true", "--hub.every", "7", "--hub.replay_buffer", "false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_with(folder: str, *flags: str) -> Settings:
    """A run's folder with its config.yaml, as the run writes it."""
    settings, _ = parse_settings([*flags, "--output_dir", folder])
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.yaml").write_text(settings.as_yaml(), encoding="utf-8")
    return settings


@pytest.mark.parametrize("flags", [[], CHANGED, ["--config", str(DIGITS)], ["--config", str(CONFIGS / "cifar10_jem.yaml")]])
def test_a_runs_config_is_its_settings(flags):
    told = [*flags, "--hub.push_to", "user/name", "--output_dir", "runs/a", "--resume", "auto"]
    settings, _ = parse_settings(told)
    assert (settings.hub.push_to, settings.output_dir, settings.resume) == ("user/name", "runs/a", "auto")
    Path("config.yaml").write_text(settings.as_yaml(), encoding="utf-8")
    again, _ = parse_settings(["--config", "config.yaml"], DIGITS)
    # Elsewhere, and without publishing over the model that there is.
    assert (again.hub.push_to, again.output_dir, again.resume) == (None, None, None)
    settings.hub.push_to = settings.output_dir = settings.resume = None
    assert asdict(again) == asdict(settings)
    assert again == settings
    content = yaml.safe_load(settings.as_yaml())
    assert list(content) == ["data", "model", "classifier", "sgld", "train", "guard", "hub"]
    assert "push_to" not in content["hub"]
    elsewhere, _ = parse_settings(["--config", "config.yaml", "--output_dir", "b"])
    assert elsewhere.output_dir == "b"


def test_presets_have_names():
    of_file, _ = parse_settings(["--config", str(CONFIGS / "cifar10_jempp.yaml"), "--train.lr", "3"], DIGITS)
    Path("cifar10_jempp").mkdir()  # a folder is no file of settings
    settings, command = parse_settings(["--config=cifar10_jempp", "--train.lr", "3"], DIGITS)
    assert settings == of_file
    assert command == ["--config=cifar10_jempp", "--train.lr", "3"]
    Path("digits").write_text("train: {lr: 5}")
    assert parse_settings(["--config", "digits"], DIGITS)[0] == Settings(train=TrainConfig(lr=5))
    with pytest.raises(
        InputError, match=r"^--config is 'cifar10_gem', which is no file: give one, or a preset, cifar10, .*jem"
    ):
        parse_settings(["--config", "cifar10_gem"], DIGITS)


def test_what_is_not_set_needs_no_word_in_a_config():
    """as_yaml leaves out what is None, which must then be the default."""
    for section in fields(Settings):
        kinds = [section.type] if section.default_factory is not MISSING else []
        for field in (field for kind in kinds for field in fields(kind)):
            assert field.default is None or type(None) not in get_args(field.type), field.name


@pytest.mark.parametrize("resume", [["--resume", "a"], ["--resume=a/"], ["--resume", "auto", "--output_dir", "a"],
                                    ["--resume", "a/checkpoints/step_00000004"]])  # fmt: skip
def test_a_run_that_goes_on_has_its_own_settings(resume):
    run_with("a", *CHANGED)
    settings, command = parse_settings([*resume, "--train.lr", "0.5"], DIGITS)
    assert (settings.model.name, settings.data.dataset, settings.sgld.step_size) == ("resnet18", "2024", 1e-5)
    assert settings.train.lr == 0.5
    assert command == ["--train.lr", "0.5"]


def test_auto_without_a_folder_goes_on_with_the_newest_of_the_data_set():
    run_with("runs/digits", "--train.lr", "0.25")
    run_with("runs/digits-2", "--train.lr", "0.125")
    run_with("runs/photos", "--train.lr", "0.5", "--data.dataset", "my/photos")
    assert parse_settings(["--resume", "auto"], DIGITS)[0].train.lr == 0.125
    assert parse_settings(["--resume", "auto", "--data.dataset", "my/photos"], DIGITS)[0].train.lr == 0.5
    assert parse_settings(["--resume", "auto", "--data", "{dataset: my/photos}"], DIGITS)[0].train.lr == 0.5
    assert parse_settings(["--resume", "auto", "--data.dataset", "others"], DIGITS)[0].train == TrainConfig()
    assert parse_settings(["--resume", "auto", "--output_dir", "new"], DIGITS)[0] == Settings(
        **{**vars(parse_settings([], DIGITS)[0]), "resume": "auto", "output_dir": "new"}
    )


def test_a_config_that_is_named_is_taken_instead_of_the_runs_own():
    run_with("a", "--train.lr", "0.25")
    for config in (["--config", str(DIGITS)], [f"--config={DIGITS}"]):
        settings, _ = parse_settings([*config, "--resume", "a"], CONFIGS / "cifar10_jem.yaml")
        assert settings.train.lr == 3e-3
        assert settings.data.dataset == "digits"


def test_weights_in_a_file_are_told_from_the_root():
    told = "{pretrained_cfg_overlay: {file: w/x.safetensors}, act_layer: silu}"
    kwargs = parse_settings(["--model.pretrained", "--model.kwargs", told])[0].model.kwargs
    assert kwargs == {"pretrained_cfg_overlay": {"file": f"{Path.cwd()}/w/x.safetensors"}, "act_layer": "silu"}


def test_a_config_may_come_through_a_pipe():
    receiving, sending = os.pipe()
    with open(sending, "w") as file:
        file.write("train: {steps: 7}\n")
    try:
        assert parse_settings(["--config", f"/dev/fd/{receiving}"])[0].train.steps == 7
    finally:
        os.close(receiving)


def test_the_default_config_is_for_those_who_name_neither_data_nor_config():
    assert parse_settings([], DIGITS)[0].model.name == "wrn_10_1"
    assert parse_settings(["--train.lr", "1"], DIGITS)[0].model.name == "wrn_10_1"
    assert parse_settings(["--data.dataset", "digits"], DIGITS)[0].model == ModelConfig()
    assert parse_settings(["--data.dataset=digits"], DIGITS)[0].model == ModelConfig()
    assert parse_settings([])[0] == Settings()


@pytest.mark.parametrize(
    ("flags", "kwargs"),
    [
        ([], {"act_layer": "silu"}),
        (["--model.name", "resnet18"], {}),
        (["--model.name=resnet18"], {}),
        (["--config", str(DIGITS), "--model.name", "resnet18"], {}),
        ([f"--config={DIGITS}", "--train.lr", "1", "--model.name", "resnet18"], {}),
        (["--model.name", "vit_tiny_patch16_224", "--model.kwargs.patch_size", "2"], {"patch_size": 2}),
        (["--model.kwargs.patch_size", "2", "--model.name", "vit_tiny_patch16_224"], {"patch_size": 2}),
        (["--model.kwargs.widen", "2"], {"act_layer": "silu", "widen": 2}),
        (["--model.name", "resnet18", "--config", str(DIGITS)], {"act_layer": "silu"}),  # its own model again
        (["--config", str(DIGITS), "--config", "other.yaml"], {}),
        (["--model", "{name: resnet18}"], {}),
        (["--model", "{name: resnet18, kwargs: {widen: 2}}"], {"widen": 2}),
        (["--resume", "a", "--model.name", "resnet18"], {}),
        (["--resume", "a"], {"act_layer": "silu"}),
    ],
)
def test_a_configs_model_kwargs_belong_to_its_own_model(flags, kwargs):
    run_with("a", "--config", str(DIGITS))
    Path("other.yaml").write_text("model: {name: resnet18}\n")
    assert parse_settings(flags, DIGITS)[0].model.kwargs == kwargs


def test_steps_are_meant_where_a_config_says_epochs():
    Path("some.yaml").write_text("train: {epochs: 30}\n")
    told = parse_settings(["--config", "some.yaml", "--train.steps", "5"])[0].train
    assert (told.steps, told.epochs) == (5, None)
    assert parse_settings(["--train.steps", "5", "--config", "some.yaml"])[0].train.epochs == 30
    assert parse_settings(["--config", "some.yaml", "--train.steps", "5", "--train.epochs", "2"])[0].train.epochs == 2
    Path("shorter.yaml").write_text("train: {steps: 5}\nclassifier: {steps: 7}\n")
    for later in (["--config", "shorter.yaml"], ["--train", "{steps: 5}"], ["--train", "shorter_train.yaml"]):
        Path("shorter_train.yaml").write_text("steps: 5\n")
        told = parse_settings(["--config", "some.yaml", *later])[0].train
        assert (told.steps, told.epochs) == (5, None), later
    told = parse_settings(["--classifier.epochs", "3", "--config", "shorter.yaml"])[0].classifier
    assert (told.steps, told.epochs) == (7, None)


def test_the_command_repeats_the_run_elsewhere():
    flags = ["--train.lr", "1", "--hub.push_to", "user/name", "--sgld.noise_std=0"]
    for where in (["--output_dir", "a"], ["--output_dir=a", "--resume=auto"], ["--resume", "auto"], []):
        assert parse_settings([*where, *flags], DIGITS)[1] == flags
        assert parse_settings([*flags[:2], *where, *flags[2:]], DIGITS)[1] == flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train.lrr 3", "--train.lrr"),
        ("--res auto", "--res"),  # no abbreviations: they would be a setting in one place and not in another
        ("--conf {digits}", "--conf"),
        ("--output_dir", "expected one argument"),
        ("--config typo.yaml", "stepz"),
        ("--config nothing.yaml", "nothing.yaml"),
        ("--config not.yaml", "parsing config"),
        ("--model resnet18", "did you mean --model.name resnet18?"),
        ("--data ./photos", "did you mean --data.dataset ./photos?"),
        ("--output-dir runs/a", "did you mean --output_dir?"),
        ("--train.lr 0", "lr is 0.0: give a finite number above 0"),
        ("--train.objective.w_ce 0 --train.objective.w_x 0 --train.objective.w_xy 0", "nothing would be learnt"),
        ("--train.seed 4294967296", "from 0 to 2,147,483,647"),
        ("--model.kwargs.checkpoint_path some.safetensors", "pretrained_cfg_overlay"),
        ("--model.name someone/model", "a Hub repository is hf-hub:someone/model"),
        ("--model.name ./model", "there is no such folder: give one with a saved model"),
        ("--train.steps many", "train.steps"),
        ("--sgld.num_steps 0", "num_steps is 0"),
        ("--sgld.step_size .nan", "step_size is nan"),
        ("--train.objective.w_x -1", "w_x is -1"),
        ("--train.steps 0", "steps is 0"),
        ("--train.mixed_precision fp16", "gradient scaler"),
        ("--model.name resnet_18", "did you mean resnet18"),
        ("--train.seed -1", "seed is -1"),
        ("--train.ce_noise .nan", "ce_noise is nan"),
        ("--train.milestones [2.0]", "milestones is 2"),
        ("--model.kwargs.num_classes 5", "leave it out"),
        ("--model.kwargs.drop_rate 0.1", "drop_rate"),
        ("--train.sample_steps [1] --sgld.num_steps 4 --sgld.denoise_steps 4", "denoise_steps 4"),
        ("--train.sample_steps []", "sample_steps"),
        ("--train.sample_steps [1,60000] --sgld.num_steps 2", "chains of 120,000 steps"),
        ("--train.trackers [tensorbord]", "choose from tensorboard"),
        ("--train.trackers [wandb]", "pip install wandb"),
        ("--train.ema_decay 1.5", "ema_decay is 1.5"),
        ("--train.epochs 0", "epochs is 0"),
        ("--train.grad_accum 0", "grad_accum is 0"),
        ("--train.workers -1", "workers is -1"),
        ("--guard.check_every 7", "check_every 7"),
        ("--guard.ladder []", "ladder is empty"),
        ("--hub.every -1", "every is -1"),
        ("--data.streaming true --train.epochs 2", "give steps"),
        ("--data.streaming true --train.init gaussian", "use noise"),
        ("--train.attack_norm l2 --train.objective.w_ce 0", "w_ce is 0: raise it, or leave the attack out"),
        ("--train.balance true --train.objective.w_ce 0", "w_ce is 0: raise it, or leave the balance out"),
        ("--train.balance 1", "train.balance"),
        ("--data.starts digits --train.init gaussian", "both say where chains start: set train.init noise"),
        ("--train.ramp_auc 0.8 --train.ramp_steps 9", "give one of them"),
        ("--train.step_cosine 0.4 --sgld.num_steps 1 --sgld.denoise_steps 0", "sgld.num_steps is 1: raise it"),
    ],
)
def test_bad_settings_are_one_line(flags, message):
    Path("typo.yaml").write_text("train:\n  stepz: 3\n")
    Path("not.yaml").write_text("train: [\n")
    with pytest.raises(InputError) as error:
        parse_settings(flags.format(digits=DIGITS).split(), DIGITS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_a_model_that_is_trained():
    for folder in ("saved", "runs/a/model", "resnet18"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    here = Path.cwd()
    for name, meant in (
        ("saved", "saved"),
        ("./saved", "saved"),
        (str(here / "saved"), "saved"),
        ("local-dir:saved", "saved"),
        ("runs/a", "runs/a/model"),
        ("local-dir:runs/a", "runs/a/model"),
        ("./resnet18", "resnet18"),
    ):
        model = parse_settings(["--model.name", name], DIGITS)[0].model
        assert (model.name, model.starts_pretrained) == (f"local-dir:{here / meant}", True)
    # Gone meanwhile: what a run has written of it is understood all the same.
    gone = f"local-dir:{here / 'gone'}"
    assert parse_settings(["--model.name", gone])[0].model.name == gone
    assert parse_settings(["--model.name", "resnet18"])[0].model == ModelConfig("resnet18")  # a name is first of all timm's
    assert not ModelConfig("resnet18").starts_pretrained
    assert ModelConfig("hf-hub:someone/model").starts_pretrained
    assert not ModelConfig("hf-hub:someone/model", pretrained=False).starts_pretrained


def test_what_chains_need_is_not_asked_of_cross_entropy_alone():
    alone = "--train.objective.w_x 0 --train.objective.w_xy 0 --train.step_cosine 0.4 --sgld.num_steps 1 --sgld.denoise_steps 0"
    assert parse_settings(alone.split(), DIGITS)[0].train.step_cosine == 0.4


def test_settings_built_by_hand_are_checked_as_well():
    with pytest.raises(InputError, match="unknown model"):
        Settings(model=ModelConfig(name="resnet_18"))
    with pytest.raises(InputError, match=r"batch_size is 2\.5"):
        TrainConfig(batch_size=2.5)
    with pytest.raises(InputError, match="hub every is -1"):
        HubConfig(every=-1)


def test_lengths_are_those_beyond_the_denoising():
    settings, _ = parse_settings(["--sgld.num_steps", "3", "--sgld.denoise_steps", "6", "--train.sample_steps", "[1,2,3,5]"])
    assert settings.lengths() == [9, 15]
    assert settings.lengths(4) == [8, 12, 20]


def test_differences_name_what_only_one_side_has():
    old = {"train": {"lr": 1.0, "opt_kwargs": {"betas": [0.9]}, "gone": None}, "model": {"kwargs": {}}, "same": {"a": {}}}
    new = {"train": {"lr": 2.0, "opt_kwargs": {"betas": [0.8]}, "come": 3}, "model": {"kwargs": {"a": "b"}}, "same": {"a": {}}}
    assert sorted(differences(old, new)) == [
        "model.kwargs.a is 'b' now and was not set",
        "train.come is 3 now and was not set",
        "train.gone was None and is not set now",
        "train.lr is 2.0 now and was 1.0",
        "train.opt_kwargs.betas is [0.8] now and was [0.9]",
    ]
    assert differences(old, old) == []
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a is 2 now and was {'b': 1}"]
    settings = Settings()
    assert differences(settings.sections(), Settings(train=TrainConfig(seed=3)).sections()) == ["train.seed is 3 now and was 0"]
