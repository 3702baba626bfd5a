import os
import unicodedata

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from image_sets import pictures
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, load_images, load_splits
from timm_jem.data.folders import visible_files


def lay(root, *files):
    """Image files of 10×10 at these places."""
    for image, name in zip(pictures(len(files)), files, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return str(root)


def classes(*names, above="", n=6):
    return [os.path.join(above, name, f"{i}.png") for name in names for i in range(n)]


def test_splits_by_folders(tmp_path):
    path = lay(tmp_path, *classes("bee", "cat", above="Train"), *classes("cat", "bee", above="val", n=2))
    splits = load_splits(DataConfig(path))
    assert splits.class_names == ["bee", "cat"]
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (12, 4)
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert len(load_images(path, channels=3, size=(4, 4), count=50)) == 4


def test_names_that_are_those_of_splits_lose_no_image(tmp_path):
    kinds = load_splits(DataConfig(lay(tmp_path / "kinds", *classes("train", "car", "test"))))
    assert kinds.class_names == ["car", "test", "train"]
    assert len(kinds.train) + len(kinds.val) + len(kinds.test) == 18
    files = lay(tmp_path / "files", *classes("bee", "cat"), "bee/test 1.png", "cat/val_2.png", "cat/metadata.png")
    named = load_splits(DataConfig(files))
    assert len(named.train) + len(named.val) + len(named.test) == 15


def test_test_images_of_classes_that_training_has_not(tmp_path):
    """Unsorted ones in a folder of theirs, as competitions give them, would be wrong one and all."""
    path = lay(tmp_path, *classes("bee", "cat", above="train"), *classes("unsorted", above="test"))
    with pytest.raises(InputError, match=r"no test image .* 'unsorted': give others .* or remove them"):
        load_splits(DataConfig(path))
    lay(tmp_path, *classes("bee", above="test"))
    assert "1 without training images, such as 'unsorted'" in load_splits(DataConfig(path)).summary()


def test_hidden_files_are_no_images_and_others_are_told(tmp_path, capsys):
    lay(tmp_path, *classes("bee", "cat"), ".thumbs/x.png", "__MACOSX/bee/x.png", "cat/._1.png")
    for name in (".DS_Store", "cat/Thumbs.db", "cat/1.HEIC", "bee/2.heic"):
        (tmp_path / name).write_bytes(b"x")
    splits = load_splits(DataConfig(str(tmp_path)))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 12
    assert f"{tmp_path}: passed over 1 .db, 2 .heic\n" in capsys.readouterr().err


def test_formats_and_names(tmp_path):
    kinds = ("JPG", "webp", "gif", "bmp", "tif")
    lay(tmp_path, *(f"{name}/{i}.{kind}" for name in ("bée", "猫 1") for i, kind in enumerate(kinds)))
    splits = load_splits(DataConfig(str(tmp_path)))
    assert splits.class_names == ["bée", "猫 1"]
    assert len(splits.train) + len(splits.val) + len(splits.test) == 10
    form = {kind: unicodedata.normalize(kind, "bée") for kind in ("NFC", "NFD")}
    both = lay(tmp_path / "both", *classes(form["NFC"], "x", above="train"), *classes(form["NFD"], "x", above="test", n=2))
    assert load_splits(DataConfig(both)).class_names == [form["NFC"], "x"]


def test_links_are_followed(tmp_path):
    lay(tmp_path / "store", *classes("bee", "cat"))
    (tmp_path / "linked").mkdir()
    for name in ("bee", "cat"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "store" / name)
    linked, stored = (load_splits(DataConfig(str(tmp_path / name))) for name in ("linked", "store"))
    assert torch.equal(linked.train.images, stored.train.images)


def test_no_link_is_followed_in_circles(tmp_path):
    lay(tmp_path / "store", *classes("bee", "cat"))
    (tmp_path / "store" / "bee" / "round").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "bee" / "itself").symlink_to("itself")
    (tmp_path / "store" / "cat" / "bee").symlink_to(tmp_path / "store" / "bee")
    found = [str(path) for path in visible_files(tmp_path / "store")]
    bees = [f"cat/bee/{i}.png" for i in range(6)]
    assert sorted(found) == sorted([*classes("bee", "cat"), *bees, "bee/itself", "cat/bee/itself"])
    (tmp_path / "store" / "cat" / "bee").unlink()
    splits = load_splits(DataConfig(str(tmp_path / "store")))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 12


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png", "3.png"], r"has images and no class folders: put the images .*metadata\.csv"),
        (["train/1.png", "test/2.png"], "has images and no class folders"),
        (classes("bee"), "has one class folder, bee, and a classifier needs two"),
        (classes("bee", above="train"), "has one class folder, bee"),
        ([*classes("bee", "cat"), "cover.png"], r"images outside of the class folders, such as cover\.png"),
        ([*classes("bee", "cat"), "cat/old/1.png"], r"images deeper than the class folders, such as cat/old/1\.png"),
        (classes("2023/bee", "2024/cat"), r"deeper than the class folders, such as 2023/bee/0\.png"),
    ],
)
def test_folders_without_classes_say_what_to_do(tmp_path, files, message):
    path = lay(tmp_path, *files)
    with pytest.raises(InputError, match=message) as error:
        load_splits(DataConfig(path))
    assert "\n" not in str(error.value)
    assert load_images(path, channels=3, size=(4, 4), count=100).shape[1:] == (3, 4, 4)  # which needs no classes


def test_a_name_that_is_not_utf8(tmp_path):
    lay(tmp_path, *classes("bee", "cat"))
    os.rename(os.fsencode(tmp_path / "cat" / "1.png"), os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    with pytest.raises(InputError, match=r"cat/caf\\udce9\.png', whose name is not UTF-8: rename it"):
        load_splits(DataConfig(str(tmp_path)))


def test_metadata(tmp_path, capsys):
    lay(tmp_path, *(f"{i}.png" for i in range(12)))

    def told(rows, **settings):
        (tmp_path / "metadata.csv").write_text(rows)
        return load_splits(DataConfig(str(tmp_path), **settings))

    splits = told("file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10)))
    assert splits.class_names == ["a", "b"]
    assert len(splits.train) + len(splits.val) + len(splits.test) == 10
    assert "passed over 2 images that no metadata tells of" in capsys.readouterr().err
    numbers = "file_name,label\n0.png,\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(1, 12))  # read as 1.0, 0.0, ...
    with pytest.raises(InputError, match=r"row 0, has the label None.*unlabeled_rows"):
        told(numbers)
    splits = told(numbers, unlabeled_rows=True)
    assert splits.class_names == ["0", "1"]
    assert int((splits.train.labels == -1).sum()) == 1
    with pytest.raises(InputError, match=r"among image, kind: choose one of kind with --data\.label_column"):
        told("file_name,kind\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12)))
    with pytest.raises(InputError, match="no single label column among image: add a column of classes, label"):
        told("file_name\n" + "".join(f"{i}.png\n" for i in range(12)))
    with pytest.raises(InputError, match=r"row 0 of split train \(.*gone\.png\) has an image that can't be decoded"):
        told("file_name,label\ngone.png,a\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12)))


def rows(*files: str, header="file_name,label") -> str:
    return f"{header}\n" + "".join(f"{file},{'ab'[int(file[-5]) % 2]}\n" for file in files)


def test_metadata_lose_no_image_whatever_its_name(tmp_path):
    files = [f"{word}_{i}.png" for word in ("train", "test", "x") for i in range(4)]
    for name, inside in (("flat", ""), ("images", "images/")):
        lay(tmp_path / name, *(inside + file for file in files))
        (tmp_path / name / "metadata.csv").write_text(rows(*(inside + file for file in files)))
        splits = load_splits(DataConfig(str(tmp_path / name)))
        assert len(splits.train) + len(splits.val) + len(splits.test) == 12
        assert splits.class_names == ["a", "b"]


@pytest.mark.parametrize("where", ["root", "each", "[1]"])
def test_metadata_of_folders_that_are_splits(tmp_path, where):
    tmp_path /= where
    files = {split: [f"{i}.png" for i in range(8 - 4 * (split == "test"))] for split in ("train", "test")}
    lay(tmp_path, *(f"{split}/{file}" for split, names in files.items() for file in names))
    for split, names in files.items():
        (tmp_path / split / "metadata.csv").write_text(rows(*names))
    if where == "root":
        for split in files:
            (tmp_path / split / "metadata.csv").unlink()
        (tmp_path / "metadata.csv").write_text(rows(*(f"{split}/{file}" for split, names in files.items() for file in names)))
    splits = load_splits(DataConfig(str(tmp_path)))
    assert (len(splits.train) + len(splits.val), splits.test.labels.tolist()) == (8, [0, 1, 0, 1])
    again = load_splits(DataConfig(str(tmp_path)))
    assert torch.equal(again.train.images, splits.train.images)


def test_metadata_of_one_split_are_those_images(tmp_path, capsys):
    lay(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(8)))
    (tmp_path / "train" / "metadata.csv").write_text(rows(*(f"{i}.png" for i in range(8))))
    splits = load_splits(DataConfig(str(tmp_path)))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 8
    assert "passed over 8 images that no metadata tells of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n", "metadata.csv, which tells of no image: fill it in, or remove it"),
        ("id,label\n1,a\n", "file_name"),
        ("file_name,label\n../../x.png,a\n", "not allowed"),
    ],
)
def test_metadata_that_tell_nothing(tmp_path, text, message):
    lay(tmp_path, *classes("bee", "cat"))
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_splits(DataConfig(str(tmp_path)))
    assert "\n" not in str(error.value)


def test_metadata_that_tell_nothing_beside_others_are_named(tmp_path):
    lay(tmp_path, *classes("train", "test"))
    (tmp_path / "train" / "metadata.csv").write_text(rows(*(f"{i}.png" for i in range(6))))
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(InputError, match=r"has test.metadata\.csv, which tells of no image"):
        load_splits(DataConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("train", "test", "names", "tested"),
    [
        ("01010101" + " ", ["0", "1", "1", "0"], ["0", "1"], [0, 1, 1, 0]),  # which pandas reads as 0.0 and 1.0
        ("abababab" + " ", [""] * 4, ["a", "b"], None),  # a test split without labels is none
    ],
)
def test_metadata_of_splits_may_have_gaps(tmp_path, train, test, names, tested):
    for split, labels in (("train", train), ("test", test)):
        lay(tmp_path, *(f"{split}/{i}.png" for i in range(len(labels))))
        text = "".join(f"{i}.png,{label.strip()}\n" for i, label in enumerate(labels))
        (tmp_path / split / "metadata.csv").write_text("file_name,label\n" + text)
    splits = load_splits(DataConfig(str(tmp_path), unlabeled_rows=True))
    assert splits.class_names == names
    assert tested is None or splits.test.labels.tolist() == tested
    assert int((splits.train.labels == -1).sum()) == train.count(" ")


def rows_of(path, *names):
    """Ten images of each class in a .parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [name for name in names for _ in range(10)]
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict({"image": pictures(len(labels)), "label": labels}, features).to_parquet(path)


def test_a_folder_of_parquet_files_is_these_whatever_lies_beside(tmp_path, capsys):
    for name in ("part.0", "part.1"):
        rows_of(tmp_path / "none" / f"{name}.parquet", "bee", "cat")
    lay(tmp_path, "none/figures/1.png", "none/figures/2.png", "none/figures/3.png")
    (tmp_path / "none" / "README.md").write_text("# Bees and cats")
    for name in ("a.csv", "b.csv", "c.csv"):
        (tmp_path / "none" / name).write_text("a\n1\n")
    splits = load_splits(DataConfig(str(tmp_path / "none")))
    assert splits.class_names == ["bee", "cat"]
    assert len(splits.train) + len(splits.val) + len(splits.test) == 40
    assert "none: passed over 3 .csv, 3 images" in capsys.readouterr().err
    assert len(load_images(str(tmp_path / "none"), channels=3, size=(4, 4), count=100)) == 40
    for name in ("train-2023", "test_2023", "data/more-00000-of-00001", "features"):
        rows_of(tmp_path / "some" / f"{name}.parquet", "bee", "cat")
    splits = load_splits(DataConfig(str(tmp_path / "some")))
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (20, 20)
    assert "some: passed over 1 .parquet" in capsys.readouterr().err
    assert len(load_images(f"{tmp_path / 'some'}?split=more", channels=3, size=(4, 4), count=100)) == 20


def test_a_card_that_tells_files_has_the_last_word(tmp_path):
    for i in range(2):
        rows_of(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", "bee", "cat")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-00000*\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert len(load_images(str(tmp_path), channels=3, size=(4, 4), count=100)) == 20
    (tmp_path / "README.md").write_text("---\nconfigs: [1, 2\na: : b\n---\n")
    with pytest.raises(InputError, match=r"README.md begins with what is no YAML \(.*\): mend it, or remove the file") as error:
        load_splits(DataConfig(str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_name_means_itself_alone(tmp_path):
    rows_of(tmp_path / "a[1].parquet", "bee", "cat")
    rows_of(tmp_path / "a1.parquet", "dog", "elk")
    rows_of(tmp_path / "b [1]" / "rows.parquet", "bee", "cat")
    rows_of(tmp_path / "b 1" / "rows.parquet", "dog", "elk")
    for name in ("a[1].parquet", "b [1]"):
        assert load_splits(DataConfig(str(tmp_path / name))).class_names == ["bee", "cat"]
    (tmp_path / "c[1]").mkdir()
    (tmp_path / "c[1]" / "rows.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match=r"c\[1\] has one of .* in its name, which mean others than it: rename it"):
        load_splits(DataConfig(str(tmp_path / "c[1]")))


def test_folders_are_left_out_for_a_reason(tmp_path, monkeypatch):
    lay(tmp_path, *classes("bee", "__background__", "__MACOSX", ".cache"))
    assert load_splits(DataConfig(str(tmp_path))).class_names == ["__background__", "bee"]
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed(path if "bee" not in str(path) else tmp_path / "none"))
    with pytest.raises(InputError, match=r"bee can't be listed \(.*\): make it readable, or remove it"):
        load_splits(DataConfig(str(tmp_path)))


@pytest.mark.parametrize("kind", ["parquet", "tar", "arrow"])
def test_a_table_beside_class_folders_is_none_of_images(tmp_path, capsys, kind):
    lay(tmp_path, *classes("bee", "cat"), "bee/test_1.png")
    (tmp_path / f"features.{kind}").write_bytes(b"x")
    splits = load_splits(DataConfig(str(tmp_path)))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 13
    assert f"passed over 1 .{kind}" in capsys.readouterr().err


def test_small_classes(tmp_path):
    """A fraction of each class is none of three images, and of forty such classes it is twelve."""
    splits = load_splits(DataConfig(lay(tmp_path / "many", *classes(*(f"c{i:02}" for i in range(40)), n=3)), test_fraction=0.1))
    assert (len(splits.test), len(splits.val), len(splits.train)) == (12, 11, 97)
    assert splits.test.labels.bincount().max() == splits.val.labels.bincount().max() == 1
    assert splits.train.labels.bincount(minlength=40).min() >= 1
    lone = load_splits(DataConfig(lay(tmp_path / "lone", *classes("bee", "cat", n=20), "dog/1.png")))
    assert lone.train.labels.bincount().tolist()[2] == 1  # never held out
    with pytest.raises(InputError, match=r"a fraction of 0\.95 holds out all images of class 'cat': lower it"):
        load_splits(DataConfig(lay(tmp_path / "all", *classes("bee", n=40), *classes("cat", n=3)), test_fraction=0.95))


def test_one_class_that_is_left(tmp_path):
    path = lay(tmp_path, *classes("bee", "cat"))
    for i in range(6):
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"too few images that can be read, .* of the 6 broken ones"):
        load_splits(DataConfig(path, skip_broken=True))


def test_no_test_image_that_is_left(tmp_path):
    path = lay(tmp_path, *classes("bee", "cat", above="train"), *classes("bee", "cat", above="test", n=1))
    for name in ("bee", "cat"):
        (tmp_path / "test" / name / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"too few images that can be read, .* of the 2 broken ones"):
        load_splits(DataConfig(path, skip_broken=True))


def test_what_was_loaded(tmp_path):
    counts = "10 classes, 1,295 training / 143 validation / 359 test images"
    assert load_splits(DataConfig()).summary() == f"{counts}, grey 8×8 (500 looked at)"
    lay(tmp_path, *classes("bee", "cat", above="train"), *classes("bee", "cat", "dog", above="test", n=2))
    PILImage.new("RGB", (40, 30)).save(tmp_path / "train" / "bee" / "0.png")
    PILImage.new("L", (24, 24)).save(tmp_path / "train" / "bee" / "1.png")
    (tmp_path / "train" / "cat" / "5.png").write_bytes(b"no image")
    splits = load_splits(DataConfig(str(tmp_path), skip_broken=True, image_size=20))
    assert splits.summary() == (
        "3 classes (1 without training images, such as 'dog'), 9 training / 2 validation / 6 test images, "
        "RGB 20×20 (files are 10×10 to 30×40, 1 grey), 1 broken one left out"
    )
