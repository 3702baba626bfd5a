import json
import os

import pytest
import timm
import torch

import timm_jem
from timm_jem import InputError, SGLDConfig, folder


@pytest.fixture
def jem():
    torch.manual_seed(0)
    sgld = SGLDConfig(num_steps=7, noise_std=0.05, sample_steps=40, denoise_steps=2)
    jem = timm_jem.create_model(
        "wrn_10_1", num_classes=3, input_size=(1, 8, 8), class_names=["a", "b", "c"], sgld=sgld, act_layer="silu"
    )
    jem.provenance = {"dataset": "digits"}
    return jem.eval()


def logits_of_three_readers(jem, folder):
    jem.save_pretrained(folder)
    x = torch.randn(3, *jem.input_size)
    with torch.no_grad():
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return jem(x), timm_jem.from_pretrained(folder)(x), plain(x)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet", {"num_classes": 2}),
        ("resnet18", {"num_classes": 10, "input_size": (1, 64, 64)}),
        ("vit_tiny_patch16_224", {"num_classes": 5, "input_size": (3, 32, 32), "patch_size": 4}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 4, "drop_rate": 0.1}),
        ("test_convnext", {"num_classes": 1000}),
        ("wrn_16_2", {"num_classes": 10, "norm_layer": "batchnorm2d"}),
    ],
)
def test_both_readers_give_the_same_logits_bit_for_bit(tmp_path, name, kwargs):
    torch.manual_seed(0)
    jem = timm_jem.create_model(name, **kwargs)
    with torch.no_grad():
        jem(torch.randn(8, *jem.input_size))  # BatchNorm statistics that are not the initial ones
    ours, again, plain = logits_of_three_readers(jem.eval(), tmp_path / "m")
    assert torch.equal(ours, again)
    assert torch.equal(ours, plain)


def test_everything_else_comes_back(jem, tmp_path):
    jem.save_pretrained(tmp_path / "m")
    again = timm_jem.from_pretrained(tmp_path / "m")
    assert (again.sgld, again.class_names, again.provenance) == (jem.sgld, jem.class_names, jem.provenance)
    assert again.input_size == (1, 8, 8)
    assert torch.equal(again.mean, jem.mean)
    assert not again.training
    draws = [m.sample(4, y=1, generator=torch.Generator().manual_seed(5)) for m in (jem, again)]
    assert torch.equal(*draws)


def test_layouts_that_safetensors_refuses(jem, tmp_path):
    expected, *_ = logits_of_three_readers(jem, tmp_path / "plain")
    jem.to(memory_format=torch.channels_last)
    ours, again, plain = logits_of_three_readers(jem, tmp_path / "last")
    assert torch.equal(again, plain)
    assert jem.backbone.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert expected.shape == ours.shape


def test_the_folder_is_safetensors_and_json_only(jem, tmp_path):
    jem.save_pretrained(tmp_path / "deep" / "m")
    assert sorted(os.listdir(tmp_path / "deep")) == ["m"]
    assert sorted(os.listdir(tmp_path / "deep" / "m")) == ["config.json", "model.safetensors"]


def test_saving_over_an_older_model_keeps_other_files(jem, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    jem.save_pretrained(tmp_path)
    with torch.no_grad():
        jem.backbone.fc.bias.add_(1)
    ours, again, _ = logits_of_three_readers(jem, tmp_path)
    assert torch.equal(ours, again)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_failing_save_leaves_what_was_there(jem, tmp_path):
    target = tmp_path / "m"
    jem.save_pretrained(target)
    before = {f: (target / f).read_bytes() for f in os.listdir(target)}
    jem.backbone._model_args["act_layer"] = torch.nn.SiLU  # JSON can't hold it
    with pytest.raises(InputError, match="act_layer"):
        jem.save_pretrained(target)
    with pytest.raises(InputError, match="act_layer"):
        jem.save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path) == ["m"]
    assert {f: (target / f).read_bytes() for f in os.listdir(target)} == before


def test_a_plain_timm_folder_becomes_a_joint_energy_model(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    jem = timm_jem.from_pretrained(tmp_path)
    x = torch.randn(2, *jem.input_size)
    assert torch.equal(jem(x), model(x))
    assert jem.sgld == SGLDConfig()


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: edit(f, architecture="wrn_10_11"), "did you mean wrn_10_1"),
        (lambda f: edit(f, timm_jem={"format_version": folder.FORMAT_VERSION + 1}), "upgrade timm_jem"),
    ],
)
def test_broken_folders_are_named(jem, tmp_path, damage, message):
    jem.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        timm_jem.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a Hub repository"):
        timm_jem.from_pretrained(tmp_path / "nothing" / "here")
