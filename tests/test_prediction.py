"""Predictions of images as people have them."""

import io
import itertools
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from timm.data import create_transform

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_images, load_splits
from timm_jem.decoding import BrokenImage, decode
from timm_jem.evaluation.classification import in_batches, predict
from timm_jem.evaluation.ood_sets import outlier_sets
from timm_jem.evaluation.subject import splits_for
from timm_jem.pixels import to_pixels
from timm_jem.preprocessing import fit_of

TRAINED_HERE = {"config": {"data": {"dataset": "digits"}}}


def small(channels=3, size=(16, 16), **settings) -> timm_jem.JEM:
    torch.manual_seed(0)
    names = ["ant", "bee", "cat"]
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(channels, *size), class_names=names).eval()
    jem.data_config |= {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center", **settings}
    return jem


@pytest.fixture(scope="module")
def jem():
    """As timm takes images."""
    return small()


@pytest.fixture(scope="module")
def here(jem):
    """As training takes them."""
    return timm_jem.JEM(jem.backbone, data_config=jem.data_config, class_names=jem.class_names, provenance=TRAINED_HERE)


def photo(size=(40, 30), mode="RGB", seed=0) -> PILImage.Image:
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return PILImage.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def encoded(image: PILImage.Image, kind="png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Agreement with what trained, and with timm


def test_a_model_that_was_trained_here_sees_files_as_its_evaluation_does(tmp_path):
    splits = load_splits(DataConfig())
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), class_names=splits.class_names).eval()
    jem.provenance = {"config": {"data": {"dataset": "digits"}}}
    images = splits.test.images[:70]
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        PILImage.fromarray(image[0].numpy()).save(file)
    logits, _ = predict(jem, in_batches(images, splits.test.labels[:70], 64))
    assert torch.equal(jem.model_input(files), jem.normalize(to_pixels(images)))
    found = jem.predict(files, batch_size=64)
    assert torch.equal(torch.stack([r.probabilities for r in found]), logits.double().softmax(1))
    assert [r.energy for r in found] == timm_jem.energy(logits).tolist()
    assert [r.y for r in found] == logits.argmax(1).tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_another_size_are_made_what_training_makes_of_them(tmp_path, channels):
    jem = small(channels, (12, 20))
    jem.provenance = TRAINED_HERE
    for i, size in enumerate([(40, 30), (9, 50), (20, 12), (64, 5)]):
        photo(size, seed=i).save(tmp_path / f"{i}.png")
        photo(size, seed=i).save(tmp_path / f"{i}.jpg", exif=_turned(6))
    images = load_images(str(tmp_path), channels=channels, size=(12, 20), count=100)
    files = sorted(tmp_path.iterdir(), key=str)
    assert torch.equal(jem.model_input(files), jem.normalize(to_pixels(images)))


SETTINGS = [
    {"crop_pct": 0.875, "interpolation": "bilinear"},
    {"crop_pct": 1.0, "interpolation": "bicubic"},
    {"crop_pct": 1.15},
    {"crop_pct": 0.9, "crop_mode": "squash"},
    {"crop_pct": 0.9, "crop_mode": "border"},
    {"interpolation": "lanczos", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)},
    {"interpolation": "nearest"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_any_other_model_sees_them_as_timm_does(settings, size):
    jem = small(3, size, **settings)
    jem = timm_jem.JEM(jem.backbone, data_config=jem.data_config)
    transform = create_transform(**jem.data_config)
    for image in (photo(), photo((17, 90)), photo((16, 16)), photo((5, 4))):
        assert torch.equal(jem.model_input(image)[0], transform(image))


@pytest.mark.parametrize("trained_here", [False, True])
def test_every_model_is_evaluated_on_what_it_sees(tmp_path, trained_here):
    jem = small(3, (12, 20), crop_pct=0.8, interpolation="bicubic", crop_mode="center")
    jem.provenance = TRAINED_HERE if trained_here else {}
    for i in range(16):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        photo((30 + i, 40), seed=i).save(tmp_path / f"{i % 2}" / f"{i}.png")
    seen = jem.model_input(sorted(tmp_path.rglob("*.png"), key=str))
    splits = splits_for(jem, DataConfig(str(tmp_path)))
    sets = [splits.train.images, splits.val.images, splits.test.images]
    outliers = outlier_sets(
        [str(tmp_path)], splits.test.images, splits.test.labels, count=16, seed=0, fit=fit_of(jem.data_config, jem.provenance)
    )
    for images in (torch.cat(sets), *outliers.values()):
        distances = torch.cdist(jem.normalize(to_pixels(images)).flatten(1).double(), seen.flatten(1).double())
        assert distances.shape == (16, 16)
        assert distances.min(1).values.max() < 1e-4  # each is one of the files, to rounding
        assert distances.min(1).indices.unique().numel() == 16


def test_a_plain_timm_model_gives_its_own_logits():
    model = timm.create_model("test_vit", num_classes=5).eval()
    jem = timm_jem.wrap(model)
    images = [photo((200, 150), seed=i) for i in range(3)]
    transform = create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in images]))
    found = jem.predict(images)
    assert torch.equal(torch.stack([r.probabilities for r in found]), logits.double().softmax(1))
    assert [r.label for r in found] == [str(y) for y in logits.argmax(1).tolist()]
    assert {(r.temperature, r.percentile, r.outlier) for r in found} == {(None, None, None)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_pct": 0}, None),  # as timm takes it: its default
        ({"crop_pct": -1}, "crop_pct"),
        ({"crop_pct": 1e-4}, "crop_pct.* is 0.0001: images would be resized to"),
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"crop_pct": "1"}, "crop_pct"),
        ({"interpolation": "magic"}, "timm makes no images by .*magic"),
        ({"interpolation": ["bicubic"]}, "timm makes no images by"),
        ({"crop_mode": None, "interpolation": None, "crop_pct": None}, None),
    ],
)
def test_a_configuration_that_timm_does_not_know(settings, message):
    jem = small(**settings)
    if message is None:
        assert jem.model_input(photo()).shape == (1, 3, 16, 16)
        return
    with pytest.raises(InputError, match=message) as error:
        jem.predict(photo())
    assert "\n" not in str(error.value)


def test_images_of_other_channels_are_model_input_only():
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(5, 8, 8)).eval()
    with pytest.raises(InputError, match=r"image 0 has 1 or 3 channels, and this model takes 5: .* shape \('B', 5, 8, 8\)"):
        jem.predict(photo())
    assert jem.predict(torch.zeros(2, 5, 8, 8))[1].energy is not None


# What is given


def test_the_same_image_in_every_way(jem, tmp_path, monkeypatch):
    image = photo((16, 16))
    image.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    one = jem.predict(image)
    alpha = np.dstack([array, np.full((16, 16), 7, np.uint8)])
    ways = ["photo.png", Path("photo.png"), array, array[::-1][::-1], tensor, alpha, torch.from_numpy(alpha).movedim(-1, 0)]
    ways += [jem.model_input(image)[0]]
    for way in ways:
        assert jem.predict(way) == one
        assert jem.predict([way]) == jem.predict((way,)) == [one]
    together = jem.predict(ways)
    assert [r.energy for r in together] == pytest.approx([one.energy] * len(ways), abs=1e-5)
    for batch in (array[None], tensor[None], jem.model_input(image)):
        assert jem.predict(batch) == [one]
    assert (one.label, one.y) == (jem.class_names[one.y], int(jem(jem.model_input(image)).argmax()))
    assert one.p == one.probabilities.max().item()
    assert one.energy == jem.energy(jem.model_input(image)).item()


def test_grey_ones():
    jem, image = small(1, (8, 8)), photo((8, 8), "L")
    array = np.asarray(image)
    one = jem.predict(image)
    for way in (array, array[..., None], torch.from_numpy(array.copy()), torch.from_numpy(array.copy())[None]):
        assert jem.predict(way) == one
    assert jem.predict(array[None, ..., None]) == [one]


def test_a_prediction_keeps_its_own_probabilities_alone(jem):
    for r in jem.predict(torch.randn(3, 3, 16, 16)):
        assert r.probabilities.untyped_storage().nbytes() == r.probabilities.nbytes


def test_none_and_many(jem):
    assert jem.predict([]) == []
    assert jem.predict(torch.zeros(0, 3, 16, 16)) == []
    x = torch.randn(11, 3, 16, 16)
    whole = jem.predict(x, batch_size=11)
    for size in (1, 4, 64):
        parts = jem.predict(x, batch_size=size)
        assert [r.y for r in parts] == [r.y for r in whole]
        assert [r.energy for r in parts] == pytest.approx([r.energy for r in whole], abs=1e-5)
    sizes = [x[0], x[1, :, :12, :12], x[2], x[3]]
    assert [r.energy for r in jem.predict(sizes)] == pytest.approx([jem.energy(part[None]).item() for part in sizes], abs=1e-5)
    assert jem.predict(jem.sample(2, num_steps=1))[1].energy is not None


class Odd(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


NOT_IMAGES = [
    (None, "is None"),
    (7, "is 7"),
    (b"photo.png", "is b'photo.png'"),
    (Odd(b"photo.png"), "image 0 is <test_prediction.Odd"),
    (Odd(7), "image 0 is <test_prediction.Odd"),
    (PILImage.new("RGB", (0, 5)), r"image 0 has an image of size \(0, 5\)"),
    (PILImage.new("La", (9, 9)), r"^image 0 has colours that can't be converted \(.*\): save it as RGB$"),
    ({"image": 1}, r"is \{'image'"),
    (iter([]), "iterator"),
    ("", "there is no file ''"),
    ("gone.png", "there is no file 'gone.png': give"),
    ("https://example.com/photo.png", "there is no file 'https:"),
    ("a\0b", "there is no file"),
    ("x" * 10_000, "there is no file 'xxx"),
    (".", "is a folder: .*recipes/predict.py"),
    ([[photo()]], r"image 0 is \["),
    ([photo(), None], "image 1 is None"),
    (np.zeros((3, 16, 16), np.uint8), r"shape \(3, 16, 16\), channels last"),
    (np.zeros((16, 16, 2), np.uint8), r"shape \(16, 16, 2\)"),
    (np.zeros((0, 16, 3), np.uint8), r"shape \(0, 16, 3\)"),
    (np.zeros(3, np.uint8), r"shape \(3,\)"),
    (np.zeros((2, 2, 16, 16, 3), np.uint8), r"shape \(2, 2, 16, 16, 3\)"),
    (np.zeros((2, 3, 16, 16), np.uint8), r"image 0 has shape \(3, 16, 16\)"),
    (np.zeros((16, 16, 3)), "an array of float64"),
    (np.zeros((16, 16, 3), np.float32), "an array of float32"),
    (np.zeros((16, 16), np.uint16), "an array of uint16"),
    (np.zeros((16, 16), bool), "an array of bool"),
    (torch.zeros(16, 16, 3, dtype=torch.uint8), r"shape \(16, 3, 16\)"),
    (torch.zeros(16, 16, dtype=torch.int64), "torch.int64"),
    (torch.zeros(16, 16), r"torch.float32 of shape \(16, 16\)"),
    (torch.zeros(3, 16, 16, dtype=torch.uint8, device="meta"), "meta device"),
    (torch.zeros(3, 16, 16, device="meta"), "meta device"),
    (torch.zeros(3, 16, 16).to_sparse(), "sparse"),
    (torch.rand(3, 16, 16) * 255, "in pixels, whose range"),
    (torch.zeros(3, 16, 16).double(), "float64"),
    (torch.zeros(1, 16, 16), "give model input of shape"),
    (torch.full((2, 3, 16, 16), float("nan")), "NaN"),
]


@pytest.mark.parametrize(("images", "message"), NOT_IMAGES, ids=range(len(NOT_IMAGES)))
def test_what_is_no_image_is_one_line(jem, images, message):
    for call in (jem.predict, jem.model_input):
        with pytest.raises(InputError, match=message) as error:
            call(images)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("size", [0, -1, 1.5, "8"])
def test_batch_sizes_that_are_none(jem, size):
    with pytest.raises(InputError, match="batch_size"):
        jem.predict(photo(), batch_size=size)


def test_images_of_several_sizes_are_no_one_batch(jem):
    with pytest.raises(InputError, match="2 images make 2 batches"):
        jem.model_input([torch.zeros(3, 16, 16), torch.zeros(3, 12, 12)])
    with pytest.raises(InputError, match="0 images make 0"):
        jem.model_input([])


# Odd files


def _turned(orientation: int) -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    return exif


def _flat(size=(40, 30), mode="RGB", colour=None) -> PILImage.Image:
    return PILImage.new(mode, size, colour)


def _animated(kind: str) -> bytes:
    return encoded(_flat(colour="red"), kind, save_all=True, append_images=[_flat(colour="blue")], duration=50, loop=0)


def _png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def _sixteen() -> PILImage.Image:
    return PILImage.fromarray(np.full((30, 40), 200 * 257, np.uint16))


RED = (254, 0, 0)
# What a file holds, and the colour that its middle has to have; or what is said of it.
ODD = {
    "plain.png": (lambda: encoded(_flat(colour="red")), RED),
    "plain.jpg": (lambda: encoded(_flat(colour="red"), "jpeg", quality=95), RED),
    "progressive.jpg": (lambda: encoded(_flat(colour="red"), "jpeg", progressive=True), RED),
    "plain.webp": (lambda: encoded(_flat(colour="red"), "webp", lossless=True), RED),
    "plain.gif": (lambda: encoded(_flat(colour="red"), "gif"), RED),
    "plain.bmp": (lambda: encoded(_flat(colour="red"), "bmp"), RED),
    "plain.tif": (lambda: encoded(_flat(colour="red"), "tiff"), RED),
    "plain.ppm": (lambda: encoded(_flat(colour="red"), "ppm"), RED),
    "plain.ico": (lambda: encoded(_flat((32, 32), colour="red"), "ico"), RED),
    "jpeg called.png": (lambda: encoded(_flat(colour="red"), "jpeg"), RED),
    "UPPER.PNG": (lambda: encoded(_flat(colour="red")), RED),
    "grey.png": (lambda: encoded(_flat(mode="L", colour=200)), (200,) * 3),
    "grey and alpha.png": (lambda: encoded(_flat(mode="LA", colour=(200, 3))), (200,) * 3),
    "alpha.png": (lambda: encoded(_flat(mode="RGBA", colour=(255, 0, 0, 3))), RED),
    "palette.png": (lambda: encoded(_flat(colour="red").quantize(8)), RED),
    "palette and alpha.png": (lambda: encoded(_flat(colour="red").quantize(8), transparency=b"\0\7"), RED),
    "palette and colour.gif": (lambda: encoded(_flat(colour="red").quantize(8), "gif", transparency=0), RED),
    "one bit.png": (lambda: encoded(_flat(mode="1", colour=1)), (255,) * 3),
    "16 bits.png": (lambda: encoded(_sixteen()), (200,) * 3),
    "16 bits.tif": (lambda: encoded(_sixteen(), "tiff"), (200,) * 3),
    "32 bits.tif": (lambda: encoded(_flat(mode="F"), "tiff"), "32-bit numbers"),
    "cmyk.jpg": (lambda: encoded(_flat(mode="CMYK", colour=(0, 255, 255, 0)), "jpeg"), RED),
    "cmyk.tif": (lambda: encoded(_flat(mode="CMYK", colour=(0, 255, 255, 0)), "tiff"), RED),
    "lab.tif": (lambda: encoded(_flat(mode="LAB", colour=(150, 200, 180)), "tiff"), (254, 64, 55)),
    "ycbcr.tif": (lambda: encoded(_flat(colour="red").convert("YCbCr"), "tiff"), RED),
    "animated.gif": (lambda: _animated("gif"), RED),
    "animated.png": (lambda: _animated("png"), RED),
    "animated.webp": (lambda: _animated("webp"), RED),
    "pages.tif": (lambda: encoded(_flat(colour="red"), "tiff", save_all=True, append_images=[_flat(colour="blue")]), RED),
    "1x1.png": (lambda: encoded(_flat((1, 1), colour="red")), RED),
    "20000x10.png": (lambda: encoded(_flat((20_000, 10), colour="red")), RED),
    "10x20000.png": (lambda: encoded(_flat((10, 20_000), colour="red")), RED),
    "100000x1.png": (lambda: encoded(_flat((600_000, 1), colour="red")), "600,000, which would be enlarged"),
    "bomb.png": (lambda: _png(60_000, 60_000), "decompression bomb"),
    "empty promise.png": (lambda: _png(4000, 4000), "can't be decoded"),
    "cut.png": (lambda: encoded(photo())[:500], "can't be decoded"),
    "cut.jpg": (lambda: encoded(photo(), "jpeg")[:700], "can't be decoded"),
    "empty.png": (lambda: b"", "no known format"),
    "text.png": (lambda: b"This is not an image.\n", "no known format"),
    "zeros.jpg": (lambda: bytes(4000), "no known format"),
    "page.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
    "script.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "program"),
    "text bomb.png": (lambda: _with_text(encoded(_flat(colour="red"))), "can't be decoded"),
}


def _with_text(png: bytes) -> bytes:
    data = b"a\0\0" + zlib.compress(bytes(80_000_000))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return png[:33] + chunk + png[33:]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, _) in ODD.items():
            (folder / name).write_bytes(make())
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("taken", ["jem", "here"])
@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_right_or_one_line(odd, name, taken, request, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", pytest.fail)
    jem = request.getfixturevalue(taken)
    expected = ODD[name][1]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as error:
            jem.predict(odd / name)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(odd / name))
        return
    middle = jem.denormalize(jem.model_input(odd / name))[0, :, 7:9, 7:9].add(1).mul(127.5)
    np.testing.assert_allclose(middle.mean((1, 2)), expected, atol=4)
    assert 0 < jem.predict(odd / name).p <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_photographs_are_turned_upright(here, orientation, kind):
    corner = np.zeros((16, 16), np.uint8)
    corner[:8, :8] = 255  # upright, the light is in the upper left corner
    places = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    row, column = places[orientation]
    stored = np.roll(corner, (8 * row, 8 * column), (0, 1))
    image = PILImage.open(io.BytesIO(encoded(PILImage.fromarray(stored), kind, exif=_turned(orientation))))
    seen = here.denormalize(here.model_input(image))[0, 0]
    assert seen[:6, :6].min() > 0.5
    assert max(seen[10:].max(), seen[:, 10:].max()) < -0.5


def test_what_is_no_file_is_not_waited_for(jem, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("gone.png", tmp_path / "dangling.png")
    expected = {"pipe": "not a file", "folder": "is a folder", "loop": "decoded", "dangling": "No such file"}
    for name, message in expected.items():
        with pytest.raises(InputError, match=message):
            jem.predict(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match="not a file"):
        jem.predict("/dev/zero")
    with pytest.raises(BrokenImage, match=r"row 3 has an image .*not a file"):  # nor where a data set names it
        decode({"bytes": None, "path": str(tmp_path / "pipe.png")}, 3, (8, 8), "row 3")


def test_an_image_that_was_opened_is_left_as_it_was(jem, odd):
    with PILImage.open(odd / "plain.png") as image:
        jem.predict(image)
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert image.mode == "RGB"
    with PILImage.open(odd / "cut.png") as image, pytest.raises(InputError, match="image 0 has an image that can't be decoded"):
        jem.predict(image)


# Streams


def test_a_stream_keeps_the_order_and_stops_for_nothing(jem):
    good = [photo(seed=i) for i in range(5)]
    items = [None, good[0], "gone.png", good[1], good[2], None, None, good[3], good[4], 7]
    expected = [r.energy for r in jem.predict(good)]
    for size, workers in itertools.product((1, 2, 3, 64), (0, 1, 3)):
        outcomes = list(jem.predictor().stream(items, batch_size=size, workers=workers))
        assert [isinstance(o, BrokenImage) for o in outcomes] == [not isinstance(i, PILImage.Image) for i in items]
        energies = [o.energy for o in outcomes if not isinstance(o, BrokenImage)]
        assert energies == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="image 1 is None"):
        list(jem.predictor().inputs([good[0], None]))
    assert [len(part) for part in jem.predictor().inputs(good, batch_size=2)] == [2, 2, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_reads_no_further_than_it_must(jem, workers):
    asked = itertools.count()
    endless = (photo(seed=next(asked)) for _ in itertools.count())
    before, threads = threading.active_count(), torch.get_num_threads()
    stream = jem.predictor().stream(endless, batch_size=2, workers=workers)
    next(stream)
    assert next(asked) < 10
    stream.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_a_broken_model_is_no_prediction():
    jem = small()
    torch.nn.init.constant_(jem.backbone.fc.weight, float("nan"))
    with pytest.raises(InputError, match="energies that are not finite for 1 of 1"):
        jem.predict(photo())


def test_classes_of_a_model_without_trained_weights_have_no_names_of_imagenet(tmp_path):
    fresh = timm_jem.create_model("test_vit", num_classes=1000)
    save_file(fresh.backbone.state_dict(), tmp_path / "weights.safetensors")
    loaded = timm_jem.create_model("test_vit", True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")})
    for jem, names in ((fresh, None), (loaded, 1000)):
        jem.save_pretrained(tmp_path / "m")
        for one in (jem, timm_jem.from_pretrained(tmp_path / "m")):
            assert (one.predictor().names and len(one.predictor().names)) == names


def test_classes_of_imagenet_have_names_where_the_weights_say_so():
    model = timm.create_model("test_vit", num_classes=1000)
    assert timm_jem.wrap(model).predictor().names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "of_mine"}
    assert timm_jem.wrap(model).predictor().names is None
    assert timm_jem.wrap(timm.create_model("test_vit", num_classes=3)).predictor().names is None
