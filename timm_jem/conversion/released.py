"""From a released checkpoint to a joint energy model, and what to tell of it."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from timm_jem.conversion.checkpoint import read_checkpoint
from timm_jem.conversion.layouts import LAYOUTS, Translated, bare_names, named, tell_layout, translate, without_wrappers
from timm_jem.conversion.methods import METHODS, head_untouched, methods_of
from timm_jem.errors import InputError, quoted
from timm_jem.files import sha256
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.inputs import is_floats, kind
from timm_jem.model import JEM
from timm_jem.sampling import SGLDConfig
from timm_jem.version import __version__
from timm_jem.wrap import wrap

__all__ = ["Conversion", "convert"]

_Path = tuple[str | int, ...]
_CHAINS = "replay_buffer"
_CLASSIFIER_ALONE = "none: they were another head's, which is dropped, and the classifier alone is converted"
_SIDE, _LARGEST_SIDE = 32, 256  # of images: where no chains tell it, and as no chain of these methods is
_DEEPEST = 3  # where weights may be in a file: ["model"]["logp_net"]
# Entries of a file beside its weights and chains, which only its own training needs.
_OF_TRAINING = re.compile(
    r"(\w*_)?(optim\w*|sched\w*|scaler|args|opts?|config|best\w*|acc\w*|loss\w*|metrics?|generator|g|rng\w*)"
)


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        jem: the model, in eval mode, with its chains and how it came to be.
        method: of :data:`METHODS`.
        lines: what there is to know of it, for a reader.
    """

    jem: JEM
    method: str
    lines: list[str]


def convert(
    file: str | os.PathLike,
    method: str | None = None,
    *,
    entry: str | None = None,
    energies: str | None = None,
    conditional_chains: bool = False,
    num_steps: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    replay_buffer: bool = True,
) -> Conversion:
    """Read a checkpoint of one of :data:`METHODS`; every tensor of it is used, or known to be needless.

    Args:
        file: as the authors released it.
        method: whose it is; None: as its names and shapes tell.
        entry: the entry of the file that has the weights, as "model.logp_net"; None: the only one that can be.
        energies: "logsumexp": the density is that of the logits; "none": it is not, as where the model was trained with the
            code's "uncond" flag and its energies were those of another head, so that the classifier alone is converted; None:
            as method and file tell.
        conditional_chains: whether training drew chains of E(x, y): a chain's class is then by its place.
        num_steps: of a chain, instead of the method's.
        mean, std: of the network's input, [0, 1] pixel units, instead of the method's.
        replay_buffer: with the chains, where the file has some.

    Raises:
        InputError: a file that can't be read, or is of another method, or has a tensor that the method's have not.
    """
    file = Path(file)
    if method is not None and method not in METHODS:
        raise InputError(f"method is {quoted(method)}: give one of {', '.join(METHODS)}")
    if energies not in (None, "logsumexp", "none"):
        raise InputError(f"energies is {quoted(energies)}: give logsumexp or none")
    checkpoint = read_checkpoint(file)
    try:
        weights, dropped = _weights(checkpoint, entry)
        layout = tell_layout(weights)
        method = _method(method, layout, weights)
        about = METHODS[method]
        energies, of_energies = _energies(method, energies, weights)
        network = translate(weights, LAYOUTS[layout])
        buffer, of_chains = None, None
        if replay_buffer and energies == "logsumexp" and _CHAINS in checkpoint:
            buffer = _checked(checkpoint[_CHAINS], network.kwargs["in_chans"])
        elif conditional_chains:
            raise InputError("it has no chains to give classes, or they are left out: leave conditional_chains out, too")
        elif _CHAINS in checkpoint:
            dropped["chains"] = [_CHAINS]
        shape = (network.kwargs["in_chans"], *((_SIDE, _SIDE) if buffer is None else buffer.shape[2:]))
        jem = _built(network, shape, about.mean if mean is None else mean, about.std if std is None else std)
        if buffer is not None:
            jem.chains, of_chains = _chains(jem.denormalize(buffer), conditional_chains, jem.num_classes)
        jem.sgld, source = about.sgld(file.name, shape)
        if energies == "none":
            jem.sgld, source = SGLDConfig(), "JEM's, of no use for these energies"
        if num_steps is not None:
            jem.sgld, source = replace(jem.sgld, num_steps=num_steps), f"{source}; num_steps as asked for"
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    told = [
        f"network: {_network(network)}, {sum(p.numel() for p in jem.parameters()):,} parameters, {jem.num_classes} "
        f"classes, images of {jem.input_size}, mean {_numbers(jem.mean)}, std {_numbers(jem.std)}",
        f"energies: {of_energies}",
        *([f"chains: {of_chains}"] if of_chains else []),
        *(f"dropped: {named(names)} ({reason})" for reason, names in (dropped | network.dropped).items()),
        f"sgld: {_settings(jem.sgld)} ({source})",
        f"claimed by its authors, not measured here: {about.claims}",
        *([f"to draw images: {about.samples}"] if about.samples and energies == "logsumexp" else []),
    ]
    jem.provenance = {
        "converted": {
            "file": file.name,
            "sha256": sha256(file),
            "method": about.title,
            "energies": energies,
            "chains": "trained" if about.chains and energies == "logsumexp" else "none",
            "told": told,
        },
        "versions": {"timm_jem": __version__, "timm": timm.__version__, "torch": torch.__version__},
    }
    return Conversion(jem, method, told)


def _network(network: Translated) -> str:
    sizes = [f"{name} {network.kwargs[name]}" for name in ("depth", "width") if name in network.kwargs]
    return " of ".join([network.name, *([" and ".join(sizes)] if sizes else [])])


def _numbers(values: Tensor) -> str:
    return "/".join(dict.fromkeys(f"{value:.4g}" for value in values.flatten().tolist()))


def _settings(sgld: SGLDConfig) -> str:
    """Those of every chain, and what differs from the defaults."""
    always = ("num_steps", "step_size", "noise_std")
    values = {field: getattr(sgld, field.name) for field in fields(sgld)}
    return ", ".join(f"{f.name} {value:.4g}" for f, value in values.items() if f.name in always or value != f.default)


def _weights(checkpoint: Mapping[Any, Any], entry: str | None) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The only dict of weights with a known layout, by their bare names, and the names of what stands beside it.

    Raises:
        InputError: none or several, or something beside it that may be a part of the network.
    """
    entries = dict(_entries(checkpoint))
    known = {".".join(map(str, path)): path for path, data in entries.items() if tell_layout(without_wrappers(data))}
    if entry is not None and entry not in known:
        raise InputError(f"it has no weights of these methods in {quoted(entry)}: they are in {quoted(list(known))}")
    if not known:
        names = [str(name) for data in entries.values() for name, value in data.items() if isinstance(value, Tensor)]
        raise InputError(f"it holds {quoted(names[:3])} and the like: no network of {', '.join(METHODS)} has such names")
    if entry is None and len(known) > 1:
        raise InputError(f"it holds several weights: give --entry, one of {quoted(list(known))}")
    path = next(iter(known.values())) if entry is None else known[entry]
    weights = {name: value for name, value in entries[path].items() if path or name != _CHAINS}
    beside: dict[str, list[str]] = {}
    for other, value in _beside(checkpoint, path):
        holds = isinstance(value, (dict, list, tuple, Tensor))
        if holds and other not in known.values() and not _OF_TRAINING.fullmatch(str(other[-1])):
            raise InputError(
                f"it holds {quoted('.'.join(map(str, other)))} beside its weights, as no file of these methods does"
            )
        beside.setdefault("not the network's", []).append(".".join(map(str, other)))
    return bare_names(weights), beside


def _beside(checkpoint: Mapping[Any, Any], path: _Path) -> Iterator[tuple[_Path, Any]]:
    """What stands on any level beside the way to an entry, but for the chains."""
    data = checkpoint
    for depth, step in enumerate(path):
        yield from (((*path[:depth], key), value) for key, value in data.items() if key != step and (depth or key != _CHAINS))
        data = data[step]


def _entries(checkpoint: Mapping[Any, Any]) -> Iterator[tuple[_Path, Mapping[Any, Any]]]:
    """Dicts in the file by their keys, each once, the outermost first."""
    level, seen = [((), checkpoint)], set()
    for _ in range(_DEEPEST):
        new = [(path, data) for path, data in level if id(data) not in seen]
        seen |= {id(data) for _, data in new}
        yield from new
        level = [((*path, key), value) for path, data in new for key, value in data.items() if isinstance(value, dict)]


def _method(method: str | None, layout: str, weights: Mapping[str, Tensor]) -> str:
    """The method whose files have these names, as far as they tell.

    Raises:
        InputError: another one was named, or there are several.
    """
    fitting = methods_of(layout, weights)
    if not fitting:
        raise InputError(f"it has the names of {LAYOUTS[layout].title} with another normalisation: no such file was released")
    if method in fitting:
        return method
    right = " or ".join(f"--method {name} ({METHODS[name].title})" for name in fitting)
    if method is not None:
        raise InputError(f"it is no file of {METHODS[method].title}: by its names and shapes it is {right}")
    if len(fitting) > 1 and not _untrained_head(weights):
        raise InputError(f"it may be of several methods: give {right}")
    return fitting[0]  # of SADA-JEM and M-JEM the first, whose energy head has no gradients


def _energies(method: str, energies: str | None, weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Whether the density is logsumexp of the logits, "logsumexp" or "none", and how that is known.

    Raises:
        InputError: the file doesn't tell, and nobody says.
    """
    of_logits, untrained = METHODS[method].energies, _untrained_head(weights)
    if energies is not None:
        return energies, {"logsumexp": "logsumexp of the logits, as asked for", "none": _CLASSIFIER_ALONE}[energies]
    if of_logits:
        return "logsumexp", "logsumexp of the logits"
    if of_logits is None and untrained:
        return "logsumexp", "logsumexp of the logits: the file has no other head that was ever trained"
    if of_logits is False and not untrained:
        return "none", _CLASSIFIER_ALONE
    if untrained:
        raise InputError("its energy head was never trained: give --method sada, or --energies logsumexp if you know better")
    raise InputError(
        "its energy head was trained, as by the code's uncond flag: give --energies none to convert the classifier alone, or "
        "--energies logsumexp if you know that its density is that of the logits"
    )


def _untrained_head(weights: Mapping[str, Tensor]) -> bool:
    """Whether no energy head was ever trained, since there is none or since it is as it was made."""
    weight, bias = (weights.get(f"energy_output.{part}") for part in ("weight", "bias"))
    if weight is None and bias is None:
        return True
    if not (is_floats(weight) and is_floats(bias) and weight.ndim == 2 and weight.shape[0] == 1 and bias.shape == (1,)):
        raise InputError(f"its energy_output has a weight that is {kind(weight)} and a bias that is {kind(bias)}: it is broken")
    return head_untouched(weight, bias)


def _checked(buffer: Any, channels: int) -> Tensor:
    """A replay buffer, as the network takes it, shape (N, C, H, W)."""
    images = is_floats(buffer) and buffer.ndim == 4 and 0 not in buffer.shape and max(buffer.shape[2:]) <= _LARGEST_SIDE
    if not images or buffer.shape[1] != channels:
        raise InputError(f"its {_CHAINS} is {kind(buffer)}, no images of the network: leave it out by --replay_buffer false")
    if not buffer.isfinite().all():
        raise InputError(f"its {_CHAINS} holds numbers that are not finite: leave it out by --replay_buffer false")
    return buffer


def _chains(u: Tensor, conditional: bool, classes: int) -> tuple[PublishedChains, str]:
    """The replay buffer, pixels, in 8 bits, and what became of it."""
    n = len(u)
    if conditional and n % classes:
        raise InputError(f"its {n:,} chains are not as many of each of {classes} classes: they are not conditional")
    labels = torch.arange(n) // (n // classes) if conditional else None
    chains = PublishedChains.of_pixels(u, labels)
    outside = int((u.abs() > 1 + 1e-4).sum())  # and not by rounding
    told = f"{len(chains):,} of {n:,} in 8 bits, {'a class each by their places' if conditional else 'without classes'}; "
    return chains, f"{told}{outside:,} of {u.numel():,} pixels were outside of [-1, 1] and are cut"


def _built(network: Translated, shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> JEM:
    with torch.device("meta"):
        backbone = timm.create_model(network.name, **network.kwargs)
    backbone.load_state_dict(network.state_dict, assign=True)
    return wrap(backbone, input_size=shape, mean=mean, std=std).eval()
