"""Known signals, each for real: a NaN is not above any limit."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator

from timm_jem import InputError, SGLDConfig
from timm_jem.training import DivergenceGuard, GuardConfig, MaximumLikelihood, Remedy

GOOD = {"loss": 0.5, "ce": 0.4, "gap": -0.3, "energy_data": -3.0, "energy_neg": -2.7, "grad_norm": 1.0}
GOOD |= {"chain_rms": 0.8, "chain_spread": 0.5, "chain_moved": 0.1}


def make(**config) -> DivergenceGuard:
    return DivergenceGuard(GuardConfig(**config), Accelerator(cpu=True), 10, MaximumLikelihood.watched)


def observe(guard, n=10, **changed):
    for _ in range(n):
        guard.observe({name: torch.tensor(value) for name, value in {**GOOD, **changed}.items()})


def healthy(**config):
    guard = make(**config)
    for _ in range(3):
        observe(guard)
        assert guard.problem() is None
        guard.close()
    return guard


def test_chains_that_are_less_at_the_clamp_than_black_and_white_images_are_fine():
    guard = make()
    observe(guard, chain_saturated=-0.8)
    assert guard.problem() is None


@pytest.mark.parametrize("name", sorted(GOOD))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_enough(name, value):
    guard = healthy()
    observe(guard, 4)
    observe(guard, 1, **{name: value})
    observe(guard, 5)
    assert guard.problem() == f"{name} not finite"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gap": -15.0}, r"\|gap\| ran away: 15 after 0.3"),
        ({"energy_data": -41.0}, r"\|energy_data\| ran away"),
        ({"energy_neg": 1e7}, r"\|energy_neg\| ran away"),
        ({"ce": 2.2}, "classifier is lost"),
        ({"ce": 15.0}, r"\|ce\| ran away"),
        ({"chain_rms": 3.5}, "left the pixel range"),
        ({"chain_saturated": 0.6}, "saturate: 60%"),
        ({"chain_spread": 1e-4}, "all chains are one image"),
        ({"chain_moved": 0.0}, "stuck"),
    ],
)
def test_each_signal_has_its_reason(changed, reason):
    guard = healthy() if "chain_saturated" not in changed else make()
    observe(guard, 10, **changed)
    with_reason = guard.problem()
    assert with_reason is not None
    import re

    assert re.search(reason, with_reason)
    assert "\n" not in with_reason


def test_the_cross_entropy_is_not_judged_where_the_loss_has_none():
    guard = healthy()
    guard.watched = [name for name in guard.watched if name != "ce"]
    observe(guard, 10, ce=15.0)
    assert guard.problem() is None
    observe(guard, 1, ce=math.nan)
    assert guard.problem() == "ce not finite"


def test_what_is_no_divergence():
    guard = healthy()
    observe(guard, 9)
    observe(guard, 1, gap=-500.0, ce=30.0)  # one wild iteration is none
    assert guard.problem() is None
    slow = healthy()
    for energy in range(3, 300):  # energies have no zero: drifting slowly is none either
        observe(slow, energy_data=-float(energy), energy_neg=-float(energy))
        assert slow.problem() is None
        slow.close()
    start = make()  # and before the first look nothing is known of the scale
    observe(start, energy_data=-5000.0, gap=-300.0)
    assert start.problem() is None


def test_before_a_look_only_what_is_not_finite_counts():
    guard = healthy()
    observe(guard, 1, gap=-500.0)
    assert guard.problem(early=True) is None
    observe(guard, 1, gap=math.nan)
    assert guard.problem(early=True) == "gap not finite"


def test_iterations_with_other_terms_are_judged_as_well():
    guard = healthy()
    observe(guard, 4, gap=math.nan)
    observe(guard, 4, l2=1.0)
    assert guard.problem() == "gap not finite"
    guard = healthy()
    for i in range(10):  # a term that comes and goes
        observe(guard, 1, gap=-40.0, **({"l2": 1.0} if i % 2 else {}))
    assert guard.problem() == "|gap| ran away: 40 after 0.3"
    guard = healthy()
    observe(guard, 9)
    observe(guard, 1, gap=-40.0, l2=1.0)  # one wild iteration is none, whatever terms it had
    assert guard.problem() is None


def test_before_the_first_look_the_bound_is_told():
    guard = make()
    observe(guard, gap=3.88e7)
    assert guard.problem() == "|gap| ran away: 3.88e+07, above guard.max_energy 1e+06"


def test_the_bound_that_was_passed_is_told():
    guard = healthy(max_energy=5.0)
    observe(guard, gap=-6.0)
    assert guard.problem() == "|gap| ran away: 6, above guard.max_energy 5"


def test_limits_are_the_configs():
    guard = healthy(runaway_floor=1.0, runaway_factor=2.0)
    observe(guard, gap=-1.59)
    assert guard.problem() is None
    observe(guard, 20, gap=-1.61)
    assert "gap" in guard.problem()


def test_the_older_snapshot_is_taken_where_the_newest_broke_already():
    guard = make()
    weights = torch.zeros(3)
    for step in (0, 100, 200):
        weights.fill_(step)
        guard.keep(step, {"weights": weights})
    assert [snapshot.step for snapshot in guard.snapshots] == [100, 200]
    weights.fill_(math.nan)
    step, state = guard.last_good()
    assert (step, state["weights"].tolist()) == (200, [200.0] * 3)
    assert guard.last_good()[0] == 100
    assert guard.last_good()[0] == 100  # there is no older one
    guard.keep(200, {})
    assert guard.last_good()[0] == 200
    guard.keep(300, {}, alone=True)
    assert [snapshot.step for snapshot in guard.snapshots] == [300]


def test_scales_go_back_with_the_state():
    guard = healthy()
    guard.keep(10, {})
    before = dict(guard.scales)
    observe(guard, gap=-5.0)
    guard.close()
    assert guard.scales != before
    guard.last_good()
    assert guard.scales == before


def test_a_method_without_a_cross_entropy_is_watched_as_well():
    guard = DivergenceGuard(GuardConfig(), Accelerator(cpu=True), 10, ["bce"])
    for value in (0.7, 0.7, 500.0):
        assert guard.problem() is None
        for _ in range(10):
            guard.observe({"loss": torch.tensor(value), "bce": torch.tensor(value)})
        if value < 1:
            guard.close()
    assert "|bce| ran away" in guard.problem()


def test_its_state_goes_on_bit_for_bit():
    guard = healthy()
    observe(guard, 4)
    other = make()
    other.load_state_dict(guard.state_dict())
    for g in (guard, other):
        observe(g, 6, gap=-12.0)
    assert other.problem() == guard.problem()
    for g in (guard, other):
        g.close()
    assert other.scales == guard.scales


def test_terms_of_another_loss_have_no_past():
    """A classifier whose images are attacked from here on has a cross-entropy that a lost one would have."""
    past, (config, accelerator, watched) = healthy(), (GuardConfig(), Accelerator(cpu=True), MaximumLikelihood.watched)
    past.keep(20, {})
    observe(past, 4)
    for of, reason in ((None, "the classifier is lost"), ({"attack": "linf"}, None)):
        guard = DivergenceGuard(config, accelerator, 10, watched, of=of)
        guard.load_state_dict(past.state_dict(), copy.deepcopy(past.snapshots))
        observe(guard, ce=2.2)
        assert (guard.problem() or "").split(":")[0] == (reason or "")
        guard.last_good()
        assert guard.scales == (past.scales if reason else {})


def test_a_remedy_is_what_reaches_the_method():
    remedy = Remedy(lr=0.5, num_steps=1.5, step_size=0.3, energy_l2=0.1)
    assert remedy.only(("num_steps", "step_size", "energy_l2")) == remedy
    assert str(remedy.only(())) == "lr × 0.5"


def test_remedies_add_up():
    remedy = Remedy(lr=0.5, energy_l2=0.1).then(Remedy(lr=0.5, num_steps=1.5, step_size=0.3, energy_l2=0.1))
    assert remedy == Remedy(lr=0.25, num_steps=1.5, step_size=0.3, energy_l2=0.2)
    assert Remedy().then(remedy) == remedy  # one that says nothing changes nothing
    assert str(Remedy()) == "nothing but fresh chains"
    assert str(remedy) == "lr × 0.25, num_steps × 1.5, step_size × 0.3, energy_l2 + 0.2"
    assert Remedy(num_steps=1e5).chains(SGLDConfig(num_steps=20)).num_steps == 100_000  # the most that a chain may have


@pytest.mark.parametrize(
    "bad",
    [{"check_every": 0}, {"snapshot_every": 15}, {"runaway_factor": math.nan}, {"ladder": []}, {"max_rollbacks": -1}],
)
def test_bad_settings_are_named(bad):
    assert GuardConfig(ladder=[], max_rollbacks=0).ladder == []
    with pytest.raises(InputError, match=next(iter(bad))):
        GuardConfig(**bad)
    with pytest.raises(InputError, match="lr is 0"):
        Remedy(lr=0)
