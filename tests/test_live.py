"""Work whose steps are watched: in order, never far ahead, and over when its reader leaves."""

import threading
import time

import pytest
import torch

import timm_jem
from timm_jem import InputError
from timm_jem.demo.live import Live


def counted(done: list, steps: int = 1000):
    def work(report):
        for step in range(steps):
            done.append(step)
            report(step, step**2)
        return "the result"

    return work


def test_all_steps_in_order_and_then_the_result():
    with Live(counted([], 50)) as steps:
        assert list(steps) == [(step, step**2) for step in range(50)]
        assert steps.result == "the result"


def test_work_is_never_far_ahead_of_its_reader():
    done: list = []
    with Live(counted(done)) as steps:
        for seen, _ in steps:
            assert len(done) <= seen + 3
            if seen == 100:
                break


@pytest.mark.parametrize("pause", [0, 0.05])
def test_work_ends_when_its_reader_leaves(pause):
    done: list = []
    before = threading.active_count()
    with Live(counted(done)) as steps:
        next(iter(steps))
        time.sleep(pause)
    assert len(done) <= 3
    assert threading.active_count() == before


def test_work_ends_when_a_generator_that_reads_it_is_closed():
    done: list = []

    def reading():
        with Live(counted(done)) as steps:
            yield from steps

    reader = reading()
    next(reader)
    reader.close()
    ended = len(done)
    time.sleep(0.05)
    assert len(done) == ended <= 3


@pytest.mark.parametrize("error", [InputError("bad"), RuntimeError("worse")])
def test_what_work_raises_is_raised_after_its_steps(error):
    def work(report):
        report(1)
        raise error

    seen = []
    with Live(work) as steps, pytest.raises(type(error), match=str(error)):
        seen.extend(steps)
    assert seen == [(1,)]


def test_a_chain_that_is_left_leaves_the_model_as_it_was():
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8)).train()
    work = Live(lambda report: jem.sample(2, num_steps=1000, on_step=report))
    with work as steps:
        for step, u in steps:
            assert u.shape == (2, 1, 8, 8)
            if step == 3:
                break
    assert all(module.training for module in jem.modules())
    assert all(parameter.requires_grad for parameter in jem.parameters())
    assert torch.is_grad_enabled()
