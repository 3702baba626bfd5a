"""Released checkpoints become joint energy models on timm's networks, and nothing of them is lost unsaid."""

import json
import re
import shutil

import convert as recipe
import pytest
import timm
import torch
from released_networks import DAT, JEM, VERA, released
from torch import nn

import timm_jem
from timm_jem import InputError, SGLDConfig
from timm_jem.conversion import METHODS, convert
from timm_jem.hub.provenance import Provenance
from timm_jem.pixels import eight_bit

CLAMPED = {"step_size": 1.0, "noise_std": 0.0, "grad_clamp": 1.0, "pixel_clamp": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each method, and the network that wrote it."""
    folder, networks = tmp_path_factory.mktemp("released"), {}
    for method in METHODS:
        networks[method], checkpoint = released(method)
        torch.save(checkpoint, folder / f"{method}.pt")
    return folder, networks


def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1


@torch.no_grad()
def theirs(network: nn.Module, u: torch.Tensor) -> torch.Tensor:
    return network((u + 1) / 2 if isinstance(network, DAT) else u)


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_theirs_in_all_readers(files, tmp_path, method):
    folder, networks = files
    found = convert(folder / f"{method}.pt", method)
    assert found.method == method
    jem, u = found.jem, pixels()
    expected = theirs(networks[method], u)
    assert expected.std() > 0.1
    with torch.no_grad():
        x = jem.normalize(u)
        torch.testing.assert_close(jem(x), expected, rtol=0, atol=1e-6)
        jem.save_pretrained(tmp_path / "model")
        again = timm_jem.from_pretrained(tmp_path / "model")
        plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        assert torch.equal(again(x), jem(x))
        assert torch.equal(plain(x), jem(x))
    assert torch.equal(again.normalize(u), x)
    assert again.sgld == jem.sgld
    assert again.provenance == jem.provenance
    assert (again.chains is None) == (method in ("mjem", "vera", "dat"))
    assert Provenance.read(again.provenance).draws == (method not in ("mjem", "vera"))


@pytest.mark.parametrize(
    ("network", "tensors", "parameters"),
    [
        (lambda: JEM(28, 10, linear=True), 62, 36_471_338 + 6_410 + 641),
        (lambda: JEM(28, 10, norm=True), 185, 36_489_290 + 641),
        (lambda: JEM(28, 10, norm=True, copies=True), 366, 36_489_290 + 641),
        (lambda: VERA(28, 10), 58, 36_471_338),
        (lambda: DAT(34, 10), 191, 46_160_474),
    ],
)
def test_networks_of_full_size_are_those_of_the_released_files(network, tensors, parameters):
    with torch.device("meta"):
        network = network()
    assert len(network.state_dict()) == tensors
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("method", "depth", "width", "name", "kwargs"),
    [
        ("jem", 28, 1, "wrn_28_10", {"depth": 28, "width": 1}),
        ("jem", 16, 2, "wrn_16_2", {}),
        ("sada", 10, 3, "wrn_28_10", {"depth": 10, "width": 3, "norm_layer": "batchnorm2d"}),
        ("jempp", 28, 1, "wrn_28_10", {"depth": 28, "width": 1, "norm_layer": "batchnorm2d"}),
        ("dat", 34, 2, "wrn_28_10_original", {"depth": 34, "width": 2}),
        ("vera", 16, 1, "wrn_16_1", {}),
    ],
)
def test_depth_and_width_come_from_shapes(tmp_path, method, depth, width, name, kwargs):
    network, checkpoint = released(method, depth, width)
    torch.save(checkpoint, tmp_path / "file.pt")
    found, u = convert(tmp_path / "file.pt", method), pixels()
    jem = found.jem
    with torch.no_grad():
        torch.testing.assert_close(jem(jem.normalize(u)), theirs(network, u), rtol=0, atol=1e-6)
    jem.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == name
    assert (" of depth" in found.lines[0]) == ("depth" in kwargs)
    assert config["model_args"] == {**kwargs, "in_chans": 3, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("method", "dropped"),
    [
        ("jem", {"f.linear.weight", "f.linear.bias", "energy_output.weight", "energy_output.bias"}),
        ("sada", {"energy_output.weight", "energy_output.bias"}),
        ("vera", set()),
        ("dat", set()),
    ],
)
def test_what_is_dropped_is_told(files, method, dropped):
    folder, _ = files
    told = [line for line in convert(folder / f"{method}.pt", method).lines if line.startswith("dropped: ")]
    if method == "vera":
        assert told == ["dropped: 'itr', 'model.generator', 'optimizer' (not the network's)"]
    else:
        assert set(re.findall("'(.*?)'", "".join(told))) == dropped


def test_the_copies_of_jempp_are_told_and_have_to_be_copies(files, tmp_path):
    folder, _ = files
    found = convert(folder / "jempp.pt", "jempp")
    assert any("'f.layer_one.bias'" in line and "second copies" in line for line in found.lines)
    checkpoint = torch.load(folder / "jempp.pt")
    weights = checkpoint["model_state_dict"]
    weights["f.other_layers.1.0.conv2.weight"] = weights["f.layer2.0.conv2.weight"] + 1e-3
    torch.save(checkpoint, tmp_path / "changed.pt")
    with pytest.raises(InputError, match=r"'f.other_layers.1.0.conv2.weight' is not the same as 'f.layer2.0.conv2.weight'"):
        convert(tmp_path / "changed.pt", "jempp")


@pytest.mark.parametrize(
    ("method", "name", "sgld"),
    [
        ("jem", "jem.pt", SGLDConfig(20, 1.0, 0.01)),
        ("jempp", "jempp.pt", SGLDConfig(10, **CLAMPED)),
        ("sada", "sada.pt", SGLDConfig(5, **CLAMPED)),
        ("sada", "sadajem10_96.3_11.4.pt", SGLDConfig(10, **CLAMPED)),
        ("sada", "SADA-JEM_20.pth", SGLDConfig(20, **CLAMPED)),
        ("sada", "sada_cifar100.pt", SGLDConfig(5, **CLAMPED)),
        ("vera", "vera.pt", SGLDConfig()),
        ("dat", "dat.pt", SGLDConfig(33, 0.4 / 3072**0.5, 0.0, normalize_grad=True, pixel_clamp=1.0)),
    ],
)
def test_chains_move_as_published(files, tmp_path, method, name, sgld):
    folder, _ = files
    shutil.copyfile(folder / f"{method}.pt", tmp_path / name)
    found = convert(tmp_path / name, method)
    assert found.jem.sgld == sgld
    assert convert(tmp_path / name, method, num_steps=7).jem.sgld.num_steps == 7
    if method == "dat":  # in [0, 1] a step has the ℓ2 length 0.2
        u = pixels()
        moved = (timm_jem.sgld_step(u / 2, torch.randn(u.shape), None, sgld) - u / 2) / 2
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((4,), 0.2))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("sada", lambda c: {**c, "model_state_dict": {f"module.{k}": v for k, v in c["model_state_dict"].items()}}),
        ("sada", lambda c: c["model_state_dict"]),
        ("sada", lambda c: {"model_state_dict": {k: nn.Parameter(v, False) for k, v in c["model_state_dict"].items()}}),
        (
            "sada",
            lambda c: {**c, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3, "best_acc": 0.9},
        ),
        ("dat", lambda c: {"module.n_averaged": torch.tensor(7), **{f"module.module.{k}": v for k, v in c.items()}}),
        ("dat", lambda c: {f"base_model.{k}": v for k, v in c.items()}),
        ("dat", lambda c: {"state_dict": {k: v for k, v in c.items() if "num_batches_tracked" not in k}}),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_files_in_any_dress(files, tmp_path, method, change, legacy):
    folder, networks = files
    torch.save(change(torch.load(folder / f"{method}.pt")), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    jem, u = convert(tmp_path / "x.pt", method).jem, pixels()
    with torch.no_grad():
        torch.testing.assert_close(jem(jem.normalize(u)), theirs(networks[method], u), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(files, tmp_path, dtype):
    folder, networks = files
    weights = torch.load(folder / "dat.pt")
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "x.pt")
    jem = convert(tmp_path / "x.pt").jem
    assert {v.dtype for v in jem.state_dict().values()} == {torch.float32, torch.int64}
    u, rounding = pixels(), 2e-6 if dtype == torch.float64 else 0.1
    with torch.no_grad():
        assert (jem(jem.normalize(u)) - theirs(networks["dat"], u)).abs().max() < rounding


def test_weights_of_several_are_asked_for(files, tmp_path):
    folder, _ = files
    weights = torch.load(folder / "dat.pt")
    average = {name: value * 2 for name, value in weights.items()}
    torch.save({"model": weights, "ema": average, "optimizer": {}}, tmp_path / "two.pt")
    with pytest.raises(InputError, match=r"several weights: give --entry, one of \['model', 'ema'\]"):
        convert(tmp_path / "two.pt")
    found = convert(tmp_path / "two.pt", entry="ema")
    assert torch.equal(found.jem.backbone.fc.weight, average["fc.weight"])
    assert "dropped: 'model', 'optimizer' (not the network's)" in found.lines
    with pytest.raises(InputError, match=r"no weights of these methods in 'optimizer': they are in \['model', 'ema'\]"):
        convert(tmp_path / "two.pt", entry="optimizer")


@pytest.mark.parametrize("method", METHODS)
def test_the_wrong_method_is_refused_and_the_right_one_named(files, method):
    folder, _ = files
    right = {"sada": "sada|mjem", "mjem": "sada|mjem"}.get(method, method)
    for other in set(METHODS) - set(right.split("|")):
        with pytest.raises(InputError, match=rf"no file of .*: by its names and shapes it is --method ({right}) ") as refused:
            convert(folder / f"{method}.pt", other)
        assert all(f"--method {name}" in str(refused.value) for name in right.split("|"))
    with pytest.raises(InputError, match="give one of jem, jempp, sada"):
        convert(folder / f"{method}.pt", "JEM")


@pytest.mark.parametrize("method", METHODS)
def test_the_method_may_be_left_out_where_the_file_tells(files, method):
    folder, _ = files
    if method == "mjem":  # or SADA-JEM with the uncond flag
        with pytest.raises(InputError, match=r"may be of several methods: give --method sada .* or --method mjem"):
            convert(folder / f"{method}.pt")
    else:
        assert convert(folder / f"{method}.pt").method == method


@pytest.mark.parametrize("method", ["jem", "jempp", "sada"])
def test_a_trained_energy_head_is_not_passed_over(tmp_path, method):
    """Such files have the density of that head; the head of others has no gradients and is as it was made."""
    network, checkpoint = released(method, energy_head=True)
    torch.save(checkpoint, tmp_path / "uncond.pt")
    with pytest.raises(InputError, match=r"energy head was trained.*--energies none .* --energies logsumexp"):
        convert(tmp_path / "uncond.pt", method)
    alone = convert(tmp_path / "uncond.pt", method, energies="none")
    assert alone.jem.chains is None
    assert alone.jem.sgld == SGLDConfig()
    assert alone.lines[1].startswith("energies: none")
    assert "dropped: 'replay_buffer' (chains)" in alone.lines
    asserted = convert(tmp_path / "uncond.pt", method, energies="logsumexp").jem
    assert len(asserted.chains) == 20
    u = pixels()
    with torch.no_grad():
        torch.testing.assert_close(alone.jem(u), network(u), rtol=0, atol=1e-6)


def test_m_jem_is_a_classifier_unless_someone_knows_better(files, tmp_path):
    folder, _ = files
    found = convert(folder / "mjem.pt", "mjem")
    assert found.lines[1].startswith("energies: none")
    assert convert(folder / "mjem.pt", "mjem", energies="logsumexp").jem.sgld == SGLDConfig(5, **CLAMPED)
    with pytest.raises(InputError, match="its energy head was never trained: give --method sada"):
        convert(folder / "sada.pt", "mjem")


def of_weights(change):
    def changed(checkpoint):
        change(checkpoint["model_state_dict"])
        return checkpoint

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_weights(lambda w: w.update({"f.extra.weight": torch.ones(2)})), "it has 'f.extra.weight' that no file of JEM"),
        (
            of_weights(lambda w: w.pop("f.layer2.0.bn1.running_mean")),
            "lacks the weights that are 'stages.1.0.norm1.running_mean'",
        ),
        (of_weights(lambda w: w.pop("class_output.weight")), "lacks the weights that are fc.weight here"),
        (
            of_weights(lambda w: w.update({"f.layer4.0.conv1.weight": torch.ones(2)})),
            "a fourth stage.*'f.layer4.0.conv1.weight'",
        ),
        (
            of_weights(lambda w: w.update({"f.layer1.0.bn1.loc": torch.ones(2)})),
            "activation normalisation.*'f.layer1.0.bn1.loc'",
        ),
        (of_weights(lambda w: w.update({"f.layer3.7.conv1.weight": torch.ones(2)})), "lacks the weights that are 'stages.0.1"),
        (
            of_weights(lambda w: w.update({"f.conv1.bias": torch.ones(17)})),
            r"'f.conv1.bias' is of shape \(17,\): .* has \(16,\)",
        ),
        (
            of_weights(lambda w: w.update({"f.layer1.0.conv1.weight": torch.ones(20, 16, 3, 3)})),
            "has 20 channels, no multiple of 16",
        ),
        (
            of_weights(lambda w: w.update({"class_output.weight": torch.ones(0, 64)})),
            r"'class_output.weight' is of shape \(0, 64\)",
        ),
        (of_weights(lambda w: w["f.bn1.bias"].fill_(float("nan"))), "'f.bn1.bias' holds numbers that are not finite"),
        (
            of_weights(lambda w: w.update({"f.bn1.bias": torch.ones(64, dtype=torch.int32)})),
            "'f.bn1.bias' is torch.int32 of shape",
        ),
        (
            of_weights(lambda w: w.update({"f.bn1.num_batches_tracked": torch.ones(())})),
            "num_batches_tracked' is torch.float32",
        ),
        (of_weights(lambda w: w.update({"f.bn1.bias": 3})), "'f.bn1.bias', which is a int among weights"),
        (of_weights(lambda w: w.update({"module.f.bn1.bias": torch.ones(64)})), "'f.bn1.bias' twice"),
        (
            of_weights(lambda w: w.update({"energy_output.weight": torch.ones(2, 64)})),
            "energy_output has a weight that is torch.float32",
        ),
        (lambda c: {**c, "ema_state": {"f": torch.ones(3)}}, "it holds 'ema_state' beside its weights"),
        (lambda c: {**c, "replay_buffer": torch.ones(20, 1, 32, 32)}, "its replay_buffer is torch.float32 of shape"),
        (lambda c: {**c, "replay_buffer": [1]}, "its replay_buffer is a list"),
        (
            lambda c: {**c, "replay_buffer": torch.full((20, 3, 32, 32), float("inf"))},
            "replay_buffer holds numbers that are not finite",
        ),
        (
            lambda c: {"replay_buffer": c["replay_buffer"]},
            r"it holds \['replay_buffer'\] and the like: no network of jem, jempp",
        ),
    ],
)
def test_every_tensor_is_accounted_for(files, tmp_path, change, message):
    folder, _ = files
    torch.save(change(torch.load(folder / "sada.pt")), tmp_path / "broken.pt")
    with pytest.raises(InputError, match=message) as refused:
        convert(tmp_path / "broken.pt", "sada")
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "broken.pt") in str(refused.value)


def test_other_normalisations_are_refused(files, tmp_path):
    folder, _ = files
    for method, match in (("sada", "another normalisation than BatchNorm"), ("vera", "normalisation, which its first block")):
        checkpoint = torch.load(folder / f"{method}.pt")
        if method == "sada":
            weights = checkpoint["model_state_dict"]
            for name in [name for name in weights if "running" in name or "tracked" in name]:
                del weights[name]
        else:
            checkpoint["model"]["logp_net"]["logp_net.layer1.0.bn2.weight"] = torch.ones(16)
        torch.save(checkpoint, tmp_path / "norm.pt")
        with pytest.raises(InputError, match=match):
            convert(tmp_path / "norm.pt")


def test_the_replay_buffer_becomes_published_chains(files, tmp_path):
    folder, _ = files
    buffer = torch.load(folder / "jem.pt")["replay_buffer"]
    found = convert(folder / "jem.pt", "jem")
    assert torch.equal(found.jem.chains.images, eight_bit(buffer))
    assert found.jem.chains.labels is None
    of_another = convert(folder / "jem.pt", "jem", mean=(0.25,), std=(0.5,)).jem  # chains are of what the network takes
    assert torch.equal(of_another.chains.images, eight_bit(buffer - 0.5))
    outside = int((buffer.abs() > 1.0001).sum())
    assert outside > 100
    assert (
        f"chains: 20 of 20 in 8 bits, without classes; {outside} of 61,440 pixels were outside of [-1, 1] and are cut"
        in found.lines
    )
    conditional = convert(folder / "jem.pt", "jem", conditional_chains=True).jem.chains
    assert conditional.labels.tolist() == [i // 2 for i in range(20)]
    without = convert(folder / "jem.pt", "jem", replay_buffer=False)
    assert without.jem.chains is None
    assert "dropped: 'replay_buffer' (chains)" in without.lines
    with pytest.raises(InputError, match="no chains to give classes"):
        convert(folder / "dat.pt", "dat", conditional_chains=True)
    checkpoint = torch.load(folder / "jem.pt")
    torch.save({**checkpoint, "replay_buffer": buffer[:19, :, :16, :16].clone()}, tmp_path / "small.pt")
    assert convert(tmp_path / "small.pt").jem.input_size == (3, 16, 16)
    with pytest.raises(InputError, match="19 chains are not as many of each of 10 classes"):
        convert(tmp_path / "small.pt", conditional_chains=True)


def test_another_normalisation_of_the_input(files):
    folder, _ = files
    jem = convert(folder / "dat.pt", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).jem
    u = pixels()
    torch.testing.assert_close(jem.normalize(u), (u + 1) / 2)


def test_the_recipe_tells_what_it_did(files, tmp_path, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.chdir(tmp_path)
    command = [str(folder / "sada.pt"), "models/sada", "--method", "sada", "--num_steps", "10"]
    recipe.main(command)
    told = capsys.readouterr().out
    for line in (
        "models/sada: SADA-JEM (arXiv 2209.07959)",
        "  network: wrn_10_1, 78,186 parameters, 10 classes, images of (3, 32, 32), mean 0.5, std 0.5",
        "  energies: logsumexp of the logits",
        "  dropped: 'energy_output.bias', 'energy_output.weight' (head of energies)",
        "  sgld: num_steps 10, step_size 1, noise_std 0, grad_clamp 1, pixel_clamp 1 (the released code",
        "  claimed by its authors, not measured here: 94.8 % test accuracy",
        "  to draw images: its chains started from Gaussians of the classes",
        "next: python recipes/evaluate.py models/sada --data.dataset cifar10",
    ):
        assert f"\n{line}" in f"\n{told}"
    before = {file.name: file.read_bytes() for file in (tmp_path / "models" / "sada").iterdir()}
    with pytest.raises(InputError, match=r"models/sada holds another model: give a new folder, or --overwrite true"):
        recipe.main([str(folder / "jem.pt"), "models/sada"])
    with pytest.raises(InputError, match="no file of JEM"):
        recipe.main([str(folder / "sada.pt"), "models/sada", "--overwrite", "true", "--method", "jem"])
    with pytest.raises(InputError, match="no file of JEM"):
        recipe.main([str(folder / "sada.pt"), "models/new", "--method", "jem"])
    assert not (tmp_path / "models" / "new").exists()
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "models" / "sada").iterdir()}
    recipe.main([str(folder / "dat.pt"), "models/sada", "--overwrite", "true"])
    jem = timm_jem.from_pretrained("models/sada")
    assert jem.chains is None
    assert jem.provenance["converted"]["method"] == METHODS["dat"].title
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file: give a folder"):
        recipe.main([str(folder / "dat.pt"), "file"])
