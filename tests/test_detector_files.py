import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import timm_jem
from timm_jem import InputError
from timm_jem.ood import METHODS, Detector

KEY = "timm_jem_detector"


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32)).eval()
    x, y = torch.randn(70, 3, 32, 32), torch.arange(70) % 4
    return jem, x, {name: Detector(jem, name).fit(x, y, accept=0.8) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_what_was_fitted_is_read_back(fitted, tmp_path, name):
    jem, x, detectors = fitted
    d = detectors[name]
    file = tmp_path / "detector.safetensors"
    d.save(file)
    again = Detector.load(str(file), jem)
    assert (again.name, again.options, again.threshold, again.accept) == (name, d.options, d.threshold, 0.8)
    assert torch.equal(again.score(x), d.score(x))
    assert torch.equal(again.predict(x), d.predict(x))
    assert repr(again) == repr(d)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_numbers_of_numpy_can_be_saved(fitted, tmp_path):
    jem, x, _ = fitted
    for name, options in (("knn", {"k": np.int64(3)}), ("react", {"percentile": np.float32(0.9)})):
        d = Detector(jem, name, **options).fit(x, accept=np.float32(0.8))
        d.save(tmp_path / "detector.safetensors")
        assert Detector.load(tmp_path / "detector.safetensors", jem).options == d.options


@pytest.mark.parametrize("name", METHODS)
def test_a_detector_can_be_pickled(fitted, name):
    _, x, detectors = fitted
    again = pickle.loads(pickle.dumps(detectors[name]))
    assert torch.equal(again.score(x), detectors[name].score(x))
    assert (again.threshold, again.options) == (detectors[name].threshold, detectors[name].options)


def test_others_may_read_a_file_as_any_other(fitted, tmp_path):
    (tmp_path / "any").touch()
    fitted[2]["knn"].save(tmp_path / "knn.safetensors")
    assert (tmp_path / "knn.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_half_precision_is_the_same_model_and_other_weights_are_not(fitted, tmp_path):
    jem, x, detectors = fitted
    file = tmp_path / "knn.safetensors"
    detectors["knn"].save(file)
    half = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32))
    half.load_state_dict(jem.state_dict())
    scores = Detector.load(file, half.to(torch.bfloat16)).score(x.bfloat16())
    assert (scores - detectors["knn"].score(x)).abs().max() < 0.1
    other = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32))
    with pytest.raises(InputError, match="to other weights"):
        Detector.load(file, other)
    for name, size in (("test_resnet", 3), ("test_vit", 4)):
        other = timm_jem.create_model(name, num_classes=size, input_size=(3, 32, 32))
        with pytest.raises(InputError, match="another model"):
            Detector.load(file, other)


@pytest.mark.parametrize("name", ["mahalanobis", "energy"])
def test_a_model_trained_on_is_another_whenever_its_detector_is_saved(tmp_path, name):
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32)).eval()
    before = copy.deepcopy(jem)
    x, y = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
    d = Detector(jem, name).fit(x, y)
    scores = d.score(x)
    with torch.no_grad():
        for parameter in jem.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    for number, one in enumerate((d, pickle.loads(pickle.dumps(d)))):
        one.save(tmp_path / f"{number}.safetensors")
        with pytest.raises(InputError, match="other weights"):
            Detector.load(tmp_path / f"{number}.safetensors", jem)
        again = Detector.load(tmp_path / f"{number}.safetensors", before)
        assert torch.equal(again.score(x), scores)
        again.save(tmp_path / "again.safetensors")
        assert torch.equal(Detector.load(tmp_path / "again.safetensors", before).score(x), scores)


@pytest.mark.parametrize(("layer", "factor"), [("fc", 1.03), ("conv1.0", 2.0)])
def test_a_model_that_little_was_done_to_is_another(fitted, tmp_path, layer, factor):
    """The first layer's weights are nothing to a grey image, which is 0 as model input."""
    jem, file = copy.deepcopy(fitted[0]), tmp_path / "knn.safetensors"
    fitted[2]["knn"].save(file)
    with torch.no_grad():
        jem.backbone.get_submodule(layer).weight.mul_(factor)
    with pytest.raises(InputError, match="to other weights"):
        Detector.load(file, jem)


def test_what_is_not_fitted_is_not_written(fitted, tmp_path):
    jem, x, _ = fitted
    with pytest.raises(InputError, match="nothing to save"):
        Detector(jem, "vim").save(tmp_path / "vim.safetensors")
    assert not list(tmp_path.iterdir())
    Detector(jem, "ash", variant="ash-b").save(tmp_path / "ash.safetensors")
    again = Detector.load(tmp_path / "ash.safetensors", jem)
    assert again.options["variant"] == "ash-b"
    with pytest.raises(InputError, match="no threshold"):
        again.predict(x)


def rewritten(file, tensors=lambda t: t, about=lambda a: a):
    """The file with other tensors or another header."""
    with safe_open(file, framework="pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(opened.metadata()[KEY])
    text = about(header)
    save_file(tensors(state), file, {KEY: text if isinstance(text, str) else json.dumps(text)})


HOSTILE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("{}"),
    "pickle": lambda file: torch.save({"threshold": 1}, file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "missing": lambda file: file.unlink(),
    "another file of tensors": lambda file: save_file({"a": torch.ones(2)}, file),
    "header of no JSON": lambda file: rewritten(file, about=lambda a: "{"),
    "header too deep": lambda file: rewritten(file, about=lambda a: "[" * 50_000),
    "header of a list": lambda file: rewritten(file, about=lambda a: [a]),
    "another version": lambda file: rewritten(file, about=lambda a: {**a, "format_version": 99}),
    "an older version": lambda file: rewritten(file, about=lambda a: {**a, "format_version": 1}),
    "no method": lambda file: rewritten(file, about=lambda a: {**a, "name": "x" * 1000}),
    "method of no text": lambda file: rewritten(file, about=lambda a: {**a, "name": ["knn"]}),
    "no name": lambda file: rewritten(file, about=lambda a: {k: v for k, v in a.items() if k != "name"}),
    "options of another": lambda file: rewritten(file, about=lambda a: {**a, "options": {"k": 3}}),
    "options of no option": lambda file: rewritten(file, about=lambda a: {**a, "options": {"jem": 1}}),
    "options of no dict": lambda file: rewritten(file, about=lambda a: {**a, "options": 3}),
    "threshold of no number": lambda file: rewritten(file, about=lambda a: {**a, "threshold": "1"}),
    "threshold of NaN": lambda file: rewritten(file, about=lambda a: {**a, "threshold": float("nan")}),
    "accept of no number": lambda file: rewritten(file, about=lambda a: {**a, "accept": [1]}),
    "no tensors": lambda file: rewritten(file, lambda t: {}),
    "one more tensor": lambda file: rewritten(file, lambda t: {**t, "more": torch.ones(1)}),
    "no probe": lambda file: rewritten(file, lambda t: {k: v for k, v in t.items() if k != "probe_logits"}),
    "probe of NaN": lambda file: rewritten(file, lambda t: {**t, "probe_logits": t["probe_logits"] * torch.nan}),
    "probe of text": lambda file: rewritten(file, lambda t: {**t, "probe_logits": torch.zeros(4, dtype=torch.bool)}),
    "integers": lambda file: rewritten(file, lambda t: {**t, "means": t["means"].long()}),
    "means of NaN": lambda file: rewritten(file, lambda t: {**t, "means": t["means"] * torch.nan}),
    "means of other width": lambda file: rewritten(file, lambda t: {**t, "means": t["means"][:, :-1].contiguous()}),
    "no means": lambda file: rewritten(file, lambda t: {**t, "means": t["means"][:0]}),
    "means of one": lambda file: rewritten(file, lambda t: {**t, "means": t["means"][0].clone()}),
    "precision that is not square": lambda file: rewritten(
        file, lambda t: {**t, "precision": t["precision"][:-1].contiguous()}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_broken_files_are_named(fitted, tmp_path, kind):
    jem, _, detectors = fitted
    file = tmp_path / "mahalanobis.safetensors"
    detectors["mahalanobis"].save(file)
    HOSTILE[kind](file)
    with pytest.raises(InputError, match=r"mahalanobis\.safetensors") as error:
        Detector.load(file, jem)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_header_of_thousands_of_tensors_is_not_read(fitted, tmp_path):
    fitted[2]["knn"].save(tmp_path / "knn.safetensors")
    rewritten(tmp_path / "knn.safetensors", lambda t: {**t, **{str(i): torch.empty(0) for i in range(2000)}})
    with pytest.raises(InputError, match=r"knn\.safetensors has a header of 1.. KiB: above 64"):
        Detector.load(tmp_path / "knn.safetensors", fitted[0])


def test_places_that_cannot_be_written_are_named(fitted, tmp_path):
    before = tmp_path / "there.safetensors"
    fitted[2]["msp"].save(before)
    content = before.read_bytes()
    for place in (tmp_path / "no" / "a.safetensors", tmp_path, before / "below"):
        with pytest.raises(InputError, match="can't be written"):
            fitted[2]["knn"].save(place)
    assert before.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [before.name]


@pytest.mark.parametrize("name", [3, None, "", "a\0b"])
def test_names_of_no_file(fitted, name):
    with pytest.raises(InputError):
        Detector.load(name, fitted[0])
    with pytest.raises(InputError):
        fitted[2]["msp"].save(name)
