import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassCalibrationError

from timm_jem import InputError
from timm_jem.evaluation.calibration import (
    binned,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from timm_jem.temperature import best_temperature, is_told


@pytest.fixture(scope="module")
def predictions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 5, generator=generator) * 2
    return logits, torch.randint(5, (2000,), generator=generator)


@pytest.mark.parametrize(("norm", "name"), [("l1", "ece"), ("max", "mce")])
def test_calibration_errors_equal_torchmetrics(predictions, norm, name):
    probabilities, y = predictions[0].softmax(1), predictions[1]
    expected = MulticlassCalibrationError(5, n_bins=15, norm=norm)(probabilities, y).item()
    assert getattr(reliability(probabilities, y), name) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "n", "least", "most"),
    [(0.3, 9, 0, 0), (0.3, 50, 0, 10), (1.0, 9, 0, 0), (1.0, 200, 50, 50), (4.0, 50, 50, 50)],
)
def test_a_temperature_is_told_by_enough_images_that_differ(scale, n, least, most):
    """Labels drawn from softmax(f), whose temperature is 1."""
    generator, told = torch.Generator().manual_seed(0), []
    for _ in range(50):
        logits = scale * torch.randn(n, 3, generator=generator)
        y = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
        if is_told(logits, y, temperature := best_temperature(logits, y)):
            told.append(temperature)
    assert least <= len(told) <= most
    if least == 50:
        assert all(0.4 < temperature < 2 for temperature in told)


def test_labels_that_are_all_right_and_logits_that_are_all_alike_tell_no_temperature():
    y = torch.arange(300) % 3
    for logits in (5 * F.one_hot(y).double(), torch.zeros(300, 3)):
        assert not is_told(logits, y, best_temperature(logits, y))


def test_adaptive_bins_equal_numpy(predictions):
    probabilities, y = predictions[0].softmax(1), predictions[1]
    confidence, correct = probabilities.double().max(1).values.numpy(), (probabilities.argmax(1) == y).numpy()
    order = np.argsort(confidence)
    parts = np.split(order, [math.ceil(i * 2000 / 15) for i in range(1, 15)])
    expected = sum(len(part) / 2000 * abs(correct[part].mean() - confidence[part].mean()) for part in parts)
    bins = reliability(probabilities, y, adaptive=True)
    assert bins.ece == pytest.approx(expected, abs=1e-12)
    assert set(bins.count.tolist()) == {133, 134}


def test_known_cases():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 0])) == 0
    assert expected_calibration_error(sure, torch.tensor([0, 0, 1, 1])) == 0.5
    bins = reliability(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]), 2)
    assert bins.count.tolist() == [0, 2]
    assert math.isnan(bins.accuracy[0])
    assert bins.accuracy[1] == 0.5
    assert bins.confidence[1] == pytest.approx(0.75)
    assert brier_score(torch.tensor([[0.8, 0.2], [0.0, 1.0]]), torch.tensor([0, 0])).tolist() == pytest.approx([0.08, 2])
    logits = torch.tensor([[0.0, math.log(3)]])
    assert negative_log_likelihood(logits, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))


def test_temperature_scaling_finds_the_temperature():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(20_000, 4, generator=generator)
    y = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    found = fit_temperature(true * 3, y)
    assert found == pytest.approx(3, rel=0.05)

    def loss(temperature):
        return negative_log_likelihood(true * 3 / temperature, y).mean().item()

    assert loss(found) < min(loss(found * 1.01), loss(found / 1.01))
    assert fit_temperature(torch.tensor([[9.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.01)  # no optimum: the bound
    assert fit_temperature(torch.tensor([[9.0, 0.0]]), torch.tensor([1])) == pytest.approx(100)


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="not logits"):
        reliability(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(InputError, match="not logits"):
        reliability(torch.tensor([[math.nan, 0.5]]), torch.tensor([0]))
    with pytest.raises(InputError, match="at least one"):
        reliability(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match="val_fraction"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("num_bins", [10, 15, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(num_bins, dtype):
    on = torch.arange(1, num_bins + 1, dtype=torch.float64) / num_bins
    on = on[on >= 0.5].to(dtype)
    bins = reliability(torch.stack([on, 1 - on], 1), torch.zeros(len(on), dtype=torch.int64), num_bins)
    first = num_bins - len(on)
    assert bins.count.tolist() == [0] * first + [1] * len(on)


def test_a_class_that_is_ruled_out_changes_no_temperature(predictions):
    logits, y = predictions
    masked = torch.cat([logits, torch.full((len(logits), 1), -math.inf)], 1)
    assert fit_temperature(masked, y) == fit_temperature(logits, y)
    assert 1 < fit_temperature(logits, y) <= 100.001
    lost = negative_log_likelihood(masked, torch.full_like(y, 5))
    assert (lost == math.inf).all()
    with pytest.raises(InputError, match="no temperature makes it likely"):
        fit_temperature(masked, torch.full_like(y, 5))


@pytest.mark.parametrize("logits", [torch.full((6, 4), 0.3), torch.randn(6, 1), torch.tensor([[2.0, -math.inf]] * 6)])
def test_where_every_temperature_is_as_good_it_is_one(logits):
    assert fit_temperature(logits, torch.zeros(6, dtype=torch.int64)) == 1.0


P = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
BAD_LABELS = [
    torch.tensor([0]),
    torch.tensor([[0], [1]]),
    torch.tensor([0, 2]),
    torch.tensor([0, -1]),
    torch.tensor([0.0, 1.0]),
]


@pytest.mark.parametrize("measure", [reliability, brier_score, fit_temperature, negative_log_likelihood])
@pytest.mark.parametrize("y", BAD_LABELS)
def test_labels_that_do_not_fit_are_one_line(measure, y):
    with pytest.raises(InputError) as error:
        measure(P, y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("measure", [reliability, brier_score])
@pytest.mark.parametrize("p", [2 * P, P * math.nan, -P, P / 2, torch.tensor([0.8, 0.2]), torch.zeros(2, 0)])
def test_what_is_no_probability_is_one_line(measure, p):
    with pytest.raises(InputError):
        measure(p, torch.tensor([0, 1]))


@pytest.mark.parametrize("measure", [fit_temperature, negative_log_likelihood])
@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_without_a_softmax_are_one_line(measure, row):
    with pytest.raises(InputError, match="1 of 3 images are not finite"):
        measure(torch.cat([P, torch.tensor([row])]), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities_are_taken(predictions, dtype):
    p, y = predictions[0].softmax(1), predictions[1]
    assert reliability(p.to(dtype), y).ece == pytest.approx(reliability(p, y).ece, abs=0.01)


def test_bins_of_images_drawn_again_are_those_of_their_probabilities():
    p = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).double().softmax(1)
    y, rows = torch.arange(50) % 7, torch.randint(50, (50,), generator=torch.Generator().manual_seed(1))
    again, expected = binned(p, y).reliability(rows), reliability(p[rows], y[rows])
    for name in ("count", "confidence", "accuracy"):
        torch.testing.assert_close(getattr(again, name), getattr(expected, name), rtol=0, atol=1e-15, equal_nan=True)
