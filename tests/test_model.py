import copy
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm_families import SMALLEST, ZERO_HEADS
from torch import nn

import timm_jem
from timm_jem import InputError, SGLDConfig, modes
from timm_jem.data import DataConfig, load_splits
from timm_jem.modes import frozen
from timm_jem.pixels import to_pixels

# Convolutions with BatchNorm, LayerNorm, GroupNorm-free and scaled; transformers with fixed and free input sizes, with
# distilled and attention-pooling heads; mixers; recurrences; a zero head.
REPRESENTATIVE = [
    "test_resnet",
    "test_convnext",
    "test_vit",
    "test_nfnet",
    "test_efficientnet",
    "test_mambaout",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilevit_xxs",
    "ghostnet_050",
    "gmlp_s16_224",
    "mobilenetv3_small_050",
    "xcit_nano_12_p8_224",
]


def check_backbone(name: str) -> None:
    """Bit-equal logits in train and eval; energy and score equal to autograd of their formulas; nothing mutated."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    large = max(model.pretrained_cfg["input_size"]) > 512 and not model.pretrained_cfg.get("fixed_input_size")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # deepseek_vit_412m would take 22 GB for images of its usual size
        jem = timm_jem.wrap(model, input_size=model.pretrained_cfg.get("min_input_size") if large else None)
    assert any("all zeros" in str(w.message) for w in caught) == (name in ZERO_HEADS)
    if name in ZERO_HEADS:
        model.reset_classifier(10)
    x, y = torch.randn(2, *jem.input_size), torch.tensor([3, 7])
    for train in (True, False):
        twin = copy.deepcopy(model).train(train)
        jem.train(train)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = twin(x)
            torch.manual_seed(1)
            assert torch.equal(jem(x), expected)
        del twin

    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    kept = x.clone()
    with torch.no_grad():
        e, exy, score = jem.energy(x), jem.energy(x, y), jem.score(x)
        sample = jem.sample(2, y=y, num_steps=1, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_(True)
    logits = model(leaf)
    # Fresh BatchNorm networks in eval mode have logits of any size; errors are relative to them.
    scale = logits.abs().max().item()
    torch.testing.assert_close(e, -logits.logsumexp(1), rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(exy, -logits[[0, 1], y], rtol=1e-5, atol=1e-5 * scale)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    torch.testing.assert_close(score, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert e.isfinite().all()
    assert sample.shape == x.shape

    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_backbones(name):
    check_backbone(name)


def test_the_table_of_families_is_whole():
    from timm.models import list_modules

    # Those of this package and of tests register their own.
    timms = {family for family in list_modules() if f"timm.models.{family}" in sys.modules}
    assert timms <= set(SMALLEST)
    assert len(timms) >= 98


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALLEST)
def test_every_family(family):
    check_backbone(SMALLEST[family])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm_jem.create_model("inception_v4", num_classes=2, input_size=(3, 64, 64)), "Kernel size.*another size$"),
        (
            lambda: timm_jem.create_model("test_resnet", num_classes=2, global_pool="", input_size=(3, 64, 64)),
            "test_resnet can't.*build it with pooling$",
        ),
        (lambda: timm_jem.wrap(timm.create_model("wrn_10_1", num_classes=2, global_pool="")), "build it with pooling$"),
        (
            lambda: timm_jem.wrap(timm.create_model("test_vit", dynamic_img_size=True), input_size=(3, 50, 50)),
            "divisible by.*another size$",
        ),
    ],
)
def test_a_size_that_a_backbone_can_not_take_is_said_at_once(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_a_size_is_tried_without_a_trace():
    model = timm.create_model("test_resnet", num_classes=2).train()
    before = copy.deepcopy(model.state_dict())
    timm_jem.wrap(model, input_size=(3, 48, 48))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())
    model = timm.create_model("test_resnet", num_classes=2, global_pool="").train()
    with pytest.raises(InputError, match="can't take images"):  # which the model itself has shown
        timm_jem.wrap(model, input_size=(3, 48, 48))
    assert all(part.training for part in model.modules())


def test_pixels_that_patches_leave_out_are_said():
    small = {"num_classes": 2, "depth": 1}
    with pytest.warns(UserWarning, match="does not look at 67% of the pixels of 28×28 images.* take sides that 16 divides"):
        jem = timm_jem.create_model("vit_tiny_patch16_224", input_size=(3, 28, 28), **small).eval()
    assert (jem.score(torch.randn(4, 3, 28, 28)) != 0).any(0).any(0).sum() == 16 * 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_jem.create_model("vit_tiny_patch16_224", input_size=(3, 32, 32), **small)


def test_a_mean_of_other_units_is_said():
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.warns(UserWarning, match=r"0\.\.255: give mean and std in \[0, 1\] units"):
        timm_jem.wrap(model, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))


def test_a_clip_embedding_is_no_classes(recwarn):
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    for name, classes in (("vit_xsmall_patch16_clip_224", 3), ("test_vit", 512)):
        timm_jem.create_model(name, num_classes=classes, **(small if "clip" in name else {}))
    assert not [warning for warning in recwarn if "CLIP" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"the 512 outputs of vit_xsmall\S* are a CLIP embedding and no classes"):
        timm_jem.create_model("vit_xsmall_patch16_clip_224", **small)


def test_numbers_of_numpy_and_tensors_are_saved(tmp_path):
    many = {"num_classes": np.int64(3), "input_size": tuple(np.array([1, 8, 8])), "drop_rate": np.float32(0.5)}
    timm_jem.create_model("wrn_10_1", **many).save_pretrained(tmp_path / "a")
    model = timm.create_model("wrn_10_1", num_classes=3)
    timm_jem.wrap(model, mean=tuple(np.float32([0.5] * 3)), std=torch.tensor([0.25] * 3)).save_pretrained(tmp_path / "b")
    assert timm_jem.from_pretrained(tmp_path / "a").num_classes == 3
    assert timm_jem.from_pretrained(tmp_path / "b").std.flatten().tolist() == [0.25] * 3


def test_weights_that_can_not_be_read_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint_path is '.*none.pth', and there is no such file"):
        timm_jem.create_model("wrn_10_1", num_classes=3, checkpoint_path=tmp_path / "none.pth")
    for name, content in (("empty.pth", b""), ("odd.safetensors", b"x" * 100), ("text.pth", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"of wrn_10_1 can't be read \((EOFError|.*header)|KeyError: 101") as error:
            timm_jem.create_model("wrn_10_1", num_classes=3, checkpoint_path=str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.fixture
def jem():
    torch.manual_seed(0)
    return timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32)).eval()


def test_the_state_dict_is_an_ordinary_modules(jem):
    assert list(jem.state_dict()) == [f"backbone.{key}" for key in jem.backbone.state_dict()]
    assert {name for name, _ in jem.named_parameters()} <= set(jem.state_dict())
    other = timm_jem.create_model("test_resnet", num_classes=4, input_size=(3, 32, 32)).eval()
    nn.ModuleDict({"inner": other}).load_state_dict(nn.ModuleDict({"inner": jem}).state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), jem(x))
    timm.create_model("test_resnet", num_classes=4).load_state_dict(jem.backbone.state_dict())


def test_normalisation_is_timms():
    jem = timm_jem.create_model(model_name="test_resnet", num_classes=2)  # as timm calls it
    images = torch.randint(256, (2, 3, 8, 8)).float()
    mean, std = (torch.tensor(jem.backbone.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    u = images / 127.5 - 1
    torch.testing.assert_close(jem.normalize(u), (images / 255 - mean) / std)
    torch.testing.assert_close(jem.denormalize(jem.normalize(u)), u)
    halves = timm_jem.create_model("wrn_10_1", num_classes=2)
    assert torch.equal(halves.normalize(u), u)
    assert torch.equal(halves.denormalize(u), u)


def test_grey_input():
    jem = timm_jem.create_model("test_resnet", num_classes=2, input_size=(1, 32, 32), std=None)
    assert jem.input_size == (1, 32, 32)
    assert jem.mean.shape == (1, 1, 1, 1)
    assert jem.energy(torch.zeros(2, 1, 32, 32)).shape == (2,)


def test_step_sizes_are_in_pixels():
    """One noise-free step moves pixels by ∇ of the energy of pixels, whatever the normalisation."""
    jem = timm_jem.create_model("test_resnet", num_classes=2, input_size=(3, 16, 16)).eval()
    u = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(jem.pixel_energy(u).sum(), u)
    config = SGLDConfig(noise_std=0.0, step_size=3.0)
    x = jem.sample(init=jem.normalize(u.detach()), sgld_config=config, num_steps=1)
    torch.testing.assert_close(jem.denormalize(x), u.detach() - 3.0 * gradient, rtol=1e-4, atol=1e-5)


def test_sampling_is_reproducible_and_split_invariant(jem):
    def draw(seed, batch_size=256):
        return jem.sample(
            6, y=torch.tensor([0, 1, 2, 3, 0, 1]), num_steps=3, generator=torch.Generator().manual_seed(seed),
            batch_size=batch_size,
        )  # fmt: skip

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    for size in (1, 4):
        torch.testing.assert_close(draw(0, size), first, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert jem(first).shape == (6, 4)


@pytest.fixture
def one_thread():
    """Several share a product by its size, and round by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("wrn_10_1", {"input_size": (1, 8, 8), "act_layer": "silu"}, 0),
        ("resnet18", {"input_size": (3, 8, 8)}, 0),
        ("vit_tiny_patch16_224", {"input_size": (3, 16, 16), "patch_size": 8, "depth": 2, "embed_dim": 48}, 0),
        ("wrn_10_2", {"input_size": (3, 16, 16)}, 1e-5),  # its 1×1 convolutions round by the size of a batch
    ],
)
def test_a_picture_is_its_seed_and_its_class(one_thread, name, options, tolerance):
    torch.manual_seed(0)
    jem = timm_jem.create_model(name, num_classes=10, **options).eval()

    def draw(*args, **kwargs):
        return jem.sample(*args, num_steps=3, **kwargs)

    def assert_same(a, b, least=0.0):
        torch.testing.assert_close(a, b, rtol=0, atol=max(tolerance, least))

    y, state = torch.arange(16) % 10, torch.get_rng_state()
    together = draw(y=y, seeds=range(16))
    for rows in (slice(3, 4), slice(0, 8), slice(5, 16, 3)):
        assert_same(draw(y=y[rows], seeds=range(16)[rows]), together[rows])
    assert_same(draw(y=7, seeds=[2]), draw(y=7, seeds=[0, 1, 2, 3])[2:3])
    assert_same(draw(y=y.flip(0), seeds=torch.arange(16).flip(0)), together.flip(0))
    for size in (1, 2, 3, 7, 16):
        assert_same(draw(y=y, seeds=range(16), batch_size=size), together)

    def drawn(n):
        return draw(n, y=3, generator=torch.Generator().manual_seed(0))

    assert_same(drawn(16)[:8], drawn(8))
    assert_same(drawn(16)[:1], drawn(1))
    assert torch.equal(torch.get_rng_state(), state)
    # E(x): the gradient of the last product mixes the rows of all classes, and rounds.
    of_x = draw(seeds=range(16))
    for n, size in ((1, 256), (8, 256), (16, 3)):
        assert_same(draw(seeds=range(n), batch_size=size), of_x[:n], least=1e-5)


def test_pictures_of_one_generator_go_on(jem):
    y, generator = torch.arange(6) % 4, torch.Generator().manual_seed(0)
    parts = [jem.sample(y=part, num_steps=2, generator=generator) for part in y.split(3)]
    whole = jem.sample(y=y, num_steps=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cat(parts), whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.testing.assert_close(jem.sample(y=y, num_steps=2), whole)


def test_seeds_go_with_images_to_start_from(jem):
    init = torch.zeros(3, 3, 32, 32)
    x = jem.sample(init=init, seeds=[1, 2, 1], num_steps=2)
    torch.testing.assert_close(x[0], x[2])
    assert not torch.allclose(x[0], x[1])


def test_the_noise_of_a_seed_is_single_precision_whatever_the_default(jem):
    expected = jem.sample(2, seeds=[0, 1], num_steps=2)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(jem.sample(2, seeds=[0, 1], num_steps=2), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sampling_leaves_the_model_as_it_was(jem):
    jem.train()
    jem.backbone.layer1.eval()
    jem.backbone.fc.weight.requires_grad_(False)
    jem(torch.randn(4, 3, 32, 32)).sum().backward()
    before = {k: v.clone() for k, v in jem.state_dict().items()}
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in jem.named_parameters()}
    flags = [m.training for m in jem.modules()], [p.requires_grad for p in jem.parameters()]
    jem.sample(2, num_steps=2)
    assert all(torch.equal(v, before[k]) for k, v in jem.state_dict().items())
    assert flags == ([m.training for m in jem.modules()], [p.requires_grad for p in jem.parameters()])
    for k, p in jem.named_parameters():
        assert (p.grad is None) == (grads[k] is None)
        assert p.grad is None or torch.equal(p.grad, grads[k])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_score_and_sample_work_without_gradients(jem, context):
    x = torch.randn(2, 3, 32, 32)
    expected = jem.score(x)
    with context():
        torch.testing.assert_close(jem.score(x), expected)
        torch.testing.assert_close(jem.score(torch.clone(x)), expected)
        sample = jem.sample(2, num_steps=1)
        labels = torch.tensor([1, 2])
        assert jem.score(x, labels).isfinite().all()
        assert jem.sample(y=labels, num_steps=2).isfinite().all()
        made_here = x.clone()
    jem.energy(made_here).sum().backward()
    jem.energy(x, labels).sum().backward()
    jem.pixel_energy(x, labels).sum().backward()
    assert not sample.requires_grad
    assert (sample + 1).shape == x.shape


def test_the_models_own_settings_are_the_defaults_of_sample(jem):
    seen = []
    jem.sgld = SGLDConfig(num_steps=2, sample_steps=3, denoise_steps=1)
    jem.sample(1, on_step=lambda step, u: seen.append(step))
    jem.sample(1, num_steps=1, on_step=lambda step, u: seen.append(step))
    jem.sgld = SGLDConfig(num_steps=2)
    jem.sample(1, on_step=lambda step, u: seen.append(step))
    assert seen == [1, 2, 3, 1, 1, 2]


def test_a_chain_that_goes_on_has_noise_in_each_step():
    jem = timm_jem.from_pretrained("digits")
    x = jem.sample(2, seeds=[1, 2], num_steps=5)
    assert jem.sgld.denoise_steps > 2
    assert not torch.equal(*(jem.sample(init=x, seeds=seeds, num_steps=2) for seeds in ([1, 2], [3, 4])))


def test_fresh_chains_rest_at_energies_of_held_out_images():
    jem = timm_jem.from_pretrained("digits")
    images, y = load_splits(DataConfig()).val, torch.arange(10)
    jem.fit_reference(jem.normalize(to_pixels(images.images)), images.labels)
    settings = {"y": y, "seeds": range(10), "num_steps": 100}
    for share in (0.25, 0.75):
        rests = replace(jem.sgld, rest=share, denoise_steps=0, noise_std=0.0)
        plain = replace(rests, rest=None)
        with torch.no_grad():
            rested, fallen = (jem.energy(jem.sample(**settings, sgld_config=config), y) for config in (rests, plain))
        assert ((rested <= jem.reference.at(share, y)) | (rested == fallen)).all()
        assert (rested > fallen).any()
    x = jem.sample(y=y, seeds=range(10), num_steps=2)
    on = [jem.sample(init=x, y=y, seeds=range(10), num_steps=3, sgld_config=config) for config in (rests, plain)]
    assert torch.equal(*on)  # a chain that goes on does not rest
    jem.reference = None
    with pytest.raises(InputError, match="call fit_reference, or set rest to None"):
        jem.sample(2, sgld_config=rests)


def test_class_conditional_chains_descend_their_own_energy():
    class Wells(nn.Module):
        num_classes = 3

        def forward(self, x):
            centres = torch.tensor([-0.5, 0.0, 0.5]).view(1, 3, 1, 1)
            return -(x - centres).square().sum((2, 3)) / 2

    jem = timm_jem.JEM(Wells(), data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)})
    x = jem.sample(y=[0, 2, 1], sgld_config=SGLDConfig(noise_std=0.0, step_size=0.5), num_steps=30)
    torch.testing.assert_close(x, torch.tensor([-0.5, 0.5, 0.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2))
    assert jem.sample(5, y=1, num_steps=1).shape == (5, 1, 2, 2)


def in_autocast(jem, x):
    with torch.autocast("cpu"):
        return jem.energy(x)


def bad_input(jem):
    x = torch.zeros(2, 3, 32, 32)
    return {
        "rank": (lambda: jem.energy(x[0]), r"shape \(3, 32, 32\)"),
        "channels": (lambda: jem.energy(x[:, :1]), r"\(B, 3, 32, 32\)"),
        "dtype": (lambda: jem.score(x.byte()), "uint8"),
        "channels of pixels": (lambda: jem.normalize(x[:, :1]), r"\(2, 1, 32, 32\): give 3 channels, \('B', 3, 32, 32\)"),
        "channels of input": (lambda: jem.denormalize(x[:, :1]), "give 3 channels"),
        "range": (lambda: jem.energy(torch.full_like(x, 200.0)), r"\[-1, 1\]"),
        "no tensor": (lambda: jem.energy([1.0]), "list"),
        "y shape": (lambda: jem.energy(x, torch.tensor([1])), r"y has shape \(1,\)"),
        "y dtype": (lambda: jem.energy(x, torch.tensor([0.0, 1.0])), "float32"),
        "y high": (lambda: jem.energy(x, torch.tensor([0, 4])), "label 4"),
        "y low": (lambda: jem.log_density(x, torch.tensor([-1, 0])), "label -1"),
        "sample y shape": (lambda: jem.sample(3, y=torch.tensor([0, 1])), r"y has shape \(2,\)"),
        "sample y high": (lambda: jem.sample(1, y=9), "0 to 3"),
        "sample steps": (lambda: jem.sample(1, num_steps=0), "num_steps is 0"),
        "sample many steps": (lambda: jem.sample(1, num_steps=10**12), "from 1 to 100,000"),
        "sample n": (lambda: jem.sample(0), "n is 0"),
        "sample many": (lambda: jem.sample(10**12), "draw fewer at a time"),
        "sample too many digits": (lambda: jem.sample(10**5000), "too many digits"),
        "autocast": (lambda: in_autocast(jem, x.double()), "float64 and the model torch.float32"),
        "sample nothing": (lambda: jem.sample(), "give n"),
        "sample init": (lambda: jem.sample(3, init=x), "make them agree"),
        "nan": (lambda: jem.energy(torch.full_like(x, torch.nan)), "2 of 2 images in x have values that are NaN or infinite"),
        "infinite": (lambda: jem.energy(x.index_fill(0, torch.tensor([1]), torch.inf)), "1 of 2 images"),
        "half range": (lambda: jem.score(torch.full_like(x, 2000.0)), r"0\.\.255"),
        "double": (lambda: jem.energy(x.double()), "float64 and the model torch.float32"),
        "y text": (lambda: jem.sample(y="cat"), "holds no labels"),
        "y ragged": (lambda: jem.sample(y=[0, None]), "holds no labels"),
        "sample init name": (lambda: jem.sample(1, init="fresh"), "'buffer', 'noise' or None"),
        "no chains": (lambda: jem.sample(1, init="buffer"), "no published chains"),
        "generator": (lambda: jem.sample(1, generator=0), "manual_seed"),
        "generators": (lambda: jem.sample(1, generator=[torch.Generator()]), "list"),
        "seeds and generator": (lambda: jem.sample(seeds=[1], generator=torch.Generator()), "both generator and seeds"),
        "seeds and chains": (lambda: jem.sample(seeds=[1], init="buffer"), "generator="),
        "seeds and n": (lambda: jem.sample(3, seeds=[1, 2]), "2 seeds for 3 images"),
        "seeds and y": (lambda: jem.sample(y=[0, 1, 2], seeds=[1, 2]), "2 seeds for 3 images"),
        "seeds and init": (lambda: jem.sample(init=x, seeds=[1]), "1 seeds for 2 images"),
        "one seed": (lambda: jem.sample(1, seeds=1), "one seed per image"),
        "no seeds": (lambda: jem.sample(seeds=[]), "n is 0"),
        "seed range": (lambda: jem.sample(seeds=[2**32]), "0 to 4294967295"),
        "sample init array": (lambda: jem.sample(init=np.zeros((2, 3, 32, 32))), "init is a ndarray"),
        "on step": (lambda: jem.sample(1, on_step=5), "on_step is 5"),
        "settings": (lambda: jem.sample(1, sgld_config={"num_steps": 3}), "SGLDConfig"),
        "compiled": (lambda: timm_jem.wrap(torch.compile(jem.backbone)), "wrap the timm model first"),
        "std": (lambda: timm_jem.wrap(jem.backbone, std=(0.0, 0.0, 0.0)), "above 0"),
        "name": (lambda: timm_jem.create_model(None), "list_models"),
        "unpooled": (
            lambda: timm_jem.wrap(timm.create_model("test_vit", num_classes=4, global_pool="")).energy(
                torch.zeros(1, 3, 160, 160)
            ),
            "build it with pooling",
        ),
        "sample batch": (lambda: jem.sample(1, batch_size=0), "batch_size"),
        "unknown model": (lambda: timm_jem.create_model("resnet_18"), "did you mean resnet18"),
        "headless": (lambda: timm_jem.wrap(timm.create_model("test_resnet", num_classes=0)), "reset_classifier"),
        "not timm": (lambda: timm_jem.wrap(nn.Linear(2, 2)), "timm.create_model"),
        "class names of a set": (lambda: timm_jem.wrap(jem.backbone, class_names={*"abcd"}), "a set: give a list of 4 names"),
        "class names of a dict": (lambda: timm_jem.wrap(jem.backbone, class_names=dict.fromkeys("abcd")), "is a dict"),
        "class names of an iterator": (lambda: timm_jem.wrap(jem.backbone, class_names=iter("abcd")), "give a list"),
        "class names of a number": (lambda: timm_jem.wrap(jem.backbone, class_names=5), "class_names is a int"),
        "provenance": (lambda: timm_jem.wrap(jem.backbone, provenance="digits"), "provenance is a str"),
        "mean": (lambda: timm_jem.wrap(jem.backbone, mean=(10**400,) * 3), "mean of a channel"),
        "chains": (lambda: setattr(jem, "chains", torch.zeros(2, 3, 32, 32)), "chains is a Tensor"),
        "class names": (lambda: timm_jem.wrap(jem.backbone, class_names=["a"]), "1 class names for 4 classes"),
        "input size": (
            lambda: timm_jem.wrap(timm.create_model("vit_tiny_patch16_224", num_classes=2), input_size=(3, 32, 32)),
            "requires",
        ),
    }


@pytest.mark.parametrize("case", sorted(bad_input(None)))
def test_bad_input_is_named(jem, case):
    call, message = bad_input(jem)[case]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.45, 0.225), (0.0, 1.0), (0.0, 1 / 255)])
def test_images_in_0_to_255_are_told_by_the_input_whatever_the_normalisation(jem, mean, std):
    """Where the mean is below 0.5 an input of 0 is below 0 in pixels, where it is 0 all input may be above."""
    model, u = timm_jem.wrap(jem.backbone, mean=(mean,) * 3, std=(std,) * 3), torch.linspace(-1, 1, 3 * 32 * 32)
    x = model.normalize(u.view(1, 3, 32, 32))
    assert model.energy(x).isfinite().all()
    if std > 0.1:
        with pytest.raises(InputError, match="in pixels, whose range"):
            model.energy((x - x.min()) / (x.max() - x.min()) * 255)


def test_fixed_input_sizes_are_checked():
    jem = timm_jem.create_model("vit_tiny_patch16_224", num_classes=2, input_size=(3, 64, 64))
    assert jem.input_size == (3, 64, 64)
    assert jem.sample(1, num_steps=1).shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="resize"):
        jem.energy(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"pixels have shape \(1, 3, 32, 32\): give \('B', 3, 64, 64\)"):
        jem.pixel_energy(torch.zeros(1, 3, 32, 32))


def test_half_precision_weights(jem):
    mean = jem.mean.clone()
    half = copy.deepcopy(jem).bfloat16()
    assert torch.equal(half.mean, mean)
    x = half.sample(2, y=[0, 1], num_steps=1)
    assert x.dtype == torch.bfloat16
    assert half(x).dtype == torch.bfloat16
    assert half.energy(x).dtype == torch.float32
    assert torch.equal(half.float().mean, mean)


def test_a_model_made_without_memory_keeps_its_normalisation():
    with torch.device("meta"):
        jem = timm_jem.create_model("test_resnet", num_classes=4)
    jem = jem.to_empty(device="cpu")
    expected = torch.tensor(jem.backbone.pretrained_cfg["mean"])
    torch.testing.assert_close(jem.mean.flatten(), expected)


def test_numpys_whole_numbers_are_whole_numbers(jem, tmp_path):
    assert jem.sample(np.int64(2), num_steps=np.int64(1), y=np.array([0, 1])).shape == (2, 3, 32, 32)
    jem.sgld = SGLDConfig(num_steps=np.int64(3), step_size=np.float32(2), sample_steps=np.uint8(9))
    assert jem.sgld.num_steps == 3
    jem.save_pretrained(tmp_path)
    assert timm_jem.from_pretrained(tmp_path).sgld == jem.sgld


@pytest.mark.parametrize(
    "y", [np.array([3, 1]), np.array([1, 3])[::-1], np.array([3, 1], dtype=object), np.array([3, 1], ">i8"), [3, 1]]
)
def test_labels_come_in_any_layout(jem, y):
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(jem.energy(x, y), jem.energy(x, torch.tensor([3, 1])))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_labels_come_in_any_whole_type(jem, dtype):
    x, y = torch.randn(2, 3, 32, 32), np.array([3, 1], dtype=dtype)
    for labels in (y, torch.from_numpy(y)):
        assert torch.equal(jem.energy(x, labels), jem.energy(x, torch.tensor([3, 1])))
        assert jem.sample(y=labels, num_steps=1).shape == x.shape
    with pytest.raises(InputError, match="label 4"):
        jem.energy(x, np.array([3, 4], dtype=dtype))


def test_chains_that_ran_away_are_model_input_all_the_same(jem):
    wild = SGLDConfig(step_size=1e9, noise_std=0.0)
    x = jem.sample(4, sgld_config=wild, num_steps=1, seeds=range(4))
    assert jem.denormalize(x).abs().max() > 1000
    torch.testing.assert_close(jem.energy(x), jem.pixel_energy(jem.denormalize(x)), rtol=1e-3, atol=1e-3)
    assert jem.score(x).shape == x.shape
    assert jem.sample(init=x, num_steps=1).shape == x.shape


def test_threads_draw_from_one_model_and_leave_it_as_it_was():
    jem = timm_jem.create_model("test_resnet", num_classes=2, input_size=(3, 16, 16)).train()
    jem.backbone.fc.weight.requires_grad_(False)
    before = copy.deepcopy(jem.state_dict())
    flags = [m.training for m in jem.modules()], [p.requires_grad for p in jem.parameters()]
    options = {"seeds": [0, 1, 2, 3], "num_steps": 8}
    expected = jem.sample(**options)
    with ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(lambda _: jem.sample(**options), range(12)))
    assert all(torch.equal(x, expected) for x in drawn)
    assert flags == ([m.training for m in jem.modules()], [p.requires_grad for p in jem.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in jem.state_dict().items())


def test_what_was_changed_behind_the_models_back_is_not_saved(jem, tmp_path):
    for name, value, message in (
        ("class_names", {*"abcd"}, "give a list"),
        ("class_names", ["a"], "1 class names"),
        ("sgld", {"num_steps": 3}, "SGLDConfig"),
        ("provenance", [1], "provenance is a list"),
    ):
        other = copy.deepcopy(jem)
        setattr(other, name, value)
        for call in (
            lambda other=other: other.save_pretrained(tmp_path / "m"),
            lambda other=other: other.push_to_hub("user/m"),
        ):
            with pytest.raises(InputError, match=message):
                call()
    assert not list(tmp_path.iterdir())


def test_a_default_dtype_in_which_no_model_is_rebuilt_faithfully_is_named(jem, tmp_path):
    try:
        torch.set_default_dtype(torch.float16)
        with pytest.raises(InputError, match=r"default dtype is torch\.float16"):
            jem.save_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)


def test_energies_follow_attention_biases_that_are_trained():
    """LeViT keeps them from pass to pass in eval mode, and forgets them in train()."""
    torch.manual_seed(0)
    jem = timm_jem.create_model("levit_128s", num_classes=3).double().train()
    biases = [parameter for name, parameter in jem.named_parameters() if name.endswith("attention_biases")]
    u, energies = torch.rand(2, *jem.input_size, dtype=torch.float64) * 2 - 1, []
    for size in (0.0, 1.0):
        with torch.no_grad():
            for parameter in biases:
                parameter.normal_().mul_(size)
        with frozen(jem):
            energies.append(jem.pixel_energy(u).detach())
    assert not torch.equal(*energies)
    jem.train().eval()
    torch.testing.assert_close(jem(jem.normalize(u)).logsumexp(1).neg().detach(), energies[1], rtol=1e-14, atol=0)


def test_attention_biases_are_never_those_of_before_and_leave_no_graph(tmp_path):
    moves = (lambda jem: None, lambda jem: jem.to("cpu"), lambda jem: jem.backbone.double().float())
    for name, move in zip(("levit_128s", "efficientvit_m0", "efficientformerv2_s0"), moves, strict=True):
        torch.manual_seed(0)
        jem = timm_jem.create_model(name, num_classes=3).eval()
        move(jem)  # which timm answers with a new cache
        x = torch.randn(1, *jem.input_size)
        with torch.no_grad():
            for parameter in jem.parameters():  # some blocks begin as the identity
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        jem.energy(x)
        jem.train().eval()
        jem.backbone(x)
        copies = jem, copy.deepcopy(jem), pickle.loads(pickle.dumps(jem))
        weights = {
            key: torch.randn_like(value) if key.endswith("attention_biases") else value.clone()
            for key, value in jem.state_dict().items()
        }
        before = jem.energy(x)
        for model in copies:
            model(x)
            model.load_state_dict(weights)
            assert not torch.equal(model.energy(x), before)
            assert model.energy(x).item() == model.predict(x)[0].energy
    jem.save_pretrained(tmp_path / "m")
    assert timm_jem.from_pretrained(tmp_path / "m").predict(x)[0].energy == jem.energy(x).item()


def test_a_pass_in_inference_mode_leaves_later_ones_their_gradients():
    """ConViT keeps what its first pass makes of the size of images."""
    jem = timm_jem.create_model("convit_tiny", num_classes=3, depth=2, local_up_to_layer=1, input_size=(3, 32, 32)).eval()
    x = torch.randn(1, *jem.input_size)
    with torch.inference_mode():
        before = jem(x)
    assert torch.equal(jem(x), before)
    assert jem.score(x).isfinite().all()
    jem.energy(x).sum().backward()


def test_a_compiled_model_follows_attention_biases():
    jem = timm_jem.create_model("levit_128s", num_classes=3).eval().to("cpu")
    compiled, x = torch.compile(jem, backend="eager", fullgraph=True), torch.randn(1, *jem.input_size)
    with torch.no_grad():
        before = compiled(x)
        for name, parameter in jem.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
        assert not torch.equal(compiled(x), before)
        assert torch.equal(compiled(x), jem(x))


def test_another_normalisation_is_used_as_it_is_saved(tmp_path):
    jem = timm_jem.create_model("test_resnet", num_classes=2, input_size=(3, 16, 16)).eval()
    assert jem.mean.flatten().tolist() == [0.5] * 3
    jem.data_config.update(mean=(0.25,) * 3, std=(1.0,) * 3)
    assert jem.normalize(torch.full((1, 3, 16, 16), -0.5)).abs().max() == 0
    jem.save_pretrained(tmp_path / "saved")
    assert torch.equal(timm_jem.from_pretrained(tmp_path / "saved").mean, jem.mean)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_normalisation_may_be_an_array(tmp_path, make):
    jem = timm_jem.create_model("test_resnet", num_classes=2, input_size=(3, 16, 16)).eval()
    x = jem.normalize(torch.zeros(1, 3, 16, 16))
    jem.data_config.update(mean=make([0.25, 0.5, 0.5]), std=make(0.5))
    assert jem.energy(x).isfinite().all()
    assert jem.mean.flatten().tolist() == [0.25, 0.5, 0.5]
    jem.data_config["mean"] = make([0.5, 0.5, 0.25])
    assert jem.predict(np.zeros((16, 16, 3), np.uint8)).percentile is None
    jem.data_config["std"] = make([0.5, 0.5, 1.0])
    jem.save_pretrained(tmp_path / "saved")
    again = timm_jem.from_pretrained(tmp_path / "saved")
    assert (again.mean.flatten().tolist(), again.std.flatten().tolist()) == ([0.5, 0.5, 0.25], [0.5, 0.5, 1.0])


def test_a_size_that_is_none_is_one_line():
    with pytest.raises(InputError, match=r"'resnet18' can't be built .* for images of 32 "):
        timm_jem.create_model("resnet18", input_size=32)


def test_flags_are_put_back_whatever_one_of_them_raises():
    """Weights that were made in inference mode take no requires_grad outside of it."""
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8))
    with torch.inference_mode():
        copied = copy.deepcopy(jem)
    list(copied.backbone.parameters())[-1].data = torch.zeros(3)
    with pytest.raises(RuntimeError, match="inference"):
        copied.sample(1, num_steps=1)
    assert modes._held == {}
    assert all(part.training for part in copied.modules())
