import io
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import HfApi
from huggingface_hub.utils import httpx
from image_sets import marked, pictures, save
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, load_images, load_splits
from timm_jem.data.sources import Asked, absolute, check_remote, hub_id, load, public_name, read_name, told_kinds


def test_which_names_are_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    hubs = {"cifar10": "cifar10", "user/name": "user/name", "user/name?split=a": "user/name"}
    assert {name: hub_id(name) for name in hubs} == hubs
    local = ("digits", "photos", "photos?split=a", "./elsewhere", str(tmp_path / "photos"), "rows.parquet", "~/photos")
    assert [hub_id(name) for name in local] == [None] * len(local)


@pytest.mark.parametrize("name", ["imagefolder", "csv", "pandas", "webdataset"])
def test_readers_of_datasets_do_not_read_the_current_folder(tmp_path, monkeypatch, name):
    """A stranger's config.json may name one."""
    monkeypatch.chdir(tmp_path)
    for label in ("bee", "cat"):
        (tmp_path / label).mkdir()
        PILImage.new("L", (8, 8)).save(tmp_path / label / "1.png")
    with pytest.raises(InputError, match=f"no folder or file here is called {name}, a reader of datasets'"):
        load(name, None, "train", False)
    (tmp_path / name).mkdir()
    (tmp_path / "bee").rename(tmp_path / name / "bee")
    (tmp_path / "cat").rename(tmp_path / name / "cat")
    assert len(load(name, None, "train", False)["train"]) == 2


def test_a_set_on_the_hub_may_be_made_of_files_of_this_machine(tmp_path, monkeypatch):
    """``datasets`` resolves what a README names, wherever it lies."""
    path, build = save(tmp_path), datasets.load_dataset_builder
    remote = "hf://datasets/user/name@0123/train.parquet"
    for file, refused in ((path, True), (f"file://{path}", True), (remote, False), (f"zip://a.parquet::{remote}", False)):
        builder = build("parquet", data_files={"train": path})
        builder.config.data_files = {"train": [file]}
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, builder=builder: builder)
        if refused:
            with pytest.raises(InputError, match=r"user/name on the Hub asks for '.* of this machine: give another"):
                check_remote("user/name", None)
        else:
            check_remote("user/name", None)


def test_cells_of_a_set_on_the_hub_name_no_files_of_this_machine(tmp_path, monkeypatch):
    for place in ("cache", "home"):
        (tmp_path / place).mkdir()
        PILImage.new("L", (8, 8)).save(tmp_path / place / "1.png")
    os.symlink(tmp_path / "home" / "1.png", tmp_path / "cache" / "link.png")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("timm_jem.data.sources._look_for_the_hub", lambda name: None)

    remote = "hf://datasets/user/name@0123/train.parquet"

    def asked(path, files=(remote,)):
        found = Dataset.from_dict({"image": [{"bytes": None, "path": path}, None]}, Features({"image": Image()}))
        builder = SimpleNamespace(
            config=SimpleNamespace(data_files={"train": list(files)}),
            download_and_prepare=lambda: None,
            as_dataset=lambda: DatasetDict({"train": found}),
        )
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
        return load("user/name", None, "train", False)

    for path in (str(tmp_path / "cache" / "1.png"), "hf://datasets/user/name@0123/1.png"):
        assert len(asked(path)["train"]) == 2
    for path in (str(tmp_path / "home" / "1.png"), str(tmp_path / "cache" / ".." / "home" / "1.png"), "/dev/zero", "1.png"):
        with pytest.raises(InputError, match=r"data set user/name on the Hub asks for .* of this machine: give another"):
            asked(path)
    with pytest.raises(InputError, match="of this machine"):
        asked(str(tmp_path / "cache" / "link.png"))
    with pytest.raises(InputError, match=r"asks for '/home/me/x\.parquet' of this machine"):
        asked(remote, ["/home/me/x.parquet"])


def test_a_set_that_its_builder_makes_is_the_one_that_datasets_loads(tmp_path, monkeypatch):
    path, build = save(tmp_path), datasets.load_dataset_builder
    whole = datasets.load_dataset("parquet", data_files={"train": path})["train"]
    monkeypatch.setattr("timm_jem.data.sources._look_for_the_hub", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: build("parquet", data_files={"train": path}))
    with pytest.raises(InputError, match=r"user/name on the Hub asks for '.* of this machine"):  # a long path is cut
        load("user/name", None, "train", False)
    monkeypatch.setattr("timm_jem.data.sources._builder", lambda *_: build("parquet", data_files={"train": path}))
    assert load("user/name", None, "train", False)["train"].to_dict() == whole.to_dict()
    assert next(iter(load("user/name", None, "train", True)["train"])).keys() == whole[0].keys()


def test_extensions_are_told_without_what_a_terminal_obeys():
    assert told_kinds({".heic": 1200, ".\x1b[31mred": 1}) == r"1 '.\x1b[31mred', 1,200 .heic"


def test_local_paths_mean_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path)
    config = DataConfig("rows.parquet", unlabeled="./more?image_column=a")
    assert (config.dataset, config.unlabeled) == (path, str(tmp_path / "more?image_column=a"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(load_splits(DataConfig(config.dataset)).train) > 0
    assert DataConfig("../rows.parquet").dataset == path
    assert absolute("~/photos") == os.path.expanduser("~/photos")
    for name in ("digits", "cifar10", "user/name", "user/name?config_name=a"):
        assert absolute(name) == name
    with pytest.raises(InputError, match="dataset is empty"):
        DataConfig(" ")


def test_names_for_strangers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {"digits": "digits", "user/name": "user/name", "/home/me/acme/photos": "photos", "./rows.parquet": "rows.parquet"}
    shown |= {"~/acme/my photos?split=a": "my photos", "/": "a local data set"}
    assert {name: public_name(name) for name in shown} == shown


def test_parts_of_a_set_by_its_name(tmp_path):
    assert read_name("user/name") == Asked("user/name", None, None, None)
    assert read_name("a?split=test&image_column=photo") == Asked("a", "test", None, "photo")
    odd = tmp_path / "why?split=x"
    odd.mkdir()
    assert read_name(str(odd)).name == str(odd)
    for bad in ("a?", "a?split", "a?split=", "a?image_size=3"):
        with pytest.raises(InputError, match=r"after \? give split=\.\.\., config_name=\.\.\., image_column="):
            read_name(bad)
    parts = {"train": marked([0] * 3), "extra": marked([0] * 2, start=9)}
    DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    extra = load_images(f"{tmp_path / 'set'}?split=extra", channels=1, size=(4, 4), count=9)
    assert extra[:, 0, 0, 0].tolist() == [9, 10]
    with pytest.raises(InputError, match=r"no split 'nope': choose split from train, extra, as .*set\?split=NAME"):
        load_images(f"{tmp_path / 'set'}?split=nope", channels=1, size=(4, 4), count=9)


def test_a_hub_out_of_reach_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "timm_jem.data.sources._load_remote", lambda *_, **__: pytest.fail("asked a Hub that isn't there, again and again")
    )

    def refused(*_, **__):
        raise httpx.ConnectError("Connection refused")

    monkeypatch.setattr(HfApi, "dataset_info", refused)
    with pytest.raises(
        InputError, match=rf"'photos' can't be loaded from the Hub; .*{tmp_path} has none .*out of reach"
    ) as error:
        load_splits(DataConfig("photos"))
    assert "\n" not in str(error.value)
    assert "no folder or file here is called photos: looking for it on the Hub" in capsys.readouterr().err


def test_what_the_cache_has_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "user___name").mkdir()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("timm_jem.data.sources._load_remote", lambda *_, **__: DatasetDict({"train": marked([0, 1, 2] * 5)}))
    assert len(load_splits(DataConfig("user/name")).train) > 0


def test_configurations_are_named(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['full', 'cropped']\nExample")

    monkeypatch.setattr("timm_jem.data.sources._load_remote", load_dataset)
    with pytest.raises(InputError, match=r"--data\.config_name, .*\?config_name=NAME, from \['full', 'cropped'\]") as error:
        load_splits(DataConfig("user/many"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["labels.csv", "photos.zip", "photo.png", "nameless"])
def test_files_that_are_no_sets(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"is a (\.\w+|nameless) file: give a folder of images, .*\.parquet"):
        load_splits(DataConfig(str(tmp_path / name)))


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_without_a_row(tmp_path, streaming):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    empty = Dataset.from_dict({"image": [], "label": []}, features)
    empty.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": empty, "test": empty}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        with pytest.raises(InputError, match="a split of it holds no rows") as error:
            load_splits(DataConfig(str(tmp_path / name), streaming=streaming))
        assert "\n" not in str(error.value)


def test_no_labelled_row_is_the_first(monkeypatch):
    empty = Dataset.from_dict({"image": [], "label": []}, Features({"image": Image(), "label": Value("string")}))
    monkeypatch.setattr("timm_jem.data.sources._load_remote", lambda *_, **__: DatasetDict({"train": empty}))
    with pytest.raises(InputError, match="split train of user/none is empty"):
        load_splits(DataConfig("user/none"))


def files(n=12):
    for image in pictures(n):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        yield buffer.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "struct", "bytes alone"])
@pytest.mark.parametrize("named", [None, "photo"])
def test_images_as_pandas_writes_them(tmp_path, kind, named):
    cells = {
        "bytes": list(files()),
        "struct": [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(files())],
        "bytes alone": [{"bytes": content} for content in files()],
    }
    pd.DataFrame({"photo": cells[kind], "label": [i % 2 for i in range(12)]}).to_parquet(tmp_path / "rows.parquet")
    splits = load_splits(DataConfig(str(tmp_path / "rows.parquet"), image_column=named))
    assert splits.image_shape == (3, 10, 10)
    assert {tuple(i.flatten().tolist()) for i in splits.train.images} <= {
        tuple(np.asarray(image).transpose(2, 0, 1).flatten().tolist()) for image in pictures()
    }
    choice = f"?image_column={named}" if named else ""
    assert len(load_images(f"{tmp_path / 'rows.parquet'}{choice}", channels=3, size=(10, 10), count=50)) == 12


def test_which_bytes_are_images(tmp_path):
    rows = pd.DataFrame({"photo": list(files()), "mask": list(files()), "file": ["a.png"] * 12, "label": [0, 1] * 6})
    rows.to_parquet(tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"image columns photo, mask: choose one with --data\.image_column"):
        load_splits(DataConfig(path))
    assert load_splits(DataConfig(path, image_column="mask")).image_shape == (3, 10, 10)
    with pytest.raises(InputError, match=r"no image column 'file', it holds \w*string"):
        load_splits(DataConfig(path, image_column="file"))
    with pytest.raises(InputError, match=r"image columns photo, mask: choose one, as .*\?image_column=NAME"):
        load_images(path, channels=3, size=(4, 4), count=3)
    rows[["file", "label"]].to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="no image column among file, label: give images or their files' bytes"):
        load_splits(DataConfig(path))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0] * 12, ClassLabel(names=["a", "b"]), "has images of one class, 'a': a classifier needs two"),
        (["a"] * 12, Value("string"), "has one class, 'a'"),
        ([-1] * 12, Value("int64"), "has no labels"),
        (["", *"ab" * 5, " "], Value("string"), r"row 0, has the label ''.*unlabeled_rows"),
        ([0, 1] * 6, ClassLabel(names=["", "b"]), "class 0 of .* has no name"),
        (list(range(12)), Value("int64"), r"12 labelled images of 12 classes by 'label', too few of each.*label_column"),
        ([f"id {i}" for i in range(12)], Value("string"), "12 classes by 'label', too few of each"),
        ([*range(10), 0, 1], Value("int64"), "12 labelled images of 10 classes by 'label', too few of each"),
        ([0.5, 1.0] * 6, Value("float64"), "holds neither classes, integers nor names"),
    ],
)
def test_labels_that_make_no_classes(tmp_path, labels, feature, message):
    with pytest.raises(InputError, match=message) as error:
        load_splits(DataConfig(save(tmp_path, labels=labels, feature=feature)))
    assert "\n" not in str(error.value)


def test_blank_labels_are_none(tmp_path):
    path = save(tmp_path, labels=["", *"ab" * 5, " "], feature=Value("string"))
    splits = load_splits(DataConfig(path, unlabeled_rows=True))
    assert splits.class_names == ["a", "b"]
    assert int((splits.train.labels < 0).sum()) == 2
    assert "(2 without a label) training" in splits.summary()
    path = save(
        tmp_path, labels=[0.0, 1.0, None] * 4, feature=Value("float64")
    )  # as pandas makes integers of which one is missing
    assert load_splits(DataConfig(path, unlabeled_rows=True)).class_names == ["0", "1"]
