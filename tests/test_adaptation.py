import contextlib
import math

import pytest
import torch
from small_networks import Kept, in_pixels
from timm.layers import EvoNorm2dS0
from torch import nn

import timm_jem
from timm_jem import InputError
from timm_jem.adaptation import METHODS, normalisation_layers
from timm_jem.data import DataConfig, load_splits
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels

LR = 0.05


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Scaled(nn.Module):
    """Logits of a normalised pixel z: f(x) = (a z + b) v, with a and b the weight and bias of the normalisation."""

    num_classes = 2

    def __init__(self, layer):
        super().__init__()
        self.norm, self.v = layer, nn.Parameter(torch.tensor([1.0, -2.0]))
        self.head = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.norm(x).mean((1, 2, 3))[:, None] * self.v)


def batch(n=40, mean=0.3, std=0.2, seed=0):
    return mean + std * torch.randn(n, 1, 1, 2, generator=seeded(seed))


def first_step(loss, *weights):
    """Adam's: against the sign of the gradient, of length lr."""
    return [w.detach() - LR * g.sign() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_closed_form(method):
    """Statistics of the batch, then Adam's first step down the formula of the loss, then nothing of it."""
    jem, x, others = in_pixels(Scaled(nn.BatchNorm2d(1)), (1, 1, 2)), batch(), batch(9, -0.4, 0.1, 1)
    v = jem.backbone.v.detach()

    def logits(x, a, b):
        z = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return (a * z + b).mean((1, 2, 3))[:, None] * v

    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    with torch.no_grad():
        jem.backbone.norm.bias.fill_(0.2)
    kept = Kept(jem)
    f = logits(x, a, b)
    losses = {
        "energy": -f.logsumexp(1).mean() + logits(others, a, b).logsumexp(1).mean(),
        "tent": -(f.softmax(1) * f.log_softmax(1)).sum(1).mean(),
    }
    expected = [a.detach(), b.detach()] if method == "statistics" else first_step(losses[method], a, b)
    with jem.adapted(x, method, steps=1, lr=LR, negatives=others):
        norm = jem.backbone.norm
        torch.testing.assert_close([norm.weight[0].detach(), norm.bias[0].detach()], expected)
        torch.testing.assert_close(norm.running_mean[0], x.mean())
        torch.testing.assert_close(norm.running_var[0], x.var(correction=0))
        torch.testing.assert_close(jem(x), logits(x, *expected))
        torch.testing.assert_close(jem(x[:1]), jem(x)[:1])  # an image is classified the same by itself
        assert not any(module.training for module in jem.modules())
    kept.check()


@pytest.fixture(params=["resnet", "convnext", "groupnorm"])
def jem(request):
    torch.manual_seed(0)
    name, options = {
        "resnet": ("test_resnet", {"drop_rate": 0.5}),
        "convnext": ("test_convnext", {}),
        "groupnorm": ("wrn_10_1", {"norm_layer": "groupnorm1"}),
    }[request.param]
    return timm_jem.create_model(name, num_classes=4, input_size=(3, 32, 32), **options).train()


def images(n=6, size=(3, 32, 32)):
    return 0.5 * torch.randn(n, *size, generator=seeded(5))


@pytest.mark.parametrize("method", ["energy", "tent"])
def test_all_is_as_it_was_bit_for_bit(jem, method):
    jem.backbone.get_classifier().weight.requires_grad_(False)
    jem(images()).sum().backward()  # statistics and gradients of training
    kept, x, random_state = Kept(jem), images(), torch.get_rng_state()
    before = x.clone()
    with torch.inference_mode(), jem.adapted(x, method, steps=2, generator=seeded(), sgld_config=timm_jem.SGLDConfig(2)):
        changed = [name for name, value in jem.state_dict().items() if not torch.equal(value, kept.state[name])]
        assert jem(x).shape == (6, 4)
        jem.sample(2, num_steps=1, generator=seeded())
    weights = {name for name, value in kept.state.items() if value.is_floating_point()}
    own = {id(p) for layer in normalisation_layers(jem) for p in layer.parameters(recurse=False)}
    assert {name for name, p in jem.named_parameters() if id(p) in own} <= set(changed) <= weights
    assert not {name for name, p in jem.named_parameters() if id(p) not in own} & set(changed)
    kept.check()
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random_state)

    def fail():
        jem.train()(x)  # statistics move
        raise KeyError("of the caller")

    with pytest.raises(KeyError), jem.adapted(x, method, steps=1, generator=seeded(), sgld_config=timm_jem.SGLDConfig(2)):
        fail()
    kept.check()


def test_a_batch_gets_the_logits_of_batch_statistics():
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32)).train()
    x, kept = images(), Kept(jem)
    with torch.no_grad(), frozen(jem, batch_norm="train"):
        expected = jem(x)
    with torch.no_grad(), jem.adapted(x, "statistics"):
        torch.testing.assert_close(jem(x), expected, rtol=1e-4, atol=1e-4)
    kept.check()


def test_negatives_are_chains_that_go_on():
    torch.manual_seed(0)
    jem, seen = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 16, 16)).eval(), []
    config = timm_jem.SGLDConfig(num_steps=2, sample_steps=5)
    sample = jem.sample
    jem.sample = lambda n, **options: seen.append((n, options["init"])) or sample(n, **options)
    with jem.adapted(images(6, (3, 16, 16)), "energy", steps=2, generator=seeded(), sgld_config=config) as adapt:
        adapt(images(6, (3, 16, 16)))
        adapt(images(4, (3, 16, 16)))
        first = jem(images(2, (3, 16, 16)))
    assert [n for n, _ in seen] == [6] * 4 + [4] * 2
    assert [init is None for _, init in seen] == [True, False, False, False, True, False]
    with jem.adapted(images(6, (3, 16, 16)), "energy", steps=2, generator=seeded(), sgld_config=config) as adapt:
        adapt(images(6, (3, 16, 16)))
        adapt(images(4, (3, 16, 16)))
        assert torch.equal(jem(images(2, (3, 16, 16))), first)


def test_gradients_reach_no_negatives():
    jem = in_pixels(Scaled(nn.BatchNorm2d(1)), (1, 1, 2)).eval()
    x, scale = batch(), torch.ones((), requires_grad=True)
    others = batch(9, seed=1)
    with jem.adapted(x, "energy", steps=2, negatives=others):
        expected = jem.energy(x)
    with torch.inference_mode():
        untracked = others.clone()
    for same in (others * scale, untracked):
        with jem.adapted(x, "energy", steps=2, negatives=same):
            assert torch.equal(jem.energy(x), expected)
    assert scale.grad is None


def test_a_stream_goes_on_from_where_it_was():
    jem = in_pixels(Scaled(nn.BatchNorm2d(1)), (1, 1, 2))
    kept, first, second = Kept(jem), batch(seed=1), batch(mean=-0.5, seed=2)
    with jem.adapted(first, "tent", steps=3, lr=LR) as adapt:
        after_first = jem.backbone.norm.weight.item()
        adapt(second)
        torch.testing.assert_close(jem.backbone.norm.running_mean[0], second.mean())
        assert abs(jem.backbone.norm.weight.item() - after_first) > LR  # Adam's momentum is not forgotten
        for bad, message in ((second[:1], "give a batch"), (second * math.nan, "NaN"), (second.tolist(), "a list")):
            with pytest.raises(InputError, match=message):
                adapt(bad)
    kept.check()


def test_contexts_within_contexts_are_undone_in_turn():
    jem, kept = in_pixels(Scaled(nn.BatchNorm2d(1)), (1, 1, 2)), None
    with jem.adapted(batch(seed=1), "tent", lr=LR):
        kept = Kept(jem)
        with jem.adapted(batch(mean=-0.5, seed=2), "tent", lr=LR):
            assert not torch.equal(jem.backbone.norm.weight, kept.state["backbone.norm.weight"])
        kept.check()


@pytest.mark.parametrize("layer", [nn.LayerNorm([1, 1, 2]), nn.GroupNorm(1, 1), nn.InstanceNorm2d(1, affine=True)])
def test_layers_without_statistics_move_their_weights_alone(layer):
    jem = in_pixels(Scaled(layer), (1, 1, 2))
    with torch.no_grad():
        layer.bias.fill_(0.2)  # off the equal probabilities, whose entropy has no slope
    kept = Kept(jem)
    with jem.adapted(batch(1), "tent", steps=1, lr=LR):
        torch.testing.assert_close((layer.bias - 0.2).abs().detach(), torch.full_like(layer.bias, LR))
    kept.check()
    with pytest.raises(InputError, match="no BatchNorm"), jem.adapted(batch(), "statistics"):
        pass


def test_brighter_digits_are_read_again():
    """A network with BatchNorm, and digits of half the contrast on a grey ground, where it hardly reads any."""
    splits = load_splits(DataConfig())
    x, y = to_pixels(splits.train.images), splits.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.SiLU(), nn.Linear(64, 10))
        network.num_classes = 10
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    jem = in_pixels(network, (1, 8, 8), step_size=0.1).eval()
    test, labels = 0.4 * to_pixels(splits.test.images) + 0.6, splits.test.labels

    def accuracy():
        with torch.no_grad():
            return (jem(test).argmax(1) == labels).float().mean().item()

    found = {}
    for method in (None, *METHODS):
        with jem.adapted(test, method, generator=seeded()) if method else contextlib.nullcontext():
            found[method] = accuracy()
    assert found.pop(None) < 0.7
    assert min(found.values()) > 0.9


def test_gradient_checkpointing_would_recompute_with_the_weights_put_back():
    jem = timm_jem.create_model("resnet18", num_classes=4, input_size=(3, 32, 32))
    jem.backbone.set_grad_checkpointing()
    for method in ("tent", "energy"):
        with pytest.raises(InputError, match="set_grad_checkpointing"), jem.adapted(images(), method):
            pass
    with jem.adapted(images(), "statistics"):
        pass


def test_a_loss_that_ran_away_is_said_and_undone():
    jem = in_pixels(Scaled(nn.BatchNorm2d(1)), (1, 1, 2))
    with torch.no_grad():
        jem.backbone.norm.weight.fill_(3e38)
    kept = Kept(jem)
    with pytest.raises(InputError, match="smaller lr"), jem.adapted(batch(), "tent"):
        pass
    kept.check()


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (nn.BatchNorm2d(1), {"method": "tea"}, "'statistics', 'energy', 'tent'"),
        (nn.BatchNorm2d(1), {"method": None}, "method of an adaptation is None"),
        (nn.BatchNorm2d(1), {"steps": 0}, "steps"),
        (nn.BatchNorm2d(1), {"lr": 0}, "lr"),
        (nn.BatchNorm2d(1), {"lr": math.nan}, "lr"),
        (nn.BatchNorm2d(1), {"lr": 1.5}, "lr"),
        (nn.BatchNorm2d(1), {"x": batch(1)}, "give a batch"),
        (nn.BatchNorm2d(1), {"x": batch(0)}, "give a batch"),
        (nn.BatchNorm2d(1), {"x": batch() * math.nan}, "NaN"),
        (nn.BatchNorm2d(1), {"x": [3]}, "a list"),
        (nn.BatchNorm2d(1), {"negatives": batch()[0]}, "negatives"),
        (nn.BatchNorm2d(1), {"negatives": batch(0)}, "negatives"),
        (nn.BatchNorm2d(1), {"negatives": batch(1)}, "more negatives"),
        (nn.BatchNorm2d(1), {"negatives": "chains"}, "negatives"),
        (nn.BatchNorm2d(1), {"generator": 3}, "generator"),
        (nn.BatchNorm2d(1), {"sgld_config": {}}, "sgld_config"),
        (nn.BatchNorm2d(1, affine=False), {"method": "tent"}, "no normalisation layers"),
        (nn.LayerNorm([1, 1, 2]), {"method": "statistics"}, "no BatchNorm layers"),
        (nn.LayerNorm([1, 1, 2]), {"x": batch(0)}, "at least one"),
        (nn.Identity(), {"method": "energy"}, "no normalisation layers"),
        (EvoNorm2dS0(1, group_size=1), {"method": "tent"}, r"of the kinds that are adapted \(BatchNorm, .*RMSNorm\)"),
        (nn.Identity(), {"method": "statistics"}, "no normalisation layers"),
    ],
)
def test_bad_input_is_said_in_a_line(backbone, options, message):
    jem = in_pixels(Scaled(backbone), (1, 1, 2))
    kept = Kept(jem)
    with pytest.raises(InputError, match=message) as error, jem.adapted(**{"x": batch(), "method": "energy", **options}):
        pass
    assert "\n" not in str(error.value)
    kept.check()
