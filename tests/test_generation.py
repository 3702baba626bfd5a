import math
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

import timm_jem
from timm_jem import InputError, uniform_noise
from timm_jem.evaluation.chain_length import best_num_steps, chains_by_length
from timm_jem.evaluation.generation import (
    frechet_distance,
    inception_score,
    nearest_neighbours,
    pyramid,
    sample_quality,
    thumbnails,
    within_class_distance,
)
from timm_jem.modes import frozen
from timm_jem.noise import chain_generators, draw_seeds
from timm_jem.pixels import eight_bit, to_pixels
from timm_jem.sampling import sgld


def model(**sgld_settings):
    torch.manual_seed(0)
    settings = {"noise_std": 0.1, "denoise_steps": 2, **sgld_settings}
    return timm_jem.create_model(
        "wrn_10_1", num_classes=10, input_size=(1, 8, 8), drop_rate=0.5, sgld=timm_jem.SGLDConfig(**settings)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n, d, seed, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64) * scale + shift


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    fake, real = features(60, 7, 0), features(60, 7, 1, scale=1.3, shift=0.5)
    x, y = fake.numpy(), real.numpy()
    kernel = lambda a, b: np.array([[(p @ q / 7 + 1) ** 3 for q in b] for p in a])  # noqa: E731
    n, others = 60, ~np.eye(60, dtype=bool)
    within = (kernel(x, x)[others].sum() + kernel(y, y)[others].sum()) / (n * (n - 1))
    found = sample_quality(fake, real)
    assert found["kid"] == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-9)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)  # each subset is the whole
    assert found["frechet"] == frechet_distance(fake, real)


def test_kid_of_subsets():
    fake, real = features(40, 3, 0, shift=1), features(300, 3, 1)
    found = sample_quality(fake, real, seed=3)
    assert found == sample_quality(fake, real, seed=3)
    assert found["kid"] != sample_quality(fake, real, seed=4)["kid"]
    assert found["kid_std"] > 0
    assert abs(np.mean([sample_quality(features(50, 3, i), features(50, 3, i + 90))["kid"] for i in range(20)])) < 0.2


def reference_precision(fake, real, k=3):
    """Share of ``fake`` inside the ball of at least one of ``real`` that reaches its k-th neighbour."""
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
    radii = np.sort(distance(real, real), axis=1)[:, k]
    return (distance(fake, real) <= radii).any(1).mean()


def test_precision_and_recall_equal_numpy():
    fake, real = features(80, 4, 0, scale=0.6), features(130, 4, 1)
    found = sample_quality(fake, real)
    precision, recall = reference_precision(fake.numpy(), real.numpy()), reference_precision(real.numpy(), fake.numpy())
    assert precision > recall + 0.2
    assert found["precision"] == pytest.approx(precision, abs=1e-6)
    assert found["recall"] == pytest.approx(recall, abs=1e-6)


def test_samples_of_one_mode_are_precise_and_recall_the_other_one_not():
    a, b = features(40, 4, 0), features(60, 4, 1, shift=100)
    found = sample_quality(a, torch.cat([a, b]))
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(0.4)
    found = sample_quality(torch.cat([a, b]), a)
    assert found["precision"] == pytest.approx(0.4)
    assert found["recall"] == 1


def test_inception_score_of_known_cases():
    assert inception_score(torch.zeros(50, 4)) == pytest.approx((1, 0), abs=1e-12)
    one_class = torch.zeros(50, 4)
    one_class[:, 2] = 50
    assert inception_score(one_class)[0] == pytest.approx(1, abs=1e-9)
    # One part has 1,000 of 10,000: classes are nearly even in it.
    for sure in (60.0, 5000.0):
        mean, std = inception_score(sure * torch.eye(5).repeat(2000, 1))
        assert mean == pytest.approx(5, rel=0.01)
        assert 0 < std < 0.05
    assert inception_score(5000 * torch.eye(9)[torch.zeros(30, dtype=torch.long)])[0] == pytest.approx(1, abs=1e-9)
    assert math.isnan(inception_score(torch.full((20, 3), torch.nan))[0])


def test_inception_score_equals_its_formula():
    row = torch.tensor([[2.0, 0.5, -1.0], [0.0, 3.0, 0.1]], dtype=torch.float64)
    logits = row.repeat(5000, 1)
    p = row.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(logits)[0] == pytest.approx(expected, rel=2e-3)


def test_quality_refuses_what_it_cannot_judge():
    with pytest.raises(InputError, match="5 of each"):
        sample_quality(features(4, 3, 0), features(50, 3, 1))
    with pytest.raises(InputError, match="of one kind"):
        sample_quality(features(50, 3, 0), features(50, 4, 1))
    with pytest.raises(InputError, match="not finite"):
        sample_quality(features(50, 3, 0).index_fill(0, torch.tensor(3), torch.nan), features(50, 3, 1))
    with pytest.raises(InputError, match="at least ten"):
        inception_score(torch.zeros(9, 3))


def test_a_missing_torch_fidelity_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in ("metric_kid", "metric_prc", "metric_isc"):
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{name}", None)
    with pytest.raises(InputError, match=r"timm_jem\[eval\]"):
        sample_quality(features(50, 3, 0), features(50, 3, 1))
    with pytest.raises(InputError, match=r"timm_jem\[eval\]"):
        inception_score(torch.zeros(50, 3))


def test_eight_bit():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(eight_bit(to_pixels(levels)), levels)
    assert eight_bit(torch.tensor([[-9.0, -1, 0.001, 1, torch.inf]])).tolist() == [[0, 0, 128, 255, 255]]
    u = torch.zeros(3, 1, 2, 2)
    u[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="1 of 3 images"):
        eight_bit(u)


def test_nearest_neighbours_equal_numpy():
    images, train = (torch.randint(256, (n, 3, 4, 4), generator=seeded(n), dtype=torch.uint8) for n in (13, 70))
    a, b = images.flatten(1).numpy().astype(float) / 255, train.flatten(1).numpy().astype(float) / 255
    expected = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    distances, rows = nearest_neighbours(images, train, k=3, batch_size=5)
    assert distances.shape == rows.shape == (13, 3)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3], rtol=1e-12)
    np.testing.assert_array_equal(rows, np.argsort(expected, axis=1)[:, :3])


def test_copies_have_a_distance_of_exactly_zero():
    """float32 would put an image and its copy 10⁻² apart, where one pixel changed by 1 is 4 · 10⁻³."""
    train = torch.randint(256, (40, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    images = train[[31, 7]].clone()
    images[1, 0, 0, 0] ^= 1
    distances, rows = nearest_neighbours(images, train)
    assert rows.tolist() == [[31], [7]]
    assert distances.tolist() == [[0], [1 / 255]]


def test_nearest_neighbours_refuse_other_images():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for bad in (images.float(), images[:, :, :3], images[:0]):
        with pytest.raises(InputError):
            nearest_neighbours(images, bad)
    with pytest.raises(InputError, match="3 nearest"):
        nearest_neighbours(images, images, k=3)


def test_distance_within_classes_of_known_cases():
    flat = torch.tensor([0, 0, 51, 255, 255, 102, 7], dtype=torch.uint8)[:, None, None, None].expand(7, 3, 2, 2)
    y = torch.tensor([4, 4, 4, 2, 2, 9, -1])
    # Class 4: √12 · (0 + 0.2 + 0.2) / 3; class 2: copies; class 9 is one image, and nobody knows what the last is.
    expected = math.sqrt(12) * 0.4 / 3 / 2
    assert within_class_distance(flat, y) == pytest.approx(expected, rel=1e-12)
    assert within_class_distance(flat.repeat(1, 1, 9, 9), y) == pytest.approx(9 * expected, rel=1e-12)
    assert within_class_distance(flat[3:5].repeat(40, 1, 1, 1), torch.zeros(80, dtype=torch.long)) == 0
    for none in (torch.arange(7), torch.full((7,), -1)):
        assert math.isnan(within_class_distance(flat, none))


def test_distance_within_classes_equals_numpy_in_parts_of_any_size():
    images, y = torch.randint(256, (90, 3, 4, 4), generator=seeded(), dtype=torch.uint8), torch.arange(90) % 4
    x, means = images.flatten(1).numpy().astype(float) / 255, []
    for label in range(4):
        apart = np.sqrt(((x[y == label][:, None] - x[y == label][None]) ** 2).sum(-1))
        means.append(apart[np.triu_indices(len(apart), 1)].mean())
    for size in (1, 7, 22, 23, 256):
        assert within_class_distance(images, y, batch_size=size) == pytest.approx(np.mean(means), rel=1e-12)


def test_collapse_shrinks_the_distance_within_classes_and_noise_hides_it_as_documented():
    images, y = torch.randint(100, 150, (200, 1, 16, 16), generator=seeded(), dtype=torch.uint8), torch.arange(200) % 2
    assert within_class_distance(images[:10].repeat(20, 1, 1, 1), y) < 0.9 * within_class_distance(images, y)
    noisy = (images.double() + 20 * torch.randn(images.shape, generator=seeded(1))).round().to(torch.uint8)
    squared = within_class_distance(images, y) ** 2 + 2 * 256 * (20 / 255) ** 2
    assert within_class_distance(noisy, y) == pytest.approx(math.sqrt(squared), rel=0.02)


def patches(n, side, channels=3):
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[:channels] / 127.5 - 1
    rows, columns = (torch.randint(size - side, (n,), generator=seeded(side)).tolist() for size in photo.shape[1:])
    return torch.stack([photo[:, a : a + side, b : b + side] for a, b in zip(rows, columns, strict=True)])


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (1, 64)])
def test_noise_and_blur_are_seen_in_the_pyramid_and_not_in_thumbnails(channels, side):
    real, fake = patches(2000, side, channels).split([1500, 500])
    noisy = fake + 0.1 * torch.randn(fake.shape, generator=seeded(1))
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(fake, (1, 1, 1, 1), mode="replicate"), 3, 1)
    for changed in (noisy, blurred):
        before, after = (frechet_distance(thumbnails(u), thumbnails(real)) for u in (fake, changed))
        assert after == pytest.approx(before, rel=0.1)
        before, after = (frechet_distance(pyramid(u), pyramid(real)) for u in (fake, changed))
        assert after > 1.25 * before


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 8), (1, 4, 6), (2, 1, 8)])
def test_up_to_8x8_the_pyramid_is_the_thumbnails_bit_for_bit(size):
    u = torch.randn(5, *size, generator=seeded())
    assert torch.equal(pyramid(u), thumbnails(u))


def test_the_pyramid_of_known_images():
    board = 1 - 2.0 * (torch.arange(32)[:, None] + torch.arange(32)).remainder(2)
    wide = board[:16, :16].repeat_interleave(2, 0).repeat_interleave(2, 1)
    u = torch.stack([0.5 * board, 0.25 * wide, torch.full((32, 32), 0.3), torch.full((32, 32), 7.0)])[:, None]
    # 64 thumbnails, then four quarters of what 32×32 has beyond 16×16, and of that beyond 8×8.
    expected = torch.zeros(4, 72)
    expected[0, 64:68], expected[1, 68:], expected[2:, :64] = (
        4 * 0.5 / 0.675978,
        4 * 0.25 / 0.675978,
        torch.tensor([[0.3], [1]]),
    )
    torch.testing.assert_close(pyramid(u), expected, atol=1e-6, rtol=1e-5)
    assert pyramid(torch.zeros(2, 3, 64, 48)).shape == (2, 3 * (64 + 3 * 4))
    assert pyramid(torch.full((1, 1, 28, 28), torch.nan)).isnan().all()


def test_normal_noise_is_as_large_in_the_pyramid_as_in_the_pixels():
    u = 0.1 * torch.randn(500, 1, 32, 32, generator=seeded())
    of_thumbnails, of_detail = pyramid(u).square().split([64, 8], 1)
    # A thumbnail's pixel is of 16, of whose variance it has one 16th, and the levels have 3/4 and 3/16.
    assert of_thumbnails.sum(1).mean() == pytest.approx(64 * 0.01 / 16, rel=0.02)
    assert of_detail[:, :4].sum(1).mean() == pytest.approx(64 * 0.01 * 3 / 4, rel=0.02)
    assert of_detail[:, 4:].sum(1).mean() == pytest.approx(
        64 * 0.01 * 3 / 16, rel=0.05
    )  # of few pixels a quarter: their mean varies


def test_chains_seen_at_a_length_are_those_that_sample_draws():
    jem, y = model(noise_std=0.0), torch.arange(6)
    lengths = [9, 3, 5]
    found = dict(chains_by_length(jem, lengths, y=y, generator=seeded(), batch_size=4))
    assert list(found) == [3, 5, 9]
    for steps, u in found.items():
        drawn = jem.sample(y=y, num_steps=steps, generator=seeded(), batch_size=4)
        assert torch.equal(jem.normalize(u), drawn)


@pytest.mark.parametrize(("jitter", "rest"), [(0, None), (1, None), (1, 0.4)])
def test_the_first_view_of_noisy_chains_is_what_sample_draws_and_the_last_goes_on_from_noisy_ones(jitter, rest):
    jem, y = model(jitter=jitter, rest=rest), torch.arange(6)
    jem.fit_reference(torch.randn(40, 1, 8, 8, generator=seeded(3)), torch.arange(40) % 10)
    found = dict(chains_by_length(jem, [4, 7], y=y, generator=seeded()))
    assert torch.equal(jem.normalize(found[4]), jem.sample(y=y, num_steps=4, generator=seeded()))
    # Noise-free steps draw nothing: 7 steps with one stream of noise are those after 4 - 2 noisy ones.
    assert torch.equal(jem.normalize(found[7]), jem.sample(y=y, num_steps=7, generator=seeded()))


def test_chains_whose_steps_decay_are_seen_as_sample_draws_them():
    jem, y = model(step_decay=True), torch.arange(6)
    found = dict(chains_by_length(jem, [9, 4, 7], y=y, generator=seeded(), batch_size=4))
    assert list(found) == [4, 7, 9]
    for steps, u in found.items():
        drawn = jem.sample(y=y, num_steps=steps, generator=seeded(), batch_size=4)
        assert torch.equal(jem.normalize(u), drawn)


def test_the_first_chains_of_more_are_the_same():
    jem, y = model(), torch.arange(12) % 10
    many = dict(chains_by_length(jem, [4, 7], y=y, generator=seeded()))
    few = dict(chains_by_length(jem, [4, 7], y=y[:5], generator=seeded()))
    for steps, u in few.items():
        torch.testing.assert_close(u, many[steps][:5])


def test_chains_by_length_leave_the_model_alone():
    jem = model().train()
    jem.backbone.get_classifier().weight.requires_grad_(False)
    before = [(m.training, [p.requires_grad for p in m.parameters()]) for m in jem.modules()]
    state = {key: value.clone() for key, value in jem.state_dict().items()}
    for _ in chains_by_length(jem, [3, 4], y=torch.arange(2), generator=seeded()):
        assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in jem.modules()] == before
    assert all(p.grad is None for p in jem.parameters())
    assert all(torch.equal(value, state[key]) for key, value in jem.state_dict().items())


def test_bad_chains_are_refused_before_the_first_step():
    jem, y = model(), torch.arange(4)
    with pytest.raises(InputError, match="at least 3"):
        chains_by_length(jem, [2, 9], y=y, generator=seeded())
    with pytest.raises(InputError, match="no lengths"):
        best_num_steps(jem, torch.zeros(4, 1, 8, 8), y, [], generator=seeded())


def test_best_num_steps_is_what_its_steps_are_written_out():
    """The loop as recipes/train.py has always had it."""
    jem, y = model(), torch.arange(40) % 10
    real = torch.rand(60, 1, 8, 8, generator=seeded(1)) * 2 - 1
    generators, config = chain_generators(draw_seeds(40, seeded())), jem.sgld
    u, done, expected = uniform_noise((40, 1, 8, 8), generator=generators), 0, {}
    with frozen(jem):
        for steps in (3, 5, 8):
            noisy = steps - 2
            u = sgld(jem.pixel_energy, u, config, y=y, generator=generators, num_steps=noisy - done, batch_size=256)
            done = noisy
            final = sgld(jem.pixel_energy, u, config, y=y, num_steps=2, denoise_steps=2, batch_size=256)
            expected[steps] = frechet_distance(thumbnails(final), thumbnails(real))
    best, distances = best_num_steps(jem, real, y, [5, 3, 8], generator=seeded())
    assert distances == expected
    assert best == min(expected, key=expected.get)
    assert best_num_steps(jem, iter(real.split(7)), y, [5, 3, 8], generator=seeded()) == (best, distances)
    none = [(real[:, :, 1:], "no pixels"), (torch.tensor(1.0), "no pixels"), (None, "no pixels")]
    for bad, message in [([], "are 0"), (real[:1], "are 1"), (real / 0, "finite"), *none]:
        with pytest.raises(InputError, match=f"images to be near to .*{message}"):
            best_num_steps(jem, bad, y, [5], generator=seeded())


class Well(torch.nn.Module):
    """E(x) = ½ |x|², up to log 2."""

    num_classes = 2

    def forward(self, x):
        return (-0.5 * x.square().sum((1, 2, 3)))[:, None].expand(-1, 2)


def test_chains_that_run_away_are_never_the_best():
    config = timm_jem.SGLDConfig(step_size=1e9, noise_std=0.0)
    jem = timm_jem.JEM(Well(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)}, sgld=config)
    real, y = torch.rand(30, 1, 2, 2, generator=seeded(1)) * 2 - 1, torch.zeros(20, dtype=torch.long)
    best, distances = best_num_steps(jem, real, y, [1, 9], generator=seeded())
    assert best == 1
    assert math.isnan(distances[9])
    assert math.isfinite(distances[1])


def test_infinite_chains_are_not_taken_for_white_ones():
    config = timm_jem.SGLDConfig(step_size=1e9, noise_std=0.0)
    jem = timm_jem.JEM(Well(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)}, sgld=config)
    real, y = torch.rand(30, 1, 2, 2, generator=seeded(1)) * 2 - 1, torch.zeros(20, dtype=torch.long)
    ((_, u),) = chains_by_length(jem, [5], y=y, generator=seeded())
    assert u.isinf().all()
    best, distances = best_num_steps(jem, real, y, [1, 5], generator=seeded())
    assert best == 1
    assert math.isnan(distances[5])
