import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.classification import MulticlassCalibrationError

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation import (
    accuracy,
    best_num_steps,
    expected_calibration_error,
    frechet_distance,
    image_grid,
    predict,
    thumbnails,
)
from timm_jem.pixels import to_pixels


def test_calibration_error_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(2000, 5, generator=generator) * 2).softmax(1)
    y = torch.randint(5, (2000,), generator=generator)
    expected = MulticlassCalibrationError(5, n_bins=15, norm="l1")(probabilities, y).item()
    assert expected_calibration_error(probabilities, y) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_known_cases():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0
    assert expected_calibration_error(sure, torch.tensor([0, 0, 1, 1])) == 0.5
    assert accuracy(sure, torch.tensor([0, 0, 1, 1])) == 0.5


def test_frechet_distance_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-6)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * cov_a.trace(), rel=1e-6)


def test_equal_sets_are_no_distance_apart():
    for dimensions, scale in ((300, 1.0), (64, 1e6), (5, 1e-6)):
        a = torch.randn(400, dimensions, generator=torch.Generator().manual_seed(0)) * scale
        assert 0 <= frechet_distance(a, a.flip(0)) <= 1e-12 * dimensions * scale**2


@pytest.mark.parametrize("scale", [1e80, 1e140, 1e-80])
def test_features_of_any_size_have_their_distance(scale):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(60, 64, dtype=torch.float64, generator=generator) for _ in range(2))
    assert frechet_distance(a * scale, b * scale) == pytest.approx(frechet_distance(a, b) * scale**2, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [(torch.ones(5, 3), torch.ones(5, 4)), (torch.ones(5), torch.ones(5)), (torch.ones(5, 0), torch.ones(5, 0)), ("x", "y")],
)
def test_features_that_cannot_be_compared_are_one_line(a, b):
    with pytest.raises(InputError) as error:
        frechet_distance(a, b)
    assert "\n" not in str(error.value)


def test_accuracy_of_ties_and_of_ruled_out_classes():
    tied = torch.zeros(4, 3)
    y = torch.tensor([0, 1, 2, 2])
    assert [accuracy(tied, y, top) for top in (1, 2, 3)] == [0.25, 0.5, 1.0]
    masked = torch.tensor([[1.0, -math.inf, 0.0], [-math.inf, 2.0, 5.0]])
    assert accuracy(masked, torch.tensor([0, 1])) == 0.5
    for kind in (np.uint8, np.uint16, np.uint64, np.int8, np.int64):
        assert accuracy(masked.numpy()[::-1], np.array([2, 0], kind)) == 1.0
    assert accuracy([[0.1, 0.9]], [1]) == 1.0


L = torch.eye(3)


@pytest.mark.parametrize(
    ("logits", "y", "top"),
    [
        (L, torch.tensor([0]), 1),
        (L, torch.tensor([[0], [1], [2]]), 1),
        (L, torch.tensor([0, 1, 3]), 1),
        (L, torch.tensor([0, 1, -1]), 1),
        (L, torch.tensor([0.0, 1.0, 2.0]), 1),
        (L, torch.tensor([True, False, True]), 1),
        (L[:0], torch.tensor([], dtype=torch.int64), 1),
        (L[:, :0], torch.tensor([0, 0, 0]), 1),
        (L[0], torch.tensor([0, 1, 2]), 1),
        (L * math.nan, torch.tensor([0, 1, 2]), 1),
        (L - math.inf, torch.tensor([0, 1, 2]), 1),
        (L.to(torch.complex64), torch.tensor([0, 1, 2]), 1),
        (L, torch.tensor([0, 1, 2]), 4),
        (L, torch.tensor([0, 1, 2]), 0),
    ],
)
def test_predictions_that_do_not_fit_their_labels_have_no_accuracy(logits, y, top):
    with pytest.raises(InputError) as error:
        accuracy(logits, y, top)
    assert "\n" not in str(error.value)


def test_thumbnails():
    u = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(thumbnails(u), u.flatten(1))
    large = torch.full((1, 3, 32, 32), 5.0)
    assert torch.equal(thumbnails(large), torch.ones(1, 192))


class Well(torch.nn.Module):
    """E(x) = ½ |x|² up to log 2: chains without noise halve their distance in every step of 0.5."""

    num_classes = 2

    def forward(self, x):
        return (-0.5 * x.square().sum((1, 2, 3)))[:, None].expand(-1, 2)


def test_the_best_length_of_chains_is_the_one_nearest_to_real_images():
    config = timm_jem.SGLDConfig(step_size=0.5, noise_std=0.0, denoise_steps=1)
    jem = timm_jem.JEM(Well(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)}, sgld=config)
    # Uniform noise has the standard deviation 3^-½; k steps leave 2^-k of it.
    real = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 3**-0.5 / 2**3
    best, distances = best_num_steps(
        jem, real, torch.zeros(4000, dtype=torch.long), [2, 3, 5, 9], generator=torch.Generator().manual_seed(0)
    )
    assert best == 3
    assert list(distances) == [2, 3, 5, 9]
    assert distances[9] == pytest.approx(4 / 3 / 64, rel=0.1)  # 4 pixels of variance (1/3) / 2^6


def test_predictions_come_in_order_and_in_eval_mode():
    splits = load_splits(DataConfig())
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), drop_rate=0.5).train()
    loader = torch.utils.data.DataLoader(splits.test, batch_size=100, collate_fn=lambda batch: batch)
    logits, y = predict(jem, loader)
    assert jem.training
    assert torch.equal(y, splits.test.labels)
    with torch.no_grad():
        torch.testing.assert_close(logits, jem.eval()(to_pixels(splits.test.images)))


def test_image_grid():
    u = torch.stack([torch.full((1, 8, 8), level) for level in (-1.0, 0.0, 1.0, 9.0)])
    picture = image_grid(u, 2, ["no", "yes"])
    plain = image_grid(u, 2)
    assert plain.size == (2 * 40 + 3 * 2, 2 * 40 + 3 * 2)
    assert picture.height == plain.height
    assert picture.width > plain.width
    assert [plain.getpixel(xy)[0] for xy in ((20, 20), (60, 20), (20, 60), (60, 60))] == [0, 128, 255, 255]


def test_features_that_are_not_finite_have_no_distance():
    features = torch.randn(50, 192)
    assert np.isnan(frechet_distance(torch.full_like(features, torch.nan), features))
    with pytest.raises(InputError, match="2 of each"):
        frechet_distance(features[:1], features)
