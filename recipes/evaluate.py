"""Measure all that a joint energy model claims, or any timm classifier beside it, and write one report with pictures.

    python recipes/evaluate.py runs/digits                                        # a run, a saved folder or a Hub name
    python recipes/evaluate.py user/model --preset full --ood '[cifar100, ./textures]' --extractors '[inception]'
    python recipes/evaluate.py timm:resnet18.a1_in1k --data.dataset ./imagenet    # a plain timm classifier: the baseline
    python recipes/evaluate.py --compare '[jem=runs/a/evaluation, plain=runs/b/evaluation]' --output_dir runs/compared

The data set is the one that the model was trained on, by its own provenance, unless --data.dataset says otherwise. The
folder then holds report.md, report.json and the pictures. Each section is there as soon as it is measured; one that can't
be measured is left out, and the report says why. The same command again measures what is missing; with other sections it adds
them; --overwrite true measures anew what is asked for, and keeps the rest. --compare puts such folders side by side, and the
ones of the same name as mean and standard deviation.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache

import timm_jem
from timm_jem import JEM, InputError
from timm_jem.backbone import architecture
from timm_jem.command_line import make_parser, parse_flags, read_flags, told_of, with_contents
from timm_jem.data import DataConfig
from timm_jem.errors import need, one_line, program, quoted
from timm_jem.evaluation.classification_section import classification_section
from timm_jem.evaluation.comparison import read_reports, write_comparison
from timm_jem.evaluation.extractors import weights_of
from timm_jem.evaluation.generation_section import generation_section
from timm_jem.evaluation.ood_section import ood_section
from timm_jem.evaluation.pictures_section import pictures_section
from timm_jem.evaluation.report import Measured, Report
from timm_jem.evaluation.report_folder import check_comparison_dir, claimed, earlier_report, write_report
from timm_jem.evaluation.robustness_section import robustness_section
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import SECTIONS, TITLES, EvaluationConfig
from timm_jem.evaluation.subject import Subject, data_config, display_name, function_of, load_model, load_subject, sampling_of
from timm_jem.files import fingerprint, folder_aside, left_aside
from timm_jem.heap import keep_freed_memory
from timm_jem.preprocessing import timm_settings, trained_here
from timm_jem.shell import check_one_process, one_line_errors, out_of_memory

MEASURES: dict[str, tuple[Callable[[Subject, EvaluationConfig, Section], None], str]] = {
    # what measures it, and what makes it take less memory
    "classification": (classification_section, "--batch_size or --test_images"),
    "ood": (ood_section, "--batch_size or --ood_images"),
    "robustness": (robustness_section, "--batch_size or --attack_images"),
    "generation": (generation_section, "--batch_size, --samples or --real_images"),
    "pictures": (pictures_section, "--batch_size"),
}


def parse(argv: list[str]) -> tuple[Any, EvaluationConfig, dict[str, Any]]:
    parser = make_parser("evaluate", __doc__.splitlines()[0])
    parser.usage = "%(prog)s [MODEL] [--data.dataset NAME] [--SETTING VALUE ...]"  # all of them take twenty-five lines
    parser.add_argument("model", type=str | None, nargs="?", help="a run, a saved folder, a Hub name, or timm:NAME")
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: evaluation in the run's folder")
    parser.add_argument("--overwrite", type=bool, default=False, help="measure anew what output_dir has already")
    parser.add_argument("--compare", type=list[str], default=[], help="reports to put side by side, as name=FOLDER or FOLDER")
    parser.add_argument(
        "--data",
        type=DataConfig | None,
        default=None,
        help="images, by --data.dataset NAME and others (--data.help lists them); default: as in the model's training",
    )
    parser.add_class_arguments(EvaluationConfig, as_group=False)
    flags = with_contents(parser, read_flags(parser, argv))
    given = parse_flags(parser, flags)
    config = EvaluationConfig(**{f.name: given[f.name] for f in fields(EvaluationConfig)})
    return given, config, told_of(parser, flags, "data", given.data)


def identity_of(model: JEM) -> dict[str, Any]:
    """What tells a network from others, wherever it lies."""
    return {"weights": fingerprint(model.backbone.state_dict()), "function": function_of(model)}


def is_still(known: dict[str, Any], name: str) -> bool:
    """Whether the model of that name has an identity; one that is gone is missed only where something is to be measured."""
    try:
        return identity_of(load_model(name)) == known
    except InputError:
        return True


def about(name: str, model: JEM, data: DataConfig) -> dict[str, Any]:
    """What is evaluated: reports of the same are one report."""
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "name": display_name(name),
        "model": name,
        **identity_of(model),
        "data": data.dataset,
        "headline": {"Model": f"{architecture(model.backbone)}, {parameters:,} parameters", "Data": data.dataset},
        "data_settings": asdict(data),
        "transform": None if trained_here(model.provenance) else timm_settings(model.data_config),
        "sampling": sampling_of(model),
        "trained": model.provenance.get("command"),
    }


def default_output_dir(name: str) -> str:
    if Path(name).is_dir():
        return str(Path(name) / "evaluation")
    return f"runs/evaluation/{name.replace('/', '--').replace(':', '--')}"


def compare(entries: list[str], output_dir: str | None, overwrite: bool) -> None:
    if output_dir is None:
        raise InputError("--compare needs --output_dir")
    need("matplotlib", "a comparison", "plots")
    folder = Path(output_dir)
    check_comparison_dir(folder, overwrite)
    write_comparison(read_reports(entries), folder)
    print(f"{len(entries)} reports side by side: {folder / 'compare.md'}")


def to_measure(earlier: Report | None, config: EvaluationConfig, overwrite: bool) -> list[str]:
    """Which of the sections that are asked for ``earlier`` doesn't have; with ``overwrite``, all of them.

    Raises:
        InputError: it has one of them with other settings, or beside another baseline or judge of the same name.
    """
    wanted = [name for name in SECTIONS if name in config.sections]
    if earlier is None or overwrite:
        return wanted
    missing = []
    for name in wanted:
        there = earlier.measured(TITLES[name])
        if there is None:
            missing.append(name)
            continue
        for setting, value in config.of_section(name).items():
            if setting in there.settings and there.settings[setting] != value:
                raise InputError(
                    f"section {name} is there with {setting} {quoted(there.settings[setting])}, and not {quoted(value)}: "
                    "give the same, a new --output_dir, or --overwrite true, which measures it anew"
                )
        for key in ("baseline", "judge"):
            known, other = there.settings.get(f"{key}_model"), getattr(config, key)
            if known is not None and other is not None and not is_still(known, other):
                raise InputError(
                    f"section {name} is there with another model as {key} {quoted(other)}: give a new --output_dir, or "
                    "--overwrite true, which measures it anew"
                )
        known = there.settings.get("extractor_weights", {}).values()
        for spec in config.extractors if known else ():
            if (weights := weights_of(spec)) is not None and weights not in known:
                raise InputError(
                    f"section {name} is there with other weights of the extractor {spec}: give a new --output_dir, or "
                    "--overwrite true, which measures it anew"
                )
    return missing


def same_subject(
    earlier: Report | None, subject: dict[str, Any], folder: Path, overwrite: bool, aspects: dict[str, str]
) -> Report | None:
    """``earlier`` if it is of the same ``aspects`` of a subject, key to words, or None where it is overwritten as a whole.

    Raises:
        InputError: it is of others and not to be overwritten.
    """
    if earlier is None:
        return None
    for key, what in aspects.items():
        if key == "function" and key not in earlier.subject:  # of before it was told
            continue
        if earlier.subject.get(key) != subject[key]:
            if overwrite:
                return None
            raise InputError(
                f"output_dir {folder} holds a report of other {what}: give a new folder, or --overwrite true, which removes it"
            )
    return earlier


def placed(earlier: Report | None, subject: dict[str, Any]) -> None:
    """Let data of ``earlier`` lie where those of ``subject`` do, if their images will tell whether they are the same."""
    if earlier is None:
        return
    images, settings = earlier.subject.get("images"), earlier.subject.get("data_settings")
    if isinstance(images, dict) and None not in images.values() and isinstance(settings, dict):
        settings |= {key: subject["data_settings"][key] for key in ("dataset", "config_name")}


def measured(name: str, subject: Subject, config: EvaluationConfig, command: str, drawn: Path) -> Measured:
    """A section as a whole, or else only the reason why it is left out."""
    title, (measure, less) = TITLES[name], MEASURES[name]
    versions = f"timm_jem {timm_jem.__version__}, timm {timm.__version__}, torch {torch.__version__}"
    beside = {key: getattr(subject, key) for key in ("baseline", "judge") if key in config.of_section(name)}
    others = {f"{key}_model": identity_of(other) for key, other in beside.items() if other is not None}
    if "ood" in config.of_section(name):
        others["outliers"] = {of_set: fingerprint({"images": images}) for of_set, images in subject.outliers.items()}
    if "extractors" in config.of_section(name):
        others["extractor_weights"] = {extractor.name: extractor.weights for extractor in subject.extractors}
    found = Measured(title, asdict(config) | others, command, f"{versions}, {subject.model.device.type}")
    found.warnings += subject.of_test
    start = time.perf_counter()
    try:
        measure(subject, config, Section(found, drawn))
    except InputError as error:
        return Measured(title, left_out=str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Measured(title, left_out=f"out of memory ({one_line(error)}): lower {less}")
    found.seconds = time.perf_counter() - start
    return found


def main(argv: list[str]) -> str | None:
    """Returns the exit message, where a section was left out."""
    given, config, told = parse(argv)
    if given.compare:
        if given.model is not None:
            raise InputError(f"--compare takes reports, and no model {given.model}: evaluate it first, then compare")
        return compare(given.compare, given.output_dir, given.overwrite)
    if given.model is None:
        raise InputError("which model? Give a run, a saved folder, a Hub name or timm:NAME; --help says more")
    check_one_process("an evaluation")
    keep_freed_memory()
    if idle := config.without_effect:
        print(f"note: {', '.join(idle)} {'do' if idle[1:] else 'does'} nothing in the sections {', '.join(config.sections)}")
    folder = Path(given.output_dir or default_output_dir(given.model))
    with claimed(folder) as note:
        if note is not None:
            print(note)
        return evaluate_into(folder, given, config, told, argv)


def evaluate_into(folder: Path, given: Any, config: EvaluationConfig, told: dict[str, Any], argv: list[str]) -> str | None:
    """Measure what the report in ``folder``, which is this process's, doesn't have; returns the exit message."""
    earlier = earlier_report(folder, given.overwrite)
    todo = to_measure(earlier, config, given.overwrite)
    model = load_model(given.model, second_derivatives=config.refines)
    data, alike = data_config(model, given.model, told)
    what = about(given.model, model, data)
    known = {
        "weights": "weights",
        "function": "architecture or normalisation",
        "data_settings": "images",
        "transform": "transforms of images",
        "sampling": "settings or starts of chains",
    }
    if todo:
        placed(earlier, what)
    earlier = same_subject(earlier, what, folder, given.overwrite, known)
    if not todo:
        print(f"all that is asked for is measured already: look at {folder / 'report.md'}")
        return None
    if len(todo) < len(config.sections):
        print(f"already measured: {', '.join(name for name in SECTIONS if name in config.sections and name not in todo)}")
    config = replace(config, sections=todo)
    try:
        subject = load_subject(given.model, model, data, config, alike=alike, device=PartialState().device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"out of memory ({one_line(error)}): lower --test_images, --real_images or --batch_size") from error
    what |= {"images": subject.identity, "as_in_training": subject.alike}
    earlier = same_subject(earlier, what, folder, given.overwrite, {"images": "images"})
    return measure_all(subject, config, Report(what, earlier.sections if earlier else []), folder, argv)


def measure_all(subject: Subject, config: EvaluationConfig, report: Report, folder: Path, argv: list[str]) -> str | None:
    """Measure section after section, each of which is on disk before the next begins; returns the exit message."""
    images = f"{subject.test_total:,} test images, of which each number tells how many it is of, and {subject.held_out}"
    if (transform := report.subject["transform"]) is not None:
        settings = ", ".join(f"{name} {value}" for name, value in transform.items())
        images += f"; all are made as timm's evaluation transform does, by {settings}"
    report.subject["headline"]["Data"] = f"{subject.data.dataset}: {images}"
    command = f"{program('evaluate')} {shlex.join(argv)}"
    left_out: dict[str, str] = {}
    for leftover in left_aside(folder):
        shutil.rmtree(leftover, ignore_errors=True)
    for i, name in enumerate(config.sections, 1):
        start = time.perf_counter()
        with folder_aside(folder) as drawn:
            found = measured(name, subject, config, command, drawn)
            report.put(found, list(TITLES.values()))
            if found.left_out is not None:
                left_out[name] = found.left_out
                for picture in drawn.iterdir():  # of what failed, beside numbers that are there
                    picture.unlink()
                clear_device_cache(garbage_collection=True)  # of what filled the memory
            report.missing = [TITLES[later] for later in config.sections[i:] if not report.measured(TITLES[later])]
            if any(section.left_out is None for section in report.sections):  # a report of reasons alone is none
                write_report(report, folder, drawn)
        outcome = f"left out: {found.left_out}" if found.left_out is not None else f"{len(found.results)} numbers"
        print(f"{name}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
    if len(left_out) == len(config.sections):
        raise InputError(f"nothing could be measured: {'; '.join(f'{name}: {why}' for name, why in left_out.items())}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"{len(report.results)} numbers and {len(report.pictures)} pictures: look at {folder / 'report.md'}")
    return f"left out, as the report says: {', '.join(left_out)}" if left_out else None


if __name__ == "__main__":
    kept = "stopped: sections that were measured before this one are in the report; the same command goes on"
    with one_line_errors(stopped=kept, less="lower --batch_size"):
        left_out = main(sys.argv[1:])
    sys.exit(left_out)
