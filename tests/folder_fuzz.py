"""Saved folders, broken at random but seeded, and what becomes of them."""

import copy
import faulthandler
import json
import random
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm_families import SMALLEST

import timm_jem
from timm_jem import InputError, PublishedChains
from timm_jem.hub.card import model_card
from timm_jem.hub.provenance import Provenance

SECONDS, MEBIBYTES = 10, 512  # of one case: of its processor's time, and of the growth of its process
FILES = CONFIG, WEIGHTS, CHAINS = "config.json", "model.safetensors", "replay_buffer.safetensors"
FAMILIES = {
    "vit": (
        "vit_tiny_patch16_224",
        {"input_size": (3, 16, 16), "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 1},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"input_size": (3, 32, 32), "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 1)},
    ),
    "resnet": ("test_resnet", {"input_size": (3, 16, 16)}),
    "wrn": ("wrn_10_1", {"input_size": (1, 8, 8), "act_layer": "silu"}),
}
PROVENANCE = {
    "dataset": "digits",
    "datasets": ["user/digits"],
    "base_model": "timm/resnet18.a1_in1k",
    "license": "mit",
    "command": "accelerate launch recipes/train.py",
    "config": {"train": {"objective": {"w_xy": 1.0}, "steps": 7}},
    "steps": 7,
    "seed": 0,
    "seconds": 12.5,
    "outcome": "finished",
    "rollbacks": [{"step": 3}],
    "versions": {"torch": "2.0"},
    "results": [{"name": "Accuracy", "type": "accuracy", "value": 0.9, "split": "test", "n": 359, "protocol": "top-1"}],
}
ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 64, 1000, 2048, 2**14, 2**20, 2**31, 10**12, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "0", "x", "avg", "gelu", "layernorm", "user/x", "../../x", "\x1b[2J", "a\nb", "\ud800", "x" * 5000),
    *([], {}, [1], [[1]], [None], [0.5] * 3, [3, 16, 16], [1, 2, 1, 1], [2**14] * 4, [1] * 10_000, {"a": 1}, {"": None}),
    json.loads("[" * 60 + "]" * 60),
)
ADDED = {
    "model_args": (
        *("img_size", "window_size", "depth", "depths", "embed_dim", "patch_size", "num_heads", "mlp_ratio", "in_chans"),
        *("num_classes", "global_pool", "act_layer", "norm_layer", "drop_rate", "drop_path_rate", "class_token", "reg_tokens"),
        *("dynamic_img_size", "strict_img_size", "pos_embed", "qkv_bias", "init_values", "layers", "channels", "stem_width"),
        *("stem_type", "cardinality", "base_width", "output_stride", "block_fn", "aa_layer", "down_kernel_size", "width"),
        *("device", "dtype", "features_only", "out_indices", "pretrained", "pretrained_cfg", "pretrained_strict", "cache_dir"),
        *("checkpoint_path", "scriptable", "exportable", "no_jit", "model_name", "variant", "model_cls", "pruned", "kwargs"),
        *("num_features", "embed_layer", "weight_init", "fix_init", "fc_norm", "pool_type", "ape", "patch_norm", "use_naflex"),
    ),
    "pretrained_cfg": (
        *("num_classes", "input_size", "fixed_input_size", "mean", "std", "classifier", "first_conv", "label_offset"),
        *("label_names", "label_descriptions", "architecture", "tag", "custom_load", "url", "file", "hf_hub_id", "source"),
        *("hf_hub_filename", "state_dict", "pool_size", "test_input_size", "min_input_size", "crop_pct", "interpolation"),
        *("license", "notes", "global_pool", "colour"),
    ),
    "timm_jem": ("format_version", "sgld", "provenance", "reference", "colour"),
    "": ("num_classes", "architecture", "architectures", "model_args", "pretrained_cfg", "label_names", "labels", "timm_jem"),
}


def save_families(root: Path) -> dict[str, dict[str, bytes]]:
    """The files of one model of each family."""
    torch.manual_seed(0)
    saved = {}
    for family, (name, kwargs) in FAMILIES.items():
        jem = timm_jem.create_model(name, num_classes=3, class_names=["a", "b", "c"], **kwargs)
        jem.provenance = PROVENANCE
        jem.chains = PublishedChains.of_pixels(torch.rand(6, *jem.input_size) * 2 - 1, torch.arange(6) % 3)
        jem.save_pretrained(root / family)
        saved[family] = {name: (root / family / name).read_bytes() for name in FILES}
        shutil.rmtree(root / family)
    return saved


def mutated(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes | None]:
    """The same folder with one, two or three faults; None: a file that isn't there."""
    files, kind = dict(files), rng.random()
    if kind < 0.7:
        config = json.loads(files[CONFIG])
        for _ in range(rng.choice((1, 2, 2, 3))):
            (_change_field if rng.random() < 0.6 else _add_field)(config, rng)
        files[CONFIG] = json.dumps(config).encode()
    elif kind < 0.75:
        files[CONFIG] = _change_bytes(files[CONFIG], rng, len(files[CONFIG]))
    elif kind < 0.97:
        name = WEIGHTS if kind < 0.9 else CHAINS
        for _ in range(rng.choice((1, 1, 2))):
            files[name] = _change_tensors(files[name], rng)
    else:
        files[rng.choice(FILES)] = rng.choice((None, b"", b"{}", b"[1]", b"\x80\x04}\x94.", *files.values()))
    return files


def _containers(data: object) -> list[dict | list]:
    found, level = [], [data]
    while level:
        level = [item for item in level if isinstance(item, (dict, list)) and item]
        found += level
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return found


def _odd(config: dict, rng: random.Random) -> object:
    if rng.random() < 0.1:
        return rng.choice(list(SMALLEST.values()))
    if rng.random() < 0.15:
        other = rng.choice(_containers(config))
        return copy.deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
    return copy.deepcopy(rng.choice(ODD))


def _change_field(config: dict, rng: random.Random) -> None:
    if not config:
        return
    parent = rng.choice(_containers(config))
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    value, how = parent[key], rng.random()
    if how < 0.15:
        del parent[key]
    elif how < 0.4 and type(value) in (int, float):
        parent[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, [value], str(value)))
    elif how < 0.5:
        parent[key] = rng.choice(([value], {"a": value}, str(value), [value] * 3))
    else:
        parent[key] = _odd(config, rng)


def _add_field(config: dict, rng: random.Random) -> None:
    part = rng.choice(("model_args", "model_args", "pretrained_cfg", "timm_jem", ""))
    place = config.get(part, {}) if part else config
    if isinstance(place, dict):
        place[rng.choice(ADDED[part])] = _odd(config, rng)
        if part:
            config[part] = place


def _change_bytes(data: bytes, rng: random.Random, within: int) -> bytes:
    how, place = rng.random(), rng.randrange(max(1, min(within, len(data))))
    if how < 0.3:
        return data[:place]
    if how < 0.5:
        return data[:place] + data[place + 1 + rng.randrange(8) :]
    junk = rng.choice((b"\x00", b"\xff", b'"', b"[", b"9" * 30, b"NaN", bytes(rng.randrange(256) for _ in range(4))))
    return data[:place] + junk + data[place + (len(junk) if how < 0.8 else 0) :]


def _change_tensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        header = None
    how = rng.random()
    if how < 0.25 or not isinstance(header, dict) or not header:
        return _change_bytes(data, rng, 8 + length if how < 0.2 else len(data))
    if how < 0.3:
        return rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    name, other = rng.choice(list(header)), rng.choice(list(header))
    entry, value = header[name], rng.choice(ODD)
    if how < 0.4:
        del header[name]
    elif how < 0.5:
        header[rng.choice(("x", "module." + name, "state_dict", "a\nb", "\x1b[2J", name.upper(), ""))] = header.pop(name)
    elif how < 0.55:
        header[name], header[other] = header[other], header[name]
    elif how < 0.6:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header.update({f"e{i}": empty for i in range(rng.choice((1, 10, 1000, 30_000)))})
    elif isinstance(entry, dict) and entry:
        field = rng.choice(list(entry))
        types = ("BOOL", "U8", "I8", "F8_E4M3", "I32", "U32", "F64", "I64", "F16", "BF16", "F32", "C64", "F4")
        if field == "dtype" and rng.random() < 0.8:
            value = rng.choice(types)
        elif field == "shape" and isinstance(entry[field], list) and rng.random() < 0.8:
            value = rng.choice((entry[field][::-1], [*entry[field], 1], entry[field][1:], [2**40], [*entry[field], 0]))
        entry[field] = value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def outcome(folder: Path) -> str:
    """ "loads" where it loads as it is, "refused" where that is said in one line; else what is wrong."""
    try:
        jem = timm_jem.from_pretrained(folder)
    except InputError as error:
        return "refused" if str(error).isprintable() and len(str(error)) < 1500 else f"not one short line: {str(error)[:200]!r}"
    held, state = load_file(folder / WEIGHTS), jem.backbone.state_dict()
    for name, tensor in state.items():
        if name in held:
            if not torch.equal(held[name].to(tensor.dtype).reshape(tensor.shape), tensor):
                return f"{name} is not what the file holds"
        elif not name.endswith("num_batches_tracked"):
            return f"{name} is of nowhere"
    if jem.chains is not None and not torch.equal(jem.chains.images, load_file(folder / CHAINS)["images"]):
        return "the chains are not what the file holds"
    try:
        about = {"repo_id": "user/x", "architecture": "resnet18", "parameters": 1, "class_names": jem.class_names, "sgld": {}}
        shape = {
            "input_size": jem.input_size,
            "num_classes": jem.num_classes,
            "chains": 0 if jem.chains is None else len(jem.chains),
        }
        shape["starts"] = 0 if jem.starts is None else len(jem.starts.means)
        model_card(**about, **shape, provenance=Provenance.read(jem.provenance))
    except InputError:  # provenance that no card can tell is kept, and refused when it is to be published
        pass
    return "loads"


def run_cases(root: Path, cases: Iterable[int]) -> tuple[list[str], Counter]:
    """Faults of these cases, each with its number, and how often which outcome was; ends the process where one hangs."""
    warnings.simplefilter("ignore")
    root.mkdir(parents=True, exist_ok=True)
    saved, faults, counts = save_families(root), [], Counter()
    for case in cases:
        rng = random.Random(case)
        files, folder = mutated(saved[rng.choice(list(FAMILIES))], rng), root / str(case)
        folder.mkdir()
        for name, data in files.items():
            if data is not None:
                (folder / name).write_bytes(data)
        faulthandler.dump_traceback_later(30 * SECONDS, exit=True, file=sys.__stderr__)
        seconds, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = outcome(folder)
        except Exception as error:
            found = f"raised {type(error).__name__}: {str(error)[:300]}"
        seconds = time.process_time() - seconds
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
        faulthandler.cancel_dump_traceback_later()
        if seconds > SECONDS or memory > MEBIBYTES:
            found = f"took {seconds:.0f} s and {memory} MiB; {found}"
        counts[found if found in ("loads", "refused") else "faults"] += 1
        if found not in ("loads", "refused"):
            faults.append(f"case {case}: {found}")
        shutil.rmtree(folder)
    return faults, counts
