import datasets
import numpy as np
import pytest
import torch
from datasets import DatasetDict, Value
from image_sets import marked, marks, save

from timm_jem import InputError
from timm_jem.data import DataConfig, StreamedSet, digits, load_splits


@pytest.fixture(autouse=True)
def no_pause_after_parquet(monkeypatch):
    """datasets sleeps for seconds wherever a shuffled stream of parquet files ends, in case the process ends as well."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


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
