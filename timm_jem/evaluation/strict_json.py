"""JSON for any reader. The JSON of Python's own writer has NaN and Infinity as bare words, which the standard doesn't know."""

import json
import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["built", "dumps", "fits", "restored"]

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MOST = 2**53  # whole numbers up to here are floats, too


def dumps(data: Any) -> str:
    """Indented JSON with a line's end; NaN and infinities are the strings "NaN", "Infinity" and "-Infinity", as protobuf has
    them in JSON."""
    return json.dumps(_strict(data), indent=2, allow_nan=False) + "\n"


def restored(data: Any) -> Any:
    """Numbers that :func:`dumps` wrote, alone or in lists and objects, with NaN and infinities as floats again."""
    if isinstance(data, dict):
        return {key: restored(value) for key, value in data.items()}
    if isinstance(data, list):
        return [restored(value) for value in data]
    return _WORDS.get(data, data) if isinstance(data, str) else data


def built(kind: type, data: dict[str, Any]) -> Any:
    """A dataclass of JSON data; what it doesn't know is left out, and a value of another type is a TypeError."""
    hints = get_type_hints(kind)
    known = {name: data[name] for name in hints if name in data}
    for name, value in known.items():
        if not fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.80}")
    return kind(**known)


def fits(value: Any, hint: Any) -> bool:
    """Whether JSON data are of a type, such as ``list[float] | None``; one that no float can hold is no number."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(entry, inner[0]) for entry in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(fits(entry, inner[1]) for entry in value.values())
    if hint in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _MOST
    return isinstance(value, (int, float) if hint is float else hint)


def _strict(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_strict(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
