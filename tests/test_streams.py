import random

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.data.loader import ImageStream, StreamedImages, default_workers, open_stream

SEED = 3


@pytest.fixture(autouse=True)
def no_pause_after_parquet(monkeypatch):
    """datasets sleeps for seconds wherever a shuffled stream of parquet files ends, in case the process ends as well."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def marked(numbers, broken=()):
    """Images of 8×8 of the given marks, with a little texture, and the mark modulo 3 as their class."""
    cells = []
    for n in numbers:
        pixels = np.full((8, 8), n, np.uint8)
        pixels[2:6, 3:5] = 255 - n
        cells.append({"bytes": b"no image", "path": f"{n}.png"} if n in broken else PILImage.fromarray(pixels))
    features = Features({"image": Image(), "label": ClassLabel(names=["ant", "bee", "cat"])})
    return Dataset.from_dict({"image": cells, "label": [n % 3 for n in numbers]}, features)


def images(tmp_path, n=40, **settings):
    marked(range(n)).to_parquet(tmp_path / "rows.parquet")
    return load_splits(DataConfig(str(tmp_path / "rows.parquet"), **settings)).train


def streamed(tmp_path, n=40, shards=1, broken=(), **settings):
    (tmp_path / "set").mkdir()
    for shard in range(shards):
        marked(range(shard, n, shards), broken).to_parquet(tmp_path / "set" / f"train-{shard}.parquet")
    settings = {"streaming": True, "stream_held_out": 2, "shuffle_buffer": 8, "channels": 1, **settings}
    return load_splits(DataConfig(str(tmp_path / "set"), **settings)).train


def marks(batch):
    return batch[0][:, 0, 0, 0].tolist()


def drawn(stream, batches):
    return [next(stream) for _ in range(batches)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_every_image_once_an_epoch_in_the_order_that_is_documented(tmp_path):
    data = images(tmp_path)
    n, stream = len(data), ImageStream(data, 5, seed=SEED)
    batches = drawn(stream, 3 * n)  # fifteen epochs
    rows = np.concatenate([np.random.default_rng([SEED, epoch]).permutation(n) for epoch in range(15)])
    assert torch.equal(torch.cat([x for x, _ in batches]), data.images[rows])
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels[rows])
    assert batches[0][0].dtype == torch.uint8
    assert batches[0][1].dtype == torch.int64
    assert stream.state_dict() == {"position": 15 * n}


@pytest.mark.parametrize("batch_size", [3, 50])  # also more than there are images
@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5"])
def test_two_ranks_see_what_one_with_the_double_batch_sees(tmp_path, batch_size, policy):
    data = images(tmp_path)
    one = ImageStream(data, 2 * batch_size, seed=SEED, auto_augment=policy)
    two = [ImageStream(data, batch_size, seed=SEED, rank=rank, world=2, auto_augment=policy) for rank in (0, 1)]
    for _ in range(8):
        parts = [next(stream) for stream in two]
        whole = tuple(torch.cat([parts[0][i], parts[1][i]]) for i in (0, 1))
        assert same([next(one)], [whole])
    assert one.state_dict() == two[0].state_dict() == two[1].state_dict()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", [None, "augmix-m3-w3"])
def test_resuming_and_going_back_are_exact(tmp_path, workers, policy):
    data = images(tmp_path, cache_gib=0)
    expected = drawn(ImageStream(data, 4, seed=SEED, auto_augment=policy), 20)
    stream = ImageStream(data, 4, seed=SEED, workers=workers, auto_augment=policy)
    assert same(drawn(stream, 9), expected[:9])
    state = stream.state_dict()
    assert state == {"position": 36}
    assert same(drawn(stream, 5), expected[9:14])
    stream.load_state_dict(state)
    assert same(drawn(stream, 11), expected[9:])
    stream.close()
    other = ImageStream(data, 4, seed=SEED, workers=2 - workers, auto_augment=policy)
    other.load_state_dict(state)
    assert same(drawn(other, 3), expected[9:12])
    other.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_global_random_states_are_left_alone(tmp_path, workers, streaming):
    data = streamed(tmp_path) if streaming else images(tmp_path)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    stream = (StreamedImages if streaming else ImageStream)(data, 4, seed=SEED, workers=workers, auto_augment="v0")
    drawn(stream, 12)
    stream.close()
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("shards", [1, 4, 5])  # read by examples, by shards, by examples
def test_two_ranks_read_each_row_of_a_stream_once_an_epoch(tmp_path, shards):
    data = streamed(tmp_path, shards=shards)
    everything = sorted(int(data.decode(image)[0, 0, 0]) for image in data.epoch(np.random.default_rng(0)))
    assert len(everything) == 36
    epochs = {0: [], 1: []}
    orders = []
    for rank in (0, 1):
        stream = StreamedImages(data, 1, seed=SEED, rank=rank, world=2)
        batch = next(stream)
        while (epoch := stream.state_dict()["epoch"]) < 2:
            epochs[epoch] += marks(batch)
            batch = next(stream)
        orders.append(marks(batch))
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("shards", "world"), [(1, 1), (4, 2), (1, 2)])
def test_resuming_a_stream_is_exact(tmp_path, workers, shards, world):
    data = streamed(tmp_path, shards=shards)
    place = {"seed": SEED, "rank": world - 1, "world": world, "auto_augment": "rand-m9-mstd0.5"}
    expected = drawn(StreamedImages(data, 5, **place), 24)
    stream = StreamedImages(data, 5, workers=workers, **place)
    assert same(drawn(stream, 10), expected[:10])
    state = stream.state_dict()
    assert state["epoch"] > 0
    assert same(drawn(stream, 4), expected[10:14])
    stream.load_state_dict(state)
    assert same(drawn(stream, 14), expected[10:])
    stream.close()
    other = StreamedImages(data, 5, workers=2 - workers, **place)
    other.load_state_dict(state)
    assert same(drawn(other, 3), expected[10:13])
    other.close()


def test_policies_of_a_stream_do_not_depend_on_ranks(tmp_path):
    data = streamed(tmp_path, shards=4)

    def epoch(rank, world):
        stream, plain = (StreamedImages(data, 1, seed=SEED, rank=rank, world=world, auto_augment=a) for a in ("v0", None))
        pairs = []
        while True:
            x, u = next(stream)[0], next(plain)[0]
            if stream.state_dict()["epoch"] > 0:
                return pairs
            pairs.append((u.flatten().tolist(), x.flatten().tolist()))

    assert sorted(epoch(0, 1)) == sorted(epoch(0, 2) + epoch(1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_named_in_one_line(tmp_path, workers):
    data = images(tmp_path, cache_gib=0)
    rows = marked(range(40), broken=[17]).select(data.parts[0][1])
    data.data = rows.select_columns(["image"]).cast_column("image", Image(decode=False))
    stream = ImageStream(data, 4, seed=SEED, workers=workers)
    message = r"^row 17 of split train \(17\.png\) has an image that can't be decoded .*skip_broken true$"
    with pytest.raises(InputError, match=message) as error:
        drawn(stream, len(data))
    assert "\n" not in str(error.value)
    place = list(np.random.default_rng([SEED, 0]).permutation(len(data))).index(list(data.parts[0][1]).index(17))
    assert stream.state_dict() == {"position": place // 4 * 4}
    with pytest.raises(InputError, match="row 17"):
        next(stream)
    (tmp_path / "stream").mkdir()
    stream = StreamedImages(streamed(tmp_path / "stream", broken=[17]), 4, seed=SEED, workers=workers)
    with pytest.raises(InputError, match=r"^row \d+ of the shuffled split train .*\(17.png\) has an image") as error:
        drawn(stream, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_ends_in_the_middle_of_its_file_is_one_line(tmp_path, workers):
    data, file = streamed(tmp_path, n=200), tmp_path / "set" / "train-0.parquet"
    marked(range(200)).to_parquet(file, batch_size=10)
    page = pq.ParquetFile(file).metadata.row_group(12).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[page : page + 60] = b"\xff" * 60
    file.write_bytes(content)
    stream = StreamedImages(data, 4, seed=SEED, workers=workers)
    batches = []
    with pytest.raises(
        InputError, match=r"^the shuffled split train of .* can't be read on \(.*\): see that its files"
    ) as error:
        batches += iter(stream)
    assert "\n" not in str(error.value)
    place = stream.state_dict()
    marked(range(200)).to_parquet(file, batch_size=10)
    stream.load_state_dict({"epoch": 0, "offset": 0})
    assert drawn(stream, 40)
    stream.load_state_dict(place)
    assert place["offset"] > 0
    assert next(stream)[0].shape == (4, 1, 8, 8)
    stream.close()


def test_bad_arguments_are_named(tmp_path):
    data = images(tmp_path)
    for bad in (
        {"batch_size": 0},
        {"workers": -1},
        {"world": 0},
        {"rank": 2, "world": 2},
        {"auto_augment": "rant"},
        {"seed": -1},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            ImageStream(data, **{"batch_size": 2, "seed": 0, **bad})
    stream = ImageStream(data, 2, seed=0)
    for state in ({}, {"epoch": 0, "offset": 0}, {"position": -1}, {"position": 1.5}, None):
        with pytest.raises(InputError):
            stream.load_state_dict(state)
    stream = StreamedImages(streamed(tmp_path, n=6), 1, seed=0)
    stream.load_state_dict({"epoch": 0, "offset": 3})
    with pytest.raises(InputError, match="ends before image 3 of epoch 0"):
        next(stream)
    stream.load_state_dict({"epoch": 0, "offset": 3}, about=True)  # of other ranks
    begun, beginning = StreamedImages(stream.data, 1, seed=0), next(stream)
    begun.load_state_dict({"epoch": 1, "offset": 0})
    assert all(map(torch.equal, beginning, next(begun)))
    assert stream.state_dict() == begun.state_dict()
    with pytest.raises(InputError, match="no training image for this process"):
        next(StreamedImages(stream.data, 1, seed=0, rank=7, world=8))


def test_the_right_stream_is_opened(tmp_path):
    data = images(tmp_path)
    assert isinstance(open_stream(data, 2, seed=0), ImageStream)
    assert open_stream(data, 2, seed=0, workers=2).workers == 0  # nothing to decode
    assert open_stream(data, 2, seed=0, workers=2, auto_augment="3a").workers == 2
    assert isinstance(open_stream(streamed(tmp_path), 2, seed=0, rank=1, world=2), StreamedImages)


def test_workers_suit_the_machine(monkeypatch):
    cores = {"n": 2}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores["n"])), raising=False)
    assert [default_workers(world) for world in (1, 2, 8)] == [1, 1, 1]
    cores["n"] = 16
    assert [default_workers(world) for world in (1, 2, 4, 8)] == [8, 7, 3, 1]
