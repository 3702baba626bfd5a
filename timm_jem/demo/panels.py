"""What the page does when something is pressed: pictures and words in HTML, step by step where a chain moves."""

import base64
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from timm_jem.decoding import UNREADABLE, BrokenImage, upright
from timm_jem.demo.exhibit import Exhibit
from timm_jem.demo.live import Live
from timm_jem.demo.views import belief, curve, grid, note, number, percent, picture
from timm_jem.errors import InputError, check_whole, quoted
from timm_jem.evaluation.attacks import PGDConfig, pgd, pixel_classifier
from timm_jem.modes import frozen

__all__ = [
    "MOST_BYTES",
    "MOST_DRAWN",
    "MOST_LEVELS",
    "attack",
    "begun",
    "canvas",
    "change",
    "chooser",
    "draw",
    "drawn_at_once",
    "example",
    "frame",
    "levels_moved",
    "look",
    "opened",
    "restore",
    "side_of_mask",
    "uploaded",
]

MOST_BYTES = 20 * 2**20  # of an upload
MOST_DRAWN = 16  # pictures at once
MOST_LEVELS = 128  # of 255, by which an attack moves a pixel
_MOST_PIXELS = 50_000_000  # of an upload: 150 MB once decoded
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whose size is known before they are decoded
_PACE = 0.05  # seconds a step is looked at
_ATTACK_STEPS = 40
_CHANGE_STEPS = 200
_MOST_CELLS = 16  # a side of the grid in which pictures are erased
_MOST_FRAMES = 24  # of a way to another class
_SMALL = 64  # a side; of larger images fewer are drawn at once


def chooser(exhibit: Exhibit) -> str:
    """Examples to press, and where a file is given."""
    u = exhibit.jem.denormalize(exhibit.examples)
    buttons = (
        f'<button type="button" data-row="{row}">{picture(one, f"picture {row + 1} of {exhibit.of_examples}")}</button>'
        for row, one in enumerate(u)
    )
    own = "pload, drop or paste a picture of your own."
    return (
        f'<div class="examples">{"".join(buttons)}<label class="upload">Upload a picture'
        '<input class="hidden" type="file" accept="image/*"></label></div>'
        f"{note(f'Press one of the {exhibit.of_examples}; or u{own}' if len(u) else f'U{own}')}"
    )


def example(exhibit: Exhibit, event: Mapping[str, Any]) -> Tensor:
    """The example whose button was pressed, model input, shape (1, C, H, W).

    Raises:
        InputError: there is none of this number.
    """
    row = event.get("row")
    check_whole("the picture's number", row, 0, len(exhibit.examples) - 1)
    return exhibit.examples[row : row + 1]


def uploaded(exhibit: Exhibit, event: Mapping[str, Any]) -> Tensor:
    """A file that was given, as a data URL, as model input, shape (1, C, H, W).

    Raises:
        InputError: it is too large, or as :func:`opened`.
    """
    url, size = event.get("file"), event.get("size")
    if not isinstance(url, str):
        raise InputError(f"this file has {quoted(size)} bytes: give an image of at most {MOST_BYTES // 2**20} MB")
    try:
        file = base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise InputError("this file came broken: give it again") from error
    return opened(exhibit, file)


def opened(exhibit: Exhibit, file: bytes) -> Tensor:
    """An uploaded file as model input, shape (1, C, H, W).

    Raises:
        InputError: no image, a broken one, or one that is too large to be decoded for a stranger.
    """
    what = "this file"
    if len(file) > MOST_BYTES:
        raise InputError(f"{what} has {len(file):,} bytes: give an image of at most {MOST_BYTES // 2**20} MB")
    try:
        image = PILImage.open(io.BytesIO(file), formats=_FORMATS)
    except UNREADABLE as error:
        raise BrokenImage(f"{what} is no image that can be read: give a JPEG, PNG, WebP or GIF", what) from error
    with image:
        width, height = image.size
        if width * height > _MOST_PIXELS:
            most = _MOST_PIXELS // 10**6
            raise InputError(f"{what} has {width:,}×{height:,} pixels: give an image of at most {most} million")
        return exhibit.jem.model_input(upright(image, what))


def look(exhibit: Exhibit, x: Tensor | None) -> str:
    """What the model believes of model input, shape (1, C, H, W); None: there is no picture."""
    if x is None:
        return note("Give a picture, and here is what the model believes of it.")
    jem = exhibit.jem
    return belief(jem.denormalize(x)[0], jem.predict(x)[0], exhibit.names, jem.reference)


def begun(exhibit: Exhibit) -> str:
    """Where fresh chains start, and where they go."""
    starts = exhibit.jem.starts
    begin = "noise" if starts is None else "a Gaussian of images" if len(starts.means) == 1 else "Gaussians of the classes"
    return note(f"Chains start from {begin} and move to lower energies: towards what the model takes for likely.")


def drawn_at_once(exhibit: Exhibit) -> int:
    """How many pictures to draw, if nobody says."""
    return 8 if max(exhibit.jem.input_size[1:]) <= _SMALL else 2


def draw(exhibit: Exhibit, y: int | None, count: int, seed: int) -> Iterator[str]:
    """Chains of E(x, y), or of E(x), as they move."""
    jem = exhibit.jem
    check_whole("the number of pictures", count, 1, MOST_DRAWN)
    if y is not None:
        check_whole("the class", y, 0, len(exhibit.names) - 1)
    total, means = jem.sgld.sample_steps or jem.sgld.num_steps, []
    generator = torch.Generator().manual_seed(seed)
    asked = "whatever it likes" if y is None else exhibit.names[y]
    with Live(lambda report: jem.sample(count, y=y, generator=generator, on_step=report)) as steps:
        for _, u in _paced(steps):
            energies = _energies(exhibit, u)
            means.append(sum(energies) / len(energies))
            alts = [f"drawn picture {i + 1} of {asked}" for i in range(count)]
            yield grid(u, alts, [f"energy {number(e, 1)}" for e in energies]) + curve(means, total, jem.reference, first=1)
    named = "" if y is None else f"y={y}, "
    yield (
        grid(u, alts, [f"{p.label} {percent(p.p)}" for p in jem.predict(steps.result)])
        + curve(means, total, jem.reference, first=1)
        + note(f"Again in Python: jem.sample({count}, {named}generator=torch.Generator().manual_seed({seed}))")
    )


def levels_moved(exhibit: Exhibit) -> int:
    """How far an attack moves a pixel, if nobody says: 8 of 255 is usual in colour, and little for strokes on black."""
    return 8 if exhibit.jem.input_size[0] == 3 else 48


def attack(exhibit: Exhibit, x: Tensor, grey_levels: int) -> Iterator[str]:
    """Projected gradient descent away from what the model believes, no pixel moving further than so many of 255 levels."""
    jem = exhibit.jem
    check_whole("the largest change of a pixel", grey_levels, 1, MOST_LEVELS)
    before, images = jem.predict(x)[0], jem.denormalize(x).add(1).div(2).clamp(0, 1)
    y, classify, energies, shares = torch.tensor([before.y]), pixel_classifier(jem), [], []
    config = PGDConfig(eps=grey_levels / 255, steps=_ATTACK_STEPS)

    def work(report: Callable[..., None]) -> Tensor:
        def watched(images: Tensor) -> Tensor:
            logits = classify(images)
            report(images.detach())
            return logits

        return pgd(watched, images, y, config, generator=torch.Generator().manual_seed(0))

    def shown(now: Tensor) -> str:
        moved = jem.normalize(2 * now - 1)
        after = jem.predict(moved)[0]
        energies.append(after.energy)
        shares.append(after.probabilities[before.y].item())
        difference = ((now - images) / (2 * config.eps) + 0.5).clamp(0, 1)  # grey where nothing changed
        captions = (
            f"before: {before.label} {percent(before.p)}",
            f"after: {after.label} {percent(after.p)}",
            "what changed, enhanced",
        )
        alts = ("the picture before the attack", "the picture after the attack", "the difference")
        shown = grid(2 * torch.cat([images, now, difference]) - 1, alts, captions)
        told = f"The model believes in {before.label} by {percent(shares[-1])}, and the energy is {number(after.energy)}"
        told += f", from {percent(before.p)} and {number(before.energy)}."
        return shown + curve(energies, _ATTACK_STEPS + 2, jem.reference, shares=shares, share_of=before.label) + note(told)

    with Live(work) as steps:
        for (now,) in islice(_paced(steps), 1, None):  # of the picture itself, which is looked at twice
            yield shown(now[:1])
    yield shown(steps.result)


def change(exhibit: Exhibit, x: Tensor, y: int) -> Iterator[str | tuple[str, ...]]:
    """The least change towards class ``y`` as it is made, and in the end the whole way, at most 24 pictures of it."""
    jem = exhibit.jem
    check_whole("the class", y, 0, len(exhibit.names) - 1)
    kept, energies = [jem.denormalize(x)], [jem.predict(x)[0].energy]

    def shown(u: Tensor, at: int) -> str:
        now = jem.predict(jem.normalize(u))[0]
        asked = f"The model believes in {exhibit.names[y]} by {percent(now.probabilities[y].item())}"
        captions = ("before", f"{now.label} {percent(now.p)}")
        alts = ("the picture as it was", f"the picture on its way to {exhibit.names[y]}")
        told = f"{asked}. The picture has moved by {(u - kept[0]).norm():.2f}, in pixels from −1 to 1."
        pictures = grid(torch.cat([kept[0], u]), alts, captions)
        return pictures + curve(energies, len(energies) - 1, jem.reference, at=at) + note(told)

    with Live(lambda report: jem.counterfactual(x, y, steps=_CHANGE_STEPS, on_step=report)) as steps:
        for step, u in _paced(steps):
            kept.append(u)
            energies.extend(_energies(exhibit, u))
            yield shown(u, step)
    rows = sorted({round(i) for i in torch.linspace(0, len(kept) - 1, _MOST_FRAMES).tolist()})
    yield tuple(shown(kept[row], row) for row in rows)


def frame(way: tuple[str, ...] | None, at: int) -> str:
    """The ``at``-th picture of a way, or nothing where there is none."""
    check_whole("the place along the way", at, 0)
    return way[min(at, len(way) - 1)] if way else ""


def side_of_mask(exhibit: Exhibit) -> int:
    """Cells along a side of the grid in which pictures are erased."""
    return min(_MOST_CELLS, *exhibit.jem.input_size[1:])


def canvas(exhibit: Exhibit, x: Tensor | None) -> str:
    """The picture to paint over, under a grid of cells."""
    if x is None:
        return note("There is no picture yet.")
    side = side_of_mask(exhibit)
    shown, cells = picture(exhibit.jem.denormalize(x)[0], "the picture to paint over"), "<i></i>" * side**2
    return (
        '<div class="painter" tabindex="0" role="application" aria-label="Paint over the picture: arrows move, space erases">'
        f'{shown}<div class="cells" style="--side:{side}">{cells}</div></div>'
    )


def restore(exhibit: Exhibit, x: Tensor, cells: str, seed: int) -> Iterator[str]:
    """The erased cells, "1" in a row-by-row string of the grid's, filled in again by a chain.

    Raises:
        InputError: another string, or nothing erased.
    """
    jem, side = exhibit.jem, side_of_mask(exhibit)
    if not isinstance(cells, str) or not re.fullmatch(f"[01]{{{side**2}}}", cells) or "1" not in cells:
        raise InputError("nothing is erased yet: paint over a part of the picture first")
    coarse = torch.tensor([cell == "1" for cell in cells], device=x.device).view(1, 1, side, side)
    mask = torch.nn.functional.interpolate(coarse.float(), jem.input_size[1:], mode="nearest").bool()
    before, total, energies = jem.denormalize(x), jem.sgld.sample_steps or jem.sgld.num_steps, []
    hole = torch.where(mask, 0.0, before)

    def shown(u: Tensor) -> str:
        now = jem.predict(jem.normalize(u))[0]
        captions = ("before", "erased", f"restored: {now.label} {percent(now.p)}")
        alts = ("the picture as it was", "the picture with a part erased", "the picture restored")
        return grid(torch.cat([before, hole, u]), alts, captions) + curve(energies, total, jem.reference, first=1)

    generator = torch.Generator().manual_seed(seed)
    with Live(lambda report: jem.restore(x, mask, generator=generator, on_step=report)) as steps:
        for _, u in _paced(steps):
            energies.extend(_energies(exhibit, u))
            yield shown(u)
    yield shown(jem.denormalize(steps.result))


@torch.no_grad()
def _energies(exhibit: Exhibit, u: Tensor) -> list[float]:
    with frozen(exhibit.jem):
        return exhibit.jem.pixel_energy(u).tolist()


def _paced(steps: Live) -> Iterator[tuple]:
    """Steps no faster than eyes follow."""
    for step in steps:
        start = time.monotonic()
        yield step
        time.sleep(max(0.0, _PACE - (time.monotonic() - start)))
