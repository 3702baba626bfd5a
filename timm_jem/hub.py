"""Saving and loading: timm's own folder format, with everything of ours under one key of its config.json."""

import copy
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from timm.models import save_for_hf
from timm.utils import unwrap_model

from timm_jem.errors import InputError
from timm_jem.model import JEM, check_name, wrap
from timm_jem.sampling import SGLDConfig

__all__ = ["FORMAT_VERSION", "from_pretrained", "save"]

FORMAT_VERSION = 1
_KEY = "timm_jem"
_FILES = ("model.safetensors", "config.json")


def save(jem: JEM, save_directory: str | os.PathLike) -> None:
    """Write ``config.json`` and ``model.safetensors`` to a folder that plain timm reads as well.

    ``timm.create_model("local-dir:" + folder, pretrained=True)`` gives the backbone back, bit for bit. The files are
    written aside and moved in whole; other files of the folder are left alone.

    Raises:
        InputError: a backbone without timm configuration, or with arguments that JSON can't hold.
    """
    target = Path(save_directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A contiguous copy: safetensors refuses the strides of channels_last.
    backbone = copy.deepcopy(unwrap_model(jem.backbone)).to("cpu", memory_format=torch.contiguous_format)
    ours = {"format_version": FORMAT_VERSION, "sgld": asdict(jem.sgld), "provenance": jem.provenance}
    data_config = {k: v for k, v in jem.data_config.items() if k != "fixed_input_size"}
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        try:
            save_for_hf(
                backbone,
                aside,
                model_config={_KEY: ours, "label_names": jem.class_names},
                data_config=data_config,
                safe_serialization=True,
            )
        except ValueError as error:
            raise InputError(f"this backbone can't be saved for timm: {error}") from error
        target.mkdir(exist_ok=True)
        for name in _FILES:
            os.replace(aside / name, target / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def from_pretrained(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> JEM:
    """Load a joint energy model from a folder or a Hub repository, in eval mode.

    A plain timm repository works as well: it becomes a joint energy model with the paper's sampling settings.

    Args:
        name: folder written by :meth:`JEM.save_pretrained`, or a Hub repository "user/name".
        revision, token, cache_dir, local_files_only, force_download: as in ``huggingface_hub.snapshot_download``.

    Raises:
        InputError: nothing there, or a folder that is no such model.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    str(name),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    force_download=force_download,
                    allow_patterns=list(_FILES),
                )
            )
        except HFValidationError as error:
            raise InputError(f"{name} is neither a folder nor a Hub repository name: give one of them") from error
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{name} is no folder and can't be had from the Hub: {reason}") from error
    for file in _FILES:
        if not (folder / file).is_file():
            raise InputError(f"{name} has no {file}: it is not a model saved by save_pretrained or by timm as safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"config.json of {name} is not JSON: {error}") from error
    ours = config.get(_KEY, {})
    version = ours.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(f"{name} has format version {version}, this timm_jem reads {FORMAT_VERSION}: upgrade timm_jem")
    check_name(config.get("architecture", ""))
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    jem = wrap(backbone, sgld=SGLDConfig(**ours.get("sgld", {})), provenance=ours.get("provenance"))
    return jem.eval()
