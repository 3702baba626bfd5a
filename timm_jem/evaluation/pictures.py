"""Pictures of images."""

import contextlib
from bisect import bisect_right
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from timm_jem.errors import InputError, check_whole

__all__ = ["image_grid", "stack_pictures"]

_LINE = 18  # pixels of a line of text
_CELL = 64  # least side of an image with a caption, pixels
_WIDEST = 120  # a longer column name doesn't enlarge the images, and is cut
_LONGEST = 240  # pixels of a row name or a caption; the rest is cut
_BROKEN = (1.0, 0.0, 1.0)  # magenta, for pixels that are NaN


def image_grid(
    u: Tensor,
    columns: int,
    row_names: Sequence[str] = (),
    *,
    captions: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Image.Image:
    """A grid of images, row by row, small ones enlarged without smoothing.

    Args:
        u: pixels, shape (N, C, H, W) with one or three channels; what leaves [-1, 1] is cut, and NaN is drawn in magenta.
        columns: images in a row.
        row_names: names left of the rows, or none.
        captions: a short text beneath each image, e.g. "E -3.2", or none; the images are then large enough for them.
        column_names: names above the columns, or none. Text that is too long for its place ends in "…".

    Raises:
        InputError: no images, or of another shape; another number of names than rows or columns, or of captions than images.
    """
    check_whole("columns", columns, 1)
    if not isinstance(u, Tensor) or u.ndim != 4 or u.shape[1] not in (1, 3) or u.numel() == 0:
        what = f"have shape {tuple(u.shape)}" if isinstance(u, Tensor) else f"are a {type(u).__name__}"
        raise InputError(f"images to draw {what}: give a tensor, (N, 1, H, W) or (N, 3, H, W), at least one")
    rows = -(-len(u) // columns)
    for what, names, count in (
        ("row names", row_names, rows),
        ("captions", captions, len(u)),
        ("column names", column_names, columns),
    ):
        if names and len(names) != count:
            raise InputError(f"{len(names)} {what} for {count}: give one each")
    row_names, captions, column_names = ([_drawable(text) for text in of] for of in (row_names, captions, column_names))
    font = _font(12 if captions or column_names else 14, [*row_names, *captions, *column_names])
    row_names, captions = ([_cut(text, font, _LONGEST) for text in of] for of in (row_names, captions))
    scale = max(1, 40 // min(u.shape[-2:]))
    if captions or column_names:
        wanted = max([font.getlength(t) for t in captions] + [min(font.getlength(t), _WIDEST) for t in column_names])
        scale = max(scale, -(-(int(wanted) + 6) // u.shape[-1]))
    if captions:
        scale = max(scale, -(-_CELL // min(u.shape[-2:])))
    u = u.detach().float().cpu().clamp(-1, 1).add(1).div(2)
    if (broken := u.isnan().any(1, keepdim=True)).any():
        u = torch.where(broken, torch.tensor(_BROKEN)[:, None, None], u)
    u = F.interpolate(u, scale_factor=scale, mode="nearest") if scale > 1 else u
    height, width = u.shape[-2:]
    above, below = _LINE * bool(column_names), _LINE * bool(captions)
    if below:
        u = F.pad(u, (0, 0, 0, below), value=1.0)
    grid = make_grid(u, nrow=columns, padding=2, pad_value=1.0).mul(255).round().byte()
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    if not (row_names or above or below):
        return picture
    margin = 12 + round(max(font.getlength(name) for name in row_names)) if row_names else 0
    columns_width = columns * (width + 2) + 2 if column_names else picture.width  # there may be fewer images than columns
    named = Image.new("RGB", (max(picture.width, columns_width) + margin, picture.height + above), "white")
    named.paste(picture, (margin, above))
    draw = ImageDraw.Draw(named)
    for row, name in enumerate(row_names):
        y = above + 2 + row * (height + below + 2) + (height + 2) // 2
        draw.text((margin - 6, y), name, fill="black", font=font, anchor="rm")
    for i, text in enumerate(captions):
        x = margin + 2 + (i % columns) * (width + 2) + width // 2
        y = above + 2 + (i // columns) * (height + below + 2) + height + below // 2
        draw.text((x, y), text, fill="black", font=font, anchor="mm")
    for i, text in enumerate(column_names):
        x, text = margin + 2 + i * (width + 2) + width // 2, _cut(text, font, width - 2)
        draw.text((x, above // 2 + 1), text, fill="black", font=font, anchor="mm")
    return named


def stack_pictures(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures with a title above each, one below the other, on white.

    Raises:
        InputError: no pictures.
    """
    if not pictures:
        raise InputError("there are no pictures to stack: give at least one")
    titles = [_drawable(title) for title, _ in pictures]
    font = _font(15, titles)
    titles = [_cut(title, font, max(4 * _LONGEST, *(picture.width for _, picture in pictures))) for title in titles]
    width = max([picture.width for _, picture in pictures] + [8 + round(font.getlength(title)) for title in titles])
    height = sum(picture.height + 30 for _, picture in pictures)
    stacked, y = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(stacked)
    for title, (_, picture) in zip(titles, pictures, strict=True):
        draw.text((4, y + 15), title, fill="black", font=font, anchor="lm")
        stacked.paste(picture, (0, y + 26))
        y += picture.height + 30
    return stacked


def _drawable(text: str) -> str:
    """One line."""
    # Pillow's own font has a hyphen and no minus sign, and draws a box instead.
    return " ".join(text.split()).replace("−", "-")


def _font(size: int, texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """Pillow's own font; for more than ASCII, which it draws as boxes, matplotlib's DejaVu Sans where that is installed."""
    if not all(text.isascii() for text in texts) and (found := find_spec("matplotlib")) and found.origin:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    # No character that is drawn is narrower than a pixel, and measuring thousands takes long.
    if len(text) <= width and font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(min(len(text), width)), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[: max(0, fitting - 1)].rstrip() + "…"
