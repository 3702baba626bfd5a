"""Measure all that a joint energy model claims, or any timm classifier beside it, and write one report with pictures.

    python recipes/evaluate.py runs/digits                                        # a run, a saved folder or a Hub name
    python recipes/evaluate.py user/model --preset full --ood '[cifar100, ./textures]' --extractors '[inception]'
    python recipes/evaluate.py timm:resnet18.a1_in1k --data.dataset ./imagenet    # a plain timm classifier: the baseline
    python recipes/evaluate.py --compare '[jem=runs/a/evaluation, plain=runs/b/evaluation]' --output_dir runs/compared

The data set is the one that the model was trained on, by its own provenance, unless --data.dataset says otherwise. The
folder then holds report.md, report.json and the pictures. Each section is there as soon as it is measured; one that can't
be measured is left out, and the report says why. --compare puts such folders side by side, and the ones of the same name
as mean and standard deviation.
"""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from accelerate.utils.environment import get_int_from_env
from accelerate.utils.memory import should_reduce_batch_size

import timm_jem
from timm_jem import InputError
from timm_jem.command_line import make_parser, parse_flags, read_flags
from timm_jem.data import DataConfig
from timm_jem.errors import one_line
from timm_jem.evaluation.classification_section import classification_section
from timm_jem.evaluation.comparison import read_reports, write_comparison
from timm_jem.evaluation.generation_section import generation_section
from timm_jem.evaluation.ood_section import ood_section
from timm_jem.evaluation.pictures_section import pictures_section
from timm_jem.evaluation.report import Report, check_output_dir, fingerprint, write_report
from timm_jem.evaluation.robustness_section import robustness_section
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import SECTIONS, EvaluationConfig, need
from timm_jem.evaluation.subject import Subject, load_subject
from timm_jem.files import folder_aside

MEASURES: dict[str, tuple[str, Callable[[Subject, EvaluationConfig, Section], None]]] = {
    "classification": ("Classification and calibration", classification_section),
    "ood": ("Out-of-distribution detection", ood_section),
    "robustness": ("Robustness", robustness_section),
    "generation": ("Generation", generation_section),
    "pictures": ("Pictures", pictures_section),
}


def parse(argv: list[str]) -> tuple[Any, EvaluationConfig, DataConfig | None]:
    parser = make_parser("recipes/evaluate.py", __doc__.splitlines()[0])
    parser.add_argument("model", type=str | None, nargs="?", help="a run, a saved folder, a Hub name, or timm:NAME")
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: evaluation in the run's folder")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an earlier report in output_dir")
    parser.add_argument("--compare", type=list[str], default=[], help="reports to put side by side, as name=FOLDER or FOLDER")
    parser.add_argument("--data", type=DataConfig | None, default=None, help="images; default: those of the model's training")
    parser.add_class_arguments(EvaluationConfig, as_group=False)
    given = parse_flags(parser, read_flags(parser, argv))
    config = EvaluationConfig(**{f.name: given[f.name] for f in fields(EvaluationConfig)})
    return given, config, parser.instantiate(given).data


def about(subject: Subject, config: EvaluationConfig, name: str, argv: list[str]) -> dict[str, Any]:
    """What the report says of the whole evaluation."""
    jem, data = subject.model, subject.data
    parameters = sum(p.numel() for p in jem.parameters())
    architecture = jem.backbone.pretrained_cfg.get("architecture") or type(jem.backbone).__name__
    versions = f"timm_jem {timm_jem.__version__}, timm {timm.__version__}, torch {torch.__version__}"
    images = f"{len(subject.test):,} of {subject.test_total:,} test images, {len(subject.val):,} {subject.held_out}"
    return {
        "name": subject.name,
        "model": name,
        "weights": fingerprint(jem.backbone.state_dict()),
        "data": data.dataset,
        "preset": config.preset,
        "command": shlex.join(["python", "recipes/evaluate.py", *argv]),
        "headline": {
            "Model": f"{architecture}, {parameters:,} parameters",
            "Data": f"{data.dataset}: {images}",
            "Preset": f"{config.preset}, seed {config.seed}",
            "Versions": f"{versions}, {jem.mean.device.type}",
        },
        "settings": asdict(config),
        "data_settings": asdict(data),
        "trained": jem.provenance.get("command"),
    }


def default_output_dir(name: str) -> str:
    if Path(name).is_dir():
        return str(Path(name) / "evaluation")
    return f"runs/evaluation/{name.replace('/', '--').replace(':', '--')}"


def compare(entries: list[str], output_dir: str | None, overwrite: bool) -> None:
    if output_dir is None:
        raise InputError("--compare needs --output_dir")
    need("matplotlib", "a comparison", "plots")
    folder = check_output_dir(output_dir, overwrite)
    write_comparison(read_reports(entries), folder)
    print(f"{len(entries)} reports side by side: {folder / 'compare.md'}")


def measured(name: str, subject: Subject, config: EvaluationConfig, report: Report, drawn: Path) -> str | None:
    """Add a section to the report, as a whole, or else only the reason, which is returned."""
    title, measure = MEASURES[name]
    section = Section(title, drawn)
    try:
        measure(subject, config, section)
    except InputError as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        reason = f"out of memory ({one_line(error)}): lower --batch_size, --samples or --attack_images"
    else:
        section.add_to(report)
        return None
    report.warnings.append(f"{title} is left out: {reason}")
    return reason


def main(argv: list[str]) -> str | None:
    """Returns the exit message, where a section was left out."""
    given, config, data = parse(argv)
    if given.compare:
        if given.model is not None:
            raise InputError(f"--compare takes reports, and no model {given.model}: evaluate it first, then compare")
        return compare(given.compare, given.output_dir, given.overwrite)
    if given.model is None:
        raise InputError("which model? Give a run, a saved folder, a Hub name or timm:NAME; --help says more")
    # Asked of the launcher's variables: without a GPU, accelerate takes each of torchrun's processes for the only one.
    processes = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if processes > 1:
        raise InputError(f"an evaluation runs in one process, not in {processes}: start it with plain python")
    folder = check_output_dir(given.output_dir or default_output_dir(given.model), given.overwrite)
    start = time.perf_counter()
    subject = load_subject(given.model, data, config, device=PartialState().device)
    report = Report(about(subject, config, given.model, argv), warnings=[*subject.warnings])
    left_out: dict[str, str] = {}
    wanted = [name for name in SECTIONS if name in config.sections]
    for i, name in enumerate(wanted, 1):
        before, began = len(report.results), time.perf_counter()
        with folder_aside(folder) as drawn:
            if reason := measured(name, subject, config, report, drawn):
                left_out[name] = reason
            report.subject["seconds"] = time.perf_counter() - start
            report.subject["headline"]["Took"] = f"{report.subject['seconds']:.0f} s"
            if report.results or report.pictures:  # an earlier report is worth more than one of reasons alone
                write_report(report, folder, drawn, missing=[MEASURES[later][0] for later in wanted[i:]])
        outcome = f"left out: {reason}" if reason else f"{len(report.results) - before} numbers"
        print(f"{name}: {outcome}, {time.perf_counter() - began:.0f} s", flush=True)
    if len(left_out) == len(wanted):
        raise InputError(f"nothing could be measured: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"{len(report.results)} numbers and {len(report.pictures)} pictures: look at {folder / 'report.md'}")
    return f"left out, as the report says: {', '.join(left_out)}" if left_out else None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: sections that were measured before this one are in the report")
