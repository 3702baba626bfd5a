import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from timm_jem import InputError, SGLDConfig, sgld, sgld_step
from timm_jem.modes import frozen
from timm_jem.noise import chain_generators, draw_classes, draw_seeds, randn, uniform_noise


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


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_normalized_step_is_as_long_as_its_size(scale):
    u, grad = torch.zeros(3, 1, 1, 2), scale * torch.tensor([[3.0, -4.0], [0.0, 5.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    config = SGLDConfig(step_size=0.1, normalize_grad=True)
    # The root mean squares are 5/√2.
    expected = -0.1 * math.sqrt(2) * torch.tensor([[0.6, -0.8], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(sgld_step(u, grad, None, config).view(3, 2), expected)
    broken = sgld_step(u, grad.index_fill(0, torch.tensor([1]), float("nan")), None, config).view(3, 2)
    assert broken[1].isnan().all()
    torch.testing.assert_close(broken[[0, 2]], expected[[0, 2]])


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


@pytest.mark.parametrize(("num_steps", "denoise_steps"), [(1, 0), (5, 0), (5, 3), (40, 0)])
def test_steps_that_decay_are_the_closed_form(num_steps, denoise_steps):
    """u' = (1 − α (1 − k/K) c) u + σ n, whose noise each later step shrinks."""
    config = SGLDConfig(num_steps=7, step_size=0.8, noise_std=0.3, step_decay=True)
    generator = torch.Generator().manual_seed(0)
    start = torch.full((50_000, 1, 1, 1), 2.0, dtype=torch.float64)
    length = {"num_steps": num_steps, "denoise_steps": denoise_steps}
    u = sgld(quadratic(0.5), start, config, **length, generator=generator)
    mean, variance = 2.0, 0.0
    for k in range(num_steps):
        factor = 1 - 0.8 * (1 - k / num_steps) * 0.5
        mean, variance = mean * factor, variance * factor**2 + 0.3**2 * (k < num_steps - denoise_steps)
    assert u.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / 50_000))
    assert u.var().item() == pytest.approx(variance, rel=0.05)
    still = sgld(quadratic(0.5), start[:4], replace(config, noise_std=0.0), **length)
    torch.testing.assert_close(still, torch.full_like(start[:4], mean))


def test_a_step_of_a_chain_has_its_share_of_the_step_size():
    config = SGLDConfig(step_size=0.8, step_decay=True)
    assert [config.of_step(k, 4).step_size for k in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert not config.of_step(1, 4).step_decay
    level = SGLDConfig()
    assert level.of_step(3, 4) is level


@pytest.mark.parametrize("jitter", [1, 2, 3, 9])
def test_all_shifts_take_turns(jitter):
    config, count, reach = SGLDConfig(jitter=jitter), (2 * jitter) ** 2, range(-jitter, jitter)
    assert config.shift(0) == (0, 0)
    turns = [config.shift(step) for step in range(2 * count)]
    assert sorted(turns[:count]) == [(down, right) for down in reach for right in reach]
    assert turns[count:] == turns[:count]


def test_a_jittered_step_takes_the_gradient_where_the_chain_was_moved_to():
    """E(u) = ½ |u − m|²: at u moved by s, and moved back, the gradient is u minus m moved by −s."""
    config = SGLDConfig(step_size=0.1, noise_std=0.0, jitter=2)
    u, m = torch.rand(2, 3, 2, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    sgld(lambda v: 0.5 * (v - m).square().sum((1, 2, 3)), u, config, num_steps=5, on_step=lambda _, v: seen.append(v.clone()))
    for step, after in enumerate(seen):
        down, right = config.shift(step)
        u = u - 0.1 * (u - m.roll((-down, -right), (2, 3)))
        torch.testing.assert_close(after, u)


@pytest.mark.parametrize(("jitter", "periods"), [(1, (2,)), (2, (2, 4)), (3, (2, 3))])
def test_jitter_takes_patterns_of_its_periods_out(jitter, periods):
    config, there = SGLDConfig(step_size=0.003, noise_std=0.0, jitter=jitter), 0.3
    for period in periods:
        pattern = there + (torch.arange(12) % period == 0).double().sub(1 / period) + torch.zeros(1, 1, 12, 12)
        energy_fn = lambda v, pattern=pattern: 0.5 * (v - pattern).square().sum((1, 2, 3))  # noqa: E731
        start = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
        far = sgld(energy_fn, start, config, num_steps=4000)
        torch.testing.assert_close(far, torch.full_like(far, there), rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 1, 4)])
def test_only_images_are_moved(shape):
    with pytest.raises(InputError, match=r"sgld jitter moves images: give shape \(B, C, H, W\), or jitter 0"):
        sgld(lambda u: u.reshape(len(u), -1).sum(1), torch.zeros(shape), SGLDConfig(jitter=1))


def test_chains_that_go_on_take_the_shifts_whose_turn_it_is():
    config, start = SGLDConfig(num_steps=9, noise_std=0.1, jitter=1), torch.rand(5, 1, 4, 4)
    slopes = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    energy_fn = lambda u: (slopes * u.square()).sum((1, 2, 3))  # noqa: E731
    together = sgld(energy_fn, start, config, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    first = sgld(energy_fn, start, config, generator=generator, num_steps=3)
    assert torch.equal(sgld(energy_fn, first, config, generator=generator, num_steps=6, first_step=3), together)
    again = sgld(energy_fn, first, config, generator=torch.Generator().manual_seed(3), num_steps=6)
    other = sgld(energy_fn, first, config, generator=torch.Generator().manual_seed(3), num_steps=6, first_step=3)
    assert not torch.allclose(again, other)


@pytest.mark.parametrize("settings", [{}, {"step_decay": True}, {"jitter": 1}], ids=["plain", "step_decay", "jitter"])
def test_same_seed_same_chains_however_they_are_split(settings):
    start, y, config = torch.zeros(7, 1, 2, 2), torch.arange(7) % 2, SGLDConfig(**settings)

    def energy_fn(u, y):
        return (0.2 + 0.3 * y) * u.square().sum((1, 2, 3))

    runs = [
        sgld(energy_fn, start, config, y=y, generator=torch.Generator().manual_seed(1), batch_size=size)
        for size in (None, 1, 3, 7, 100)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("draw", [randn, uniform_noise])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 3, 3), (1, 4, 4), (3, 8, 8)])
def test_a_chains_noise_is_what_its_own_generator_draws(draw, shape):
    seeds = [5, 0, 2**32 - 1, 5]
    together = draw((4, *shape), generator=chain_generators(seeds))
    assert torch.equal(together[0], together[3])
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, draw((1, *shape), generator=torch.Generator().manual_seed(seed))[0])


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 3, 3), (1, 4, 4), (3, 8, 8)])
def test_one_generator_a_chain_makes_chains_of_their_own(shape):
    config, start = SGLDConfig(num_steps=7, noise_std=0.1), torch.ones(6, *shape)
    together = sgld(quadratic(0.5), start, config, generator=chain_generators(range(6)))
    alone = sgld(quadratic(0.5), start[:1], config, generator=chain_generators([4]))
    assert torch.equal(alone[0], together[4])
    generators = chain_generators(range(6))
    steps = [0, 1, 4, 2]  # of chains that stop and go on, whose noise is that of chains that don't
    u = start
    for num_steps in steps:
        u = sgld(quadratic(0.5), u, config, generator=generators, num_steps=num_steps)
    assert torch.equal(u, together)
    # By hand: a step's noise is the next of the chain's own stream.
    own, by_hand = torch.Generator().manual_seed(4), start[4]
    for _ in range(7):
        by_hand = sgld_step(by_hand, 0.5 * by_hand, torch.randn(shape, generator=own), config)
    assert torch.equal(by_hand, together[4])


def test_a_generator_a_chain_gives_the_variance_of_the_closed_form():
    expected = 0.3**2 / (1 - 0.5**2)
    config = SGLDConfig(noise_std=0.3, num_steps=20)
    u = sgld(quadratic(0.5), torch.zeros(2000, 1, 8, 8), config, generator=chain_generators(range(2000)))
    assert u.var().item() == pytest.approx(expected, rel=0.02)
    assert u.mean().abs() < 5 * math.sqrt(expected / u.numel())
    # Chains of consecutive seeds have nothing to do with each other.
    assert (u[1:] * u[:-1]).mean().abs() < 5 * expected / math.sqrt(u.numel())


def test_seeds_are_distinct_and_the_first_of_more_are_the_same():
    def draw(n):
        return draw_seeds(n, torch.Generator().manual_seed(3))

    many = draw(1000)
    assert len(set(many)) == 1000
    assert all(0 <= seed < 2**32 for seed in many)
    assert all(draw(n) == many[:n] for n in (0, 1, 2, 15, 16, 17, 500))
    generator = torch.Generator().manual_seed(3)
    assert draw_seeds(400, generator) + draw_seeds(600, generator) == many
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert draw_seeds(5) == many[:5]


def test_classes_are_drawn_chain_by_chain():
    weights = torch.tensor([0.1, 0.6, 0.3])
    drawn = draw_classes(4000, weights, generator=chain_generators(range(4000)))
    assert (drawn.bincount() / 4000 - weights).abs().max() < 0.03
    assert torch.equal(draw_classes(1, weights, generator=chain_generators([77])), drawn[77:78])


def test_few_chains_in_a_batch_are_filled_up_and_all_at_once_are_as_they_are():
    seen = []

    def energy_fn(u, y):
        seen.append(y.tolist())
        return 0.5 * y * u.square().sum((1, 2, 3))

    start, y = torch.ones(9, 1, 2, 2), torch.arange(9.0)
    for size, n in [(1, 9), (7, 9), (9, 9), (256, 2), (None, 1)]:
        u = sgld(energy_fn, start[:n], SGLDConfig(num_steps=1, noise_std=0.0), y=y[:n], batch_size=size)
        assert torch.equal(u, (start * (1 - y).view(-1, 1, 1, 1))[:n])
    first, second = [0, 1, 2, 3], [4, 5, 6, 7]
    assert seen == [first, second, [8, 8, 8, 8], [*range(7)], [7, 8, 8, 8], [*range(9)], [0, 1, 1, 1], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -3}, "num_steps of chains is -3"),
        ({"num_steps": 2.0}, "num_steps"),
        ({"denoise_steps": -1}, "denoise_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_step": 5}, "on_step is 5"),
        ({"generator": chain_generators([1])}, "1 generators for 2 chains"),
        ({"generator": [1, 2]}, "list of one per chain"),
        ({"generator": 3}, "int"),
    ],
)
def test_chains_that_cannot_run_are_refused(options, message):
    with pytest.raises(InputError, match=message) as error:
        sgld(quadratic(1.0), torch.zeros(2, 1, 2, 2), SGLDConfig(), **options)
    assert "\n" not in str(error.value)


def gives(value):
    return lambda u: value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((quadratic(1.0), None, SGLDConfig()), "chains are a NoneType"),
        ((quadratic(1.0), torch.zeros(2, 1, 2, 2, dtype=torch.uint8), SGLDConfig()), "uint8"),
        ((quadratic(1.0), torch.zeros(2, 1, 2, 2), {"num_steps": 1}), "SGLDConfig"),
        ((None, torch.zeros(2, 1, 2, 2), SGLDConfig()), "energy_fn is None"),
        ((gives(3.0), torch.zeros(2, 1, 2, 2), SGLDConfig()), "a float for 2 chains"),
        ((gives(torch.zeros(2)), torch.zeros(2, 1, 2, 2), SGLDConfig()), "graph"),
        ((lambda u: u.sum(), torch.zeros(2, 1, 2, 2), SGLDConfig()), r"shape \(\) for 2 chains"),
        ((lambda u: u.sum((2, 3)), torch.zeros(2, 1, 2, 2), SGLDConfig()), r"shape \(2, 1\)"),
        ((gives(torch.zeros(2, requires_grad=True)), torch.zeros(2, 1, 2, 2), SGLDConfig()), "graph"),
    ],
)
def test_energies_and_chains_of_another_kind_are_named(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        sgld(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [5, "ab", (), (-1, 2), (2.5, 2), (2**20, 2**20, 2**20), None])
def test_noise_of_no_shape_is_named(shape):
    for draw in (randn, uniform_noise):
        with pytest.raises(InputError, match="shape"):
            draw(shape)


def test_other_arguments_of_noise_are_named():
    for call, message in (
        (lambda: randn((2, 2), dtype=torch.int64), "dtype"),
        (lambda: draw_seeds(-1), "number of seeds"),
        (lambda: draw_seeds(10**12), "number of seeds"),
        (lambda: draw_seeds(1, 5), "generator"),
        (lambda: draw_classes(2, [0.5, 0.5]), "weights"),
        (lambda: draw_classes(-1, torch.ones(2)), "number of classes"),
        (lambda: sgld_step(torch.zeros(2, 3), torch.zeros(3), None, SGLDConfig()), "one shape"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_no_chains_are_refused():
    with pytest.raises(InputError, match=r"\(0, 1, 2, 2\): give at least one"):
        sgld(quadratic(1.0), torch.zeros(0, 1, 2, 2), SGLDConfig())


@pytest.mark.parametrize("bad", [5, "12", None, [1.0], [True], [-1], [2**32], torch.tensor(3), [[1]], torch.tensor([0.5])])
def test_bad_seeds_are_named(bad):
    with pytest.raises(InputError, match="whole numbers") as error:
        chain_generators(bad)
    assert "\n" not in str(error.value)


def test_seeds_come_as_any_row_of_whole_numbers():
    expected = [torch.randn(3, generator=g) for g in chain_generators([0, 1, 2])]
    for seeds in (range(3), (0, 1, 2), torch.arange(3), np.arange(3, dtype=np.uint8)):
        assert all(torch.equal(torch.randn(3, generator=g), e) for g, e in zip(chain_generators(seeds), expected, strict=True))


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


def test_frozen_restores_the_flag_of_a_compiled_backbone():
    model = timm.create_model("test_resnet", num_classes=2)
    wrapped = torch.nn.Sequential(torch.compile(model, backend="eager")).train()
    with frozen(wrapped):
        assert not any(m.training for m in wrapped.modules())
    assert all(m.training for m in wrapped.modules())


def test_the_last_of_several_contexts_restores_the_flags():
    model = timm.create_model("test_resnet", num_classes=2).train()
    other = torch.nn.Sequential(model)  # shares its layers
    first, second = frozen(model), frozen(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    second.__exit__(None, None, None)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


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


def test_a_chain_rests_where_its_energy_is_low_enough():
    config, start = SGLDConfig(num_steps=50, step_size=0.1, noise_std=0.01), torch.tensor([1.0, 2.0, -1.0]).view(3, 1, 1, 1)
    seeds = lambda: chain_generators([1, 2, 3])  # noqa: E731
    rest_at, seen = torch.tensor([0.1, -1.0, 9.0]), []
    found = sgld(quadratic(1.0), start, config, generator=seeds(), rest_at=rest_at, on_step=lambda _, u: seen.append(u))
    energies = torch.stack([quadratic(1.0)(u) for u in (start, *seen)], 1)
    first = int((energies[0] <= 0.1).long().argmax())
    assert 0 < first < 50
    assert energies[0, first - 1] > 0.1
    assert torch.equal(found[0], seen[first - 1][0])
    assert torch.equal(found[1], sgld(quadratic(1.0), start, config, generator=seeds())[1])  # one that never may
    assert torch.equal(found[2], start[2])  # and one that always does, but for steps that take noise away
    denoised = sgld(quadratic(1.0), start, config, generator=seeds(), rest_at=rest_at, denoise_steps=2)
    torch.testing.assert_close(denoised[2], 0.9**2 * start[2])
    lost = sgld(lambda u: u.sum((1, 2, 3)) * math.nan, start, config, rest_at=rest_at)
    assert lost.isnan().all()
    for bad in (0.1, rest_at[:2], rest_at.long()):
        with pytest.raises(InputError, match=r"rest_at is .*: give one energy per chain, shape \(3,\)"):
            sgld(quadratic(1.0), start, config, rest_at=bad)


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
        {"normalize_grad": 1},
        {"normalize_grad": "yes"},
        {"step_decay": None},
        {"step_decay": 1},
        {"jitter": -1},
        {"jitter": 0.5},
        {"jitter": 10**9},
        {"rest": 20},
        {"rest": True},
        {"pixel_clamp": float("nan")},
        {"sample_steps": 0},
        {"denoise_steps": -1},
        # What a hostile file asks for.
        {"num_steps": 10**12},
        {"num_steps": 10**5000},
        {"sample_steps": 100_001},
        {"denoise_steps": 10**400},
        {"step_size": 1e308},
        {"step_size": 10**400},
        {"noise_std": 1e30},
        {"grad_clamp": 1e39},
        {"pixel_clamp": 10**400},
    ],
)
def test_bad_settings_are_named(bad):
    (name,) = bad
    with pytest.raises(InputError, match=name) as error:
        SGLDConfig(**bad)
    assert "\n" not in str(error.value)
