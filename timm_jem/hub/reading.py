"""A model read from files that nobody vouches for: everything about it is known to be sane before it costs anything."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import check_header
from timm_jem.hub.empty import build_empty
from timm_jem.models.names import check_name

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "KEY",
    "MAX_CONFIG_BYTES",
    "WEIGHTS_FILE",
    "check_finite",
    "check_nesting",
    "model_folder",
    "read_folder",
]

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
KEY = "timm_jem"
MAX_CONFIG_BYTES, _DEEPEST = 16 * 2**20, 50
# The largest of timm's models has a tenth of these tensors.
_MAX_HEADER_BYTES, _MAX_TENSORS = 4 * 2**20, 20_000
# Larger numbers are no layer's width or depth; nor a number of classes; nor a side of an image or a window, over whose pairs
# some constructors loop. All that are no classes together bound what constructors make of lists.
_LARGEST, _MOST_CLASSES, _LARGEST_SIDE, _LARGEST_SUM = 2**14, 2**20, 2048, 2**17
_CLASSES, _SIDE = re.compile("num_(classes|features)$"), re.compile("size|resolution|window")
_MOST_VALUES, _LONGEST_ARGUMENT = 5000, 1000
_LABELS = ("label_names", "label_descriptions", "labels")  # as many as there are classes
# Arguments of timm's factory that say how or where to load, not what to build.
_LOADING_ARGUMENTS = {
    *("features_only", "feature_cfg", "kwargs_filter", "checkpoint_path", "cache_dir"),
    *("device", "dtype", "scriptable", "exportable", "no_jit"),
}


class _Stored(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    floating: bool
    shape: tuple[int, ...]


def read_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in eval mode, with its weights, and what this package keeps with it.

    Nothing in the folder is trusted. The very model that timm will build is built on the meta device first, within bounds,
    and compared with the header of its weights; only JSON and safetensors are read.

    Raises:
        InputError: files that are missing, broken, of a newer format, or disagree with each other.
    """
    config = _read_config(folder)
    ours = config.get(KEY, {})
    for key in ("sgld", "provenance"):
        if not isinstance(ours.get(key, {}), dict):
            raise InputError(f"{KEY}.{key} in {CONFIG_FILE} is a {type(ours[key]).__name__}, not a dict")
    version = ours.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{CONFIG_FILE} has format version {quoted(version)}, this timm_jem reads {FORMAT_VERSION}: upgrade timm_jem"
        )
    stored = _read_header(folder / WEIGHTS_FILE)
    _check_fit(_describe(folder, stored), stored, ours=KEY in config)
    try:
        backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever a constructor, or timm's conversion of the weights, makes of these files
        raise InputError(f"{CONFIG_FILE} and {WEIGHTS_FILE} don't fit each other ({one_line(error)})") from error
    check_finite(backbone, f"{WEIGHTS_FILE} holds")
    return backbone.eval(), ours


def check_finite(model: nn.Module, what: str) -> None:
    """Raise an InputError where a weight or buffer isn't finite, or is on the meta device and nothing at all.

    A buffer that is a single number may be infinite: the bounds of timm's clippable layers are.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"{what} {quoted(name)} on the meta device, without weights: use a real device")
        bound = tensor.ndim == 0 and name not in weights
        if not tensor.isfinite().all() and not (bound and tensor.isinf()):
            raise InputError(f"{what} {quoted(name)} with values that are not finite: these weights are broken")


def check_nesting(data: Any, what: str) -> None:
    """Raise an InputError where JSON data is nested deeper than any reader would follow."""
    level = [data]
    for _ in range(_DEEPEST):
        containers = [item for item in level if isinstance(item, (dict, list, tuple))]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise InputError(f"{what} is nested too deep: {_DEEPEST} levels are the most")


def model_folder(folder: Path) -> Path:
    """The folder itself where a model is saved in it, else, as of a run's folder, ``model`` in it if there is one."""
    inside = folder / "model"
    return inside if os.path.isfile(inside / CONFIG_FILE) and not os.path.isfile(folder / CONFIG_FILE) else folder


def _read_config(folder: Path) -> dict[str, Any]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.access(folder, os.X_OK) or (os.path.isfile(folder / file) and not os.access(folder / file, os.R_OK)):
            raise InputError(f"{folder / file} can't be read: its permissions don't allow it")
        if not (folder / file).is_file():
            raise InputError(
                "a run without a model: wait for it to end, or give one of its best/ models"
                if file == CONFIG_FILE and (folder / "config.yaml").is_file()
                else f"no {file}: a model saved by save_pretrained, or by timm as safetensors, has one; no pickle is read"
            )
    try:
        if (folder / CONFIG_FILE).stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES >> 20} MiB: that is no model's configuration")
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{CONFIG_FILE} can't be read ({one_line(error)})") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG_FILE} is not JSON ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise InputError(f"{CONFIG_FILE} holds a {type(config).__name__}: a model's configuration is an object")
    check_nesting(config, CONFIG_FILE)
    kinds = {"architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict, KEY: dict}
    for key, kind in kinds.items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            raise InputError(f"{key} in {CONFIG_FILE} is a {type(config[key]).__name__}, not a {kind.__name__}")
    _check_architecture(config)
    for key in ("input_size", "mean", "std"):
        value = config.get("pretrained_cfg", {}).get(key)
        if value is not None and not (isinstance(value, list) and value and all(type(item) in (int, float) for item in value)):
            raise InputError(f"pretrained_cfg.{key} in {CONFIG_FILE} is {quoted(value)}: give a list of numbers")
    for key in config.get("model_args", {}):
        if key in _LOADING_ARGUMENTS or key.startswith("pretrained"):
            raise InputError(f"model_args in {CONFIG_FILE} has {quoted(key)}, which no saved model needs")
    described = {key: value for key, value in config.items() if key not in {KEY, *_LABELS}}
    if "pretrained_cfg" in config:
        described["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if k not in _LABELS}
    _check_values(described)
    return config


def _check_architecture(config: dict[str, Any]) -> None:
    if "architecture" not in config:
        of = " but architectures, as transformers writes it" if "architectures" in config else ""
        raise InputError(f"{CONFIG_FILE} has no architecture{of}: give a model of timm, which names one")
    architecture = config["architecture"]
    if ":" in architecture:
        raise InputError(f"the architecture {quoted(architecture)} in {CONFIG_FILE} is not the name of a timm model")
    check_name(architecture)
    named_again = config.get("pretrained_cfg", {}).get("architecture", architecture)
    if named_again != architecture:
        raise InputError(
            f"{CONFIG_FILE} is of {architecture}, and its pretrained_cfg of {quoted(named_again)}: make them agree"
        )


def _check_values(config: dict[str, Any]) -> None:
    """Refuse what no model has: it might cost a constructor anything, in lists and loops of its own."""
    total = 0
    for i, (key, value) in enumerate(_values(config, "")):
        if i == _MOST_VALUES:
            raise InputError(f"{CONFIG_FILE} has more than {_MOST_VALUES:,} values: that is no model's configuration")
        if isinstance(value, str) and len(value) > _LONGEST_ARGUMENT and key.startswith("model_args"):
            raise InputError(f"{quoted(key)} in {CONFIG_FILE} is a text of {len(value):,} characters: no model's is")
        if not isinstance(value, (int, float)):
            continue
        classes = _CLASSES.search(key)
        most = _MOST_CLASSES if classes else _LARGEST_SIDE if _SIDE.search(key) else _LARGEST
        if not abs(value) <= most:  # no NaN is
            raise InputError(f"{quoted(key)} in {CONFIG_FILE} is {quoted(value)}: no model's is above {most:,}")
        total += 0 if classes else abs(value)
    if total > _LARGEST_SUM:
        raise InputError(f"the numbers in {CONFIG_FILE} add up to {total:,.0f}: no model's are above {_LARGEST_SUM:,}")


def _values(data: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _values(value, f"{key}.{name}" if key else name)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, key)
    else:
        yield key, data


def _read_header(file: Path) -> dict[str, _Stored]:
    """Types and shapes of the tensors, from the header alone; safetensors itself checks it against the length of the file."""
    try:
        check_header(file, _MAX_HEADER_BYTES)
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            if len(names) > _MAX_TENSORS:
                raise InputError(f"{file.name} holds {len(names):,} tensors: no model has more than {_MAX_TENSORS:,}")
            slices = {name: weights.get_slice(name) for name in names}
            return {
                name: _Stored(part.get_dtype().startswith(("F", "BF")), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file.name} is not a complete safetensors file ({one_line(error)}): get it again") from error


def _describe(folder: Path, stored: dict[str, _Stored]) -> nn.Module:
    """The model that timm will build, on the meta device, where it is not far larger than the weights that there are."""
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    # timm's constructors make 7,900 calls for each of their tensors at most, and tensors of 3.3 times their weights in all.
    full = sum(0 not in tensor.shape for tensor in stored.values())
    calls, elements = min(1_000_000 + 20_000 * full, 40_000_000), 4 * held + 2**25
    try:
        empty = build_empty(lambda: timm.create_model(f"local-dir:{folder}"), calls=calls, elements=elements)
    except Exception as error:  # whatever a constructor makes of arguments that anybody may have written
        raise InputError(f"{CONFIG_FILE} can't be built ({one_line(error)})") from error
    if empty is None:
        raise InputError(f"{CONFIG_FILE} describes a far larger model than {WEIGHTS_FILE} holds, which has {held:,} weights")
    return empty


def _check_fit(empty: nn.Module, stored: dict[str, _Stored], *, ours: bool) -> None:
    """Refuse what timm would load in part, or changed: a new head, resized embeddings, weights that aren't there.

    Args:
        empty: the model, on the meta device.
        stored: the tensors of its file.
        ours: whether this package wrote it. Of others, timm converts names and layouts.
    """
    classes = empty.pretrained_cfg.get("num_classes")
    if classes != empty.num_classes:
        raise InputError(f"{CONFIG_FILE} says num_classes {quoted(classes)} and builds {empty.num_classes}: make them agree")
    if empty.num_classes < 1:
        raise InputError(f"{CONFIG_FILE} describes a model of no classes: a joint energy model is a classifier")
    described = empty.state_dict()
    unexpected = sorted(stored.keys() - described.keys())
    # A frozen BatchNorm doesn't count its batches, and BatchNorm itself starts from none where it finds no count.
    missing = sorted(name for name in described.keys() - stored.keys() if not name.endswith("num_batches_tracked"))
    if missing and (ours or not unexpected):
        raise InputError(f"{WEIGHTS_FILE} lacks {quoted(missing)}, which the model of {CONFIG_FILE} has")
    if unexpected and ours:
        raise InputError(f"{WEIGHTS_FILE} holds {quoted(unexpected)}, which the model of {CONFIG_FILE} has not")
    heads = empty.pretrained_cfg.get("classifier") if empty.pretrained_cfg.get("label_offset") else None
    cut = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads or []))  # timm drops a background class
    for name in described.keys() & stored.keys():
        wanted, (floating, shape) = described[name], stored[name]
        if floating != wanted.is_floating_point():
            raise InputError(f"{WEIGHTS_FILE} holds {quoted(name)} as {'' if floating else 'no '}floating point numbers")
        theirs = tuple(wanted.shape)
        if not (shape == theirs if ours else math.prod(shape) == wanted.numel() or name.startswith(cut)):
            raise InputError(f"{WEIGHTS_FILE} holds {quoted(name)} of shape {shape}, the model of {CONFIG_FILE} has {theirs}")
