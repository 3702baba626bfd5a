import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from timm_jem import InputError
from timm_jem.evaluation.pictures import _cut, image_grid, stack_pictures


def plain_grid(u, columns, row_names=()):
    """What runs have shown since the first version, written down again."""
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
    height = u.shape[-2] + 2
    for row, name in enumerate(row_names):
        ImageDraw.Draw(named).text((margin - 6, 2 + row * height + height // 2), name, fill="black", font=font, anchor="rm")
    return named


@pytest.mark.parametrize("shape", [(20, 1, 8, 8), (13, 3, 32, 32), (4, 3, 64, 48), (3, 1, 8, 8), (1, 1, 8, 8)])
@pytest.mark.parametrize("named", [False, True])
def test_grids_without_captions_are_what_they_were(shape, named):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = ["zero", "one", "a longer name", "3"][: -(-shape[0] // 5)] if named else ()
    new, old = image_grid(u, 5, names), plain_grid(u, 5, names)
    assert (new.mode, new.size) == (old.mode, old.size)
    assert new.tobytes() == old.tobytes()


def ink(picture, box):
    """Whether something dark was drawn there: (left, top, right, bottom)."""
    return bool((np.asarray(picture.convert("L").crop(box)) < 128).any())


def test_captions_stand_beneath_their_images():
    white = torch.ones(4, 1, 8, 8)
    picture = image_grid(white, 2, captions=["E 1", "", "", "E -3"])
    side = 64
    assert picture.size == (2 * (side + 2) + 2, 2 * (side + 18 + 2) + 2)
    for i, text in enumerate((True, False, False, True)):
        left, top = 2 + i % 2 * (side + 2), 2 + i // 2 * (side + 20)
        assert not ink(picture, (left, top, left + side, top + side))
        assert ink(picture, (left, top + side, left + side, top + side + 18)) == text


def test_images_grow_until_captions_fit():
    caption = "p 0.93  E -1234.5"
    font = ImageFont.load_default(size=12)
    for side in (8, 32, 224):
        picture = image_grid(torch.ones(2, 3, side, side), 2, captions=[caption, caption])
        width = (picture.width - 6) // 2
        assert width >= max(64, font.getlength(caption))
        assert width % side == 0
        assert not ink(picture, (width + 2, 0, width + 4, picture.height))  # nothing runs into the neighbour


def test_a_minus_sign_is_drawn_as_one():
    # Pillow's own font has none, and would draw a box.
    u = torch.zeros(1, 1, 8, 8)
    assert image_grid(u, 1, captions=["E −3.2"]).tobytes() == image_grid(u, 1, captions=["E -3.2"]).tobytes()
    assert (
        stack_pictures([("−1", Image.new("RGB", (9, 9)))]).tobytes()
        == stack_pictures([("-1", Image.new("RGB", (9, 9)))]).tobytes()
    )


def test_column_names_stand_above_their_columns():
    white = torch.ones(2, 1, 8, 8)
    picture = image_grid(white, 3, ["row"], column_names=["a", "", "c"])
    margin = picture.width - (3 * 42 + 2)  # there is room for three columns, though there are two images
    assert margin > 12
    for i, text in enumerate((True, False, True)):
        assert ink(picture, (margin + 2 + i * 42, 0, margin + 42 + i * 42, 18)) == text
    assert ink(picture, (0, 20, margin, 60))


def test_a_long_column_name_is_cut():
    name = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    picture = image_grid(torch.ones(2, 3, 32, 32), 2, column_names=[name, ""])
    width = (picture.width - 6) // 2
    assert width <= 160
    assert ink(picture, (2, 0, 2 + width, 18))
    assert not ink(picture, (width + 3, 0, picture.width, 18))


@pytest.mark.parametrize("place", ["captions", "column_names", "row_names"])
def test_text_of_any_length_costs_no_time_and_no_memory(place):
    start, white = time.perf_counter(), torch.ones(1, 1, 8, 8)
    picture = image_grid(white, 1, **{place: ["name " * 20_000]})
    assert picture.width < 600
    assert picture.height < 600
    assert picture.size == image_grid(white, 1, **{place: ["name " * 100]}).size
    assert stack_pictures([("title " * 20_000, picture)]).width < 2000
    assert time.perf_counter() - start < 2


def test_names_are_cut_where_they_no_longer_fit():
    font = ImageFont.load_default(12)
    for text in ("iiiiiiiiiiiiiiiii", "WWWWWWWWWWWWWWW", "a b c d e f g h", "x"):
        for width in (1, 30, 60, 100, 200):
            shown = _cut(text, font, width)
            if shown == text:
                assert font.getlength(text) <= width
            else:
                kept = shown.removesuffix("…")
                assert font.getlength(shown) <= width or not kept
                assert font.getlength(text[: len(kept) + 2] + "…") > width or text[len(kept)].isspace()


def test_names_of_any_alphabet_are_drawn():
    white = torch.ones(1, 1, 8, 8)
    drawn = {name: image_grid(white, 1, [name]).tobytes() for name in ("é", "Ж", "Ω", "ñ")}
    assert len(set(drawn.values())) == 4
    assert image_grid(white, 1, ["one\ttwo\n"]).tobytes() == image_grid(white, 1, ["one two"]).tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_that_are_nan_are_seen(channels):
    u = torch.zeros(2, channels, 64, 64)
    u[1, 0] = torch.nan
    pixels = np.asarray(image_grid(u, 2))
    assert pixels[32, 34].tolist() == [128, 128, 128]
    assert pixels[32, 100].tolist() == [255, 0, 255]


def test_stacked_pictures_are_whole():
    red, blue = Image.new("RGB", (100, 20), "red"), Image.new("RGB", (60, 10), "blue")
    stacked = stack_pictures([("one", red), ("two", blue)])
    assert stacked.size == (100, 20 + 10 + 2 * 30)
    pixels = np.asarray(stacked)
    assert (pixels == (255, 0, 0)).all(2).sum() == 100 * 20
    assert (pixels == (0, 0, 255)).all(2).sum() == 60 * 10
    assert stacked.crop((0, 26, 100, 46)).tobytes() == red.tobytes()
    assert ink(stacked, (0, 0, 100, 26))
    assert stacked.getpixel((99, 89)) == (255, 255, 255)
    wide = stack_pictures([("a title that is much wider than its picture", blue)])
    assert wide.width > 200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u: image_grid(u, 2, captions=["E"]), "1 captions for 4"),
        (lambda u: image_grid(u, 2, column_names=["a", "b", "c"]), "3 column names for 2"),
        (lambda u: image_grid(u, 2, ["a"], captions=["E"] * 4), "1 row names for 2"),
        (lambda u: image_grid(u, 0), "columns"),
        (lambda u: image_grid(u[:0], 2), "at least one"),
        (lambda u: image_grid(u[0], 2), "at least one"),
        (lambda u: image_grid(u.expand(4, 2, 8, 8), 2), "images to draw have shape"),
        (lambda u: stack_pictures([]), "no pictures"),
    ],
)
def test_bad_input_is_said_in_a_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(torch.ones(4, 1, 8, 8))
    assert "\n" not in str(error.value)
