import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from pytorch_ood.metrics import OODMetrics
from sklearn.metrics import roc_auc_score

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, load_splits
from timm_jem.evaluation.ood import SCORES, auroc_interval, ood_metrics, ood_scores
from timm_jem.evaluation.ood_section import fitted
from timm_jem.evaluation.report import Measured
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import DEFAULT_DETECTORS
from timm_jem.ood import METHODS, Detector
from timm_jem.pixels import to_pixels

PLAIN = ("energy", "msp", "max_logit", "approximate_mass")
DENSITY, SOFTMAX, LOGIT, MASS = (SCORES[name] for name in PLAIN)


def plain_scores(jem, images, names=PLAIN, **more):
    return ood_scores([Detector(jem, name) for name in names], images, **more)


def by_pairs(inside, outside):
    return ((inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2).item()


def normal(n, mean, std, seed):
    return np.random.default_rng(seed).normal(mean, std, n)


SETS = {
    "plain": (normal(300, 1, 1, 0), normal(200, 0, 2, 1)),
    "ties": (normal(300, 1, 1, 0).round(), normal(200, 0, 2, 1).round()),
    "far from zero": (normal(300, -3000, 0.1, 0), normal(200, -3000.1, 0.1, 1)),
    "two levels": (np.repeat([0.0, 1.0], [100, 200]), np.repeat([0.0, 1.0], [150, 50])),
    "the same everywhere": (np.zeros(300), np.zeros(200)),
}


@pytest.mark.parametrize("name", SETS)
def test_metrics_equal_numpy_and_pytorch_ood(name):
    inside, outside = SETS[name]
    found = ood_metrics(torch.from_numpy(inside), torch.from_numpy(outside))
    assert found["auroc"] == pytest.approx(by_pairs(inside, outside), abs=1e-12)
    theirs = OODMetrics()  # out of distribution: label below 0, positive, higher scores
    scores = torch.from_numpy(-np.concatenate([inside, outside]))
    theirs.update(scores, torch.tensor([0] * len(inside) + [-1] * len(outside)))
    theirs = theirs.compute()
    assert found["auroc"] == pytest.approx(theirs["AUROC"], abs=1e-12)
    assert found["fpr95_out"] == pytest.approx(theirs["FPR95TPR"], abs=1e-12)
    every = np.unique(np.concatenate([inside, outside]))
    accepting = [(outside >= level).mean() for level in every if (inside >= level).mean() >= 0.95]
    rejecting = [(inside <= level).mean() for level in every if (outside <= level).mean() >= 0.95]
    assert found["fpr95_in"] == min(accepting)
    assert found["fpr95_out"] == min(rejecting)
    for metric, positive, negative in (("aupr_in", inside, outside), ("aupr_out", -outside, -inside)):
        # Average precision: Σ over levels of (recall gained) · precision
        expected, recall = 0.0, 0.0
        for level in np.unique(np.concatenate([positive, negative]))[::-1]:
            true, false = (positive >= level).sum(), (negative >= level).sum()
            expected += (true / len(positive) - recall) * true / (true + false)
            recall = true / len(positive)
        assert found[metric] == pytest.approx(expected, abs=1e-12)


def test_the_conventions_of_fpr95_differ():
    inside, outside = SETS["plain"]
    found = ood_metrics(torch.from_numpy(inside), torch.from_numpy(outside))
    assert abs(found["fpr95_in"] - found["fpr95_out"]) > 0.05
    swapped = ood_metrics(torch.from_numpy(-outside), torch.from_numpy(-inside))
    assert (swapped["fpr95_in"], swapped["aupr_in"]) == (found["fpr95_out"], found["aupr_out"])


def test_sets_that_are_apart():
    low, high = torch.arange(50.0), torch.arange(100.0, 200.0)
    assert ood_metrics(high, low) == {"auroc": 1.0, "aupr_out": 1.0, "aupr_in": 1.0, "fpr95_in": 0.0, "fpr95_out": 0.0}
    found = ood_metrics(low, high)
    assert (found["auroc"], found["fpr95_in"], found["fpr95_out"]) == (0.0, 1.0, 1.0)
    assert auroc_interval(high, low, num_resamples=20) == (1.0, 1.0)
    exact = ood_metrics(torch.arange(20.0), torch.tensor([0.5]))  # 19 of 20 are 95 %
    assert exact["fpr95_in"] == 0.0


@pytest.mark.parametrize("function", [ood_metrics, auroc_interval])
def test_bad_scores_are_named(function):
    good = torch.arange(4.0)
    bad = torch.tensor([0.0, math.nan, math.inf])
    for inside, outside, message in (
        (good[:0], good, "no in-distribution scores"),
        (good, good[:0], "no out-of-distribution scores"),
        (bad, good, "2 of 3 in-distribution scores are not finite"),
        (good, bad, "2 of 3 out-of-distribution scores are not finite"),
        (good[None], good, r"in-distribution scores have shape \(1, 4\)"),
        (good, good[0], r"out-of-distribution scores have shape \(\)"),
    ):
        with pytest.raises(InputError, match=f"^(there are )?{message}") as error:
            function(inside, outside)
        assert "\n" not in str(error.value)


def test_the_interval_is_that_of_a_plain_bootstrap():
    inside, outside = (scores[:100] for scores in SETS["ties"])
    low, high = auroc_interval(torch.from_numpy(inside), torch.from_numpy(outside), num_resamples=4000)
    rng = np.random.default_rng(5)
    plain = [by_pairs(rng.choice(inside, 100), rng.choice(outside, 100)) for _ in range(2000)]
    expected = np.quantile(plain, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.01)
    assert low < by_pairs(inside, outside) < high


def test_intervals_hold_what_they_should_and_are_quick():
    # Two normals of distance 1 have the AUROC Φ(1/√2).
    truth = 0.5 * (1 + math.erf(0.5))
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        inside, outside = torch.from_numpy(rng.normal(1, 1, 60)), torch.from_numpy(rng.normal(0, 1, 60))
        low, high = auroc_interval(inside, outside, num_resamples=200, seed=seed)
        held += low <= truth <= high
    assert 87 <= held <= 100
    inside, outside = torch.randn(1000), torch.randn(1000)
    start = time.process_time()
    first = auroc_interval(inside, outside)
    assert time.process_time() - start < 2
    assert auroc_interval(inside, outside) == first
    assert auroc_interval(inside, outside, seed=1) != first
    with pytest.raises(InputError, match="num_resamples"):
        auroc_interval(inside, outside, num_resamples=0)


@pytest.fixture(scope="module")
def scored():
    torch.manual_seed(0)
    data = {"mean": (0.3,), "std": (0.2,)}
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), drop_rate=0.5, norm_layer="batchnorm2d")
    jem = timm_jem.JEM(jem.backbone, data_config={**jem.data_config, **data}).train()
    return jem, load_splits(DataConfig()).test


def test_scores_of_a_model(scored):
    jem, test = scored
    images = test.images[:60]
    before = {name: value.clone() for name, value in jem.state_dict().items()}
    flags = [module.training for module in jem.modules()]
    name, first = next(iter(jem.named_parameters()))
    first.requires_grad_(False)
    random = torch.random.get_rng_state()
    passes = []
    hook = jem.backbone.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    found = plain_scores(jem, images, batch_size=25)
    assert passes == [True] * 3
    cheap = plain_scores(jem, images, PLAIN[:3], batch_size=25)
    assert passes == [True] * 3 + [False] * 3
    hook.remove()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in jem.modules()] == flags
    assert [other for other, p in jem.named_parameters() if not p.requires_grad] == [name]
    first.requires_grad_(True)
    assert all(p.grad is None for p in jem.parameters())
    assert all(torch.equal(value, before[name]) for name, value in jem.state_dict().items())

    assert tuple(found) == (DENSITY, SOFTMAX, LOGIT, MASS)
    assert tuple(cheap) == (DENSITY, SOFTMAX, LOGIT)
    for scores in (*found.values(), *cheap.values()):
        assert (scores.shape, scores.dtype, scores.device.type) == ((60,), torch.float64, "cpu")
    assert all(torch.equal(found[name], cheap[name]) for name in cheap)

    jem.eval()
    u = to_pixels(images).requires_grad_(True)
    energies = jem.pixel_energy(u)
    gradient = torch.autograd.grad(energies.sum(), u)[0]
    logits = jem(jem.normalize(u.detach())).detach()
    jem.train()
    close = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found[DENSITY], -energies.detach(), **close)
    torch.testing.assert_close(found[SOFTMAX], logits.softmax(1).max(1).values, **close)
    torch.testing.assert_close(found[LOGIT], -timm_jem.energy(logits, logits.argmax(1)), **close)
    torch.testing.assert_close(found[MASS], -gradient.square().sum((1, 2, 3)).sqrt(), **close)
    assert found[MASS].max() < 0


def test_scores_do_not_depend_on_batches(scored):
    jem, test = scored
    whole = plain_scores(jem, test.images[:70])
    loader = torch.utils.data.DataLoader(test, batch_size=32, collate_fn=lambda batch: batch)
    for scores in (
        plain_scores(jem, test.images[:70], batch_size=1),
        plain_scores(jem, iter(test.images[:70].split(30))),
        {name: value[:70] for name, value in plain_scores(jem, loader).items()},
    ):
        for name in whole:
            torch.testing.assert_close(scores[name], whole[name], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = plain_scores(jem, test.images[:70])
    assert all(torch.equal(again[name], whole[name]) for name in whole)


class Slope(torch.nn.Module):
    """f(x)[0] = scale · Σx, and f(x)[1] is far below."""

    num_classes = 2

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        first = self.scale * x.sum((1, 2, 3))
        return torch.stack([first, first - 20], 1)


def test_the_gradient_is_that_of_pixels():
    images = torch.randint(256, (5, 3, 2, 2), dtype=torch.uint8)
    for std in (0.5, 0.25):
        config = {"input_size": (3, 2, 2), "mean": (0.5,) * 3, "std": (std,) * 3}
        found = plain_scores(timm_jem.JEM(Slope(3.0 * 2 * std), data_config=config), images)
        assert found[MASS].tolist() == pytest.approx([-3 * math.sqrt(12)] * 5)  # the same function of pixels
        # 1 − e⁻²⁰ is 1 in float32
        assert found[SOFTMAX].max() < 1
        assert found[SOFTMAX].tolist() == pytest.approx([1 / (1 + math.exp(-20))] * 5, abs=1e-13)


def test_what_is_not_finite_is_left_and_refused():
    config = {"input_size": (3, 2, 2), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = plain_scores(timm_jem.JEM(Slope(math.inf), data_config=config), torch.full((4, 3, 2, 2), 255, dtype=torch.uint8))
    assert not found[DENSITY].isfinite().any()
    with pytest.raises(InputError, match="4 of 4 in-distribution"):
        ood_metrics(found[DENSITY], torch.zeros(2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "dtype torch.float32"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"shape \(1, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "at least one"),
        ([], "no images"),
        ([torch.zeros(2, 1, 8, 8)], "dtype torch.float32"),
        (["a.png"], "a str"),
    ],
)
def test_bad_images_are_named(scored, images, message):
    with pytest.raises(InputError, match=message) as error:
        plain_scores(scored[0], images)
    assert "\n" not in str(error.value)
    assert scored[0].training


def test_a_model_of_the_digits_tells_noise_apart(scored):
    """End to end, with a density that is known: pixels of noise are nearer to 0 than a digit's, which are mostly −1."""

    class Edge(torch.nn.Module):
        num_classes = 2

        def forward(self, x):
            return x.abs().mean((1, 2, 3))[:, None].expand(-1, 2)

    jem = timm_jem.JEM(Edge(), data_config={"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)})
    noise = torch.randint(256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inside, outside = (plain_scores(jem, images)[DENSITY] for images in (scored[1].images, noise))
    found = ood_metrics(inside, outside)
    y = np.repeat([1, 0], [len(inside), 100])
    assert found["auroc"] == roc_auc_score(y, torch.cat([inside, outside]).numpy()) > 0.95
    low, high = auroc_interval(inside, outside)
    assert 0.9 < low <= found["auroc"] <= high <= 1


class Blind(torch.nn.Module):
    """A classifier that shows no features."""

    num_classes = 4

    def forward(self, x):
        return x.flatten(1)[:, :4]


def asked_for(jem, names, val_y=None):
    images = torch.randint(256, (24, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    subject = SimpleNamespace(model=jem, val=images, val_y=torch.arange(24) % 4 if val_y is None else val_y)
    section = Section(Measured("Out-of-distribution detection"), Path())
    return fitted(subject, names, 16, section), section.found.warnings


def test_detectors_that_a_model_or_its_labels_refuse_are_left_out_with_the_reason():
    jem = timm_jem.wrap(timm.create_model("test_resnet", num_classes=4, in_chans=1), input_size=(1, 32, 32))
    detectors, warnings = asked_for(jem, METHODS)
    assert ([one.name for one in detectors], warnings) == (list(METHODS), [])
    assert len(plain_scores(jem, torch.zeros(2, 1, 32, 32, dtype=torch.uint8))) == 4
    detectors, warnings = asked_for(jem, ["mahalanobis", "energy"], torch.full((24,), -1))
    assert [one.name for one in detectors] == ["energy"]
    assert warnings == [
        "There is no feature distance: 0 images with a label are too few for the features of classes: give at least two.",
    ]
    blind = timm_jem.JEM(Blind(), data_config={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)})
    detectors, warnings = asked_for(blind, DEFAULT_DETECTORS)
    assert [one.name for one in detectors] == list(DEFAULT_DETECTORS[:-1])
    assert warnings == ["There is no feature distance: Blind has no forward_features and forward_head: give a timm backbone."]
    with pytest.raises(InputError, match="give --detectors others"):
        asked_for(blind, ["vim"])


def test_every_detector_has_a_name_in_reports():
    assert set(SCORES) == set(METHODS)
    assert len(set(SCORES.values())) == len(SCORES)
