import io
import random

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, StreamedSet, digits, load_images, load_splits
from timm_jem.data.augmentation import AutoAugment, augment
from timm_jem.data.sources import hub_id
from timm_jem.pixels import to_pixels


@pytest.fixture(autouse=True)
def no_pause_after_parquet(monkeypatch):
    """datasets sleeps for seconds wherever a shuffled stream of parquet files ends, in case the process ends as well."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def pictures(n=12, size=(10, 10), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    return [PILImage.fromarray(a) for a in rng.integers(0, 256, shape, dtype=np.uint8)]


def save(tmp_path, images=None, labels=None, image="image", label="label", feature=None):
    images = pictures() if images is None else images
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    features = Features({image: Image(), label: feature or ClassLabel(names=["ant", "bee", "cat"])})
    rows = Dataset.from_dict({image: images, label: labels}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


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


def test_which_names_are_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert [hub_id(name) for name in ("cifar10", "user/name")] == ["cifar10", "user/name"]
    local = ("digits", "photos", "./elsewhere", str(tmp_path / "photos"), "rows.parquet")
    assert [hub_id(name) for name in local] == [None] * len(local)


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


def test_augmentation():
    u = torch.arange(2 * 6 * 6).float().view(1, 2, 6, 6).expand(500, 2, 6, 6)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(u, crop_padding=0, flip=False, generator=generator), u)
    flipped = augment(u, crop_padding=0, flip=True, generator=generator)
    is_flipped = (flipped == u.flip(-1)).flatten(1).all(1)
    assert ((flipped == u).flatten(1).all(1) ^ is_flipped).all()
    assert 180 < is_flipped.sum() < 320
    cropped = augment(u, crop_padding=2, flip=False, generator=generator)
    padded = torch.nn.functional.pad(u[:1], [2] * 4, mode="reflect")[0]
    windows = {tuple(padded[:, i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(c.flatten().tolist()) for c in cropped} == windows


def test_flips_and_crops_suit_the_data(tmp_path):
    numbers = ClassLabel(names=["0", "1", "2"])
    assert not load_splits(DataConfig(save(tmp_path, feature=numbers))).flip
    splits = load_splits(DataConfig(save(tmp_path, images=pictures(12, size=(32, 32)))))
    assert (splits.crop_padding, splits.flip) == (4, True)


def broken(tmp_path):
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "png")
    cells = [{"bytes": buffer.getvalue(), "path": None} for _ in range(12)]
    cells[5] = {"bytes": b"no image", "path": None}
    return save(tmp_path, images=cells)


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

    monkeypatch.setattr(datasets, "load_dataset", offline)
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
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DataConfig(**bad)


def marked(labels, start=0):
    """Grey images of 4×4 whose pixels are start, start + 1, ..."""
    cells = [PILImage.new("L", (4, 4), start + i) for i in range(len(labels))]
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    return Dataset.from_dict({"image": cells, "label": labels}, features)


def marks(image_set):
    return image_set.images[:, 0, 0, 0].tolist()


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


def test_a_second_set_without_labels(tmp_path):
    path = save(tmp_path, labels=[0, 1, 1, 2] * 3)
    grey = Dataset.from_dict({"picture": [PILImage.new("L", (30, 20), i) for i in range(7)]}, Features({"picture": Image()}))
    DatasetDict({"extra": grey}).save_to_disk(str(tmp_path / "more"))
    alone = load_splits(DataConfig(path))
    settings = {"unlabeled": str(tmp_path / "more"), "unlabeled_split": "extra"}
    splits = load_splits(DataConfig(path, **settings))
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
    with pytest.raises(InputError, match=r"no split 'train': choose unlabeled_split from extra"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "more")))
    both = Dataset.from_dict({"a": pictures(2), "b": pictures(2)}, Features({"a": Image(), "b": Image()}))
    both.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"image columns a, b: choose one, as .*image_column=NAME"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "two.parquet")))
    bad = Dataset.from_dict({"picture": [{"bytes": b"no", "path": None}]}, Features({"picture": Image()}))
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*bad\.parquet, split train has an image that can't be decoded"):
        load_splits(DataConfig(path, unlabeled=str(tmp_path / "bad.parquet")))


def streamed_marks(data, seed=0):
    return [int(data.decode(image)[0, 0, 0]) for image in data.epoch(np.random.default_rng(seed))]


def test_a_stream_holds_out_what_it_never_trains_on(tmp_path):
    marked([i % 3 for i in range(60)]).to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(str(tmp_path / "rows.parquet"), streaming=True, stream_held_out=9, shuffle_buffer=20)
    splits, again = load_splits(config), load_splits(config)
    assert isinstance(splits.train, StreamedSet)
    assert (len(splits.val), len(splits.test)) == (9, 9)
    assert marks(splits.val) == marks(again.val)
    assert splits.image_shape == (1, 4, 4)
    assert splits.val.labels.tolist() == [mark % 3 for mark in marks(splits.val)]
    assert torch.equal(splits.class_frequencies, torch.full((3,), 1 / 3))
    assert splits.labeled is None
    first, second = streamed_marks(splits.train), streamed_marks(splits.train, seed=1)
    assert first != second
    for epoch in (first, second):
        assert sorted(epoch + marks(splits.val) + marks(splits.test)) == list(range(60))
    with pytest.raises(InputError, match="60 labelled images, and 60 are to be held out: lower"):
        load_splits(DataConfig(str(tmp_path / "rows.parquet"), streaming=True, stream_held_out=30))


@pytest.mark.parametrize("stored", ["disk", "folder", "parquet"])
def test_a_stream_reads_so_much_of_the_test_split(tmp_path, stored):
    parts = DatasetDict({"train": marked([0, 1, 2] * 10), "test": marked([0, 1, 2] * 5, start=100)})
    if stored == "disk":
        parts.save_to_disk(str(tmp_path / "set"))
    for name, rows in parts.items():
        for i, row in enumerate(rows):
            if stored == "folder":
                (tmp_path / "set" / name / "abc"[row["label"]]).mkdir(parents=True, exist_ok=True)
                row["image"].save(tmp_path / "set" / name / "abc"[row["label"]] / f"{i}.png")
        if stored == "parquet":
            rows.to_parquet(tmp_path / "set" / f"{name}-0.parquet")
    splits = load_splits(DataConfig(str(tmp_path / "set"), streaming=True, stream_held_out=6, channels=1))
    assert (len(splits.val), len(splits.test)) == (6, 6)
    assert min(marks(splits.test)) >= 100
    assert splits.test.labels.tolist() == [(mark - 100) % 3 for mark in marks(splits.test)]
    assert sorted(streamed_marks(splits.train) + marks(splits.val)) == list(range(30))
    assert len(load_splits(DataConfig(str(tmp_path / "set"), streaming=True, stream_held_out=16)).test) == 15


def test_streamed_digits_are_the_digits():
    splits = load_splits(DataConfig(streaming=True, stream_held_out=100))
    assert splits.class_names == [str(i) for i in range(10)]
    assert splits.val.labels.bincount(minlength=10).min() > 0
    images = torch.stack([splits.train.decode(image) for image in splits.train.epoch(np.random.default_rng(0))])
    total = sum(int(part.sum()) for part in (images, splits.val.images, splits.test.images))
    assert total == int(np.stack([np.asarray(image) for image in digits()["image"]]).sum())


def test_a_stream_with_rows_without_labels(tmp_path):
    marked([0, 1, 2, None, -1] * 10).to_parquet(tmp_path / "rows.parquet")
    settings = {"streaming": True, "stream_held_out": 3}
    with pytest.raises(InputError, match=r"row \d+ of the shuffled split train .*data\.unlabeled_rows"):
        load_splits(DataConfig(str(tmp_path / "rows.parquet"), **settings))
    splits = load_splits(DataConfig(str(tmp_path / "rows.parquet"), unlabeled_rows=True, **settings))
    held_out = marks(splits.val) + marks(splits.test)
    assert sorted(streamed_marks(splits.train) + held_out) == list(range(50))
    assert sorted(streamed_marks(splits.labeled) + held_out) == [mark for mark in range(50) if mark % 5 < 3]
    assert sum(image.label == -1 for image in splits.train.epoch(np.random.default_rng(0))) == 20
    assert all(image.label >= 0 for image in splits.labeled.epoch(np.random.default_rng(0)))


def test_streams_that_cannot_be(tmp_path):
    path = save(tmp_path, labels=["b", "a", "c"] * 4, feature=Value("string"))
    with pytest.raises(InputError, match=r"no class names for 'label' .*leave data\.streaming out"):
        load_splits(DataConfig(path, streaming=True, stream_held_out=2))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(InputError, match="can't be") as error:
        load_splits(DataConfig(path, streaming=True, stream_held_out=2))
    assert "\n" not in str(error.value)
    for bad in ({"labels_per_class": 1}, {"unlabeled": "digits"}):
        with pytest.raises(InputError, match=rf"{next(iter(bad))} .*excludes data\.streaming"):
            DataConfig("cifar10", streaming=True, **bad)
    with pytest.raises(InputError, match="the train split itself"):
        DataConfig("cifar10", unlabeled="cifar10")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "rand-m9-n3-tweights", "augmix-m3-w3", "original", "v0-mstd0.5", "3a"])
def test_policies_of_timm(policy, channels):
    images = torch.randint(0, 256, (12, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    policy = AutoAugment(policy, (16, 16))
    changed = policy(images, [(7, i) for i in range(12)])
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, images)
    assert torch.equal(policy(images[5:6], [(7, 5)])[0], changed[5])
    assert not torch.equal(policy(images, [(8, i) for i in range(12)]), changed)
    assert random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


@pytest.mark.parametrize("bad", ["", "rant", "rand-m9-q3", "rand-m9-mstd", "augmix-m", "v1", "v0-m3", "rand-n99-tweights"])
def test_unknown_policies_are_named(bad):
    with pytest.raises(InputError, match=f"auto_augment '{bad}' .*rand-m9-mstd0.5") as error:
        AutoAugment(bad, (16, 16))
    assert "\n" not in str(error.value)


def asked(name, **settings):
    return load_images(str(name), **{"channels": 1, "size": (4, 4), "count": 100, **settings})


def test_images_of_any_set(tmp_path):
    parts = {name: marked([0] * 6, start) for name, start in (("train", 0), ("validation", 50), ("test", 100), ("extra", 150))}
    for name, rows in parts.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
    DatasetDict(parts).save_to_disk(str(tmp_path / "set"))

    def levels(name, **settings):
        images = asked(tmp_path / name, **settings)
        assert images.dtype == torch.uint8
        assert (images == images[:, :1, :1, :1]).all()
        return images[:, 0, 0, 0].tolist()

    assert levels("set") == list(range(100, 106))
    assert levels("set", split="extra") == list(range(150, 156))
    assert levels("extra.parquet") == levels("extra.parquet", split="what") == list(range(150, 156))
    for gone, first in (("test", 50), ("validation", 0), ("train", 150)):
        del parts[gone]
        DatasetDict(parts).save_to_disk(str(tmp_path / gone))
        assert levels(gone) == list(range(first, first + 6))
    parts["extra"].save_to_disk(str(tmp_path / "one"))
    assert levels("one") == list(range(150, 156))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        PILImage.new("L", (4, 4), i).save(folder / f"{i}.png")
    assert sorted(levels("folder")) == [0, 1, 2]


def test_some_images_of_a_set(tmp_path):
    marked([0] * 200).to_parquet(tmp_path / "rows.parquet")
    first, again, other = (asked(tmp_path / "rows.parquet", count=50, seed=seed)[:, 0, 0, 0].tolist() for seed in (0, 0, 1))
    assert first == again != other
    for chosen in (first, other):
        assert len(set(chosen)) == 50
        assert chosen == sorted(chosen)
        assert chosen[0] < 50
        assert chosen[-1] >= 150
    assert len(asked(tmp_path / "rows.parquet", count=1000)) == 200
    everything = np.stack([np.asarray(image) for image in digits()["image"]])
    assert torch.equal(asked("digits", size=(8, 8), count=2000)[:, 0], torch.from_numpy(everything))


def test_images_are_made_alike(tmp_path):
    left = np.zeros((6, 12, 3), dtype=np.uint8)
    left[:, :3] = left[:, 9:] = 255  # what the crop takes away
    left[:, 3:9] = (200, 100, 50)
    features = Features({"photo": Image(), "mask": Image()})
    cells = [PILImage.fromarray(left), PILImage.new("L", (3, 3), 7)]
    Dataset.from_dict({"photo": cells, "mask": cells[::-1]}, features).to_parquet(tmp_path / "rows.parquet")
    images = asked(tmp_path / "rows.parquet", channels=3, size=(6, 6), image_column="photo")
    assert images.shape == (2, 3, 6, 6)
    assert torch.equal(images[0, :, 3, 3], torch.tensor([200, 100, 50], dtype=torch.uint8))
    assert images[0, 0].max() == 200
    assert (images[1] == 7).all()
    grey = asked(tmp_path / "rows.parquet", size=(2, 3), image_column="mask")
    assert grey.shape == (2, 1, 2, 3)
    with pytest.raises(InputError, match="image columns photo, mask: choose one, as .*image_column=NAME"):
        asked(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda t: t / "nothing.parquet", {}, "no data set at"),
        (lambda t: "digits", {"split": "test"}, "digits has no split 'test': choose split from train"),
        (save, {"image_column": "photo"}, "no image column 'photo'.*image"),
        (broken, {}, "row 5 of .*split test has an image that can't be decoded"),
        (save, {"channels": 4}, "4 channels"),
        (save, {"size": (4, 0)}, "width is 0"),
        (save, {"count": 0}, "count is 0"),
        (save, {"seed": -1}, "seed is -1"),
    ],
)
def test_images_that_cannot_be_had(tmp_path, make, settings, message):
    with pytest.raises(InputError, match=message) as error:
        asked(make(tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_sets_without_images(tmp_path, monkeypatch):
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(InputError, match="no image column among text: store images"):
        asked(tmp_path / "text.parquet")
    marked([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"empty\.parquet' can't be loaded") as error:
        asked(tmp_path / "empty.parquet")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: DatasetDict({"train": marked([0]), "test": marked([])}))
    assert len(asked("user/half", split="train")) == 1
    with pytest.raises(InputError, match="split test of user/half is empty: choose another"):
        asked("user/half")


def test_a_configuration_of_a_set_on_the_hub(monkeypatch):
    def load_dataset(name, config_name, streaming):
        assert (name, config_name, streaming) == ("user/numbers", "cropped", False)
        return DatasetDict({"train": marked([0] * 3), "test": marked([0] * 2, start=9)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert asked("user/numbers", config_name="cropped")[:, 0, 0, 0].tolist() == [9, 10]
