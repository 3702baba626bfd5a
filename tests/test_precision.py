"""A precision that is measured: which it is, that nothing else notices, and that it stays with the run."""

import json
import os
import shlex
import socket
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, PartialState
from recipe_processes import FORKS

import timm_jem
from timm_jem import InputError, ObjectiveConfig
from timm_jem.data import DataConfig, Splits, load_splits
from timm_jem.training import TrainConfig, check_plan, open_accelerator, parse_settings, precision
from timm_jem.training.build import build_learner
from timm_jem.training.precision import faster_precision, measured_precision, precision_of

pytestmark = pytest.mark.usefixtures("precision_of_its_own")

SHORT = (
    "--data.dataset digits --model.name wrn_10_1 --train.threads 1 --train.steps 2 --train.batch_size 8 --train.warmup_steps 0 "
    "--train.buffer_size 200 --train.sample_steps [1] --train.sample_count 4 --sgld.num_steps 2 --sgld.denoise_steps 1 "
    "--train.checkpoint_every 1"
)
FASTER = {"no": (1.0, 2.0), "bf16": (2.0, 1.0)}


@pytest.fixture
def timed(monkeypatch):
    """Let one of the precisions be the faster; returns the images that were timed."""

    def be(faster: str) -> list[torch.Size]:
        seen = []
        monkeypatch.setattr(precision, "_pass_seconds", lambda jem, x: seen.append(x.shape) or FASTER[faster])
        return seen

    return be


def network(name: str = "wrn_10_1", **kwargs) -> timm_jem.JEM:
    return timm_jem.create_model(name, num_classes=3, input_size=(3, 8, 8), **kwargs)


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(1.0, 0.5, "bf16"), (1.0, 1 / 1.16, "bf16"), (1.0, 1 / 1.14, "no"), (1.0, 1.0, "no"), (1.0, 15.0, "no")],
)
def test_bf16_has_to_be_clearly_faster(fp32, bf16, chosen):
    assert faster_precision(fp32, bf16) == chosen


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(w_x=0)], ids=["chains", "classifier"])
def test_measuring_leaves_no_trace(objective, monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    jem = network(norm_layer="batchnorm2d", drop_rate=0.5).train()
    jem.backbone.conv1 = jem.backbone.stem.requires_grad_(False)  # as a part that stays as it is
    before = {name: value.clone() for name, value in jem.state_dict().items()}
    flags = [(module.training, [p.requires_grad for p in module.parameters()]) for module in jem.modules()]
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    chosen, why = measured_precision(jem, TrainConfig(batch_size=4, objective=objective))
    assert chosen in ("no", "bf16")
    assert " times as fast as fp32 here, by passes of " in why
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in jem.state_dict().items())
    assert [(module.training, [p.requires_grad for p in module.parameters()]) for module in jem.modules()] == flags
    assert all(parameter.grad is None for parameter in jem.parameters())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(w_x=0)], ids=["chains", "classifier"])
def test_what_is_timed_are_both_precisions_of_what_the_run_does(objective, monkeypatch):
    jem, seen = network(), []

    def look(module, args, logits):
        weights = any(parameter.requires_grad for parameter in module.parameters())
        seen.append((logits.dtype, weights, logits.requires_grad))

    jem.register_forward_hook(look)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    measured_precision(jem, TrainConfig(batch_size=4, objective=objective))
    weights = not objective.needs_chains
    assert seen[:2] == [(torch.float32, weights, True)] * 2
    assert seen[2:] == [(torch.float32, weights, True), (torch.bfloat16, weights, True)] * (precision.ROUNDS + 1)


def test_the_images_that_are_timed_are_few_enough(timed, monkeypatch):
    seen = timed("bf16")
    for one_image, images in ((1e-9, 8), (precision.PASS_SECONDS / 3.5, 3), (1000.0, 1)):
        monkeypatch.setattr(precision, "_seconds", lambda *_, seconds=one_image, **__: seconds)
        chosen, why = measured_precision(network(), TrainConfig(batch_size=8))
        assert seen[-1] == (images, 3, 8, 8)
        assert chosen == "bf16"
        assert why == f"it is 2.00 times as fast as fp32 here, by passes of {images} image{'s' * (images > 1)}"
    timed("no")
    assert measured_precision(network(), TrainConfig())[1].startswith("bf16 is 0.50 times as fast as fp32 here")


def test_a_busy_machine_does_not_make_the_passes_smaller(timed):
    seen, jem = timed("no"), network()
    jem.register_forward_hook(lambda *_: time.sleep(precision.PASS_SECONDS))  # as long as others have the processor
    measured_precision(jem, TrainConfig(batch_size=2))
    assert seen == [(2, 3, 8, 8)]


def test_a_network_that_fails_in_bf16_trains_in_fp32():
    class Fp32Only(torch.nn.Module):
        def forward(self, x):
            if x.dtype == torch.bfloat16:
                raise RuntimeError("pool not implemented\n for BFloat16")
            return x

    jem = network()
    jem.backbone.global_pool = torch.nn.Sequential(Fp32Only(), jem.backbone.global_pool)
    told = ("no", "bf16 fails with this network (pool not implemented for BFloat16)")
    assert measured_precision(jem, TrainConfig(batch_size=2)) == told


@pytest.mark.parametrize(
    ("device", "has", "chosen"), [("cuda", True, "bf16"), ("cuda", False, "no"), ("mps", True, "no"), ("xpu", True, "no")]
)
def test_other_devices_are_asked(device, has, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert precision_of(torch.device(device))[0] == chosen


def test_other_devices_are_asked_before_there_is_an_accelerator(monkeypatch, capsys):
    """accelerate shards by the precision that it is made with."""
    monkeypatch.setattr(PartialState(cpu=True), "device", torch.device("mps"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = TrainConfig(mixed_precision="auto")
    assert open_accelerator(config).mixed_precision == config.mixed_precision == "no"
    assert capsys.readouterr().out == "note: train.mixed_precision auto is no: bf16 is not measured on mps\n"


@cache
def splits() -> Splits:
    return load_splits(DataConfig())


def learner_of(flags: str):
    """Settings and learner, up to where its first step would be."""
    AcceleratorState._reset_state()
    told, _ = parse_settings(shlex.split(f"{SHORT} {flags}"))
    accelerator = open_accelerator(told.train)
    settings = check_plan(told, splits(), accelerator.num_processes)
    return settings, build_learner(settings, splits(), accelerator)


@pytest.mark.parametrize(("faster", "launched"), [("bf16", None), ("bf16", "no"), ("no", "bf16"), ("no", "fp16")])
def test_a_run_with_auto_is_the_run_with_the_faster_one(faster, launched, timed, monkeypatch, capsys):
    """Whatever accelerate launch says: settings come before."""
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    timed(faster)
    settings, learner = learner_of("--train.mixed_precision auto --model.drop_rate 0.5")
    assert f"note: train.mixed_precision auto is {faster}: " in capsys.readouterr().out
    assert learner.accelerator.mixed_precision == settings.train.mixed_precision == faster
    rng = torch.get_rng_state()
    _, other = learner_of(f"--train.mixed_precision {faster} --model.drop_rate 0.5")
    assert torch.equal(torch.get_rng_state(), rng)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        logits, fp32 = learner.model.eval()(x), learner.published().eval()(x)
        assert torch.equal(logits, other.model.eval()(x))
    assert torch.equal(logits, fp32) == (faster == "no")


def test_it_is_measured_once_in_a_run(tmp_path, timed, monkeypatch, capsys):
    """A run that goes on would not be the same run in another precision, and its command repeats what it was."""
    monkeypatch.chdir(tmp_path)
    Path("auto.yaml").write_text("{data: {dataset: digits}, train: {mixed_precision: auto}}")
    seen = timed("bf16")
    for steps, way in ((2, "--output_dir run"), (3, "--output_dir run --resume auto")):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(shlex.split(f"--config auto.yaml {SHORT} --train.steps {steps} {way}"))
        said = capsys.readouterr()
        assert ("mixed_precision" in said.out + said.err) == (steps == 2)
        assert yaml.safe_load(Path("run/config.yaml").read_text())["train"]["mixed_precision"] == "bf16"
        provenance = timm_jem.from_pretrained("run/model").provenance
        assert (provenance["mixed_precision"], provenance["steps"]) == ("bf16", steps)
        assert provenance["config"]["train"]["mixed_precision"] == "bf16"
        repeated = shlex.split(provenance["command"].partition("recipes/train.py ")[2])
        assert parse_settings(repeated)[0].train.mixed_precision == "bf16"
        timed("no")
    assert len(seen) == 1
    for flags in (
        "--config auto.yaml --resume run",
        "--config auto.yaml --resume run/checkpoints/step_00000003",
        "--train.mixed_precision auto --resume run",
    ):
        settings, repeated = parse_settings(shlex.split(flags))
        assert settings.train.mixed_precision == parse_settings(repeated)[0].train.mixed_precision == "bf16"
    told_otherwise = shlex.split("--config auto.yaml --train.mixed_precision no --resume run")
    assert parse_settings(told_otherwise)[0].train.mixed_precision == "no"
    assert parse_settings(shlex.split("--config auto.yaml --output_dir run"))[0].train.mixed_precision == "auto"  # no resume


def test_a_precision_that_a_config_does_not_say_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    auto = shlex.split("--train.mixed_precision auto --output_dir run --resume auto")
    assert parse_settings(auto)[0].train.mixed_precision == "auto"
    for content, found in (("{}", "auto"), ("{train: {mixed_precision: auto}}", "auto")):
        Path("run/config.yaml").write_text(content)
        assert parse_settings(auto)[0].train.mixed_precision == found
    Path("auto.yaml").write_text("train: {mixed_precision: auto}")
    for content in ("{train: {mixed_precision: fp16}}", "{train: [", "{trian: {}}", ""):
        Path("run/config.yaml").write_text(content)
        with pytest.raises(InputError, match=r"is 'fp16': give|run/config\.yaml"):
            parse_settings(["--config", "auto.yaml", *auto])


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """Of two processes that find different precisions."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    precision._pass_seconds = lambda *_: FASTER["no" if rank else "bf16"]
    settings, learner = learner_of("--train.mixed_precision auto")
    logits = learner.model(torch.rand(2, 1, 8, 8))
    learner.accelerator.backward(logits.sum())
    gradient = next(learner.model.parameters()).grad.sum().item()
    found = [settings.train.mixed_precision, learner.accelerator.mixed_precision, learner.accelerator.num_processes, gradient]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    learner.accelerator.end_training()


def test_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # gradients are exchanged, as with any accelerator
    assert first[:3] == ["bf16", "bf16", 2]
