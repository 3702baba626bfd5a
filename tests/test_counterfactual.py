import math

import pytest
import timm
import torch
from small_networks import MEANS, SHAPE, STDS, Kept, Wells, in_pixels, trained_on_digits

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.pixels import to_pixels

Y = torch.tensor([0, 1, 2, 0, 1, 2])
FIELDS = ("images", "probability", "probability_before", "energies", "distance", "reached")


@pytest.fixture
def u():
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8


def length(change):
    return change.flatten(1).norm(dim=1)


@pytest.mark.parametrize("step_size", [0.05, 5.0])
@pytest.mark.parametrize(("weight", "sparsity"), [(0.0, 0.0), (0.5, 0.0), (4.0, 0.2), (0.0, 0.5), (0.0, 9.0)])
def test_the_minimum_of_a_quadratic_energy(u, weight, sparsity, step_size):
    jem = in_pixels(Wells())
    found = jem.counterfactual(u, Y, confidence=None, weight=weight, sparsity=sparsity, step_size=step_size, steps=150)
    centres = jem.backbone.centres.detach()[Y]
    pull = centres - u
    expected = u + pull.sign() * (pull.abs() - sparsity).clamp(min=0) / (1 + weight)
    torch.testing.assert_close(found.images, expected, atol=2e-3, rtol=0)
    still = pull.abs() < sparsity - 0.02
    assert torch.equal(found.images[still], u[still])
    torch.testing.assert_close(found.distance, length(found.images - u))
    with torch.no_grad():
        after, before = jem.backbone(found.images), jem.backbone(u)
    torch.testing.assert_close(found.energies[:, -1], -after.logsumexp(1))
    torch.testing.assert_close(found.energies[:, 0], -before.logsumexp(1))
    torch.testing.assert_close(found.probability, after.softmax(1).gather(1, Y[:, None]).squeeze(1))
    torch.testing.assert_close(found.probability_before, before.softmax(1).gather(1, Y[:, None]).squeeze(1))
    assert torch.equal(found.reached, after.argmax(1) == Y)


def test_a_limit_is_where_the_sphere_meets_the_way(u):
    jem = in_pixels(Wells())
    away = jem.backbone.centres.detach()[Y] - u
    for limit in (0.2, 1.0, 99.0):
        found = jem.counterfactual(u, Y, confidence=None, weight=0.0, limit=limit)
        expected = u + away * (limit / length(away).clamp(min=limit)).view(-1, 1, 1, 1)
        torch.testing.assert_close(found.images, expected, atol=2e-3, rtol=0)
        assert (found.distance <= limit * (1 + 1e-5)).all()


def test_images_stay_pixels(u):
    jem = in_pixels(Wells())
    with torch.no_grad():
        jem.backbone.centres.mul_(10)
    found = jem.counterfactual(u, Y, confidence=None, weight=0.0)
    torch.testing.assert_close(found.images, jem.backbone.centres.detach()[Y].clamp(-1, 1), atol=1e-2, rtol=0)
    assert found.images.abs().max() <= 1


def test_each_image_stops_as_soon_as_it_is_sure(u):
    """Without a price of distance the way is a straight line, and each step but the last ones as long as the first."""
    jem, step_size = in_pixels(Wells(sharpness=4.0)), 0.02
    u = torch.cat([u, jem.backbone.centres.detach()])  # the last three are sure of their classes
    y = torch.cat([Y, torch.arange(3)])
    seen = {}
    found = jem.counterfactual(u, y, confidence=0.8, weight=0.0, step_size=step_size, on_step=seen.__setitem__)
    assert found.reached.all()
    away = jem.backbone.centres.detach()[y] - u
    for row in range(9):
        way = torch.arange(400)[:, None, None, None] * step_size * away[row] / length(away)[row].clamp(min=1e-9)
        p = jem.backbone(u[row] + way).detach().softmax(1)[:, y[row]]
        count = int((p >= 0.8).nonzero()[0])
        assert found.distance[row].item() == pytest.approx(count * step_size, abs=1e-4)
    assert torch.equal(found.images[6:], u[6:])
    assert (found.distance[:6] > 0).all()
    assert list(seen) == list(range(1, found.energies.shape[1]))
    on_the_way = torch.stack([-jem.backbone(v).detach().logsumexp(1) for v in seen.values()], 1)
    torch.testing.assert_close(found.energies[:, 1:], on_the_way)


def test_no_step_goes_up(u):
    jem, costs = in_pixels(Wells(sharpness=30.0)), []

    def on_step(step, v):
        to_centre = (v - jem.backbone.centres.detach()[Y]).square().flatten(1).sum(1)
        costs.append(15 * to_centre + 0.25 * (v - u).square().flatten(1).sum(1) + 0.1 * (v - u).abs().flatten(1).sum(1))

    jem.counterfactual(u, Y, confidence=None, weight=0.5, sparsity=0.1, step_size=3.0, on_step=on_step)
    costs = torch.stack(costs, 1)
    assert (costs.diff(dim=1) <= 1e-3).all()
    assert (costs[:, -1] < costs[:, 0]).all()


def test_what_is_not_reached_says_so(u):
    jem = in_pixels(Wells())
    found = jem.counterfactual(u, Y, confidence=0.99, steps=3, step_size=1e-3)
    assert not found.reached.any()
    assert found.energies.shape == (6, 4)
    with torch.no_grad():
        jem.backbone.centres.fill_(math.nan)
    broken = jem.counterfactual(u, Y, steps=2)
    assert broken.probability.isnan().all()
    assert not broken.reached.any()
    assert torch.equal(broken.images, u)


def test_the_model_is_left_alone_and_nothing_depends_on_batches():
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), norm_layer="batchnorm2d", drop_rate=0.5)
    jem.train()
    jem.backbone.get_classifier().weight.requires_grad_(False)
    kept, random_state = Kept(jem), torch.get_rng_state()
    images = to_pixels(load_splits(DataConfig()).test.images[:7])
    before = images.clone()
    with torch.inference_mode():
        together = jem.counterfactual(images, torch.arange(7), steps=5)
    with torch.no_grad():
        parts = jem.counterfactual(images, range(7), steps=5, batch_size=3)
    for name in FIELDS:
        torch.testing.assert_close(getattr(together, name), getattr(parts, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, before)
    kept.check()

    def fail(step, v):
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        jem.counterfactual(images, 3, on_step=fail)
    kept.check()


def test_lone_images_are_those_of_a_batch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    images, seen = jem.normalize(to_pixels(load_splits(DataConfig()).test.images[:4])), []
    jem.backbone.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    together, lone = (jem.counterfactual(images, 3, steps=10, confidence=None, batch_size=size) for size in (4, 1))
    for name in FIELDS:
        assert torch.equal(getattr(together, name), getattr(lone, name))
    assert set(seen) == {4}


def test_what_does_not_change_comes_back_bit_for_bit():
    """Whatever the normalisation, which the way to pixels and back would round."""
    torch.manual_seed(0)
    jem = timm_jem.wrap(timm.create_model("test_resnet", num_classes=10), input_size=(3, 16, 16), mean=MEANS, std=STDS)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    assert not torch.equal(jem.normalize(jem.denormalize(x)), x)
    found = jem.counterfactual(x, 3, confidence=None, sparsity=1e-3, steps=5)
    same = found.images == x
    assert 0.05 < same.float().mean() < 1
    assert jem.denormalize(found.images).abs().max() <= 1 + 1e-5
    unmoved = jem.counterfactual(x, 3, confidence=None, sparsity=1e3, steps=5)
    assert torch.equal(unmoved.images, x)
    assert unmoved.distance.abs().max() == 0


def test_white_is_white_in_bfloat16():
    backbone = timm.create_model("wrn_10_1", num_classes=3, in_chans=1)
    jem = timm_jem.wrap(backbone, input_size=(1, 8, 8), mean=(0.1307,), std=(0.3081,)).bfloat16()
    white = jem.normalize(torch.ones(2, 1, 8, 8))
    assert jem.denormalize(white).max() > 1
    assert jem.denormalize(jem.counterfactual(white, 1, steps=2).images).max() <= 1.005


def test_digits_become_others_by_less_than_the_way_to_the_nearest_such_digit():
    splits = load_splits(DataConfig())
    network = trained_on_digits(splits, 0)
    network.num_classes = 10
    jem = timm_jem.JEM(network, data_config={"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)})
    images, y = splits.test.images[:20], (splits.test.labels[:20] + 3) % 10
    found = jem.counterfactual(images / 255, y)
    assert found.reached.all()
    assert ((found.images >= 0) & (found.images <= 1)).all()
    assert torch.equal(network(found.images).argmax(1), y)
    for image, label, distance in zip(to_pixels(images), y, found.distance, strict=True):
        others = to_pixels(splits.train.images[splits.train.labels == label])
        assert 0 < distance < length(others - image).min()
    fewer = jem.counterfactual(images / 255, y, sparsity=0.3)
    assert fewer.reached.float().mean() > 0.8
    assert (fewer.images == images / 255).float().mean() > 1.5 * (found.images == images / 255).float().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": Y[:5]}, "one label per image"),
        ({"y": 3}, "label 3: give 0 to 2"),
        ({"y": -1}, "label -1"),
        ({"y": None}, "y is a NoneType"),
        ({"y": 0.5}, "integer class labels"),
        ({"x": 3}, "a int: give a tensor"),
        ({"x": torch.full((6, *SHAPE), 1.2)}, "cut them"),
        ({"x": torch.full((6, *SHAPE), math.nan)}, "NaN"),
        ({"x": torch.zeros(6, 3, 4, 4)}, "give model input of shape"),
        ({"x": torch.zeros(6, *SHAPE, dtype=torch.uint8)}, "dtype"),
        ({"x": torch.zeros(0, *SHAPE), "y": 1}, "at least one image"),
        ({"confidence": 1.5}, "confidence"),
        ({"confidence": 0}, "confidence"),
        ({"weight": -1}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"sparsity": -1}, "sparsity"),
        ({"limit": 0}, "limit"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**9}, "steps"),
        ({"step_size": 0}, "step_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_step": 3}, "on_step"),
    ],
)
def test_bad_input_is_said_in_a_line(u, options, message):
    jem = in_pixels(Wells())
    kept = Kept(jem)
    with pytest.raises(InputError, match=message) as error:
        jem.counterfactual(**{"x": u, "y": Y, **options})
    assert "\n" not in str(error.value)
    kept.check()
