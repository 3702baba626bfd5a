"""What strangers may read of local paths: their last part."""

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["without_local_paths"]

# /x, ~/x, ~user/x, ./x, ../x, $HOME/x, C:\x and \\x
_START = r"(?:(?:~(?:[A-Za-z_][\w.-]*)?|\.{1,2}|\$\{?\w+\}?)?/|[A-Za-z]:[\\/]|\\\\)"
_SCHEMES = r"(?:local-dir:|(?i:file):(?://(?=[/.])|(?=/))|[a-z]+:///)"
_WHOLE = re.compile(rf"(?:{_SCHEMES}|{_START})")
_REST = r"[^\s'\"()\[\]{},;]"
_WITHIN = re.compile(rf"(?:{_SCHEMES}|(?<![\w:/.~\\-]){_START}){_REST}+")
_SCHEME = re.compile(rf"({_SCHEMES})?(.*)", re.DOTALL)


def without_local_paths(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance in which every local path is ./NAME: the folders above may be called as a person, a client or a project.

    In settings, command and explanations alike. What is in a folder "recipes" of the current one is this package's own.
    """
    known = [text.split("/") for text in _texts(provenance) if _WHOLE.match(text)]
    ends = {"/".join(parts[i:]) for parts in known for i in range(1, len(parts))}  # each may be how the command told it
    # Within other text a path ends at a space, unless the settings have it as a whole.
    spaced = {text for text in _texts(provenance.get("config")) if _WHOLE.match(text) and " " in text.strip()}
    whole = re.compile("|".join(rf"{re.escape(path)}{_REST}*" for path in sorted(spaced, key=len, reverse=True)) or r"(?!)")

    def cut(text: str) -> str:
        return _cut(text if _WHOLE.match(text) else whole.sub(lambda found: _last(found[0]), text))

    def word(text: str) -> str:
        flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
        unmarked = "/" in value and not value.startswith("recipes/") and not _WHOLE.match(value)
        there = value.endswith((".yaml", ".yml")) or Path(value).exists()
        if unmarked and (there or os.path.normpath(value) in ends):
            value = f"./{value}"
        elif "{" in value:  # arguments, of which one may be a path from the current folder
            value = _arguments(value, ends)
        return f"{flag}{equals}{cut(value)}"

    def shown(text: str, key: str) -> str:
        try:
            lines = text.splitlines() if key == "command" else []
            return "\n".join(shlex.join(map(word, shlex.split(line))) for line in lines) if lines else cut(text)
        except ValueError:  # an open quote
            return cut(text)

    return _each_text(provenance, shown)


def _arguments(text: str, ends: Collection[str]) -> str:
    """A mapping in YAML, in which what may be a local path is cut; as it was where nothing is."""

    def cut(text: str, _key: str) -> str:
        if _WHOLE.match(text):
            return _last(text)
        return f"./{Path(text).name}" if "/" in text and os.path.normpath(text) in ends else text

    try:
        told = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if (shown := _each_text(told, cut)) == told:
        return text
    return yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _each_text(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """JSON data in which each text is ``change(text, the key it has in a mapping)``."""
    if isinstance(value, Mapping):
        return {_each_text(name, change): _each_text(item, change, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(item, change) for item in value]
    return change(value, key) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _cut(text: str) -> str:
    """``text`` with its paths cut short. One that begins as a path is taken for one as a whole: it may have spaces."""
    return _last(text) if _WHOLE.match(text) else _WITHIN.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    scheme, path = _SCHEME.match(path).groups()
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return f"{scheme or ''}./{name}" if name not in ("", ".", "..") else f"{scheme or ''}."
