import pytest
import torch

from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation import ood_sets
from timm_jem.evaluation.ood_sets import constant_images, interpolations, outlier_sets, uniform_images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_interpolations_are_means_of_two_classes():
    # The level tells the image: sums of two powers of two have one way to be made.
    levels = torch.tensor([2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    labels = torch.tensor([5, 5, 1, 5, 1, 9, 5])
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 5)
    mixed = interpolations(images, labels, 7000, seeded())
    assert (mixed.shape, mixed.dtype) == ((7000, 3, 4, 5), torch.uint8)
    assert (mixed == mixed[:, :1, :1, :1]).all()
    pairs = {(levels[i].item() + levels[j].item()) // 2: (i, j) for i in range(7) for j in range(i)}
    found = [pairs[level] for level in mixed[:, 0, 0, 0].tolist()]
    assert all(labels[i] != labels[j] for i, j in found)
    assert set(found) == {(i, j) for i, j in pairs.values() if labels[i] != labels[j]}
    # Image 5 is first in 1000 pairs; with 6 others as partner of it, and it of theirs: 4 of class 5 choose among 3, 2 of
    # class 1 among 5.
    assert sum(5 in pair for pair in found) == pytest.approx(1000 + 4 * 1000 / 3 + 2 * 1000 / 5, rel=0.06)


def test_every_image_is_first_once():
    levels = torch.tensor([2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1])  # the last is in every pair, and first in one
    mixed = (2 * interpolations(levels, labels, 7, seeded()).flatten().int() - 128).tolist()
    assert set(mixed) == {2, 4, 8, 16, 32, 64}
    assert len(mixed) == 7


def test_interpolations_of_digits():
    splits = load_splits(DataConfig())
    images, labels = splits.test.images, splits.test.labels
    mixed = interpolations(images, labels, len(images), seeded())
    assert torch.equal(mixed, interpolations(images, labels, len(images), seeded()))
    assert not torch.equal(mixed, interpolations(images, labels, len(images), seeded(1)))
    assert mixed.float().mean() == pytest.approx(images.float().mean().item(), rel=0.03)
    assert mixed.float().std() < 0.9 * images.float().std()


def test_halves_are_rounded_without_bias():
    two = torch.stack([torch.arange(256), torch.arange(256) + 1]).clamp(max=255).byte().view(2, 1, 16, 16)
    mean = two.float().mean().item()
    assert interpolations(two, torch.tensor([0, 1]), 1, seeded()).float().mean() == pytest.approx(mean, abs=0.01)


def test_uniform_images():
    images = uniform_images(400, (3, 8, 9), seeded())
    assert (images.shape, images.dtype) == ((400, 3, 8, 9), torch.uint8)
    count = images.flatten().long().bincount(minlength=256).double()
    expected = images.numel() / 256
    assert ((count - expected).square() / expected).sum() < 255 + 4 * (2 * 255) ** 0.5  # χ², 4 σ
    columns = images.double().flatten(1).T.corrcoef()
    assert columns.fill_diagonal_(0).abs().max() < 0.3
    assert torch.equal(images, uniform_images(400, (3, 8, 9), seeded()))


def test_constant_images():
    images = constant_images(5000, (3, 4, 5), seeded())
    assert (images.shape, images.dtype) == ((5000, 3, 4, 5), torch.uint8)
    assert (images == images[:, :, :1, :1]).all()
    colours = images[:, :, 0, 0].double()
    assert (colours.min(), colours.max()) == (0, 255)
    assert colours.mean(0).tolist() == pytest.approx([127.5] * 3, abs=5)
    assert colours.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    images[0, 0, 0, 0] = 255 - images[0, 0, 0, 0]  # memory of its own
    assert (images[0, 0] != images[0, 0, 0, 0]).sum() == 19


def test_bad_input_is_named():
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
    for arguments, message in (
        ((images.float(), labels, 2), "torch.float32"),
        ((images[0], labels, 2), r"\(1, 2, 2\)"),
        ((images, labels[:3], 2), r"labels have shape \(3,\).*shape \(4,\)"),
        ((images, labels * 0, 2), "two classes, and these have 1"),
        ((images[:0], labels[:0], 2), "at least one"),
        ((images, labels, 0), "n is 0"),
    ):
        with pytest.raises(InputError, match=message) as error:
            interpolations(*arguments, seeded())
        assert "\n" not in str(error.value)
    for make in (uniform_images, constant_images):
        with pytest.raises(InputError, match="n is 0"):
            make(0, (1, 2, 2), seeded())


def test_few_images_make_few_interpolations():
    images, labels = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8, generator=seeded()), torch.tensor([0] * 4 + [1] * 4)
    mixed = outlier_sets(["interpolation"], images, labels, count=1000, seed=0)["interpolation"]
    assert len(mixed) == len(mixed.unique(dim=0)) == 16
    many = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8, generator=seeded())
    assert len(outlier_sets(["interpolation"], many, torch.arange(100) % 2, count=100, seed=0)["interpolation"]) == 100


def test_parts_of_a_data_set_are_sets_of_their_own(monkeypatch):
    asked = []

    def load(spec, *, channels, size, count, seed, fit):
        asked.append(spec)
        return uniform_images(count, (channels, *size), seeded())

    monkeypatch.setattr(ood_sets, "load_images", load)
    specs = ["./a/textures?split=test&image_column=left", "./a/textures?split=train", "./b/textures.parquet", "./c/textures"]
    specs += ["./textures_v1.0", "./textures_v1.1"]
    images, labels = uniform_images(4, (1, 2, 2), seeded()), torch.tensor([0, 1, 1, 0])
    sets = ood_sets.outlier_sets(specs, images, labels, count=3, seed=0)
    assert asked == specs
    names = ["textures?split=test&image_column=left", "textures?split=train", "textures", "textures (2)"]
    assert list(sets) == [*names, "textures_v1.0", "textures_v1.1"]
