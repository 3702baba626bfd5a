import numpy as np
import pytest
import torch
from image_sets import save
from PIL import Image as PILImage

from timm_jem.data import DataConfig, load_images, load_splits

ORIENTATION = 0x0112


def folder(tmp_path, images, kind="png", **options):
    """Two classes, each with all of these."""
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            image.save(tmp_path / name / f"{i}.{kind}", **options)
    return str(tmp_path)


def flat(*sizes, mode="RGB"):
    return [PILImage.new(mode, size) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "shape", "told"),
    [
        ([(20, 12)] * 6, (12, 20), "RGB 12×20"),
        ([(200, 150)] * 6, (150, 200), "RGB 150×200"),
        ([(400, 300)] * 6, (64, 64), "RGB 64×64 (files are 300×400, --data.image_size sets another)"),
        ([(96, 120), *[(224, 224)] * 5], (64, 64), "RGB 64×64 (files are 120×96 to 224×224, --data.image_size sets another)"),
        ([(30, 40), *[(53, 50)] * 5], (48, 48), "RGB 48×48 (files are 40×30 to 50×53, --data.image_size sets another)"),
        ([(6, 5), *[(9, 7)] * 5], (7, 7), "RGB 7×7 (files are 5×6 to 7×9, --data.image_size sets another)"),
        ([(1, 1), *[(64, 64)] * 5], (64, 64), "RGB 64×64 (files are 1×1 to 64×64, --data.image_size sets another)"),
    ],
)
def test_all_sizes_count(tmp_path, sizes, shape, told):
    """Of the first file's own, as it was once, no one was told."""
    path = folder(tmp_path, flat(*sizes))
    splits = load_splits(DataConfig(path))
    assert (splits.image_shape, splits.files) == ((3, *shape), told)
    asked = load_splits(DataConfig(path, image_size=10))
    assert asked.image_shape == (3, 10, 10)
    assert "image_size" not in asked.files


@pytest.mark.parametrize(
    ("modes", "channels", "told"),
    [
        (["L", "RGB", "RGB", "RGB"], 3, "RGB 8×8 (2 grey)"),
        (["L", "1", "LA", "I;16"], 1, "grey 8×8"),
        (["RGBA", "P", "CMYK", "L"], 3, "RGB 8×8 (2 grey)"),
    ],
)
def test_all_colours_count(tmp_path, modes, channels, told):
    red = PILImage.new("RGB", (8, 8), "red").quantize()
    images = [red if mode == "P" else PILImage.new(mode, (8, 8)) for mode in modes]
    path = folder(tmp_path, images, "tiff")
    splits = load_splits(DataConfig(path))
    assert (splits.image_shape, splits.files) == ((channels, 8, 8), told)
    assert load_splits(DataConfig(path, channels=1)).image_shape == (1, 8, 8)


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_a_grey_palette_is_no_colour(tmp_path, kind):
    grey = PILImage.linear_gradient("L").resize((8, 8)).quantize()
    path = folder(tmp_path, [grey] * 8, kind)
    assert load_splits(DataConfig(path)).image_shape == (1, 8, 8)
    cut = tmp_path / "bee" / f"0.{kind}"
    cut.write_bytes(cut.read_bytes()[:-30])
    splits = load_splits(DataConfig(path, skip_broken=True))
    assert (splits.image_shape, splits.left_out) == ((1, 8, 8), 1)


def test_grey_was_asked_for(tmp_path):
    splits = load_splits(DataConfig(folder(tmp_path, flat(*[(8, 8)] * 4)), channels=1))
    assert splits.files == "grey 8×8 (8 in colour)"


def test_a_bounded_number_is_looked_at(tmp_path):
    small = [PILImage.fromarray(np.full((4, 4), i % 256, np.uint8)) for i in range(600)]
    for row in (3, 597):  # one of them is passed over
        small[row] = PILImage.new("RGB", (5, 5))
    splits = load_splits(DataConfig(save(tmp_path, images=small)))
    assert splits.files == "RGB 4×4 (files are 4×4 to 5×5, 499 grey, of 500 looked at, --data.image_size sets another)"


def test_that_not_all_were_looked_at_is_said(tmp_path):
    """Those passed over may be of another size, or in colour."""
    grey = [PILImage.new("L", (4, 4))] * 600
    assert load_splits(DataConfig(save(tmp_path, images=grey))).files == "grey 4×4 (500 looked at)"


def test_sixteen_bits_of_a_pgm_are_grey(tmp_path):
    path = folder(tmp_path, [PILImage.fromarray(np.full((8, 8), 500, np.uint16))] * 8, "pgm")
    assert load_splits(DataConfig(path)).files == "grey 8×8"


def test_photographs_stand_upright_by_xmp_too(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    splits = load_splits(DataConfig(folder(tmp_path, [PILImage.new("RGB", (48, 32))] * 4, "jpg", xmp=xmp)))
    assert (splits.image_shape, splits.files) == ((3, 48, 32), "RGB 48×32")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "avif"])
def test_photographs_stand_upright(tmp_path, kind):
    """As in Hugging Face's loader; those of torchvision and timm leave them on their side."""
    image = PILImage.new("RGB", (48, 32))
    image.paste((255, 255, 255), (0, 0, 48, 8))  # a bright top edge, which was the right one
    turned = PILImage.Exif()
    turned[ORIENTATION] = 6
    path = folder(tmp_path, [image] * 4, kind, exif=turned.tobytes())
    splits = load_splits(DataConfig(path))
    assert (splits.image_shape, splits.files) == ((3, 48, 32), "RGB 48×32")
    assert splits.train.images[0, :, 24, -1].min() > 200
    assert splits.train.images[0, :, 24, 0].max() < 50
    assert torch.equal(load_images(path, channels=3, size=(48, 32), count=1)[0], splits.train.images[0])
