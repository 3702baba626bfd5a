"""Sharpness-aware minimisation goes where the loss rises most, and comes back."""

import contextlib

import pytest
import torch
from torch import nn

from timm_jem import InputError
from timm_jem.training.sam import SAM


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_ascent_is_the_papers_and_undone_to_the_bit(adaptive):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    before = [w.detach().clone() for w in weights]
    (weights[0].pow(2).sum() * 3 + weights[1].sin().sum()).backward()  # the last one has no gradient
    g, w = (torch.cat([getattr(p, name).flatten() for p in weights[:2]]) for name in ("grad", "data"))
    e = w**2 * g * 0.5 / (w.abs() * g).norm() if adaptive else g * 0.5 / g.norm()
    with contextlib.suppress(KeyError), SAM(0.5, adaptive).ascended(weights):
        torch.testing.assert_close(torch.cat([p.data.flatten() for p in weights[:2]]), w + e)
        assert torch.equal(weights[2], before[2])
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("rho", [2.0, 5.0])
@pytest.mark.parametrize("slope", [0.0, 1e-42, 1e-25])  # whose squares are 0
def test_where_there_is_no_slope_weights_stay(slope, rho):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), slope)
    with SAM(rho).ascended([weight]):
        assert torch.equal(weight, torch.ones(3))


def test_a_slope_that_is_not_finite_is_seen():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    with SAM().ascended([weight]):
        assert weight.isnan().all()
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("rho", [0, -1.0, float("nan"), "2"])
def test_a_radius_is_a_number_above_0(rho):
    with pytest.raises(InputError, match="rho of SAM"):
        SAM(rho)
