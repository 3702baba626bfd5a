"""What strangers may read of local paths: their last part."""

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["without_local_paths"]

_START = r"(?:(?:~|\.{1,2})?/|[A-Za-z]:[\\/])"  # /x, ~/x, ./x, ../x and C:\x
_WHOLE = re.compile(rf"(?:local-dir:|file://|{_START})")
_WITHIN = re.compile(rf"(?:local-dir:|file://|(?<![\w:/.~\\-]){_START})[^\s'\"()\[\]{{}},;]+")
_SCHEME = re.compile(r"(local-dir:|file://)?(.*)", re.DOTALL)


def without_local_paths(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance in which every local path is ./NAME: the folders above may be called as a person, a client or a project.

    In settings, command and explanations alike. What is in a folder "recipes" of the current one is this package's own.
    """
    known = [text.split("/") for text in _texts(provenance) if _WHOLE.match(text)]
    ends = {"/".join(parts[i:]) for parts in known for i in range(1, len(parts))}  # each may be how the command told it

    def word(text: str) -> str:
        flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
        unmarked = "/" in value and not value.startswith("recipes/") and not _WHOLE.match(value)
        there = value.endswith((".yaml", ".yml")) or Path(value).exists()
        if unmarked and (there or value in ends):
            value = f"./{value}"
        elif "{" in value:  # arguments, of which one may be a path from the current folder
            value = _arguments(value, ends)
        return f"{flag}{equals}{_cut(value)}"

    def shown(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: shown(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shown(item) for item in value]
        if not isinstance(value, str):
            return value
        try:
            lines = value.splitlines() if key == "command" else []
            return "\n".join(shlex.join(map(word, shlex.split(line))) for line in lines) if lines else _cut(value)
        except ValueError:  # an open quote
            return _cut(value)

    return shown(provenance)


def _arguments(text: str, ends: Collection[str]) -> str:
    """A mapping in YAML, in which what may be a local path is cut; as it was where nothing is."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        return f"./{Path(value).name}" if isinstance(value, str) and os.path.normpath(value) in ends else value

    try:
        told = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if (shown := cut(told)) == told:
        return text
    return yaml.safe_dump(shown, default_flow_style=True, sort_keys=False, width=10**6).strip()


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
