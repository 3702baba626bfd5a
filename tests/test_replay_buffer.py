import math

import pytest
import torch

from timm_jem import InputError, ReplayBuffer, uniform_noise
from timm_jem.replay_buffer import redistribute


def make(**kwargs) -> ReplayBuffer:
    settings = {"init": uniform_noise, "generator": torch.Generator().manual_seed(0), "capacity": 50, "restart_prob": 0.0}
    return ReplayBuffer((1, 2, 2), **{**settings, **kwargs})


def test_defaults_are_the_papers():
    buffer = ReplayBuffer((1, 1, 1), init=uniform_noise, generator=torch.Generator())
    assert (len(buffer), buffer.restart_prob) == (10_000, 0.05)


def test_slots_are_distinct_and_chains_return_to_them():
    buffer = make()
    for _ in range(20):
        before = buffer.chains.clone()
        u, slots = buffer.draw(40)
        assert len(slots.unique()) == 40
        assert torch.equal(u, before[slots])
        buffer.put(slots, u + 1)
        before[slots] += 1
        assert torch.equal(buffer.chains, before)


def test_a_draw_is_a_copy():
    buffer = make()
    before = buffer.chains.clone()
    buffer.draw(50)[0].zero_()
    assert torch.equal(buffer.chains, before)


def test_one_that_is_made_in_inference_mode_is_as_any_other():
    with torch.inference_mode():
        buffer = make(num_classes=5)
    u, slots = buffer.draw(20)
    buffer.put(slots, u + 1)
    assert torch.equal(buffer.chains[slots], u + 1)
    buffer.load_state_dict(make(num_classes=5).state_dict())


def test_every_slot_is_drawn_equally_often():
    buffer = make(capacity=10)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[buffer.draw(3)[1]] += 1
    assert counts.sum() == 6000
    assert (counts - 600).abs().max() < 5 * 600**0.5


def test_chains_restart_with_the_given_probability():
    buffer = make(capacity=1000, restart_prob=0.05, init=lambda shape, **_: torch.full(shape, 7.0))
    buffer.chains.zero_()
    restarted = sum((buffer.draw(1000)[0][:, 0, 0, 0] == 7).sum().item() for _ in range(20))
    assert abs(restarted - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    buffer.restart_prob = 1.0
    assert (buffer.draw(1000)[0] == 7).all()


def test_each_slot_restarts_with_a_probability_of_its_own():
    buffer = make(capacity=100, num_classes=4, restart_prob=0.5, restart_least=0.02)
    buffer.init = lambda shape, **_: torch.ones(shape)
    buffer.chains.zero_()
    y, restarts, rounds = torch.arange(4).repeat_interleave(25), torch.zeros(100), 2000
    for _ in range(rounds):
        u, slots = buffer.draw(100, y)
        restarts[slots] += u[:, 0, 0, 0]
    expected = rounds * 0.5 * (0.02 / 0.5) ** (torch.arange(100) * 0.618034 % 1)
    assert ((restarts - expected).abs() < 5 * expected.sqrt()).all()
    for own in restarts.split(25):  # each class has chains of all ages
        spread = (own.sort().values / rounds).log()
        even = torch.linspace(math.log(0.02), math.log(0.5), 25)
        assert (spread - even).abs().max() < 0.5


@pytest.mark.parametrize("least", [0, -0.1, 0.2, float("nan")])
def test_a_least_probability_is_above_0_and_at_most_the_largest(least):
    with pytest.raises(InputError, match="restart_least"):
        make(restart_prob=0.1, restart_least=least)


def test_initial_chains_are_uniform_pixels():
    chains = make(capacity=5000).chains
    assert chains.min() >= -1
    assert chains.max() <= 1
    assert chains.var().item() == pytest.approx(1 / 3, rel=0.05)


def test_classes_keep_their_slots():
    buffer = make(num_classes=3, capacity=50)
    assert buffer.labels.bincount().tolist() == [17, 17, 16]
    y = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    for _ in range(50):
        _, slots = buffer.draw(7, y)
        assert torch.equal(buffer.labels[slots], y)
        assert len(slots.unique()) == 7


def test_slots_of_a_class_are_drawn_equally_often():
    buffer = make(num_classes=2, capacity=10)
    counts = torch.zeros(10)
    for _ in range(1000):
        counts[buffer.draw(2, torch.tensor([0, 0]))[1]] += 1
    assert counts[5:].sum() == 0
    assert (counts[:5] - 400).abs().max() < 5 * 400**0.5


def test_a_whole_class_can_be_drawn_and_no_more():
    buffer = make(num_classes=2, capacity=10)
    assert sorted(buffer.draw(5, torch.ones(5, dtype=torch.long))[1].tolist()) == [5, 6, 7, 8, 9]
    with pytest.raises(InputError, match="capacity"):
        buffer.draw(6, torch.ones(6, dtype=torch.long))


def test_only_restarted_chains_are_drawn_each_for_its_class():
    asked = []

    def init(shape, *, generator, device, y):
        asked.append((shape[0], y))
        return 100.0 + y.view(-1, 1, 1, 1).expand(shape)

    buffer = make(num_classes=5, restart_prob=0.3, init=init)
    assert torch.equal(asked[0][1], buffer.labels)
    assert torch.equal(buffer.chains[:, 0, 0, 0], 100.0 + buffer.labels)
    buffer.chains.zero_()
    y = torch.arange(40) % 5
    for _ in range(20):
        asked.clear()
        u, _ = buffer.draw(40, y)
        fresh = u[:, 0, 0, 0] != 0
        assert sum(count for count, _ in asked) == fresh.sum()
        assert torch.equal(u[fresh][:, 0, 0, 0], 100.0 + y[fresh])
    buffer.restart_prob = 0.0
    asked.clear()
    buffer.draw(40, y)
    assert not asked


def test_chains_are_single_precision():
    buffer = make(restart_prob=1.0, init=lambda shape, **_: torch.ones(shape, dtype=torch.float64))
    assert buffer.chains.dtype == buffer.draw(2)[0].dtype == torch.float32


def test_each_chain_restarts_on_its_own():
    buffer = make(capacity=4, restart_prob=0.3, init=lambda shape, **_: torch.ones(shape))
    buffer.chains.zero_()
    y = torch.stack([buffer.draw(4)[0][:, 0, 0, 0] for _ in range(4000)])
    counts = (y.long() @ torch.tensor([1, 2, 4, 8])).bincount(minlength=16)
    restarts = torch.tensor([bin(i).count("1") for i in range(16)])
    expected = 4000 * 0.3**restarts * 0.7 ** (4 - restarts)  # of all 16 patterns
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_reseeding_starts_all_randomness_anew():
    buffer, other = make(restart_prob=0.5), make(restart_prob=0.5, generator=torch.Generator().manual_seed(8))
    buffer.draw(20)
    other.chains.copy_(buffer.chains)
    buffer.reseed(5)
    other.reseed(5)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(buffer.draw(20), other.draw(20), strict=True))


def states(counts, num_classes=None):
    """Buffers of so many chains each; chain k of all has the pixel value k, so that it is known again."""
    result, k = [], 0
    for count in counts:
        buffer = make(capacity=count, num_classes=num_classes)
        buffer.chains.copy_(torch.arange(k, k + count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
        result.append(buffer.state_dict())
        k += count
    return result


def test_chains_are_dealt_out_to_other_processes():
    def deal(counts, world, capacity):
        chains = [redistribute(states(counts), rank, world, capacity) for rank in range(world)]
        assert all(part.shape == (capacity, 1, 2, 2) for part in chains)
        return torch.cat(chains)[:, 0, 0, 0].tolist()

    assert deal([4, 4], 4, 2) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert deal([2, 2], 1, 4) == [0, 1, 2, 3]
    assert deal([3], 2, 4) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert deal([4, 4], 1, 5) == [0, 1, 2, 3, 4]
    assert deal([5, 5], 2, 5) == list(range(10))  # the same processes, the same chains


def test_dealt_chains_stay_in_their_class():
    old = states([7, 7], num_classes=3)
    classes = torch.cat([state["labels"] for state in old])
    for world, capacity in ((1, 14), (3, 5), (4, 10), (2, 3)):
        labels = make(capacity=capacity, num_classes=3).labels
        chains = [redistribute(old, rank, world, capacity, 3)[:, 0, 0, 0].long() for rank in range(world)]
        assert all(torch.equal(classes[part], labels) for part in chains)
        counts = torch.cat(chains).bincount(minlength=14)
        for c in range(3):
            slots, of_class = world * int((labels == c).sum()), counts[classes == c]
            assert of_class.max() - of_class.min() <= 1
            assert (of_class > 0).sum() == min(slots, len(of_class))
    same = [redistribute(old, rank, 2, 7, 3) for rank in range(2)]
    assert all(torch.equal(part, state["chains"]) for part, state in zip(same, old, strict=True))


@pytest.mark.parametrize("least", [None, 0.1])
def test_resume_is_bit_exact(least):
    buffer = make(num_classes=5, restart_prob=0.3, restart_least=least)
    for _ in range(3):
        u, slots = buffer.draw(20)
        buffer.put(slots, u * 0.9)
    state = {k: v.clone() for k, v in buffer.state_dict().items()}
    expected = [buffer.draw(20) for _ in range(3)]
    other = make(num_classes=5, restart_prob=0.3, restart_least=least, generator=torch.Generator().manual_seed(99))
    other.load_state_dict(state)
    for u, slots in expected:
        u2, slots2 = other.draw(20)
        assert torch.equal(u, u2)
        assert torch.equal(slots, slots2)


BAD = [
    (lambda: make(capacity=0), "capacity"),
    (lambda: make(capacity=10**12), "capacity"),
    (lambda: make(capacity=2**31), "lower the capacity"),
    (lambda: make(restart_prob=float("nan")), "restart_prob"),
    (lambda: make(capacity=4, num_classes=5), "5 classes"),
    (lambda: make(num_classes=0), "num_classes is 0"),
    (lambda: make(num_classes=-1), "num_classes is -1"),
    (lambda: make(num_classes=2.0), "num_classes"),
    (lambda: make(init=None), "init of a replay buffer is None"),
    (lambda: make(init=lambda shape, **_: torch.zeros(shape[0], 3)), r"shape \(50, 3\)"),
    (lambda: make(init=lambda shape, **_: torch.zeros(shape, dtype=torch.uint8)), "uint8"),
    (lambda: make(generator=0), "manual_seed"),
    (lambda: ReplayBuffer((2, 2), init=uniform_noise, generator=torch.Generator()), r"give \(C, H, W\)"),
    (lambda: ReplayBuffer((1, 2, 0), init=uniform_noise, generator=torch.Generator()), "a side"),
    (lambda: make().draw(51), "51 chains"),
    (lambda: make().draw(-1), "number of chains to draw is -1"),
    (lambda: make().draw(2.0), "number of chains to draw"),
    (lambda: make().draw(1, torch.tensor([0])), "no classes"),
    (lambda: make(num_classes=3).draw(1, torch.tensor([3])), "label 3"),
    (lambda: make(num_classes=3).draw(1, torch.tensor([-1])), "label -1"),
    (lambda: make(num_classes=3).draw(1, torch.tensor([0.0])), "float32"),
    (lambda: make(num_classes=3).draw(2, torch.tensor([0])), "one label per chain"),
    (lambda: make(num_classes=3).draw(1, [0]), "a list"),
    (lambda: make().put(torch.tensor([50]), torch.zeros(1, 1, 2, 2)), "the number 50"),
    (lambda: make().put(torch.tensor([0.0]), torch.zeros(1, 1, 2, 2)), "slots are"),
    (lambda: make().put(torch.tensor([0]), torch.zeros(1, 1, 2, 1)), r"give shape \(1, 1, 2, 2\)"),
    (lambda: make().put(torch.tensor([0]), None), "chains are a NoneType"),
    (lambda: make().reseed("x"), "seed"),
    (lambda: make().load_state_dict(make(capacity=49).state_dict()), "shape"),
    (lambda: make().load_state_dict(make(num_classes=2).state_dict()), "classes"),
    (lambda: make(num_classes=3).load_state_dict(make(num_classes=2).state_dict()), "not of 3 classes"),
    (lambda: make().load_state_dict({}), "no saved replay buffer"),
    (lambda: make().load_state_dict(None), "no saved replay buffer"),
    (lambda: make().load_state_dict({"chains": torch.zeros(50, 1, 2, 2)}), "generators"),
    (lambda: redistribute([], 0, 1, 4), "image shapes"),
    (lambda: redistribute([{}], 0, 1, 4), "no saved replay buffer"),
    (lambda: redistribute(states([4]), 0, 1, 4, 2), "having classes"),
    (lambda: redistribute(states([4], num_classes=2), 0, 1, 4, 3), "3 classes"),
    (lambda: redistribute(states([4]), 1, 1, 4), "rank is 1"),
    (lambda: redistribute(states([4]), 0, 0, 4), "world is 0"),
    (lambda: redistribute(states([4]), 0, 1, 0), "capacity"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_state_that_is_refused_changes_nothing():
    buffer = make()
    before = {name: value.clone() for name, value in buffer.state_dict().items()}
    for name in ("generator", "host_generator"):
        with pytest.raises(InputError, match="generators"):
            buffer.load_state_dict(make(generator=torch.Generator().manual_seed(7)).state_dict() | {name: torch.zeros(3)})
        assert all(torch.equal(value, before[name]) for name, value in buffer.state_dict().items())
