"""How the settings of a run are told: YAML files and flags."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser

from timm_jem.command_line import Flag, make_parser, names_of, parse_flags, preset, read_flags, with_contents
from timm_jem.errors import InputError, quoted
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.settings import Settings

__all__ = ["joined", "parse_settings", "settings_of"]


def parse_settings(argv: list[str], default_config: Path | None = None) -> tuple[Settings, list[str]]:
    """Settings from flags and the YAML files that they name.

    Without ``--config``, a run that goes on takes its own config.yaml, wherever its folder has been moved.

    Args:
        argv: flags, later ones overriding earlier ones.
        default_config: taken where neither a file nor a data set is named; ``--config NAME`` is NAME.yaml beside it.

    Returns:
        The settings, and the flags that repeat the run: ``argv`` without ``--output_dir`` and ``--resume``.

    Raises:
        InputError: an unknown setting, or a value that it can't have.
        SystemExit: after ``--help``.
    """
    parser = _parser()
    flags = read_flags(parser, argv)
    if default_config is not None:
        flags = [_found(flag, default_config.parent) if flag.name == "--config" else flag for flag in flags]
    told = {flag.name: flag.value for flag in flags}
    repeated = [word for flag in flags if flag.name not in ("--output_dir", "--resume") for word in flag.words]
    if "--config" not in told:
        own = None
        if "--resume" in told:
            of_data = [flag for flag in flags if flag.name in ("--data", "--data.dataset")]
            own = RunFolder.find(told.get("--output_dir"), _parsed(parser, of_data).data.dataset, told["--resume"])
        if own is not None and own.config_file.is_file():
            flags.insert(0, Flag("--config", str(own.config_file)))
        elif default_config is not None and not {"--data.dataset", "--data"} & set(told):
            flags.insert(0, Flag("--config", str(default_config)))
    settings = _parsed(parser, _with_resets(parser, flags))
    if settings.train.mixed_precision == "auto":  # measured once in a run, however it is told to go on
        own = RunFolder.find(settings.output_dir, settings.data.dataset, settings.resume)
        if own is not None and own.config_file.is_file():
            had = settings_of(own).train.mixed_precision or "auto"
            settings.train = replace(settings.train, mixed_precision=had)
            repeated += ["--train.mixed_precision", had]
    return settings, repeated


def joined(before: Sequence[str], later: Sequence[str]) -> list[str]:
    """The words of flags, and those that override them: epochs of ``before`` are taken back where ``later`` tells steps."""
    first, then = ({word.partition("=")[0] for word in words} for words in (before, later))
    taken_back = []
    for section in ("--train", "--classifier"):
        if f"{section}.epochs" in first - then and f"{section}.steps" in then:
            taken_back += [f"{section}.epochs", "null"]
    return [*before, *taken_back, *later]


def settings_of(run: RunFolder) -> Settings:
    """A run's own, by its config.yaml.

    Raises:
        InputError: it can't be read, or holds what is no setting of this version.
    """
    return _parsed(_parser(), [Flag("--config", str(run.config_file))])


def _found(flag: Flag, presets: Path) -> Flag:
    """``--config`` with its file, which may be one of ``presets``."""
    file = preset(flag.value, presets)
    if not os.path.exists(file):
        names = ", ".join(sorted(file.stem for file in presets.glob("*.yaml")))
        raise InputError(f"--config is {quoted(flag.value)}, which is no file: give one, or a preset, {names}")
    return flag._replace(value=file)


def _parser() -> ArgumentParser:
    sections = ("data", "model", "classifier", "sgld", "train", "guard", "hub")
    about = f"Train a joint energy model. Sections of settings, in this order: {', '.join(sections)}."
    parser = make_parser("train", about)
    parser.usage = "%(prog)s [--config FILE] [--SECTION.SETTING VALUE ...]"  # all of them take a hundred lines
    for name in sections:
        kind = Settings.__dataclass_fields__[name].type
        parser.add_argument(f"--{name}", type=kind, default=kind())
    parser.add_argument("--output_dir", type=str | None, default=None, help="default: runs/<data set>, numbered")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="a run's folder, or one of its checkpoints: go on with it, by its own config.yaml unless told otherwise; "
        "auto: go on with output_dir where it has a checkpoint, else start it",
    )
    return parser


def _parsed(parser: ArgumentParser, flags: Sequence[Flag]) -> Settings:
    found = parser.instantiate(parse_flags(parser, flags))
    return Settings(**{name: found[name] for name in Settings.__dataclass_fields__})


def _with_resets(parser: ArgumentParser, flags: Sequence[Flag]) -> list[Flag]:
    """The flags, and where a file, or the flags after it, name another model or a number of steps, what those before them said
    of its arguments, or of epochs, is taken back."""
    groups: list[list[Flag]] = [[]]
    for flag in with_contents(parser, flags):
        if flag.name == "--config":
            groups += [[flag], []]
        else:
            groups[-1].append(flag)
    found: list[Flag] = []
    for group in groups:
        given = names_of(parser, group)
        if "--model.name" in given:
            found.append(Flag("--model.kwargs", "{}"))
        for section in ("train", "classifier"):
            if f"--{section}.steps" in given and f"--{section}.epochs" not in given:
                found.append(Flag(f"--{section}.epochs", "null"))
        found += group
    return found
