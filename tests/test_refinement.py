from dataclasses import replace

import pytest
import torch
from small_networks import Gaussian, Kept, in_pixels, trained_on_digits
from torch import nn

import timm_jem
from timm_jem import InputError, SGLDConfig
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.attacks import PGDConfig, margin, pgd, pixel_classifier
from timm_jem.evaluation.refinement import RefinementConfig, refined_classifier
from timm_jem.refinement import refine

STILL = SGLDConfig(step_size=0.3, noise_std=0.0)
NOISY = SGLDConfig(step_size=0.3, noise_std=0.1)
BOTH = ("identity", "through")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def jem():
    """A smooth model in float64, of odd mean and std, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    network.num_classes = 3
    return timm_jem.JEM(network, data_config={"input_size": (1, 2, 2), "mean": (0.3,), "std": (0.6,)}).train()


@pytest.fixture
def images():
    return torch.rand(5, 1, 2, 2, generator=seeded(1), dtype=torch.float64)


def gradient(classifier, images, column):
    x = images.clone().requires_grad_(True)
    return torch.autograd.grad(classifier(x)[:, column].sum(), x)[0]


def test_the_gradient_through_all_steps_equals_finite_differences(jem, images):
    classifier = refined_classifier(jem, RefinementConfig(4, sgld=STILL), generator=seeded(), gradient="through")
    for column in range(3):
        found = gradient(classifier, images, column)
        for row in range(4):
            step = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
            step.flatten()[row] = 1e-6
            expected = (classifier(images + step) - classifier(images - step))[:, column] / 2e-6
            torch.testing.assert_close(found.flatten(1)[:, row], expected, rtol=1e-6, atol=1e-8)


def test_the_gradient_past_the_steps_is_that_at_the_refined_image(jem, images):
    classifier = refined_classifier(jem, RefinementConfig(4, sgld=STILL), generator=seeded(), gradient="identity")
    jem.eval()
    refined = timm_jem.sampling.sgld(jem.pixel_energy, 2 * images - 1, STILL, num_steps=4)
    plain = pixel_classifier(jem)
    for column in range(3):
        expected = gradient(lambda x: plain(x).log_softmax(1), (refined + 1) / 2, column)
        torch.testing.assert_close(gradient(classifier, images, column), expected, rtol=1e-9, atol=1e-12)
        through = refined_classifier(jem, RefinementConfig(4, sgld=STILL), generator=seeded())
        assert not torch.allclose(gradient(through, images, column), expected, rtol=0.05)


@pytest.mark.parametrize(("chains", "sgld"), [(1, NOISY), (3, NOISY), (1, replace(NOISY, step_decay=True))])
def test_values_are_equal_with_and_without_a_gradient(jem, images, chains, sgld):
    def value(which, x):
        return refined_classifier(jem, RefinementConfig(4, chains, sgld=sgld), generator=seeded(), gradient=which)(x)

    with torch.no_grad():
        expected = value("through", images)
    for which in BOTH:
        assert torch.equal(value(which, images), expected)
        assert torch.equal(value(which, images.clone().requires_grad_(True)), expected)
        with torch.inference_mode():
            assert torch.equal(value(which, images.clone()), expected)
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(5, dtype=torch.float64))


def test_jitter_is_for_drawing_and_refines_nothing(jem, images):
    still, jittered = (
        refined_classifier(jem, RefinementConfig(4, sgld=c), generator=None) for c in (STILL, replace(STILL, jitter=1))
    )
    assert torch.equal(still(images), jittered(images))


def test_probabilities_are_averaged_over_chains(jem, images):
    one = refined_classifier(jem, RefinementConfig(2, sgld=NOISY), generator=seeded())
    three = refined_classifier(jem, RefinementConfig(2, chains=3, sgld=NOISY), generator=seeded())
    parts = [one(images).exp() for _ in range(3)]
    assert not torch.allclose(parts[0], parts[1])  # new noise in every call
    torch.testing.assert_close(three(images).exp(), sum(parts) / 3)


def test_steps_are_those_of_the_model_unless_told(jem, images):
    jem.sgld = STILL
    assert torch.equal(
        refined_classifier(jem, RefinementConfig(2), generator=None)(images),
        refined_classifier(jem, RefinementConfig(2, sgld=STILL), generator=None)(images),
    )
    far = refined_classifier(jem, RefinementConfig(40, sgld=STILL), generator=None)(images)
    jem.eval()
    refined = timm_jem.sampling.sgld(jem.pixel_energy, 2 * images - 1, STILL, num_steps=40)
    torch.testing.assert_close(far, jem(jem.normalize(refined)).log_softmax(1))


@pytest.mark.parametrize("which", BOTH)
def test_attacks_leave_the_model_as_it_was(jem, images, which):
    classifier = refined_classifier(jem, RefinementConfig(2, sgld=NOISY), generator=seeded(), gradient=which)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        broken = pgd(classifier, images, torch.tensor([0, 1, 2, 0, 1]), PGDConfig(steps=2, eot=2), generator=seeded())
    assert (broken - images).abs().max() <= 8 / 255 + 1e-6
    assert all(module.training for module in jem.modules())
    assert all(p.requires_grad and p.grad is None for p in jem.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


class Coupled(nn.Module):
    """The class is the side of the first pixel, and the energy draws it to the second one."""

    num_classes = 2

    def forward(self, x):
        first, second = x.flatten(1).T
        near = -2 * (first - second).square()
        return torch.stack([near - first, near + first], 1)


def test_an_attacker_who_sees_the_steps_does_better():
    jem = timm_jem.JEM(Coupled(), data_config={"input_size": (1, 1, 2), "mean": (0.5,), "std": (0.5,)})
    config = RefinementConfig(10, sgld=SGLDConfig(step_size=0.1, noise_std=0.0))
    images = torch.tensor([[0.7, 0.7], [0.6, 0.6], [0.65, 0.6], [0.8, 0.55]]).reshape(-1, 1, 1, 2)
    y = torch.ones(4, dtype=torch.long)
    margins, moved = {}, {}
    for which in BOTH:
        classifier = refined_classifier(jem, config, generator=None, gradient=which)
        broken = pgd(classifier, images, y, PGDConfig("l2", 0.1, steps=20), generator=seeded())
        margins[which] = margin(classifier(broken), y)
        moved[which] = (broken - images).abs().mean(0).flatten()
    assert (margins["through"] > margins["identity"]).all()
    assert moved["identity"][1] < 0.2 * moved["identity"][0]  # it hardly knows of the second pixel
    assert moved["through"][1] > 0.5 * moved["through"][0]


class Attention(nn.Module):
    """Fused attention, which has no second derivative."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 1, -1, 4)).expand(-1, 2, -1, -1)
        return self.head(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))


def test_a_backbone_without_second_derivatives():
    jem = timm_jem.JEM(Attention(), data_config={"input_size": (1, 4, 4), "mean": (0.5,), "std": (0.5,)})
    x = torch.rand(3, 1, 4, 4, generator=seeded()).requires_grad_(True)
    with pytest.raises(InputError, match=r"set_fused_attn\(False\)") as error:
        refined_classifier(jem, RefinementConfig(2, sgld=STILL), generator=None, gradient="through")
    assert "\n" not in str(error.value)
    values = refined_classifier(jem, RefinementConfig(2, sgld=STILL), generator=None, gradient="identity")(x)
    assert torch.autograd.grad(values[:, 0].sum(), x)[0].abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in jem.parameters())


class Linear(nn.Module):
    """One class: a linear energy has a second derivative of zero, and PyTorch no graph for it."""

    num_classes = 1

    def forward(self, x):
        return x.sum((1, 2, 3))[:, None]


def test_a_linear_energy_moves_all_images_alike(images):
    jem = timm_jem.JEM(Linear(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)})
    classifier = refined_classifier(jem, RefinementConfig(2, sgld=STILL), generator=None, gradient="through")
    assert torch.equal(classifier(images.requires_grad_(True)), torch.zeros(5, 1))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"chains": 0}, {"steps": 1.5}])
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        RefinementConfig(**bad)


def test_another_gradient_is_refused(jem):
    with pytest.raises(InputError, match="'bpda'"):
        refined_classifier(jem, RefinementConfig(), generator=None, gradient="bpda")


def test_settings_that_are_none_are_not_the_models_own():
    with pytest.raises(InputError, match="is a dict: give a timm_jem"):
        RefinementConfig(sgld={})


def test_refined_images_are_those_of_chains(jem, images):
    """JEM.refine: k steps of SGLD, each image by a chain of its own; flags left alone."""
    x, kept = jem.normalize(2 * images - 1), Kept(jem)
    found = jem.refine(x, 4, sgld_config=STILL)
    kept.check()
    jem.eval()
    torch.testing.assert_close(found, jem.normalize(timm_jem.sgld(jem.pixel_energy, 2 * images - 1, STILL, num_steps=4)))
    noisy = jem.refine(x, 4, generator=seeded(), sgld_config=NOISY)
    assert not torch.allclose(noisy, found, atol=0.01)
    torch.testing.assert_close(jem.refine(x[:2], 4, generator=seeded(), sgld_config=NOISY, batch_size=1), noisy[:2])
    with torch.inference_mode():
        assert torch.equal(jem.refine(x, 4, generator=seeded(), sgld_config=NOISY), noisy)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_refinement_of_a_gaussian_energy(noise_std):
    """Of a curvature c and step α each step takes images (1 − α c) of the way, and adds noise: a geometric sum."""
    jem = in_pixels(Gaussian(0.5 * torch.eye(4), torch.full((4,), 0.2)), (1, 2, 2), step_size=0.4, noise_std=noise_std)
    x = torch.tensor([0.9, -0.9, 0.2, 0.0]).view(1, 1, 2, 2).expand(3000, -1, -1, -1)
    found = jem.refine(x, 3, generator=seeded(), batch_size=3000).flatten(1)
    torch.testing.assert_close(found.mean(0), 0.2 + 0.8**3 * (x[0].flatten() - 0.2), atol=max(1e-6, 0.1 * noise_std), rtol=0)
    variance = noise_std**2 * (1 + 0.8**2 + 0.8**4)
    torch.testing.assert_close(found.var(0), torch.full((4,), variance), rtol=0.1, atol=1e-6)


def test_a_gradient_goes_through_normalized_steps_also_where_the_energy_is_flat():
    config = SGLDConfig(step_size=0.1, noise_std=0.0, normalize_grad=True)
    u = torch.tensor([3.0, 0.01]).view(2, 1, 1, 1).expand(2, 1, 4, 4).requires_grad_(True)
    v = refine(lambda u: torch.tanh(u.flatten(1).sum(1)), u, config, steps=1, create_graph=True)
    torch.testing.assert_close(v, u - torch.tensor([0.0, 0.1]).view(2, 1, 1, 1))
    torch.testing.assert_close(torch.autograd.grad(v.square().sum(), u)[0], 2 * v)  # the step is the same all around


def test_refined_digits_are_likelier_and_still_themselves():
    splits = load_splits(DataConfig())
    network = trained_on_digits(splits, 0)
    network.num_classes = 10
    jem = timm_jem.JEM(network, data_config={"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)})
    x, y = splits.test.images[:100] / 255, splits.test.labels[:100]
    refined = jem.refine(x, 5, generator=seeded(), sgld_config=SGLDConfig(step_size=0.01, noise_std=0.01))
    assert (jem.energy(refined) < jem.energy(x)).all()
    assert (jem(refined).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps of a refinement"),
        ({"steps": 1.5}, "steps of a refinement"),
        ({"generator": 3}, "generator"),
        ({"sgld_config": {}}, "sgld_config"),
        ({"batch_size": 0}, "batch_size"),
        ({"x": torch.zeros(0, 1, 2, 2, dtype=torch.float64)}, "at least one"),
        ({"x": torch.zeros(2, 1, 2, 2)}, "dtype"),
    ],
)
def test_bad_input_of_refine_is_said_in_a_line(jem, images, options, message):
    with pytest.raises(InputError, match=message) as error:
        jem.refine(**{"x": images, **options})
    assert "\n" not in str(error.value)


def test_a_gradient_through_the_steps_needs_energies_one_by_one():
    config, u = SGLDConfig(noise_std=0, step_size=0.1), torch.ones(10, 1, 2, 2)
    energies = lambda u: u.square().flatten(1).sum(1)  # noqa: E731
    moved = refine(energies, u.clone().requires_grad_(), config, steps=1, create_graph=True)
    assert torch.allclose(moved, torch.full_like(u, 0.8))
    for energy_fn, given in ((lambda u: energies(u).mean(), u.clone().requires_grad_()), (energies, u)):
        with pytest.raises(InputError, match=r"energy_fn gives .* for 10 images: give energies of shape \(10,\)"):
            refine(energy_fn, given, config, steps=1, create_graph=True)
    with pytest.raises(InputError, match=r"settings of chains are a NoneType: give a timm_jem\.SGLDConfig"):
        refine(energies, u, None, steps=1)
