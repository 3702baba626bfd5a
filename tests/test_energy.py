import math

import pytest
import torch

from timm_jem import energy, log_density


def test_energies_of_hand_made_logits():
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    torch.testing.assert_close(energy(logits), torch.tensor([-math.log(4.0), -1.0 - math.log(2.0)]))
    torch.testing.assert_close(energy(logits, torch.tensor([1, 0])), torch.tensor([-math.log(3.0), -1.0]))


def test_softmax_is_the_ratio_of_the_densities():
    logits = torch.randn(5, 7, dtype=torch.float64)
    y = torch.randint(7, (5,))
    p = (log_density(logits, y) - log_density(logits)).exp()
    torch.testing.assert_close(p, logits.softmax(1).gather(1, y[:, None])[:, 0])


def test_large_logits_stay_finite():
    logits = torch.tensor([[3000.0, 2999.0]])
    assert energy(logits).item() == pytest.approx(-3000.3133, abs=1e-3)


def test_half_precision_is_reduced_in_float32():
    logits = torch.randn(4, 10).bfloat16()
    torch.testing.assert_close(energy(logits), energy(logits.float()), rtol=0, atol=0)
