"""The folder that two readers share: timm's own files, with everything of ours under one key of its config.json.

``model.safetensors`` and ``config.json`` are what ``timm.models.save_for_hf`` writes, so that plain timm reads them, but with
the number of classes in one place only, so that transformers reads them, too. A ``replay_buffer.safetensors`` and a
``chain_starts.safetensors`` may stand beside them. Nothing here reads or writes a pickle.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_jem.errors import InputError, one_line, quoted
from timm_jem.files import as_path, folder_aside, move_in
from timm_jem.gaussians import STARTS_FILE, ClassGaussians
from timm_jem.hub.published_chains import CHAINS_FILE, PublishedChains
from timm_jem.hub.reading import CONFIG_FILE, FORMAT_VERSION, KEY, MAX_CONFIG_BYTES, check_finite, check_nesting, read_folder

__all__ = ["write_folder"]


def write_folder(
    backbone: nn.Module,
    folder: str | os.PathLike,
    ours: dict[str, Any],
    *,
    class_names: list[str] | None,
    data_config: dict[str, Any],
    chains: PublishedChains | None = None,
    starts: ClassGaussians | None = None,
) -> None:
    """Write a model that plain timm rebuilds faithfully; or raise, and leave the folder as it was.

    The files are written aside, read back by timm, compared with ``backbone`` on its logits, and moved in whole. Other
    files of the folder are left alone; published chains and starts of an older model are removed. A process that is killed
    leaves the model that was there, the new one, or a folder without config.json, which every reader refuses.

    Args:
        backbone: the timm model, in any layout, compiled or wrapped for distribution; it is not changed.
        folder: made if it isn't there.
        ours: JSON data to keep with it.
        class_names: names of the classes, or None.
        data_config: timm's data configuration.
        chains: published chains, or None.
        starts: where fresh chains start, or None for noise.

    Raises:
        InputError: a backbone that plain timm would rebuild as another function, or can't rebuild; a full disk.
    """
    target = as_path(folder)
    if getattr(unwrap_model(backbone), "pretrained_cfg", None) is None:
        kind = type(unwrap_model(backbone)).__name__
        raise InputError(f"this backbone is a {kind} and no model of timm, which couldn't rebuild it: save jem.state_dict()")
    _check_json(ours)
    backbone = _copied(backbone)
    # Names go to the top of the file, once; those that timm keeps are those of before.
    backbone.pretrained_cfg = {k: v for k, v in backbone.pretrained_cfg.items() if k != "label_names"}
    try:
        if target.exists() and not target.is_dir():
            raise InputError(f"{target} is a file: give a folder to save to")
        with folder_aside(target) as aside:
            try:
                save_for_hf(
                    backbone,
                    aside,
                    model_config={
                        KEY: {
                            "format_version": FORMAT_VERSION,
                            **ours,
                            "starts": starts is not None,
                            "chains": chains is not None,
                        },
                        "label_names": class_names,
                    },
                    data_config=data_config,
                    safe_serialization=True,
                )
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                remedy = "; give timm a layer's name instead, such as 'silu', or save jem.state_dict()"
                remedy = remedy if "is not serializable" in str(error) else ""
                raise InputError(f"this backbone can't be saved for timm: {one_line(error).rstrip('.')}{remedy}") from error
            _number_classes_once(aside / CONFIG_FILE)
            _check_faithful(backbone, aside, tuple(data_config["input_size"]))
            for name, part in (ours_beside := {CHAINS_FILE: chains, STARTS_FILE: starts}).items():
                if part is not None:
                    save_file(part.tensors(), aside / name)
            for file in aside.iterdir():  # safetensors gives its files to their owner alone
                shutil.copymode(aside / CONFIG_FILE, file)
            move_in(aside, target, last=CONFIG_FILE, stale=[name for name, part in ours_beside.items() if part is None])
    except (OSError, SafetensorError) as error:
        raise InputError(f"the model can't be written to {target} ({one_line(error)}): make room, or give another") from error


def _check_json(ours: dict[str, Any]) -> None:
    try:
        length = len(json.dumps(ours, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"provenance is not JSON ({one_line(error)}): keep only dicts, lists, text, finite numbers and None in it"
        ) from error
    check_nesting(ours, "provenance")
    if length > MAX_CONFIG_BYTES // 2:  # indented, and with the classes' names, it is longer
        raise InputError(f"provenance is JSON of {length:,} characters: keep it below {MAX_CONFIG_BYTES // 2:,}")


def _copied(backbone: nn.Module) -> nn.Module:
    """The timm model itself on the CPU, contiguous, since safetensors refuses the strides of channels_last."""
    backbone = unwrap_model(backbone)
    for name, tensor in backbone.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"this model holds {quoted(name)}, which is no tensor: save it before it is quantised")
        if tensor.is_meta:
            raise InputError("this model is on the meta device and has no weights to save: build it on a real device")
    try:
        backbone = copy.deepcopy(backbone).to("cpu", memory_format=torch.contiguous_format)
    except Exception as error:  # anything may hang on a module that was trained, such as a tracker's hooks
        raise InputError(
            f"this backbone can't be copied ({one_line(error)}): remove hooks, old weight norms and tensors with a graph first"
        ) from error
    check_finite(backbone, "this model has")
    backbone.register_state_dict_post_hook(_untie)
    return backbone


def _untie(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    """Give each name its own tensor: safetensors refuses shared ones, and a constructor that ties them reads either."""
    seen = set()
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())


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
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and saving is no step of a run
            rebuilt, _ = read_folder(folder)
    except InputError as error:
        raise InputError(f"this {name} is not what its name and arguments build ({error}); {remedy}") from error
    x = torch.rand(2, *input_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        with torch.no_grad():
            expected, actual = (model.double().eval()(x) for model in (backbone, rebuilt))
    except Exception as error:  # layers that were replaced may not fit those around them
        raise InputError(f"this {name} takes no images of {input_size} ({one_line(error)}); {remedy}") from error
    if not expected.isfinite().all():
        raise InputError(f"this {name} gives logits that are not finite: its weights are broken and are not saved")
    if expected.shape != actual.shape or (expected - actual).abs().max() > 1e-6 * expected.abs().max():
        raise InputError(f"this {name} computes other logits than the one that timm builds from its saved files; {remedy}")
