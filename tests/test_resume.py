"""Real processes, killed and stopped at any moment, against a run that nothing interrupted: equal to the bit."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from recipe_processes import exit_status, start_recipe

from timm_jem.training import load_tree, rank_files
from timm_jem.training.checkpoints import shared_file

FLAGS = shlex.split(
    "--output_dir run --resume auto --train.threads 1 --train.steps 40 --train.batch_size 16 --train.warmup_steps 5 "
    "--sgld.num_steps 2 --sgld.denoise_steps 1 --train.buffer_size 200 --train.sample_steps [2] --train.sample_count 20 "
    "--train.checkpoint_every 4 --train.eval_every 10 --train.sample_every 20 --train.log_every 1 --train.best_k 1 "
    "--train.ema_decay 0.9 --model.drop_rate 0.1 --train.ce_batch_size 8 --guard.check_every 5 --guard.snapshot_every 10"
)


def start(folder: Path, world: int, *flags: str, fresh: bool = False) -> list[BaseProcess]:
    """The processes of one run, as torchrun would start them; ``fresh``: the first in an interpreter of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if world > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        output = folder / f"output_{rank}.txt"
        processes.append(start_recipe("train.py", [*FLAGS, *flags], folder, environment, output, fresh=fresh and rank == 0))
    return processes


def running(process: BaseProcess) -> bool:
    return process.exitcode is None


def finish(processes: list[BaseProcess]) -> list[int]:
    return [exit_status(process) for process in processes]


def output(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("output_*.txt")))


def whole(folder: Path, world: int) -> None:
    assert finish(start(folder, world)) == [0] * world, output(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Runs that nothing interrupts, by number of processes."""
    folders = {}

    def get(world: int) -> Path:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"reference{world}")
            whole(folders[world], world)
        return folders[world] / "run"

    return get


def without_times(tree):
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key != "seconds"}
    if isinstance(tree, torch.Tensor):
        return tree.numpy().tobytes(), tree.dtype, tuple(tree.shape)
    return [without_times(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def assert_same(run: Path, other: Path) -> None:
    """Weights, optimiser, average, buffers and randomness of every process, metrics, pictures and figures."""
    for name in ("model/model.safetensors", "metrics.jsonl", "samples.png", "samples_000020.png", "buffer.png"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for folder in (".", "best", "checkpoints"):
        assert sorted(os.listdir(run / folder)) == sorted(os.listdir(other / folder))
    newest = [folder / "checkpoints" / "step_00000040" for folder in (run, other)]
    states = [[shared_file(checkpoint), *rank_files(checkpoint)] for checkpoint in newest]
    assert len(states[0]) == len(states[1]) > 1
    for first, second in zip(*states, strict=True):
        assert without_times(load_tree(first)) == without_times(load_tree(second))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    for summary in summaries:
        del summary["seconds"], summary["seconds_per_step"]
    assert summaries[0] == summaries[1]


def kill(folder: Path, world: int, moment: float | None) -> bool:
    """Start or resume, and kill all processes ``moment`` seconds into training, or (None) inside a save after the first."""
    before = time.time()
    processes = start(folder, world)
    metrics = folder / "run" / "metrics.jsonl"
    while all(map(running, processes)):
        if metrics.is_file() and metrics.stat().st_mtime > before:
            if moment is None:
                saved = folder / "run" / "checkpoints"
                if list(saved.glob(".step_*")) and list(saved.glob("step_*")):
                    break
            else:
                time.sleep(moment)
                break
        time.sleep(0.001)  # no spin, which would take a core from what is waited for
    alive = any(map(running, processes))
    for process in processes:
        process.kill()
        process.join()
    return alive


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, reference, world):
    for moment in (0.1, None):
        assert kill(tmp_path, world, moment)
    whole(tmp_path, world)
    assert "goes on from" in output(tmp_path)
    assert_same(reference(world), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_thirty_kills(tmp_path, reference, world):
    """At random moments, some inside a save; a killed run that was finished is started over."""
    moments = random.Random(world)
    kills = inside = number = 0
    while kills < 30 or inside < 5:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        moment = None if moments.random() < 0.3 else moments.uniform(0, 2)
        if kill(folder, world, moment):
            kills += 1
            inside += bool(list((folder / "run" / "checkpoints").glob(".*")))
        elif (folder / "run" / "summary.json").is_file():
            assert_same(reference(world), folder / "run")
            number += 1
    whole(folder, world)
    assert_same(reference(world), folder / "run")
    print(f"{kills} kills, {inside} of them inside a save, {number + 1} runs finished")


@pytest.mark.parametrize(("number", "world"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_stopped_run_leaves_a_checkpoint_and_goes_on(tmp_path, reference, number, world):
    before = time.time()
    processes = start(tmp_path, world)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_mtime > before and metrics.stat().st_size > 2000):
        assert all(map(running, processes)), output(tmp_path)
        time.sleep(0.005)
    os.kill(processes[0].pid, number)  # one is enough: they agree
    assert finish(processes) == [128 + number] * world, output(tmp_path)
    assert f"{number.name}: stopped at step" in output(tmp_path)
    assert "Traceback" not in output(tmp_path)
    assert not (tmp_path / "run" / "summary.json").exists()
    whole(tmp_path, world)
    assert "goes on from" in output(tmp_path)
    assert_same(reference(world), tmp_path / "run")
    # A finished run is left as it is.
    content = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    whole(tmp_path, world)
    assert "is finished: 40 steps" in output(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == content


def test_a_signal_to_the_group_ends_no_worker_before_the_checkpoint(tmp_path):
    decoded_by_a_worker = ["--data.cache_gib", "0", "--train.workers", "1"]
    (process,) = start(tmp_path, 1, "--train.steps", "100000", "--train.eval_every", "0", *decoded_by_a_worker)
    while not list((tmp_path / "run").glob("checkpoints/step_*")):
        assert running(process), output(tmp_path)
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # what batch systems do
    assert exit_status(process) == 128 + signal.SIGTERM, output(tmp_path)
    (step,) = re.findall(r"SIGTERM: stopped at step (\d+); go on with --resume run", output(tmp_path))
    assert rank_files(tmp_path / "run" / "checkpoints" / f"step_{int(step):08d}")
    assert "Traceback" not in output(tmp_path)


def test_runs_started_at_once_are_whole_and_a_second_writer_is_refused(tmp_path):
    """Three seeds, each in a folder of its own; and a live run that another process wants to go on with."""
    flags = shlex.split("--train.steps 8 --train.checkpoint_every 4 --train.eval_every 0 --train.sample_every 0")
    flags = [*FLAGS[4:], *flags]  # without output_dir and resume
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def begin(name: str, *more: str) -> BaseProcess:
        return start_recipe("train.py", [*flags, *more], tmp_path, environment, tmp_path / f"output_{name}.txt")

    seeds = [begin(seed, "--train.seed", seed) for seed in "012"]
    assert finish(seeds) == [0, 0, 0], output(tmp_path)
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["digits", "digits-2", "digits-3"]
    written = [yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] for run in runs]
    assert sorted(written) == [0, 1, 2]
    for run, seed in zip(runs, written, strict=True):
        assert json.loads((run / "summary.json").read_text())["steps"] == 8
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
        assert json.loads((run / "model" / "config.json").read_text())["timm_jem"]["provenance"]["seed"] == seed
        assert sorted(os.listdir(run / "checkpoints")) == ["step_00000004", "step_00000008"]
    long = begin("long", "--output_dir", "live", "--train.steps", "100000")
    while not list((tmp_path / "live").glob("checkpoints/step_*")):
        assert running(long), output(tmp_path)
        time.sleep(0.01)
    for name, how in (("auto", ["--output_dir", "live", "--resume", "auto"]), ("named", ["--resume", "live"])):
        assert exit_status(begin(name, *how)) == 1
        said = (tmp_path / f"output_{name}.txt").read_text()
        assert f"error: another process, pid {long.pid} on {socket.gethostname()}, is writing to live: " in said
        assert "Traceback" not in said
    assert running(long), output(tmp_path)
    os.kill(long.pid, signal.SIGTERM)
    assert exit_status(long) == 128 + signal.SIGTERM, output(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "live" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_models_half_written_are_removed(tmp_path, reference):
    shutil.copytree(reference(1), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for name in (".model-0123abcd", "best/.step_00000040-0123abcd"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").write_text("{")
    whole(tmp_path, 1)
    assert_same(reference(1), tmp_path / "run")


def test_another_number_of_processes_deals_out_the_chains(tmp_path, reference):
    shutil.copytree(reference(2), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000040")
    files = rank_files(tmp_path / "run" / "checkpoints" / "step_00000036")
    old = torch.cat([load_tree(file)["state"]["learner"]["buffer"]["chains"] for file in files])
    assert finish(start(tmp_path, 1, "--train.steps", "37", "--train.buffer_size", "400")) == [0], output(tmp_path)
    assert "was written with 2 processes and goes on with 1" in output(tmp_path)
    (file,) = rank_files(tmp_path / "run" / "checkpoints" / "step_00000037")
    assert load_tree(shared_file(file.parent))["step"] == 37
    new = load_tree(file)["state"]["learner"]["buffer"]["chains"]
    assert new.shape == old.shape
    kept = (old.flatten(1).unsqueeze(1) == new.flatten(1)).all(2).any(0).sum()
    assert kept >= 400 - 16  # all but those that the one step moved


def test_damage_and_other_settings_are_said(tmp_path, reference):
    shutil.copytree(reference(1), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (file,) = rank_files(tmp_path / "run" / "checkpoints" / "step_00000040")
    file.write_bytes(file.read_bytes()[:-1000])
    assert finish(start(tmp_path, 1, "--train.lr", "0.004")) == [0]
    said = output(tmp_path)
    assert "step_00000040 is passed over: rank_0.safetensors is not what was written" in said
    assert "goes on from run/checkpoints/step_00000036, step 36" in said
    assert "note: train.lr is 0.004 now and was 0.003" in said


def test_a_process_that_dies_is_said_in_a_line(tmp_path, reference):
    """One of two is killed; and they go on, bit for bit."""
    processes = start(tmp_path, 2, fresh=True)  # what a shell shows last
    checkpoints = tmp_path / "run" / "checkpoints"
    while not list(checkpoints.glob("step_*")):
        assert all(map(running, processes)), output(tmp_path)
        time.sleep(0.005)
    processes[1].kill()
    assert exit_status(processes[0], 120) == 1
    said = (tmp_path / "output_0.txt").read_text().replace("\r", "\n").splitlines()
    assert said[-1].startswith("error: another process of this run has ended"), said[-1]
    assert said[-1].endswith("go on with --resume")
    assert "Traceback" not in output(tmp_path)
    whole(tmp_path, 2)
    assert "goes on from" in output(tmp_path)
    assert_same(reference(2), tmp_path / "run")
