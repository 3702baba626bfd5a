"""Pictures of images."""

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

__all__ = ["image_grid"]


def image_grid(u: Tensor, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """A grid of images, row by row, small ones enlarged without smoothing, with names left of the rows.

    Args:
        u: pixels, shape (N, C, H, W); what leaves [-1, 1] is cut.
        columns: images in a row.
        row_names: names of the rows, or none.
    """
    scale = max(1, 40 // min(u.shape[-2:]))
    u = u.detach().float().cpu().clamp(-1, 1).add(1).div(2)
    u = F.interpolate(u, scale_factor=scale, mode="nearest") if scale > 1 else u
    grid = make_grid(u, nrow=columns, padding=2, pad_value=1.0).mul(255).round().byte()
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    if not row_names:
        return picture
    font = ImageFont.load_default(size=14)
    margin = 12 + round(max(font.getlength(name) for name in row_names))
    named = Image.new("RGB", (picture.width + margin, picture.height), "white")
    named.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(named)
    height = u.shape[-2] + 2
    for row, name in enumerate(row_names):
        draw.text((margin - 6, 2 + row * height + height // 2), name, fill="black", font=font, anchor="rm")
    return named
