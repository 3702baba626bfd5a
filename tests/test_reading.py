"""Folders of any origin: what is broken, hostile or half of something else costs little and is refused in one line."""

import contextlib
import json
import resource
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm_families import SMALLEST
from torch import nn

import timm_jem
from timm_jem import InputError
from timm_jem.hub import reading
from timm_jem.training import ModelConfig, Settings


@pytest.fixture
def jem():
    torch.manual_seed(0)
    return timm_jem.create_model(
        "wrn_10_1", num_classes=3, input_size=(1, 8, 8), class_names=["a", "b", "c"], act_layer="silu"
    ).eval()


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def set_pretrained(folder, **changes):
    edit(folder, pretrained_cfg={**json.loads((folder / "config.json").read_text())["pretrained_cfg"], **changes})


def set_args(folder, **arguments):
    edit(folder, model_args={"in_chans": 1, **arguments})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no pickle is read"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
        (lambda f: edit(f, architecture="wrn_10_11"), "did you mean wrn_10_1"),
        (lambda f: edit(f, architecture=None), "architecture in config.json is a NoneType"),
        (lambda f: edit(f, architecture="hf-hub:user/other"), "not the name of a timm model"),
        (lambda f: edit(f, architecture="../../evil"), "unknown model"),
        (lambda f: edit(f, num_classes="3"), "num_classes in config.json is a str"),
        (lambda f: edit(f, num_classes=-4, model_args={"in_chans": 1, "num_classes": 3}), "says num_classes -4 and builds 3"),
        (lambda f: edit(f, num_classes=7, model_args={"in_chans": 1, "num_classes": 3}), "says num_classes 7 and builds 3"),
        (
            lambda f: edit(f, num_classes=10**9, model_args={"in_chans": 1}),
            r"'num_classes' in config.json is 1000000000: no model's is above",
        ),
        (lambda f: edit(f, num_classes=7, model_args={"in_chans": 1}), r"holds 'fc.*' of shape"),
        (lambda f: set_args(f, num_classes=10**9), "num_classes.* no model's is above"),
        (lambda f: edit(f, pretrained_cfg=[]), "pretrained_cfg in config.json is a list"),
        (lambda f: edit(f, pretrained_cfg={"colour": 3}), "config.json"),
        (lambda f: edit(f, pretrained_cfg={"input_size": "x"}), "m"),
        (lambda f: edit(f, model_args=[1]), "model_args in config.json is a list"),
        (lambda f: set_args(f, colour=3), "can't be built"),
        (lambda f: set_args(f, act_layer="__import__('os').system('true')"), "can't be built"),
        (lambda f: set_args(f, checkpoint_path="evil.pth"), "checkpoint_path"),
        (lambda f: set_args(f, pretrained_strict=False), "pretrained_strict"),
        (lambda f: set_args(f, features_only=True), "features_only"),
        (lambda f: set_args(f, drop_rate=10**12), "drop_rate.* no model's is above"),
        (lambda f: set_args(f, drop_rate=float("nan")), "drop_rate.* is nan: no model's is above"),
        (lambda f: set_args(f, act_layer=json.loads("[" * 400 + "]" * 400)), "nested too deep"),
        (lambda f: set_pretrained(f, input_size=[1, 10**9, 10**9]), "input_size.* no model's is above 2,048"),
        (lambda f: set_pretrained(f, input_size=[1, -8, 8]), "input_size is -8"),
        (lambda f: set_pretrained(f, input_size=[8, 8]), "m"),
        (lambda f: set_pretrained(f, mean="grey"), "m"),
        (lambda f: set_pretrained(f, std=[0.0]), "std"),
        (lambda f: set_args(f, in_chans=10**6), "in_chans.* no model's is above 16,384"),
        (lambda f: edit(f, architecture="test_vit", model_args={"depth": 10**6}), "depth.* above 16,384"),
        (lambda f: edit(f, timm_jem={"format_version": reading.FORMAT_VERSION + 1}), "upgrade timm_jem"),
        (lambda f: edit(f, timm_jem=[]), "timm_jem in config.json is a list"),
        (lambda f: edit(f, timm_jem={"sgld": [1]}), "timm_jem.sgld"),
        (lambda f: edit(f, timm_jem={"provenance": "x"}), "timm_jem.provenance"),
        (lambda f: edit(f, timm_jem={"sgld": {"speed": 1}}), "speed"),
        (lambda f: edit(f, timm_jem={"sgld": {"num_steps": "many"}}), "num_steps is 'many'"),
        (truncate, "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04}\x94."), "not a complete safetensors file"),
        (lambda f: weights(f, lambda t: t.pop("fc.bias")), r"lacks \['fc.bias'\]"),
        (lambda f: weights(f, lambda t: t.update(extra=torch.zeros(3))), r"holds \['extra'\], which"),
        (lambda f: weights(f, lambda t: t.update({"fc.bias": torch.zeros(9)})), "holds 'fc.bias' of shape"),
    ],
)
def test_broken_and_hostile_folders_are_named(jem, tmp_path, damage, message):
    jem.save_pretrained(tmp_path)
    damage(tmp_path)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message) as error:
        timm_jem.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 500_000  # KiB


def test_a_run_is_its_model(jem, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(InputError, match=rf"^{tmp_path}: a run without a model: wait for it to end"):
        timm_jem.from_pretrained(tmp_path)
    jem.save_pretrained(tmp_path / "model")
    x = torch.rand(2, *jem.input_size)
    assert timm_jem.from_pretrained(tmp_path)(x).equal(jem(x))
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'model'}: config.json is not JSON"):
        timm_jem.from_pretrained(tmp_path)
    jem.save_pretrained(tmp_path)  # a model that has another beside it
    assert timm_jem.from_pretrained(tmp_path)(x).equal(jem(x))
    assert Settings(model=ModelConfig(str(tmp_path))).model.name == f"local-dir:{tmp_path}"


def test_weights_come_from_the_folder_whatever_its_config_says(jem, tmp_path):
    jem.save_pretrained(tmp_path)
    elsewhere = {"source": "url", "url": "http://127.0.0.1:9/evil.pth", "file": "/evil.pth", "hf_hub_id": "user/evil"}
    set_pretrained(tmp_path, **elsewhere, custom_load=True, hf_hub_filename="../evil.bin")
    edit(tmp_path, label_names=5)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04}\x94.")
    again = timm_jem.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), jem(x))
    assert again.class_names is None


SMALL = {
    "vit": ("vit_tiny_patch16_224", {"input_size": (3, 32, 32), "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"input_size": (3, 32, 32), "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 1, 1)},
    ),
    "tiny_vit": ("tiny_vit_5m_224", {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}),
    "resnet": ("test_resnet", {"input_size": (3, 32, 32)}),
    "dla": ("dla46x_c", {"input_size": (3, 32, 32)}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of small models, by family."""
    folders = {}
    for family, (name, kwargs) in SMALL.items():
        folders[family] = tmp_path_factory.mktemp(family)
        timm_jem.create_model(name, num_classes=3, **kwargs).save_pretrained(folders[family])
    return folders


@pytest.fixture
def folder_of(saved, tmp_path):
    def copied(family):
        return shutil.copytree(saved[family], tmp_path / family)

    return copied


def no_classes(folder, **pretrained):
    config = json.loads((folder / "config.json").read_text())
    del config["num_classes"]
    config["pretrained_cfg"] = {**config["pretrained_cfg"], **pretrained}
    (folder / "config.json").write_text(json.dumps(config))


def many_tensors(folder, n, length):
    weights(folder, lambda t: t.update({f"{'e' * length}{i}": torch.empty(0) for i in range(n)}))


def more_args(folder, **arguments):
    edit(folder, model_args={**json.loads((folder / "config.json").read_text())["model_args"], **arguments})


@pytest.mark.parametrize(
    ("family", "damage", "message"),
    [
        ("resnet", lambda f: no_classes(f, num_classes=2**20), "far larger model"),
        ("vit", lambda f: set_pretrained(f, fixed_input_size=True, input_size=[3, 2**15, 2**15]), "above 2,048"),
        ("vit", lambda f: more_args(f, img_size=2048), "holds 'pos_embed' of shape"),
        ("swin", lambda f: more_args(f, window_size=100, img_size=400), "far larger model"),
        ("swin", lambda f: more_args(f, img_size=4096), "above 2,048"),
        ("swin", lambda f: more_args(f, depths=[2**14] * 4), "far larger model"),
        ("swin", lambda f: more_args(f, depths=[2**14] * 9), "add up to"),
        ("swin", lambda f: more_args(f, depths=[1] * 10**5), "more than 5,000 values"),
        ("vit", lambda f: more_args(f, embed_dim=8192, device="cpu"), "'device', which no saved model needs"),
        ("vit", lambda f: more_args(f, device="meta"), "'device', which no saved model needs"),
        ("vit", lambda f: more_args(f, dtype="float64"), "'dtype', which no saved model needs"),
        ("vit", lambda f: more_args(f, exportable=True), "'exportable', which no saved model needs"),
        ("vit", lambda f: more_args(f, depth=2**14), "far larger model"),
        ("vit", lambda f: more_args(f, depth=2**20), "above 16,384"),
        ("vit", lambda f: more_args(f, act_layer="\x1b[2J" * 10**5), "a text of 400,000 characters"),
        ("vit", lambda f: many_tensors(f, 10**5, 9), r"header of 7,\d{3} KiB: above 4,096"),
        ("vit", lambda f: many_tensors(f, 30_000, 1), "tensors: no model has more than 20,000"),
        ("tiny_vit", lambda f: more_args(f, window_sizes=[7, 400, 7, 7]), "far larger model"),
        ("tiny_vit", lambda f: more_args(f, window_sizes=[7, 2048, 7, 7]), "far larger model"),
        ("tiny_vit", lambda f: more_args(f, window_sizes=[7, 2**20, 7, 7]), "above 2,048"),
        # A head of random weights, if timm were let.
        ("vit", lambda f: (more_args(f, num_classes=3), no_classes(f, num_classes=None)), "says num_classes"),
        ("vit", lambda f: (more_args(f, num_classes=3), no_classes(f, num_classes=7)), "says num_classes 7 and builds 3"),
        ("vit", lambda f: edit(f, num_classes=0), "of no classes"),
        # timm loads dla without asking for all of its weights.
        ("dla", lambda f: weights(f, lambda t: t.pop("fc.bias")), r"lacks \['fc.bias'\]"),
        ("dla", lambda f: weights(f, lambda t: t.update(bias=t.pop("fc.bias"))), r"lacks \['fc.bias'\]"),
        ("vit", lambda f: weights(f, lambda t: t.update(cls_token=t["cls_token"].int())), "as no floating point"),
        ("vit", lambda f: weights(f, lambda t: t["norm.bias"].fill_(torch.nan)), "'norm.bias' with values that are not finite"),
        ("vit", lambda f: set_pretrained(f, architecture="resnet18"), "its pretrained_cfg of 'resnet18'"),
        ("vit", lambda f: set_pretrained(f, mean=1.5), "pretrained_cfg.mean in config.json is 1.5: give a list"),
        ("vit", lambda f: set_pretrained(f, std=[{}]), "pretrained_cfg.std"),
        ("vit", lambda f: edit(f, architecture="x" * 10**5), "unknown model 'xxx"),
        ("vit", lambda f: edit(f, timm_jem={"format_version": "9" * 10**5}), "format version '999"),
        ("vit", lambda f: edit(f, timm_jem={"sgld": {"step_size": 10**400}}), "step_size is 1000"),
        ("vit", lambda f: edit(f, timm_jem={"provenance": json.loads('{"a":' * 60 + "1" + "}" * 60)}), "nested too deep"),
        ("vit", lambda f: (f / "config.json").write_text('{"architectures": ["ViT"]}'), "architectures, as transformers"),
        ("vit", lambda f: (f / "config.json").write_text("{}"), "no architecture: give a model of timm"),
    ],
)
def test_what_no_model_has_costs_nothing(folder_of, family, damage, message):
    folder = folder_of(family)
    damage(folder)
    memory, time = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(InputError, match=message) as error:
        timm_jem.from_pretrained(folder)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600 + len(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - time < 5


def test_plain_timm_folders_are_not_resized_either(folder_of):
    folder = folder_of("vit")
    config = json.loads((folder / "config.json").read_text())
    del config["timm_jem"]
    (folder / "config.json").write_text(json.dumps(config))
    timm_jem.from_pretrained(folder)
    more_args(folder, img_size=64)
    with pytest.raises(InputError, match="holds 'pos_embed' of shape"):
        timm_jem.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_nothing_is_loaded_onto_no_device(folder_of):
    folder = folder_of("vit")
    with torch.device("meta"), pytest.raises(InputError, match="on the meta device, without weights"):
        timm_jem.from_pretrained(folder)


def test_threads_load_together_and_leave_others_alone(saved):
    """Some load, others build modules of their own, and every thread keeps its profiler."""
    built, done = [], threading.Event()

    def stranger():
        sys.setprofile(lambda *_: None)
        mine = sys.getprofile()
        while not done.is_set():
            built.append(nn.Linear(3, 3).weight.device.type)
        assert sys.getprofile() is mine
        sys.setprofile(None)

    expected = {family: load_file(folder / "model.safetensors") for family, folder in saved.items()}
    families = [family for family in ("vit", "swin", "resnet", "tiny_vit") for _ in range(4)]
    with ThreadPoolExecutor(8) as threads, ThreadPoolExecutor(1) as aside:
        outsider = aside.submit(stranger)
        loaded = list(threads.map(lambda family: timm_jem.from_pretrained(saved[family]), families))
        done.set()
        outsider.result()
    assert set(built) == {"cpu"}
    for family, jem in zip(families, loaded, strict=True):
        state = jem.backbone.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected[family].items())


@pytest.mark.parametrize(
    ("kind", "value", "fine"),
    [
        (torch.Tensor, torch.tensor(-torch.inf), True),  # a bound that is none
        (torch.Tensor, torch.tensor(torch.nan), False),
        (torch.Tensor, torch.tensor([1.0, torch.inf]), False),  # as a BatchNorm's statistics that broke
        (torch.nn.Parameter, torch.tensor(torch.inf), False),
    ],
)
def test_bounds_of_a_clamp_may_be_infinite(kind, value, fine):
    model = torch.nn.Linear(2, 2)
    if kind is torch.Tensor:
        model.register_buffer("least", value)
    else:
        model.least = kind(value)
    with contextlib.nullcontext() if fine else pytest.raises(InputError, match="'least' with values that are not finite"):
        reading.check_finite(model, "it has")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALLEST.values() if name != "coat_tiny"])  # timm can't save tied layers
def test_every_family_is_within_bounds(name, tmp_path):
    backbone = timm.create_model(name, num_classes=7)
    timm.models.save_for_hf(backbone, tmp_path, safe_serialization=True)
    edit(tmp_path, timm_jem={})
    state = timm_jem.from_pretrained(tmp_path).backbone.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in backbone.state_dict().items())
