"""The step size that follows the energies: on parabolas, whose best step is known."""

import math

import pytest
import torch

from timm_jem import SGLDConfig, sgld
from timm_jem.training.step_size import StepSize


def adapted(energy, u, *, cosine: float, config: SGLDConfig, iterations: int = 300) -> tuple[StepSize, torch.Tensor]:
    step_size = StepSize(cosine, config.pixel_clamp)
    for _ in range(iterations):
        end = sgld(energy, u, config, step_scale=step_size.scale, on_gradient=step_size.see)
        step_size.adapt()
    return step_size, end


@pytest.mark.parametrize("start", [0.01, 10.0])
@pytest.mark.parametrize("curvature", [0.5, 20.0])
def test_a_parabola_gets_the_step_that_ends_at_its_bottom(start, curvature):
    config = SGLDConfig(num_steps=3, step_size=start, noise_std=0.0)
    u = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    step_size, _ = adapted(lambda u: curvature / 2 * u.square().sum((1, 2, 3)), u, cosine=0.0, config=config)
    assert start * float(step_size.scale) == pytest.approx(1 / curvature, rel=0.08)  # above it the gradient turns round


def test_a_step_is_as_long_as_leaves_the_cosine_that_was_asked_for():
    """In a valley ten times as steep across as along, where one step from (1, 1) with α gives gradients (1, 10) and (1 − α,
    10 − 100 α)."""
    slopes = torch.tensor([1.0, 10.0]).view(1, 1, 1, 2)
    config = SGLDConfig(num_steps=2, step_size=0.01, noise_std=0.0)
    step_size, _ = adapted(
        lambda u: (slopes * u.square()).sum((1, 2, 3)) / 2, torch.ones(4, 1, 1, 2), cosine=0.6, config=config
    )
    alpha = 0.01 * float(step_size.scale)
    first, second = torch.tensor([1.0, 10.0]), torch.tensor([1 - alpha, 10 - 100 * alpha])
    assert float(torch.cosine_similarity(first, second, dim=0)) == pytest.approx(0.6, abs=0.02)


def test_an_iteration_of_several_batches_moves_it_as_one_does():
    scales = []
    for batches in (1, 4):
        step_size = StepSize(0.0, batches=batches)
        for _ in range(batches):
            for _ in range(2):
                step_size.see(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2))
            step_size.adapt()
        scales.append(float(step_size.scale))
    assert scales == pytest.approx([math.exp(0.05)] * 2)


def test_energies_of_any_scale_get_steps_of_one_length():
    config = SGLDConfig(num_steps=3, step_size=0.3, noise_std=0.0, normalize_grad=True)
    u = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    ends = [
        adapted(lambda u, scale=scale: scale * u.square().sum((1, 2, 3)), u, cosine=0.3, config=config)[1]
        for scale in (2.0**-10, 1.0, 2.0**10)
    ]
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[2], ends[1])


def test_pixels_at_the_clamp_do_not_count():
    """One that is pushed out of range for ever has always the same gradient, and would let any step grow."""
    config = SGLDConfig(num_steps=3, step_size=0.01, noise_std=0.0, pixel_clamp=1.0)

    def energy(u):
        return u[:, 0, 0, 0] ** 2 / 2 - 1000 * u[:, 0, 0, 1]

    u = torch.tensor([0.9, 1.0]).view(1, 1, 1, 2).repeat(4, 1, 1, 1)
    step_size, _ = adapted(energy, u, cosine=0.0, config=config)
    assert 0.01 * float(step_size.scale) == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize(
    ("slope", "start"), [(0.0, 0.5), (1e-25, 0.5), (1e25, 0.5), (-1.0, 1.0)], ids=["flat", "slight", "steep", "barred"]
)
def test_such_chains_do_not_change_the_steps_of_others(slope, start):
    """Squares of slopes beyond about 1e±19 have no place in single precision."""
    config = SGLDConfig(num_steps=3, step_size=0.01, noise_std=0.0, normalize_grad=True, pixel_clamp=1.0)
    slopes, u = torch.tensor([slope] * 6 + [1.0] * 2), torch.full((8, 1, 2, 2), 0.5)
    u[:6] = start
    step_size, _ = adapted(lambda u: slopes * u.square().sum((1, 2, 3)), u, cosine=0.4, config=config, iterations=20)
    assert float(step_size.scale) == pytest.approx(math.exp(0.05 * 0.6 * 20), rel=1e-3)  # the cosine of all others is 1


def test_chains_without_a_slope_and_single_steps_leave_it_finite():
    step_size, _ = adapted(lambda u: 0 * u.sum((1, 2, 3)), torch.ones(4, 1, 2, 2), cosine=0.5, config=SGLDConfig(num_steps=2))
    assert float(step_size.scale) == 1  # nothing has no direction
    step_size, _ = adapted(lambda u: u.sum((1, 2, 3)), torch.ones(4, 1, 2, 2), cosine=0.5, config=SGLDConfig(num_steps=2))
    assert float(step_size.scale) == pytest.approx(1e3, rel=1e-3)
    step_size, _ = adapted(lambda u: u.sum((1, 2, 3)), torch.ones(4, 1, 2, 2), cosine=0.5, config=SGLDConfig(num_steps=1))
    assert float(step_size.scale) == 1


def test_what_was_loaded_stays_where_nothing_adapts():
    loaded = StepSize(None)
    loaded.load_state_dict({"scale": torch.tensor(0.25)}, torch.device("cpu"))
    assert not loaded.adapts
    assert loaded.state_dict() == {"scale": torch.tensor(0.25)}
    loaded.load_state_dict({}, torch.device("cpu"))
    assert loaded.scale is None
