"""Settings from flags and YAML files, as every recipe takes them."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, get_loader

from timm_jem.errors import InputError, one_line, program, quoted

__all__ = ["Arguments", "Flag", "make_parser", "names_of", "parse_flags", "preset", "read_flags", "told_of", "with_contents"]

# Of another library's function. Text comes first: what is quoted in YAML stays text.
Arguments = dict[str, str | int | float | bool | list | dict | None]

_FRACTION = re.compile("([0-9]{1,9})/([0-9]{1,9})")


class Flag(NamedTuple):
    """A flag with its value, or, where ``name`` is empty, a word that stands alone; ``words`` are as they were typed.

    ``content`` is what the YAML file or the mapping that it gives holds, once it has been read: a pipe can be read once.
    """

    name: str
    value: str | None
    words: tuple[str, ...] = ()
    content: dict[str, Any] | None = None


def preset(name: str, folder: Path) -> str:
    """The YAML file that ``name`` means: that of this name in ``folder``, where it is no file itself."""
    inside = f"{folder / name}.yaml"
    return inside if os.path.isfile(inside) and not os.path.isfile(name) else name


class _Help(DefaultHelpFormatter):
    """Docstrings as a command line has them: without marks, names of classes by their last part, and null for None."""

    def format_help(self) -> str:
        text = re.sub(r":[a-z]+:`[^`]*?(\w+)`", r"\1", super().format_help())
        return re.sub(r"\bNone\b", "null", text.replace("``", ""))


def make_parser(recipe: str, description: str) -> ArgumentParser:
    """A recipe's parser for :func:`read_flags` and :func:`parse_flags`, with ``--config``; a setting has one name."""
    how = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _Help}
    parser = ArgumentParser(prog=program(recipe), description=description, **how)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    return parser


def read_flags(parser: ArgumentParser, argv: Sequence[str]) -> list[Flag]:
    """The flags of a command line, each with its value: ~ is the home folder, and a switch alone is true.

    Raises:
        InputError: an unknown flag (with those it may mean), or one without a value.
    """
    options, flags, rest = _options(parser), [], list(argv)
    while rest:
        word = rest.pop(0)
        name, given, value = word.partition("=")
        if not word.startswith("--"):
            flags.append(Flag("", os.path.expanduser(word), (word,)))
            continue
        kind = options.get(name)
        if name not in options and _kind(options, name.rpartition(".")[0]) is not dict:
            raise InputError(f"{name} is no setting{_meant(name, options)}; {parser.prog} --help lists them")
        if kind == "alone":
            flags.append(Flag(name, value if given else None, (word,)))
            continue
        words, switch = [word], bool in (kind, *get_args(kind))
        if not given:
            if rest and not rest[0].startswith("--") and not (switch and isinstance(_loaded(rest[0]), str)):
                words.append(value := rest.pop(0))
            elif switch:
                value = "true"
            else:
                raise InputError(f"{name} has no value: expected one argument")
        flags.append(Flag(name, os.path.expanduser(value), tuple(words)))
    return flags


def parse_flags(parser: ArgumentParser, flags: Sequence[Flag]) -> Namespace:
    """What jsonargparse makes of them: for a list one name will do, and a YAML file is checked before it is used.

    Raises:
        InputError: a value that a setting can't have; that of a file is named with it.
        SystemExit: after ``--help``.
    """
    options = _options(parser)
    words = [_word(flag, parser, options) for flag in flags]
    try:
        parsed = parser.parse_args(words)
    except ArgumentError as error:
        raise InputError(f"{one_line(error)}; {parser.prog} --help lists the settings") from error
    for flag in flags:
        parent, _, key = flag.name.removeprefix("--").rpartition(".")
        if _kind(options, f"--{parent}") is dict and isinstance(text := parsed[parent].get(key), str):
            parsed[parent][key] = _loaded(text)
    return parsed


def with_contents(parser: ArgumentParser, flags: Sequence[Flag]) -> list[Flag]:
    """The flags, those that give a YAML file or a mapping with their ``content``.

    Raises:
        InputError: one that can't be read.
    """
    options = _options(parser)
    return [flag._replace(content=_content(flag, options)) if _holds_settings(flag, options) else flag for flag in flags]


def names_of(parser: ArgumentParser, flags: Sequence[Flag]) -> set[str]:
    """The settings that flags give, such as ``--train.lr``: of those :func:`with_contents`, all that are in them."""
    options = _options(parser)

    def names(content: dict[str, Any], prefix: str) -> set[str]:
        found = set()
        for key, value in content.items():
            name = f"{prefix}{key}"
            section = options.get(name) == "section" and isinstance(value, dict)
            found |= names(value, f"{name}.") if section else {name}
        return found

    return set().union(*({f.name} if f.content is None else names(f.content, _prefix(f)) for f in flags))


def told_of(parser: ArgumentParser, flags: Sequence[Flag], section: str, values: Any) -> dict[str, Any]:
    """What flags say of a section's settings, by name, whatever its defaults: of :func:`with_contents`.

    Args:
        parser, flags: that made ``values``.
        section: its name, such as "data".
        values: the section as it was parsed, an object with a setting an attribute; None: nothing was told.
    """
    prefix = f"--{section}."
    names = [name.removeprefix(prefix) for name in sorted(names_of(parser, flags)) if name.startswith(prefix)]
    return {} if values is None else {name: getattr(values, name) for name in names}


def _word(flag: Flag, parser: ArgumentParser, options: dict[str, Any]) -> str:
    """The flag as jsonargparse takes it."""
    if not flag.name or flag.value is None:
        return flag.value or flag.name
    value = flag.value
    if _holds_settings(flag, options):
        return f"{flag.name}={_settings(flag, parser, options)}"
    if "/" in value and _is_of_numbers(options.get(flag.name)):
        value = json.dumps(_without_fractions(_loaded(value), flag.name), default=str)
    if _kind(options, flag.name) is list and isinstance(loaded := _loaded(value), (str, int, float, dict)):
        value = value if value.lstrip().startswith("[") else json.dumps([value if isinstance(loaded, str) else loaded])
    return f"{flag.name}={value}"


def _is_of_numbers(kind: Any) -> bool:
    return float in (kind, *get_args(kind))


def _without_fractions(value: Any, name: str) -> Any:
    """A setting's value, or that of each item of a list: for 8/255, the number that it is.

    Raises:
        InputError: something else with a stroke.
    """
    if isinstance(value, list):
        return [_without_fractions(item, name) for item in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    fraction = _FRACTION.fullmatch(value)
    if fraction is None or int(fraction[2]) == 0:
        raise InputError(f"{name} has {quoted(value)}: give a number, or one whole number over another, such as 8/255")
    return int(fraction[1]) / int(fraction[2])


def _holds_settings(flag: Flag, options: dict[str, Any]) -> bool:
    """Whether it gives a YAML file, or a mapping, of settings."""
    return flag.name == "--config" or options.get(flag.name) == "section"


def _prefix(flag: Flag) -> str:
    """What the names of the settings begin with that a YAML file or a mapping has."""
    return "--" if flag.name == "--config" else f"{flag.name}."


def _source(flag: Flag) -> str:
    """How errors call where a YAML file's or a mapping's settings come from."""
    return flag.value if flag.name == "--config" or Path(flag.value).is_file() else flag.name


def _content(flag: Flag, options: dict[str, Any]) -> dict[str, Any]:
    """What a YAML file, or a mapping on the command line, holds."""
    source, text, prefix = _source(flag), flag.value, _prefix(flag)
    if source == flag.value:
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{source} can't be read ({one_line(error)}): give a YAML file of settings in UTF-8") from error
    try:
        content = get_loader("yaml")(text)
        if isinstance(content, str):  # as it takes a section without settings
            content = yaml.safe_load(text)
    except (RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{source} can't be read (parsing config: {one_line(error)}): mend it") from error
    if not isinstance(content, dict):
        holds = "nothing" if content is None else f"{str(content)[:60]!r}"
        if prefix == "--":
            raise InputError(f"{source} holds {holds}: give a YAML file of settings, such as 'train: {{steps: 1000}}'")
        first = _first(prefix, options)
        hint = f"did you mean {first} {str(content)[:60]}?" if content is not None else f"give {first} or another setting"
        raise InputError(f"{source} is a section of settings and is given {holds}: {hint}")
    return content


def _settings(flag: Flag, parser: ArgumentParser, options: dict[str, Any]) -> str:
    """The settings of a YAML file, or of a mapping on the command line, as JSON."""
    source, prefix = _source(flag), _prefix(flag)
    content = _content(flag, options) if flag.content is None else flag.content
    content = _checked(content, prefix, source, options)
    nested = content
    for part in reversed(prefix.strip("-.").split(".") if prefix != "--" else []):
        nested = {part: nested}
    try:
        parser.parse_string(json.dumps(nested, default=str))
    except ArgumentError as error:
        raise InputError(f"{source}: {one_line(error)}; {parser.prog} --help lists the settings") from error
    return json.dumps(content, default=str)


def _checked(content: dict[str, Any], prefix: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Settings with sections that are mappings, and lists that are lists."""
    found = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name == "--config":
            raise InputError(
                f"{source} names another file of settings, which is not read: give both, --config one --config other"
            )
        if name not in options and _kind(options, name.rpartition(".")[0]) is not dict:
            raise InputError(f"{source}: {name.removeprefix('--')} is no setting{_meant(name, options).replace('--', '')}")
        if options.get(name) == "section":
            if value is None:
                continue
            if not isinstance(value, dict):
                first = _first(f"{name}.", options).removeprefix("--")
                raise InputError(
                    f"{source}: {name.removeprefix('--')} is {str(value)[:60]!r} and should be a section of settings: "
                    f"did you mean {first}: {str(value)[:60]}?"
                )
            value = _checked(value, f"{name}.", source, options)
        elif _is_of_numbers(options.get(name)):
            value = _without_fractions(value, f"{source}: {name.removeprefix('--')}")
        if _kind(options, name) is list and value is not None and not isinstance(value, list):
            value = [value]
        elif value is False and str in (types := get_args(options.get(name))) and bool not in types:
            value = "no"  # which YAML takes for false
        found[key] = value
    return found


def _options(parser: ArgumentParser) -> dict[str, Any]:
    """Each flag with its type; "section" where it stands for a group of others, "alone" where it takes no value."""
    actions = {name: a for a in parser._actions for name in a.option_strings if name.startswith("--") and name[-1] != "+"}
    kinds = {}
    for name, action in actions.items():
        kind = getattr(action, "_typehint", None)
        section = kind is None and any(other.startswith(f"{name}.") for other in actions)
        alone = action.nargs in (0, "?") or name == "--print_config"  # which may be given what to leave out
        kinds[name] = "section" if section else "alone" if alone else kind
        for part in get_args(kind) if get_origin(kind) is UnionType else ():
            if is_dataclass(part) and not name.endswith(".help"):  # a section that need not be there
                kinds |= {name: "section", **{f"{name}.{field.name}": field.type for field in fields(part)}}
    return kinds


def _kind(options: dict[str, Any], name: str) -> type | None:
    return get_origin(options.get(name))


def _first(prefix: str, options: dict[str, Any]) -> str:
    """The setting that a section is told by, if it is told by one: data.dataset, model.name."""
    return next(option for option in options if option.startswith(prefix) and not option.endswith(".help"))


def _meant(name: str, options: dict[str, Any]) -> str:
    """Names like ``name``: of another spelling, or of some section."""
    name = f"--{name.lstrip('-').replace('-', '_')}"
    settings = [option for option, kind in options.items() if kind not in ("section", "alone")]
    last = name.removeprefix("--").rpartition(".")[2]
    close = [option for option in settings if option.removeprefix("--").rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(name, settings, n=3, cutoff=0.7)
    return f": did you mean {', '.join(close[:3])}?" if close else ""


def _loaded(text: str) -> Any:
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text
