"""Chains get longer by the clock, or as images and chains are told apart."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from timm_jem import InputError
from timm_jem.training.chain_ramp import ChainRamp

CPU = torch.device("cpu")


def test_by_the_clock():
    ramp = ChainRamp(20, 5, 10)
    assert [ramp.num_steps(step) for step in (0, 2, 5, 10, 99)] == [5, 8, 12, 20, 20]
    assert [ChainRamp(20).num_steps(step) for step in (0, 99)] == [20, 20]
    assert ramp.state_dict() == {}


def test_the_auroc_is_the_one_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    data, neg = (torch.randint(9, (n,), generator=generator).double() for n in (40, 30))  # with ties
    expected = roc_auc_score([0] * 40 + [1] * 30, torch.cat([data, neg]))
    assert float(ChainRamp(9, auc=0.5).see(data, neg)) == pytest.approx(expected)


def test_chains_grow_when_eight_iterations_are_told_apart():
    ramp, apart, alike = ChainRamp(3, auc=0.8), (torch.zeros(4), torch.ones(4)), (torch.ones(4), torch.zeros(4))
    grown = []
    for iteration in range(40):
        ramp.see(*(alike if iteration in (8, 9) else apart))  # 0.75 of the second window
        grown.append(ramp.num_steps(iteration))
    assert grown == [1] * 7 + [2] * 16 + [3] * 17


def test_iterations_of_several_batches_are_eight_still():
    ramp, apart = ChainRamp(3, auc=0.8, batches=3), (torch.zeros(4), torch.ones(4))
    grown = []
    for _ in range(17):
        for _ in range(3):
            ramp.see(*apart)
        grown.append(ramp.num_steps(0))
    assert grown == [1] * 7 + [2] * 8 + [3] * 2


def test_a_ramp_goes_on_where_it_was():
    ramp, apart = ChainRamp(9, auc=0.8), (torch.zeros(4), torch.ones(4))
    for _ in range(13):
        ramp.see(*apart)
    again = ChainRamp(9, auc=0.8)
    again.load_state_dict(ramp.state_dict(), CPU)
    for _ in range(3):
        assert again.num_steps(0) == 2
        again.see(*apart)
    assert again.num_steps(0) == 3
    again.load_state_dict({}, CPU)
    assert again.num_steps(0) == 1


def test_a_ramp_that_goes_on_to_longer_chains_grows_there():
    ramp, apart = ChainRamp(2, auc=0.8), (torch.zeros(4), torch.ones(4))
    for _ in range(40):
        ramp.see(*apart)
    longer = ChainRamp(9, auc=0.8)
    longer.load_state_dict(ramp.state_dict(), CPU)
    assert longer.num_steps(0) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"last": 0},
        {"last": 5, "first": 0},
        {"last": 5, "steps": -1},
        {"last": 5, "auc": 1.5},
        {"last": 5, "first": 6, "steps": 1},
        {"last": 5, "first": 6, "auc": 0.5},
    ],
)
def test_a_ramp_that_is_none(wrong):
    with pytest.raises(InputError, match="ramp"):
        ChainRamp(**wrong)
