"""A joint energy model is an ordinary module: the tools that load, fine-tune, shard and transform modules take it."""

import copy

import peft
import pytest
import timm
import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from safetensors.torch import load_file
from small_networks import SHAPE, Wells, in_pixels
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import timm_jem
from timm_jem import InputError

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> timm_jem.JEM:
    return timm_jem.create_model(
        "vit_tiny_patch16_224", num_classes=3, input_size=(3, 32, 32), patch_size=8, depth=2, embed_dim=16, num_heads=1
    ).eval()


def wrn(**options) -> timm_jem.JEM:
    return timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(3, 32, 32), **options).eval()


def test_timm_finds_the_data_configuration(tmp_path):
    jem = timm_jem.create_model("resnet18", num_classes=3, input_size=(3, 32, 32), class_names=["a", "b", "c"])
    jem.save_pretrained(tmp_path)
    plain = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    found = timm.data.resolve_model_data_config(jem)
    assert found == plain | {"mean": tuple(plain["mean"]), "std": tuple(plain["std"])}
    assert {key: found[key] for key in jem.data_config} == jem.data_config
    assert found["input_size"] == (3, 32, 32)
    assert timm.data.resolve_model_data_config(jem, use_test_size=True) == found


def test_no_joint_energy_model_is_made_of_another():
    jem = vit()
    for model in (jem, peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["qkv"], r=2))):
        with pytest.raises(InputError, match="joint energy model already"):
            timm_jem.wrap(model)


def test_lora_is_trained_saved_and_merged(tmp_path):
    jem = vit()
    fresh = copy.deepcopy(jem)
    before = jem(X)
    lora = peft.get_peft_model(jem, peft.LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["head"]))
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # LoRA's second factor starts at zero
        optimizer.zero_grad()
        lora.energy(X).mean().backward()
        optimizer.step()
    lora.eval()
    assert not torch.allclose(lora(X), before)
    lora.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 6  # of two blocks two factors, and the head
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(again(X), lora(X))
    merged = lora.merge_and_unload()
    assert isinstance(merged, timm_jem.JEM)
    merged.save_pretrained(tmp_path / "merged")
    read = timm_jem.from_pretrained(tmp_path / "merged")
    assert torch.equal(read(X), merged(X))
    torch.testing.assert_close(read.energy(X), again.energy(X))


def test_accelerate_saves_and_loads(tmp_path):
    jem = vit()
    Accelerator(cpu=True).save_model(jem, tmp_path)
    other = vit()
    load_checkpoint_in_model(other, tmp_path)
    assert torch.equal(other.energy(X), jem.energy(X))
    parts = {f"backbone.{name}": "cpu" for name in ("cls_token", "pos_embed", "patch_embed")}
    parts |= {"backbone.blocks": "disk", "backbone.norm": "cpu", "backbone.head": "cpu"}
    for place in ({"": "cpu"}, parts):
        with init_empty_weights():
            empty = vit()
        loaded = load_checkpoint_and_dispatch(empty, tmp_path, device_map=place, offload_folder=tmp_path / "offloaded")
        assert torch.equal(loaded.energy(X), jem.energy(X))
    # Weights that are brought when they are needed.
    offloaded = cpu_offload(copy.deepcopy(jem), execution_device="cpu")
    torch.testing.assert_close(offloaded.score(X), jem.score(X))
    seeds = {"seeds": [0, 1], "num_steps": 2}
    torch.testing.assert_close(offloaded.sample(**seeds), jem.sample(**seeds))


def test_torchs_own_state_dicts():
    jem, other = vit(), vit()
    assert list(jem.state_dict()) == [name for name, _ in jem.named_parameters()]
    set_model_state_dict(other, get_model_state_dict(jem))
    assert torch.equal(other(X), jem(X))
    assert torch.equal(functional_call(vit(), jem.state_dict(), X), jem(X))


def test_timms_moving_average():
    jem = wrn()
    ema = ModelEmaV3(jem, decay=0.5)
    old = copy.deepcopy(jem.state_dict())
    with torch.no_grad():
        for parameter in jem.parameters():
            parameter.add_(1)
    ema.update(jem)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, (old[name] + jem.state_dict()[name]) / 2)
    assert ema.module.sample(1, num_steps=1).shape == (1, 3, 32, 32)


def test_timms_freeze():
    jem = wrn(norm_layer="batchnorm2d").train()
    freeze(jem, ["backbone.stem", "backbone.norm"])
    assert {name for name, p in jem.named_parameters() if not p.requires_grad} == {"backbone.stem.weight", "backbone.stem.bias"}
    assert not isinstance(jem.backbone.norm, nn.BatchNorm2d)  # timm's frozen kind
    freeze(jem)
    assert not any(p.requires_grad for p in jem.parameters())
    unfreeze(jem)
    assert all(p.requires_grad for p in jem.parameters())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "wrn_10_1", "poolformer_s12", "xcit_nano_12_p8_224"])
@pytest.mark.parametrize("layer_decay", [0.7, None])
def test_timms_optimizers_treat_it_as_its_backbone(name, layer_decay):
    jem = timm_jem.wrap(timm.create_model(name, num_classes=3, **({"drop_path_rate": 0.0} if name == "test_vit" else {})))
    jem.backbone.reset_classifier(3)

    def of_each(model):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
        return {id(p): (g["weight_decay"], g.get("lr_scale")) for g in optimizer.param_groups for p in g["params"]}

    found = of_each(jem)
    assert found == of_each(jem.backbone) == of_each(torch.compile(jem))
    assert len(found) == len(list(jem.parameters()))
    assert (len({scale for _, scale in found.values()}) > 1) == (layer_decay is not None)


def test_a_state_dict_of_the_backbone_alone_says_where_it_goes():
    jem, other = wrn(), wrn()
    for strict in (True, False):
        with pytest.raises(InputError, match=r"use jem\.backbone\.load_state_dict"):
            other.load_state_dict(jem.backbone.state_dict(), strict=strict)
    other.backbone.load_state_dict(jem.backbone.state_dict())
    assert torch.equal(other(X), jem(X))
    other.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def empty_by_device():
    with torch.device("meta"):
        return vit()


def empty_by_accelerate():
    with init_empty_weights():
        return vit()


@pytest.mark.parametrize("make", [empty_by_device, empty_by_accelerate, lambda: vit().to("meta")])
@pytest.mark.parametrize("part", [lambda jem: jem, lambda jem: jem.backbone])
def test_weights_can_come_later(make, part):
    jem, empty = vit(), make()
    for call in (lambda: empty.energy(X), lambda: empty.score(X), lambda: empty.sample(1, num_steps=1)):
        with pytest.raises(InputError, match="meta device"):
            call()
    assert empty.energy(X.to("meta")).shape == (4,)
    assert empty.score(X.to("meta"), [0, 1, 2, 0]).shape == X.shape
    assert empty.pixel_energy(X.to("meta")).shape == (4,)
    part(empty).load_state_dict(part(jem).state_dict(), assign=True)
    empty.eval()
    assert torch.equal(empty.energy(X), jem.energy(X))
    seeds = {"seeds": [0, 1], "num_steps": 2}
    assert torch.equal(empty.sample(**seeds), jem.sample(**seeds))


def test_normalisation_has_gradients_wherever_it_was_first_used():
    jem = wrn()
    jem.double()
    with torch.inference_mode():
        jem.energy(X.double())  # made anew for this precision
    jem.pixel_energy(X.double().requires_grad_(True)).sum().backward()
    with torch.inference_mode():
        backbone = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(InputError, match="inference_mode"):
        timm_jem.wrap(backbone)


def test_energies_of_tensors_without_values():
    with FakeTensorMode():
        jem, x = wrn(), torch.randn(2, 3, 32, 32)
        assert jem.energy(x, torch.tensor([0, 1])).shape == (2,)
        assert jem.score(x).shape == x.shape
    jem = wrn()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert jem.energy(mode.from_tensor(X)).shape == (4,)
    moved = wrn().double()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert moved.energy(mode.from_tensor(X.double())).shape == (4,)
    assert type(moved.mean) is type(moved.energy(X.double())) is torch.Tensor  # nothing of it stays
    torch.testing.assert_close(make_fx(lambda x: jem.energy(x))(X)(X), jem.energy(X))


def test_model_input_on_another_device_is_refused_in_a_line():
    with FakeTensorMode():
        with torch.device("cuda"):
            jem = wrn()
        x = torch.zeros(2, 3, 32, 32)
        for ask in (jem.energy, jem.score, jem.log_density, jem.pixel_energy):
            with pytest.raises(InputError, match=r"^x is on cpu and the model on cuda:0: give x.to\(jem.device\)$"):
                ask(x)
        assert jem.energy(x.to(jem.device)).device == jem.device
    jem = wrn()
    refused = pytest.raises(InputError, match=r"^x is on cuda:0 and the model on cpu: give x.to\(jem.device\)$")
    with FakeTensorMode(allow_non_fake_inputs=True), refused:
        jem.energy(torch.zeros(2, 3, 32, 32, device="cuda"))


def test_torch_func_goes_through_energies():
    jem, y = wrn(), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(vmap(lambda x: jem.energy(x[None])[0])(X), jem.energy(X))
    torch.testing.assert_close(vmap(lambda x, y: jem.energy(x[None], y[None])[0])(X, y), jem.energy(X, y))
    torch.testing.assert_close(vmap(grad(lambda x: jem.log_density(x[None])[0]))(X), jem.score(X))


def test_programs_can_be_made_of_it():
    jem = wrn()
    assert torch.equal(torch.jit.script(jem)(X), jem(X))
    assert torch.equal(torch.jit.trace(jem, X)(X), jem(X))
    compiled = torch.compile(lambda x: jem.energy(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), jem.energy(X))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.jem = in_pixels(Wells())

    def forward(self, x, y):
        return self.jem.energy(x, y)


def test_a_program_of_energies_with_labels_takes_any_number_of_images():
    model, x, y = Conditional(), torch.zeros(7, *SHAPE), torch.arange(7) % 3
    number = {0: torch.export.Dim("number", min=2)}
    exported = torch.export.export(model, (x[:4], y[:4]), dynamic_shapes={"x": number, "y": number})
    torch.testing.assert_close(exported.module()(x, y), model(x, y))
