import math

import pytest
import timm
import torch
from small_networks import MEANS, SHAPE, STDS, Gaussian, Kept, Wells, in_pixels

import timm_jem
from timm_jem import InputError, SGLDConfig
from timm_jem.data import DataConfig, load_splits
from timm_jem.pixels import to_pixels

CHAINS = 2000
PRECISION = torch.tensor([[3.0, 1.0, 0.5, 0.0], [1.0, 2.0, 0.3, 0.4], [0.5, 0.3, 2.5, -0.8], [0.0, 0.4, -0.8, 1.5]])
MEAN = torch.tensor([0.1, -0.2, 0.3, 0.0])
KNOWN = torch.tensor([0.6, -0.5])  # the first two pixels
MASK = torch.tensor([[False, False], [True, True]])  # the last two are unknown


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=5, seed=1):
    return torch.rand(n, *SHAPE, generator=seeded(seed)) * 1.6 - 0.8


def test_chains_of_a_gaussian_energy_are_its_conditional():
    """Mean −A_uu⁻¹ A_uk (k − m_k) + m_u, and, with step α and noise √2α, covariance (A_uu − α A_uu² / 2)⁻¹."""
    step = 0.2
    jem = in_pixels(Gaussian(PRECISION, MEAN), (1, 2, 2), step_size=step, noise_std=math.sqrt(2 * step))
    x = torch.cat([KNOWN, torch.full((2,), math.nan)]).view(1, 1, 2, 2).expand(CHAINS, -1, -1, -1)
    found = jem.restore(x, MASK, generator=seeded(), num_steps=40, batch_size=CHAINS).flatten(1)
    assert torch.equal(found[:, :2], KNOWN.expand(CHAINS, 2))
    inner = PRECISION[2:, 2:]
    expected = MEAN[2:] - torch.linalg.solve(inner, PRECISION[2:, :2] @ (KNOWN - MEAN[:2]))
    torch.testing.assert_close(found[:, 2:].mean(0), expected, atol=0.06, rtol=0)
    covariance = torch.linalg.inv(inner - step / 2 * inner @ inner)
    torch.testing.assert_close(found[:, 2:].T.cov(), covariance, atol=0.08, rtol=0)


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0])
def test_denoising_a_gaussian_energy_gives_the_posterior(noise):
    """Of the chains' own density, of temperature T = s² / (2α), and the noise: mean x / (1 + c σ² / T).

    With r = s² / (2σ²) the variance is s² / ((1 + r)² − (1 − α c)²), however large r is.
    """
    curvature, step, std = 2.0, 0.3, 0.2
    gaussian = Gaussian(curvature * torch.eye(4), torch.zeros(4))
    jem = in_pixels(gaussian, (1, 2, 2), step_size=step, noise_std=std)
    seen = torch.tensor([0.8, -0.4, 0.2, 0.0])
    x = seen.view(1, 1, 2, 2).expand(CHAINS, -1, -1, -1)
    found = jem.restore(x, noise=noise, generator=seeded(), num_steps=30, batch_size=CHAINS).flatten(1)
    temperature, pull = std**2 / (2 * step), std**2 / (2 * noise**2)
    torch.testing.assert_close(found.mean(0), seen / (1 + curvature * noise**2 / temperature), atol=0.02, rtol=0)
    variance = std**2 / ((1 + pull) ** 2 - (1 - step * curvature) ** 2)
    torch.testing.assert_close(found.var(0), torch.full((4,), variance), rtol=0.15, atol=1e-9)


def test_noisy_pixels_come_back_within_the_clamp():
    jem = in_pixels(Gaussian(torch.eye(4), torch.zeros(4)), (1, 2, 2), step_size=0.1, noise_std=0.01, pixel_clamp=1.0)
    x = torch.tensor([1.6, -1.7, 0.2, math.nan]).view(1, 1, 2, 2)
    mask = torch.tensor([[False, False], [False, True]])
    found = jem.restore(x, mask, noise=0.01, generator=seeded(), num_steps=3).flatten()
    assert found.abs().max() <= 1
    torch.testing.assert_close(found[:3], torch.tensor([1.0, -1.0, 0.2]), atol=0.05, rtol=0)


def test_inpainting_and_denoising_at_once():
    """With T = 1, where chains sample exp(−E): precisions add up, those of unknown pixels being zero."""
    jem = in_pixels(Gaussian(PRECISION, MEAN), (1, 2, 2), step_size=0.2, noise_std=0.4**0.5)
    seen = torch.cat([KNOWN, torch.zeros(2)])
    x = seen.view(1, 1, 2, 2).expand(CHAINS, -1, -1, -1)
    found = jem.restore(x, MASK, noise=0.5, generator=seeded(), num_steps=40, batch_size=CHAINS).flatten(1)
    held = torch.tensor([4.0, 4.0, 0.0, 0.0])
    expected = torch.linalg.solve(PRECISION + held.diag(), PRECISION @ MEAN + held * seen)
    torch.testing.assert_close(found.mean(0), expected, atol=0.06, rtol=0)


def test_classes_are_those_asked_for():
    jem = in_pixels(Wells(), step_size=0.5, noise_std=0.0)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    x, y = images(3), torch.tensor([2, 0, 1])
    found = jem.restore(x, mask, y=y, num_steps=40)
    centres = jem.backbone.centres.detach()[y]
    torch.testing.assert_close(found[:, :, 2:], centres[:, :, 2:], atol=1e-5, rtol=0)
    assert torch.equal(found[:, :, :2], x[:, :, :2])
    one = jem.restore(x, mask, y=1, num_steps=40)
    torch.testing.assert_close(one[:, :, 2:], jem.backbone.centres.detach()[1, :, 2:].expand(3, -1, -1, -1), atol=1e-5, rtol=0)


def test_known_pixels_come_back_bit_for_bit():
    """Whatever the normalisation, and whatever stands in for those that are unknown."""
    torch.manual_seed(0)
    jem = timm_jem.wrap(timm.create_model("test_resnet", num_classes=4), input_size=(3, 16, 16), mean=MEANS, std=STDS)
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    assert not torch.equal(jem.normalize(jem.denormalize(x)), x)
    mask = torch.rand(16, 16) < 0.4
    results = []
    for stand_in in (math.nan, math.inf, 0.0, 255.0):
        given = x.masked_fill(mask, stand_in)
        results.append(jem.restore(given, mask, generator=seeded(), num_steps=3))
        assert torch.equal(results[-1][:, :, ~mask], x[:, :, ~mask])
        assert torch.equal(results[-1], results[0])
    assert (results[0][:, :, mask] != x[:, :, mask]).float().mean() > 0.99
    nothing = torch.zeros(16, 16, dtype=torch.bool)
    assert torch.equal(jem.restore(x, nothing, num_steps=1), x)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (5, 1, 4, 4), (5, 2, 4, 4)])
def test_masks_of_any_of_four_shapes(shape):
    flat = Gaussian(torch.eye(32), torch.zeros(32))
    jem = in_pixels(flat, (2, 4, 4), step_size=1.0, noise_std=0.0)
    x = torch.rand(5, 2, 4, 4, generator=seeded()) + 0.1
    mask = torch.rand(shape, generator=seeded(1)) < 0.5
    assert torch.equal(jem.restore(x, mask, num_steps=1), x.masked_fill(mask, 0))


def test_each_image_has_a_chain_of_its_own():
    jem = in_pixels(Wells(), step_size=0.1, noise_std=0.1)
    x, mask = images(5), torch.ones(4, 4, dtype=torch.bool).triu()
    together = jem.restore(x, mask, generator=seeded(), num_steps=5)
    torch.testing.assert_close(jem.restore(x[:2], mask, generator=seeded(), num_steps=5), together[:2], atol=1e-6, rtol=0)
    split = jem.restore(x, mask, generator=seeded(), num_steps=5, batch_size=4)
    torch.testing.assert_close(split, together, atol=1e-6, rtol=0)
    assert not torch.equal(jem.restore(x, mask, generator=seeded(1), num_steps=5), together)


def test_unknown_pixels_start_where_fresh_chains_do():
    jem = in_pixels(Wells(), step_size=1e-9, noise_std=0.0)
    of_class = torch.cat([images(20, seed) * 0.1 + centre for seed, centre in enumerate((-0.5, 0.0, 0.5))])
    jem.starts = timm_jem.ClassGaussians.fit(of_class, torch.arange(3).repeat_interleave(20), 3)
    everything = torch.ones(4, 4, dtype=torch.bool)
    found = jem.restore(images(3), everything, y=[0, 1, 2], generator=seeded(), num_steps=1).flatten(1)
    torch.testing.assert_close(found.mean(1), torch.tensor([-0.5, 0.0, 0.5]), atol=0.1, rtol=0)
    jem.starts = None
    noise = jem.restore(images(3), everything, y=[0, 1, 2], generator=seeded(), num_steps=1).flatten(1)
    assert (noise.std(1) > 0.4).all()


def test_images_of_another_size_start_from_noise():
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 16, 16))
    x, mask = torch.zeros(2, 3, 24, 20), torch.ones(24, 20, dtype=torch.bool)
    mask[0] = False
    found = jem.restore(x, mask, generator=seeded(), num_steps=1)
    assert torch.equal(found[:, :, 0], x[:, :, 0])
    assert jem.denormalize(found)[:, :, 1:].std() > 0.3
    try:
        torch.set_default_dtype(torch.float64)
        again = jem.restore(x, mask, generator=seeded(), num_steps=1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(again, found)


def test_chains_whose_steps_decay_are_those_of_sample_where_nothing_is_known():
    jem = in_pixels(Wells(), num_steps=5, denoise_steps=2, noise_std=0.1, step_size=0.5, step_decay=True)
    found = jem.restore(images(), torch.ones(4, 4, dtype=torch.bool), generator=seeded())
    torch.testing.assert_close(found, jem.sample(5, generator=seeded()))


def test_lengths_are_those_of_fresh_chains():
    jem, seen = in_pixels(Wells(), num_steps=3, sample_steps=7, denoise_steps=2, noise_std=0.5, step_size=1e-9), {}
    everything = torch.ones(4, 4, dtype=torch.bool)
    jem.restore(images(), everything, on_step=seen.__setitem__)
    assert list(seen) == list(range(1, 8))
    assert not torch.equal(seen[4], seen[5])
    torch.testing.assert_close(seen[7], seen[5])  # without noise
    seen.clear()
    jem.restore(images(), noise=0.5, on_step=seen.__setitem__)
    assert len(seen) == 3  # from the images, and so no further than in training
    seen.clear()
    jem.restore(images(), everything, on_step=seen.__setitem__, sgld_config=SGLDConfig(num_steps=4))
    assert len(seen) == 4


def test_erased_halves_of_digits_come_back():
    """Under the Gaussian of the training images the erased half is much nearer to the truth than the mean image is."""
    splits = load_splits(DataConfig())
    train, test = to_pixels(splits.train.images).flatten(1).double(), to_pixels(splits.test.images[:50]).double()
    precision = torch.linalg.inv(train.T.cov(correction=0) + 0.02 * torch.eye(64, dtype=torch.float64))
    jem = in_pixels(Gaussian(precision, train.mean(0)), (1, 8, 8), step_size=0.015, noise_std=0.001)
    lower = torch.arange(8)[:, None].expand(8, 8) > 4
    found = jem.restore(test, lower, generator=seeded(), num_steps=100)
    assert torch.equal(found[..., ~lower], test[..., ~lower])
    away, of_mean = ((images - test)[..., lower].square().mean() for images in (found, train.mean(0).view(1, 1, 8, 8)))
    assert away < 0.65 * of_mean
    noisy = test + 0.4 * torch.randn(test.shape, generator=seeded(2), dtype=torch.float64)
    config = SGLDConfig(step_size=0.015, noise_std=0.03**0.5, denoise_steps=20)  # of T = 1
    cleaned = jem.restore(noisy, noise=0.4, generator=seeded(), num_steps=60, sgld_config=config)
    assert (cleaned - test).square().mean() < 0.5 * (noisy - test).square().mean()


def test_the_model_is_left_alone():
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), norm_layer="batchnorm2d", drop_rate=0.5)
    jem.train()
    jem.backbone.get_classifier().weight.requires_grad_(False)
    kept, random_state, x = Kept(jem), torch.get_rng_state(), torch.zeros(3, 1, 8, 8)
    mask = torch.ones(8, 8, dtype=torch.bool).triu()
    with torch.inference_mode():
        jem.restore(x, mask, noise=0.1, generator=seeded(), num_steps=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, torch.zeros(3, 1, 8, 8))

    def fail(step, v):
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        jem.restore(x, mask, on_step=fail)
    kept.check()


GOOD_MASK = torch.ones(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": None}, "nothing to do"),
        ({"mask": GOOD_MASK.float()}, "give bool"),
        ({"mask": GOOD_MASK.int()}, "give bool"),
        ({"mask": GOOD_MASK[:3]}, r"shape \(4, 4\)"),
        ({"mask": GOOD_MASK.expand(5, 4, 4)}, r"\(5, 1, 4, 4\)"),
        ({"mask": GOOD_MASK.tolist()}, "a list"),
        ({"mask": GOOD_MASK.to("meta")}, "meta"),
        ({"mask": GOOD_MASK.to_sparse()}, "sparse"),
        ({"x": images()[0]}, "at least one image"),
        ({"x": images()[:0]}, "at least one image"),
        ({"x": images().byte()}, "give model input"),
        ({"x": images().double()}, "torch.float64"),
        ({"x": torch.full((5, *SHAPE), math.nan), "mask": GOOD_MASK.triu()}, "NaN"),
        ({"x": images().expand(-1, 3, -1, -1)}, "shape"),
        ({"y": 3}, "label 3"),
        ({"y": [0, 1]}, "one label per image"),
        ({"noise": 0}, "noise"),
        ({"noise": -1}, "noise"),
        ({"noise": math.nan}, "noise"),
        ({"noise": 255}, "noise"),
        ({"noise": 1e-200}, "noise"),
        ({"noise": 0.1, "sgld_config": SGLDConfig(noise_std=0.0)}, "noise_std is above 0"),
        ({"generator": 3}, "generator"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"sgld_config": {}}, "sgld_config is a dict"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_step": 3}, "on_step"),
    ],
)
def test_bad_input_is_said_in_a_line(options, message):
    jem = in_pixels(Wells())
    kept = Kept(jem)
    with pytest.raises(InputError, match=message) as error:
        jem.restore(**{"x": images(), "mask": GOOD_MASK, **options})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    kept.check()
