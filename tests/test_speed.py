"""What the benchmark times."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from timm_jem import InputError, ObjectiveConfig, SGLDConfig
from timm_jem.speed.iteration import bare_passes, build_run, iteration
from timm_jem.speed.profile import KINDS, _kind, profile
from timm_jem.speed.profile_plot import draw_profile
from timm_jem.training import ModelConfig, Settings, TrainConfig
from timm_jem.training.settings import ClassifierConfig

SHAPE = (1, 8, 8)
BATCH_NORM = {"norm_layer": "batchnorm2d"}


def settings(kwargs=None, **train):
    train = TrainConfig(**{"batch_size": 4, "buffer_size": 40, **train})
    return Settings(model=ModelConfig("wrn_10_1", kwargs=kwargs or {}), sgld=SGLDConfig(num_steps=3), train=train)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "told",
    [
        settings(),
        settings(BATCH_NORM),
        settings(BATCH_NORM, batch_norm="frozen", ce_batch_size=6, px_augment="none"),
        settings(ce_noise=0.1, sam_rho=2.0, grad_accum=2, ramp_steps=100),
        settings(objective=ObjectiveConfig(w_x=0.0), attack_norm="l2", attack_steps=2),
        settings(attack_norm="l2", attack_steps=2, ce_batch_size=6),
        settings(balance=True, sam_rho=2.0),
    ],
)
def test_bare_passes_are_all_the_network_passes_of_an_iteration(accelerator, told):
    run, _ = build_run(told, SHAPE, accelerator)
    passes = bare_passes(run, bf16=False)
    assert operations(lambda: iteration(run)) == operations(passes) > 0


def test_an_iteration_is_of_the_joint_phase_with_all_steps(accelerator):
    told = replace(settings(ramp_auc=0.8, ramp_from=1), classifier=ClassifierConfig(steps=100))
    run, known = build_run(told, SHAPE, accelerator)
    iteration(run)
    assert run.step == 1
    assert run.learner.method.ramp.num_steps(0) == 3
    assert not known.trains_classifier


def test_a_profile_has_all_the_time(accelerator):
    run, _ = build_run(settings(BATCH_NORM), SHAPE, accelerator)
    iteration(run)
    found = profile(run, 2)
    assert sum(sum(kinds.values()) for kinds in found.seconds.values()) == pytest.approx(found.total, rel=0.02)
    chains, backward = found.seconds["chains"], found.seconds["backward"]
    assert chains["convolution, backward to its input"] > 0
    assert "convolution, backward, weights too" not in chains
    assert backward["convolution, backward, weights too"] > 0
    assert "convolution, backward to its input" not in backward
    assert found.seconds["loss"]["normalisation"] > 0
    assert set().union(*found.seconds.values()) <= set(KINDS)
    lines = found.table().splitlines()
    assert {"chains", "loss", "backward"} < set(lines[0].split())
    assert lines[-1].split()[0] == "all"
    assert float(lines[-1].split()[-1]) == pytest.approx(100, abs=3)
    assert "chains" in [text.get_text() for text in draw_profile(found, "a title").axes[0].get_yticklabels()]
    assert not {"draw", "loss"} & set(vars(run.learner.method))  # as it was


def test_training_that_breaks_is_not_timed_as_other_training(accelerator):
    run, _ = build_run(settings(lr=1e5, warmup_steps=0), SHAPE, accelerator)
    stream = run.stream
    with pytest.raises(InputError, match=r"^training broke on images of noise \(.+\): lower train.lr"):
        profile(run, 9)
    assert run.stream is stream


@pytest.mark.parametrize("activation", ["relu", "elu", "mish", "softplus", "hardtanh", "hardsigmoid", "silu"])
def test_activations_are_counted_as_such(activation):
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss = getattr(F, activation)(x)
        torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert [e.name for e in profiler.events() if _kind(e) == "other operations" and e.self_cpu_time_total > 0] == [
        "aten::ones_like"
    ]


def test_a_profile_needs_a_cpu(accelerator, monkeypatch):
    run, _ = build_run(settings(), SHAPE, accelerator)
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="profile is for CPUs, and this is cuda: leave it out"):
        profile(run, 1)
