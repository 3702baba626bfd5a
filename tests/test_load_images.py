import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image
from image_sets import broken, marked, save
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import digits, load_images


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
    images = asked(f"{tmp_path / 'rows.parquet'}?image_column=photo", channels=3, size=(6, 6))
    assert images.shape == (2, 3, 6, 6)
    assert torch.equal(images[0, :, 3, 3], torch.tensor([200, 100, 50], dtype=torch.uint8))
    assert images[0, 0].max() == 200
    assert (images[1] == 7).all()
    grey = asked(f"{tmp_path / 'rows.parquet'}?image_column=mask", size=(2, 3))
    assert grey.shape == (2, 1, 2, 3)
    with pytest.raises(InputError, match=r"image columns photo, mask: choose one, as .*image_column=NAME"):
        asked(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda t: t / "nothing.parquet", {}, "no data set at"),
        (lambda t: "digits", {"split": "test"}, "digits has no split 'test': choose split from train"),
        (lambda t: f"{save(t)}?image_column=photo", {}, "no image column 'photo'.*image"),
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
    with pytest.raises(InputError, match="no image column among text: give images"):
        asked(tmp_path / "text.parquet")
    marked([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(InputError, match=r"empty\.parquet' can't be loaded") as error:
        asked(tmp_path / "empty.parquet")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(
        "timm_jem.data.sources._load_remote", lambda *a, **k: DatasetDict({"train": marked([0]), "test": marked([])})
    )
    assert len(asked("user/half", split="train")) == 1
    with pytest.raises(InputError, match="split test of user/half is empty: choose another"):
        asked("user/half")


def test_a_configuration_of_a_set_on_the_hub(monkeypatch):
    def load_dataset(name, config_name, streaming):
        assert (name, config_name, streaming) == ("user/numbers", "cropped", False)
        return DatasetDict({"train": marked([0] * 3), "test": marked([0] * 2, start=9)})

    monkeypatch.setattr("timm_jem.data.sources._load_remote", load_dataset)
    assert asked("user/numbers?config_name=cropped")[:, 0, 0, 0].tolist() == [9, 10]
