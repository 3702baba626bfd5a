import json
import os
import re
import shutil
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import nn

import timm_jem
from timm_jem import InputError, PublishedChains, SGLDConfig


@pytest.fixture
def jem():
    torch.manual_seed(0)
    sgld = SGLDConfig(num_steps=7, noise_std=0.05, sample_steps=40, denoise_steps=2, step_decay=True, jitter=1, rest=0.25)
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
        ("test_nfnet", {"num_classes": 3}),
        ("test_efficientnet", {"num_classes": 3}),
        ("test_mambaout", {"num_classes": 3}),
        ("test_byobnet", {"num_classes": 3}),
        ("swin_tiny_patch4_window7_224", {"num_classes": 3, "input_size": (3, 64, 64)}),
        ("mobilenetv3_small_050", {"num_classes": 3, "input_size": (3, 64, 64)}),
        ("ghostnet_050", {"num_classes": 3}),
        ("resnetv2_18", {"num_classes": 3, "norm_layer": "groupnorm"}),
        ("wrn_16_2", {"num_classes": 10, "norm_layer": "batchnorm2d"}),
        ("wrn_28_2", {"num_classes": 2, "input_size": (1, 32, 32)}),
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
    draws = [
        m.sample(4, sgld_config=replace(m.sgld, rest=None), y=1, generator=torch.Generator().manual_seed(5))
        for m in (jem, again)
    ]
    assert torch.equal(*draws)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for name in ("step_decay", "jitter", "rest"):  # as an older version wrote it
        del config["timm_jem"]["sgld"][name]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert timm_jem.from_pretrained(tmp_path / "m").sgld == replace(jem.sgld, step_decay=False, jitter=0, rest=None)


def test_names_that_were_taken_away_stay_away(jem, tmp_path):
    jem.save_pretrained(tmp_path / "m")
    again = timm_jem.from_pretrained(tmp_path / "m")
    again.class_names = None
    again.save_pretrained(tmp_path / "n")
    assert timm_jem.from_pretrained(tmp_path / "n").class_names is None
    assert again.backbone.pretrained_cfg["label_names"] == ["a", "b", "c"]  # saving changes nothing


def test_layouts_that_safetensors_refuses(jem, tmp_path):
    x = torch.randn(3, *jem.input_size)
    expected = jem(x)
    jem.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert jem.backbone.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)  # it is not changed
    assert torch.equal(timm_jem.from_pretrained(tmp_path)(x), expected)


def test_saving_draws_no_random_numbers(jem, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    jem.save_pretrained(tmp_path / "m")
    assert torch.equal(torch.rand(3), expected)


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


def test_weights_alone_of_a_saved_model_are_said_to_be(jem, tmp_path, recwarn):
    jem.save_pretrained(tmp_path / "m")
    folder = str(tmp_path / "m")
    with pytest.warns(UserWarning, match=re.escape(f"timm_jem.from_pretrained({folder!r})")) as caught:
        other = timm_jem.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert caught[0].filename == __file__
    x = torch.randn(2, *jem.input_size)
    assert torch.equal(other(x), jem(x))
    timm.models.save_for_hf(jem.backbone, tmp_path / "plain", safe_serialization=True)
    timm_jem.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True)
    timm_jem.create_model(f"local-dir:{folder}")
    timm_jem.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert not recwarn


@pytest.mark.parametrize("stated", ["cc-by-nc-4.0", None])
def test_the_licence_of_what_is_loaded_is_that_of_its_weights(tmp_path, stated):
    """timm's configuration of an architecture tells that of weights of its own."""
    jem = timm_jem.create_model("wrn_10_1", input_size=(3, 8, 8), num_classes=3)
    jem.provenance = {"license": stated}
    jem.save_pretrained(tmp_path / "m")
    for classes in (3, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            further = timm_jem.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=classes)
        assert further.backbone.pretrained_cfg["license"] == stated


@pytest.mark.parametrize("blocked", ["config.json", "model.safetensors", "replay_buffer.safetensors"])
def test_a_move_that_is_blocked_leaves_what_was_there(jem, tmp_path, blocked):
    jem.chains = PublishedChains.of_pixels(torch.zeros(10, 1, 8, 8))
    jem.save_pretrained(tmp_path)
    (tmp_path / blocked).unlink()
    (tmp_path / blocked).mkdir()
    (tmp_path / blocked / "mine").write_text("")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with torch.no_grad():
        jem.backbone.fc.bias.add_(1)
    with pytest.raises(InputError, match=f"can't be written.*{blocked} is a folder"):
        jem.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert (len(os.listdir(tmp_path)), os.listdir(tmp_path / blocked)) == (3, ["mine"])


def test_everybody_may_read_what_was_saved_who_may_read_the_config(jem, tmp_path):
    jem.chains = PublishedChains.of_pixels(torch.zeros(10, 1, 8, 8))
    jem.save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "m").iterdir()} == {(tmp_path / "file").stat().st_mode}


@pytest.mark.parametrize("name", [None, 5, b"", "x\0y", "", "n" * 300, "/proc/nowhere", "/dev/null/x"])
def test_where_nothing_can_be_saved_or_read(jem, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        jem.save_pretrained(name)
    assert str(error.value).isprintable()
    with pytest.raises(InputError) as error:
        timm_jem.from_pretrained(name, local_files_only=True)
    assert str(error.value).isprintable()
    assert os.listdir(tmp_path) == []


def test_tied_layers_come_back_tied(tmp_path):
    jem = timm_jem.create_model(
        "coat_tiny", num_classes=3, input_size=(3, 32, 32), embed_dims=(16,) * 4, serial_depths=(1,) * 4
    )
    jem.save_pretrained(tmp_path)
    again = timm_jem.from_pretrained(tmp_path).backbone
    assert again.serial_blocks1[0].cpe is again.cpe1
    assert torch.equal(again.cpe1.proj.weight, jem.backbone.cpe1.proj.weight)


def test_chains_are_those_of_when_the_model_was_loaded(jem, tmp_path, monkeypatch):
    jem.chains = PublishedChains.of_pixels(torch.zeros(10, 1, 8, 8))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    jem.save_pretrained("m")
    again = timm_jem.from_pretrained("m")
    jem.chains = PublishedChains.of_pixels(torch.ones(10, 1, 8, 8))
    jem.save_pretrained("m")
    third = timm_jem.from_pretrained("m")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "work")
    assert again.sample(3, init="buffer").shape == (3, 1, 8, 8)
    assert (again.chains.images.unique().tolist(), third.chains.images.unique().tolist()) == ([128], [255])
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(timm_jem.from_pretrained(tmp_path / "copy").chains.images, again.chains.images)


def replace_activation(jem):
    jem.backbone.act1 = nn.SiLU()


def replace_normalisation(jem):
    jem.backbone.bn1 = nn.GroupNorm(4, 16)


def lengthen_head(jem):
    jem.backbone.fc = nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 3))


def change_epsilon(jem):
    jem.backbone.bn1.eps = 0.1


def break_weights(jem):
    with torch.no_grad():
        jem.backbone.fc.weight[0, 0] = torch.nan


def nested(depth):
    return json.loads('{"a":' * depth + "1" + "}" * depth)


def lock_in_hook(jem):
    lock = threading.Lock()
    jem.backbone.register_forward_hook(lambda *_: None)
    jem.backbone.tracker = lock


def tensor_with_graph(jem):
    jem.backbone.cached = jem.backbone.fc.weight * 2


def unfit_layer(jem):
    jem.backbone.conv1[0] = nn.Conv2d(3, 5, 3)


def cut_channels(jem):
    jem.backbone.global_pool = nn.Identity()


def quantise(jem):
    jem.backbone.state_dict = lambda: {"fc.scale": torch.qint8}


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        (replace_activation, "plain timm can't rebuild it"),
        (replace_normalisation, "plain timm can't rebuild it"),
        (lengthen_head, "plain timm can't rebuild it"),
        (change_epsilon, "plain timm can't rebuild it"),
        (break_weights, "not finite"),
        (lock_in_hook, "can't be copied .*lock"),
        (tensor_with_graph, "can't be copied .*remove hooks"),
        (unfit_layer, "plain timm can't rebuild it"),
        (cut_channels, "takes no images of"),
        (quantise, "'fc.scale', which is no tensor"),
        (lambda jem: jem.backbone.reset_classifier(0), "of no classes"),
        (lambda jem: jem.provenance.update(nested(60)), "nested too deep"),
        (lambda jem: jem.provenance.update(a=nested(900)), "nested too deep|not JSON"),
        (lambda jem: jem.provenance.update(a=jem.provenance), "not JSON"),
        (lambda jem: jem.provenance.update(log="x" * 2**24), "provenance is JSON of 16,777"),
        (lambda jem: jem.provenance.update(when=object()), "not JSON"),
        (lambda jem: jem.provenance.update(loss=[float("nan")]), "not JSON .*finite numbers"),
    ],
)
def test_what_can_not_be_exported_faithfully_is_refused(tmp_path, surgery, message):
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=3, input_size=(3, 32, 32)).eval()
    jem.save_pretrained(tmp_path / "m")
    before = {f: (tmp_path / "m" / f).read_bytes() for f in os.listdir(tmp_path / "m")}
    surgery(jem)
    with pytest.raises(InputError, match=message) as error:
        jem.save_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m"]
    assert {f: (tmp_path / "m" / f).read_bytes() for f in os.listdir(tmp_path / "m")} == before


@pytest.mark.parametrize("class_names", [None, ["a", "b", "c"]])
def test_a_backbone_that_is_not_timms_is_named(tmp_path, class_names):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    backbone.num_classes = 3
    data_config = {"input_size": (3, 4, 4), "mean": (0.5,), "std": (0.5,)}
    jem = timm_jem.JEM(backbone, data_config=data_config, class_names=class_names)
    with pytest.raises(InputError, match=r"is a Sequential and no model of timm, .* save jem\.state_dict"):
        jem.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_copy_is_the_same(jem, tmp_path):
    jem.save_pretrained(tmp_path / "a")
    timm_jem.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(InputError, match="is a file"):
        jem.save_pretrained(tmp_path / "a" / "config.json")
    with pytest.raises(InputError, match="can't be made"):
        jem.save_pretrained(tmp_path / "a" / "config.json" / "b" / "c")


def frozen_batch_norm(jem):
    jem.backbone = freeze_batch_norm_2d(jem.backbone)
    return jem


@pytest.mark.parametrize(
    "change",
    [
        lambda jem: jem.to(memory_format=torch.channels_last),
        torch.compile,
        lambda jem: ModelEmaV3(jem).module,
        frozen_batch_norm,
        lambda jem: jem.bfloat16(),
    ],
    ids=["channels_last", "compiled", "ema", "frozen", "bf16"],
)
def test_models_in_any_dress_are_saved_right(tmp_path, change):
    torch.manual_seed(0)
    jem = timm_jem.create_model("test_resnet", num_classes=3, input_size=(3, 32, 32))
    jem(torch.randn(8, 3, 32, 32))  # BatchNorm statistics that are not the initial ones
    dressed = change(jem.eval())
    dressed.save_pretrained(tmp_path / "m")
    plain = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), jem.float().to(memory_format=torch.contiguous_format)(x), rtol=1e-4, atol=1e-5)


def test_published_chains(jem, tmp_path):
    u = torch.linspace(-1, 1, 30 * 64).view(30, 1, 8, 8)
    jem.chains = PublishedChains.of_pixels(u, torch.arange(30) * 3 // 30)
    jem.save_pretrained(tmp_path)
    again = timm_jem.from_pretrained(tmp_path)
    assert (again.chains.images.float() / 127.5 - 1 - u).abs().max() <= 0.5 / 127.5 + 1e-6
    still = SGLDConfig(noise_std=0.0, step_size=1e-12, num_steps=1)
    y = torch.tensor([2, 0, 2, 1])
    x = again.sample(y=y, init="buffer", sgld_config=still, generator=torch.Generator().manual_seed(3))
    pixels = again.denormalize(x)
    nearest = (pixels.flatten(1)[:, None] - u.flatten(1)).abs().amax(2).argmin(1)
    assert torch.equal(nearest * 3 // 30, y)
    assert len(set(nearest.tolist())) == 4
    draws = [again.sample(30, init="buffer", generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    first = again.sample(8, init="buffer", generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(first, draws[0][:8])
    of_y = again.sample(y=[1, 2, 1, 0, 1], init="buffer", generator=torch.Generator().manual_seed(5))
    first = again.sample(y=[1, 2, 1], init="buffer", generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(first, of_y[:3])
    with pytest.raises(InputError, match="31 images from 30 published chains"):
        again.sample(31, init="buffer")
    with pytest.raises(InputError, match="11 images of class 1 from 10"):
        again.sample(11, y=1, init="buffer")
    again.save_pretrained(tmp_path)  # onto the file that they are read from
    assert torch.equal(timm_jem.from_pretrained(tmp_path).chains.images, jem.chains.images)
    assert timm_jem.from_pretrained(tmp_path, replay_buffer=False).chains is None
    jem.save_pretrained(tmp_path, replay_buffer=False)
    assert timm_jem.from_pretrained(tmp_path).chains is None


def test_chains_of_no_class_and_of_limited_size(jem):
    jem.chains = PublishedChains.of_pixels(torch.zeros(10, 1, 8, 8), max_bytes=5 * 64)
    assert len(jem.chains) == 5
    assert jem.sample(3, init="buffer").shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match="no classes"):
        jem.sample(y=[0], init="buffer")
    with pytest.raises(InputError, match="leave the replay buffer out"):
        PublishedChains.of_pixels(torch.zeros(10, 1, 8, 8), max_bytes=63)


U8 = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(4, 1, 8, 8), None, "float32.*of_pixels"),
        (U8[0], None, r"shape \(1, 8, 8\)"),
        (U8[:0], None, r"\(0, 1, 8, 8\)"),
        ([1], None, "a list"),
        (U8.to("meta"), None, "meta device"),
        (U8[:, :, :7], None, r"images of \(1, 7, 8\)"),
        (U8, torch.tensor([0, 1]), "labels"),
        (U8, torch.tensor([0.0, 1, 2]), "float32"),
        (U8, torch.tensor([0, 1, 3]), "not one of 3 classes"),
        (U8, torch.tensor([0, -1, 2]), "label -1"),
        (U8[:1].expand(2**20 + 1, 1, 8, 8), None, "above 64 MiB"),
    ],
)
def test_chains_are_checked_when_they_are_set_as_when_they_are_read(jem, images, labels, message):
    with pytest.raises(InputError, match=message) as error:
        jem.chains = PublishedChains(images, labels)
    assert "\n" not in str(error.value)
    assert jem.chains is None


@pytest.mark.parametrize(
    ("u", "labels", "message"),
    [
        (U8, None, "uint8"),
        (torch.zeros(0, 1, 8, 8), None, r"\(0, 1, 8, 8\)"),
        (torch.full((3, 1, 8, 8), torch.nan), None, "NaN"),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0]), "one a chain"),
        (None, None, "NoneType"),
    ],
)
def test_chains_to_publish_are_pixels(u, labels, message):
    with pytest.raises(InputError, match=message):
        PublishedChains.of_pixels(u, labels)


def test_chains_of_no_file_are_named():
    with pytest.raises(InputError, match=r"there is no file gone\.safetensors: give"):
        PublishedChains.load("gone.safetensors", (1, 8, 8), 3)
    with pytest.raises(InputError, match=r"chains\.safetensors can't be written .*give a file in a folder that is there"):
        PublishedChains(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)).save("gone/chains.safetensors")


def test_chains_in_any_layout_are_saved_and_another_head_refuses_them(jem, tmp_path):
    images = torch.randint(256, (1, 8, 8, 5), dtype=torch.uint8).permute(3, 0, 1, 2)
    jem.chains = PublishedChains(images, torch.arange(10).remainder(3)[::2])
    jem.save_pretrained(tmp_path)
    assert torch.equal(timm_jem.from_pretrained(tmp_path).chains.images, images)
    jem.backbone.reset_classifier(2)
    jem.class_names = None
    for call in (lambda: jem.save_pretrained(tmp_path), lambda: jem.sample(1, init="buffer")):
        with pytest.raises(InputError, match="not one of 2 classes"):
            call()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": torch.zeros(3, 1, 9, 8, dtype=torch.uint8)}, r"images of \(1, 9, 8\)"),
        ({"images": torch.zeros(3, 1, 8, 8)}, "float32"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1, 3])}, "labels"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1])}, "labels"),
        ({"pictures": torch.zeros(3)}, "pictures"),
        ({str(i): torch.empty(0) for i in range(2000)}, "header of 1.. KiB: above 64 it is no such file"),
    ],
)
def test_broken_chains_are_named(jem, tmp_path, tensors, message):
    jem.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "replay_buffer.safetensors")
    with pytest.raises(InputError, match=f"{message}.*replay_buffer=False"):
        timm_jem.from_pretrained(tmp_path)
    (tmp_path / "replay_buffer.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"not a complete safetensors.*replay_buffer=False"):
        timm_jem.from_pretrained(tmp_path)
    assert timm_jem.from_pretrained(tmp_path, replay_buffer=False).chains is None


def test_attributes_of_another_kind_are_saved_as_they_were_given_at_first(jem, tmp_path):
    names = [str(i) for i in range(jem.num_classes)]
    jem.class_names, jem.provenance = np.array(names), None
    jem.save_pretrained(tmp_path)
    loaded = timm_jem.from_pretrained(tmp_path)
    assert loaded.class_names == names
    assert loaded.provenance == {}
