"""JSON for any reader. The JSON of Python's own writer has NaN and Infinity as bare words, which the standard doesn't know."""

import json
import math
from typing import Any

__all__ = ["dumps", "restored"]

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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


def _strict(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_strict(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
