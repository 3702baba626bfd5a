import pytest
import timm
import torch
import torch.nn.functional as F

import timm_jem


def test_the_papers_network():
    model = timm.create_model("wrn_28_10", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 36_471_338
    kinds = {type(m).__name__ for m in model.modules()}
    assert not any("Norm" in kind for kind in kinds)
    assert all(m.bias is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    slopes = {m.negative_slope for m in model.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.2}
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 640, 8, 8)


def test_forward_equals_the_network_written_out():
    model = timm.create_model("wrn_10_1", num_classes=5, in_chans=2).double().eval()
    p = dict(model.named_parameters())

    def conv(x, name, **kwargs):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **kwargs)

    x = torch.randn(3, 2, 12, 16, dtype=torch.float64)
    h = conv(x, "stem", padding=1)
    for stage, stride in enumerate((1, 2, 2)):
        block = f"stages.{stage}.0"
        raw = h if stage == 0 else conv(h, f"{block}.shortcut", stride=stride)
        out = conv(F.leaky_relu(h, 0.2), f"{block}.conv1", padding=1)
        h = conv(F.leaky_relu(out, 0.2), f"{block}.conv2", stride=stride, padding=1) + raw
    expected = F.leaky_relu(h, 0.2).mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    torch.testing.assert_close(model(x), expected)


def work(model: torch.nn.Module) -> int:
    """Multiplications of convolutions and the head for one image, on the meta device."""
    counts = []

    def count(module, given, out):
        counts.append(out.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32, device="meta"))
    return sum(counts)


@pytest.mark.parametrize(
    ("name", "parameters", "gigas"),
    [
        ("wrn_28_10", 36_471_338, 5.95),
        ("wrn_16_8", 10_958_666, 2.00),
        ("wrn_16_8_original", 10_961_370, 1.55),
        ("wrn_28_10_original", 36_479_194, 5.25),
        ("wrn_34_10_original", 46_160_474, 6.66),
        ("wrn_70_16_original", 266_796_506, 38.8),
    ],
)
def test_size_and_work(name, parameters, gigas):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert work(model) / 1e9 == pytest.approx(gigas, rel=5e-3)


def test_the_original_network_written_out():
    """Of width 1, so that the first stage has no shortcut of its own and the others have one of the activated input."""
    model = timm.create_model("wrn_28_10_original", depth=10, width=1, num_classes=5).double()
    assert not any(m.bias is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    p = dict(model.named_parameters())

    def norm(x, name):
        return F.relu(F.batch_norm(x, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True))

    x = torch.randn(3, 3, 12, 16, dtype=torch.float64)
    h = F.conv2d(x, p["stem.weight"], padding=1)
    for stage, stride in enumerate((1, 2, 2)):
        block = f"stages.{stage}.0"
        activated = norm(h, f"{block}.norm1")
        out = F.conv2d(activated, p[f"{block}.conv1.weight"], stride=stride, padding=1)
        shortcut = h if stage == 0 else F.conv2d(activated, p[f"{block}.shortcut.weight"], stride=stride)
        h = F.conv2d(norm(out, f"{block}.norm2"), p[f"{block}.conv2.weight"], padding=1) + shortcut
    expected = norm(h, "norm").mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("option", [{"stride_first": True}, {"conv_bias": False}, {"shortcut_activated": True}])
def test_each_option_of_a_block_alone(option):
    torch.manual_seed(0)
    plain, changed = timm.create_model("wrn_10_1"), timm.create_model("wrn_10_1", **option)
    assert changed.load_state_dict(plain.state_dict(), strict=False).missing_keys == []
    block, convolutions = changed.stages[1][0], [m for m in changed.modules() if isinstance(m, torch.nn.Conv2d)]
    assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if "stride_first" in option else ((1, 1), (2, 2)))
    assert {c.bias is not None for c in convolutions} == {"conv_bias" not in option}
    x = torch.randn(2, 3, 16, 16)
    assert changed(x).shape == plain(x).shape
    assert not torch.allclose(changed(x), plain(x))


@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 4), (4, 8)])
def test_a_stem_of_any_stride_sees_all_pixels_equally_often(stride, kernel):
    model = timm.create_model("wrn_10_1", stem_stride=stride)
    assert (model.stem.kernel_size, model.stem.stride) == ((kernel, kernel), (stride, stride))
    torch.nn.init.ones_(model.stem.weight)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model.stem(x).sum().backward()
    inside = x.grad[:, :, kernel:-kernel, kernel:-kernel]
    assert (inside == 16 * (kernel // stride) ** 2).all()
    assert (x.grad > 0).all()
    features = timm.create_model("wrn_10_1", features_only=True, stem_stride=stride)
    assert features.feature_info.reduction() == [stride, 2 * stride, 4 * stride]
    assert [f.shape[-1] for f in features(x)] == [32 // stride, 16 // stride, 8 // stride]


@pytest.mark.parametrize("stride", [3, 0, True, 2.0, "2"])
def test_another_stride_of_the_stem_is_refused(stride):
    with pytest.raises(ValueError, match=f"stem of stride 1, 2 or 4, not {stride!r}"):
        timm.create_model("wrn_10_1", stem_stride=stride)


@pytest.mark.parametrize("name", ["wrn_10_2", "wrn_16_4", "wrn_40_2"])
def test_smaller_members_take_small_grey_images(name):
    model = timm.create_model(name, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert model.num_classes == 7


def test_options():
    model = timm.create_model("wrn_10_1", norm_layer="batchnorm2d", act_layer="silu", num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 2 * 3 + 1
    assert not any(isinstance(m, torch.nn.LeakyReLU) for m in model.modules())
    model.reset_classifier(4)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 64)


def test_weights_are_made_where_and_as_timm_users_say():
    model = timm.create_model("wrn_10_2", norm_layer="batchnorm2d", device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_features_and_checkpointing_as_timm_users_expect():
    features = timm.create_model("wrn_10_1", features_only=True)(torch.zeros(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    model = timm.create_model("wrn_10_1")
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), plain)
    model(x).sum().backward()
    assert model.stem.weight.grad is not None


def test_the_original_network_is_named_where_there_is_no_other():
    with pytest.raises(timm_jem.InputError, match=r"unknown model 'wrn_34_10': did you mean wrn_34_10_original\?"):
        timm_jem.create_model("wrn_34_10")


def test_impossible_depths_are_refused():
    with pytest.raises(ValueError, match="6n \\+ 4"):
        timm.create_model("wrn_10_1", depth=12)
    with pytest.raises(ValueError, match="width of at least 1"):
        timm.create_model("wrn_10_1", width=0)


@pytest.mark.parametrize(("pool", "features"), [("avg", 64), ("max", 64), ("avgmax", 64), ("catavgmax", 128)])
def test_every_pooling_of_timm(pool, features):
    model = timm.create_model("wrn_10_1", num_classes=3, global_pool=pool)
    x = torch.randn(2, 3, 8, 8)
    assert model.fc.in_features == features
    assert model(x).shape == (2, 3)
    model = timm.create_model("wrn_10_1", num_classes=3)
    model.reset_classifier(5, global_pool=pool)
    assert model(x).shape == (2, 5)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, features)
