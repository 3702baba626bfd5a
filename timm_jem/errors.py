"""The one exception that means "your input, not our bug", and the checks of numbers that every setting needs."""

import math
import numbers

__all__ = ["InputError", "check_number", "check_whole", "how_to_install", "one_line"]


class InputError(ValueError):
    """Bad input: the message is one line that names what was wrong and how to fix it."""


def check_whole(name: str, value, least: int, most: float = math.inf) -> None:
    """Raise an InputError unless ``value`` is a whole number from ``least`` to ``most``; numpy's are as good as Python's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        bound = f" and at most {most}" if most < math.inf else ""
        raise InputError(f"{name} is {value!r}: give a whole number of at least {least}{bound}")


def check_number(name: str, value, *, above: float | None = None, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise an InputError unless ``value`` is finite, greater than ``above``, and between ``least`` and ``most``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if real and least <= value <= most and (above is None or value > above):
        return
    bounds = [f"above {above:g}"] if above is not None else [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    raise InputError(f"{name} is {value!r}: give a finite number {' and '.join(bounds)}".rstrip())


def one_line(error: BaseException) -> str:
    """What another library's exception says, as one line of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def how_to_install(extra: str) -> str:
    """The command that installs one of this package's extras, for messages about a missing library."""
    return f"pip install 'timm_jem[{extra}]' (from a clone: pip install -e '.[{extra}]')"
