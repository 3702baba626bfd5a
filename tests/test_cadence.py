import os
import signal
from types import SimpleNamespace

import pytest

from timm_jem.training import GuardConfig, HubConfig, Settings, TrainConfig
from timm_jem.training.cadence import Cadence, Due, stop_signals

ALONE = SimpleNamespace(num_processes=1)


def make(accelerator=ALONE, guard=None, hub=None, **train) -> Cadence:
    never = {"log_every": 10**6, "sample_every": 0, "eval_every": 0, "checkpoint_every": 0}
    return Cadence(
        Settings(
            train=TrainConfig(**{"steps": 10**6, **never, **train}),
            guard=GuardConfig(**(guard or {})),
            hub=HubConfig(**(hub or {})),
        ),
        accelerator,
    )


def steps_of(cadence: Cadence, name: str, end: int = 60) -> list[int]:
    return [step for step in range(1, end + 1) if getattr(cadence.at(step, []), name)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("log", {"log_every": 20}),
        ("sample", {"sample_every": 20}),
        ("validate", {"eval_every": 20}),
        ("checkpoint", {"checkpoint_every": 20}),
        ("push", {"hub": {"push_to": "user/name", "every": 20}}),
        ("look", {"guard": {"check_every": 20, "snapshot_every": 20}}),
        ("snapshot", {"guard": {"check_every": 20, "snapshot_every": 20}}),
    ],
)
def test_each_is_due_every_so_many_steps(name, settings):
    assert steps_of(make(**settings), name) == [20, 40, 60]


def test_none_is_never():
    cadence = make(guard={"check_every": 100, "snapshot_every": 100})
    assert not any(cadence.at(step, []) for step in range(1, 100))
    assert steps_of(make(hub={"every": 20}), "push") == []  # nowhere to


def test_the_last_step_is_looked_at_logged_and_saved_and_published_once():
    due = make(steps=60, hub={"push_to": "user/name", "every": 20}).at(60, [])
    assert due == Due(look=True, log=True, checkpoint=True, push=False)
    assert make(steps=60, log_every=7).at(59, []) == Due()
    assert make(steps=60, best_k=1).at(60, []).validate  # it may be the best


def test_what_is_kept_has_been_looked_at():
    cadence = make(
        checkpoint_every=7,
        eval_every=15,
        guard={"check_every": 10, "snapshot_every": 20},
        hub={"push_to": "user/name", "every": 11},
    )
    for step in range(1, 200):
        due = cadence.at(step, [])
        assert due.look or not (due.checkpoint or due.snapshot or due.validate or due.push)
        assert due.look == (step % 7 == 0 or step % 10 == 0 or step % 11 == 0 or step % 15 == 0)


def test_a_signal_stops_one_process_at_once():
    due = make().at(3, [signal.SIGTERM, signal.SIGINT])
    assert due == Due(stop=signal.SIGTERM)
    assert due


@pytest.mark.parametrize(
    ("seconds", "asked_at"),
    [
        (0.1, [1, 2, 10, 20, 30, 40]),  # at looks, after the first two steps that time it
        (2.0, [*range(1, 3), *range(4, 10, 2), *range(10, 41, 2)]),  # and so often that they wait for five seconds at most
        (60.0, [*range(1, 41)]),
    ],
)
def test_several_processes_ask_one_another_at_looks_and_every_few_seconds(monkeypatch, seconds, asked_at):
    now, asked = [0.0], []
    monkeypatch.setattr("timm_jem.training.cadence.time.monotonic", lambda: now[0])
    monkeypatch.setattr("timm_jem.training.cadence.gather_object", lambda mine: asked.append(step) or [*mine, (None, 1e-9)])
    cadence = make(SimpleNamespace(num_processes=2))
    for step in range(1, 41):
        now[0] += seconds
        assert cadence.at(step, []).stop is None
    assert asked == asked_at


def test_several_processes_stop_together(monkeypatch):
    others = [(signal.SIGINT, 0.1)]
    monkeypatch.setattr("timm_jem.training.cadence.gather_object", lambda mine: [*mine, *others])
    cadence = make(SimpleNamespace(num_processes=2))
    assert cadence.at(10, []).stop == signal.SIGINT
    assert cadence.at(20, [signal.SIGTERM]).stop == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_caught_once_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals() as caught:
        assert caught == []
        os.kill(os.getpid(), number)
        assert caught == [number]
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends at once
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
