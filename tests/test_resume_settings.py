"""Each setting that is another one at --resume: it takes effect, or is refused with the reason."""

import shlex
from dataclasses import MISSING, fields, is_dataclass
from functools import cache

import pytest
import torch
from accelerate import Accelerator

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.training import Checkpoints, DivergenceGuard, Run, Settings, parse_settings
from timm_jem.training.build import build_learner, build_stream
from timm_jem.training.resume import REFUSED, refuse_changes, what_terms_are_of

pytestmark = pytest.mark.usefixtures("precision_of_its_own")

BASE = shlex.split(
    "--data.dataset digits --model.name wrn_10_1 --train.threads 1 --train.steps 4 --train.batch_size 8 --train.ema_decay 0.5 "
    "--train.buffer_size 100 --sgld.num_steps 2 --train.lr 0.01 --train.warmup_steps 0 --train.opt adamw "
    "--train.weight_decay 0.05 --train.objective.w_xy 1 --train.restart_prob 0.5"
)

# Another value for every setting, as flags; those of the first block change the weights of the very next steps.
OTHER = {
    "data.crop_padding": "1",
    "data.flip": "true",
    "model.drop_rate": "0.5",
    "sgld.num_steps": "3",
    "sgld.step_size": "2.0",
    "sgld.noise_std": "0.5",
    "sgld.normalize_grad": "true",
    "sgld.grad_clamp": "1.0e-6",
    "sgld.pixel_clamp": "0.5",
    "sgld.step_decay": "true",
    "train.steps": "5",
    "train.batch_size": "12",
    "train.grad_accum": "2",
    "train.ce_batch_size": "4",
    "train.px_augment": "none",
    "train.ce_auto_augment": "rand-m9-mstd0.5",
    "train.lr": "0.02",
    "train.weight_decay": "0.9",
    "train.opt_kwargs": "{betas: [0.1, 0.2], eps: 0.1}",
    "train.sched": "cosine",
    "train.warmup_steps": "4",
    "train.milestones": "[0.5]",
    "train.decay_rate": "0.9",
    "train.sched_kwargs": "{decay_milestones: [2]}",
    "train.grad_clip": "0.01",
    "train.sam_rho": "0.5",
    "train.data_noise": "0.3",
    "train.ce_noise": "0.3",
    "train.attack_norm": "l2",
    "train.buffer_size": "150",
    "train.restart_prob": "1.0",
    "train.restart_least": "0.001",
    "train.ramp_steps": "40",
    "train.step_cosine": "0.5",
    "train.balance": "true",
    "train.objective.w_ce": "0.5",
    "train.objective.w_x": "0.5",
    "train.objective.contrast": "softplus",
    "train.objective.energy_l2": "0.1",
    "train.objective.label_smoothing": "0.3",
    "train.mixed_precision": "bf16",
    # What is drawn, said, kept, or found elsewhere.
    "data.dataset": "digits.parquet",
    "data.config_name": "plain",
    "data.train_split": "all",
    "data.test_split": "test",
    "data.image_column": "image",
    "data.label_column": "label",
    "data.cache_gib": "0.5",
    "data.unlabeled": "more.parquet",
    "model.drop_path_rate": "0.1",
    "sgld.sample_steps": "9",
    "sgld.denoise_steps": "1",
    "sgld.jitter": "1",
    "sgld.rest": "0.2",
    "train.epochs": "3",
    "train.init": "gaussian",
    "train.ramp_from": "2",
    "train.ramp_auc": "0.9",
    "train.batch_norm": "frozen",
    "train.sam_adaptive": "false",
    "train.attack_eps": "0.5",
    "train.attack_steps": "3",
    "train.attack_step_size": "0.1",
    "train.channels_last": "false",
    "train.compile": "default",
    "train.capture": "false",
    "train.threads": "2",
    "train.workers": "1",
    "train.log_every": "7",
    "train.sample_every": "7",
    "train.eval_every": "7",
    "train.checkpoint_every": "7",
    "train.keep_checkpoints": "3",
    "train.best_k": "2",
    "train.trackers": "[tensorboard]",
    "train.sample_steps": "[2]",
    "train.sample_count": "10",
    "guard.check_every": "5",
    "guard.snapshot_every": "50",
    "guard.max_rollbacks": "2",
    "guard.runaway_factor": "3.0",
    "guard.runaway_floor": "3.0",
    "guard.max_energy": "100.0",
    "guard.max_chain_rms": "2.0",
    "guard.min_chain_spread": "0.01",
    "guard.min_chain_moved": "0.01",
    "guard.max_saturated": "0.4",
    "guard.ladder": "[{lr: 0.25}]",
    "hub.push_to": "user/name",
    "hub.private": "true",
    "data.skip_broken": "true",
    "hub.every": "5",
    "hub.replay_buffer": "false",
    "resume": "elsewhere",
    # Refused.
    "data.test_fraction": "0.3",
    "data.val_fraction": "0.3",
    "data.split_seed": "5",
    "data.channels": "3",
    "data.image_size": "16",
    "data.labels_per_class": "4",
    "data.starts": "more.parquet",
    "data.unlabeled_rows": "true",
    "data.streaming": "true",
    "data.stream_held_out": "30",
    "data.shuffle_buffer": "30",
    "model.name": "wrn_10_2",
    "model.pretrained": "true",
    "model.kwargs": "{act_layer: relu}",
    "classifier.steps": "5",
    "classifier.epochs": "5",
    "classifier.batch_size": "5",
    "classifier.opt": "sgd",
    "classifier.lr": "0.5",
    "classifier.weight_decay": "0.5",
    "classifier.opt_kwargs": "{eps: 0.1}",
    "classifier.ema_decay": "0.5",
    "classifier.noise": "0.5",
    "train.opt": "adam",
    "train.freeze": "[stem]",
    "train.ema_decay": "0",
    "train.conditional_chains": "true",
    "train.objective.w_xy": "0",
    "train.seed": "5",
    "output_dir": "elsewhere",
}
CHANGES_WEIGHTS = list(OTHER)[: list(OTHER).index("data.dataset")]


def names(of, prefix: str = "") -> list[str]:
    """Every setting, sections and what is in them opened."""
    found = []
    for field in fields(of):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        found += names(made, f"{prefix}{field.name}.") if is_dataclass(made) else [prefix + field.name]
    return found


@cache
def told(*flags: str) -> Settings:
    return parse_settings([*BASE, *flags])[0]


def other(name: str) -> Settings:
    return told(f"--{name}={OTHER[name]}")


def test_every_setting_is_known_here():
    assert sorted(OTHER) == sorted(names(Settings))
    assert REFUSED.keys() == set(list(OTHER)[list(OTHER).index("data.test_fraction") :])


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_is_refused_or_not(name):
    saved = told()
    refuse_changes(saved.sections(), saved)
    if name in ("output_dir", "resume") or name.startswith("hub."):
        return  # none of a checkpoint; RunFolder.choose refuses the first
    if name not in REFUSED:
        return refuse_changes(saved.sections(), other(name))
    with pytest.raises(InputError) as error:
        refuse_changes(saved.sections(), other(name))
    assert f"{name} is " in str(error.value)
    assert REFUSED[name].why in str(error.value)
    assert "\n" not in str(error.value)


def test_some_values_are_refused_and_others_are_not():
    for name, fine in (("train.ema_decay", "0.9"), ("train.objective.w_xy", "0.5")):
        refuse_changes(told().sections(), told(f"--{name}={fine}"))
    kwargs = "--model.kwargs={pretrained_cfg_overlay: {file: %s, crop_pct: %s}}"
    of_weights = told(kwargs % ("here/x.safetensors", 1))
    refuse_changes(of_weights.sections(), told(kwargs % ("/elsewhere/x.safetensors", 1)))  # which were read at the start
    with pytest.raises(InputError, match=r"model\.kwargs"):
        refuse_changes(of_weights.sections(), told(kwargs % ("here/x.safetensors", 2)))
    refuse_changes({"train": {"lr": 1.0}}, Settings())  # one that knew fewer settings


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig())


def run_of(settings: Settings, splits, folder) -> Run:
    splits.flip, splits.crop_padding = settings.data.flip or False, settings.data.crop_padding or 0
    learner = build_learner(settings, splits, Accelerator(cpu=True, mixed_precision=settings.train.mixed_precision))
    return Run(
        learner,
        build_stream(settings, splits, learner),
        DivergenceGuard(settings.guard, learner.accelerator, 10, learner.method.watched, of=what_terms_are_of(settings)),
        Checkpoints(folder, learner.accelerator),
        grad_accum=settings.train.grad_accum,
    )


def goes_on(settings: Settings, splits, folder) -> list[torch.Tensor]:
    run = run_of(settings, splits, folder)
    run.resume()
    for _ in range(2):
        run.advance()
    run.stream.close()
    return [parameter.detach().clone() for parameter in run.learner.jem.parameters()]


@pytest.fixture(scope="module")
def saved(splits, tmp_path_factory):
    """The checkpoint of a run after two steps, and its weights after four."""
    folder = tmp_path_factory.mktemp("saved")
    run = run_of(told(), splits, folder)
    for _ in range(2):
        run.advance()
    run.save({})
    for _ in range(2):
        run.advance()
    weights = [parameter.detach().clone() for parameter in run.learner.jem.parameters()]
    assert all(map(torch.equal, weights, goes_on(told(), splits, folder)))
    return folder, weights


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_what_takes_effect_does(name, splits, saved):
    folder, weights = saved
    assert name not in REFUSED
    now = goes_on(other(name), splits, folder)
    assert not all(map(torch.equal, now, weights))
    assert all(weight.isfinite().all() for weight in now)


def test_a_run_whose_loss_becomes_harder_is_not_judged_by_the_old_one(splits, tmp_path):
    run = run_of(told(), splits, tmp_path)
    run.advance()
    run.guard.close()
    run.save({})
    for flags, kept in (
        ("--train.lr 1", True),
        ("--train.attack_norm linf", False),
        ("--train.objective.label_smoothing 0.9", False),
    ):
        resumed = run_of(told(*flags.split()), splits, tmp_path)
        resumed.resume()
        assert ("best_ce" in resumed.guard.scales) is kept
        resumed.stream.close()


@pytest.mark.parametrize(
    ("before", "flags", "message"),
    [
        (
            "",
            "--train.opt_kwargs.amsgrad true",
            "need max_exp_avg_sq, which the saved optimizer does not have",
        ),
        ("", "--train.opt sgd", "the saved optimizer is AdamW and this one SGD"),
        ("--train.opt lamb --train.opt_kwargs {}", "--train.weight_decay 0", None),
        ("--train.weight_decay 0", "--train.weight_decay 0.9", None),
        ("--train.opt_kwargs.layer_decay 0.5", "--train.opt_kwargs.layer_decay 0.7", None),
        ("--train.opt_kwargs.amsgrad true", "--train.opt_kwargs.amsgrad false", None),
        ("--train.opt momentum --train.opt_kwargs {}", "--train.opt_kwargs.momentum 0.5", None),
        ("--train.opt lookahead_adamw", "--train.weight_decay 0.4", None),
    ],
)
def test_an_optimizer_goes_on_where_its_state_fits(before, flags, message, splits, tmp_path):
    before, flags = shlex.split(before), shlex.split(flags)
    run = run_of(told(*before), splits, tmp_path)
    run.advance()
    run.save({})
    if message is None:
        unchanged = goes_on(told(*before), splits, tmp_path)
        assert not all(map(torch.equal, goes_on(told(*before, *flags), splits, tmp_path), unchanged))
        return
    resumed = run_of(told(*before, *flags), splits, tmp_path)
    untouched = [parameter.detach().clone() for parameter in resumed.learner.jem.parameters()]
    with pytest.raises(InputError, match=message):
        resumed.resume()
    assert all(map(torch.equal, untouched, resumed.learner.jem.parameters()))
