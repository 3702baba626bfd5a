import pytest
import torch

from timm_jem import ClassGaussians, InputError, ReplayBuffer
from timm_jem.sampling import chain_generators

SHAPE = (2, 3, 3)


def low_rank_images(n=200, rank=3, scale=0.05, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions, mean = torch.randn(rank, 18, generator=generator), 0.2 * torch.randn(18, generator=generator)
    return (mean + scale * torch.randn(n, rank, generator=generator) @ directions).double().view(n, *SHAPE)


def covariance(flat: torch.Tensor) -> torch.Tensor:
    return torch.cov(flat.T, correction=0)


def model_covariance(gaussians: ClassGaussians, c: int = 0) -> torch.Tensor:
    return gaussians.factors[c] @ gaussians.factors[c].T + gaussians.residual_std[c].flatten().square().diag()


def test_low_rank_data_is_recovered():
    images = low_rank_images()
    gaussians = ClassGaussians.fit(images, rank=3)
    torch.testing.assert_close(gaussians.means[0], images.mean(0).float())
    torch.testing.assert_close(model_covariance(gaussians), covariance(images.flatten(1)).float(), rtol=1e-4, atol=1e-7)
    assert gaussians.residual_std.max() < 1e-4
    torch.testing.assert_close(ClassGaussians.fit(images, rank=18).means, gaussians.means)


def test_factors_are_the_principal_components_and_every_variance_is_the_datas():
    images = low_rank_images(rank=10)
    gaussians = ClassGaussians.fit(images, rank=4)
    expected = covariance(images.flatten(1))
    values, vectors = torch.linalg.eigh(expected)
    top = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    torch.testing.assert_close(gaussians.factors[0] @ gaussians.factors[0].T, top.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model_covariance(gaussians).diag(), expected.diag().float())
    diagonal = ClassGaussians.fit(images, rank=0)
    torch.testing.assert_close(model_covariance(diagonal), expected.diag().diag().float())


def test_variances_are_those_of_all_images_where_components_see_some():
    images = low_rank_images(n=2500, rank=10)
    images[::7] *= 0.1
    gaussians = ClassGaussians.fit(images, rank=10)
    torch.testing.assert_close(model_covariance(gaussians).diag(), images.flatten(1).var(0, correction=0).float())
    torch.testing.assert_close(gaussians.means[0], images.mean(0).float())


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


def by_class() -> tuple[torch.Tensor, torch.Tensor]:
    """Constant classes 0 and 1 of 2 and 6 images, one image of class 2, none of class 3, and unlabelled ones."""
    labels = torch.tensor([0] * 2 + [1] * 6 + [2] + [-1] * 3)
    values = torch.tensor([0.5] * 2 + [-0.5] * 6 + [0.1] + [0.9] * 3)
    return values.view(-1, 1, 1, 1).expand(-1, *SHAPE), labels


def test_each_class_has_its_own_and_small_classes_that_of_all():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images, labels, 4, rank=2)
    overall = ClassGaussians.fit(images, rank=2)
    assert gaussians.means.shape == (4, *SHAPE)
    assert gaussians.factors.shape == (4, 18, 2)
    torch.testing.assert_close(gaussians.means[:2, 0, 0, 0], torch.tensor([0.5, -0.5]))
    assert gaussians.factors[:2].abs().max() < 1e-6
    for c in (2, 3):
        assert torch.equal(gaussians.means[c], overall.means[0])
        assert torch.equal(gaussians.factors[c], overall.factors[0])
    torch.testing.assert_close(overall.means[0], images.mean(0))
    torch.testing.assert_close(gaussians.weights, torch.tensor([2, 6, 1, 0]) / 9)


def test_chains_are_of_the_classes_asked_for():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images[:8], labels[:8], 2)
    y = torch.arange(600) % 2
    u = gaussians((600, *SHAPE), generator=torch.Generator().manual_seed(0), y=y)
    torch.testing.assert_close(u, (0.5 - y.float()).view(-1, 1, 1, 1).expand(u.shape))
    mixture = gaussians((4000, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert abs((mixture[:, 0, 0, 0] > 0).sum() - 1000) < 5 * 750**0.5
    one = ClassGaussians.fit(images[:8])
    assert one((5, *SHAPE), y=torch.tensor([7, 1, 0, 3, 2])).shape == (5, *SHAPE)  # serves any class


def test_samples_are_clamped_to_pixels():
    images = low_rank_images(scale=2.0)
    u = ClassGaussians.fit(images)((300, *SHAPE))
    assert u.abs().max() == 1


def test_randomness_is_the_generators_alone():
    images, state = low_rank_images(), torch.get_rng_state()
    runs = []
    for _ in range(2):
        gaussians = ClassGaussians.fit(images, torch.arange(200) % 3, 3).to("cpu")
        runs.append(gaussians((10, *SHAPE), generator=torch.Generator().manual_seed(4)))
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_replay_buffer_starts_from_them():
    images, labels = by_class()
    gaussians = ClassGaussians.fit(images[:8], labels[:8], 2)
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(SHAPE, init=gaussians, generator=generator, capacity=10, restart_prob=1.0, num_classes=2)
    expected = (0.5 - buffer.labels.float()).view(-1, 1, 1, 1).expand(10, *SHAPE)
    torch.testing.assert_close(buffer.chains, expected)
    buffer.chains.zero_()
    u, slots = buffer.draw(10)
    torch.testing.assert_close(u, expected[slots])


def test_bad_input_is_named():
    images = low_rank_images(n=4)
    y = torch.tensor([0, 1, 0, 1])
    for kwargs, match in (
        ({"images": images[:1]}, "two images"),
        ({"images": images[0]}, "N, C, H, W"),
        ({"images": images.long()}, "uint8"),
        ({"images": 127 + 100 * images}, "127.5"),
        ({"images": images * float("nan")}, "nan"),
        ({"rank": -1}, "rank"),
        ({"num_classes": 2}, "labels"),
        ({"num_classes": 2, "labels": y[:3]}, "labels"),
        ({"num_classes": 1, "labels": y}, "label 1"),
        ({"num_classes": 2, "labels": y - 2}, "label -2"),
        ({"num_classes": 2, "labels": torch.full((4,), -1)}, "no image has a label"),
        ({"num_classes": 0, "labels": y}, "num_classes"),
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
        (lambda: ClassGaussians(fitted.means, fitted.factors, fitted.residual_std, None), "weights"),
        (lambda: ClassGaussians(fitted.means[:1], fitted.factors, fitted.residual_std, fitted.weights), "disagree"),
        (lambda: ClassGaussians.fit(None), "NoneType"),
        (lambda: ClassGaussians.fit(images, [0, 1, 0, 1], 2), "a list"),
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
