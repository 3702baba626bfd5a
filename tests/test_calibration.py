import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from timm_jem import InputError
from timm_jem.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)


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
