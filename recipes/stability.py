"""How often training breaks: N seeds of a configuration of recipes/train.py, with their divergences, results and curves.

    python recipes/stability.py --seeds 20                                     # handwritten digits
    python recipes/stability.py --seeds 3 --jobs 2 --variants digits_hostile
    python recipes/stability.py --seeds 5 --output_dir runs/stab -- --config cifar10_jem

Everything after -- is passed to recipes/train.py. Run the same command again to continue after an interruption. The
output folder holds stability.md (the table), stability.json (all figures), stability.png (the curves), and for each
run a folder <variant>/seed_<s> with a log beside it.
"""

import json
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from timm_jem import InputError
from timm_jem.command_line import make_parser, parse_flags, preset, read_flags
from timm_jem.errors import check_whole, one_line, program
from timm_jem.files import as_path, cores, replaced_file
from timm_jem.shell import one_line_errors
from timm_jem.stability.jobs import Job, Pool
from timm_jem.stability.record import Record, SeedRun, slug
from timm_jem.stability.results import LAST_LINES
from timm_jem.stability.table import events, figures_of, table
from timm_jem.training import parse_settings
from timm_jem.training.parsing import joined
from timm_jem.training.run_folder import RunFolder

TRAIN = Path(__file__).parent / "train.py"
DIGITS_CONFIG = TRAIN.parent / "configs" / "digits.yaml"
OWN_FLAGS = ("--output_dir", "--resume", "--train.seed")


@dataclass
class StabilityConfig:
    """What to run.

    Attributes:
        seeds: number of seeds, counting up from first_seed.
        first_seed: the first seed.
        jobs: how many runs to have going at a time; they share this machine's cores.
        variants: YAML file, or the name of one in recipes/variants, that maps names to further flags for recipes/train.py,
            written as in a shell; the flags under "common" go to every variant. What follows -- overrides "common", and a
            variant overrides both.
        output_dir: folder for the table, the curves and the runs.
        launch: command that starts recipes/train.py, e.g. "accelerate launch -q"; None: this Python.
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
            raise InputError(f"launch is {self.launch!r} ({error}): write it as you would in a shell") from error
        if self.launch is not None and shutil.which(program := (shlex.split(self.launch) or [""])[0]) is None:
            raise InputError(f"launch is {self.launch!r}, and there is no program {program!r}: give one that a shell finds")


def parse(argv: list[str]) -> tuple[StabilityConfig, list[str]]:
    """This recipe's own settings, and the flags for recipes/train.py that follow --."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = make_parser("stability", __doc__.splitlines()[0])
    parser.add_class_arguments(StabilityConfig)
    try:
        given = parse_flags(parser, read_flags(parser, own))
    except InputError as error:
        raise InputError(f"{error}, and those of recipes/train.py follow --") from error
    return StabilityConfig(**{field.name: given[field.name] for field in fields(StabilityConfig)}), flags


def read_variants(path: str | None, flags: list[str]) -> dict[str, list[str]]:
    """All flags of each variant, by its name."""
    if path is None:
        return {"default": flags}
    try:
        texts = yaml.safe_load(Path(preset(path, TRAIN.parent / "variants")).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"variants {path} can't be read ({one_line(error)}): give a YAML file of names and flags") from error
    if not isinstance(texts, dict) or not set(texts) - {"common"}:
        raise InputError(f"variants {path} names no variants: give lines such as 'high lr: --train.lr 0.02'")
    words: dict[str, list[str]] = {}
    for name, text in texts.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(
                f"variants {path} has {name!r}: {text!r}, but names and flags must be text: put quotes around them"
            )
        try:
            words[name] = shlex.split(text)
        except ValueError as error:
            raise InputError(
                f"variants {path}: the flags of {name!r} aren't as in a shell ({error}): {one_line(text)}"
            ) from error
    common = words.pop("common", [])
    return {name: joined(joined(common, flags), own) for name, own in words.items()}


def plan(config: StabilityConfig, variants: dict[str, list[str]]) -> tuple[list[SeedRun], dict[str, dict[str, Any]]]:
    """All runs, seed by seed, so that an early end has seen each variant, and the settings of each variant as JSON data.

    Raises:
        InputError: names that are no folders', or flags that train.py would refuse.
    """
    folders: dict[str, str] = {}
    flags: dict[str, list[str]] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, words in variants.items():
        if not slug(name):
            raise InputError(f"variant {name!r} can't name a folder: give it letters or digits")
        if slug(name) in folders:
            raise InputError(f"variants {folders[slug(name)]!r} and {name!r} would share the folder {slug(name)}: rename one")
        folders[slug(name)] = name
        if taken := sorted({word.split("=")[0] for word in words} & set(OWN_FLAGS)):
            raise InputError(f"variant {name!r} has {', '.join(taken)}, which recipes/stability.py sets itself: leave it out")
        try:
            settings, _ = parse_settings(words, DIGITS_CONFIG)
        except InputError as error:
            raise InputError(f"variant {name!r}: {error}") from error
        if settings.hub.push_to is not None:
            raise InputError(f"variant {name!r} has hub.push_to: leave it out, and publish one run with recipes/push.py")
        told[name] = json.loads(json.dumps(settings.sections()))
        share = settings.train.threads is None and config.launch is None
        flags[name] = [*words, "--train.threads", str(max(1, cores() // config.jobs))] if share else words
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = [
        SeedRun(name, seed, Path(config.output_dir) / slug(name) / f"seed_{seed}", words)
        for seed in seeds
        for name, words in flags.items()
    ]
    return runs, told


def report(command: str, config: StabilityConfig, rows: dict[str, dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """stability.md: what was run, the table, and a line on each run that met trouble."""
    last = config.first_seed + config.seeds - 1
    seeds = f"seeds {config.first_seed} to {last}" if config.seeds > 1 else f"seed {last}"
    lines = [line for line in map(events, results) if line]
    return (
        f"`{command}`: {seeds}, none left out. Means ± sample standard deviations (n − 1) over all runs that came to an end, "
        "whether they finished or gave up; each rollback, and giving up, counts as a divergence; the energy gap "
        f"(data − chains) is the mean of a run's last {LAST_LINES} training lines; seconds are the median.\n\n{table(rows)}\n"
    ) + ("\n" + "\n".join(lines) + "\n" if lines else "")


def main(argv: list[str], script: Path = TRAIN) -> int:
    # Everything that can be wrong with the input is found before anything is written or run.
    config, flags = parse(argv)
    from timm_jem.stability.curves_plot import Trace, draw_curves  # says what to install where matplotlib is missing

    variants = read_variants(config.variants, flags)
    runs, settings = plan(config, variants)
    record = Record(as_path(config.output_dir))
    record.open(variants, settings)

    todo = [run for run in runs if record.note(run)["state"] is None]
    record.save()
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are already done", file=sys.stderr)
    launch = [sys.executable] if config.launch is None else shlex.split(config.launch)
    jobs = [Job([*launch, str(script), *run.command], run.log, partial(record.ended, run)) for run in todo]
    stopped_by = Pool(config.jobs).run(jobs) if jobs else None
    if stopped_by is not None:
        done = sum(RunFolder(run.folder).summary_file.is_file() for run in runs)
        told = f"{signal.Signals(stopped_by).name}: {done} of {len(runs)} runs are done"
        print(f"{told}; run the same command again to continue", file=sys.stderr)
        return 128 + stopped_by

    results = [record.data["runs"][run.key] for run in runs]
    rows = {name: figures_of([result for result in results if result["variant"] == name]) for name in variants}
    command = record.data["command"] = f"{program('stability')} {shlex.join(argv)}".strip()
    for name, row in rows.items():
        record.data["variants"][name] |= {"seeds": [run.seed for run in runs if run.variant == name], **row}
    record.save()
    text = report(command, config, rows, results)
    record.write("stability.md", text)
    traces: dict[str, list[Trace]] = {name: [] for name in variants}
    for run, result in zip(runs, results, strict=True):
        steps = [event["step"] for event in result["rollbacks"]]
        traces[run.variant].append(Trace(run.seed, record.curves[run.key], steps, result["state"]))
    with replaced_file(record.folder / "stability.png") as aside:
        draw_curves(traces).savefig(aside, format="png", metadata={"Software": None})
    print(text)
    crashed = sum(row["crashed"] for row in rows.values())
    if crashed:
        print(f"{crashed} of {len(runs)} runs crashed; run the same command again to retry them", file=sys.stderr)
    return 1 if crashed else 0


if __name__ == "__main__":
    with one_line_errors(stopped="interrupted; the same command goes on", less="lower --jobs"):
        code = main(sys.argv[1:])
    sys.exit(code)
