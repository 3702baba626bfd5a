"""Training state: one process or two, interrupted or not, is the same training."""

import copy
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from recipe_processes import FORKS
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import timm_jem
from timm_jem import InputError, ObjectiveConfig, ReplayBuffer, SGLDConfig, uniform_noise
from timm_jem.evaluation import accuracy, predict
from timm_jem.training import Batch, Checkpoints, Learner, MaximumLikelihood, Remedy, Run, Settings, refuse_unsupported
from timm_jem.training.measure import in_batches, measure
from timm_jem.training.publish import whole_state
from timm_jem.training.record import Record
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.sam import SAM
from timm_jem.training.state import copy_tree

SHAPE, SIZE, STEPS = (1, 8, 8), 6, 20


def images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 2 · SIZE images of a step, for one process or two."""
    generator = torch.Generator().manual_seed(step)
    return uniform_noise((2 * SIZE, *SHAPE), generator=generator), torch.randint(3, (2 * SIZE,), generator=generator)


def make(share: slice = slice(None), objective=ObjectiveConfig(energy_l2=0.1), shard=False, **settings) -> Learner:
    """A learner whose chains, all drawn at each step and moved without noise, are a share of the same ones."""
    torch.manual_seed(0)
    model_settings = settings.pop("model", {})
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE, act_layer="silu", **model_settings)
    ema = None if shard else ModelEmaV3(jem, decay=0.9)
    accelerator = Accelerator(cpu=True)
    if shard:  # as accelerate does on GPUs
        fully_shard(jem)
    optimizer = create_optimizer_v2(jem.backbone, opt="adam", lr=2e-3)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=40, warmup_epochs=4, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=1
    )
    prepared, optimizer = (jem, optimizer) if shard else accelerator.prepare(jem, optimizer)
    chains = uniform_noise((2 * SIZE, *SHAPE), generator=torch.Generator().manual_seed(5))[share]
    rng = torch.Generator().manual_seed(1)
    buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=rng, capacity=len(chains), restart_prob=0.0)
    buffer.chains.copy_(chains)
    of_learner = {"grad_clip": settings.pop("grad_clip", 1.0), "sam": settings.pop("sam", None)}
    settings = {"sgld": SGLDConfig(num_steps=3, noise_std=0.0), "objective": objective, **settings}
    generator = torch.Generator().manual_seed(2)
    prepared.train()
    method = MaximumLikelihood(jem, buffer, **settings)
    return Learner(accelerator, prepared, jem, optimizer, scheduler, method, generator=generator, ema=ema, **of_learner)


def train(learner: Learner, steps: int, share: slice = slice(None)) -> None:
    for _ in range(steps):
        u, y = images(learner.step)
        learner.iterate([Batch(u[share], y[share])])


def as_one_of_two(rank: int, port: int) -> slice:
    """Make this process one of two on CPUs; its share of each batch."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    return slice(rank * SIZE, (rank + 1) * SIZE)


def half_of_the_training(rank: int, port: int, folder: str, shard: bool) -> None:
    share = as_one_of_two(rank, port)
    learner = make(share, shard=shard, step_cosine=0.5, ramp_auc=0.3, sam=SAM(0.1), balance=not shard)
    train(learner, STEPS // 2, share)
    snapshot = copy_tree(learner.state_dict())
    train(learner, 2, share)
    learner.load_state_dict(snapshot)  # its own part of the weights, where they are sharded
    train(learner, STEPS - STEPS // 2, share)
    if shard:
        whole = {name: tensor.full_tensor() for name, tensor in learner.jem.state_dict().items()}
        assert all(isinstance(parameter, DTensor) for parameter in learner.jem.parameters())
        torch.save({"model": whole, "ema": whole, "buffer": learner.method.buffer.state_dict()}, f"{folder}/{rank}.pt")
        learner.accelerator.end_training()
        return
    torch.save(copy_tree(learner.state_dict()), f"{folder}/{rank}.pt")
    record = Record(RunFolder(Path(folder)), learner.accelerator, Settings(), [])
    record.open(0)
    record.log(1, {"ce": torch.tensor(rank + 0.5), "loss": torch.tensor(4.0 * rank), "event": "none"})
    record.close()
    learner.accelerator.end_training()


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(tmp_path, shard):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        half_of_the_training, (port, str(tmp_path), shard), nprocs=2, start_method=FORKS.get_start_method()
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert not torch.equal(first["buffer"]["chains"], second["buffer"]["chains"])
    alone = make(step_cosine=0.5, ramp_auc=0.3, sam=SAM(0.1), balance=not shard)
    start = copy_tree(alone.jem.state_dict())
    train(alone, STEPS)
    for name, parameter in alone.jem.state_dict().items():
        torch.testing.assert_close(first["model"][name], parameter, rtol=0, atol=1e-6)
        assert not torch.equal(parameter, start[name])
    # The same chains, in another order of slots.
    together = torch.cat([first["buffer"]["chains"], second["buffer"]["chains"]])
    torch.testing.assert_close(together, alone.method.buffer.chains, rtol=0, atol=1e-5)
    if not shard:
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "ce": 1.0, "loss": 2.0, "event": "none"}


class Images(torch.utils.data.Dataset):
    """What an ImageSet is to evaluation."""

    def __init__(self, count: int) -> None:
        u, self.labels = images(99)
        self.images = ((u + 1) * 127).byte()[:count]
        self.labels = self.labels[:count]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows):
        return self.images[rows], self.labels[rows]


def statistics_of_two(rank: int, port: int, folder: str) -> None:
    share = as_one_of_two(rank, port)
    # With chains there are more forwards in a step, and the later ones send the first process's statistics around.
    settings = {"model": {"norm_layer": "batchnorm2d"}, "objective": ObjectiveConfig(w_x=0.0)}
    learner, again = (make(share, **copy.deepcopy(settings)) for _ in range(2))
    checkpoints = Checkpoints(f"{folder}/checkpoints", learner.accelerator)
    stream = SimpleNamespace(state_dict=dict, load_state_dict=lambda *_: None)
    guard = SimpleNamespace(state_dict=lambda: {"scales": {}}, load_state_dict=lambda *_: None, snapshots=[])
    train(learner, 3, share)
    Run(learner, stream, guard, checkpoints).save({})
    train(learner, 2, share)
    Run(again, stream, guard, checkpoints).resume()
    train(again, 2, share)
    expected, resumed = (copy_tree(each.state_dict()) for each in (learner, again))
    published = learner.published()
    of_both = learner.accelerator.gather(torch.cat([b.flatten().float() for b in published.buffers()])[None])
    assert not torch.equal(*of_both)
    figures = measure(published, Images(2 * SIZE), "val", learner.accelerator)
    buffers = torch.cat([b.flatten().float() for b in published.buffers()])
    same = bool(torch.equal(buffers, of_both[0]))
    torch.save({"expected": expected, "resumed": resumed, "same": same, "figures": figures}, f"{folder}/{rank}.pt")
    if rank == 0:
        logits, _ = predict(published, in_batches(Images(2 * SIZE), 0))
        assert figures["val_accuracy"] == accuracy(logits, Images(2 * SIZE).labels)
    learner.accelerator.end_training()


def test_two_processes_have_the_statistics_of_one_model(tmp_path):
    """Each process's BatchNorm sees its own images: a resumed run has them as they were, and what is evaluated is what is
    saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        statistics_of_two, (port, str(tmp_path)), nprocs=2, start_method=FORKS.get_start_method()
    )
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [each["same"] for each in both] == [True, True]
    assert both[0]["figures"] == both[1]["figures"]
    for each in both:
        expected, resumed = each["expected"], each["resumed"]
        for part in ("model", "ema"):
            assert all(torch.equal(resumed[part][name], expected[part][name]) for name in expected[part])
        assert torch.equal(resumed["buffer"]["chains"], expected["buffer"]["chains"])


def a_sharded_model_made_whole(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE, norm_layer="batchnorm2d")
    before = copy_tree(jem.state_dict())
    fully_shard(jem)
    assert any(isinstance(part, DTensor) for part in jem.state_dict().values())
    buffer = ReplayBuffer(SHAPE, init=uniform_noise, generator=torch.Generator(), capacity=1)
    with pytest.raises(InputError, match="these are sharded"):
        MaximumLikelihood(jem, buffer, sgld=SGLDConfig(), objective=ObjectiveConfig(), balance=True)
    whole = whole_state(jem)
    assert set(whole) == set(before)
    assert any("running_mean" in name for name in whole)
    assert all(torch.equal(whole[name], before[name]) for name in before)
    torch.distributed.destroy_process_group()


def test_a_sharded_model_with_batch_norm_can_be_made_whole(tmp_path):
    torch.multiprocessing.start_processes(
        a_sharded_model_made_whole, (str(tmp_path),), nprocs=1, start_method=FORKS.get_start_method()
    )


def a_sharded_model_that_predicts(rank: int, folder: str, whole: bool) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=SHAPE)
    for block in () if whole else [block for stage in jem.backbone.stages for block in stage]:
        fully_shard(block)
    fully_shard(jem)
    x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    jem.predict(x)
    predict(jem, in_batches(Images(2), 0))
    timm_jem.ood.detector(jem, "energy").score(x)
    timm_jem.joint_loss(jem(x), y)["loss"].backward()
    assert [name for name, parameter in jem.named_parameters() if parameter.grad is None] == []
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("whole", [False, True])
def test_a_sharded_model_still_learns_after_it_predicted(tmp_path, whole):
    torch.multiprocessing.start_processes(
        a_sharded_model_that_predicts, (str(tmp_path), whole), nprocs=1, start_method=FORKS.get_start_method()
    )


@pytest.mark.parametrize("norm", [None, "batchnorm2d"])
def test_a_snapshot_goes_on_bit_for_bit(norm):
    settings = {
        "sgld": SGLDConfig(num_steps=2, noise_std=0.05, step_decay=True),
        "model": {"norm_layer": norm, "drop_rate": 0.2},
    }
    learner = make(**settings)
    train(learner, 3)
    snapshot = copy_tree(learner.state_dict())
    train(learner, 4)
    expected = copy_tree(learner.state_dict())
    other = make(**settings)
    train(other, 1)
    for resumed in (learner, other):
        resumed.load_state_dict(snapshot)
        assert resumed.step == 3
        train(resumed, 4)
        state = resumed.state_dict()
        for part in ("model", "ema"):
            assert all(torch.equal(state[part][name], expected[part][name]) for name in expected[part])
        assert torch.equal(state["buffer"]["chains"], expected["buffer"]["chains"])
        assert torch.equal(state["generator"], expected["generator"])
        assert torch.equal(state["rng"]["torch"], expected["rng"]["torch"])


def test_accumulated_batches_are_one_step():
    whole, halves = (make(objective=ObjectiveConfig(w_x=0.0)) for _ in range(2))
    for step in range(3):
        u, y = images(step)
        terms = whole.iterate([Batch(u, y)])
        accumulated = halves.iterate([Batch(u[:SIZE], y[:SIZE]), Batch(u[SIZE:], y[SIZE:])])
        torch.testing.assert_close(accumulated["loss"], terms["loss"])
        torch.testing.assert_close(accumulated["grad_norm"], terms["grad_norm"])
    assert halves.step == 3
    for a, b in zip(whole.jem.parameters(), halves.jem.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def sgld_now(learner):
    return learner.method.sgld_at(learner.step, learner.remedy)


def test_remedies_change_the_next_steps():
    learner = make(ramp_from=1, ramp_steps=2)
    assert [sgld_now(learner).num_steps, learner.optimizer.param_groups[0]["lr"]] == [1, 0.0]
    train(learner, 2)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    learner.apply(Remedy(lr=0.5, num_steps=1.5, step_size=0.1, energy_l2=1.0), seed=3)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert (sgld_now(learner).num_steps, sgld_now(learner).step_size) == (5, 0.1)
    learner.apply(Remedy(lr=0.5), seed=4)
    train(learner, 1)
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * 1.5e-3)
    assert learner.remedy == Remedy(lr=0.25, num_steps=1.5, step_size=0.1, energy_l2=1.0)


def test_the_step_size_that_training_came_to_is_kept_and_published():
    learner = make(step_cosine=0.5)
    assert learner.published().sgld.step_size == 1.0
    train(learner, 3)
    saved, scale = copy_tree(learner.state_dict()), learner.method.step_size.scale
    assert learner.published().sgld.step_size == pytest.approx(float(scale))
    assert float(scale) != 1
    train(learner, 2)
    again = make(step_cosine=0.5)
    again.load_state_dict(saved)
    train(again, 2)
    assert torch.equal(again.method.step_size.scale, learner.method.step_size.scale)
    assert torch.equal(again.method.buffer.chains, learner.method.buffer.chains)
    fixed = make()
    fixed.load_state_dict(saved)
    train(fixed, 1)
    assert torch.equal(fixed.method.step_size.scale, scale)  # where nothing adapts any more, it stays
    assert learner.method.heeds == ("num_steps", "energy_l2")


def test_a_model_of_chains_that_grow_has_the_length_that_remedies_gave_them():
    learner = make(ramp_auc=1.0)
    learner.apply(Remedy(num_steps=1.5), seed=3)
    assert sgld_now(learner).num_steps == 2
    assert learner.published().sgld.num_steps == 2


def test_a_model_of_chains_that_grow_by_the_clock_has_the_length_of_the_last_step():
    learner = make(ramp_from=1, ramp_steps=2)
    lengths = [learner.published().sgld.num_steps]
    for _ in range(3):
        train(learner, 1)
        lengths.append(learner.published().sgld.num_steps)
    assert lengths == [1, 1, 2, learner._sgld.num_steps]


def test_the_gradients_norm_is_what_tells_of_a_broken_gradient():
    learner = make(grad_clip=0.0)
    learner.jem.backbone.fc.bias.register_hook(lambda grad: grad * float("nan"))
    u, y = images(0)
    terms = learner.iterate([Batch(u, y)])
    assert terms["loss"].isfinite()
    assert terms["grad_norm"].isnan()


def stub(kind="NO", precision="no", **state):
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), mixed_precision=precision, state=SimpleNamespace(**state)
    )


def test_what_can_not_work_is_refused_with_the_reason():
    refuse_unsupported(stub())
    refuse_unsupported(stub("MULTI_GPU", "bf16"))
    refuse_unsupported(stub("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    for accelerator, reason in [
        (stub("DEEPSPEED"), "DEEPSPEED gives no gradients"),
        (stub("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=1)), "fsdp_version: 2"),
        (stub(precision="fp16"), "fp16 is not for SGLD: the gradient scaler"),
    ]:
        with pytest.raises(InputError, match=reason):
            refuse_unsupported(accelerator)
