import io

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, augment, digits, load_splits, to_pixels


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
        (lambda t: save(t, labels=[1] * 11 + [-2], feature=Value("int64")), {}, "row 11, has the label -2"),
        (broken, {}, "can't be decoded.*mend or remove"),
        (save, {"crop_padding": 10}, "crop_padding"),
        (save, {"val_fraction": 0.99}, "lower it"),
        (save, {"test_split": "train"}, "the train split"),
        (lambda t: save(t, images=[PILImage.fromarray(np.ones((8, 8), np.float32))] * 12), {}, "row 0 .*convert it"),
        (lambda t: save(t, images=pictures(2)), {}, "2 images"),
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


@pytest.mark.parametrize("bad", [{"val_fraction": 0.0}, {"test_fraction": 1.5}, {"channels": 2}, {"image_size": 0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        DataConfig(**bad)
