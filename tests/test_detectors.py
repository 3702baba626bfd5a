import copy
import sys

import pytest
import timm
import torch
from matplotlib.figure import Figure
from pytorch_ood.metrics import OODMetrics
from sklearn.metrics import RocCurveDisplay, get_scorer, roc_auc_score
from small_networks import of_few_images, random_network

import timm_jem
from timm_jem import InputError
from timm_jem.ood import METHODS, Detector, detector, score_all, survey, views
from timm_jem.ood.views import view


@pytest.fixture(scope="module")
def small():
    return random_network("test_resnet", n=80)


@pytest.mark.parametrize("name", METHODS)
def test_a_threshold_accepts_its_share(small, name):
    jem, x, y = small
    d = of_few_images(jem, name)
    with pytest.raises(InputError, match="has no threshold: fit it first"):
        d.predict(x)
    assert d.fit(x, y, accept=0.75) is d
    outliers = d.predict(x)
    assert (outliers.shape, outliers.dtype) == ((80,), torch.bool)
    assert torch.equal(outliers, d.score(x) > d.threshold)
    assert torch.equal(d(x), d.score(x))
    if not d.learns:
        assert outliers.sum() == 20
    other = torch.randn(40, *x.shape[1:])
    d.fit(x, y, held_out=other, accept=0.75)
    assert d.predict(other).sum() == 10
    assert d.fit(x, y, accept=None).threshold is None


def test_the_threshold_is_of_images_that_the_method_did_not_see(small):
    """Of those that it was fitted to a nearest neighbour is each image itself, and a threshold would accept nothing else."""
    jem, *_ = small
    x = torch.randn(500, 3, 32, 32)
    d = detector(jem, "knn", k=1).fit(x, accept=0.9)
    fresh = torch.randn(500, 3, 32, 32)
    assert d.predict(fresh).double().mean() == pytest.approx(0.1, abs=0.07)
    assert d.predict(x).double().mean() < 0.05
    assert len(d.state["features"]) == 400


def test_thresholds_of_ties_and_of_what_is_not_finite(small, monkeypatch):
    jem, x, _ = small
    d = detector(jem, "energy")
    scores = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    for accept, threshold in ((0.1, 1), (0.3, 2), (0.55, 4), (0.7, 5), (0.95, 8), (1.0, 8)):
        monkeypatch.setattr(Detector, "score", lambda self, x, batch_size=256: scores)
        assert d.fit(x, accept=accept).threshold == threshold
        assert (~d.predict(x)).double().mean() >= accept
    monkeypatch.setattr(Detector, "score", lambda self, x, batch_size=256: torch.tensor([1.0, torch.nan, torch.inf]))
    assert d.predict(x).tolist() == [False, True, True]
    with pytest.raises(InputError, match="2 of 3 scores of held-out images are not finite"):
        d.fit(x)
    assert d.threshold == 8


@pytest.mark.parametrize("name", ["msp", "knn", "mahalanobis", "typicality"])
def test_batches_are_as_good_as_a_tensor(small, name):
    jem, x, y = small
    whole = of_few_images(jem, name).fit(x, y)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=33)
    for images, labels in ((loader, None), (iter(zip(x.split(7), y.split(7), strict=True)), None), (x, y.tolist())):
        d = of_few_images(jem, name).fit(images, labels, batch_size=21)
        assert d.threshold == pytest.approx(whole.threshold, rel=1e-4)
    for images in (loader, (part for part in x.split(9)), [[part] for part in x.split(50)]):
        torch.testing.assert_close(whole.score(images), whole.score(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.score(x, batch_size=1), whole.score(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["energy", "knn"])
def test_labels_that_a_method_does_not_read_may_be_another_data_sets(small, name):
    jem, x, _ = small
    plain = of_few_images(jem, name).fit(x)
    for y in (torch.arange(80) + 100, torch.rand(80), torch.rand(80, 40), ["cat"] * 80):
        d = of_few_images(jem, name).fit([(x, y)])
        assert d.threshold == pytest.approx(plain.threshold, rel=1e-6)
        assert torch.equal(d.score([(x, y)]), plain.score(x))


def test_dice_is_fitted_whatever_the_default_dtype_is(small):
    jem, x, _ = small
    expected = of_few_images(jem, "dice").fit(x).score(x)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(of_few_images(jem, "dice").fit(x).score(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_memory_does_not_grow_with_the_images(small, monkeypatch):
    jem, x, y = small
    width = jem.backbone.head_hidden_size
    monkeypatch.setattr(views, "MOST_KEPT", 30 * (width + 1))
    made_of, before = [], views._subset
    monkeypatch.setattr(views, "_subset", lambda kept, most: made_of.append(sum(len(r[0]) for r in kept)) or before(kept, most))
    seen = survey(jem, ((part, labels) for part, labels in zip(x.split(8), y.split(8), strict=True)))
    assert (len(seen), seen.view.features.shape, len(seen.y)) == (30, (30, width), 30)
    assert max(made_of) <= 1.25 * 30 + 8
    whole = view(jem, x, features=True).features
    rows = [int((whole - row).abs().amax(1).argmin()) for row in seen.view.features]
    torch.testing.assert_close(whole[rows], seen.view.features, rtol=1e-4, atol=1e-5)
    assert len(set(rows)) == 30
    assert rows == sorted(rows)
    assert max(rows) > 50  # a subset of all, not the first
    assert torch.equal(y[rows], seen.y)


def test_several_detectors_look_at_each_image_once(small):
    jem, x, y = small
    seen = survey(jem, x, y)
    detectors = [of_few_images(jem, name).fit_survey(seen) for name in METHODS]
    passes = []
    hook = jem.backbone.conv1.register_forward_hook(lambda *_: passes.append(1))
    together = score_all(detectors, x, batch_size=40)
    hook.remove()
    assert len(passes) == 2
    for one, scores in zip(detectors, together, strict=True):
        torch.testing.assert_close(one.score(x), scores, rtol=1e-4, atol=1e-4)
    other = timm_jem.create_model("test_resnet", num_classes=2, input_size=(3, 32, 32))
    for bad in ([], [detector(jem, "msp"), detector(other, "msp")]):
        with pytest.raises(InputError, match="of one model"):
            score_all(bad, x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_modes_of_autograd_change_nothing(small, context):
    jem, x, y = small

    def scores():
        """Of inputs that are made here."""
        seen = survey(jem, x.clone(), y.clone())
        detectors = [of_few_images(jem, name).fit_survey(seen) for name in METHODS]
        return detectors, score_all(detectors, x.clone())

    _, expected = scores()
    with context():
        detectors, found = scores()
    for one, scored, value in zip(detectors, found, expected, strict=True):
        assert torch.equal(scored, value)
        assert torch.equal(one.score(x), value)
        assert not value.is_inference()


def test_what_is_fitted_under_autocast_is_what_is_fitted_without(small):
    jem, x, y = small
    seen, names = survey(jem, x, y), [name for name, method in METHODS.items() if method.fit]
    plain = [of_few_images(jem, name).fit_survey(seen) for name in names]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [of_few_images(jem, name).fit_survey(seen) for name in names]
    scores = score_all([*plain, *mixed], x)
    for name, expected, found in zip(names, scores, scores[len(names) :], strict=False):
        assert torch.equal(found, expected), name


def test_half_precision(small):
    jem, x, y = small
    seen = survey(jem, x, y)
    plain = [of_few_images(jem, name).fit_survey(seen) for name in METHODS]
    expected = score_all(plain, x)
    # The network may be under autocast; what is made of its features is not.
    with torch.autocast("cpu", torch.bfloat16):
        mixed = score_all(plain, x)
    jem, x, y = random_network("test_resnet", n=80)
    half, x = jem.to(torch.bfloat16), x.bfloat16()
    seen = survey(half, x, y)
    found = score_all(detectors := [of_few_images(half, name).fit_survey(seen) for name in METHODS], x)
    for name, *scores in zip(METHODS, mixed, found, expected, strict=True):
        assert torch.corrcoef(torch.stack(scores))[2].min() > 0.8, name
    with pytest.raises(InputError, match="dtype"):
        detectors[0].score(x.float())


def test_scikit_learn_and_pytorch_ood_take_detectors_and_scores(small):
    jem, x, _ = small
    d = detector(jem, "energy").fit(x)
    far = torch.cat([x, 5 * torch.randn(40, *x.shape[1:])])
    outlier = torch.tensor([False] * 80 + [True] * 40)
    auroc = roc_auc_score(outlier, d.score(far))
    assert get_scorer("roc_auc")(d, far, outlier.numpy()) == pytest.approx(auroc)
    assert get_scorer("accuracy")(d, far, outlier.numpy()) == (d.predict(far) == outlier).double().mean()
    pytest.importorskip("matplotlib")
    axes = Figure().subplots()  # pyplot would keep a figure of its own
    assert RocCurveDisplay.from_estimator(d, far, outlier.numpy(), ax=axes).roc_auc == pytest.approx(auroc)
    metrics = OODMetrics()
    metrics.update(d(far), -outlier.long())
    assert metrics.compute()["AUROC"] == pytest.approx(auroc)


def test_without_pytorch_ood_the_others_work(small, monkeypatch):
    jem, x, y = small
    for module in [module for module in sys.modules if module.split(".")[0] == "pytorch_ood"]:
        monkeypatch.setitem(sys.modules, module, None)
    for name, method in METHODS.items():
        if method.library:
            with pytest.raises(InputError, match=rf"{name} needs pytorch-ood: pip install 'timm_jem\[ood\]'") as error:
                detector(jem, name)
            assert "\n" not in str(error.value)
        else:
            assert detector(jem, name).fit(x, y).predict(x).shape == (80,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda jem, x, y: detector(jem, "enrgy"), "give one of msp, max_logit"),
        (lambda jem, x, y: detector(jem, None), "give one of"),
        (lambda jem, x, y: detector(jem, ["msp"]), "give one of"),
        (lambda jem, x, y: detector(jem.backbone, "msp"), r"give timm_jem.wrap\(model\)"),
        (lambda jem, x, y: detector(jem, "energy", t=2), "'t' is no option of the detector energy: it has none"),
        (lambda jem, x, y: detector(jem, "knn", n=2), "it has k"),
        (lambda jem, x, y: detector(jem, "knn", k=0), "k is 0"),
        (lambda jem, x, y: detector(jem, "react", percentile=None), "percentile is None"),
        (lambda jem, x, y: detector(jem, "react", percentile=90), "percentile is 90"),
        (lambda jem, x, y: detector(jem, "dice", p=1), "p is 1"),
        (lambda jem, x, y: detector(jem, "ash", variant="b"), "give ash-s, ash-p or ash-b"),
        *(
            (
                lambda jem, x, y, v=v: detector(jem, "ash", variant=v, percentile=0.9999).fit(x),
                r"ash none of (\d+) .* give \d+/\1 ",
            )
            for v in ("ash-s", "ash-p", "ash-b")
        ),
        (lambda jem, x, y: detector(jem, "vim", d=10_000).fit(x), "leaves nothing"),
        (lambda jem, x, y: detector(random_network("test_resnet", classes=1)[0], "vim").fit(x), "the model has one"),
        (lambda jem, x, y: detector(jem, "knn", k=50).fit(x[:20]), "50-th nearest of 16 images"),
        (lambda jem, x, y: detector(jem, "knn", k=1).fit(x[:1]), "one image"),
        (lambda jem, x, y: detector(jem, "knn").score(x), "knn isn't fitted"),
        (lambda jem, x, y: detector(jem, "energy").decision_function(x), "no threshold"),
        (lambda jem, x, y: detector(jem, "energy").fit(x, accept=95), "accept is 95"),
        (lambda jem, x, y: detector(jem, "energy").fit(x, accept=0), "accept is 0"),
        (lambda jem, x, y: detector(jem, "energy").fit(x[:0]), "no images"),
        (lambda jem, x, y: detector(jem, "energy").fit([]), "no images"),
        (lambda jem, x, y: detector(jem, "energy").score(x, batch_size=0), "batch_size is 0"),
        (lambda jem, x, y: detector(jem, "energy").score("photo.jpg"), "x is a str"),
        (lambda jem, x, y: detector(jem, "energy").score(["photo.jpg"]), "a batch of images is a str"),
        (lambda jem, x, y: detector(jem, "energy").score(None), "x is a NoneType"),
        (lambda jem, x, y: detector(jem, "energy").score({"image": x}), "x is a dict"),
        (lambda jem, x, y: detector(jem, "energy").score([{"image": x}]), "a batch of images is a dict"),
        (lambda jem, x, y: detector(jem, "energy").score([[]]), "a batch of images is a list"),
        (lambda jem, x, y: detector(jem, "energy").score((x, y)), r"x has shape \(80,\)"),
        (lambda jem, x, y: detector(jem, "energy").score(x.numpy()), "x is a ndarray"),
        (lambda jem, x, y: detector(jem, "energy").score(x[0]), "shape"),
        (lambda jem, x, y: detector(jem, "energy").score(x[:, :1]), "shape"),
        (lambda jem, x, y: detector(jem, "energy").score([x, x[0]]), "shape"),
        (lambda jem, x, y: detector(jem, "energy").score((x * 60).byte()), "dtype"),
        (lambda jem, x, y: detector(jem, "energy").score(x.abs() * 60), "in pixels"),
        (lambda jem, x, y: detector(jem, "energy").score(x * torch.nan), "NaN or infinite"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x), "need labels"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x.split(9)), "need labels"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x, -torch.ones_like(y)), "0 images with a label"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x, y + 9), "y holds the label"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x, y.float()), "integer labels"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x, y[:3]), "one label per image"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x.split(40), y), r"let each batch be \(x, y\)"),
        (lambda jem, x, y: survey(jem, [(x, y), x]), "some batches have labels"),
        (lambda jem, x, y: detector(jem, "vim", d=16).fit(x[:20]), "of 16 images beyond 16"),
        (lambda jem, x, y: detector(jem, "vim").fit(x[:2]), "leaves nothing"),
        (lambda jem, x, y: detector(jem, "mahalanobis").fit(x[:4].repeat(9, 1, 1, 1), y[:4].repeat(9)), "that differ"),
        (lambda jem, x, y: detector(jem, "energy").score(x.to("meta")), "on the meta device"),
        (lambda jem, x, y: detector(copy.deepcopy(jem).to("meta"), "energy").score(x), "on the meta device"),
    ],
)
def test_wrong_input_is_named(small, wrong, message):
    with pytest.raises(InputError, match=message) as error:
        wrong(*small)
    assert "\n" not in str(error.value)
    assert small[0].training


def test_a_fit_that_fails_leaves_the_detector_as_it_was(small):
    jem, x, y = small
    d = detector(jem, "mahalanobis").fit(x, y)
    expected, threshold = d.score(x), d.threshold
    for wrong in (lambda: d.fit(x), lambda: d.fit(x, y, held_out=x[:0]), lambda: d.fit(x * torch.nan, y)):
        with pytest.raises(InputError):
            wrong()
    assert (d.threshold, torch.equal(d.score(x), expected)) == (threshold, True)


class Bare(torch.nn.Module):
    """Logits alone."""

    num_classes = 2

    def forward(self, x):
        return x.flatten(1)[:, :2]


class Bent(torch.nn.Module):
    """Its logits are no linear function of its features."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(12, 2)

    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        return x.flatten(1) if pre_logits else self.head(x.flatten(1).square())

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.head


def test_models_that_are_not_timms():
    config = {"input_size": (3, 2, 2), "mean": (0.5,), "std": (0.5,)}
    x = torch.randn(60, 3, 2, 2)
    bare, bent = (timm_jem.JEM(backbone, data_config=config) for backbone in (Bare(), Bent()))
    for name, method in METHODS.items():
        if method.features:
            with pytest.raises(InputError, match="Bare has no forward_features"):
                detector(bare, name)
        else:
            assert detector(bare, name).fit(x).predict(x).sum() == pytest.approx(3, abs=9)
        if method.layer:
            looked = []
            hook = bent.backbone.head.register_forward_hook(lambda *_, looked=looked: looked.append(1))
            with pytest.raises(InputError, match="the logits of Bent are no linear function"):
                detector(bent, name).fit(x.split(10)).score(x)
            hook.remove()
            assert len(looked) < 4  # at the first batch


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_last_layer_that_can_not_be_copied_is_named():
    jem, x, _ = random_network("test_resnet", n=20)
    torch.nn.utils.weight_norm(jem.backbone.get_classifier())
    jem(x)
    for name in (name for name, method in METHODS.items() if method.layer):
        with pytest.raises(InputError, match=r"of test_resnet can't be copied \(Only Tensors .*\): use a detector") as error:
            detector(jem, name)
        assert "\n" not in str(error.value)
    assert detector(jem, "knn", k=1).fit(x).score(x).isfinite().all()


def test_models_without_weights_that_are_finite_are_refused(small):
    jem, x, y = random_network("test_resnet", n=20)
    torch.nn.init.constant_(jem.backbone.fc.bias, torch.nan)
    for name, message in (("energy", "20 of 20 scores"), ("typicality", "not finite"), ("knn", "not finite")):
        with pytest.raises(InputError, match=message):
            of_few_images(jem, name).fit(x, y)
    assert detector(jem, "energy").score(x).isnan().all()


def test_a_trained_hybrid_is_followed(small):
    """A method that learns nothing reads the last layer anew; what was fitted stays until it is fitted again."""
    jem, x, _ = random_network("test_resnet", n=60)
    ash = detector(jem, "ash")
    before = ash.score(x)
    with torch.no_grad():
        jem.backbone.fc.weight.mul_(2)
    assert not torch.equal(ash.score(x), before)


def test_timm_builds_what_is_wrapped():
    """As a user would: plain timm, wrap, detect."""
    jem = timm_jem.wrap(timm.create_model("test_vit", num_classes=3))
    x = torch.randn(30, *jem.input_size)
    assert timm_jem.ood.detector(jem, "energy").fit(x, accept=0.9).predict(x).sum() == 3
