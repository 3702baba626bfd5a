"""Scores of detectors against pytorch-ood's own and against their formulas, in networks of every kind."""

import copy

import numpy as np
import pytest
import torch
from pytorch_ood import detector as theirs
from small_networks import of_few_images, random_network
from torch.nn import functional as F

import timm_jem
from timm_jem import InputError
from timm_jem.modes import frozen
from timm_jem.ood import METHODS, detector
from timm_jem.ood.final_layer import FinalLayer
from timm_jem.ood.from_pytorch_ood import nth_neighbour
from timm_jem.ood.scores import gradnorm, max_logit, msp, typicality
from timm_jem.ood.views import view

LAYER = {name for name, method in METHODS.items() if method.layer}
# Kinds of networks, with what their heads refuse: the two heads of a distilled one read different features, and so do those
# of the branches of CrossViT.
FAST = {"test_resnet": set(), "test_vit": set(), "test_convnext": set(), "wrn_10_1": set()}
SLOW = {
    "test_efficientnet": set(),
    "test_nfnet": set(),
    "test_mambaout": set(),
    "test_coatnet": set(),
    "gmlp_ti16_224": set(),
    "levit_128s": set(),
    "repvit_m1": set(),
    "mobilevit_xxs": set(),
    "deit_tiny_distilled_patch16_224": LAYER,
    "crossvit_tiny_240": LAYER,
}
SLOW_SIZES = {
    "gmlp_ti16_224": (224, 12),
    "levit_128s": (224, 12),
    "deit_tiny_distilled_patch16_224": (224, 12),
    "crossvit_tiny_240": (240, 12),
}


@pytest.fixture(scope="module")
def small():
    return random_network("test_resnet", n=80)


def by_pytorch_ood(name, seen, weight, bias):
    """The library's own score of features and logits, fitted to the same."""
    z, zeros = seen.features, torch.zeros(len(seen.features), dtype=torch.long)
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    if name == "react":
        return theirs.ReAct(None, head).fit_feature_maps(z, zeros).predict_feature_maps(z)
    if name == "ash":
        return theirs.ASH(None, lambda maps: head(maps.flatten(1))).predict_feature_maps(z[:, :, None, None])
    if name == "dice":
        return theirs.DICE(None, weight, bias, p=0.9).fit_features(z, zeros).predict_features(z)
    if name == "vim":
        mean, shift = weight.mean(0), bias.mean()  # which α and the origin don't depend on here
        vim = theirs.ViM(None, 4, weight - mean, bias - shift).fit_features(z, zeros)
        return vim.predict_features(z) - (z @ mean + shift)
    if name == "knn":
        return theirs.KNN(None, k=5).fit_features(z, zeros).predict_features(z)
    if name == "gradnorm":
        return theirs.GradNorm(head, param_filter=lambda parameter: parameter == "weight").predict(z)
    of_logits = {"msp": theirs.MaxSoftmax, "max_logit": theirs.MaxLogit, "energy": theirs.EnergyBased}
    return of_logits[name](None).predict_logits(seen.logits)


def check_family(name, refused):
    jem, x, y = random_network(
        name, 224 if "224" in name else 240 if "240" in name else 64 if name in SLOW else 32, 12 if name in SLOW else 60
    )
    before = {key: value.clone() for key, value in jem.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in jem.modules()]
    seen = view(jem, x, features=True)
    assert seen.features.shape == (len(x), jem.backbone.head_hidden_size)
    with torch.no_grad(), frozen(jem):
        assert torch.equal(seen.logits, jem(x))
    for method in METHODS:
        if method in refused:
            with pytest.raises(InputError, match=r"use a detector that shapes neither") as error:
                of_few_images(jem, method).fit(x, y, accept=None).score(x)
            assert "\n" not in str(error.value)
            continue
        scores = of_few_images(jem, method).fit(x, y, accept=None).score(x)
        assert (scores.shape, scores.dtype) == ((len(x),), torch.float64)
        assert scores.isfinite().all()
        if method in ("mahalanobis", "approximate_mass", "typicality"):
            continue  # ours, below
        weight, bias = (torch.zeros(2, 2), torch.zeros(2)) if refused else FinalLayer(jem).matrix(seen.features.shape[1])
        expected = by_pytorch_ood(method, seen, weight, bias)
        torch.testing.assert_close(scores, expected.double(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in jem.state_dict().items())
    assert flags == [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in jem.modules()]
    assert all(p.grad is None for p in jem.parameters())


@pytest.mark.parametrize("name", FAST)
def test_families(name):
    check_family(name, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families(name):
    check_family(name, SLOW[name])


def test_react_ash_and_dice_are_their_formulas(small):
    jem, x, _ = small
    seen = view(jem, x, features=True)
    z, linear = seen.features.double(), jem.backbone.get_classifier()
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()

    def energies(features, weight=weight):
        return -(features @ weight.T + bias).logsumexp(1)

    def check(name, expected, **options):
        found = detector(jem, name, **options).fit(x, accept=None).score(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    threshold = np.quantile(z.numpy(), 0.8)
    check("react", energies(z.clamp(max=threshold)), percentile=0.8)
    kept = z >= z.sort(1, descending=True).values[:, z.shape[1] - round(0.7 * z.shape[1]) - 1, None]
    pruned = z * kept
    check("ash", energies(pruned), variant="ash-p", percentile=0.7)
    check("ash", energies(pruned * (z.sum(1) / pruned.sum(1)).exp()[:, None]), variant="ash-s", percentile=0.7)
    check("ash", energies(kept * (z.sum(1) / kept.sum(1))[:, None]), variant="ash-b", percentile=0.7)
    contribution = weight * z.mean(0)
    check("dice", energies(z, weight * (contribution > contribution.quantile(0.6))), p=0.6)


def test_vim_and_knn_are_their_formulas(small):
    jem, x, _ = small
    seen = view(jem, x, features=True)
    z, linear = seen.features.double(), jem.backbone.get_classifier()
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    centred = z + torch.linalg.pinv(weight - weight.mean(0)) @ (bias - bias.mean())
    basis = torch.linalg.svd(centred, full_matrices=True).Vh[3:]  # beyond three principal components
    residual = (centred @ basis.T).norm(dim=1)
    logits = z @ weight.T + bias
    expected = residual * (logits.amax(1) - logits.mean(1)).mean() / residual.mean() - logits.logsumexp(1)
    found = detector(jem, "vim", d=3).fit(x, accept=None).score(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    distances = torch.cdist(F.normalize(z), F.normalize(z)).sort(1).values
    found = detector(jem, "knn", k=7).fit(x, accept=None).score(x)
    torch.testing.assert_close(found, distances[:, 6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [-20.0, 5.0])
def test_vim_is_the_papers_where_logits_are_centred_and_the_same_wherever_they_are(small, shift):
    """A constant added to all logits changes no probability, and no difference of energies."""
    jem, x, _ = small
    moved = copy.deepcopy(jem)
    with torch.no_grad():
        for parameter in (head := moved.backbone.get_classifier()).parameters():
            parameter -= parameter.mean(0)
    seen = view(moved, x, features=True)
    papers = theirs.ViM(None, 4, head.weight.detach(), head.bias.detach())
    papers.fit_features(seen.features, torch.zeros(len(x), dtype=torch.long))
    centred = detector(moved, "vim", d=4).fit(x, accept=None)
    torch.testing.assert_close(centred.score(x), papers.predict_features(seen.features).double(), rtol=1e-3, atol=1e-3)
    assert centred.state["alpha"] > 0
    with torch.no_grad():
        head.bias += shift
    torch.testing.assert_close(
        detector(moved, "vim", d=4).fit(x, accept=None).score(x), centred.score(x) - shift, rtol=1e-3, atol=1e-3
    )


def test_neighbours_are_one_for_every_thousand_images():
    for images, k in ((5, 1), (999, 1), (2000, 2), (50_000, 50)):
        assert nth_neighbour(images, None) == k
    assert nth_neighbour(50, 7) == 7


def test_mahalanobis_is_the_librarys_where_there_is_an_inverse():
    """The library's covariance is a sum over images, and not shrunk towards a multiple of the identity."""
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(4000, 6, generator=generator) * torch.arange(1, 7), torch.arange(4000) % 3
    z = z + y[:, None]
    expected = theirs.Mahalanobis(None).fit_features(z, y).predict_features(z)
    found = timm_jem.ood.ClassFeatures.fit(z, y).distance(z)
    torch.testing.assert_close(found, 2 * 4000 * expected.double(), rtol=0.05, atol=0.05)


def test_scores_of_logits_are_their_formulas():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    p = torch.tensor([[1.0, 3.0, 2.0]]).exp() / sum(np.exp([1, 3, 2]))
    torch.testing.assert_close(msp(logits), -torch.tensor([p[0, 1], 1 / 3]).double())
    assert max_logit(logits).tolist() == [-3, 0]
    assert msp(torch.tensor([[20.0, 0.0], [21.0, 0.0]])).unique().numel() == 2  # in float32 both are −1
    features = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    expected = -3 * (p[0] - 1 / 3).abs().sum().double()
    torch.testing.assert_close(gradnorm(logits, features), torch.stack([expected, 0 * expected]))


def test_gradnorm_is_the_norm_of_the_gradient(small):
    jem, x, _ = small
    found = detector(jem, "gradnorm").score(x[:5])
    jem.eval()
    weight = jem.backbone.get_classifier().weight
    for score, image in zip(found, x, strict=False):
        uniform = -jem(image[None]).log_softmax(1).mean()  # cross-entropy to it, a constant away from the divergence
        assert -torch.autograd.grad(uniform, weight)[0].abs().sum().item() == pytest.approx(score.item(), rel=1e-4)
    jem.train()


def test_typicality_is_a_distance_on_both_sides():
    reference = torch.tensor([3001.0, 2999.0])
    assert typicality(torch.tensor([3000.0, 2990.0, 3010.5]), reference).tolist() == [0.0, 10.0, 10.5]
    assert typicality(torch.tensor([0.0]), reference).dtype == torch.float64
    assert typicality(torch.tensor([1.0, torch.nan]), reference).isnan().tolist() == [False, True]
    for bad in (reference[:0], torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), reference[None], [1.0]):
        with pytest.raises(InputError, match="held-out"):
            typicality(torch.zeros(3), bad)
    with pytest.raises(InputError, match="one energy per image"):
        typicality(torch.zeros(3, 1), reference)


def test_energy_is_the_models_own(small):
    jem, x, _ = small
    jem.eval()
    torch.testing.assert_close(detector(jem, "energy").score(x), jem.energy(x).detach().double(), rtol=1e-5, atol=1e-5)
    slope = jem.score(x) / (2 * jem.std)  # by the chain rule, with respect to pixels
    found = detector(jem, "approximate_mass").score(x)
    torch.testing.assert_close(found, slope.flatten(1).norm(dim=1).double(), rtol=1e-4, atol=1e-6)
    jem.train()
