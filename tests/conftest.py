"""The Hub's client reads its settings when it is first imported: from here on they name a Hub on loopback."""

import os
import tempfile

from loopback_hub import TOKEN, Hub

HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HOME.name, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")

import pytest  # noqa: E402


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    HUB.reset()
    yield HUB
    HUB.reset()
