"""What is kept of held-out images: temperature, quantiles of energies, threshold."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_jem
from timm_jem import InputError, Reference
from timm_jem.evaluation.calibration import fit_temperature
from timm_jem.evaluation.ood import ood_metrics


class Well(nn.Module):
    """E(x) = mean of x, up to log 2: two equal logits."""

    num_classes = 2

    def forward(self, x):
        return -x.flatten(1).mean(1, keepdim=True).expand(-1, 2)


def well() -> timm_jem.JEM:
    return timm_jem.JEM(Well(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)})


def levels(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


@pytest.fixture(scope="module")
def jem():
    torch.manual_seed(0)
    return timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8), class_names=["a", "b", "c"]).eval()


X = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


def test_quantiles_and_threshold_of_known_energies():
    found = well().fit_reference(levels(torch.randperm(1001) / 1000))
    energies = np.float32(np.arange(1001) / 1000) - np.float32(math.log(2))
    np.testing.assert_allclose(found.quantiles, energies[::10], atol=1e-6)
    assert found.threshold == pytest.approx(0.95 - math.log(2), abs=1e-6)
    assert (found.temperature, found.accept, found.n) == (None, 0.95, 1001)
    asked = torch.tensor([-9.0, 0.25 - math.log(2), 0.9975 - math.log(2), 9.0])
    assert found.percentiles(asked) == pytest.approx([0, 25, 99.75, 100], abs=0.01)


@pytest.mark.parametrize("n", [50, 100, 400])
def test_a_quantile_is_the_least_energy_that_so_many_percent_have_at_most(n):
    found = well().fit_reference(levels(torch.arange(n) / n))
    counts = np.maximum([-(-n * level // 100) for level in range(101)], 1)
    np.testing.assert_allclose(found.quantiles, (counts - 1) / n - math.log(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 100, 137])
@pytest.mark.parametrize("accept", [0.95, 0.07, 0.57, 1.0, 1e-9])
def test_the_threshold_accepts_the_share_and_hardly_more(n, accept):
    energies = torch.randn(n, generator=torch.Generator().manual_seed(n))
    found = well().fit_reference(levels(energies), accept=accept)
    accepted = int((energies - math.log(2) <= found.threshold + 1e-6).sum())
    assert accepted / n >= accept
    assert accepted == 1 or (accepted - 1) / n < accept


def test_the_threshold_is_that_of_fpr95():
    generator = torch.Generator().manual_seed(3)
    inside, outside = torch.randn(333, generator=generator), torch.randn(200, generator=generator) + 1
    jem = well()
    found = jem.fit_reference(levels(inside))
    energies = jem.energy(levels(outside))
    share = (energies <= found.threshold).double().mean().item()
    assert share == ood_metrics(-jem.energy(levels(inside)), -energies)["fpr95_in"]
    assert [r.outlier for r in jem.predict(levels(outside))] == (energies > found.threshold).tolist()


def test_energies_that_are_all_alike():
    found = well().fit_reference(levels([0.5] * 30))
    assert found.percentiles(torch.tensor([found.threshold - 1, found.threshold, found.threshold + 1])) == [0, 100, 100]


def test_energies_as_the_model_gives_them(jem):
    energies = jem.energy(X)
    assert jem.fit_reference(X, Y).percentiles(energies) == [r.percentile for r in jem.predict(X)]


def test_energies_at_which_chains_rest():
    """Of two logits that are alike E(x, y) is the mean of x, and E(x) log 2 less."""
    x = torch.cat([torch.linspace(-0.5, -0.1, 101), torch.linspace(0.1, 0.9, 101)])
    found = well().fit_reference(levels(x), torch.arange(202) // 101)
    assert found.medians == pytest.approx((-0.3, 0.5), abs=1e-6)
    assert found.spread[50] == 0
    assert (found.spread[0], found.spread[100]) == pytest.approx((-0.4, 0.4), abs=1e-6)
    assert found.at(0.5, torch.tensor([1, 0, 1])).tolist() == pytest.approx([0.5, -0.3, 0.5], abs=1e-6)
    assert found.at(0.0, torch.tensor([1])).tolist() == pytest.approx([0.1], abs=1e-6)
    assert found.at(0.0).item() == pytest.approx(-0.5 - math.log(2), abs=1e-6)
    alone = well().fit_reference(levels([0.1, 0.2, 0.6]), torch.ones(3, dtype=torch.int64))
    assert alone.medians == pytest.approx((0.2, 0.2))  # the class without images has that of all
    assert Reference.read(GOOD).medians is None  # as an older version wrote it
    for reference, y in ((Reference.read(GOOD), 0), (found, 2)):
        with pytest.raises(InputError, match="call fit_reference"):
            reference.at(0.5, torch.tensor([y]))
    with pytest.raises(InputError, match="label -1: give 0 to 1"):
        found.at(0.5, torch.tensor([-1, 1]))


def mostly_right(jem):
    """Labels of ``X`` that tell a temperature."""
    y = jem(X).argmax(1)
    return torch.where(torch.arange(50) % 5 == 0, (y + 1) % 3, y)


def test_temperature_is_that_of_the_evaluation(jem):
    y = mostly_right(jem)
    found = jem.fit_reference(X, y)
    with torch.no_grad():
        logits = jem(X)
    assert found.temperature == fit_temperature(logits, y)
    assert found is jem.reference
    r = jem.predict(X[0])
    assert r.temperature == found.temperature
    assert r.p == pytest.approx((logits[0].double() / found.temperature).softmax(0).max().item())


@pytest.mark.parametrize("right", [True, False])
def test_images_that_can_not_tell_a_temperature_leave_p_as_it_is(jem, tmp_path, right):
    with torch.no_grad():
        logits = jem(X[:4])
    found = jem.fit_reference(X[:4], logits.argmax(1) if right else logits.argmin(1))
    assert (found.temperature, found.uncalibrated) == (None, "4 held-out images can't tell a temperature")
    assert found.medians is not None
    assert jem.predict(X[0]).p == pytest.approx(logits[0].double().softmax(0).max().item())
    jem.save_pretrained(tmp_path)
    assert timm_jem.from_pretrained(tmp_path).reference == found
    assert jem.fit_reference(X, mostly_right(jem)).uncalibrated is None
    assert jem.fit_reference(X).uncalibrated == "the held-out images had no labels"


def test_batches_give_what_a_tensor_gives(jem):
    whole = jem.fit_reference(X, Y, batch_size=16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)
    assert jem.fit_reference(loader) == whole
    assert jem.fit_reference((x, y.tolist()) for x, y in zip(X.split(16), Y.split(16), strict=True)) == whole
    unlabelled = jem.fit_reference(iter(X.split(16)))
    assert unlabelled == jem.fit_reference(X, batch_size=16)
    assert (unlabelled.temperature, unlabelled.quantiles) == (None, whole.quantiles)


def test_the_model_is_left_as_it_was(jem):
    model = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8), norm_layer="batchnorm2d").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.fit_reference(X, Y)
    model.predict(X)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_saved_and_read_back_and_plain_timm_reads_the_folder(jem, tmp_path):
    jem.fit_reference(X, Y)
    jem.save_pretrained(tmp_path)
    again = timm_jem.from_pretrained(tmp_path)
    assert again.reference == jem.reference
    assert again.predict(X[:3]) == jem.predict(X[:3])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(X), jem(X))
    jem.reference = None
    jem.save_pretrained(tmp_path)
    assert "reference" not in json.loads((tmp_path / "config.json").read_text())["timm_jem"]
    assert timm_jem.from_pretrained(tmp_path).reference is None


def test_that_of_another_head_is_refused(tmp_path):
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8)).eval()
    jem.fit_reference(X, Y)
    jem.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["timm_jem"]["reference"]["medians"].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    jem.backbone.reset_classifier(10)
    for call, message in (
        (lambda: jem.predict(X[:1]), "of 3 classes and this model has 10: call fit_reference"),
        (lambda: jem.save_pretrained(tmp_path), "of 3 classes and this model has 10"),
        (lambda: jem.sample(1, sgld_config=timm_jem.SGLDConfig(rest=0.5)), "of 3 classes and this model has 10"),
        (lambda: timm_jem.from_pretrained(tmp_path), "of 2 classes and this model has 3"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    jem.fit_reference(X, Y)
    assert jem.predict(X[:1])[0].percentile is not None


GOOD = {"temperature": 1.5, "quantiles": [float(i) for i in range(101)], "threshold": 95.0, "accept": 0.95, "n": 200}
HOSTILE = [
    [],
    "x",
    7,
    {},
    {**GOOD, "more": 1},
    {key: value for key, value in GOOD.items() if key != "n"},
    {**GOOD, "temperature": "1"},
    {**GOOD, "temperature": 0},
    {**GOOD, "temperature": -1.0},
    {**GOOD, "temperature": 1e300},
    {**GOOD, "temperature": math.nan},
    {**GOOD, "temperature": True},
    {**GOOD, "temperature": [1.0]},
    {**GOOD, "quantiles": []},
    {**GOOD, "quantiles": [0.0] * 100},
    {**GOOD, "quantiles": [0.0] * 10**6},
    {**GOOD, "quantiles": GOOD["quantiles"][::-1]},
    {**GOOD, "quantiles": [str(i) for i in range(101)]},
    {**GOOD, "quantiles": [math.nan] * 101},
    {**GOOD, "quantiles": [-math.inf, *GOOD["quantiles"][1:]]},
    {**GOOD, "quantiles": [*GOOD["quantiles"][:-1], math.inf]},
    {**GOOD, "quantiles": [*GOOD["quantiles"][:-1], 10**400]},
    {**GOOD, "quantiles": dict.fromkeys(map(str, range(101)), 0.0)},
    {**GOOD, "quantiles": "0" * 101},
    {**GOOD, "quantiles": None},
    {**GOOD, "threshold": None},
    {**GOOD, "threshold": 101.0},
    {**GOOD, "threshold": -0.1},
    {**GOOD, "threshold": math.nan},
    {**GOOD, "accept": 0},
    {**GOOD, "accept": 1.5},
    {**GOOD, "accept": "95 %"},
    {**GOOD, "n": 0},
    {**GOOD, "n": 1.5},
    {**GOOD, "n": 10**30},
    {**GOOD, "n": None},
    {**GOOD, "medians": [0.0]},
    {**GOOD, "spread": GOOD["quantiles"]},
    {**GOOD, "spread": GOOD["quantiles"], "medians": "0"},
    {**GOOD, "spread": GOOD["quantiles"], "medians": [math.nan]},
    {**GOOD, "spread": GOOD["quantiles"], "medians": [10**400]},
    {**GOOD, "spread": GOOD["quantiles"], "medians": ["0"]},
    {**GOOD, "spread": GOOD["quantiles"][1:], "medians": [0.0]},
    {**GOOD, "spread": GOOD["quantiles"][::-1], "medians": [0.0]},
    {**GOOD, "spread": [math.inf] * 101, "medians": [0.0]},
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_a_broken_one_is_one_line(data):
    with pytest.raises(InputError) as error:
        Reference.read(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_folder_with_a_broken_one_is_refused_by_name(jem, tmp_path):
    jem.reference = Reference.read(GOOD)
    jem.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["timm_jem"]["reference"] == {**GOOD, "medians": None, "spread": None}
    config["timm_jem"]["reference"]["threshold"] = 1e99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"^{tmp_path}: the reference in config\.json is broken \(.*1e\+99.*fit_reference"):
        timm_jem.from_pretrained(tmp_path)
    config["timm_jem"]["reference"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert timm_jem.from_pretrained(tmp_path).reference is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:0],), "no held-out images"),
        (([],), "no held-out images"),
        ((None,), "x is a NoneType"),
        (("photos",), "x is a str"),
        (({"x": X},), "x is a dict"),
        ((X.numpy(),), "x is a ndarray"),
        ((["photo.jpg"],), "a batch of images is a str"),
        (([()],), "a batch of images is a tuple"),
        (([(X, Y, Y)],), "a batch of images is a tuple"),
        ((torch.zeros(4, 1, 8, 8, dtype=torch.uint8),), "dtype torch.uint8"),
        ((X.abs() * 255 + 900,), "in pixels, whose range"),
        ((X * math.nan,), "NaN"),
        ((X[0],), "give model input of shape"),
        ((torch.tensor(1.0),), "give model input of shape"),
        ((X.double(),), "dtype torch.float64"),
        ((X, Y[:-1]), r"y has shape \(49,\)"),
        ((X, Y + 1), "the label 3"),
        ((X, Y - 1), "the label -1"),
        ((X, Y.float()), "integer class labels"),
        ((X, "cat"), "holds no labels"),
        ((X, 1), r"y has shape \(\)"),
        (([X], Y), "let each batch be"),
        (([(X, Y), X],), "some have none"),
        (([(X, Y[:3])],), "give one label per image"),
    ],
)
def test_what_can_not_be_learned_from_is_one_line_and_changes_nothing(jem, arguments, message):
    jem.reference = before = Reference.read(GOOD)
    with pytest.raises(InputError, match=message) as error:
        jem.fit_reference(*arguments)
    assert "\n" not in str(error.value)
    assert jem.reference is before


def test_labels_are_looked_at_before_the_network_runs():
    jem, asked = well(), []
    jem.forward = lambda x: asked.append(x)
    with pytest.raises(InputError, match="y holds the label 2"):
        jem.fit_reference(levels([0.0] * 50), torch.arange(50) // 49 * 2, batch_size=10)
    assert not asked


@pytest.mark.parametrize("options", [{"accept": 0}, {"accept": 95}, {"accept": "x"}, {"batch_size": 0}, {"batch_size": 1.5}])
def test_settings_that_are_none(jem, options):
    with pytest.raises(InputError, match=next(iter(options))):
        jem.fit_reference(X, **options)


def test_energies_that_are_not_finite_and_what_is_no_reference():
    jem = well()
    jem.forward = lambda x: torch.full((len(x), 2), math.nan)
    with pytest.raises(InputError, match="energies of 5 of 5 held-out images are not finite"):
        jem.fit_reference(levels([0.0] * 5))
    jem.reference = "95 %"
    with pytest.raises(InputError, match="reference is a str"):
        jem.predict(levels([0.0]))
