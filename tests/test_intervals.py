import pytest
import torch

from timm_jem import InputError
from timm_jem.evaluation.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_of_known_cases():
    # Newcombe, Statistics in Medicine 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)
    low, high = wilson_interval(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1), abs=1e-4)
    with pytest.raises(InputError, match="no images"):
        wilson_interval(0, 0)


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(lambda rows: values[rows].mean().item(), 2000, num_resamples=2000)
    half = 1.96 * values.std().item() / 2000**0.5
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)
    assert (low, high) == bootstrap_interval(lambda rows: values[rows].mean().item(), 2000, num_resamples=2000)


@pytest.mark.parametrize("given", [(5, 3), (-1, 3), (1.5, 3), (1, 2.0)])
def test_what_is_no_proportion_is_one_line(given):
    with pytest.raises(InputError):
        wilson_interval(*given)


@pytest.mark.parametrize("given", [{"n": 0}, {"n": 2.5}, {"num_resamples": 0}])
def test_what_cannot_be_drawn_anew_is_one_line(given):
    with pytest.raises(InputError):
        bootstrap_interval(lambda rows: 0.0, **{"n": 5, **given})


def test_the_basic_interval_takes_off_the_bias_that_percentiles_double():
    def mean_of_squares(of):  # of a square of the mean: biased by the variance of the mean
        return of.mean().square().item()

    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 0.1
    found = mean_of_squares(values)
    percentile = bootstrap_interval(lambda rows: mean_of_squares(values[rows]), 50)
    low, high = bootstrap_interval(lambda rows: mean_of_squares(values[rows]), 50, value=found)
    assert (low, high) == (2 * found - percentile[1], 2 * found - percentile[0])
    assert low < 0.01 < high
