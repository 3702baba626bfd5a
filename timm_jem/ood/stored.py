"""What was fitted, as one safetensors file with JSON in its header."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timm_jem.errors import InputError, check_number, quoted
from timm_jem.files import as_path, read_tensors, write_tensors
from timm_jem.model import JEM
from timm_jem.noise import uniform_noise
from timm_jem.ood.views import view

__all__ = ["check", "probe", "read", "threshold", "write"]

FORMAT_VERSION = 2
_KEY = "timm_jem_detector"
# Logits of a few images, by which the model is known again: they differ by less than these shares on another machine, TF32
# included, and in half precision.
_PROBE, _SAME, _SAME_IN_HALF = "probe_logits", 0.01, 0.1
# Features of mahalanobis in double precision are the most: 16,384² numbers.
_MOST_BYTES = 2**31


def write(file: str | os.PathLike, state: Mapping[str, Tensor], about: dict[str, Any], known_by: Tensor) -> None:
    """Write tensors, what JSON says about them, and the :func:`probe` of the model, whole or not at all.

    Raises:
        InputError: the file can't be written; one that was there is as before.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**state, _PROBE: known_by}.items()}
    header = {_KEY: json.dumps({"format_version": FORMAT_VERSION, **about})}
    write_tensors(file, tensors, header)


def read(file: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, still unchecked, and what is said about them: a dict with name and options.

    Raises:
        InputError: a file that is missing, broken, too large or no detector's.
    """
    path, about = as_path(file), None
    state, header = read_tensors(path, _MOST_BYTES, "a detector's save", "no detector's file is")
    with contextlib.suppress(RecursionError, ValueError):
        about = json.loads(header.get(_KEY, "null"))
    known = isinstance(about, dict) and isinstance(about.get("options"), dict)
    if not known or about.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path} is not a detector's file of this version: fit and save the detector again")
    return state, about


def threshold(about: dict[str, Any]) -> tuple[float | None, float | None]:
    """The threshold and the share that it accepts.

    Raises:
        InputError: they are no numbers.
    """
    found = about.get("threshold"), about.get("accept")
    for name, value in zip(("threshold", "accept"), found, strict=True):
        if value is not None:
            check_number(name, value)
    return found


def check(state: dict[str, Tensor], shapes: Mapping[str, str], jem: JEM) -> Tensor:
    """Raise an InputError unless tensors are what a method of these shapes fitted to this model; the probe is taken out."""
    known_by = state.pop(_PROBE, None)
    if known_by is None or set(state) != set(shapes):
        raise InputError(f"it holds {quoted(sorted(state))} and not {', '.join(shapes) or 'nothing'}: save the detector again")
    features = any("D" in shape for shape in shapes.values())
    seen = view(jem, _probes(jem), features=features)
    sizes = {"C": jem.num_classes, **({"D": seen.features.shape[1]} if features else {})}
    for name, shape in shapes.items():
        tensor = state[name]
        fits = tensor.dtype in (torch.float32, torch.float64) and tensor.ndim == len(shape) and tensor.numel() > 0
        fits = fits and all(sizes.setdefault(letter, size) == size for letter, size in zip(shape, tensor.shape, strict=True))
        if not fits or not tensor.isfinite().all():
            raise InputError(f"{name} of shape {tuple(tensor.shape)} is of another model, or broken: fit the detector again")
    logits = seen.logits.cpu()
    half = not {known_by.dtype, logits.dtype} <= {torch.float32, torch.float64}
    most = (_SAME_IN_HALF if half else _SAME) * logits.double().norm(dim=1) + 1e-6
    if known_by.shape != logits.shape or not ((known_by.double() - logits.double()).norm(dim=1) <= most).all():
        raise InputError("it was fitted to another model, or to other weights: fit the detector again")
    return known_by


def _probes(jem: JEM) -> Tensor:
    """A grey image, and two of noise: what a layer makes of the one alone tells little of it."""
    noise = uniform_noise((2, *jem.input_size), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return jem.normalize(torch.cat([torch.zeros_like(noise[:1]), noise]))


def probe(jem: JEM) -> Tensor:
    """By which a model with its weights is known again: logits of a few images, in its dtype, (3, num_classes), on the CPU."""
    return view(jem, _probes(jem)).logits.cpu()
