import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from image_sets import pictures, save
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, load_images, load_splits
from timm_jem.data.identity import data_identity
from timm_jem.data.loader import open_stream
from timm_jem.decoding import BrokenImage, decode
from timm_jem.evaluation.subject import some
from timm_jem.shell import one_line_errors
from timm_jem.training.measure import in_batches


def folder(tmp_path, n=12):
    """Two classes; 3.png of each is cut short, and cat's 5.png is no image at all."""
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir(parents=True)
        for i, image in enumerate(pictures(n, size=(40, 40), seed=len(name))):
            image.save(tmp_path / name / f"{i:02}.png")
        cut = tmp_path / name / "03.png"
        cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "cat" / "05.png").write_bytes(b"no image")
    return str(tmp_path)


FILES = ("bee/03.png", "cat/03.png", "cat/05.png")


def test_all_are_named_in_one_pass(tmp_path):
    with pytest.raises(InputError, match="2 more cannot be read") as error:
        load_splits(DataConfig(folder(tmp_path)))
    assert all(str(tmp_path / name) in str(error.value) for name in FILES)
    assert str(error.value).endswith("skip_broken true")
    assert "\n" not in str(error.value)


def test_many_are_counted(tmp_path):
    cells = [{"bytes": b"no", "path": f"{i}.png"} for i in range(60)]
    cells[0] = pictures(1)[0]
    with pytest.raises(InputError, match=r"58 more cannot be read: .* and 38 more, or leave"):
        load_splits(DataConfig(save(tmp_path, images=cells)))


@pytest.mark.parametrize("cache_gib", [2.0, 0.0])
def test_they_are_left_out_when_asked(tmp_path, cache_gib):
    path = folder(tmp_path)
    splits = load_splits(DataConfig(path, skip_broken=True, cache_gib=cache_gib))
    assert splits.left_out == 3
    assert splits.summary().endswith("3 broken ones left out")
    sets = (splits.train, splits.val, splits.test)
    assert sum(len(part) for part in sets) == 21
    for part in sets:
        images, labels = part.__getitems__(range(len(part)))
        assert images.shape == (len(part), 3, 40, 40)
        assert torch.equal(labels, part.labels)
    for name in FILES:
        (tmp_path / name).unlink()
    rest = load_splits(DataConfig(path))
    everything = {tuple(image.flatten().tolist()) for part in sets for image in part.__getitems__(range(len(part)))[0]}
    assert everything == {tuple(i.flatten().tolist()) for part in (rest.train, rest.val, rest.test) for i in part.images}


@pytest.mark.parametrize("cache_gib", [2.0, 0.0])
def test_a_run_that_met_one_goes_on_without_them(tmp_path, cache_gib):
    """As its message says: the data are the same, but for those that can't be seen."""
    path = folder(tmp_path)
    met = data_identity(load_splits(DataConfig(path, cache_gib=0)))
    without = load_splits(DataConfig(path, skip_broken=True, cache_gib=cache_gib))
    assert data_identity(without) == met
    assert sum(len(part) for part in (without.train, without.val, without.test)) == 24 - 3
    (tmp_path / "bee" / "03.png").unlink()
    assert data_identity(load_splits(DataConfig(path, skip_broken=True, cache_gib=cache_gib))) != met


def test_the_others_stay_in_their_splits(tmp_path):
    whole = tmp_path / "whole"
    for name in ("bee", "cat"):
        (whole / name).mkdir(parents=True)
        for i, image in enumerate(pictures(12, size=(40, 40), seed=len(name))):
            image.save(whole / name / f"{i:02}.png")
    before = load_splits(DataConfig(str(whole)))
    (whole / "cat" / "05.png").write_bytes(b"no image")
    after = load_splits(DataConfig(str(whole), skip_broken=True))
    for part in ("train", "val", "test"):
        old, new = ({tuple(i.flatten().tolist()) for i in getattr(splits, part).images} for splits in (before, after))
        assert new <= old
        assert len(old - new) <= 1


def test_labels_and_rows_are_kept_together(tmp_path):
    cells = [*pictures(30), {"bytes": b"no", "path": "x.png"}]
    labels = [*(i % 3 for i in range(30)), -1]
    path = save(tmp_path, images=cells, labels=labels)
    (tmp_path / "more").mkdir()
    more = save(tmp_path / "more", images=[*pictures(30, seed=1), cells[-1]])
    splits = load_splits(DataConfig(path, skip_broken=True, unlabeled_rows=True, unlabeled=more))
    assert (splits.left_out, int((splits.train.labels < 0).sum())) == (2, 30)
    assert torch.equal(splits.labeled.images, splits.train.images[: len(splits.labeled)])
    assert splits.labeled.labels.min() == 0
    assert splits.train._named(len(splits.train) - 1) == f"row 29 of {more}, split train"


def test_lazily_decoded_ones_are_named_with_their_file(tmp_path):
    splits = load_splits(DataConfig(folder(tmp_path), cache_gib=0.0))
    stream = open_stream(splits.train, 4, seed=0)
    with pytest.raises(InputError, match=rf"\({tmp_path}/\S+png\) has an image .* repair or remove it, or leave .*skip_broken"):
        [next(stream) for _ in range(10)]


def stream_of(tmp_path, bad, **settings):
    """Grey images of 40 levels of which some are broken, as a stream."""
    cells = [
        {"bytes": b"no %d" % i, "path": f"{i}.png"} if i in bad else image for i, image in enumerate(pictures(40, mode="L"))
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(40)]}, features).save_to_disk(str(tmp_path / "set"))
    config = DataConfig(str(tmp_path / "set"), streaming=True, stream_held_out=5, shuffle_buffer=8, channels=1, **settings)
    return load_splits(config)


def test_a_stream_leaves_them_out_as_they_come(tmp_path):
    bad = set(range(0, 40, 3))
    splits = stream_of(tmp_path, bad, skip_broken=True)
    held_out = len(splits.val) + len(splits.test)
    assert splits.left_out == 10 - held_out > 0
    stream, again = (open_stream(splits.train, 3, seed=0) for _ in range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches, places = [], []
        while not places or places[-1]["epoch"] < 2:
            batches.append(next(stream))
            places.append(stream.state_dict())
    told = {re.search(r"\((\d+)\.png\)", str(w.message)) for w in caught if "left out: row" in str(w.message)}
    assert {int(found[1]) for found in told} <= bad
    assert told
    seen = {tuple(image.flatten().tolist()) for images, _ in batches for image in images}
    assert len(seen) == 40 - len(bad) - held_out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.load_state_dict(places[3])
        for images, labels in batches[4:]:  # resuming is exact
            x, y = next(again)
            assert torch.equal(x, images)
            assert torch.equal(y, labels)


def test_a_stream_of_broken_images_alone_ends(tmp_path):
    splits = stream_of(tmp_path, set(range(0, 40, 3)), skip_broken=True)
    cells = [{"bytes": b"no %d" % i, "path": f"{i}.png"} for i in range(40)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(40)]}, features).to_iterable_dataset()
    rows = rows.cast_column("image", Image(decode=False))
    stream = open_stream(replace(splits.train, rows=rows), 3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="no training image that can be decoded"):
            next(stream)


def test_images_of_a_stream_to_compare_with(tmp_path):
    bad = set(range(0, 40, 3))
    splits = stream_of(tmp_path, bad, skip_broken=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, labels = some(splits.train, 100, 0, "training images")
    assert len(images) == len(labels) == 40 - len(bad) - len(splits.val) - len(splits.test)


def test_a_stream_stops_by_name(tmp_path):
    with pytest.raises(InputError, match=r"\(\d+\.png\) has an image that can't be decoded \(no known format\)"):
        stream_of(tmp_path, set(range(0, 40, 3)))


NO_IMAGES = [b"", b"no", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"GIF89a" + b"\0" * 20, b"BM" + b"\0" * 60]
UNKNOWN_DDS = b"DDS " + (124).to_bytes(4, "little") + b"\0" * 120  # of a kind that Pillow's decoder has not


@pytest.mark.parametrize("content", [*NO_IMAGES, UNKNOWN_DDS])
def test_whatever_a_file_holds(tmp_path, content):
    cells = [{"bytes": content, "path": "odd.png"}, *pictures(11)]
    with pytest.raises(InputError, match=r"row 0 of split train \(odd\.png\) has an image that can't be decoded"):
        load_splits(DataConfig(save(tmp_path, images=cells)))


@pytest.mark.parametrize("mode", ["LAB", "F", "I"])
def test_colours_that_are_none_of_a_screen_are_named(tmp_path, mode):
    buffer = io.BytesIO()
    PILImage.new(mode, (10, 10)).save(buffer, "tiff")
    cells = [{"bytes": buffer.getvalue(), "path": "odd.tif"}, *pictures(11)]
    with pytest.raises(InputError, match=r"row 0 of split train \(odd\.tif\) has .*(convert|save) it .*skip_broken true$"):
        load_splits(DataConfig(save(tmp_path, images=cells), channels=1))


def test_sixteen_bits_of_a_pgm_become_eight():
    levels = np.array([[0, 255, 256, 65535]], dtype=">u2")
    cell = {"bytes": b"P5 4 1 65535\n" + levels.tobytes(), "path": None}
    assert decode(cell, 1, (1, 4), "it").tolist() == [[[0, 0, 1, 255]]]


def test_a_long_strip_is_not_enlarged_until_the_memory_is_full(tmp_path):
    buffer = io.BytesIO()
    PILImage.new("L", (600_000, 1)).save(buffer, "png")
    strip = {"bytes": buffer.getvalue(), "path": None}
    assert decode(strip, 1, (8, 8), "it").shape == (1, 8, 8)
    with pytest.raises(BrokenImage, match=r"it has an image of 1×600,000, which would be enlarged to 128×76,800,000: crop it"):
        decode(strip, 1, (128, 128), "it")


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Bytes changed at random: decoded, or refused by name."""
    rng, refused = np.random.default_rng(0), 0
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"):
        buffer = io.BytesIO()
        pictures(1, size=(24, 24))[0].save(buffer, kind)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(content), 400), 6):
                content[place] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cut = bytes(content[: rng.integers(len(content) // 2, len(content) + 1)])
                try:
                    decode({"bytes": cut, "path": None}, 3, (8, 8), "it")
                except BrokenImage:
                    refused += 1
    assert refused > 60


def test_other_sets_have_no_such_setting(tmp_path):
    rows = Dataset.from_dict({"image": [{"bytes": b"no", "path": None}] * 3}, Features({"image": Image()}))
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*rows\.parquet, split test .*; 2 more cannot be read") as error:
        load_images(str(tmp_path / "rows.parquet"), channels=3, size=(4, 4), count=9)
    assert "skip_broken" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_comes_up_in_validation_is_one_line(tmp_path, workers, capsys):
    splits = load_splits(DataConfig(folder(tmp_path), cache_gib=0))
    with pytest.raises(SystemExit), one_line_errors():
        [list(in_batches(split, workers)) for split in (splits.train, splits.val, splits.test)]
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: row \d+ of split train \(.*\) has an image that can't be decoded .*\n", said)
