"""Runs of tiny networks and of a method whose weights are known in closed form: back, on and resumed, to the bit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from timm_jem import JEM, InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.training import (
    Batch,
    Checkpoints,
    DivergenceGuard,
    Drawn,
    GuardConfig,
    Learner,
    MaximumLikelihood,
    Remedy,
    Rollback,
    Run,
    load_tree,
    save_tree,
)
from timm_jem.training.run import Unread
from timm_jem.training.state import copy_tree

SHAPE = (1, 4, 4)


class Tiny(nn.Module):
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.drop(nn.functional.silu(self.norm(self.conv(x))).flatten(1)))


class Stream:
    """Batches that depend on its place, and on the noise of the learner."""

    def __init__(self, generator: torch.Generator) -> None:
        self.place, self.generator = 0, generator

    def __next__(self) -> Batch:
        self.place += 1
        rng = torch.Generator().manual_seed(self.place)
        u = torch.rand(6, *SHAPE, generator=rng) + 0.1 * torch.randn(6, *SHAPE, generator=self.generator)
        return Batch(u, torch.randint(3, (6,), generator=rng))

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state, *, old_world=None):
        self.place = state["place"]


class Falling:
    """Every parameter falls by the learning rate at each step of SGD: the loss is their sum. No buffer.

    It breaks after the steps in ``breaks`` as long as remedies leave more than ``bearable`` of the learning rate, and
    counts its draws in a tensor that it keeps from ``load_state_dict`` and changes in place.
    """

    watched, buffer = (), None

    def __init__(self, breaks=(), bearable=0.0) -> None:
        self.breaks, self.bearable, self.count, self.batches = set(breaks), bearable, torch.zeros(()), []

    def draw(self, model, batch, *, step, remedy, generator):
        self.count += 1
        self.batches.append(batch)
        broken = step + 1 in self.breaks and remedy.lr > self.bearable
        return Drawn(batch, info={"signal": torch.tensor(float("nan" if broken else 0))})

    def loss(self, model, drawn, *, remedy):
        return {"loss": sum(parameter.sum() for parameter in model.parameters())}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make_run(folder, method=None, *, lr=0.125, guard=None, grad_accum=1, keep=9, classes=None, groups=None) -> Run:
    """Maximum likelihood by SGLD on the tiny network with Adam, or another method with SGD; no schedule."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    jem = JEM(Tiny(), data_config={"input_size": SHAPE, "mean": (0.4,), "std": (0.3,)})
    if isinstance(method, Falling):  # from zero, so that sums of powers of two are exact
        for parameter in jem.parameters():
            nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(jem.parameters(), lr)
    if method is None:
        chains = torch.Generator().manual_seed(1)
        buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=chains, capacity=24, restart_prob=0.3, num_classes=classes)
        method = MaximumLikelihood(jem, buffer, sgld=SGLDConfig(num_steps=2), objective=ObjectiveConfig())
        optimizer = torch.optim.Adam(jem.parameters() if groups is None else groups(jem), lr)
    prepared, optimizer = accelerator.prepare(jem, optimizer)
    prepared.train()
    learner = Learner(accelerator, prepared, jem, optimizer, None, method, generator=torch.Generator().manual_seed(2))
    guard = GuardConfig(check_every=1, snapshot_every=1, **(guard or {}))
    return Run(
        learner,
        Stream(learner.generator),
        DivergenceGuard(guard, accelerator, 3, method.watched),
        Checkpoints(folder / "checkpoints", accelerator, keep=keep),
        grad_accum=grad_accum,
        seed=5,
    )


def everything(run):
    return copy_tree({"learner": run.learner.state_dict(), "stream": run.stream.state_dict()})


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def advance(run, steps):
    """Good steps, each judged."""
    for _ in range(steps):
        run.advance()
        assert run.judge(whole=True) is None


def weights_are(run, value):
    return bool((nn.utils.parameters_to_vector(run.learner.jem.parameters()) == value).all())


def spoil(run):
    """Real NaNs: in weights, optimiser, chains and statistics."""
    with torch.no_grad():
        run.learner.jem.backbone.fc.weight.fill_(float("nan"))
    run.advance()


def test_what_can_not_be_read_leaves_the_run_as_it_was(tmp_path):
    """The first of the step's two batches was taken, and had its noise."""
    whole = make_run(tmp_path / "whole", grad_accum=2)
    whole.snapshot()
    advance(whole, 3)
    expected, run = everything(whole), make_run(tmp_path / "run", grad_accum=2)
    run.snapshot()
    advance(run, 2)
    before, following = everything(run), Stream.__next__

    def broken(stream):
        if stream.place == 5:
            raise InputError("row 5 is broken")
        return following(stream)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stream, "__next__", broken)
        with pytest.raises(Unread, match="row 5 is broken"):
            run.advance()
    assert same(everything(run), before)
    run.save({})
    resumed = make_run(tmp_path / "run", grad_accum=2)
    resumed.resume()
    advance(resumed, 1)
    assert same(everything(resumed), expected)


def test_a_run_that_breaks_goes_back_to_the_bit(tmp_path):
    run = make_run(tmp_path, guard={"max_rollbacks": 0})
    advance(run, 3)
    run.snapshot()
    kept = everything(run)
    advance(run, 2)
    spoil(run)
    broke = run.judge(whole=True)
    assert (broke.step, broke.to_step, broke.remedy) == (6, 3, None)
    assert "not finite" in broke.reason
    assert same(everything(run), kept)
    assert run.rollbacks == []
    assert run.guard.window == []


def test_a_remedy_changes_the_learning_rate_and_the_randomness_alone(tmp_path):
    run = make_run(tmp_path, guard={"ladder": [Remedy(lr=0.5)]})
    advance(run, 3)
    run.snapshot()
    kept = everything(run)
    spoil(run)
    assert run.judge(whole=True) == Rollback(4, 3, run.rollbacks[0]["reason"], Remedy(lr=0.5))
    assert run.rollbacks == [{"step": 4, "to_step": 3, "reason": run.rollbacks[0]["reason"], "remedy": "lr × 0.5"}]
    now = everything(run)
    for name in ("model", "step", "method", "rng"):
        assert same(now["learner"][name], kept["learner"][name])
    assert now["stream"] == kept["stream"]
    assert same(now["learner"]["optimizer"]["state"], kept["learner"]["optimizer"]["state"])
    assert torch.equal(now["learner"]["buffer"]["chains"], kept["learner"]["buffer"]["chains"])
    # The seed of the run, one million for each rollback; noise and chains are a number apart.
    assert torch.equal(run.learner.generator.get_state(), torch.Generator().manual_seed(1_000_006).get_state())
    assert torch.equal(run.learner.method.buffer.generator.get_state(), torch.Generator().manual_seed(1_000_005).get_state())
    assert run.learner.optimizer.param_groups[0]["lr"] == 0.0625


def test_weights_fall_by_the_learning_rates_of_the_ladder(tmp_path):
    method = Falling(breaks={4}, bearable=0.25)
    run = make_run(tmp_path, method, guard={"ladder": [Remedy(lr=0.5)]})
    advance(run, 2)
    run.snapshot()
    for number in (1, 2):
        advance(run, 1)
        run.advance()
        broke = run.judge(whole=True)
        assert (broke.step, broke.to_step, broke.reason) == (4, 2, "signal not finite")
        assert len(run.rollbacks) == number
        assert weights_are(run, -2 * 0.125)
        assert method.count == 2  # the snapshot is none of the method's, which changes its count in place
    advance(run, 3)
    assert weights_are(run, -(2 * 0.125 + 3 * 0.03125))
    assert (run.step, method.count, run.stream.place) == (5, 5, 5)
    assert run.learner.remedy == Remedy(lr=0.25)


def test_each_rollback_takes_the_next_remedy_and_the_last_repeats(tmp_path):
    ladder = [Remedy(lr=0.5), Remedy(energy_l2=0.1), Remedy(num_steps=2.0, step_size=0.5)]
    run = make_run(tmp_path, Falling(breaks={1}), guard={"ladder": ladder, "max_rollbacks": 4})
    run.snapshot()
    for remedy in [*ladder, ladder[-1]]:
        run.advance()
        assert run.judge(whole=True) == Rollback(1, 0, "signal not finite", remedy)
    assert run.learner.remedy == Remedy(lr=0.5, num_steps=4.0, step_size=0.25, energy_l2=0.1)
    run.advance()
    assert run.judge(whole=True) == Rollback(1, 0, "signal not finite", None)
    assert len(run.rollbacks) == 4
    assert run.step == 0


def test_a_run_that_is_allowed_fewer_rollbacks_than_it_had_gives_up(tmp_path):
    run = make_run(tmp_path, Falling(breaks={1}))
    run.snapshot()
    for _ in range(3):
        run.advance()
        run.judge(whole=True)
    run.save({})
    fewer = make_run(tmp_path, Falling(breaks={1}), guard={"max_rollbacks": 2})
    fewer.resume()
    fewer.snapshot()
    fewer.advance()
    assert fewer.judge(whole=True).remedy is None
    assert len(fewer.rollbacks) == 3


def test_the_older_snapshot_is_taken_where_training_breaks_twice(tmp_path):
    run = make_run(tmp_path, Falling(breaks={5}))
    for _ in range(2):
        advance(run, 2)
        run.snapshot()
    returns = []
    for _ in range(3):
        while run.step < 5:
            run.advance()
        returns.append(run.judge(whole=True).to_step)
    assert returns == [4, 2, 2]


def test_the_older_checkpoint_is_taken_where_training_breaks_twice_after_the_only_snapshot(tmp_path):
    """In a run that nothing interrupts as in one that resumes from the checkpoint after which it breaks."""

    def broken_twice(run):
        returns = []
        for _ in range(4):
            while run.step < 7:
                run.advance()
            returns.append(run.judge(whole=True).to_step)
        return returns

    def make(folder):
        return make_run(folder, Falling(breaks={7}), guard={"ladder": [Remedy(lr=0.5)]})

    run = make(tmp_path / "a")
    for _ in range(3):
        advance(run, 2)
        run.snapshot(alone=True)
        run.save({})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert broken_twice(run) == [6, 4, 2, 2]
    assert weights_are(run, -2 * 0.125)
    assert run.learner.remedy == Remedy(lr=0.0625)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step_00000002"]
    resumed = make(tmp_path / "b")
    resumed.resume()
    resumed.snapshot()
    assert broken_twice(resumed) == [6, 4, 2, 2]
    assert same(everything(resumed), everything(run))
    # The last word leaves what there is.
    last = make_run(tmp_path / "b", Falling(breaks={7}), guard={"max_rollbacks": 0})
    last.resume()
    last.snapshot(alone=True)
    last.guard.snapshots[0].broke = True
    while last.step < 7:
        last.advance()
    assert last.judge(whole=True) == Rollback(7, 2, "signal not finite", None)


def test_a_run_that_is_stopped_between_two_looks_goes_back_as_one_that_was_left_alone(tmp_path):
    """What it is stopped at may be broken already, and unlike a checkpoint of the run's own has not been looked at."""

    def make(folder):
        return make_run(folder, Falling(breaks={7}), guard={"ladder": [Remedy(lr=0.5)]})

    def broken_thrice(run):
        returns = []
        for _ in range(3):
            while run.step < 7:
                run.advance()
            returns.append(run.judge(whole=True).to_step)
        return returns

    run = make(tmp_path / "a")
    run.snapshot()
    for step in (2, 4):
        advance(run, step - run.step)
        run.snapshot()
    advance(run, 1)
    run.save({})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert broken_thrice(run) == [4, 2, 2]
    resumed = make(tmp_path / "b")
    resumed.resume()
    assert [snapshot.step for snapshot in resumed.guard.snapshots] == [2, 4]
    assert resumed.step == 5
    assert broken_thrice(resumed) == [4, 2, 2]
    assert same(everything(resumed), everything(run))
    # A state that is a snapshot itself is on disk once, and one again.
    advance(resumed, 1)
    resumed.snapshot()
    size = sum(file.stat().st_size for file in resumed.save({}).iterdir())
    resumed.snapshot(alone=True)
    saved = resumed.save({})
    assert size > 1.5 * sum(file.stat().st_size for file in saved.iterdir())
    resumed.resume(saved)
    assert [snapshot.step for snapshot in resumed.guard.snapshots] == [3]
    advance(resumed, 1)
    resumed.resume(resumed.save({}, snapshots=False))
    assert [snapshot.step for snapshot in resumed.guard.snapshots] == [4]


def test_what_was_trained_after_a_rollback_is_gone_on_from(tmp_path):
    """And not the later step that the run was stopped at before."""
    run = make_run(tmp_path, Falling())
    advance(run, 2)
    run.snapshot()
    advance(run, 3)
    run.save({})
    for keep in (1, 9):
        resumed = make_run(tmp_path, Falling(breaks={6}), keep=keep)
        resumed.resume()
        if keep == 1:
            resumed.advance()
            assert resumed.judge(whole=True).to_step == 2
        advance(resumed, 1)
        resumed.save({})
        assert resumed.checkpoints.steps()[-1] == resumed.step
        assert len(resumed.rollbacks) == 1
    assert resumed.step == 4


def test_another_number_of_processes_goes_back_as_far(tmp_path):
    """As two would have written it, of which each has what this one has."""
    run = make_run(tmp_path, Falling())
    advance(run, 2)
    run.snapshot()
    for stopped in (True, False):
        advance(run, 3)
        if not stopped:
            run.snapshot(alone=True)
        saved = run.save({})
        shutil.copy(saved / "rank_0.safetensors", saved / "rank_1.safetensors")
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["sha256"]["rank_1.safetensors"] = manifest["sha256"]["rank_0.safetensors"]
        (saved / "manifest.json").write_text(json.dumps(manifest))
        resumed = make_run(tmp_path, Falling(breaks={6, 9}))
        resumed.resume()
        step = run.step
        assert (resumed.step, [snapshot.step for snapshot in resumed.guard.snapshots]) == (step, [2 if stopped else step])
        assert weights_are(resumed, -step * 0.125)
        resumed.advance()
        assert resumed.judge(whole=True).to_step == (2 if stopped else step)
        assert weights_are(resumed, -(2 if stopped else step) * 0.125)


def test_a_run_goes_on_on_another_kind_of_device(tmp_path, monkeypatch, capsys):
    """Whose generators have states of another length: 16 bytes on CUDA."""
    run = make_run(tmp_path)
    run.snapshot()
    advance(run, 3)
    run.save({"told": 1})
    old = run.learner.method.buffer.chains.clone()
    load = load_tree

    def elsewhere(file):
        tree = load(file)
        for state in [tree["state"], *(kept["state"] for kept in tree.get("snapshots", []) if kept["state"])]:
            if "generator" in state["learner"]:
                state["learner"]["generator"] = state["learner"]["buffer"]["generator"] = torch.zeros(16, dtype=torch.uint8)
        return tree

    monkeypatch.setattr("timm_jem.training.run.load_tree", lambda file: elsewhere(file) if "rank" in file.name else load(file))
    again = make_run(tmp_path)
    assert again.resume() == {"told": 1}
    assert "was written on another kind of device and goes on on cpu: chains are dealt out anew" in capsys.readouterr().out
    assert again.step == 3
    for name, weights in run.learner.jem.state_dict().items():
        assert torch.equal(again.learner.jem.state_dict()[name], weights)
    new = again.learner.method.buffer.chains
    assert sorted(map(tuple, new.flatten(1).tolist())) == sorted(map(tuple, old.flatten(1).tolist()))
    spoil(again)
    assert again.judge(whole=True).to_step == again.step == 0  # the snapshot that came with it is of this device now


def test_cross_entropy_alone_is_told_no_remedies_of_chains(tmp_path):
    run = make_run(tmp_path, guard={"ladder": [Remedy(lr=0.5, num_steps=1.5, energy_l2=0.1)]})
    run.learner.method.objective = ObjectiveConfig(w_x=0.0)
    run.snapshot()
    spoil(run)
    assert run.judge(whole=True).remedy == Remedy(lr=0.5) == run.learner.remedy
    assert run.rollbacks[0]["remedy"] == "lr × 0.5"
    assert run.learner.published().sgld == SGLDConfig()


def test_before_a_whole_look_only_what_is_not_finite_counts(tmp_path):
    run = make_run(tmp_path, Falling(), guard={"max_energy": 1.0})
    run.guard.watched = ["loss"]
    run.snapshot()
    run.guard.observe({"loss": torch.tensor(5.0)})
    assert run.judge(whole=False) is None
    assert len(run.guard.window) == 1
    assert "ran away" in run.judge(whole=True).reason


def test_there_must_be_something_to_go_back_to(tmp_path):
    run = make_run(tmp_path, Falling(breaks={2}))
    advance(run, 1)
    run.advance()
    with pytest.raises(InputError, match="no snapshot to go back to"):
        run.judge(whole=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"grad_accum": 2}, {"classes": 3}, {"method": Falling}],
    ids=["plain", "accumulated", "classes", "no buffer"],
)
def test_a_resumed_run_is_the_run_that_nothing_interrupted(tmp_path, settings):
    def make():
        return make_run(tmp_path, **{name: value() if callable(value) else value for name, value in settings.items()})

    whole = make()
    for step in range(1, 9):
        whole.advance()
        if step % 3 == 0:
            whole.judge(whole=True)
        if step == 4:
            at_four = whole.save({"said": [0.5, 4]})
    resumed = make()
    assert resumed.resume() == {"said": [0.5, 4]}
    assert resumed.step == 4
    for step in range(5, 9):
        resumed.advance()
        if step % 3 == 0:
            resumed.judge(whole=True)
    assert same(everything(resumed), everything(whole))
    assert same(resumed.guard.state_dict(), whole.guard.state_dict())
    assert at_four.name == "step_00000004"


@pytest.mark.parametrize("split", [False, True], ids=["one group", "groups of another number"])
def test_another_weight_decay_is_as_if_it_were_changed_in_memory(tmp_path, split):
    def make(decay: float, split: bool) -> Run:
        return make_run(tmp_path, lr=0.01, groups=lambda jem: [
            {"params": [p for p in jem.parameters() if p.ndim < 2 or not split], "weight_decay": 0.0 if split else decay},
            {"params": [p for p in jem.parameters() if p.ndim >= 2 and split], "weight_decay": decay},
        ])  # fmt: skip

    run, weights = make(0.0, False), []
    advance(run, 3)
    run.save({})
    for number, (told, of_groups, now) in enumerate(
        [(0.0, False, 0.0), (0.0, False, 0.0), (0.9, split, 0.9), (0.0, split, 0.9)]
    ):
        if number:
            run = make(told, of_groups)
            run.resume()
        for group in run.learner.optimizer.param_groups[split:] if now != told else ():
            group["weight_decay"] = now
        advance(run, 3)
        weights.append(copy_tree(run.learner.jem.state_dict()))
    assert same(weights[0], weights[1])
    assert same(weights[2], weights[3])
    assert not same(weights[0], weights[2])


def test_remedies_and_rollbacks_go_on_in_a_resumed_run(tmp_path):
    run = make_run(tmp_path, Falling(breaks={3}, bearable=0.5), guard={"ladder": [Remedy(lr=0.5)]})
    run.snapshot()
    while run.step < 3:
        run.advance()
    run.judge(whole=True)
    advance(run, 4)
    run.save({})
    resumed = make_run(tmp_path, Falling())
    resumed.resume()
    assert resumed.rollbacks == run.rollbacks != []
    assert resumed.learner.remedy == Remedy(lr=0.5)
    advance(resumed, 4)
    assert weights_are(resumed, -8 * 0.0625)


def test_a_step_takes_the_mean_gradient_of_its_batches(tmp_path):
    method = Falling()
    run = make_run(tmp_path, method, grad_accum=4)
    advance(run, 2)
    assert weights_are(run, -2 * 0.125)
    assert (run.step, run.stream.place, len(method.batches)) == (2, 8, 8)
    with pytest.raises(InputError, match="grad_accum is 0"):
        make_run(tmp_path, Falling(), grad_accum=0)


def test_snapshots_of_before_are_none_of_a_resumed_runs(tmp_path):
    run = make_run(tmp_path, Falling(breaks={5}))
    advance(run, 2)
    run.save({})
    advance(run, 2)
    run.snapshot()
    run.resume()
    assert run.step == 2
    run.snapshot()
    for _ in range(2):
        advance(run, 2)
        run.advance()
        assert run.judge(whole=True).to_step == 2


def test_there_may_be_nothing_to_resume(tmp_path):
    run = make_run(tmp_path, Falling())
    before = everything(run)
    assert run.resume() is None
    assert same(everything(run), before)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(tmp_path, capsys):
    run = make_run(tmp_path, Falling())
    paths = []
    for _ in range(3):
        advance(run, 1)
        paths.append(run.save({}))
    file = paths[2] / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    resumed = make_run(tmp_path, Falling())
    for name, reason in ((paths[2], "not what was written"), (tmp_path / "nothing", "not whole")):
        with pytest.raises(InputError, match=f"{name.name} can't be resumed: .*{reason}"):
            resumed.resume(name)
    assert resumed.step == 0
    assert paths[2].exists()
    assert resumed.resume() == {}
    assert resumed.step == 2
    said = capsys.readouterr().out
    assert "step_00000003 is passed over" in said
    assert f"goes on from {paths[1]}, step 2" in said
    assert [path.exists() for path in paths] == [True, True, False]  # a run has one past
    named = make_run(tmp_path, Falling())
    named.resume(paths[0])
    assert named.step == 1
    assert [path.exists() for path in paths] == [True, False, False]


def test_a_checkpoint_of_other_settings_or_another_version_is_refused(tmp_path):
    run = make_run(tmp_path, Falling())
    advance(run, 1)
    saved = run.save({})
    with pytest.raises(InputError, match="differ in having a replay buffer"):
        make_run(tmp_path).resume()
    assert saved.exists()
    run.checkpoints.save(2, {"learner": {}, "guard": {}})
    with pytest.raises(InputError, match="step_00000002 is none of a run"):
        make_run(tmp_path, Falling()).resume()
    # Its shared file taken out of the manifest.
    manifest = saved / "manifest.json"
    told = json.loads(manifest.read_text())
    del told["sha256"]["shared.safetensors"]
    manifest.write_text(json.dumps(told))
    with pytest.raises(InputError, match="step_00000001 has no weights"):
        make_run(tmp_path, Falling()).resume(saved)
    # As 0.1.0 wrote them.
    folder = tmp_path / "checkpoints" / "step_00000003"
    folder.mkdir()
    digest = save_tree({"state": {}, "guard": {}, "rollbacks": [], "extra": {}}, folder / "rank_0.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "sha256": {"rank_0.safetensors": digest}}))
    with pytest.raises(InputError, match="step_00000003 is of another version of timm_jem: resume it with that one"):
        make_run(tmp_path, Falling()).resume()


@pytest.mark.parametrize(
    "odd",
    [
        *({"state": 1}, {"state": {"learner": 1}}, {"guard": 0}, {"guard": {}}, {"rollbacks": 5}, {"stream": None}),
        *({"buffer": 3}, {"step": "a"}, {"step": -1}, {"remedy": {"colour": 1}}, {"statistics": []}, {"rng": {}}),
    ],
    ids=str,
)
def test_a_checkpoint_whose_sums_are_right_and_whose_content_is_not_is_refused(tmp_path, odd):
    run = make_run(tmp_path)
    advance(run, 1)
    state = run._state()
    for part in (state, state["learner"]):
        part |= {name: value for name, value in odd.items() if name in part}
    saved = {"state": state, "guard": run.guard.state_dict(), "rollbacks": [], "extra": {}}
    run.checkpoints.save(1, saved | {name: value for name, value in odd.items() if name in saved})
    with pytest.raises(InputError) as error:
        make_run(tmp_path).resume()
    assert "checkpoint" in str(error.value)


def test_a_checkpoint_that_can_not_be_written_leaves_the_run_as_it_is(tmp_path, monkeypatch):
    run = make_run(tmp_path, Falling())
    advance(run, 1)
    before = everything(run)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_jem.training.checkpoints.save_tree", full)
    with pytest.raises(InputError, match="No space left"):
        run.save({})
    assert same(everything(run), before)
    monkeypatch.setattr("timm_jem.training.checkpoints.save_tree", save_tree)
    assert run.save({}).exists()


def test_the_published_model_samples_by_the_remedies_once(tmp_path):
    run = make_run(tmp_path)
    learner, own = run.learner, run.learner.jem.sgld
    learner.apply(Remedy(step_size=0.5, num_steps=2.0), seed=0)
    for _ in range(3):
        published = learner.published().sgld
        assert (published.step_size, published.num_steps) == (own.step_size * 0.5, own.num_steps * 2)
    learner.ema = SimpleNamespace(module=JEM(Tiny(), data_config={"input_size": SHAPE, "mean": (0.4,), "std": (0.3,)}))
    assert [learner.published().sgld.num_steps for _ in range(2)] == [own.num_steps * 2] * 2
