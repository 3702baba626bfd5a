import math

import pytest
import timm
import torch

from timm_jem import InputError, SGLDConfig, sgld, sgld_step
from timm_jem.modes import frozen
from timm_jem.sampling import uniform_noise


def quadratic(curvature: float):
    return lambda u: 0.5 * curvature * u.square().sum((1, 2, 3))


def test_defaults_are_the_papers():
    config = SGLDConfig()
    assert (config.num_steps, config.step_size, config.noise_std) == (20, 1.0, 0.01)
    assert config.grad_clamp is None
    assert config.pixel_clamp is None


def test_a_step_by_hand():
    u, grad, noise = torch.tensor([1.0, -1.0]), torch.tensor([3.0, -0.5]), torch.tensor([1.0, 2.0])
    config = SGLDConfig(step_size=0.5, noise_std=0.1)
    torch.testing.assert_close(sgld_step(u, grad, noise, config), torch.tensor([1 - 1.5 + 0.1, -1 + 0.25 + 0.2]))
    torch.testing.assert_close(sgld_step(u, grad, None, config), torch.tensor([-0.5, -0.75]))
    clamped = SGLDConfig(step_size=0.5, noise_std=0.1, grad_clamp=1.0, pixel_clamp=0.6)
    torch.testing.assert_close(sgld_step(u, grad, noise, clamped), torch.tensor([0.6, -0.55]))
    assert u.tolist() == [1.0, -1.0]  # pure


@pytest.mark.parametrize(("step_size", "curvature"), [(1.0, 0.5), (0.1, 2.0), (1.0, 1.7)])
def test_a_quadratic_energy_gives_the_variance_of_the_closed_form(step_size, curvature):
    config = SGLDConfig(step_size=step_size, noise_std=0.3)
    # u' = (1 - αc) u + σ n has the stationary variance σ² / (1 - (1 - αc)²).
    expected = 0.3**2 / (1 - (1 - step_size * curvature) ** 2)
    u = sgld(
        quadratic(curvature), torch.zeros(200_000, 1, 1, 1), config, num_steps=60, generator=torch.Generator().manual_seed(0)
    )
    assert u.var().item() == pytest.approx(expected, rel=0.02)
    assert u.mean().abs() < 5 * math.sqrt(expected / 200_000)


def test_noise_free_chains_are_gradient_descent():
    u = sgld(quadratic(0.5), torch.ones(3, 1, 2, 2), SGLDConfig(num_steps=5, noise_std=0.0))
    torch.testing.assert_close(u, torch.full((3, 1, 2, 2), 0.5**5))


def test_the_last_steps_can_be_noise_free():
    config = SGLDConfig(num_steps=8, noise_std=0.2)
    start = torch.zeros(4, 1, 2, 2)
    noisy = sgld(quadratic(0.5), start, config, num_steps=6, generator=torch.Generator().manual_seed(3))
    u = sgld(quadratic(0.5), start, config, denoise_steps=2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(u, noisy * 0.25)


def test_same_seed_same_chains_however_they_are_split():
    start, y = torch.zeros(7, 1, 2, 2), torch.arange(7) % 2

    def energy_fn(u, y):
        return (0.2 + 0.3 * y) * u.square().sum((1, 2, 3))

    runs = [
        sgld(energy_fn, start, SGLDConfig(), y=y, generator=torch.Generator().manual_seed(1), batch_size=size)
        for size in (None, 1, 3, 7, 100)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_randomness_is_the_generators_alone():
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    u = uniform_noise((2, 1, 4, 4), generator=generator)
    sgld(quadratic(1.0), u, SGLDConfig(), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert u.min() >= -1
    assert u.max() <= 1


def test_no_graph_outlives_the_chains_and_the_start_is_kept():
    weight = torch.ones((), requires_grad=True)
    start = torch.ones(2, 1, 2, 2)
    with torch.no_grad():
        u = sgld(lambda u: weight * u.square().sum((1, 2, 3)), start, SGLDConfig(num_steps=3))
    assert u.grad_fn is None
    assert not u.requires_grad
    assert weight.grad is None
    assert torch.equal(start, torch.ones(2, 1, 2, 2))


def test_every_step_is_reported():
    seen = []
    sgld(quadratic(1.0), torch.zeros(1, 1, 1, 1), SGLDConfig(num_steps=4), on_step=lambda step, u: seen.append(step))
    assert seen == [1, 2, 3, 4]


def test_frozen_restores_every_flag_even_after_an_error():
    model = timm.create_model("resnet18", num_classes=2).train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags


def test_frozen_can_leave_batch_norm_in_train_mode_without_moving_its_statistics():
    model = timm.create_model("resnet18", num_classes=2).train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with frozen(model, batch_norm="train"):
        assert [m for m in model.modules() if m.training] == [m for m in norms if m not in set(model.layer1.modules())]
        out = model.bn1(torch.arange(128.0).view(2, 64, 1, 1))
        torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0]]).expand(2, 64).reshape(2, 64, 1, 1))
        assert not any(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == flags
    assert all(m.track_running_stats for m in norms)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="'trian'"), frozen(model, batch_norm="trian"):
        pass


def test_clamps_hold_along_the_chains():
    # Of gradients 0.1 and 30 the second is clamped to 1, so that the chains go down by 0.05 and 0.5 a step, as far as -0.8.
    slopes = torch.tensor([0.1, 30.0]).view(1, 1, 1, 2)
    config = SGLDConfig(num_steps=3, step_size=0.5, noise_std=0.0, grad_clamp=1.0, pixel_clamp=0.8)
    seen = []
    sgld(lambda u: (slopes * u).sum((1, 2, 3)), torch.zeros(1, 1, 1, 2), config, on_step=lambda _, u: seen.append(u.flatten()))
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[-0.05, -0.5], [-0.1, -0.8], [-0.15, -0.8]]))


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": 0},
        {"num_steps": 2.5},
        {"step_size": float("nan")},
        {"step_size": 0.0},
        {"noise_std": -0.1},
        {"noise_std": float("inf")},
        {"grad_clamp": 0.0},
        {"pixel_clamp": float("nan")},
        {"sample_steps": 0},
        {"denoise_steps": -1},
    ],
)
def test_bad_settings_are_named(bad):
    (name,) = bad
    with pytest.raises(InputError, match=name) as error:
        SGLDConfig(**bad)
    assert "\n" not in str(error.value)
