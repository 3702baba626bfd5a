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
