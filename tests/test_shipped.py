"""The models that come with the package are what their cards say."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch

import timm_jem
from timm_jem.data import DataConfig, load_splits
from timm_jem.files import fingerprint
from timm_jem.hub.shipped import SHIPPED, shipped
from timm_jem.pixels import to_pixels

ROOT = Path(timm_jem.__file__).parent / "pretrained"


def test_names_are_folders():
    assert sorted(SHIPPED) == sorted(path.name for path in ROOT.iterdir())
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) < 10_000_000
    assert shipped("resnet18") is None
    assert shipped(Path("digits")) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_does_all_that_a_model_does(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["timm_jem.wrap"], "fetch", pytest.fail)  # no network
    jem = timm_jem.from_pretrained(name)
    assert {parameter.dtype for parameter in jem.parameters()} == {torch.float32}
    assert not jem.training
    plain = timm.create_model(f"local-dir:{shipped(name)}", pretrained=True).eval()
    x = jem.sample(4, y=1, generator=torch.Generator().manual_seed(0), num_steps=20)
    with torch.no_grad():
        assert torch.equal(plain(x), jem(x))
    assert jem.reference.accept == 0.95
    assert jem.provenance["results_of"] == fingerprint(jem.backbone.state_dict())
    assert len(jem.reference.medians) == jem.num_classes  # so that chains of a class can rest
    assert jem.predict(x)[0].percentile is not None
    assert len(jem.class_names) == 10
    everything = (shipped(name) / "config.json").read_text() + (shipped(name) / "README.md").read_text()
    assert not re.search(r"/(tmp|home|work|root|mnt)\b", everything)
    (tmp_path / name).mkdir()  # a folder of one's own comes first
    with pytest.raises(timm_jem.InputError, match=r"no config\.json"):
        timm_jem.from_pretrained(name)


def test_the_digits_are_read_as_their_card_says():
    jem, test = timm_jem.from_pretrained("digits"), load_splits(DataConfig()).test
    with torch.no_grad():
        right = (jem(jem.normalize(to_pixels(test.images))).argmax(1) == test.labels).float().mean().item()
    assert f"Test accuracy {right:.3f}" in (shipped("digits") / "README.md").read_text()
    outlier = [r.outlier for r in jem.predict(jem.normalize(torch.rand(50, 1, 8, 8) * 2 - 1))]
    assert sum(outlier) > 45
