"""Whether data are those of a run, wherever they lie and however they are kept."""

import io
import json
import re
import time
from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.data.identity import _content, changed_data, data_identity


def of(**config) -> dict:
    return data_identity(load_splits(DataConfig(**config)))


@pytest.fixture(scope="module")
def own():
    return of()


@pytest.mark.parametrize("how", ["not decoded", "parquet", "saved", "imagefolder", "other augmentation"])
def test_the_same_data_elsewhere_are_the_same(own, tmp_path, how):
    other = tmp_path / "digits.parquet"
    if how == "parquet":
        digits().to_parquet(other)
    elif how == "saved":
        other = tmp_path / "saved"
        digits().save_to_disk(other)
    elif how == "imagefolder":
        homes = []
        for home in ("first", "second"):
            for i, row in enumerate(digits().select(range(60))):
                folder = tmp_path / home / "train" / str(row["label"])
                folder.mkdir(parents=True, exist_ok=True)
                row["image"].resize((16, 16)).save(folder / f"{i:04}.jpg")
            homes.append(of(dataset=str(tmp_path / home)))
        assert changed_data(*homes) is None
        (tmp_path / "second" / "train" / "3" / "0003.jpg").rename(tmp_path / "second" / "train" / "4" / "0003.jpg")
        assert changed_data(homes[0], of(dataset=str(tmp_path / "second"))) is not None
        return
    config = {"not decoded": {"cache_gib": 0}, "other augmentation": {"flip": True, "crop_padding": 1}}
    assert changed_data(own, of(**config.get(how, {"dataset": str(other)}))) is None
    assert json.loads(json.dumps(own)) == own


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"split_seed": 5}, "the train split has other labels"),
        ({"test_fraction": 0.3}, "1132 images in the train split now and 1295 then"),
        ({"val_fraction": 0.2}, "1151 images in the train split now and 1295 then"),
        ({"labels_per_class": 10}, "the train split has other labels"),
        ({"image_size": 9}, r"images of shape \[1, 9, 9\] now and \[1, 8, 8\] then"),
    ],
)
def test_other_splits_are_others(own, config, reason):
    assert re.fullmatch(reason, changed_data(own, of(**config)))


def test_each_part_tells(own, tmp_path):
    rows = digits()

    def elsewhere(changed: Dataset) -> str | None:
        changed.to_parquet(tmp_path / "rows.parquet")
        return changed_data(own, of(dataset=str(tmp_path / "rows.parquet")))

    assert elsewhere(rows) is None
    negative = rows.map(lambda row: {"image": row["image"].point(lambda level: 255 - level)})
    assert elsewhere(negative) == "the train split has other sample"
    assert (
        elsewhere(rows.cast_column("label", ClassLabel(names=list("abcdefghij"))))
        == "classes of other names, or in another order"
    )
    two = rows.filter(lambda row: row["label"] < 2).cast_column("label", ClassLabel(names=["0", "1"]))
    assert elsewhere(two) == "classes: 2 now and 10 then"


def test_an_encoder_of_another_version_makes_no_other_data():
    def encoded(level: int) -> list[dict]:
        cells = []
        for image in digits().select(range(10))["image"]:
            file = io.BytesIO()
            image.save(file, "png", compress_level=level)
            cells.append({"bytes": file.getvalue(), "path": None})
        return cells

    first, second = encoded(0), encoded(9)
    assert all(a["bytes"] != b["bytes"] for a, b in zip(first, second, strict=True))
    assert [_content(cell) for cell in first] == [_content(cell) for cell in second]
    assert len({_content(cell) for cell in first}) == 10


def test_a_palette_counts():
    """The same indices are other images where the palette is another, or what of it is transparent."""

    def saved(colours: list[int], **options) -> dict:
        image, file = PILImage.new("P", (4, 4), 1), io.BytesIO()
        image.putpalette(colours)
        image.save(file, "png", **options)
        return {"bytes": file.getvalue(), "path": None}

    red, blue = [0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 0, 255]
    assert len({_content(cell) for cell in (saved(red), saved(blue), saved(red, transparency=0), saved(red))}) == 3


def test_a_broken_one_is_named_when_it_is_decoded(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(12):
            PILImage.new("L", (8, 8), i).save(tmp_path / name / f"{i:02}.png")
    file = tmp_path / "cat" / "03.png"
    splits = load_splits(DataConfig(str(tmp_path), cache_gib=0))
    whole = data_identity(splits)
    file.write_bytes(file.read_bytes()[:-25])
    with pytest.raises(OSError, match="truncated"):
        PILImage.open(file).load()
    assert data_identity(splits) != whole


def test_of_a_stream_the_held_out_images_are_known(own, tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for file in (first, second):
        digits().select(range(80)).to_parquet(file)
    splits, elsewhere = (load_splits(DataConfig(str(file), streaming=True, stream_held_out=15)) for file in (first, second))
    identity = data_identity(splits)
    assert changed_data(identity, data_identity(elsewhere)) is None
    other = data_identity(replace(splits, val=splits.test))
    assert changed_data(identity, other) == "the val split has other labels"
    assert changed_data({**own, "train": None}, own) == "a stream on one side only"


def test_many_small_images_take_no_time(tmp_path):
    file = io.BytesIO()
    PILImage.new("L", (28, 28)).save(file, "png")
    cells = [{"bytes": file.getvalue(), "path": None}] * 60_000
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(60_000)]}, features).to_parquet(tmp_path / "a.parquet")
    splits = load_splits(DataConfig(str(tmp_path / "a.parquet"), image_column="image", cache_gib=0))
    before = time.process_time()
    data_identity(splits)
    assert time.process_time() - before < 1
