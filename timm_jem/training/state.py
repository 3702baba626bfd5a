"""State as trees of dicts, lists, tensors and numbers: copied for rollbacks, written as safetensors and JSON.

Under FSDP a process holds, copies and writes its own shards; nothing here talks to other processes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from timm_jem.errors import InputError, one_line
from timm_jem.files import sha256

__all__ = ["copy_tree", "load_tensors", "load_tree", "local", "save_tree"]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_tree(tree: Any) -> Any:
    """A deep copy in host memory that later training can't change."""
    if isinstance(tree, Tensor):
        return local(tree.detach()).to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, Mapping):
        return {key: copy_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_tree(value) for value in tree)
    return tree


def save_tree(tree: Any, file: str | os.PathLike) -> str:
    """Write a tree as one safetensors file, on disk when this returns, and return its SHA-256.

    Raises:
        TypeError: a leaf that is neither a tensor nor a JSON value.
        OSError, SafetensorError: the file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    save_file(tensors, file, metadata={"tree": json.dumps(_describe(tree, tensors, set()))})
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return sha256(file)


def load_tree(file: str | os.PathLike) -> Any:
    """Read what :func:`save_tree` wrote; tensors on the CPU.

    Raises:
        InputError: a file that is broken or no such tree.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            description = json.loads((stored.metadata() or {})["tree"])
            return _rebuild(description, stored)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{Path(file).name} is not a whole saved state ({one_line(error)}): take an older one") from error


def load_tensors(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into live ones, in place, whatever their layout, device and sharding.

    Raises:
        InputError: other names or shapes.
    """
    differing = sorted(set(target) ^ set(saved)) or [
        name for name, tensor in target.items() if local(tensor).shape != saved[name].shape
    ]
    if differing:
        raise InputError(f"the saved {what} is of another model (see {differing[0]}): resume with the settings of that run")
    with torch.no_grad():
        for name, tensor in target.items():
            local(tensor).copy_(saved[name])


def _describe(tree: Any, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """JSON for the tree; tensors are collected on the way. Containers become [kind, items], since JSON has one kind of key."""
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = _writable(tree, storages)
        return ["tensor", key]
    if isinstance(tree, Mapping):
        return ["dict", [[key, _describe(value, tensors, storages)] for key, value in tree.items()]]
    if isinstance(tree, (list, tuple)):
        return ["tuple" if isinstance(tree, tuple) else "list", [_describe(value, tensors, storages) for value in tree]]
    if isinstance(tree, torch.dtype):
        return ["dtype", str(tree).removeprefix("torch.")]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return ["value", tree]
    raise TypeError(f"a {type(tree).__name__} is no state that can be saved")


def _writable(tensor: Tensor, storages: set[int]) -> Tensor:
    """In host memory, without strides, and sharing none, as safetensors takes tensors: copied only where it isn't so."""
    own = local(tensor.detach())
    storage = own.untyped_storage()
    if not own.is_cpu or not own.is_contiguous() or storage.nbytes() != own.nbytes or storage.data_ptr() in storages:
        return copy_tree(own)
    storages.add(storage.data_ptr())
    return own


def _rebuild(description: Any, stored) -> Any:
    kind, content = description
    if kind == "tensor":
        return stored.get_tensor(content)
    if kind == "dict":
        return {key: _rebuild(value, stored) for key, value in content}
    if kind in ("list", "tuple"):
        values = [_rebuild(value, stored) for value in content]
        return tuple(values) if kind == "tuple" else values
    if kind == "dtype" and not isinstance(getattr(torch, content), torch.dtype):
        raise ValueError(f"{content} is no dtype")
    return getattr(torch, content) if kind == "dtype" else content
