import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import stability
import torch
from PIL import Image as PILImage
from recipe_processes import FORKS, exit_status
from safetensors.torch import save_file

from timm_jem import InputError
from timm_jem.training import parse_settings

ROOT = Path(__file__).parent.parent
HOSTILE = ROOT / "recipes" / "variants" / "digits_hostile.yaml"

# Stands in for recipes/train.py: seed 1 crashes as long as "mended" is not there, seed 3 waits to be stopped the first time.
FAKE_TRAIN = """
import json, signal, sys, time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, seed = Path(flags["--output_dir"]), int(flags["--train.seed"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "argv.jsonl").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if seed == 1 and not Path("mended").exists():
    print("Traceback: RuntimeError was here", flush=True)
    sys.exit("error: the disk is full")
if seed == 3 and not (folder / "checkpoint").exists():
    def leave(number, _):
        (folder / "checkpoint").write_text(signal.Signals(number).name)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    (folder / "waits").touch()
    time.sleep(60)
    sys.exit("error: nobody stopped me")
(folder / "model").mkdir(exist_ok=True)
save_file({"weight": np.ones(3, dtype=np.float32)}, folder / "model" / "model.safetensors")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "gap": -0.5}) + "\\n")
summary = {"outcome": "finished", "rollbacks": [], "test_accuracy": 0.9, "test_ece": 0.1, "val_accuracy": 0.8}
(folder / "summary.json").write_text(json.dumps({**summary, "steps": 1, "seconds": 2.0}))
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fake train.py"
    path.write_text(FAKE_TRAIN)
    return path


def write_run(folder: Path, *, outcome="finished", accuracy=0.9, gaps=(), rollbacks=(), weight=1.0, ece=0.05, seconds=10.0):
    """A run's folder as recipes/train.py leaves it, with a gap a line and ten steps between lines."""
    (folder / "model").mkdir(parents=True)
    save_file({"a": torch.zeros(2), "b": torch.tensor([1.0, weight])}, folder / "model" / "model.safetensors")
    lines = [json.dumps({"step": 10 * i, "loss": 1.0, "gap": 99.0, "gap_xy": gap}) for i, gap in enumerate(gaps, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = {"outcome": outcome, "explanation": None if outcome == "finished" else "gave up after 2 rollbacks"}
    summary |= {"rollbacks": list(rollbacks), "test_accuracy": accuracy, "test_ece": ece, "val_accuracy": 0.5}
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 10 * len(gaps), "seconds": seconds}))


def rollback(step: int, to_step: int) -> dict:
    return {"step": step, "to_step": to_step, "reason": f"ce not finite at {step}", "remedy": "lr × 0.5"}


def rows_of(markdown: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_says_what_happened(fake_train, tmp_path, capsys):
    """Seeds 0 finished, 1 crashes, 2 gave up with NaN in its model; 3 finished after a rollback."""
    folder = tmp_path / "out"
    assert stability.main(shlex.split("--seeds 1 --output_dir out"), fake_train) == 0  # which flags the folders are of
    for path in (folder / "default" / "seed_0").rglob("*"):
        path.unlink() if path.is_file() else None
    (folder / "default" / "seed_0" / "model").rmdir()
    (folder / "default" / "seed_0").rmdir()
    first, last = [-100.0] * 5 + [-1.0] * 5 + [-3.0] * 5, [-4.0] * 12
    write_run(folder / "default" / "seed_0", accuracy=0.90, gaps=first, ece=0.02, seconds=10)
    twice = [rollback(30, 20), rollback(40, 20)]
    write_run(
        folder / "default" / "seed_2", outcome="stopped", accuracy=0.5, gaps=[], rollbacks=twice, weight=float("nan"), ece=0.3
    )
    write_run(folder / "default" / "seed_3", accuracy=0.97, gaps=last, rollbacks=[rollback(50, 40)], ece=0.04, seconds=30)
    capsys.readouterr()
    assert stability.main(shlex.split("--seeds 4 --output_dir out"), fake_train) == 1
    printed = capsys.readouterr()
    markdown = (folder / "stability.md").read_text()
    assert printed.out.strip() == markdown.strip()
    assert "1 of 4 runs crashed" in printed.err
    assert "`python recipes/stability.py --seeds 4 --output_dir out`: seeds 0 to 3" in markdown
    assert "sample standard deviation" in markdown
    accuracies = [0.90, 0.5, 0.97]
    assert rows_of(markdown) == [
        {
            "variant": "default",
            "runs": "4",
            "finished": "2",
            "divergences (in runs)": "4 (2)",
            "most rollbacks in a run": "2",
            "stopped or crashed": "2",
            "models with NaN": "1",
            "test accuracy": f"{statistics.fmean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}",
            "lowest": "0.500",
            "energy gap, nats": "-3.00 ± 1.41",  # −2 and −4
            "ECE": "0.120",
            "seconds": "10",
        }
    ]
    assert markdown.splitlines()[-3:] == [
        "- default, seed 1: crashed: error: the disk is full",
        "- default, seed 2: step 30 back to 20: ce not finite at 30 (lr × 0.5); step 40 back to 20: ce not finite at 40 "
        "(lr × 0.5); gave up after 2 rollbacks; its model has NaN or infinity in b",
        "- default, seed 3: step 50 back to 40: ce not finite at 50 (lr × 0.5)",
    ]
    record = json.loads((folder / "stability.json").read_text())
    assert record["variants"]["default"]["crashed"] == record["variants"]["default"]["stopped"] == 1
    assert record["variants"]["default"]["test_accuracy"]["min"] == 0.5
    assert record["runs"]["default/seed_2"]["tensors_with_nan"] == ["b"]
    assert record["runs"]["default/seed_0"]["gap"] == -2.0
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_flags_reach_each_run_word_for_word(fake_train, tmp_path):
    (tmp_path / "variants.yaml").write_text(
        "common: --train.steps 7 --train.lr 0.5\n"
        "Plain: ''\n"
        'SiLU & norm: >-\n  --model.kwargs \'{"act_layer": "silu", "norm_layer": "batchnorm2d"}\'\n  --train.lr 0.1\n'
    )
    argv = shlex.split("--seeds 1 --first_seed 5 --jobs 2 --variants variants.yaml --output_dir 'my runs' -- --train.steps 3")
    assert stability.main(argv, fake_train) == 0
    folders = {name: tmp_path / "my runs" / name / "seed_5" for name in ("plain", "silu-norm")}
    words = {name: json.loads((folder / "argv.jsonl").read_text()) for name, folder in folders.items()}
    threads = ["--train.threads", str(max(1, len(os.sched_getaffinity(0)) // 2))]
    common = ["--train.steps", "7", "--train.lr", "0.5", "--train.steps", "3"]
    own = ["--train.seed", "5", "--resume", "auto"]
    assert words["plain"] == [*common, *threads, "--output_dir", "my runs/plain/seed_5", *own]
    silu = ["--model.kwargs", '{"act_layer": "silu", "norm_layer": "batchnorm2d"}', "--train.lr", "0.1"]
    assert words["silu-norm"] == [*common, *silu, *threads, "--output_dir", "my runs/silu-norm/seed_5", *own]
    assert [row["variant"] for row in rows_of((tmp_path / "my runs" / "stability.md").read_text())] == ["Plain", "SiLU & norm"]


def test_threads_that_were_given_stay(fake_train, tmp_path):
    assert stability.main(shlex.split("--seeds 1 --output_dir out -- --train.threads 3"), fake_train) == 0
    words = json.loads((tmp_path / "out" / "default" / "seed_0" / "argv.jsonl").read_text())
    assert words[:2] == ["--train.threads", "3"]
    assert words.count("--train.threads") == 1


def test_a_crash_is_tried_again_and_not_forgotten(fake_train, tmp_path, capsys):
    argv = shlex.split("--seeds 2 --output_dir out")
    assert stability.main(argv, fake_train) == 1
    Path("mended").touch()
    assert stability.main(argv, fake_train) == 0
    calls = [len((tmp_path / f"out/default/seed_{seed}/argv.jsonl").read_text().splitlines()) for seed in (0, 1)]
    assert calls == [1, 2]
    assert "- default, seed 1: crashed once: error: the disk is full" in capsys.readouterr().out.splitlines()


def in_a_process(argv: list[str], program: Path, folder: Path) -> None:
    os.chdir(folder)
    os.dup2(os.open(folder / "told.txt", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.exit(stability.main(argv, program))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_called_again(fake_train, tmp_path, number):
    (tmp_path / "mended").touch()
    argv = shlex.split("--seeds 5 --output_dir out")
    process = FORKS.Process(target=in_a_process, args=(argv, fake_train, tmp_path))
    process.start()
    third = tmp_path / "out" / "default" / "seed_3"
    deadline = time.monotonic() + 120
    while not (third / "waits").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    status = exit_status(process, 60)
    told = (tmp_path / "told.txt").read_text()
    assert status == 128 + number, told
    assert told.splitlines()[-1] == f"{number.name}: 3 of 5 runs are done; run the same command again to continue"
    assert (third / "checkpoint").read_text() == number.name
    assert not (tmp_path / "out" / "default" / "seed_4").exists()
    assert stability.main(argv, fake_train) == 0
    assert len((third / "argv.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "out" / "default" / "seed_0" / "argv.jsonl").read_text().splitlines()) == 1
    row = rows_of((tmp_path / "out" / "stability.md").read_text())[0]
    assert (row["runs"], row["finished"], row["stopped or crashed"]) == ("5", "5", "0")


def test_a_record_that_can_not_be_written_is_named(fake_train, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"out/stability\.json can't be written \(.*No space left on device\): make room"):
        stability.main(shlex.split("--seeds 1 --output_dir out"), fake_train)


def test_runs_with_other_settings_of_the_same_flags_are_refused(fake_train, tmp_path):
    (tmp_path / "a.yaml").write_text("data: {dataset: digits}\ntrain: {lr: 0.1}\n")
    command = shlex.split("--seeds 1 --output_dir out -- --config a.yaml")
    assert stability.main(command, fake_train) == 0
    (tmp_path / "a.yaml").write_text("data: {dataset: digits}\ntrain: {lr: 0.5}\n")
    with pytest.raises(InputError, match=re.escape("other settings (train.lr is 0.5 now and was 0.1)")):
        stability.main(command, fake_train)
    saved = json.loads((tmp_path / "out" / "stability.json").read_text())
    del saved["variants"]["default"]["settings"]["train"]["lr"]  # a version that had no such setting
    (tmp_path / "out" / "stability.json").write_text(json.dumps(saved))
    assert stability.main(command, fake_train) == 0


def test_what_became_of_the_classifier_counts(fake_train, tmp_path, capsys):
    folder = tmp_path / "out" / "default"
    assert stability.main(shlex.split("--seeds 2 --first_seed 4 --output_dir out"), fake_train) == 0
    for seed in (4, 5):
        write_run(folder / f"seed_{seed}" / "classifier", outcome="stopped" if seed == 5 else "finished")
        back = {"event": "rollback", **rollback(7, 2)}
        (folder / f"seed_{seed}" / "classifier" / "metrics.jsonl").write_text(json.dumps(back) + "\n")
    (folder / "seed_5" / "summary.json").unlink()
    capsys.readouterr()
    assert stability.main(shlex.split("--seeds 2 --first_seed 4 --output_dir out"), fake_train) == 0
    printed = capsys.readouterr()
    (row,) = rows_of(printed.out)
    found = (row["finished"], row["divergences (in runs)"], row["most rollbacks in a run"], row["stopped or crashed"])
    assert found == ("1", "3 (2)", "1", "1")
    assert "seed 4: its classifier's step 7 back to 2: ce not finite at 7 (lr × 0.5)" in printed.out
    assert "seed 5: its classifier's step 7 back to 2" in printed.out
    assert "; its classifier: gave up after 2 rollbacks" in printed.out
    assert "2 of 2 runs are already done" in printed.err


def test_runs_with_other_flags_are_refused(fake_train, tmp_path):
    assert stability.main(shlex.split("--seeds 1 --output_dir out -- --train.lr 0.1"), fake_train) == 0
    with pytest.raises(InputError, match=re.escape("other flags (--train.lr 0.1)")):
        stability.main(shlex.split("--seeds 1 --output_dir out -- --train.lr 0.2"), fake_train)
    assert stability.main(shlex.split("--seeds 1 --jobs 2 --output_dir out -- --train.lr 0.1"), fake_train) == 0
    (tmp_path / "out" / "stability.json").unlink()
    with pytest.raises(InputError, match="whose flags are not in"):
        stability.main(shlex.split("--seeds 1 --output_dir out -- --train.lr 0.1"), fake_train)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"variants": {"default": {"flags": 3}}, "runs": {}}',
        '{"variants": {}, "runs": {"default/seed_0": 3}}',
        '{"variants": {}, "runs": {"default/seed_0": {"crashes": [1]}}}',
    ],
)
def test_a_record_that_no_call_wrote_is_refused(fake_train, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stability.json").write_text(content)
    with pytest.raises(InputError, match=r"stability\.json can't be read .*: give a new --output_dir"):
        stability.main(shlex.split("--seeds 1 --output_dir out"), fake_train)


@pytest.mark.parametrize(
    ("argv", "variants", "message"),
    [
        ("--seeds 0", None, "seeds is 0"),
        ("--seedz 3", None, "--seedz"),
        ("--train.lr 3", None, "recipes/train.py follow --"),
        ('--launch "accelerate \'launch"', None, "launch is"),
        ("--launch 'no_such_program -q'", None, "there is no program 'no_such_program'"),
        ("--launch ''", None, "there is no program ''"),
        ("--output_dir ''", None, "is not the name of a folder"),
        ("--output_dir variants.yaml/x", "a: ''", "can't be made"),
        ("-- --train.lrr 3", None, "variant 'default'"),
        ("-- --train.seed=3", None, "--train.seed, which"),
        ("-- --hub.push_to user/name", None, "recipes/push.py"),
        ("--variants nowhere.yaml", None, "nowhere.yaml can't be read"),
        ("--variants variants.yaml", "a: b: c", "can't be read"),
        ("--variants variants.yaml", "- a", "names no variants"),
        ("--variants variants.yaml", "common: --train.lr 1", "names no variants"),
        ("--variants variants.yaml", "a: 3", "'a': 3"),
        ("--variants variants.yaml", "no: --train.lr 1", "False"),
        ("--variants variants.yaml", "a: --model.name 'wrn", "the flags of 'a' aren't as in a shell (No closing quotation)"),
        ("--variants variants.yaml", "a: --train.lrr 3", "variant 'a'"),
        ("--variants variants.yaml", "a b: ''\na-b: ''", "would share the folder a-b"),
        ("--variants variants.yaml", "'×': ''", "can't name a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(fake_train, tmp_path, argv, variants, message):
    if variants is not None:
        (tmp_path / "variants.yaml").write_text(variants)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        stability.main(shlex.split(argv), fake_train)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_without_matplotlib_nothing_starts(fake_train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "timm_jem.stability.curves_plot", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install 'timm_jem[plots]'")):
        stability.main(["--output_dir", "out"], fake_train)
    assert not (tmp_path / "out").exists()


def test_the_hostile_settings_are_settings():
    variants = stability.read_variants("digits_hostile", ["--train.steps", "3"])
    assert variants == stability.read_variants(str(HOSTILE), ["--train.steps", "3"])
    assert len(variants) >= 12
    runs, _ = stability.plan(stability.StabilityConfig(seeds=2), variants)
    assert len(runs) == 2 * len(variants)
    assert all(run.flags.index("150") < run.flags.index("3") for run in runs)
    kwargs = variants["BatchNorm in train mode"][variants["BatchNorm in train mode"].index("--model.kwargs") + 1]
    assert json.loads(kwargs) == {"act_layer": "silu", "norm_layer": "batchnorm2d"}


def test_steps_of_a_variant_override_epochs_of_all(tmp_path):
    (tmp_path / "v.yaml").write_text("common: --train.epochs 5\nlong: ''\nshort: --train.steps 100\nonce: --train.epochs 1\n")
    _, told = stability.plan(stability.StabilityConfig(), stability.read_variants(str(tmp_path / "v.yaml"), []))
    assert {name: settings["train"]["epochs"] for name, settings in told.items()} == {"long": 5, "short": None, "once": 1}
    assert told["short"]["train"]["steps"] == 100


def test_ten_times_is_ten_times():
    """What a variant's name says holds beside the settings that it varies."""
    shipped, _ = parse_settings([], stability.DIGITS_CONFIG)
    named = {"lr": lambda settings: settings.train.lr, "step size": lambda settings: settings.sgld.step_size}
    checked = 0
    for name, flags in stability.read_variants(str(HOSTILE), []).items():
        settings, _ = parse_settings(flags, stability.DIGITS_CONFIG)
        for what, value in named.items():
            if f"{what} × 10" in name:
                assert value(settings) == pytest.approx(10 * value(shipped)), name
                checked += 1
    assert checked == 5


@pytest.mark.slow
def test_real_runs(tmp_path):
    """A few steps of the digits: one variant as shipped, one that can't but break."""
    (tmp_path / "variants.yaml").write_text("shipped: ''\nbroken: --train.lr 1e6 --train.opt sgd --train.grad_clip 0\n")
    short = (
        "--train.steps 20 --train.batch_size 16 --train.sample_steps [1,2] --train.sample_count 40 --sgld.num_steps 5 "
        "--train.warmup_steps 0 --train.log_every 2 --train.eval_every 10 --guard.check_every 2 --guard.snapshot_every 4"
    )
    command = f"{ROOT}/recipes/stability.py --seeds 2 --jobs 2 --variants variants.yaml --output_dir out -- {short}"
    words = [sys.executable, *shlex.split(command)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    shipped, broken = rows_of((tmp_path / "out" / "stability.md").read_text())
    assert shipped["finished"] == "2"
    assert shipped["divergences (in runs)"] == "0 (0)"
    assert float(shipped["energy gap, nats"].split()[0]) < 10
    assert broken["divergences (in runs)"].endswith("(2)")
    assert broken["models with NaN"] == shipped["models with NaN"] == "0"
    assert PILImage.open(tmp_path / "out" / "stability.png").format == "PNG"
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/seed_*/summary.json"))]
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are already done" in again.stderr
    assert again.stdout == done.stdout
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/seed_*/summary.json"))]
