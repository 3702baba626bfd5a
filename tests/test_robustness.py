import sys
from itertools import pairwise

import pytest
import torch
from small_networks import trained_on_digits
from torch import nn

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.attacks import PGDConfig, margin, pgd
from timm_jem.evaluation.robustness import Check, is_correct, robust_correct, sanity_checks, transfer_correct

NORMS = {"linf": 0.05, "l2": 0.3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    """100 test images in [0, 1], their labels, and two small networks that read them; frozen."""
    splits = load_splits(DataConfig())
    networks = [trained_on_digits(splits, seed) for seed in range(2)]
    return splits.test.images[:100].float() / 255, splits.test.labels[:100], *networks


class Linear(nn.Module):
    """Two classes, the sides of a plane through grey."""

    def __init__(self):
        super().__init__()
        self.w = torch.randn(16, generator=seeded(1))

    def forward(self, images):
        score = (images.flatten(1) - 0.5) @ self.w
        return torch.stack([-score, score], 1) / 2


def test_the_curve_of_a_linear_classifier_has_a_closed_form():
    linear = Linear()
    images = 0.5 + 0.2 * (torch.rand(300, 1, 4, 4, generator=seeded(2)) - 0.5)
    y = torch.randint(2, (300,), generator=seeded(3))  # half of them are wrong from the start
    radius = -margin(linear(images), y) / linear.w.abs().sum()
    epsilons = [0.02, 0.0, 0.005, 0.01]  # within the box
    found = robust_correct(linear, images, y, PGDConfig(steps=20), epsilons, generator=seeded(), batch_size=64)
    assert list(found) == sorted(epsilons)
    for eps, correct in found.items():
        certain = (radius - eps).abs() > 1e-5
        assert torch.equal(correct[certain], radius[certain] > eps)
        assert certain.sum() > 290
    shares = [correct.double().mean().item() for correct in found.values()]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_once_broken_stays_broken(digits, norm):
    images, y, network, _ = digits
    eps = NORMS[norm]
    calls = []

    def counted(x):
        calls.append(len(x))
        return network(x)

    # So few steps that attacks of larger size miss some of what smaller ones find.
    config = PGDConfig(norm, steps=1, step_size=0.2)
    found = list(robust_correct(counted, images, y, config, [0.0, eps, 2 * eps, 4 * eps], generator=seeded()).values())
    for smaller, larger in pairwise(found):
        assert not (larger & ~smaller).any()
    assert {int(correct.sum()) for correct in found[:-1]} < set(calls)  # broken ones aren't attacked again
    assert torch.equal(found[0], network(images).argmax(1) == y)


def test_a_classifier_that_draws_noise_is_judged_with_new_noise():
    noise = seeded(4)

    def coin(images):
        side = torch.randint(2, (len(images),), generator=noise)
        return nn.functional.one_hot(side, 2).float() + 0 * images.flatten(1).sum(1, keepdim=True)

    images, y = torch.full((2000, 1, 2, 2), 0.5), torch.zeros(2000, dtype=torch.long)
    epsilons = [0.0, 0.1, 0.2]
    found = robust_correct(coin, images, y, PGDConfig(steps=5), epsilons, generator=seeded(), stochastic=True)
    for correct in found.values():  # neither monotone nor the worst of the attack's own draws
        assert correct.double().mean() == pytest.approx(0.5, abs=0.05)
    assert (found[0.2] & ~found[0.1]).any()


def test_transfer(digits):
    images, y, network, other = digits
    config = PGDConfig(eps=0.1, steps=20)
    across = transfer_correct(network, other, images, y, config, generator=seeded())
    broken = pgd(network, images, y, config, generator=seeded())
    assert torch.equal(across, other(broken).argmax(1) == y)
    white = robust_correct(other, images, y, config, [0.1], generator=seeded())[0.1]
    clean = is_correct(other, images, y)
    assert white.sum() < across.sum() < clean.sum()


def checks_of(classifier, images, y, norm, **options):
    config = PGDConfig(norm, NORMS[norm], steps=20)
    checks = sanity_checks(classifier, images, y, config, generator=seeded(), **options)
    assert all(check.passed == (check.value <= check.limit) for check in checks)
    return {check.name: check for check in checks}


UNBOUNDED = "an attack without bound breaks all images"
ZERO = "gradients of the loss are not zero"
RANDOM = "random points of the ball break no more"
TRANSFER = "attacks made on another model break no more"
BLACK_BOX = "an attack without gradients breaks no more"


@pytest.mark.parametrize("norm", NORMS)
def test_an_honest_classifier_passes_all_checks(digits, norm):
    images, y, network, other = digits
    state = torch.random.get_rng_state()
    checks = checks_of(network, images, y, norm, surrogate=other)
    assert {name for name, check in checks.items() if not check.passed} == set()
    assert {UNBOUNDED, ZERO, RANDOM, TRANSFER, BLACK_BOX} < set(checks)
    assert len(checks) == 9
    assert torch.equal(torch.random.get_rng_state(), state)
    assert TRANSFER not in checks_of(network, images[:20], y[:20], norm)


class Astray(torch.autograd.Function):
    """Changes nothing; its gradient is noise."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn(gradient.shape, generator=seeded(5))


@pytest.mark.parametrize(
    ("norm", "mask", "signs"),
    [
        ("linf", lambda network: lambda x: network(x).round(), {UNBOUNDED, ZERO, RANDOM, TRANSFER, BLACK_BOX}),
        ("l2", lambda network: lambda x: network(x) * 1e4, {UNBOUNDED, ZERO, RANDOM, TRANSFER, BLACK_BOX}),
        ("linf", lambda network: lambda x: network(x.detach()), {UNBOUNDED, ZERO, RANDOM, TRANSFER, BLACK_BOX}),
        ("l2", lambda network: lambda x: network((8 * x).round() / 8), {UNBOUNDED, ZERO}),
        ("linf", lambda network: lambda x: network(Astray.apply(x)), {RANDOM, TRANSFER, BLACK_BOX}),
    ],
    ids=["rounded", "saturated", "cut", "grey levels", "astray"],
)
def test_masked_gradients_are_flagged(digits, norm, mask, signs):
    images, y, network, _ = digits
    failed = {name for name, check in checks_of(mask(network), images, y, norm, surrogate=network).items() if not check.passed}
    assert signs <= failed


def test_an_attack_that_has_not_converged_is_flagged(digits):
    images, y, network, _ = digits
    short = PGDConfig("l2", 0.5, steps=1, step_size=0.01)
    checks = {check.name: check for check in sanity_checks(network, images, y, short, generator=seeded())}
    assert not checks["four times the steps gain little"].passed
    assert not checks["many steps are no weaker than one"].passed


def test_the_black_box_is_left_out_without_its_library(digits, monkeypatch):
    images, y, network, _ = digits
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    checks = checks_of(network, images[:20], y[:20], "linf")
    assert BLACK_BOX not in checks
    assert len(checks) == 7


def test_a_check_of_nan_fails():
    assert not Check("", float("nan"), 1.0, "").passed
    assert Check("", 0.02, 0.02, "").passed


def test_bad_input(digits):
    images, y, network, _ = digits
    calls = []

    def counted(x):
        calls.append(len(x))
        return network(x)

    with pytest.raises(InputError, match="eps"):
        robust_correct(counted, images, y, PGDConfig(), [0.1, -0.1], generator=seeded())
    with pytest.raises(InputError, match="divided by 255"):
        robust_correct(counted, 255 * images, y, PGDConfig(), [0.1], generator=seeded())
    with pytest.raises(InputError, match="divided by 255"):
        sanity_checks(counted, 255 * images, y, PGDConfig(), generator=seeded())
    with pytest.raises(InputError, match="eps"):
        sanity_checks(counted, images, y, PGDConfig(eps=0.0), generator=seeded())
    with pytest.raises(InputError, match="tolerance"):
        sanity_checks(counted, images, y, PGDConfig(), generator=seeded(), tolerance=-1)
    assert calls == []
    with pytest.raises(InputError, match="not finite"):
        robust_correct(lambda x: network(x) * torch.nan, images, y, PGDConfig(), [0.0], generator=seeded())
