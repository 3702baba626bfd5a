"""The folder that two readers share: timm's own files, with everything of ours under one key of its config.json.

``model.safetensors`` and ``config.json`` are what ``timm.models.save_for_hf`` writes, so that plain timm reads them, but with
the number of classes in one place only, so that transformers reads them, too. A ``replay_buffer.safetensors`` may stand
beside them. Nothing here reads or writes a pickle.
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from timm_jem.errors import InputError, one_line
from timm_jem.files import folder_aside
from timm_jem.hub.published_chains import CHAINS_FILE, PublishedChains
from timm_jem.models.names import BUILD_ERRORS, check_name

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "WEIGHTS_FILE", "read_folder", "write_folder"]

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_KEY = "timm_jem"
# Larger whole numbers in a config are no layer's width, depth or image size.
_LARGEST = 2**20
_MAX_CONFIG_BYTES = 16 * 2**20
# Arguments of timm's factory that say how to load, not what to build.
_LOADING_ARGUMENTS = {"features_only", "feature_cfg", "kwargs_filter", "checkpoint_path", "cache_dir"}


def write_folder(
    backbone: nn.Module,
    folder: str | os.PathLike,
    ours: dict[str, Any],
    *,
    class_names: list[str] | None,
    data_config: dict[str, Any],
    chains: PublishedChains | None = None,
) -> None:
    """Write a model that plain timm rebuilds faithfully; or raise, and leave the folder as it was.

    The files are written aside, read back by timm, compared with ``backbone`` on its logits, and moved in whole. Other
    files of the folder are left alone; published chains of an older model are removed.

    Args:
        backbone: the timm model, in any layout, compiled or wrapped for distribution; it is not changed.
        folder: made if it isn't there.
        ours: JSON data to keep with it.
        class_names: names of the classes, or None.
        data_config: timm's data configuration.
        chains: published chains, or None.

    Raises:
        InputError: a backbone that plain timm would rebuild as another function, or can't rebuild; a full disk.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: give a folder to save to")
    try:
        json.dumps(ours)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"provenance is not JSON ({one_line(error)}): keep only dicts, lists, text, numbers and None in it"
        ) from error
    backbone = unwrap_model(backbone)
    if any(tensor.is_meta for tensor in backbone.state_dict().values()):
        raise InputError("this model is on the meta device and has no weights to save: build it on a real device")
    # A contiguous copy: safetensors refuses the strides of channels_last.
    backbone = copy.deepcopy(backbone).to("cpu", memory_format=torch.contiguous_format)
    if class_names is not None:  # they go to the top of the file, once
        backbone.pretrained_cfg = {k: v for k, v in backbone.pretrained_cfg.items() if k != "label_names"}
    try:
        with folder_aside(target) as aside:
            try:
                save_for_hf(
                    backbone,
                    aside,
                    model_config={_KEY: {"format_version": FORMAT_VERSION, **ours}, "label_names": class_names},
                    data_config=data_config,
                    safe_serialization=True,
                )
            except (TypeError, ValueError) as error:
                raise InputError(f"this backbone can't be saved for timm: {one_line(error)}") from error
            _number_classes_once(aside / CONFIG_FILE)
            _check_faithful(backbone, aside, tuple(data_config["input_size"]))
            if chains is not None:
                chains.save(aside / CHAINS_FILE)
            target.mkdir(exist_ok=True)
            for file in aside.iterdir():
                os.replace(file, target / file.name)
            if chains is None:
                (target / CHAINS_FILE).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the model can't be written to {target} ({one_line(error)}): make room, or give another") from error


def _number_classes_once(file: Path) -> None:
    """Leave ``num_classes`` at the top only: transformers hands both to timm, as one argument given twice."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _check_faithful(backbone: nn.Module, folder: Path, input_size: tuple[int, int, int]) -> None:
    """Compare logits in float64: rounding is then far below what any replaced layer would change."""
    name = backbone.pretrained_cfg["architecture"]
    remedy = "plain timm can't rebuild it: undo the change to its layers, or make it by arguments of timm.create_model"
    try:
        rebuilt, _ = read_folder(folder)
    except InputError as error:
        raise InputError(f"this {name} is not what its name and arguments build ({error}); {remedy}") from error
    x = torch.rand(2, *input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, actual = (model.double().eval()(x) for model in (backbone, rebuilt))
    if not expected.isfinite().all():
        raise InputError(f"this {name} gives logits that are not finite: its weights are broken and are not saved")
    if expected.shape != actual.shape or (expected - actual).abs().max() > 1e-6 * expected.abs().max():
        raise InputError(f"this {name} computes other logits than the one that timm builds from its saved files; {remedy}")


def read_folder(folder: str | os.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone in eval mode, with its weights, and what this package keeps with it.

    Nothing in the folder is trusted: sizes are compared with the weights there are, on the meta device, before any
    memory is taken, and only JSON and safetensors are read.

    Raises:
        InputError: files that are missing, broken, of a newer format, or disagree with each other.
    """
    folder = Path(folder)
    config = _read_config(folder)
    ours = config.get(_KEY, {})
    for key in ("sgld", "provenance"):
        if not isinstance(ours.get(key, {}), dict):
            raise InputError(f"{_KEY}.{key} in {CONFIG_FILE} is a {type(ours[key]).__name__}, not a dict")
    version = ours.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{CONFIG_FILE} has format version {version!r}, this timm_jem reads {FORMAT_VERSION}: upgrade timm_jem"
        )
    _check_sizes(config, _shapes(folder / WEIGHTS_FILE))
    try:
        backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except BUILD_ERRORS as error:
        raise InputError(f"{CONFIG_FILE} and {WEIGHTS_FILE} don't fit each other ({one_line(error)})") from error
    return backbone.eval(), ours


def _read_config(folder: Path) -> dict[str, Any]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(
                f"no {file}: a model saved by save_pretrained, or by timm as safetensors, has one; no pickle is read"
            )
    if (folder / CONFIG_FILE).stat().st_size > _MAX_CONFIG_BYTES:
        raise InputError(f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES >> 20} MiB: that is no model's configuration")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{CONFIG_FILE} is not JSON ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise InputError(f"{CONFIG_FILE} holds a {type(config).__name__}: a model's configuration is an object")
    kinds = {"architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict, _KEY: dict}
    for key, kind in kinds.items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            raise InputError(f"{key} in {CONFIG_FILE} is a {type(config[key]).__name__}, not a {kind.__name__}")
    architecture = config.get("architecture", "")
    if ":" in architecture:
        raise InputError(f"the architecture {architecture!r} in {CONFIG_FILE} is not the name of a timm model")
    check_name(architecture)
    for key in config.get("model_args", {}):
        if key in _LOADING_ARGUMENTS or key.startswith("pretrained"):
            raise InputError(f"model_args in {CONFIG_FILE} has {key!r}, which no saved model needs")
    for key in ("model_args", "pretrained_cfg"):
        if not _moderate(config.get(key, {})):
            raise InputError(f"{key} in {CONFIG_FILE} has a number above {_LARGEST} or is nested too deep: it is no model's")
    return config


def _moderate(data: Any, depth: int = 0) -> bool:
    if isinstance(data, (dict, list)):
        return depth < 20 and all(_moderate(item, depth + 1) for item in (data.values() if isinstance(data, dict) else data))
    return not isinstance(data, (int, float)) or abs(data) <= _LARGEST  # no NaN is


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes from the header alone; safetensors itself checks it against the length of the file."""
    try:
        with safe_open(file, framework="pt") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file.name} is not a complete safetensors file ({one_line(error)}): get it again") from error


def _check_sizes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Build the model without memory, and compare its size with that of its weights."""
    allowed, stored = 4 * len(shapes) + 1000, sum(map(math.prod, shapes.values()))
    built = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        built += 1
        if built > allowed:
            raise InputError(f"{CONFIG_FILE} describes a far larger model than {WEIGHTS_FILE} holds")

    hook = register_module_parameter_registration_hook(count)
    arguments = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    try:
        with torch.device("meta"):
            empty = timm.create_model(config["architecture"], pretrained=False, **arguments)
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"{CONFIG_FILE} can't be built ({one_line(error)})") from error
    finally:
        hook.remove()
    # Where they differ, timm would quietly build a new head.
    if config.get("num_classes", empty.num_classes) != empty.num_classes:
        raise InputError(
            f"{CONFIG_FILE} says num_classes {config['num_classes']} and builds {empty.num_classes}: make them agree"
        )
    described = sum(tensor.numel() for tensor in empty.state_dict().values())
    if described > 2 * stored + _LARGEST:
        raise InputError(f"{CONFIG_FILE} describes {described:,} weights and {WEIGHTS_FILE} holds {stored:,}")
