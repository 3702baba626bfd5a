import json
import shlex

import pytest

from timm_jem.hub.local_paths import without_local_paths


def command(*words):
    return without_local_paths({"command": " ".join(words), "config": {"data": {"dataset": "/home/me/clients/acme/photos"}}})[
        "command"
    ]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/clients/acme/photos", "./photos"),
        ("/home/me/my clients/photos/", "./photos"),
        ("~/photos", "./photos"),
        ("../acme/photos?image_column=image", "./photos?image_column=image"),
        ("local-dir:/home/me/model", "local-dir:./model"),
        ("local-dir:runs/acme/model", "local-dir:./model"),
        ("C:\\Users\\me\\photos", "./photos"),
        (r"\\server\acme\photos", "./photos"),
        (r"nothing at \\server\acme\photos", "nothing at ./photos"),
        ("/", "."),
        ("~me/acme/photos", "./photos"),
        ("$HOME/acme/photos and ${DATA}/x", "./x"),
        ("file:/home/me/acme/x", "file:./x"),
        ("FILE:///home/me/acme/x", "FILE://./x"),
        ("csv:///home/me/acme/x.csv", "csv:///./x.csv"),
        ("no good: /home/me/a.bin, ~/b is cut", "no good: ./a.bin, ./b is cut"),
        ("{file: /home/me/w.safetensors}", "{file: ./w.safetensors}"),
    ],
)
def test_paths_are_cut_to_their_last_part(path, shown):
    provenance = {"config": {"data": [path, {"deep": path}]}, "explanation": path}
    assert without_local_paths(provenance) == {"config": {"data": [shown, {"deep": shown}]}, "explanation": shown}
    assert without_local_paths({"files": {path: {"deep": [path]}, 3: 4}}) == {"files": {shown: {"deep": [shown]}, 3: 4}}
    assert without_local_paths(without_local_paths(provenance)) == without_local_paths(provenance)


@pytest.mark.parametrize(
    "value", ["user/name", "hf-hub:user/name", "https://hf.co/a/b", "eps 8/255, and/or", "a / b", "", 3, None, True]
)
def test_what_is_no_path_stays(value):
    assert without_local_paths({"a": [value]}) == {"a": [value]}


def test_the_command_is_one_that_still_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "more").mkdir(parents=True)
    assert command("--data.dataset", "../acme/photos") == "--data.dataset ./photos"
    assert command("--data.dataset", "acme/photos", "--train.lr", "1e-3") == "--data.dataset ./photos --train.lr 1e-3"
    assert command("--data.unlabeled=acme/more") == "--data.unlabeled=./more"
    assert command("--config", "acme/settings.yaml") == "--config ./settings.yaml"
    assert command("--data.dataset", "'/home/me/my photos'") == "--data.dataset './my photos'"
    told = {"file": "w/acme/x.safetensors", "name": "user/model"}
    words = shlex.join(["--model.kwargs", f"{{pretrained_cfg_overlay: {{file: {told['file']}}}, of: {told['name']}}}"])
    config = {"model": {"kwargs": {"pretrained_cfg_overlay": {"file": f"/home/me/{told['file']}"}, "of": told["name"]}}}
    shown = without_local_paths({"command": words, "config": config})
    assert shlex.split(shown["command"])[1] == "{pretrained_cfg_overlay: {file: ./x.safetensors}, of: user/model}"
    assert shown["config"]["model"]["kwargs"] == {"pretrained_cfg_overlay": {"file": "./x.safetensors"}, "of": "user/model"}
    spaced = "{pretrained_cfg_overlay: {file: 'my acme/w/x.safetensors'}, act_layer: silu}"
    config = {"model": {"kwargs": {"pretrained_cfg_overlay": {"file": "/home/me/my acme/w/x.safetensors"}}}}
    for told in (spaced, spaced.replace("acme/w", "acme//w"), spaced.replace("acme/w", "acme/v/../w")):
        shown = without_local_paths({"command": shlex.join(["--model.kwargs", told]), "config": config})
        assert shlex.split(shown["command"])[1] == "{pretrained_cfg_overlay: {file: ./x.safetensors}, act_layer: silu}"
    config["model"]["kwargs"]["act_layer"] = "/home/me/silu"  # whose last part is no path in other places
    assert without_local_paths({"command": shlex.join(["--model.kwargs", "{act_layer: silu}"]), "config": config})[
        "command"
    ] == shlex.join(["--model.kwargs", "{act_layer: silu}"])
    kept = "accelerate launch recipes/train.py --config recipes/configs/cifar10_jem.yaml --data.dataset user/name"
    assert command(kept) == kept
    assert command("--an open", "'quote", "/home/me/x") == "--an open 'quote ./x"


@pytest.mark.parametrize("told", ["clients/acme/photos", "clients/acme/photos/", "clients//acme/./photos"])
def test_a_path_from_another_folder_is_cut_however_it_is_spelt(told):
    assert command("--data.dataset", told) == "--data.dataset ./photos"


@pytest.mark.parametrize(
    "told", ["{{pretrained_cfg_overlay: {{file: {}}}}}", "{{overlay: {{file: {}}}", "file {} is gone, repair it"]
)
@pytest.mark.parametrize("path", ["/home/John Smith/acme/my w.pth", "/home/John Smith/acme/my w.pth?split=test"])
def test_a_path_with_spaces_is_cut_wherever_it_is_told(told, path):
    config = {
        "model": {"kwargs": {"pretrained_cfg_overlay": {"file": "/home/John Smith/acme/my w.pth"}}, "of": "/home/John Smith"}
    }
    text = told.format(path)
    shown = without_local_paths({"command": shlex.join(["--model.kwargs", text]), "explanation": text, "config": config})
    assert "Smith" not in shown["command"] + shown["explanation"]
    assert "acme" not in json.dumps(shown)
    assert shown["explanation"] == told.format(f"./{path.rpartition('/')[2]}")
    assert without_local_paths(shown) == shown


def test_the_argument_is_left_alone():
    provenance = {"config": {"data": {"dataset": "/home/me/photos"}}}
    before = json.dumps(provenance)
    without_local_paths(provenance)
    assert json.dumps(provenance) == before
