from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import timm_jem.gaussians
from timm_jem import ClassGaussians, InputError, ReplayBuffer
from timm_jem.noise import chain_generators

SHAPE = (2, 3, 3)


def low_rank_images(n=200, rank=3, scale=0.05, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions, mean = torch.randn(rank, 18, generator=generator), 0.2 * torch.randn(18, generator=generator)
    return (mean + scale * torch.randn(n, rank, generator=generator) @ directions).double().view(n, *SHAPE)


def covariance(flat: torch.Tensor) -> torch.Tensor:
    return torch.cov(flat.T, correction=0)


def model_covariance(gaussians: ClassGaussians, c: int = 0) -> torch.Tensor:
    return components(gaussians, c) @ components(gaussians, c).T + gaussians.residual_std[c].flatten().square().diag()


def components(gaussians: ClassGaussians, c: int = 0) -> torch.Tensor:
    return gaussians.factors[c] * gaussians.scales[c]


def spread_images(n: int, pixels: int = 400, seed: int = 0) -> torch.Tensor:
    """Images in whose covariance the k-th eigenvalue is about 1 / k², none of them along a pixel."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(pixels, pixels, generator=generator)).Q / torch.arange(1, pixels + 1).unsqueeze(1)
    return (torch.randn(n, pixels, generator=generator) @ directions / 3).view(n, 1, 20, -1)


def test_low_rank_data_is_recovered_to_eight_bits():
    images = low_rank_images()
    gaussians = ClassGaussians.fit(images, rank=3)
    torch.testing.assert_close(gaussians.means[0], images.mean(0).float())
    expected = covariance(images.flatten(1)).float()
    std = expected.diag().sqrt()
    assert ((model_covariance(gaussians) - expected).abs() <= 0.03 * std.outer(std)).all()
    assert gaussians.residual_std.square().sum() < 0.02 * std.square().sum()
    assert ClassGaussians.fit(images).scales.shape == (1, 3)
    torch.testing.assert_close(ClassGaussians.fit(images, rank=18).means, gaussians.means)


def test_factors_are_the_principal_components_and_every_variance_is_the_datas():
    images = low_rank_images(rank=10)
    gaussians = ClassGaussians.fit(images, rank=4)
    expected = covariance(images.flatten(1))
    values, vectors = torch.linalg.eigh(expected)
    top = vectors[:, -4:] * values[-4:].sqrt()
    signs = (top.flip(1).float() * components(gaussians)).sum(0).sign()
    assert (top.flip(1).float() * signs - components(gaussians)).abs().max() < 1.01 * gaussians.scales.max()
    torch.testing.assert_close(model_covariance(gaussians).diag(), expected.diag().float())
    diagonal = ClassGaussians.fit(images, rank=0)
    torch.testing.assert_close(model_covariance(diagonal), expected.diag().diag().float())


@pytest.mark.parametrize("images", [low_rank_images(rank=10), spread_images(600), spread_images(400, 800).double()])
def test_no_rounding_of_components_changes_a_pixels_variance(images):
    """Not even where they explain all of it, so that half of the pixels would have too much."""
    gaussians = ClassGaussians.fit(images, explained=1)
    variance = images.double().var(0, correction=0).flatten().float()
    torch.testing.assert_close(model_covariance(gaussians).diag(), variance, rtol=1e-5, atol=0)


def test_variances_are_those_of_all_images_where_components_see_some(monkeypatch):
    monkeypatch.setattr(timm_jem.gaussians, "_MAX_IMAGES", 500)
    images = low_rank_images(n=1500, rank=10)
    images[1::3] *= 0.1
    gaussians = ClassGaussians.fit(images, rank=10)
    torch.testing.assert_close(model_covariance(gaussians).diag(), images.flatten(1).var(0, correction=0).float())
    torch.testing.assert_close(gaussians.means[0], images.mean(0).float())


@pytest.mark.parametrize("explained", [0, 0.5, 0.9, 0.99, 0.9999])
def test_the_fewest_components_explain_the_share_asked_for(explained):
    images = low_rank_images(rank=10)
    values = torch.linalg.eigvalsh(covariance(images.flatten(1))).flip(0)[:10]
    before = (values.cumsum(0) - values) / values.sum()
    gaussians = ClassGaussians.fit(images, explained=explained)
    assert gaussians.scales.shape == (1, int((before < explained).sum()))


def leading(images: torch.Tensor) -> torch.Tensor:
    x = (images - images.mean(0)).flatten(1)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)


def test_components_of_large_images_are_nearly_as_few_as_there_can_be():
    images = spread_images(800)
    values = leading(images)
    fewest = int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1
    assert 40 < fewest <= ClassGaussians.fit(images).scales.shape[1] <= 1.05 * fewest
    assert components(ClassGaussians.fit(images, rank=20)).square().sum() > 0.99 * values[:20].sum()


def test_images_of_which_half_mirror_the_others_have_their_components():
    """Sums of them, from which components are found, would be 0 but for their signs."""
    images = torch.cat([half := spread_images(80), -half])
    gaussians = ClassGaussians.fit(images, rank=16)
    assert gaussians.scales.shape[1] + timm_jem.gaussians._BEYOND == len(half)
    assert components(gaussians).square().sum() > 0.9 * leading(images)[:16].sum()


def test_a_class_has_a_component_for_every_eight_images():
    """As many as images would span the images themselves."""
    images, labels = spread_images(127), torch.tensor([0] * 80 + [1] * 47)
    gaussians = ClassGaussians.fit(images, labels, 2, explained=1)
    assert [int(scales.count_nonzero()) for scales in gaussians.scales] == [10, 5]
    assert gaussians.scales.shape == (2, 10)
    assert not gaussians.factors[1, :, 5:].any()
    wider = ClassGaussians.fit(images, labels, 2, rank=30)
    assert wider.scales.shape == (2, 30)
    assert torch.equal(wider.factors[:, :, :10], gaussians.factors)
    assert not wider.factors[:, :, 10:].any()


def test_classes_have_as_many_components_as_fit_into_a_file(monkeypatch, tmp_path):
    images, labels = spread_images(200), torch.arange(200) % 2
    monkeypatch.setattr(timm_jem.gaussians, "_MAX_BYTES", 2 * 400 * (8 + 7))
    gaussians = ClassGaussians.fit(images, labels, 2)
    assert gaussians.scales.shape == (2, 6)  # the seventh has a scale, too
    assert sum(tensor.nbytes for tensor in vars(gaussians).values()) <= 2 * 400 * (8 + 7)
    assert torch.equal(ClassGaussians.fit(images, labels, 2, rank=6).factors, gaussians.factors)
    with pytest.raises(InputError, match="rank of the class Gaussians is 7: give a whole number from 0 to 6"):
        ClassGaussians.fit(images, labels, 2, rank=7)
    with pytest.raises(InputError, match="take smaller images, or start chains from noise"):
        ClassGaussians.fit(images, labels, 3)


def test_samples_under_autocast_are_the_same():
    gaussians = ClassGaussians.fit(low_rank_images(rank=6), rank=3)
    with torch.autocast("cpu", torch.bfloat16):
        u = gaussians((4, *SHAPE), generator=torch.Generator().manual_seed(1))
    assert torch.equal(u, gaussians((4, *SHAPE), generator=torch.Generator().manual_seed(1)))


def test_samples_have_the_mean_and_covariance():
    images = low_rank_images(rank=6)
    gaussians = ClassGaussians.fit(images, rank=3)
    u = gaussians((40_000, *SHAPE), generator=torch.Generator().manual_seed(1)).flatten(1)
    expected = model_covariance(gaussians)
    std = expected.diag().sqrt()
    assert ((u.mean(0) - gaussians.means[0].flatten()).abs() < 5 * std / 40_000**0.5).all()
    assert ((covariance(u) - expected).abs() < 7 * std.outer(std) / 40_000**0.5).all()


def test_uint8_is_pixels():
    images = torch.randint(256, (50, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    a, b = ClassGaussians.fit(images), ClassGaussians.fit(images.double() / 127.5 - 1)
    assert torch.equal(a.means, b.means)
    assert torch.equal(a.factors, b.factors)
    assert torch.equal(a.residual_std, b.residual_std)


def test_neither_gradients_nor_autocast_nor_the_default_dtype_matter():
    images = low_rank_images().float()
    fitted, again = ClassGaussians.fit(images), ClassGaussians.fit(images.clone().requires_grad_())
    u = fitted((5, *SHAPE), generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(again((5, *SHAPE), generator=torch.Generator().manual_seed(0)), u)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not again.means.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ClassGaussians.fit(images)
    assert torch.equal(mixed((5, *SHAPE), generator=torch.Generator().manual_seed(0)), u)


def by_class() -> tuple[torch.Tensor, torch.Tensor]:
    """Constant classes 0 and 1 of 8 and 24 images, seven images of class 2, none of class 3, and unlabelled ones."""
    labels = torch.tensor([0] * 8 + [1] * 24 + [2] * 7 + [-1] * 3)
    values = torch.tensor([0.5] * 8 + [-0.5] * 24 + [0.1] * 7 + [0.9] * 3)
    return values.view(-1, 1, 1, 1).expand(-1, *SHAPE), labels


def test_each_class_has_its_own_and_small_classes_that_of_all():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images, labels, 4, rank=2)
    overall = ClassGaussians.fit(images, rank=2)
    assert gaussians.means.shape == (4, *SHAPE)
    assert gaussians.factors.shape == (4, 18, 2)
    torch.testing.assert_close(gaussians.means[:2, 0, 0, 0], torch.tensor([0.5, -0.5]))
    assert gaussians.scales[:2].abs().max() < 1e-6
    for c in (2, 3):
        assert torch.equal(gaussians.means[c], overall.means[0])
        assert torch.equal(components(gaussians, c), components(overall))
    torch.testing.assert_close(overall.means[0], images.mean(0))
    torch.testing.assert_close(gaussians.weights, torch.tensor([8, 24, 7, 0]) / 39)


def test_chains_are_of_the_classes_asked_for():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images[:32], labels[:32], 2)
    y = torch.arange(600) % 2
    u = gaussians((600, *SHAPE), generator=torch.Generator().manual_seed(0), y=y)
    torch.testing.assert_close(u, (0.5 - y.float()).view(-1, 1, 1, 1).expand(u.shape))
    mixture = gaussians((4000, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert abs((mixture[:, 0, 0, 0] > 0).sum() - 1000) < 5 * 750**0.5
    one = ClassGaussians.fit(images[:32])
    assert one((5, *SHAPE), y=torch.tensor([7, 1, 0, 3, 2])).shape == (5, *SHAPE)  # serves any class


def test_samples_are_clamped_to_pixels():
    images = low_rank_images(scale=2.0)
    u = ClassGaussians.fit(images)((300, *SHAPE))
    assert u.abs().max() == 1


def test_randomness_is_the_generators_alone():
    images, runs = low_rank_images(), []
    for seed in (1, 2):
        state = torch.manual_seed(seed).get_state()
        gaussians = ClassGaussians.fit(images, torch.arange(200) % 3, 3).to("cpu")
        runs.append(gaussians((10, *SHAPE), generator=torch.Generator().manual_seed(4)))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*runs)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which came of an operation."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(t.numel() for t in (made if isinstance(made, tuple) else [made]) if hasattr(t, "numel"))]
        )
        return made


def test_a_draw_holds_no_factors_for_each_chain_and_waits_for_no_device():
    gaussians = ClassGaussians.fit(spread_images(160, 60), torch.arange(160) % 2, 2, rank=10)
    with Largest() as largest:
        gaussians((32, 1, 20, 3), y=torch.arange(32) % 2)
    assert largest.numbers == max(32 * 60, 2 * 60 * 10)  # of the chains, or of all factors, in 8 bits
    meta = gaussians.to("meta")  # which has no values to wait for
    for y in (None, torch.zeros(5, dtype=torch.int64, device="meta")):
        assert meta((5, 1, 20, 3), y=y).shape == (5, 1, 20, 3)


def test_chains_are_drawn_alike_by_class_and_some_at_a_time(monkeypatch):
    """The first is how a CPU does it, the second a GPU."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-127, 128, (3, 60, 10), dtype=torch.int8, generator=generator)
    z, y = torch.randn(301, 10, generator=generator), torch.randint(3, (301,), generator=generator)
    expected = torch.einsum("ndr,nr->nd", factors[y].float(), z)
    monkeypatch.setattr(timm_jem.gaussians, "_GATHERED", 7 * 60 * 10)
    for parts in (timm_jem.gaussians._by_class, timm_jem.gaussians._by_chain):
        found, classes = torch.full((301, 60), torch.nan), torch.empty(301, dtype=torch.int64)
        for part, c, common in parts(factors, z, y):
            found[part], classes[part] = common, torch.as_tensor(c)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
        assert torch.equal(classes, y)


def test_a_replay_buffer_starts_from_them():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images[:32], labels[:32], 2)
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(SHAPE, init=gaussians, generator=generator, capacity=10, restart_prob=1.0, num_classes=2)
    expected = (0.5 - buffer.labels.float()).view(-1, 1, 1, 1).expand(10, *SHAPE)
    torch.testing.assert_close(buffer.chains, expected)
    buffer.chains.zero_()
    u, slots = buffer.draw(10)
    torch.testing.assert_close(u, expected[slots])


def test_bad_input_is_named():
    images = low_rank_images(n=16)
    y = torch.arange(16) % 2
    for kwargs, match in (
        ({"images": images[:7]}, "of 7 images: give at least 8"),
        ({"images": images[0]}, "N, C, H, W"),
        ({"images": images.long()}, "uint8"),
        ({"images": 127 + 100 * images}, "127.5"),
        ({"images": images * float("nan")}, "nan"),
        ({"rank": -1}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"explained": 99}, "explain is 99"),
        ({"explained": float("nan")}, "explain is nan"),
        ({"num_classes": 2}, "labels"),
        ({"num_classes": 2, "labels": y[:3]}, "labels"),
        ({"num_classes": 1, "labels": y}, "label 1"),
        ({"num_classes": 2, "labels": y - 2}, "label -2"),
        ({"num_classes": 2, "labels": torch.full((16,), -1)}, "no image has a label"),
        ({"num_classes": 0, "labels": y}, "num_classes"),
        ({"num_classes": 10**9, "labels": y}, "more than 256 MiB"),
    ):
        with pytest.raises(InputError, match=match) as error:
            ClassGaussians.fit(**{"images": images, **kwargs})
        assert "\n" not in str(error.value)
    fitted = ClassGaussians.fit(images, y, 2)
    for call, match in (
        (lambda: fitted((2, 3, 3, 3)), "fit them"),
        (lambda: fitted(5), "shape of chains is 5"),
        (lambda: fitted((2, *SHAPE[1:])), r"give \(n, C, H, W\)"),
        (lambda: fitted((-1, *SHAPE)), "number of chains is -1"),
        (lambda: fitted((2, *SHAPE), y=torch.tensor([0, -1])), "label -1"),
        (lambda: fitted((2, *SHAPE), y=torch.tensor([0, 2])), "label 2"),
        (lambda: fitted((2, *SHAPE), y=torch.tensor([0])), r"int64, shape \(2,\)"),
        (lambda: fitted((2, *SHAPE), y=[0, 1]), "a list"),
        (lambda: fitted((2, *SHAPE), generator=3), "generator"),
        (lambda: replace(fitted, weights=None), "weights"),
        (lambda: replace(fitted, weights=torch.tensor(1.0)), "weights"),
        (lambda: replace(fitted, scales=fitted.scales.long()), "scales"),
        (lambda: replace(fitted, factors=fitted.factors.float()), "int8"),
        (lambda: replace(fitted, factors=None), "NoneType"),
        (lambda: replace(fitted, means=fitted.means[:1]), "disagree"),
        (lambda: replace(fitted, factors=fitted.factors[:, :, :0]), "disagree"),
        (lambda: replace(fitted, scales=fitted.scales[:, :0]), "disagree"),
        (lambda: replace(fitted, scales=fitted.scales[0]), "disagree"),
        (lambda: ClassGaussians.load("gone.safetensors", SHAPE, 2), r"there is no file gone\.safetensors: give"),
        (lambda: fitted.save("gone/starts.safetensors"), r"starts\.safetensors can't be written .*give a file in a folder"),
        (lambda: ClassGaussians.fit(None), "NoneType"),
        (lambda: ClassGaussians.fit(images, y.tolist(), 2), "a list"),
        (lambda: ClassGaussians.fit(images, y.float(), 2), "float32"),
    ):
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_chain_with_its_own_generator_starts_at_its_own_place():
    images, labels = low_rank_images(), torch.arange(200) % 3
    gaussians = ClassGaussians.fit(images, labels, num_classes=3, rank=3)
    together = gaussians((300, *SHAPE), generator=chain_generators(range(300)))
    for seed in (0, 1, 255, 299):
        alone = gaussians((1, *SHAPE), generator=chain_generators([seed]))
        torch.testing.assert_close(alone[0], together[seed])
    y = torch.arange(300) % 3
    of_classes = gaussians((300, *SHAPE), generator=chain_generators(range(300)), y=y)
    torch.testing.assert_close(gaussians((1, *SHAPE), generator=chain_generators([7]), y=y[7:8])[0], of_classes[7])
    with pytest.raises(InputError, match="2 generators for 3 chains"):
        gaussians((3, *SHAPE), generator=chain_generators([0, 1]))
