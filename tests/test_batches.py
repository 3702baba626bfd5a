import pytest
import torch

from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.training import Batches


def make(data=None, **settings):
    splits = load_splits(DataConfig(**(data or {})))
    rng = torch.Generator().manual_seed(0)
    return splits, Batches(splits, 16, generator=rng, **{"seed": 3, "noise": 0.0, **settings})


def originals(splits):
    return {tuple(image.flatten().tolist()): int(y) for image, y in zip(splits.train.images, splits.train.labels, strict=True)}


def bytes_of(u):
    return [tuple(image.flatten().tolist()) for image in (u.add(1) * 127.5).round().byte()]


def test_jem_has_one_batch_for_both():
    splits, batches = make()
    batch = next(batches)
    assert (batch.u.shape, batch.u_ce, batch.y_ce) == ((16, 1, 8, 8), None, None)
    known = originals(splits)
    assert [known[image] for image in bytes_of(batch.u)] == batch.y.tolist()


def test_views_of_the_same_images_differ_by_their_noise():
    _, batches = make(ce_noise=0.4)
    difference = torch.cat([batch.u_ce - batch.u for batch in (next(batches) for _ in range(20))])
    assert difference.std().item() == pytest.approx(0.4, rel=0.02)
    assert next(batches).y_ce is None


def test_noise_is_added_to_the_images_and_they_are_kept_without():
    splits, batches = make(noise=0.3)
    batch = next(batches)
    known = originals(splits)
    assert [known[image] for image in bytes_of(batch.clean)] == batch.y.tolist()
    assert batch.u_ce is None  # the cross-entropy sees the same noisy images
    difference = torch.cat([batch.u - batch.clean for batch in (next(batches) for _ in range(20))])
    assert difference.std().item() == pytest.approx(0.3, rel=0.02)
    _, batches = make(energies=False, noise=0.3)
    alone = torch.cat([next(batches).u for _ in range(20)])
    assert not set(bytes_of(alone)) & set(known)


def test_sada_jem_has_batches_of_its_own():
    splits, batches = make(
        {"crop_padding": 2, "flip": True}, ce_batch_size=24, px_augment="none", ce_noise=0.0
    )  # fmt: skip
    batch = next(batches)
    assert (len(batch.u), len(batch.u_ce), len(batch.y_ce)) == (16, 24, 24)
    known = originals(splits)
    assert all(image in known for image in bytes_of(batch.u))  # un-augmented
    assert sum(image in known for image in bytes_of(batch.u_ce)) < 12


def test_images_without_a_label_serve_the_density_alone():
    splits, batches = make({"labels_per_class": 2}, ce_noise=0.0)
    labelled = {tuple(image.flatten().tolist()) for image in splits.labeled.images}
    assert len(labelled) == 20
    seen = torch.cat([next(batches).y for _ in range(80)])
    assert (seen >= 0).float().mean().item() == pytest.approx(20 / 1295, abs=0.01)
    batch = next(batches)
    assert set(bytes_of(batch.u_ce)) <= labelled
    assert (batch.y_ce >= 0).all()
    # Without energies, only they are read.
    _, alone = make({"labels_per_class": 2}, energies=False, ce_noise=0.0)
    assert set(bytes_of(next(alone).u)) <= labelled
    assert list(alone.state_dict()) == ["ce"]
    # At another objective those of the cross-entropy go on where they were, and those for p(x) start afresh.
    alone.load_state_dict(batches.state_dict())
    assert alone.state_dict() == {"ce": batches.state_dict()["ce"]}
    _, both = make({"labels_per_class": 2}, ce_noise=0.0)
    both.load_state_dict(alone.state_dict())
    assert both.state_dict() == {**alone.state_dict(), "px": {"position": 0}}


def test_a_stream_goes_on_about_where_it_was_with_other_processes(tmp_path):
    digits().select(range(120)).to_parquet(tmp_path / "rows.parquet")
    data = {"dataset": str(tmp_path / "rows.parquet"), "streaming": True, "stream_held_out": 20}
    _, alone = make(data)
    for _ in range(4):
        next(alone)
    _, shared = make(data, rank=1, world=2)
    shared.load_state_dict(alone.state_dict(), old_world=1)
    assert shared.state_dict() == {"px": {"epoch": 0, "offset": 32}}
    assert len(next(shared).u) == 16


def test_its_place_is_all_its_state_but_the_generators():
    _, batches = make({"labels_per_class": 2}, ce_noise=0.1)
    for _ in range(3):
        next(batches)
    place, noise = batches.state_dict(), batches.generator.get_state()
    expected = next(batches)
    for _ in range(5):
        next(batches)
    batches.load_state_dict(place)
    batches.generator.set_state(noise)
    again = next(batches)
    for name in ("u", "y", "u_ce", "y_ce", "clean"):
        assert torch.equal(getattr(again, name), getattr(expected, name))
