import copy
import re
import sys
from functools import partial

import foolbox
import pytest
import torch
from accelerate.utils import tqdm
from small_networks import trained_on_digits
from torch import nn

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.attacks import PGDConfig, margin, pgd, pixel_classifier
from timm_jem.evaluation.auto_attack import auto_attack
from timm_jem.modes import frozen

NORMS = ("linf", "l2")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    """200 test images in [0, 1], their labels, and a small network that reads them; frozen."""
    splits = load_splits(DataConfig())
    network = trained_on_digits(splits, 0)
    test, labels = splits.test.images[:200].float() / 255, splits.test.labels[:200]
    assert (network(test).argmax(1) == labels).float().mean() > 0.9
    return test, labels, network


def accuracy(classifier, images, y):
    with torch.no_grad():
        return (classifier(images).argmax(1) == y).double().mean().item()


def distance(broken, images, norm):
    away = (broken.double() - images.double()).flatten(1)
    return (away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max().item()


class Pixels(nn.Module):
    """Logits are the pixels that it is given."""

    num_classes = 4

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.flatten(1)


def test_images_in_0_to_1_become_the_input_that_the_model_was_made_for():
    jem = timm_jem.JEM(Pixels(), data_config={"input_size": (1, 2, 2), "mean": (0.2,), "std": (0.7,)}).train()
    images = torch.rand(5, 1, 2, 2, generator=seeded()).requires_grad_(True)
    logits = pixel_classifier(jem)(images)
    torch.testing.assert_close(logits, (images.flatten(1) - 0.2) / 0.7)  # torchvision's Normalize on [0, 1]
    logits.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 0.7))
    assert jem.training
    assert jem.backbone.scale.requires_grad
    assert jem.backbone.scale.grad is None


def test_gradient_checkpointing_would_recompute_in_train_mode():
    jem = timm_jem.create_model("resnet18", num_classes=4, input_size=(3, 32, 32)).train()
    jem.backbone.set_grad_checkpointing()
    images, before = torch.rand(2, 3, 32, 32), copy.deepcopy(jem.state_dict())
    classify = pixel_classifier(jem)
    with pytest.raises(InputError, match="set_grad_checkpointing"):
        pgd(classify, images, torch.tensor([0, 1]), PGDConfig(steps=1), generator=seeded())
    assert classify(images).shape == (2, 4)
    assert all(torch.equal(value, before[name]) for name, value in jem.state_dict().items())


def test_images_of_another_size_are_named_where_the_backbone_has_one():
    jem = timm_jem.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, input_size=(3, 32, 32))
    for images in (torch.rand(2, 3, 16, 16), torch.rand(2, 1, 32, 32)):
        with pytest.raises(InputError, match=r"this model takes \('?N'?, 3, "):
            pixel_classifier(jem)(images)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_on_a_linear_classifier_has_a_closed_form(norm):
    w = torch.randn(16, generator=seeded(1), dtype=torch.float64)
    b = 0.1 - 0.5 * w.sum()

    def classifier(images):
        score = images.flatten(1) @ w + b
        return torch.stack([-score, score], 1) / 2

    images = 0.5 + 0.2 * (torch.rand(400, 1, 4, 4, generator=seeded(2), dtype=torch.float64) - 0.5)
    y = (classifier(images)[:, 1] > 0).long()
    dual = w.abs().sum() if norm == "linf" else w.norm()
    radius = -margin(classifier(images), y) / dual  # to the boundary: the box is further than any eps here
    middle = radius.sort().values[190:211]
    gap = middle.diff().argmax()
    eps = (middle[gap] + middle[gap + 1]).item() / 2  # no radius is very near
    assert eps < 0.4
    broken = pgd(classifier, images, y, PGDConfig(norm, eps, steps=30, step_size=2 * eps), generator=seeded())
    assert torch.equal(classifier(broken).argmax(1) == y, radius > eps)
    torch.testing.assert_close(margin(classifier(broken), y), (eps - radius) * dual, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_does_as_foolbox(digits, norm):
    images, y, network = digits
    reference = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    radii = {"linf": (0.02, 0.05, 0.1), "l2": (0.1, 0.3, 0.6)}[norm]
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    found = []
    for eps in radii:
        attack = reference(abs_stepsize=2.5 * eps / 20, steps=20, random_start=True)
        ours, theirs = [], []
        for seed in range(5):  # one random start is worth two or three points under l2
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                theirs.append(accuracy(network, attack(model, images, y, epsilons=eps)[1], y))
            broken = pgd(network, images, y, PGDConfig(norm, eps, steps=20), generator=seeded(seed))
            ours.append(accuracy(network, broken, y))
        found.append(sum(ours) / 5)
        assert found[-1] == pytest.approx(sum(theirs) / 5, abs=0.02)
    assert found[0] > found[1] > found[2]  # none of them trivial
    assert 0.1 < found[1] < 0.95


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.5, 3.0])
def test_nothing_leaves_the_ball_or_the_box(digits, norm, eps):
    images, y, network = digits
    broken = pgd(network, images, y, PGDConfig(norm, eps, steps=5, step_size=2 * eps), generator=seeded())
    assert distance(broken.double(), images.double(), norm) <= eps  # not even by rounding
    assert distance(broken, images, norm) > 0.5 * min(eps, 1)
    assert broken.min() >= 0
    assert broken.max() <= 1


def test_pgd_at_once_and_in_batches(digits):
    images, y, network = digits
    for norm in NORMS:
        config = PGDConfig(norm, 0.1, steps=5, restarts=2)
        whole = pgd(network, images, y, config, generator=seeded())
        parts = pgd(network, images, y, config, generator=seeded(), batch_size=33)
        # The last bit of a matrix product depends on the batch, and a sign step can turn on it.
        same = (whole - parts).flatten(1).abs().amax(1) < 1e-5
        assert same.double().mean() > 0.97
        torch.testing.assert_close(margin(network(whole), y), margin(network(parts), y), rtol=0, atol=0.02)
    again = pgd(network, images, y, config, generator=seeded())
    assert torch.equal(again, whole)


def test_more_restarts_never_lose_what_was_found(digits):
    images, y, network = digits
    margins = [
        margin(network(pgd(network, images, y, PGDConfig(eps=0.05, steps=3, restarts=n), generator=seeded())), y)
        for n in (1, 3)
    ]
    assert (margins[1] >= margins[0] - 1e-5).all()
    assert (margins[1] > margins[0] + 1e-5).any()
    assert (margins[0] >= margin(network(images), y) - 1e-5).all()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_pgd_under_no_grad_leaves_nothing_behind(digits, guard):
    images, y, network = digits
    expected = pgd(network, images, y, PGDConfig(steps=3), generator=seeded())
    network.requires_grad_(True)
    state = torch.random.get_rng_state()
    try:
        with guard():
            broken = pgd(network, images.clone(), y.clone(), PGDConfig(steps=3), generator=seeded())
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
    finally:
        network.requires_grad_(False)
    assert torch.equal(broken, expected)
    assert not broken.is_inference()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_slope_and_tiny_slopes():
    images, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    for norm in NORMS:
        flat = pgd(lambda x: 0 * x.flatten(1), images, y, PGDConfig(norm, 0.1, steps=3), generator=seeded())
        cut = pgd(lambda x: x.flatten(1).detach(), images, y, PGDConfig(norm, 0.1, steps=3), generator=seeded())
        assert flat.isfinite().all()
        assert cut.isfinite().all()
        # Its squares are 0 in float32; the way is none the less clear: the first pixel down, the others up.
        tiny = pgd(lambda x: 1e-30 * x.flatten(1), images, y, PGDConfig(norm, 0.1, steps=10), generator=seeded())
        assert (tiny[:, 0, 0, 0] < 0.45).all()
        assert distance(tiny, images, norm) == pytest.approx(0.1, abs=1e-6)


def test_the_mean_gradient_over_noise_finds_the_way():
    noise = seeded(3)

    def classifier(images):
        # Of a draw's gradient, a tenth is signal.
        x = images.flatten(1)
        wild = 10 * torch.randn(x.shape, generator=noise)
        return torch.stack([(x * (1 + wild)).sum(1), torch.zeros(len(x))], 1) * 1e-3

    images, y = torch.full((50, 1, 4, 4), 0.5), torch.zeros(50, dtype=torch.long)
    moved = {}
    for eot in (1, 200):
        calls = []
        config = PGDConfig("l2", 0.1, steps=1, step_size=0.2, eot=eot)

        def counted(x, calls=calls):
            calls.append(len(x))
            return classifier(x)

        broken = pgd(counted, images, y, config, generator=seeded())
        assert len(calls) == 1 + 3 * eot  # the first look; the image, the start and the point after the step
        moved[eot] = (images - broken).sum(dim=(1, 2, 3)).mean().item()
    assert moved[200] > 2 * abs(moved[1])


def test_eps_0_gives_the_images_back(digits):
    images, y, network = digits
    assert torch.equal(pgd(network, images, y, PGDConfig(eps=0.0), generator=None), images)
    assert torch.equal(auto_attack(network, images, y, norm="l2", eps=0.0), images)


@pytest.mark.parametrize("attack", ["pgd", "auto_attack"])
def test_what_can_not_be_attacked_is_refused(digits, attack):
    images, y, network = digits

    def run(images, y, classifier=network):
        if attack == "pgd":
            pgd(classifier, images, y, PGDConfig(), generator=None)
        else:
            auto_attack(classifier, images, y, norm="linf", eps=0.1)

    for bad, message in (
        (images * 255, "divided by 255"),
        ((images * 255).byte(), "divided by 255"),
        (2 * images - 1, "divided by 255"),
        (images.half(), "float32"),
        (images[:, 0], "(N, C, H, W)"),
        (images + torch.nan, "[nan, nan]"),
        (images[..., :0, :], "at least one pixel"),
        (images[:0], "at least one"),
    ):
        with pytest.raises(InputError) as error:
            run(bad, y[: len(bad)])
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    for bad in (y[:-1], y[:, None], y.float(), y - 1, y + 1):
        with pytest.raises(InputError, match="label"):
            run(images, bad)
    with pytest.raises(InputError, match="logits that are not finite"):
        run(images, y, lambda x: torch.where(x.flatten(1)[:, :10] < 2, torch.nan, 0.0))
    # finite at first
    seen = iter([False, True, True, True, True, True, True, True])
    with pytest.raises(InputError, match="logits that are not finite"):
        run(images, y, lambda x: network(x) + (torch.nan if next(seen) else 0))


def test_a_gradient_that_is_not_finite_is_refused():
    images, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    for norm in NORMS:
        with pytest.raises(InputError, match="gradient that is not finite"):
            pgd(lambda x: (x - x).sqrt().flatten(1), images, y, PGDConfig(norm, 0.1), generator=seeded())


@pytest.mark.parametrize(
    "bad", [{"norm": "l1"}, {"eps": -0.1}, {"eps": float("nan")}, {"steps": 0}, {"step_size": 0.0}, {"restarts": 0}, {"eot": 0}]
)
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        PGDConfig(**bad)


@pytest.mark.parametrize("norm", NORMS)
def test_auto_attack_is_no_weaker_than_pgd_and_stays_in_the_ball(digits, norm):
    images, y, network = digits
    eps = {"linf": 0.05, "l2": 0.3}[norm]
    ours = pgd(network, images, y, PGDConfig(norm, eps), generator=seeded())
    state = torch.random.get_rng_state()
    theirs = auto_attack(network, images, y, norm=norm, eps=eps, n_iter=20, n_queries=100)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert accuracy(network, theirs, y) <= accuracy(network, ours, y)
    assert distance(theirs, images, norm) <= eps + 1e-6
    assert theirs.min() >= 0
    assert theirs.max() <= 1
    kept = network(theirs).argmax(1) == y
    assert kept.any()
    assert torch.equal(theirs[kept], images[kept])
    assert torch.equal(theirs, auto_attack(network, images, y, norm=norm, eps=eps, n_iter=20, n_queries=100))


@pytest.fixture
def settings(monkeypatch):
    """What pyautoattack is asked for; it isn't run."""
    import pyautoattack

    asked = []

    def note(self, images, y, *, batch_size):
        asked.append(self)
        return images, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", note)
    return asked


@pytest.mark.parametrize(
    ("classes", "version", "names", "targets"),
    [
        (2, "standard", ["apgd-ce", "fab-t", "square"], 1),
        (3, "standard", ["apgd-ce", "apgd-dlr", "fab-t", "square"], 2),
        (4, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], 3),
        (10, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], 9),
        (100, "standard", ["apgd-ce", "apgd-t", "fab-t", "square"], 9),
        (2, "rand", ["apgd-ce"], 1),
        (3, "rand", ["apgd-ce", "apgd-dlr"], 2),
    ],
)
def test_auto_attack_asks_for_attacks_that_exist(settings, classes, version, names, targets):
    images = torch.rand(4, 1, 2, 2, generator=seeded())
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    auto_attack(network, images, torch.tensor([0, 1, 0, 1]), norm="linf", eps=0.1, version=version)
    (asked,) = settings
    assert asked.attacks_to_run == names
    assert asked.fab.n_target_classes == asked.apgd_targeted.n_target_classes == targets
    assert asked.apgd.eot_iter == (20 if version == "rand" else 1)
    assert (asked.apgd.n_restarts, asked.apgd.n_iter, asked.fab.n_iter, asked.square.n_queries) == (1, 100, 100, 5000)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_auto_attack_with_few_classes(norm, classes):
    images = torch.rand(40, 1, 5, 5, generator=seeded(4))
    network = nn.Sequential(nn.Flatten(), nn.Linear(25, classes))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(classes, 25, generator=seeded(5)))
        network[1].bias.copy_(-network[1].weight.sum(1) / 2)
        y = network(images).argmax(1)
    eps = {"linf": 0.05, "l2": 0.2}[norm]
    broken = auto_attack(network, images, y, norm=norm, eps=eps, n_iter=10, n_queries=50)
    ours = pgd(network, images, y, PGDConfig(norm, eps), generator=seeded())
    assert accuracy(network, broken, y) <= accuracy(network, ours, y)
    assert 0.05 < accuracy(network, ours, y) < 0.95
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert network.training
    for name, least in (("apgd-dlr", 3), ("apgd-t", 4)):
        if classes < least:
            with pytest.raises(InputError, match=f"{name} needs {least} classes"):
                auto_attack(network, images, y, norm=norm, eps=0.1, attacks=[name])


def test_square_under_l2_needs_images_of_some_size(digits):
    images, y, _ = digits
    with pytest.raises(InputError, match="5 x 5 pixels"):
        auto_attack(nn.Flatten(), images[:9, :, :4, :4], y[:9], norm="l2", eps=0.1)


def test_auto_attack_puts_the_trace_function_back(digits):
    images, y, network = digits
    before = sys.gettrace()

    def tracer(frame, event, arg):
        return None

    sys.settrace(tracer)
    try:
        auto_attack(network, images[:2], y[:2], norm="linf", eps=0.1, attacks=["square"], n_queries=2)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_auto_attack_shows_how_many_images_it_asked_about(digits, monkeypatch, capsys):
    images, y, network = digits
    sizes = []

    def classifier(x):
        sizes.append(len(x))
        return network(x)

    monkeypatch.setattr("timm_jem.evaluation.auto_attack.tqdm", partial(tqdm, mininterval=0))
    auto_attack(classifier, images[:4], y[:4], norm="linf", eps=0.1, attacks=["square"], n_queries=20, desc="here")
    *_, shown = re.findall(r"here: (\d+) images", capsys.readouterr().err)
    assert int(shown) == sum(sizes) - 2  # two images tell first how many classes there are


def test_auto_attack_takes_a_jem_without_gradients_of_its_parameters(digits):
    images, y, _ = digits
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8)).train()
    with frozen(jem):
        y = pixel_classifier(jem)(images[:6]).argmax(1)
    options = {"norm": "linf", "eps": 0.2, "n_iter": 3, "n_queries": 5}
    with torch.inference_mode():
        broken = auto_attack(pixel_classifier(jem), images[:6].to(memory_format=torch.channels_last), y, **options)
    assert distance(broken, images[:6], "linf") <= 0.2 + 1e-6
    assert jem.training
    assert all(p.requires_grad and p.grad is None for p in jem.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"norm": "l1"}, "norm"),
        ({"version": "plus"}, "version"),
        ({"attacks": ["apgd"]}, "apgd-ce"),
        ({"attacks": "square"}, "list"),
        ({"attacks": []}, "list"),
        ({"n_iter": 0}, "n_iter"),
        ({"n_queries": 0.5}, "n_queries"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_bad_settings_of_auto_attack(digits, bad, message):
    images, y, network = digits
    with pytest.raises(InputError, match=message):
        auto_attack(network, images, y, **{"norm": "linf", "eps": 0.1, **bad})


def test_auto_attack_without_its_library(digits, monkeypatch):
    images, y, network = digits
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InputError, match=r"timm_jem\[robust\]"):
        auto_attack(network, images, y, norm="linf", eps=0.1)
