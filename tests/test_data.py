import io
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from image_sets import broken, marked, marks, pictures, save
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.pixels import to_pixels


def rows_of(image_set):
    return [tuple(image.flatten().tolist()) for image in image_set.images]


def test_the_embedded_digits():
    splits = load_splits(DataConfig())
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1295, 143, 359)
    assert splits.image_shape == (1, 8, 8)
    assert splits.class_names == [str(i) for i in range(10)]
    assert (splits.crop_padding, splits.flip) == (0, False)
    from sklearn.datasets import load_digits

    everything = torch.cat([s.images for s in (splits.train, splits.val, splits.test)])
    assert everything.sum() == int(np.round(load_digits().images * (255 / 16)).sum())
    pixels = to_pixels(splits.train.images)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert splits.val.labels.bincount().min() >= 13  # the same part of each class


def test_splits_are_disjoint_and_the_same_every_time():
    first, second = load_splits(DataConfig()), load_splits(DataConfig())
    assert torch.equal(first.val.images, second.val.images)
    other = load_splits(DataConfig(split_seed=1))
    assert not torch.equal(first.val.images, other.val.images)
    rows = digits().add_column("row", list(range(1797)))
    assert len(rows) == sum(len(s) for s in (first.train, first.val, first.test))
    assert (
        len(set(rows_of(first.train)) & set(rows_of(first.test)))
        == len(set(rows_of(first.val)) & set(rows_of(first.test)))
        == 0
    )


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("image", "labels"), ("picture", "kind")])
def test_columns_are_found(tmp_path, image, label):
    splits = load_splits(DataConfig(save(tmp_path, image=image, label=label)))
    assert splits.class_names == ["ant", "bee", "cat"]
    assert splits.image_shape == (3, 10, 10)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 12


def test_a_test_split_is_used_as_it_is(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    parts = {
        name: Dataset.from_dict({"image": pictures(n, seed=n), "label": [i % 3 for i in range(n)]}, features)
        for name, n in (("train", 20), ("test", 7))
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "disk"))
    splits = load_splits(DataConfig(str(tmp_path / "disk")))
    assert len(splits.test) == 7
    assert torch.equal(splits.test.images[3], torch.from_numpy(np.array(parts["test"][3]["image"])).permute(2, 0, 1))
    (tmp_path / "pq").mkdir()
    for name, rows in parts.items():
        rows.to_parquet(tmp_path / "pq" / f"{name}-0.parquet")
    again = load_splits(DataConfig(str(tmp_path / "pq")))
    assert torch.equal(again.test.images, splits.test.images)
    assert torch.equal(again.train.images, splits.train.images)


def test_an_imagefolder(tmp_path):
    for i, image in enumerate(pictures(8)):
        folder = tmp_path / ("left" if i % 2 else "right")
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{i}.png")
    splits = load_splits(DataConfig(str(tmp_path)))
    assert splits.class_names == ["left", "right"]
    assert splits.image_shape == (3, 10, 10)
    assert splits.flip


def test_names_and_integers_as_labels(tmp_path):
    path = save(tmp_path, labels=["b", "a", "c"] * 4, feature=Value("string"))
    splits = load_splits(DataConfig(path))
    assert splits.class_names == ["a", "b", "c"]
    for kind in ("int64", "uint8"):
        splits = load_splits(DataConfig(save(tmp_path, labels=[10, 4] * 6, feature=Value(kind))))
        assert splits.class_names == ["4", "10"]
        assert set(splits.train.labels.tolist()) == {0, 1}
    assert load_splits(DataConfig(save(tmp_path, labels=["x", "y"] * 6, feature=Value("large_string")))).class_names == [
        "x",
        "y",
    ]
    assert load_splits(DataConfig(save(tmp_path, labels=[True, False] * 6, feature=Value("bool")))).class_names == [
        "False",
        "True",
    ]


def test_classes_are_matched_by_name_between_splits(tmp_path):
    def rows(names, labels):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": pictures(len(labels)), "label": labels}, features)

    train, test = rows(["ant", "bee"], [0, 1] * 6), rows(["bee", "ant"], [0, 1, 1])
    DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "set"))
    splits = load_splits(DataConfig(str(tmp_path / "set")))
    assert splits.test.labels.tolist() == [1, 0, 0]
    other = rows(["bee", "wasp"], [0, 1, 1])
    DatasetDict({"train": train, "test": other}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"split test .*row 1, has the label 1"):
        load_splits(DataConfig(str(tmp_path / "other")))


def test_public_test_splits_without_labels_are_passed_over(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    labels = {"train": [0, 1] * 6, "test": [-1] * 4, "validation": [0, 1, 1]}
    splits = {name: Dataset.from_dict({"image": pictures(len(y)), "label": y}, features) for name, y in labels.items()}
    DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    assert len(load_splits(DataConfig(str(tmp_path / "set"))).test) == 3
    del splits["validation"]
    DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    assert len(load_splits(DataConfig(str(tmp_path / "two"), val_fraction=0.2)).test) == 2
    with pytest.raises(InputError, match="label -1"):
        load_splits(DataConfig(str(tmp_path / "two"), test_split="test"))


def test_deep_and_turned_images(tmp_path):
    def cell(image, **options):
        buffer = io.BytesIO()
        image.save(buffer, **options)
        return {"bytes": buffer.getvalue(), "path": None}

    deep = [PILImage.fromarray(np.full((8, 8), value, np.uint16)) for value in (300, 30000, 65000)]
    splits = load_splits(DataConfig(save(tmp_path, images=[cell(image, format="png") for image in deep] * 4)))
    assert splits.image_shape == (1, 8, 8)
    expected = torch.tensor([1, 117, 253], dtype=torch.uint8)
    assert torch.equal(splits.train.images[:, 0, 0, 0], expected[splits.train.labels])
    turned = PILImage.Exif()
    turned[0x0112] = 6
    photo = cell(PILImage.new("RGB", (20, 10)), format="jpeg", exif=turned)
    assert load_splits(DataConfig(save(tmp_path, images=[photo] * 12))).image_shape == (3, 20, 10)


def test_channels_and_sizes(tmp_path):
    wide = pictures(12, size=(20, 12))
    path = save(tmp_path, images=wide)
    assert load_splits(DataConfig(path)).image_shape == (3, 12, 20)
    splits = load_splits(DataConfig(path, channels=1, image_size=6))
    assert splits.image_shape == (1, 6, 6)
    assert splits.train.images.shape[1:] == (1, 6, 6)
    flat = [PILImage.new("L", (16, 16), 40 * (i % 3)) for i in range(12)]
    splits = load_splits(DataConfig(save(tmp_path, images=flat), channels=3))
    assert torch.equal(splits.train.images, (40 * splits.train.labels).byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16))


def test_large_sets_are_decoded_batch_by_batch(tmp_path):
    path = save(tmp_path)
    kept, lazy = load_splits(DataConfig(path)), load_splits(DataConfig(path, cache_gib=0.0))
    assert lazy.train.images is None
    loader = torch.utils.data.DataLoader(lazy.train, batch_size=4, collate_fn=lambda batch: batch, num_workers=1)
    assert torch.equal(torch.cat([images for images, _ in loader]), kept.train.images)
    assert torch.equal(lazy.train[2][0], kept.train.images[2])


@pytest.mark.parametrize("size", [(6, 6), (80, 80)])
def test_many_images_stay_in_their_places(tmp_path, size):
    """Small ones are decoded by one thread, large ones by several."""
    images = pictures(200, size=size)
    splits = load_splits(DataConfig(save(tmp_path, images=images)))
    kept = [(np.asarray(image), label % 3) for label, image in enumerate(images)]
    for part in (splits.train, splits.val, splits.test):
        ((_, numbers),) = part.parts
        for pixels, label, number in zip(part.images, part.labels, numbers, strict=True):
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), kept[number][0])
            assert label == kept[number][1]


def test_flips_and_crops_suit_the_data(tmp_path):
    numbers = ClassLabel(names=["0", "1", "2"])
    assert not load_splits(DataConfig(save(tmp_path, feature=numbers))).flip
    splits = load_splits(DataConfig(save(tmp_path, images=pictures(12, size=(32, 32)))))
    assert (splits.crop_padding, splits.flip) == (4, True)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda t: str(t / "nothing.parquet"), {}, "no data set at"),
        (lambda t: "./no/such/folder", {}, "no data set at"),
        (save, {"train_split": "learn"}, None),
        (save, {"test_split": "exam"}, "no split 'exam'.*train"),
        (save, {"image_column": "photo"}, "no image column 'photo'.*image"),
        (save, {"label_column": "photo"}, "'photo', it is not there.*image, label"),
        (lambda t: save(t, labels=[0.5] * 12, feature=Value("float32")), {}, "neither classes"),
        (lambda t: save(t, labels=[-1] + [0] * 11), {}, "row 0, has the label"),
        (lambda t: save(t, labels=[0] + [1] * 10 + [-2], feature=Value("int64")), {}, "row 11, has the label -2"),
        (broken, {}, "can't be decoded.*repair or remove"),
        (save, {"crop_padding": 10}, "crop_padding"),
        (save, {"val_fraction": 0.99}, "lower it"),
        (save, {"test_split": "train"}, "the train split"),
        (lambda t: save(t, images=[PILImage.fromarray(np.ones((8, 8), np.float32))] * 12), {}, "row 0 .*convert it"),
        (lambda t: save(t, images=pictures(2)), {}, "2 labelled images"),
    ],
)
def test_bad_data_is_named(tmp_path, make, settings, message):
    if message is None:
        assert len(load_splits(DataConfig(make(tmp_path), **settings)).train) > 0  # one file is whatever split is asked for
        return
    with pytest.raises(InputError, match=message) as error:
        load_splits(DataConfig(make(tmp_path), **settings))
    assert "\n" not in str(error.value)


def test_unknown_hub_names_are_named(monkeypatch):
    def offline(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'cifar_10' doesn't exist on the Hub\nor cannot be accessed.")

    monkeypatch.setattr("timm_jem.data.sources._load_remote", offline)
    with pytest.raises(InputError, match="'cifar_10' can't be loaded from the Hub; give its exact name") as error:
        load_splits(DataConfig("cifar_10"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"val_fraction": 0.0},
        {"test_fraction": 1.5},
        {"channels": 2},
        {"image_size": 0},
        {"labels_per_class": 0},
        {"stream_held_out": 0},
        {"shuffle_buffer": 0},
        {"unlabeled": ""},
        {"starts": " "},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DataConfig(**bad)


def test_some_labels_of_each_class(tmp_path):
    marked([i % 3 for i in range(60)]).to_parquet(tmp_path / "rows.parquet")
    whole = load_splits(DataConfig(str(tmp_path / "rows.parquet")))
    assert whole.labeled is None
    assert torch.equal(whole.class_frequencies, torch.full((3,), 1 / 3))
    chosen = {}
    for count in (2, 5):
        few = load_splits(DataConfig(str(tmp_path / "rows.parquet"), labels_per_class=count))
        assert torch.equal(few.val.images, whole.val.images)
        assert torch.equal(few.test.images, whole.test.images)
        assert sorted(marks(few.train)) == sorted(marks(whole.train))
        assert few.labeled.labels.tolist() == [mark % 3 for mark in marks(few.labeled)]
        assert few.labeled.labels.bincount().tolist() == [count] * 3
        assert (few.train.labels >= 0).sum() == 3 * count
        known = few.train.labels >= 0
        assert torch.equal(few.train.images[known], few.labeled.images)
        assert few.labeled.images.data_ptr() == few.train.images.data_ptr()
        chosen[count] = set(marks(few.labeled))
    assert chosen[2] < chosen[5]
    every = load_splits(DataConfig(str(tmp_path / "rows.parquet"), labels_per_class=14))
    assert every.labeled is None
    with pytest.raises(InputError, match="labels_per_class is 15, and class 'ant' has 14 training images"):
        load_splits(DataConfig(str(tmp_path / "rows.parquet"), labels_per_class=15))
    marked([i % 2 for i in range(60)]).to_parquet(tmp_path / "rows.parquet")  # no image of the third class
    few = load_splits(DataConfig(str(tmp_path / "rows.parquet"), labels_per_class=5))
    assert few.labeled.labels.bincount(minlength=3).tolist() == [5, 5, 0]


@pytest.mark.parametrize("name", ["{}?split={}", "{}?image_column=image&split={}"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_images_are_not_trained_on_as_unlabelled_ones(tmp_path, name, split):
    rows = marked([i % 3 for i in range(60)])
    others = marked([0] * 60, start=60)
    DatasetDict({"train": rows, "test": rows, "more": others}).save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(tmp_path / "rows.parquet")
    for data in (str(tmp_path / "saved"), str(tmp_path / "rows.parquet")):
        with pytest.raises(InputError, match=f"unlabeled is split {split} of"):
            load_splits(DataConfig(data, unlabeled=name.format(data, split)))
        for told in (data, f"{data}?image_column=image"):  # without a split, train
            with pytest.raises(InputError, match=r"unlabeled is (split train of|the train split itself)"):
                load_splits(DataConfig(data, unlabeled=told))
    with pytest.raises(InputError, match="unlabeled is the train split itself"):
        load_splits(DataConfig(unlabeled="digits"))
    (tmp_path / "link").symlink_to(tmp_path / "saved")
    with pytest.raises(InputError, match="unlabeled is split"):
        load_splits(DataConfig(str(tmp_path / "saved"), unlabeled=name.format(tmp_path / "link", split)))
    more = load_splits(DataConfig(str(tmp_path / "saved"), unlabeled=name.format(tmp_path / "saved", "more")))
    assert (more.train.labels == -1).sum() == 60
    # Whatever they are called: a folder and the file in it, and a copy of either split alone.
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "train.parquet"
    rows.to_parquet(file)
    others.to_parquet(tmp_path / "others.parquet")
    for data, unlabeled in ((tmp_path / "folder", file), (file, tmp_path / "folder")):
        for told in (name.format(unlabeled, "train"), str(unlabeled)):
            for cache_gib in (2.0, 0.0):
                with pytest.raises(InputError, match=r"unlabeled is .*, in which 100% of the validation images are"):
                    load_splits(DataConfig(str(data), unlabeled=told, cache_gib=cache_gib))
    others.to_parquet(tmp_path / "folder" / "test.parquet")
    for unlabeled, of in ((tmp_path / "rows.parquet", "validation"), (tmp_path / "others.parquet", "test")):
        with pytest.raises(InputError, match=rf"unlabeled is .*, in which 100% of the {of} images are"):
            load_splits(DataConfig(str(tmp_path / "folder"), unlabeled=name.format(unlabeled, "train")))


def test_files_of_held_out_images_are_no_unlabelled_ones(tmp_path, monkeypatch):
    """Of sets that aren't decoded at once, only files of the same length are read."""
    rows, read = marked([i % 3 for i in range(60)]), []
    rows.to_parquet(tmp_path / "rows.parquet")
    for i, cell in enumerate(rows.cast_column("image", Image(decode=False))["image"]):
        for folder, rest in (("same", b""), ("others", b"longer" * 20)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i}.png").write_bytes(cell["bytes"] + rest)
    data = DataConfig(str(tmp_path / "rows.parquet"), cache_gib=0)
    with pytest.raises(InputError, match=r"unlabeled is .*same, in which 100% of the validation images are"):
        load_splits(replace(data, unlabeled=str(tmp_path / "same")))
    monkeypatch.setattr(Path, "read_bytes", read.append)
    assert (load_splits(replace(data, unlabeled=str(tmp_path / "others"))).train.labels == -1).sum() == 60
    assert not read


@pytest.mark.parametrize(("size", "padding"), [((128, 16), 2), ((16, 128), 2), ((64, 15), 0), ((32, 24), 3)])
def test_crops_fit_the_shorter_side(tmp_path, size, padding):
    images = [PILImage.fromarray(np.full(size, i, np.uint8)) for i in range(12)]
    assert load_splits(DataConfig(save(tmp_path, images=images))).crop_padding == padding


def test_rows_without_labels(tmp_path):
    labels = [0, 1, 2, None, -1] * 10
    marked(labels).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"row 3, has the label None.*data\.unlabeled_rows"):
        load_splits(DataConfig(str(tmp_path / "rows.parquet")))
    splits = load_splits(DataConfig(str(tmp_path / "rows.parquet"), unlabeled_rows=True, cache_gib=0))
    assert splits.labeled.images is None
    for image_set in (splits.train, splits.labeled, splits.val, splits.test):
        image_set.cache()
    assert sorted(marks(splits.train) + marks(splits.val) + marks(splits.test)) == list(range(50))
    for image_set in (splits.train, splits.labeled, splits.val, splits.test):
        assert image_set.labels.tolist() == [-1 if mark % 5 > 2 else mark % 5 for mark in marks(image_set)]
    assert (splits.train.labels == -1).sum() == 20
    assert splits.labeled.labels.min() == splits.val.labels.min() == splits.test.labels.min() == 0
    assert torch.equal(splits.class_frequencies, splits.labeled.labels.bincount() / len(splits.labeled))
    marked([None] * 9 + [0, 1]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="2 labelled images"):
        load_splits(DataConfig(str(tmp_path / "rows.parquet"), unlabeled_rows=True))


@pytest.mark.parametrize(("split", "told"), [("test", "test"), ("validation", "validation"), (None, "held out of train")])
def test_what_test_images_are_is_told(tmp_path, split, told):
    data = Dataset.from_parquet(save(tmp_path), cache_dir=str(tmp_path / "cache"))
    DatasetDict({"train": data, **({} if split is None else {split: data})}).save_to_disk(str(tmp_path / "saved"))
    assert load_splits(DataConfig(str(tmp_path / "saved"))).tested_on == told


def test_a_second_set_without_labels(tmp_path):
    path = save(tmp_path, labels=[0, 1, 1, 2] * 3)
    grey = Dataset.from_dict({"picture": [PILImage.new("L", (30, 20), i) for i in range(7)]}, Features({"picture": Image()}))
    DatasetDict({"extra": grey}).save_to_disk(str(tmp_path / "more"))
    alone = load_splits(DataConfig(path))
    splits = load_splits(DataConfig(path, unlabeled=f"{tmp_path / 'more'}?split=extra"))
    assert splits.train.labels.tolist() == alone.train.labels.tolist() + [-1] * 7
    assert torch.equal(splits.train.images[:-7], alone.train.images)
    assert torch.equal(splits.train.images[-7:], torch.arange(7).byte().view(-1, 1, 1, 1).expand(-1, 3, 10, 10))
    assert torch.equal(splits.labeled.images, alone.train.images)
    assert torch.equal(splits.class_frequencies, alone.class_frequencies)
    assert torch.equal(splits.test.images, alone.test.images)
    marked([0, -1, 2]).to_parquet(tmp_path / "marked.parquet")  # the same column name, and labels that don't matter
    splits = load_splits(DataConfig(path, unlabeled=str(tmp_path / "marked.parquet")))
    assert splits.train.labels[-4:].tolist() == [alone.train.labels[-1], -1, -1, -1]
    assert splits.train.images[-3:, :, 0, 0].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    with pytest.raises(InputError, match=r"no split 'train': choose split from extra, as .*more\?split=NAME"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "more")))
    both = Dataset.from_dict({"a": pictures(2), "b": pictures(2)}, Features({"a": Image(), "b": Image()}))
    both.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"image columns a, b: choose one, as .*image_column=NAME"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "two.parquet")))
    bad = Dataset.from_dict({"picture": [{"bytes": b"no", "path": None}]}, Features({"picture": Image()}))
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*bad\.parquet, split train has an image that can't be decoded"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "bad.parquet")))
