"""Which names timm knows, and how it says that it can't build one."""

import difflib

import timm

from timm_jem.errors import InputError, quoted

__all__ = ["BUILD_ERRORS", "check_name", "registered_by"]

# What timm raises, here and there, when it can't build a model from its arguments.
BUILD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def check_name(name: str) -> None:
    """Raise an InputError with the closest names where timm knows no model of this one; sources ("hf-hub:") pass."""
    if not isinstance(name, str):
        raise InputError(f"the model name is {quoted(name)}: give one of timm.list_models()")
    if ":" in name or timm.is_model(name.split(".")[0]):
        return
    known, given = timm.list_models(), name.split(".")[0][:100]
    longer = [model for model in known if model.startswith(f"{given}_")]
    close = longer[:3] or difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
    raise InputError(f"unknown model {quoted(name)}: {hint}")


def registered_by(name: str) -> str | None:
    """The package that registered an architecture with timm: "timm", "timm_jem" or another; None: none did."""
    return timm.models.model_entrypoint(name).__module__.split(".")[0] if timm.is_model(name) else None
