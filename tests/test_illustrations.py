import math

import pytest
import torch
from small_networks import SHAPE, in_pixels
from torch import nn

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.illustrations import distal_adversarials, interpolation_paths
from timm_jem.noise import chain_generators, draw_seeds
from timm_jem.pixels import to_pixels


class Linear(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, math.prod(SHAPE), generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return x.flatten(1) @ self.w.T


@pytest.fixture
def u():
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2)) * 1.6 - 0.8


def starts_of(n, seed=0):
    seeds = draw_seeds(n, torch.Generator().manual_seed(seed))
    return timm_jem.uniform_noise((n, *SHAPE), generator=chain_generators(seeds))


Y = torch.tensor([0, 1, 2, 0, 1, 2])


def test_what_is_given_is_not_changed_and_nothing_depends_on_batches():
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), norm_layer="batchnorm2d", drop_rate=0.5)
    jem.train()
    jem.backbone.get_classifier().weight.requires_grad_(False)
    trainable = [p.requires_grad for p in jem.parameters()]
    before = {name: value.clone() for name, value in jem.state_dict().items()}
    images = to_pixels(load_splits(DataConfig()).test.images[:7])
    kept, y = images.clone(), torch.arange(7)

    def both(batch_size):
        distal = distal_adversarials(jem, y, generator=torch.Generator().manual_seed(3), steps=5, batch_size=batch_size)
        return [*distal, *interpolation_paths(jem, images, images.flip(0), batch_size=batch_size)]

    random_state = torch.get_rng_state()
    with torch.inference_mode():
        together = both(256)
    with torch.no_grad():
        for a, b in zip(together, both(3), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(images, kept)
    assert all(module.training for module in jem.modules())
    assert [p.requires_grad for p in jem.parameters()] == trainable
    assert all(p.grad is None for p in jem.parameters())
    for name, value in jem.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_lone_images_are_those_of_a_batch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    y, seen = torch.arange(5), []
    jem.backbone.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))

    def draw(batch_size):
        generator = torch.Generator().manual_seed(3)
        return distal_adversarials(jem, y, generator=generator, steps=20, confidence=0.99, batch_size=batch_size)

    for a, b in zip(draw(4), draw(1), strict=True):
        assert torch.equal(a, b)
    assert set(seen) == {4}


def test_distal_adversarials_of_a_linear_classifier():
    jem, y = in_pixels(Linear()), torch.tensor([0, 1, 2, 2])

    def draw(**options):
        return distal_adversarials(jem, y, generator=torch.Generator().manual_seed(0), **options)

    noise = starts_of(4)
    small = 1e-3
    moved, p = draw(steps=1, step_size=small, confidence=1.0)
    # Up the slope of log p: w_y − Σ_k p(k|x) w_k, of length `small`; noise near the edge of [-1, 1] would be cut.
    w = jem.backbone.w.detach()
    slope = w[y] - jem.backbone(noise).detach().softmax(1) @ w
    expected = noise + (small * slope / slope.norm(dim=1, keepdim=True)).view_as(noise)
    torch.testing.assert_close(moved, expected.clamp(-1, 1), atol=1e-7, rtol=0)
    assert torch.allclose(p, jem.backbone(moved).detach().softmax(1).gather(1, y[:, None]).squeeze(1))

    u, p = draw()
    first, _ = distal_adversarials(jem, y[:2], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, u[:2])
    assert ((p >= 0.9) & (p < 0.99)).all()  # stopped at once when sure
    assert (u.abs() <= 1).all()
    assert torch.equal(jem.backbone(u).argmax(1), y)


def test_each_distal_adversarial_stops_by_itself():
    jem = in_pixels(Linear())
    starts = starts_of(64)
    first = jem.backbone(starts).detach().softmax(1)[:, 0]
    u, _ = distal_adversarials(jem, torch.zeros(64, dtype=torch.long), generator=torch.Generator().manual_seed(0))
    sure = first >= 0.9
    assert 0 < sure.sum() < 64
    assert torch.equal(u[sure], starts[sure])
    assert (u[~sure] != starts[~sure]).flatten(1).any(1).all()
    unfinished = distal_adversarials(
        jem, torch.zeros(64, dtype=torch.long), generator=torch.Generator().manual_seed(0), steps=1, step_size=1e-4
    )[1]
    assert torch.equal(unfinished >= 0.9, sure)  # and those that never were say so


def test_a_broken_model_stays_visible():
    jem = in_pixels(Linear())
    with torch.no_grad():
        jem.backbone.w.fill_(math.nan)
    assert distal_adversarials(jem, Y, steps=2)[1].isnan().all()


def test_energies_along_lines_are_those_of_the_model():
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8)).eval()
    images = to_pixels(load_splits(DataConfig()).test.images[:6])
    a, b = images[:3], images[3:]
    paths, energies = interpolation_paths(jem, a, b)
    assert paths.shape == (3, 7, 1, 8, 8)
    assert torch.equal(paths[:, 0], a)
    assert torch.equal(paths[:, -1], b)
    torch.testing.assert_close(paths[:, 3], (a + b) / 2)
    torch.testing.assert_close(paths.diff(dim=1), ((b - a) / 6)[:, None].expand(-1, 6, -1, -1, -1))
    with torch.no_grad():
        expected = jem.energy(jem.normalize(paths.flatten(0, 1))).view(3, 7)
    torch.testing.assert_close(energies, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda jem, u: distal_adversarials(jem, torch.tensor([0, 3])), "0 to 2"),
        (lambda jem, u: distal_adversarials(jem, torch.tensor([-1])), "0 to 2"),
        (lambda jem, u: distal_adversarials(jem, torch.tensor([0.5])), "whole numbers"),
        (lambda jem, u: distal_adversarials(jem, torch.tensor([], dtype=torch.long)), "at least one"),
        (lambda jem, u: distal_adversarials(jem, Y, confidence=1.5), "confidence"),
        (lambda jem, u: distal_adversarials(jem, Y, step_size=0), "step_size"),
        (lambda jem, u: interpolation_paths(jem, u, u[:5]), "pairs"),
        (lambda jem, u: interpolation_paths(jem, u, u, 1), "at least 2"),
    ],
)
def test_bad_input_is_said_in_a_line(u, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(in_pixels(Linear()), u)
    assert "\n" not in str(error.value)
