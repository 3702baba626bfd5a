import os
import pickle
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import timm_jem
from timm_jem import InputError
from timm_jem.evaluation import extractors
from timm_jem.evaluation.extractors import classifier_extractor, extract, load_extractor, load_extractors, weights_of
from timm_jem.evaluation.generation import pyramid, thumbnails
from timm_jem.pixels import to_pixels


def images(n, *size, seed=0):
    return torch.randint(256, (n, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def refused(spec, input_size=(3, 8, 8)) -> str:
    with pytest.raises(InputError) as error:
        load_extractor(spec, input_size=input_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pixels():
    x = images(5, 1, 8, 8)
    extractor = load_extractor("pixels", input_size=(1, 8, 8))
    assert extractor.name == "raw pixels (64 dimensions)"
    assert extractor.logits is None
    found = extract(extractor, x, batch_size=2)
    assert found.dtype == torch.float64
    assert torch.equal(found, to_pixels(x).flatten(1).double())
    assert load_extractor("pixels", input_size=(3, 32, 32)).name == "raw pixels (3072 dimensions)"
    assert "use thumbnails" in refused("pixels", (3, 32, 33))


def test_thumbnails():
    x = images(5, 3, 32, 32)
    extractor = load_extractor("thumbnails", input_size=(3, 32, 32))
    assert extractor.name == "8×8 thumbnails (192 dimensions)"
    assert torch.equal(extract(extractor, x), thumbnails(to_pixels(x)).double())
    blocks = x.reshape(5, 3, 8, 4, 8, 4).double().mean((3, 5)).flatten(1) / 127.5 - 1
    torch.testing.assert_close(extract(extractor, x), blocks, atol=1e-6, rtol=0)
    assert load_extractor("thumbnails", input_size=(1, 4, 6)).name == "4×6 thumbnails (24 dimensions)"


def test_pyramid():
    x = images(5, 3, 32, 32)
    extractor = load_extractor("pyramid", input_size=(3, 32, 32))
    assert extractor.name == "8×8 thumbnails and the strength of finer detail (216 dimensions)"
    assert torch.equal(extract(extractor, x), pyramid(to_pixels(x)).double())
    assert "(64 dimensions)" in load_extractor("pyramid", input_size=(1, 8, 8)).name


@pytest.mark.parametrize(("size", "name"), [((3, 8, 8), "raw pixels"), ((1, 28, 28), "8×8 thumbnails (64 dimensions)")])
def test_auto_is_what_it_was(size, name):
    (extractor,) = load_extractors(["auto"], input_size=size)
    assert extractor.name.startswith(name)


def test_an_extractor_asked_for_twice_is_there_once():
    found = load_extractors(["pyramid", "auto", "pixels", "thumbnails"], input_size=(1, 8, 8))
    assert [extractor.name.split(" (")[0] for extractor in found] == [
        "8×8 thumbnails and the strength of finer detail",
        "raw pixels",
        "8×8 thumbnails",
    ]


def test_only_8_bit_images_have_features():
    extractor = load_extractor("pixels", input_size=(1, 8, 8))
    with pytest.raises(InputError, match="8-bit"):
        extract(extractor, to_pixels(images(5, 1, 8, 8)))


def test_unknown_extractors():
    for spec in ("fid", "inception:", "timm:", "pixels:8", "timm"):
        assert "pixels, thumbnails" in refused(spec)
    assert "did you mean" in refused("timm:resnet1")
    assert "can't be loaded" in refused("timm:wrn_10_1")  # nobody has published weights of it
    assert "can't be loaded" in refused("timm:local-dir:./nowhere")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A timm model, saved, of images of 3×16×16 and its own mean and std."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # a fresh one ends its blocks with zeros, and hides what eval mode is
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.running_mean, -0.5, 0.5)
    model.pretrained_cfg.update(input_size=(3, 16, 16), mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.125))
    path = tmp_path_factory.mktemp("timm") / "saved"
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return path, model.eval()


@torch.no_grad()
def test_timm_features_are_of_images_resized_and_normalised_as_it_was_trained(folder):
    path, model = folder
    extractor = load_extractor(f"timm:local-dir:{path}", input_size=(3, 8, 8))
    assert extractor.name == "timm local-dir:saved"  # where it lies is nobody's business
    assert extractor.weights == weights_of(f"timm:local-dir:{path}") is not None
    assert weights_of(f"timm:local-dir:{path.parent}/gone") is weights_of("pixels") is None
    assert extractor.logits is None
    x = images(5, 3, 8, 8)
    resized = F.interpolate(x.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.2, 0.4, 0.6])[:, None, None], torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    expected = model.forward_head(model.forward_features((resized - mean) / std), pre_logits=True)
    found = extract(extractor, x, batch_size=2)
    assert found.shape == (5, 512)
    torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=1e-4)
    assert found.std(0).max() > 1e-3

    same = images(4, 3, 16, 16)
    expected = model.forward_head(model.forward_features((same / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(extract(extractor, same), expected.double(), atol=1e-5, rtol=1e-4)


def test_grey_images_are_repeated(folder):
    extractor = load_extractor(f"timm:local-dir:{folder[0]}", input_size=(1, 8, 8))
    grey = images(3, 1, 8, 8)
    assert torch.equal(extract(extractor, grey), extract(extractor, grey.repeat(1, 3, 1, 1)))
    assert "3 channels" in refused(f"timm:local-dir:{folder[0]}", (4, 8, 8))


def test_timms_inception_is_not_called_fid(monkeypatch):
    monkeypatch.setattr(extractors.timm, "create_model", lambda *args, **options: timm.models.resnet10t(num_classes=0))
    assert load_extractor("timm:inception_v3", input_size=(3, 8, 8)).name == "timm inception_v3"


def test_a_classifiers_features_and_logits():
    torch.manual_seed(0)
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), drop_rate=0.5).train()
    extractor = classifier_extractor(jem, "the judge")
    x = images(7, 1, 8, 8)
    found, logits = extract(extractor, x, batch_size=3), extractor.logits(x)
    assert extractor.name == "the judge"
    assert jem.training
    assert all(p.requires_grad for p in jem.parameters())
    assert found.shape == (7, jem.backbone.num_features)
    with torch.no_grad():
        torch.testing.assert_close(logits, jem.eval()(jem.normalize(to_pixels(x))))
        head = jem.backbone.get_classifier()
        torch.testing.assert_close(head(found.float()), logits, atol=1e-5, rtol=1e-5)
    assert not logits.requires_grad

    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    plain.num_classes = 2
    with pytest.raises(InputError, match="forward_features"):
        classifier_extractor(timm_jem.JEM(plain, data_config={"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.5,)}), "plain")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A folder with files of random weights for FID's network, that network, an image, and its features and logits."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network_class = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(network_class, "load_state_dict", lambda *args: None)
        network = network_class("inception", ["2048", "logits_unbiased"])
    for layer in network.modules():  # features of random weights would vanish
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.fill_(3.0)
    path = tmp_path_factory.mktemp("inception")
    torch.save(network.state_dict(), path / "weights.pth")
    save_file(network.state_dict(), path / "weights.safetensors")
    grey = images(1, 1, 8, 8)
    return path, network, grey, network(grey.repeat(1, 3, 1, 1))


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_inception_is_that_of_torch_fidelity(inception, file):
    path, _, grey, (features, logits) = inception
    extractor = load_extractor(f"inception:{path / file}", input_size=(1, 8, 8))
    assert features.std() > 1e-3
    assert torch.equal(extract(extractor, grey), features.double())
    assert torch.equal(extractor.logits(grey), logits)
    assert extractor.name == f"FID's Inception (2048 dimensions) with the unchecked weights of {file}"
    assert "3 channels" in refused(f"inception:{path / file}", (2, 8, 8))


def test_the_published_weights_are_known_by_their_hash(inception, monkeypatch):
    path, _, grey, (features, _) = inception
    module = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    digest = extractors.hashlib.sha256((path / "weights.pth").read_bytes()).hexdigest()
    url = f"http://127.0.0.1:9/weights-{digest[:8]}.pth"
    monkeypatch.setattr(module, "URL_INCEPTION_V3", url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(path / "hub"))
    message = refused("inception")
    assert "can't be downloaded" in message
    assert url in message
    assert "inception:FILE" in message
    assert not any((path / "hub" / "checkpoints").iterdir())

    def download(source, target, hash_prefix):
        assert (source, hash_prefix) == (url, digest[:8])
        os.link(path / "weights.pth", target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    extractor = load_extractor("inception", input_size=(3, 8, 8))
    assert extractor.name == "FID's Inception (2048 dimensions)"
    monkeypatch.delattr(torch.hub, "download_url_to_file")  # from now on it is there
    assert torch.equal(extract(load_extractor("inception", input_size=(1, 8, 8)), grey), features.double())


class Malicious:
    def __reduce__(self):
        return os.mkdir, (f"{os.environ['MALICIOUS_FOLDER']}/executed",)


def test_files_that_are_not_fids_inception(inception, tmp_path, monkeypatch):
    monkeypatch.setenv("MALICIOUS_FOLDER", str(tmp_path))
    state = inception[1].state_dict()
    assert "there is no file" in refused(f"inception:{tmp_path / 'nowhere.pth'}")

    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "not FID's Inception" in refused(f"inception:{tmp_path / 'other.safetensors'}")
    save_file({**state, "AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "more.safetensors")
    assert "not FID's Inception" in refused(f"inception:{tmp_path / 'more.safetensors'}")
    save_file({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shapes.safetensors")
    assert "not FID's Inception" in refused(f"inception:{tmp_path / 'shapes.safetensors'}")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "not FID's Inception" in refused(f"inception:{tmp_path / 'list.pth'}")

    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"\x80\x02 nonsense")
        assert "not a file of weights" in refused(f"inception:{tmp_path / name}")
    whole = (inception[0] / "weights.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    assert "not a file of weights" in refused(f"inception:{tmp_path / 'half.pth'}")
    (tmp_path / "folder.pth").mkdir()
    assert "there is no file" in refused(f"inception:{tmp_path / 'folder.pth'}")

    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save({"fc.bias": Malicious()}, tmp_path / "zip.pth")
    for name in ("bare.pth", "zip.pth"):
        assert "not a file of weights" in refused(f"inception:{tmp_path / name}")
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert (tmp_path / "executed").exists()  # it would have been


def test_a_missing_torch_fidelity_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert "timm_jem[eval]" in refused("inception")
