"""The Hub's client reads its settings when it is first imported: from here on they name a Hub on loopback."""

import gc
import os
import tempfile
from pathlib import Path

from loopback_hub import TOKEN, Hub

# Each of pytest's processes has a core; more threads would wait for one another, and recipes set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="hf-home-")
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HOME.name, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

# Seconds for PyArrow's threads to end where a stream is left before its end; those of a few rows are quick.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.2
# A file is run by one process: those that take long go first, so that the processes end together.
LONG = ("manual", "resume", "recipes", "classifier_first", "evaluate", "installed", "sections", "hub", "stability", "model")


def pytest_collection_modifyitems(items):
    gc.freeze()  # what is imported stays: searching it for garbage takes a quarter of a second, and each recipe does it
    order = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(Path(item.path).stem, len(LONG)))


@pytest.fixture(autouse=True)
def threads_as_before():
    """A recipe that is run in this process sets their number for all that follows."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def precision_of_its_own():
    """A process's accelerators share their precision: for tests that choose one, or let it be measured."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    HUB.reset()
    yield HUB
    HUB.reset()
