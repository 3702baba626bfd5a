"""Which names timm knows, and how it says that it can't build one."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import split_model_name_tag

from timm_jem.errors import InputError, quoted

__all__ = ["BUILD_ERRORS", "check_name", "registered_by", "weights_id"]

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


def weights_id(name: str, kwargs: Mapping[str, Any]) -> str | None:
    """The Hub repository whose weights ``timm.create_model(name, pretrained=True, **kwargs)`` loads; None: it is none."""
    told = kwargs.get("pretrained_cfg")  # a tag of timm's, or where weights are
    source, is_source, place = name.partition(":")
    elsewhere = kwargs.get("checkpoint_path") or "pretrained_cfg_overlay" in kwargs
    if elsewhere or source == "local-dir" or not (told is None or isinstance(told, str)):
        return None
    if is_source:
        return place.partition("@")[0]  # a revision is no part of the id
    found = timm.get_pretrained_cfg(name if told is None else f"{split_model_name_tag(name)[0]}.{told}")
    return None if found is None else found.hf_hub_id
