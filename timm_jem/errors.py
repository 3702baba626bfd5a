"""The one exception that means "your input, not our bug", and the checks of numbers that every setting needs."""

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "InputError",
    "check_number",
    "check_whole",
    "how_to_install",
    "importing",
    "need",
    "one_line",
    "program",
    "quoted",
]


class InputError(ValueError):
    """Bad input: the message is one line that names what was wrong and how to fix it, whatever it quotes."""

    def __init__(self, message: str) -> None:
        # A quoted line break would end the line, and an escape code would move the terminal's cursor.
        super().__init__("".join(character if character.isprintable() else " " for character in message))


def check_whole(name: str, value, least: int, most: int | None = None) -> None:
    """Raise an InputError unless ``value`` is a whole number from ``least`` to ``most``; numpy's are as good as Python's."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise InputError(f"{name} is {quoted(value)}: give a whole number {bounds}")


def check_number(name: str, value, *, above: float | None = None, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise an InputError unless ``value`` is finite, greater than ``above``, and between ``least`` and ``most``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and _is_finite(value)
    if real and least <= value <= most and (above is None or value > above):
        return
    bounds = [f"above {above:g}"] if above is not None else [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    raise InputError(f"{name} is {quoted(value)}: give a finite number {' and '.join(bounds)}".rstrip())


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number, or a fraction, beyond floating-point ones
        return False


def quoted(value) -> str:
    """A value as messages show it: what ``repr`` says, on one line and of readable length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """What another library's exception says, as one line of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def how_to_install(extra: str) -> str:
    """The command that installs one of this package's extras, for messages about a missing library."""
    return f"pip install 'timm_jem[{extra}]' (from a clone: pip install -e '.[{extra}]')"


def need(library: str, what: str, extra: str, otherwise: str = "") -> None:
    """Raise an InputError that says how to install ``library``, which ``what`` needs, where it is missing."""
    if find_spec(library) is None:
        raise InputError(f"{what} needs {library.replace('_', '-')}: {how_to_install(extra)}{otherwise}")


@contextmanager
def importing(library: str, what: str, extra: str) -> Iterator[None]:
    """Imports of a library that may be missing: the InputError of :func:`need` takes the place of an ImportError."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs {library}: {how_to_install(extra)}") from error


def program(recipe: str) -> str:
    """The command that starts a recipe, such as "push": its file in a checkout, else the module of the installed package."""
    installed = (Path(__file__).parent / "recipes").is_dir()
    return f"python -m timm_jem.recipes.{recipe}" if installed else f"python recipes/{recipe}.py"
