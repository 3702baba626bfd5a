"""The names that the released codes give the weights of their wide residual networks, and ours of :mod:`timm_jem.models`.

Each layout is a table; every tensor of a file has to be in it, as one to keep or one to drop, or the file is refused by that
name. Depth and width come from the shapes.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from timm_jem.errors import InputError, quoted
from timm_jem.inputs import is_floats, kind

__all__ = ["LAYOUTS", "Layout", "Translated", "bare_names", "named", "tell_layout", "translate", "without_wrappers"]

_WEIGHT = "(?P<part>weight|bias)"
_NORM = "(?P<part>weight|bias|running_mean|running_var|num_batches_tracked)"
_STAGE = "(?P<stage>[123])"
_BLOCK = r"(?P<block>0|[1-9]\d{0,2})"
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model)\.)+")
_MOST_NAMED = 5


class Layout(NamedTuple):
    """How one of the codes names its tensors; patterns match whole names.

    Attributes:
        title: what has it.
        mark: a name that tells it from the others.
        network: our networks of this kind: "" for JEM's variant, "_original" for the first one.
        kept: patterns, and our names by their groups; stages count from one there and from zero here.
        copies: patterns of tensors that are there a second time, and by their groups the name of the first.
        dropped: patterns, and why nothing needs them.
        refused: patterns, and why no network of ours is the file's.
    """

    title: str
    mark: str
    network: str
    kept: Mapping[str, str]
    copies: Mapping[str, str]
    dropped: Mapping[str, str]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Translated:
    """A network of ours: what ``timm.create_model`` builds it from, and its weights.

    Attributes:
        name: of the architecture.
        kwargs: its other arguments.
        state_dict: weights, float32, and counts, int64, in memory of their own.
        dropped: their names for what was left out, by the reason.
    """

    name: str
    kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    dropped: dict[str, list[str]] = field(default_factory=dict)


def _of_jem(prefix: str, head: str) -> dict[str, str]:
    """The network of JEM's code, on which those of JEM++, SADA-JEM, M-JEM and VERA build."""
    stage = rf"{prefix}\.layer{_STAGE}\."
    return {
        rf"{prefix}\.conv1\.{_WEIGHT}": "stem.{part}",
        rf"{stage}{_BLOCK}\.conv(?P<n>[12])\.{_WEIGHT}": "stages.{stage}.{block}.conv{n}.{part}",
        rf"{stage}{_BLOCK}\.bn(?P<n>[12])\.{_NORM}": "stages.{stage}.{block}.norm{n}.{part}",
        rf"{stage}0\.shortcut\.0\.{_WEIGHT}": "stages.{stage}.0.shortcut.{part}",
        rf"{prefix}\.bn1\.{_NORM}": "norm.{part}",
        rf"{head}\.{_WEIGHT}": "fc.{part}",
    }


_LARGER_OR_ACTNORM = {
    r".*\.layer4\..*": "a fourth stage, for images of 64 pixels and more, which no network here has",
    r".*\.(loc|scale|initialized)": "activation normalisation, which no network here has",
}
_HEADS = {r"energy_output\.(weight|bias)": "head of energies", r"f\.linear\.(weight|bias)": "head that nothing uses"}

LAYOUTS = {
    "jem": Layout(
        "JEM, SADA-JEM and M-JEM", "f.conv1.weight", "", _of_jem("f", "class_output"), {}, _HEADS, _LARGER_OR_ACTNORM
    ),
    "jempp": Layout(
        "JEM++",
        "f.other_layers.0.0.conv1.weight",
        "",
        _of_jem("f", "class_output"),
        {
            r"f\.layer_one\.(?:0\.)?(?P<part>weight|bias)": "f.conv1.{part}",
            r"f\.other_layers\.(?P<stage>[012])\.(?P<rest>\d+\..*)": "f.layer{stage}.{rest}",
            r"f\.other_layers\.3\.(?P<part>\w+)": "f.bn1.{part}",
        },
        _HEADS,
        _LARGER_OR_ACTNORM,
    ),
    "vera": Layout(
        "VERA",
        "logp_net.conv1.weight",
        "",
        _of_jem("logp_net", r"logp_net\.linear"),
        {},
        {r"generator\..*": "generator"},
        {r"logp_net\.(.*\.)?bn[12]\..*": "normalisation, which its first block leaves out and no network here does"}
        | _LARGER_OR_ACTNORM,
    ),
    "dat": Layout(
        "DAT and other robust classifiers",
        "block1.layer.0.conv1.weight",
        "_original",
        {
            r"conv1\.(?P<part>weight)": "stem.{part}",
            rf"block{_STAGE}\.layer\.{_BLOCK}\.conv(?P<n>[12])\.(?P<part>weight)": "stages.{stage}.{block}.conv{n}.{part}",
            rf"block{_STAGE}\.layer\.{_BLOCK}\.bn(?P<n>[12])\.{_NORM}": "stages.{stage}.{block}.norm{n}.{part}",
            rf"block{_STAGE}\.layer\.0\.convShortcut\.(?P<part>weight)": "stages.{stage}.0.shortcut.{part}",
            rf"bn1\.{_NORM}": "norm.{part}",
            rf"fc\.{_WEIGHT}": "fc.{part}",
        },
        {},
        {"n_averaged": "count of the moving average", r"sub_block1\..*": "block that nothing uses"},
        {},
    ),
}


def bare_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by their names without what wraps networks, see :func:`without_wrappers`.

    Raises:
        InputError: two of one name, or something else than a tensor.
    """
    bare: dict[str, Any] = {}
    for name, tensor in weights.items():
        (short,) = without_wrappers([name])
        if short in bare:
            raise InputError(f"it holds {quoted(short)} twice, with and without a prefix")
        if not isinstance(tensor, Tensor):
            raise InputError(f"it holds {quoted(short)}, which is {kind(tensor)} among weights")
        bare[short] = tensor
    return bare


def without_wrappers(names: Iterable[Any]) -> list[str]:
    """Names without what DataParallel, moving averages and compilers put before them."""
    return [_WRAPPERS.sub("", str(name)) for name in names]


def tell_layout(names: Container[str]) -> str | None:
    """Which of :data:`LAYOUTS` has such bare names; None: none has."""
    told = [layout for layout, table in LAYOUTS.items() if table.mark in names]
    return told[-1] if told else None  # a network of JEM++ is one of JEM as well


def translate(weights: Mapping[str, Tensor], layout: Layout) -> Translated:
    """Weights by their bare names, as a network of ours.

    Raises:
        InputError: a tensor that the layout has not, or lacks, or that is of another shape or type, or not finite.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    dropped: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in weights.items():
        if (refused := _matched(name, layout.refused)) is not None:
            raise InputError(f"it has {refused[0]}: {quoted(name)}")
        if (kept := _matched(name, layout.kept)) is not None:
            found[_filled(*kept, stages_from=-1)] = name, tensor
        elif (copy := _matched(name, layout.copies)) is not None:
            first = _filled(*copy, stages_from=1)
            if first not in weights or not torch.equal(weights[first], tensor):
                raise InputError(f"{quoted(name)} is not the same as {quoted(first)}, as it is in files of {layout.title}")
            dropped.setdefault("second copies", []).append(name)
        elif (reason := _matched(name, layout.dropped)) is not None:
            dropped.setdefault(reason[0], []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise InputError(f"it has {named(unknown)} that no file of {layout.title} has")
    name, kwargs = _network(found, layout)
    state_dict = {ours: _own(theirs, tensor) for ours, (theirs, tensor) in found.items()}
    _complete(state_dict, {ours: theirs for ours, (theirs, _) in found.items()}, name, kwargs)
    return Translated(name, kwargs, state_dict, dropped)


def _matched(name: str, table: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """What a table says of a name, and the groups of the pattern."""
    for pattern, value in table.items():
        if (match := re.fullmatch(pattern, name)) is not None:
            return value, match.groupdict()
    return None


def _filled(template: str, groups: dict[str, str], *, stages_from: int) -> str:
    if "stage" in groups:
        groups = {**groups, "stage": str(int(groups["stage"]) + stages_from)}
    return template.format(**groups)


def named(names: list[str]) -> str:
    """The first of them in a line, escaped, since anybody may have written them."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(quoted(name) for name in sorted(names)[:_MOST_NAMED]) + more


def _network(found: Mapping[str, tuple[str, Tensor]], layout: Layout) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments by the shapes."""
    shapes = {name: tuple(tensor.shape) for name, (_, tensor) in found.items()}
    for name, dimensions in (("stem.weight", 4), ("stages.0.0.conv1.weight", 4), ("fc.weight", 2)):
        if name not in shapes:
            raise InputError(f"it lacks the weights that are {name} here: it is cut, or no such wide residual network")
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise InputError(f"{quoted(found[name][0])} is of shape {shapes[name]}: no wide residual network's is")
    if (channels := shapes["stem.weight"][1]) not in (1, 3):
        raise InputError(f"it takes images of {channels} channels: they have 1 or 3")
    numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("stages.")}
    blocks = 1 + max(numbers)
    if absent := set(range(blocks)) - numbers:  # before anything so deep is built
        name = quoted(f"stages.0.{min(absent)}.conv1.weight")
        raise InputError(f"it lacks the weights that are {name} here: it is cut, or no such wide residual network")
    rows = shapes["stages.0.0.conv1.weight"][0]
    if rows % 16:
        raise InputError(f"its first stage has {rows} channels, no multiple of 16: that is no wide residual network")
    kwargs: dict[str, Any] = {"depth": 6 * blocks + 4, "width": rows // 16}
    name = f"wrn_{kwargs['depth']}_{kwargs['width']}{layout.network}"
    if timm.is_model(name):
        kwargs = {}
    else:
        name = f"wrn_28_10{layout.network}"
    if not layout.network and "norm.weight" in shapes:
        if "norm.running_mean" not in shapes:
            raise InputError("it has another normalisation than BatchNorm, which no network here has")
        kwargs["norm_layer"] = "batchnorm2d"
    return name, {**kwargs, "num_classes": shapes["fc.weight"][0], "in_chans": channels}


def _own(name: str, tensor: Tensor) -> Tensor:
    """A copy as networks take it; files of half precision become float32."""
    counts = name.endswith("num_batches_tracked")
    if not (tensor.dtype == torch.int64 if counts else is_floats(tensor)):
        raise InputError(f"{quoted(name)} is {kind(tensor)}: weights are dense floating-point numbers")
    own = tensor.detach().to(torch.int64 if counts else torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not own.isfinite().all():
        raise InputError(f"{quoted(name)} holds numbers that are not finite: these weights are broken")
    return own


def _complete(state_dict: dict[str, Tensor], theirs: Mapping[str, str], name: str, kwargs: dict[str, Any]) -> None:
    """Compare with the network that will be built, on the meta device; counts that old files lack are zero."""
    with torch.device("meta"):
        expected = timm.create_model(name, **kwargs).state_dict()
    for ours in expected.keys() - state_dict.keys():
        if ours.endswith("num_batches_tracked"):
            state_dict[ours] = torch.zeros((), dtype=torch.int64)
    if missing := sorted(expected.keys() - state_dict.keys()):
        raise InputError(f"it lacks the weights that are {named(missing)} here: it is cut, or no such wide residual network")
    if unexpected := sorted(theirs[ours] for ours in state_dict.keys() - expected.keys()):
        raise InputError(f"it has {named(unexpected)}, which a wide residual network of its other shapes has not")
    for ours, tensor in state_dict.items():
        if tensor.shape != expected[ours].shape:
            raise InputError(
                f"{quoted(theirs[ours])} is of shape {tuple(tensor.shape)}: a wide residual network of its other shapes has "
                f"{tuple(expected[ours].shape)}"
            )
