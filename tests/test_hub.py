"""Through a Hub on loopback, with the real client."""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from loopback_hub import Hub

import timm_jem
from timm_jem import InputError, PublishedChains, SGLDConfig
from timm_jem.files import fingerprint
from timm_jem.hub import repository as hub_module
from timm_jem.hub.card import is_generated

REPO = "user/digits-jem"


@pytest.fixture
def jem():
    torch.manual_seed(0)
    names, sgld = ["a", "b", "c"], SGLDConfig(num_steps=4, noise_std=0.05, sample_steps=9)
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8), class_names=names, sgld=sgld).eval()
    jem.chains = PublishedChains.of_pixels(torch.rand(30, 1, 8, 8) * 2 - 1, torch.arange(30) % 3)
    jem.provenance = {
        "dataset": "digits",
        "command": "accelerate launch recipes/train.py",
        "steps": 7,
        "seed": 0,
        "results": [
            {"name": "Accuracy", "type": "accuracy", "value": 0.9777, "split": "test", "n": 359, "protocol": "top-1"},
        ],
        "results_of": fingerprint(jem.backbone.state_dict()),
    }
    return jem


def test_no_local_path_is_sent(hub, jem, tmp_path):
    jem.save_pretrained(tmp_path / "acme" / "model")
    base = f"local-dir:{tmp_path}/acme/model"
    tuned = timm_jem.create_model(base, pretrained=True, num_classes=3, input_size=(1, 8, 8))
    data = str(tmp_path / "acme" / "photos")
    tuned.provenance = {
        "dataset": "photos",
        "command": f"accelerate launch recipes/train.py --data.dataset {data} --model.name {base}",
        "config": {"data": {"dataset": data}, "model": {"name": base}},
        "explanation": f"{data} is gone",
    }
    tuned.push_to_hub(REPO)
    for name, content in hub.files(REPO).items():
        assert str(tmp_path).encode() not in content, name
        assert b"acme" not in content, name
    card = hub.files(REPO)["README.md"].decode()
    assert "recipes/train.py --data.dataset ./photos --model.name local-dir:./model" in card
    assert tuned.provenance["config"]["data"]["dataset"] == data  # evaluation from here still finds it


def test_one_repository_two_readers(hub, jem):
    url = jem.push_to_hub(REPO)
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert set(hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "replay_buffer.safetensors",
    }
    again = timm_jem.from_pretrained(REPO)
    plain = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    x, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        assert torch.equal(again(x), jem(x))
        assert torch.equal(plain(x), jem(x))
        assert torch.equal(again.energy(x), jem.energy(x))
        assert torch.equal(again.energy(x, y), jem.energy(x, y))
    assert (again.sgld, again.class_names, again.provenance) == (jem.sgld, jem.class_names, jem.provenance)
    hub.calls.clear()
    cached = timm_jem.from_pretrained(REPO, local_files_only=True)
    assert torch.equal(cached(x), jem(x))
    assert torch.equal(cached.chains.images, jem.chains.images)
    assert hub.calls == []


def test_offline_from_the_cache_in_a_fresh_process(hub, jem, tmp_path, capsys):
    jem.push_to_hub(REPO)
    script = (
        "import sys, timm, timm_jem, torch\n"
        f"jem = timm_jem.from_pretrained({REPO!r}, cache_dir={str(tmp_path)!r})\n"
        f"clf = timm.create_model('hf-hub:{REPO}', pretrained=True, cache_dir={str(tmp_path)!r}).eval()\n"
        "x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)\n"
        "assert torch.equal(jem(x), clf(x))\n"
        "print(jem.energy(x).tolist(), jem.sample(2, init='buffer').shape)"
    )
    exec(script, {})
    here = capsys.readouterr().out
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == here


def test_a_pinned_revision(hub, jem):
    jem.push_to_hub(REPO)
    first, x = hub.find(REPO, "main")[0], torch.randn(2, 1, 8, 8)
    before = jem(x)
    with torch.no_grad():
        jem.backbone.fc.bias.add_(1)
    jem.push_to_hub(REPO)
    assert torch.equal(timm_jem.from_pretrained(REPO, revision=first)(x), before)
    assert torch.equal(timm_jem.from_pretrained(REPO)(x), jem(x))
    with pytest.raises(InputError, match="no such revision"):
        timm_jem.from_pretrained(REPO, revision="v9")


def test_a_plain_timm_repository(hub, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    hub.create("user/plain", {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()})
    jem = timm_jem.from_pretrained("user/plain")
    x = torch.randn(2, *jem.input_size)
    assert torch.equal(jem(x), model(x))
    assert jem.chains is None


def test_the_card_says_what_is_so_and_no_more(hub, jem, tmp_path):
    (tmp_path / "samples.png").write_bytes(b"picture")
    jem.push_to_hub(REPO, pictures={"samples.png": tmp_path / "samples.png"})
    assert hub.files(REPO)["samples.png"] == b"picture"
    with pytest.raises(InputError, match="no card shows a picture 'notes"):
        jem.push_to_hub(REPO, pictures={"notes.png": tmp_path / "samples.png"})
    (tmp_path / "link.png").symlink_to(tmp_path / "samples.png")
    with pytest.raises(InputError, match="not a file of its own"):
        jem.push_to_hub(REPO, pictures={"samples.png": tmp_path / "link.png"})
    file = tmp_path / "README.md"
    file.write_bytes(hub.files(REPO)["README.md"])
    card = ModelCard.load(file)
    card.validate()
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in card.data.eval_results] == [("accuracy", 0.9777, "test")]
    assert "samples.png" in card.text
    assert "buffer.png" not in card.text
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card.text
    assert 'init="buffer"' in card.text
    jem.provenance = {}
    jem.push_to_hub(REPO, replay_buffer=False)
    text = hub.files(REPO)["README.md"].decode()
    assert "Results" not in text
    assert "trained on" not in text
    assert 'init="buffer"' not in text
    assert ModelCard(text).data.eval_results is None
    assert "replay_buffer.safetensors" not in hub.files(REPO)  # not that of the older model


def test_pictures_of_an_older_model_go_and_that_of_the_chains_goes_with_them(hub, jem, tmp_path):
    names = ("samples.png", "buffer.png", "evaluation/reliability.png")
    (tmp_path / "a.png").write_bytes(b"picture")
    pictures = dict.fromkeys(names, tmp_path / "a.png")
    jem.push_to_hub(REPO, pictures=pictures)
    assert set(names) < set(hub.files(REPO))
    jem.push_to_hub(REPO, pictures=pictures, replay_buffer=False)
    files = hub.files(REPO)
    assert {name for name in files if name.endswith(".png")} == {"samples.png", "evaluation/reliability.png"}
    assert b"buffer.png" not in files["README.md"]
    hub.commit(REPO, {**files, "README.md": b"# Mine\n![](samples.png)", "mine.png": b""})
    with pytest.warns(UserWarning, match="is kept"):
        jem.push_to_hub(REPO)
    assert "samples.png" in hub.files(REPO)
    jem.push_to_hub(REPO, overwrite_card=True)
    assert [name for name in hub.files(REPO) if name.endswith(".png")] == ["mine.png"]


def test_a_card_that_someone_wrote_is_kept(hub, jem):
    jem.push_to_hub(REPO)
    generated = hub.files(REPO)["README.md"].decode()
    assert is_generated(generated)
    edited = generated.replace("A **joint energy model**", "My joint energy model").encode()
    hub.commit(REPO, {**hub.files(REPO), "README.md": edited})
    with pytest.warns(UserWarning, match="is kept"):
        jem.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == edited
    jem.push_to_hub(REPO, overwrite_card=True)
    assert hub.files(REPO)["README.md"].decode() == generated


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("POST /api/repos/create", 401, "401 .*log in"),
        ("POST /api/repos/create", 403, "403 .*may write"),
        ("POST .*/commit/", 403, "403 .*may write"),
        ("POST .*/commit/", 413, "413 .*leave the replay buffer out"),
        ("POST .*/commit/", 500, "500 .*try again"),
        ("PUT /lfs/", 403, "403 .*may write"),
        ("PUT /lfs/", "cut", "connection to the Hub failed"),
        ("POST .*/preupload/", 429, "429 .*wait"),
        ("POST /api/validate-yaml", 400, "the Hub says Invalid metadata in README.md"),
        ("POST .*/commit/", "cut", "connection to the Hub failed"),
    ],
)
def test_an_interrupted_push_leaves_the_old_revision_and_a_second_one_resumes(hub, jem, monkeypatch, pattern, how, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its own attempts
    jem.push_to_hub(REPO)
    revisions = list(hub.revisions[REPO])
    with torch.no_grad():
        jem.backbone.fc.bias.add_(1)
    hub.fail(pattern, how)
    with pytest.raises(InputError, match=message) as error:
        jem.push_to_hub(REPO)
    assert "\n" not in str(error.value)
    assert hub.revisions[REPO] == revisions
    hub.failures.clear()
    sent = sum(call.startswith("PUT /lfs/") for call in hub.calls)
    jem.push_to_hub(REPO)
    assert hub.revisions[REPO][:-1] == revisions
    if "commit" in pattern:  # the files were there already
        assert sum(call.startswith("PUT /lfs/") for call in hub.calls) == sent
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(timm_jem.from_pretrained(REPO)(x), jem(x))


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("resolve", 429, "429 .*wait"),
        ("resolve", 503, "503 .*try again"),
        ("GET .*model.safetensors", 500, "500 .*try again"),
        ("resolve", "cut", "connection to the Hub failed|out of reach"),
        ("GET .*model.safetensors", "cut", "connection to the Hub failed"),
    ],
)
def test_a_download_that_fails_says_why(hub, jem, tmp_path, monkeypatch, pattern, how, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    jem.push_to_hub(REPO)
    hub.fail(pattern, how)
    with pytest.raises(InputError, match=message) as error:
        timm_jem.from_pretrained(REPO, cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    hub.failures.clear()
    assert timm_jem.from_pretrained(REPO, cache_dir=tmp_path).class_names == ["a", "b", "c"]


def test_what_is_not_there(hub, jem, tmp_path):
    with pytest.raises(InputError, match="no such repository, or it is private"):
        timm_jem.from_pretrained("user/nothing")
    with pytest.raises(InputError, match="neither a folder nor a Hub repository"):
        timm_jem.from_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(InputError, match="not in the cache"):
        timm_jem.from_pretrained(REPO, local_files_only=True)
    with pytest.raises(InputError, match="no such repository, or it is private"):
        timm_jem.from_pretrained("user/nothing", force_download=True)
    with pytest.raises(InputError, match="local_files_only or HF_HUB_OFFLINE forbids it"):
        timm_jem.from_pretrained(REPO, local_files_only=True, force_download=True)
    jem.push_to_hub(REPO, private=True)
    for force in (False, True):
        with pytest.raises(InputError, match="or it is private"):
            timm_jem.from_pretrained(REPO, token=False, cache_dir=tmp_path, force_download=force)
    hub.create("user/pickle", {"config.json": b'{"architecture": "resnet18"}', "pytorch_model.bin": b"\x80\x02."})
    with pytest.raises(InputError, match="no pickle is read"):
        timm_jem.from_pretrained("user/pickle")
    assert not any("pytorch_model" in call for call in hub.calls)


def turn_off(monkeypatch):
    off = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", off + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", off)


@pytest.fixture
def unreachable(hub, monkeypatch):
    """A Hub that nobody answers for; and waiting, as the client does between its attempts, fails."""
    turn_off(monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda: timm_jem.from_pretrained("runs/digts"),
            "runs/digts is no folder here; as a .* not in the cache.* out of reach",
        ),
        (lambda: timm_jem.from_pretrained("user/x", force_download=True), "not in the cache|connection to the Hub failed"),
        (lambda: timm_jem.from_pretrained("a/b", revision=5), "revision is 5: give a branch"),
        (lambda: timm_jem.from_pretrained("a/b", cache_dir="\0"), "is not the name of a folder"),
        (lambda: timm_jem.from_pretrained("digit"), "digit is no folder here"),
        (lambda: timm_jem.create_model("resnet18", pretrained=True), "resnet18 from timm/resnet18.* not in the cache"),
        (lambda: timm_jem.create_model("resnet18", pretrained=True, input_size=(1, 32, 32)), "not in the cache"),
        (lambda: timm_jem.create_model("hf-hub:user/x"), "hf-hub:user/x from user/x on the Hub: .* not in the cache"),
        (lambda: timm_jem.create_model("hf-hub:user/x@v1", input_size=(1, 32, 32)), "not in the cache"),
    ],
)
def test_an_unreachable_hub_is_said_at_once(unreachable, load, message):
    with pytest.raises(InputError, match=message) as error:
        load()
    assert "sent twice" not in str(error.value)
    assert "these arguments" not in str(error.value)


def test_what_is_cached_loads_without_a_hub(hub, jem, monkeypatch):
    jem.push_to_hub(REPO)
    timm_jem.from_pretrained(REPO)
    turn_off(monkeypatch)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(timm_jem.from_pretrained(REPO)(x), jem(x))
    with pytest.warns(UserWarning, match=rf"from_pretrained\('{REPO}'\)"):
        assert torch.equal(timm_jem.create_model(f"hf-hub:{REPO}", pretrained=True).eval()(x), jem(x))
    with pytest.warns(UserWarning, match=rf"from_pretrained\('{REPO}', revision='main'\)"):
        timm_jem.create_model(f"hf-hub:{REPO}@main", pretrained=True)


def test_what_is_cached_whole_loads_from_a_hub_that_fails(hub, jem):
    jem.push_to_hub(REPO)
    timm_jem.from_pretrained(REPO)
    hub.fail("", 503)
    assert torch.equal(timm_jem.from_pretrained(REPO).chains.images, jem.chains.images)


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "../x", "x" * 200, None, 5])
def test_names_that_nothing_can_be_pushed_to(hub, jem, name):
    with pytest.raises(InputError, match="is not the name of a Hub repository: give user/name") as error:
        jem.push_to_hub(name)
    assert len(str(error.value)) < 200
    assert hub.calls == []


def test_results_are_of_the_weights_that_were_measured(hub, jem):
    result = {"name": "Accuracy", "type": "accuracy", "value": 0.9, "split": "test", "n": 10, "protocol": "p"}
    weights = fingerprint(jem.backbone.state_dict())
    jem.provenance = {"dataset": "digits", "results": [result], "results_of": weights}

    def shown() -> bool:
        return "| Accuracy | 0.9000 |" in hub.files(REPO)["README.md"].decode()

    jem.push_to_hub(REPO)
    assert shown()
    again = timm_jem.from_pretrained(REPO)
    again.push_to_hub(REPO)
    assert shown()
    with torch.no_grad():
        next(again.backbone.parameters()).add_(1)
    with pytest.warns(UserWarning, match="were measured with other weights, .* don't go on its card"):
        again.push_to_hub(REPO)
    assert not shown()
    assert timm_jem.from_pretrained(REPO).provenance["results"] == []
    jem.provenance = {"dataset": "digits", "results": [result]}  # which anybody may have written
    with pytest.warns(UserWarning, match="or nobody knows with which"):
        jem.push_to_hub(REPO)
    assert not shown()


def test_a_name_without_its_owner_would_be_another_models(hub, jem):
    with pytest.raises(InputError, match="'digits' has no owner: give user/name"):
        jem.push_to_hub("digits")
    for name in ("digits", "."):
        with pytest.raises(InputError, match="is no repository on the Hub, and has no revision 'main'"):
            timm_jem.from_pretrained(name, revision="main")
    assert hub.calls == []


def test_published_chains_that_a_cache_lacks_are_missed(hub, jem):
    jem.push_to_hub(REPO)
    timm.create_model(f"hf-hub:{REPO}", pretrained=True)  # caches what timm reads
    with pytest.warns(UserWarning, match=f"{REPO} was saved with a replay_buffer.* load it once while online"):
        assert timm_jem.from_pretrained(REPO, local_files_only=True).chains is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timm_jem.from_pretrained(REPO, local_files_only=True, replay_buffer=False).chains is None
        assert timm_jem.from_pretrained(REPO).chains is not None


@pytest.mark.parametrize("pictures", [["samples.png"], {"samples.png": None}])
def test_pictures_are_files_by_their_names(hub, jem, pictures):
    with pytest.raises(InputError, match=r"pictures are \['samples.png'\]: give|picture samples.png is None: give its file"):
        jem.push_to_hub(REPO, pictures=pictures)


def test_a_full_temporary_folder_and_an_odd_token_are_one_line(hub, jem, monkeypatch):
    with pytest.raises(InputError, match="the token holds 'ü', as none does: copy it again"):
        jem.push_to_hub(REPO, token="hf_ü")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"can't be written to a temporary folder \(.*No space left.*\): make room"):
        jem.push_to_hub(REPO)


@pytest.mark.parametrize("error", [ConnectionError("404"), TimeoutError("60 s"), PermissionError("expired")])
def test_a_transfer_that_fails_is_not_the_caches(error):
    """What the Hub's storage raises has these classes, and no number of the system's."""
    with (
        pytest.raises(InputError, match=r"user/x: the transfer failed \(.*\): try again"),
        hub_module.explained("user/x", cached=True),
    ):
        raise error
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(InputError, match=r"the cache can't be used .*No space left"),
        hub_module.explained("user/x", cached=True),
    ):
        raise full


def test_a_push_without_a_hub_is_explained(hub, jem, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the Hub is off: unset HF_HUB_OFFLINE to push"):
        jem.push_to_hub(REPO)


def test_a_cache_that_can_not_be_made(hub, jem, tmp_path, monkeypatch):
    jem.push_to_hub(REPO)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the cache can't be used .*HF_HOME"):
        timm_jem.from_pretrained(REPO, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(InputError, match=r"the cache can't be used .*HF_HOME"):
        timm_jem.create_model(f"hf-hub:{REPO}", cache_dir=str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere")
    with pytest.raises(InputError, match=r"the cache can't be used .*HF_HOME"):
        timm_jem.from_pretrained(REPO)


@pytest.mark.parametrize("name", ["resnet18.nope", "local-dir:/nowhere", "hf-hub:user/nothing", "no-such:x", "hf-hub:a b"])
@pytest.mark.parametrize("input_size", [None, (1, 32, 32)])
def test_names_that_can_not_be_built_are_explained(hub, name, input_size):
    with pytest.raises(InputError) as error:
        timm_jem.create_model(name, pretrained=True, input_size=input_size)
    assert str(error.value).isprintable()


def test_chains_that_are_too_large_are_not_downloaded(hub, jem, monkeypatch):
    jem.push_to_hub(REPO)
    monkeypatch.setattr(hub_module, "MAX_FILE_BYTES", 100)
    with pytest.raises(InputError, match="replay_buffer=False"):
        timm_jem.from_pretrained(REPO)
    assert not any(call.startswith("GET") and "replay_buffer" in call for call in hub.calls)
    assert timm_jem.from_pretrained(REPO, replay_buffer=False).chains is None


def test_what_plain_timm_would_undo_is_refused_before_anything_is_sent(hub, jem):
    jem.backbone.stages[0][0].conv1 = torch.nn.Sequential(jem.backbone.stages[0][0].conv1)
    with pytest.raises(InputError, match="plain timm can't rebuild it"):
        jem.push_to_hub(REPO)
    assert hub.calls == []


def test_no_file_name_of_a_repository_leaves_the_cache(hub, jem, tmp_path):
    jem.push_to_hub(REPO)
    hub.commit(REPO, {**hub.files(REPO), "../../../escaped": b"x", "/tmp/escaped": b"x"})
    timm_jem.from_pretrained(REPO, cache_dir=tmp_path)
    assert not any("escaped" in call for call in hub.calls)
    assert isinstance(hub, Hub)
    assert not Path("/tmp/escaped").exists()
