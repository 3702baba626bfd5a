"""What a page is about: a model, and images to begin with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from timm_jem.backbone import architecture
from timm_jem.data.identity import data_identity, same_held_out
from timm_jem.errors import InputError
from timm_jem.evaluation.subject import check_classes, data_config, display_name, load_model, some, splits_for
from timm_jem.hub.provenance import Provenance
from timm_jem.model import JEM
from timm_jem.noise import uniform_noise
from timm_jem.pixels import to_pixels

__all__ = ["Exhibit", "load_exhibit"]

_EXAMPLES = 12
_HELD_OUT = 1000  # images that a reference is made of
_QUICK = 3 * 64 * 64  # numbers of an image of which some are drawn before the page opens


@dataclass(frozen=True, eq=False)
class Exhibit:
    """What every visitor of a page sees, and none changes.

    Attributes:
        name: of the model.
        jem: itself, in eval mode, with a reference wherever held-out images are known.
        names: of the classes, in order.
        examples: model input, shape (N, C, H, W), maybe none.
        of_examples: what they are, in words.
        draws: whether chains of the model were trained; None: that is not known.
    """

    name: str
    jem: JEM
    names: list[str]
    examples: Tensor
    of_examples: str
    draws: bool | None = True

    @property
    def about(self) -> str:
        """The model in one line."""
        channels, height, width = self.jem.input_size
        parameters = sum(p.numel() for p in self.jem.parameters())
        images = f"{'grey' if channels == 1 else 'colour'} images of {height}×{width}"
        drawing = "" if self.draws is not False else "; its chains were not trained, and draw no images"
        return f"{architecture(self.jem.backbone)}, {parameters:,} parameters, {len(self.names)} classes, {images}{drawing}"


def load_exhibit(
    name: str, told: Mapping[str, Any] | None = None, *, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Exhibit, str]:
    """A model and images to look at: held-out ones where they are known and there, else chains that it draws.

    Args:
        name: a run, a saved folder, a Hub name, or timm:NAME.
        told: settings of its data that are others than in its training, by name.
        device: where the model and the images are.
        seed: of the choice of images.

    Returns:
        It, and a line that says what was done instead where the images can't be had, or nothing.

    Raises:
        InputError: no such model, or one whose images are neither grey nor colour, or data that were told and don't fit it.
    """
    jem = load_model(name).to(device)
    if (channels := jem.input_size[0]) not in (1, 3):
        raise InputError(f"{name} takes images of {channels} channels: a page shows grey or colour images, of 1 or 3")
    draws = not name.startswith("timm:") and _has_chains(jem)
    names = jem.predictor().names or [str(i) for i in range(jem.num_classes)]
    try:
        examples, of_examples = _held_out(jem, name, told or {}, seed)
        instead = ""
    except InputError as error:
        if told:
            raise
        examples, of_examples = _drawn(jem, seed, fresh=draws is not False)
        instead = f"no held-out images ({error}): {of_examples}"
    return Exhibit(_called(name, jem), jem, list(names), examples.to(device), of_examples, draws), instead


def _has_chains(jem: JEM) -> bool | None:
    """Whether chains were trained; None: its provenance, which may be anything, doesn't tell."""
    try:
        return Provenance.read(jem.provenance).draws
    except InputError:
        return None


def _called(name: str, jem: JEM) -> str:
    """The model's name; of a folder "model", as runs and Spaces have it, the data set's."""
    shown = display_name(name)
    return display_name(str(jem.provenance.get("dataset") or "this model")) if shown == "model" else shown


def _held_out(jem: JEM, name: str, told: Mapping[str, Any], seed: int) -> tuple[Tensor, str]:
    """Test images, of classes as different as possible; the reference is made of validation images if there is none."""
    data, alike = data_config(jem, name, told)
    splits = splits_for(jem, replace(data, cache_gib=0))
    check_classes(jem, splits, name, data.dataset)
    if isinstance(known := jem.provenance.get("data"), dict):
        alike = same_held_out(known, data_identity(splits))
    if jem.reference is None:
        images, y = some(splits.val, _HELD_OUT, seed, "held-out images")
        jem.fit_reference(jem.normalize(to_pixels(images)), y)
    images, y = some(splits.test, 20 * _EXAMPLES, seed, "examples")
    classes = len(splits.class_names)
    chosen = _of_all_classes(y, _EXAMPLES - _EXAMPLES % classes if classes <= _EXAMPLES else _EXAMPLES)
    held_out = "held-out images" if alike else "images" if splits.test_of_train else "test images"
    noise = uniform_noise((1, *jem.input_size), generator=torch.Generator().manual_seed(seed))
    shown = torch.cat([to_pixels(images[chosen]), noise])
    return jem.normalize(shown), f"{held_out} of {display_name(data.dataset)}, and noise"


def _of_all_classes(y: Tensor, count: int) -> Tensor:
    """Rows: the first of each class, by class, then the second of each, and so on; at most ``count``."""
    seen: dict[int, int] = {}
    turns = []
    for row, label in enumerate(y.tolist()):
        turns.append((seen.get(label, 0), label, row))
        seen[label] = seen.get(label, 0) + 1
    return torch.tensor([row for _, _, row in sorted(turns)[:count]], dtype=torch.int64)


def _drawn(jem: JEM, seed: int, *, fresh: bool) -> tuple[Tensor, str]:
    generator = torch.Generator().manual_seed(seed)
    if jem.chains is not None:
        count, drawn = min(_EXAMPLES, len(jem.chains)), "images that the model drew in training"
        x = jem.sample(count, init="buffer", generator=generator, num_steps=1)
    elif fresh and math.prod(jem.input_size) <= _QUICK:
        x, drawn = jem.sample(y=torch.arange(_EXAMPLES) % jem.num_classes, generator=generator), "images that the model draws"
    else:
        return torch.zeros(0, *jem.input_size), "none to begin with"
    return jem.normalize(jem.denormalize(x).clamp(-1, 1)), drawn
