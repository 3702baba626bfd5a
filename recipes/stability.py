"""How often training breaks: N seeds of a configuration of recipes/train.py, their divergences, results and curves.

    python recipes/stability.py --seeds 20                                     # the digits
    python recipes/stability.py --seeds 3 --jobs 2 --variants recipes/configs/digits_hostile.yaml
    python recipes/stability.py --seeds 5 --output_dir runs/stab -- --config recipes/configs/cifar10_jem.yaml

What follows -- goes to recipes/train.py as it is. The same command again goes on where it was interrupted. In the
output folder: stability.md (the table), stability.json (all figures), stability.png (the curves), and for each run a
folder <variant>/seed_<s> and a log beside it.
"""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import tqdm
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open

from timm_jem import InputError
from timm_jem.errors import check_whole, one_line
from timm_jem.files import cores, replaced_file
from timm_jem.training import parse_settings

TRAIN = Path(__file__).parent / "train.py"
DIGITS_CONFIG = TRAIN.parent / "configs" / "digits.yaml"
OWN_FLAGS = ("--output_dir", "--resume", "--train.seed")
LAST_LINES = 10  # lines of metrics.jsonl whose mean is a run's final energy gap


@dataclass
class StabilityConfig:
    """What to run.

    Attributes:
        seeds: how many, from first_seed on.
        first_seed: the first.
        jobs: runs at a time, which share this machine's cores.
        variants: YAML file that maps names to more flags for recipes/train.py, text as in a shell; those under "common"
            go to all of them. What follows -- overrides "common", and a variant overrides both.
        output_dir: folder of tables and runs.
        launch: what starts recipes/train.py, e.g. "accelerate launch -q"; None: this Python.
    """

    seeds: int = 5
    first_seed: int = 0
    jobs: int = 1
    variants: str | None = None
    output_dir: str = "runs/stability"
    launch: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "first_seed": 0, "jobs": 1}.items():
            check_whole(name, getattr(self, name), least)
        try:
            shlex.split(self.launch or "")
        except ValueError as error:
            raise InputError(f"launch is {self.launch!r} ({error}): give a command as in a shell") from error


@dataclass
class Run:
    """One seed of a variant."""

    variant: str
    seed: int
    folder: Path
    flags: list[str]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


def read_variants(path: str | None, flags: list[str]) -> dict[str, list[str]]:
    """All flags of each variant, by its name."""
    if path is None:
        return {"default": flags}
    try:
        texts = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"variants {path} can't be read ({one_line(error)}): give a YAML file of names and flags") from error
    if not isinstance(texts, dict) or not set(texts) - {"common"}:
        raise InputError(f"variants {path} names no variants: give lines such as 'high lr: --train.lr 0.02'")
    words: dict[str, list[str]] = {}
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f"variants {path} has {name!r}: {text!r}, and names and flags are text: put quotes around them")
        try:
            words[name] = shlex.split(text)
        except ValueError as error:
            raise InputError(f"variants {path}: the flags of {name!r} end within quotes ({error}): {one_line(text)}") from error
    common = words.pop("common", [])
    return {name: [*common, *flags, *own] for name, own in words.items()}


def slug(name: str) -> str:
    """A variant's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.").lower()


def plan(config: StabilityConfig, variants: dict[str, list[str]]) -> list[Run]:
    """All runs, seed by seed, so that an early end has seen each variant. Refuses flags that train.py would refuse."""
    folders: dict[str, str] = {}
    for name, flags in variants.items():
        if not slug(name):
            raise InputError(f"variant {name!r} can't name a folder: give it letters or digits")
        if slug(name) in folders:
            raise InputError(f"variants {folders[slug(name)]!r} and {name!r} have one folder, {slug(name)}: rename one")
        folders[slug(name)] = name
        if taken := sorted({word.split("=")[0] for word in flags} & set(OWN_FLAGS)):
            raise InputError(f"variant {name!r} has {', '.join(taken)}, which recipes/stability.py gives itself: leave it out")
        try:
            settings, _ = parse_settings(flags, DIGITS_CONFIG)
        except InputError as error:
            raise InputError(f"variant {name!r}: {error}") from error
        if settings.hub.push_to is not None:
            raise InputError(f"variant {name!r} has hub.push_to: leave it out, and publish one run by recipes/push.py")
        if settings.train.threads is None and config.launch is None:
            variants[name] = [*flags, "--train.threads", str(max(1, cores() // config.jobs))]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [
        Run(name, seed, Path(config.output_dir) / slug(name) / f"seed_{seed}", flags)
        for seed in seeds
        for name, flags in variants.items()
    ]


def read_record(config: StabilityConfig, asked: dict[str, list[str]]) -> dict[str, Any]:
    """stability.json of earlier calls, or a new one. Refuses runs made with other flags than ``asked``."""
    folder = Path(config.output_dir)
    path = folder / "stability.json"
    record: dict[str, Any] = {"variants": {}, "runs": {}}
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            flags = {name: variant["flags"] for name, variant in record["variants"].items()}
            record["runs"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} can't be read ({one_line(error)}): give a new --output_dir") from error
    else:
        flags = {}
    for name, words in asked.items():
        if not any((folder / slug(name)).glob("seed_*/")):
            continue
        if name not in flags:
            raise InputError(f"{folder / slug(name)} holds runs, with flags that {path} doesn't tell: give a new --output_dir")
        if flags[name] != words:
            raise InputError(
                f"{folder / slug(name)} holds runs with other flags ({shlex.join(flags[name])}): "
                "give the same ones, or a new --output_dir"
            )
    return record


def last_line(log: Path, start: int) -> str:
    """What a run said at its end: the last line since byte ``start`` of its log that tells an error, or the last of all."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode(errors="replace")) if line.strip()]
    told = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (told or lines or ["it said nothing"])[-1]


def read_curves(path: Path) -> dict[str, Any]:
    """What metrics.jsonl tells: training and validation lines that count, stretches undone by rollbacks, and rollbacks."""
    kept: dict[str, list[dict[str, float]]] = {"gap": [], "val_accuracy": []}
    undone: dict[str, list[list[dict[str, float]]]] = {"gap": [], "val_accuracy": []}
    rollbacks = []

    def back_to(name: str, step: int) -> None:
        gone = [point for point in kept[name] if point["step"] > step]
        if gone:
            undone[name].append([point for point in kept[name] if point["step"] <= step][-1:] + gone)
            kept[name] = [point for point in kept[name] if point["step"] <= step]

    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a run that was killed can leave half a line
        if line.get("event") == "rollback":
            rollbacks.append(line)
            for name in kept:
                back_to(name, line["to_step"])
            continue
        gap = line.get("gap_xy", line.get("gap"))
        for name, value in (("gap", gap), ("val_accuracy", line.get("val_accuracy"))):
            if value is not None:
                kept[name] = [point for point in kept[name] if point["step"] < line["step"]]  # a resumed run repeats some
                kept[name].append({"step": line["step"], "value": value})
    return {"kept": kept, "undone": undone, "rollbacks": rollbacks}


def tensors_with_nan(path: Path) -> list[str]:
    """Names of a model's tensors that are not finite throughout; one tensor is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        return [name for name in file.keys() if not torch.isfinite(file.get_tensor(name)).all()]  # noqa: SIM118


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of a run; ``state`` is None where it has not come to its end."""
    curves = read_curves(folder / "metrics.jsonl")
    figures: dict[str, Any] = {"state": None, "rollbacks": curves["rollbacks"], "tensors_with_nan": [], "fault": None}
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        figures["state"] = {"finished": "finished", "stopped": "stopped"}[summary["outcome"]]
    except (OSError, ValueError, KeyError, TypeError):
        return figures
    for name in ("test_accuracy", "test_ece", "val_accuracy", "steps", "seconds", "explanation"):
        figures[name] = summary.get(name)
    figures["rollbacks"] = summary.get("rollbacks", curves["rollbacks"])
    last = [point["value"] for point in curves["kept"]["gap"][-LAST_LINES:]]
    figures["gap"] = statistics.fmean(last) if last else None
    try:
        figures["tensors_with_nan"] = tensors_with_nan(folder / "model" / "model.safetensors")
    except (OSError, SafetensorError) as error:
        figures["fault"] = f"its model can't be read ({one_line(error)})"
    return figures


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant's row of the table from the figures of its runs."""
    states = [run["state"] for run in runs]
    # A run that gave up met one divergence more than it has rollbacks.
    divergences = [len(run["rollbacks"]) + (run["state"] == "stopped") for run in runs]
    row: dict[str, Any] = {
        "runs": len(runs),
        "finished": states.count("finished"),
        "divergences": sum(divergences),
        "runs_with_divergences": sum(number > 0 for number in divergences),
        "rollbacks": sum(len(run["rollbacks"]) for run in runs),
        "most_rollbacks": max(len(run["rollbacks"]) for run in runs),
        "stopped": states.count("stopped"),
        "crashed": states.count("crashed"),
        "models_with_nan": sum(bool(run["tensors_with_nan"]) for run in runs),
    }
    for name in ("test_accuracy", "gap", "test_ece", "seconds"):
        values = [run[name] for run in runs if run.get(name) is not None]
        row[name] = {
            "n": len(values),
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
            "min": min(values, default=None),
            "median": statistics.median(values) if values else None,
        }
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row a variant."""

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def spread(figures: dict[str, Any], digits: int) -> str:
        std = "" if figures["std"] is None else f" ± {figures['std']:.{digits}f}"
        return number(figures["mean"], digits) + std

    lines = [
        "| variant | runs | finished | divergences (in runs) | most rollbacks of a run | stopped or crashed | models with NaN "
        "| test accuracy | lowest | energy gap, nats | ECE | seconds |",
        "| --- |" + " --- |" * 11,
    ]
    for name, row in rows.items():
        cells = [
            name.replace("|", "\\|"),
            row["runs"],
            row["finished"],
            f"{row['divergences']} ({row['runs_with_divergences']})",
            row["most_rollbacks"],
            row["stopped"] + row["crashed"],
            row["models_with_nan"],
            spread(row["test_accuracy"], 3),
            number(row["test_accuracy"]["min"], 3),
            spread(row["gap"], 2),
            number(row["test_ece"]["mean"], 3),
            number(row["seconds"]["median"], 0),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def events(run: Run, figures: dict[str, Any]) -> str | None:
    """One line on a run where not all went well."""
    parts = [
        f"step {event['step']} back to {event['to_step']}: {event.get('reason')} ({event.get('remedy', 'no remedy told')})"
        for event in figures["rollbacks"]
    ]
    parts += [f"crashed once: {line}" for line in figures["crashes"][: None if figures["state"] != "crashed" else -1]]
    if figures["state"] == "stopped":
        parts.append(figures.get("explanation") or "stopped")
    if figures["state"] == "crashed":
        parts.append(f"crashed: {figures['crashes'][-1]}")
    if broken := figures["tensors_with_nan"]:
        parts.append(f"its model has NaN or infinity in {broken[0]}{f' and {len(broken) - 1} more' * (len(broken) > 1)}")
    parts += [figures["fault"]] if figures["fault"] else []
    return f"- {run.variant}, seed {run.seed}: {'; '.join(parts)}" if parts else None


def draw_curves(runs: list[Run], figures: list[dict[str, Any]], path: Path) -> None:
    """For each variant energy gap and, below it, validation accuracy against step, one line a seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(run.variant for run in runs))
    seeds = sorted({run.seed for run in runs})
    columns = min(len(names), 4)
    blocks = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(7.0, 4.2 * columns), 4.4 * blocks + 1.0), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    tints = colormaps["tab10"].colors if len(seeds) <= 10 else colormaps["viridis"](torch.linspace(0, 0.95, len(seeds)).numpy())
    colours = dict(zip(seeds, tints, strict=False))
    for ax in axes.flat:
        ax.set_visible(False)
    for number, name in enumerate(names):
        block, column = divmod(number, columns)
        top, bottom = axes[2 * block, column], axes[2 * block + 1, column]
        bottom.sharex(top)
        ends, marks = [], []
        for run, result in zip(runs, figures, strict=True):
            if run.variant != name:
                continue
            curves = read_curves(run.folder / "metrics.jsonl")
            if result.get("val_accuracy") is not None:
                points = curves["kept"]["val_accuracy"]
                if not points or points[-1]["step"] < result["steps"]:
                    points.append({"step": result["steps"], "value": result["val_accuracy"]})
            for ax, key in ((top, "gap"), (bottom, "val_accuracy")):
                lines = [(part, 0.3, ":") for part in curves["undone"][key]] + [(curves["kept"][key], 0.9, "-")]
                for points, alpha, style in lines:
                    steps, values = ([point[axis] for point in points] for axis in ("step", "value"))
                    dot = "." if len(points) < 10 else None
                    ax.plot(steps, values, style, color=colours[run.seed], alpha=alpha, linewidth=1.2, marker=dot, zorder=2)
            kept = [point for point in curves["kept"]["gap"] if math.isfinite(point["value"])]
            ends += [point["value"] for point in kept]
            seen = [point for part in [*curves["undone"]["gap"], kept] for point in part if math.isfinite(point["value"])]
            for event in result["rollbacks"]:
                before = [point for point in seen if point["step"] <= event["step"]]
                value = max(before, key=lambda point: point["step"])["value"] if before else 0.0
                marks.append((event["step"], value, "x", "tab:red"))
            if result["state"] in ("stopped", "crashed"):
                point = kept[-1] if kept else {"step": 0, "value": 0.0}
                marks.append((point["step"], point["value"], "s" if result["state"] == "stopped" else "D", "black"))
        low, high = min(ends, default=-1.0), max(ends, default=1.0)
        margin = 0.08 * (high - low) or 1.0
        # What was undone may be wild: it is cut off, and a rollback out there is marked at the edge.
        top.set_ylim(low - margin, high + margin)
        for step, value, marker, colour in marks:
            top.plot(step, min(max(value, low), high), marker, color=colour, markersize=6, zorder=3, clip_on=False)
        top.axhline(0, color="0.75", linewidth=0.8, zorder=1)
        bottom.set_ylim(-0.03, 1.03)
        top.set_title(name, fontsize=11)
        bottom.set_xlabel("optimiser step")
        if column == 0:
            top.set_ylabel("energy gap (nats)")
            bottom.set_ylabel("validation accuracy (share)")
        for ax in (top, bottom):
            ax.set_visible(True)
            ax.grid(alpha=0.25)
            ax.margins(x=0.03)
        top.tick_params(labelbottom=False)
    legend = [Line2D([], [], color=colours[seed], label=f"seed {seed}") for seed in (seeds if len(seeds) <= 10 else [])]
    legend += [
        Line2D([], [], color="0.4", linestyle=":", label="undone by a rollback"),
        *(
            Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
            for marker, colour, label in (("x", "tab:red", "rollback"), ("s", "black", "gave up"), ("D", "black", "crashed"))
        ),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=max(4, 1 + 2 * columns), frameon=False)
    figure.suptitle(f"{len(runs)} runs, one line a seed; energy gap = mean E(data) − mean E(chains)")
    with replaced_file(path) as aside:
        figure.savefig(aside, format="png", dpi=110)


def run_all(runs: list[Run], command: list[str], jobs: int, ended: Callable[[Run, int, str], str]) -> int | None:
    """Start each of ``runs``, ``jobs`` at a time; the number of the signal that ended it early, or None."""
    caught: list[int] = []
    waiting, running = list(runs), {}
    # Logs keep lines, not bars; unbuffered, the last line is what was written last.
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}

    def catch(number: int, _) -> None:
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    progress = tqdm(total=len(runs), desc="runs", unit="run")
    passed_on = 0
    try:
        while running or (waiting and not caught):
            while waiting and len(running) < jobs and not caught:
                run = waiting.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                own = ["--output_dir", str(run.folder), "--train.seed", str(run.seed), "--resume", "auto"]
                with run.log.open("ab") as log:
                    start = log.seek(0, os.SEEK_END)
                    # Of its own session: the terminal's Ctrl-C reaches it once, through here.
                    process = subprocess.Popen(
                        [*command, *run.flags, *own],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                running[process] = (run, start)
            time.sleep(0.1)
            for number in caught[passed_on:]:
                passed_on += 1
                for process in running:
                    if process.poll() is None:
                        os.killpg(process.pid, number)
            for process in [process for process in running if process.poll() is not None]:
                run, start = running.pop(process)
                if not caught:
                    progress.write(ended(run, process.returncode, last_line(run.log, start)), file=sys.stderr)
                    progress.update()
    finally:
        progress.close()
        for process in running:  # only where something here broke
            os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    return caught[0] if caught else None


def main(argv: list[str], script: Path = TRAIN) -> int:
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(prog="recipes/stability.py", description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_class_arguments(StabilityConfig)
    try:
        config = StabilityConfig(**vars(parser.parse_args(own)))
    except ArgumentError as error:
        raise InputError(
            f"{one_line(error)}; recipes/stability.py --help lists the settings, and those of recipes/train.py follow --"
        ) from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the curves need matplotlib: pip install 'timm_jem[plots]'") from error

    # Everything that can be wrong with the input is found here, before anything is written or run.
    variants = read_variants(config.variants, flags)
    asked = dict(variants)  # without the number of threads, which --jobs may change
    runs = plan(config, variants)
    record = read_record(config, asked)
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder} can't be made ({one_line(error)}): give another") from error

    def key(run: Run) -> str:
        return run.folder.relative_to(folder).as_posix()

    def save() -> None:
        text = json.dumps(record, indent=2) + "\n"
        with replaced_file(folder / "stability.json") as aside:
            aside.write_text(text, encoding="utf-8")

    def note(run: Run, crash: str | None = None) -> dict[str, Any]:
        """Put the figures of a run on record, with all crashes that it ever had."""
        crashes = record["runs"].get(key(run), {}).get("crashes", []) + ([crash] if crash else [])
        figures = read_run(run.folder)
        if figures["state"] is None and crash:
            figures["state"] = "crashed"
        record["runs"][key(run)] = {"variant": run.variant, "seed": run.seed, **figures, "crashes": crashes}
        return record["runs"][key(run)]

    def ended(run: Run, code: int, line: str) -> str:
        state = read_run(run.folder)["state"]
        crashed = state is None or (state == "finished" and code != 0)
        how = f"killed by signal {-code}: " if code < 0 else "no summary.json: " if code == 0 else ""
        figures = note(run, f"{how}{line}" if crashed else None)
        save()
        if figures["state"] == "crashed":
            return f"{run.variant}, seed {run.seed}: crashed, {figures['crashes'][-1]}; see {run.log}"
        return f"{run.variant}, seed {run.seed}: {figures['state']}, {len(figures['rollbacks'])} rollbacks"

    for name, words in asked.items():
        record["variants"][name] = {**record["variants"].get(name, {}), "flags": words}
    todo = [run for run in runs if note(run)["state"] is None]
    save()
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", file=sys.stderr)
    launch = [sys.executable] if config.launch is None else shlex.split(config.launch)
    stopped_by = run_all(todo, [*launch, str(script)], config.jobs, ended) if todo else None
    if stopped_by is not None:
        done = sum((run.folder / "summary.json").is_file() for run in runs)
        print(
            f"{signal.Signals(stopped_by).name}: {done} of {len(runs)} runs are done; the same command again goes on from here",
            file=sys.stderr,
        )
        return 128 + stopped_by

    results = [record["runs"][key(run)] for run in runs]
    rows = {name: figures_of([result for result in results if result["variant"] == name]) for name in variants}
    seeds = f"{config.first_seed} to {config.first_seed + config.seeds - 1}" if config.seeds > 1 else f"{config.first_seed}"
    command = shlex.join(["python", "recipes/stability.py", *argv])
    record["command"] = command
    for name, row in rows.items():
        record["variants"][name] |= {"seeds": [run.seed for run in runs if run.variant == name], **row}
    save()
    lines = [line for line in map(events, runs, results) if line]
    text = (
        f"`{command}`: seed{'s' * (config.seeds > 1)} {seeds}, none left out. Means ± sample standard deviations (n − 1) over "
        "all runs that came to an end, finished or given up; a divergence is a rollback or a giving up; the energy gap "
        f"(data − chains) is the mean of a run's last {LAST_LINES} training lines; seconds are the median.\n\n{table(rows)}\n"
    ) + ("\n" + "\n".join(lines) + "\n" if lines else "")
    with replaced_file(folder / "stability.md") as aside:
        aside.write_text(text, encoding="utf-8")
    draw_curves(runs, results, folder / "stability.png")
    print(text)
    crashed = sum(row["crashed"] for row in rows.values())
    if crashed:
        print(f"{crashed} of {len(runs)} runs crashed; the same command again tries them once more", file=sys.stderr)
    return 1 if crashed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
