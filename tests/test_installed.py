"""What a pip user gets: the files of a wheel, and training from it without a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import timm_jem

ROOT = Path(__file__).parent.parent
TRAIN = [
    *("-m", "accelerate.commands.accelerate_cli", "launch", "-m", "timm_jem.recipes.train"),
    *("--train.threads", "1", "--train.steps", "4", "--train.batch_size", "16", "--train.sample_steps", "[1,2]"),
    *("--train.sample_count", "40", "--sgld.num_steps", "5"),
]


def run(command: list, folder: Path) -> str:
    """What a command prints, in ``folder`` and without the paths and settings of the tests' own Python."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"ACCELERATE_USE_CPU": "true", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the checkout, so that no build writes into it."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    copy.mkdir()
    for folder in ("timm_jem", "recipes", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copyfile(file, copy / file.name)
    return copy


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"], sources)
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution: what that lacks, the wheel lacks."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*pip, "-w", str(folder), str(sdist)], folder)
    return next(folder.glob("*.whl"))


def borrowing_environment(folder: Path) -> Path:
    """The Python of a fresh virtual environment that sees the packages installed here, but no editable ones."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    installed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # A path of a .pth file goes after the environment's own, and .pth files found there are not read.
    (own / "borrowed.pth").write_text("\n".join(installed) + "\n")
    return python


def test_the_wheel_has_what_a_user_needs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata_file = next(name for name in files if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_file).decode())
        licence = archive.read(metadata_file.replace("METADATA", "licenses/LICENSE"))
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "timm_jem").rglob("*.py")}
    recipes = {
        f"timm_jem/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*") if path.suffix in (".py", ".yaml")
    }
    data = {"timm_jem/py.typed", "timm_jem/hub/card_template.md"}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "timm_jem/pretrained").rglob("*") if path.is_file()}
    page = {f"timm_jem/demo/{name}" for name in ("page.css", "chooser.js", "painter.js")}
    data |= page
    assert {"timm_jem/recipes/train.py", "timm_jem/recipes/configs/digits.yaml"} < recipes
    assert {name for name in files if ".dist-info/" not in name} == python | recipes | data
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert (metadata["Name"], metadata["Version"]) == ("timm_jem", timm_jem.__version__)
    assert (metadata["License-Expression"], metadata["Author"]) == ("Apache-2.0", "The timm_jem authors")
    assert not [name for name in metadata.get_all("Classifier") if name.startswith("License ::")]


def test_the_source_distribution_has_what_the_tests_need(sdist):
    def files(folder: Path) -> set[str]:
        found = {path for top in ("timm_jem", "recipes", "tests") for path in (folder / top).rglob("*")}
        return {
            str(path.relative_to(folder))
            for path in found
            if path.suffix in (".css", ".js", ".md", ".png", ".py", ".typed", ".yaml")
        }

    assert files(sdist) == files(ROOT)
    top = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "pytest.ini", "ruff.toml", "setup.py"}
    assert top <= {path.name for path in sdist.iterdir()}


def test_training_from_the_wheel_without_a_checkout(wheel, tmp_path):
    python = borrowing_environment(tmp_path / "env")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], tmp_path)
    assert_trains(python, tmp_path)


def test_an_editable_install_has_the_recipes(sources, tmp_path):
    python = borrowing_environment(tmp_path / "env")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation"]
    run([*pip, "-e", str(sources)], tmp_path)
    found = "from importlib.util import find_spec as f; print(f('timm_jem').origin, f('timm_jem.recipes.train').origin)"
    assert run([python, "-c", found], tmp_path).split() == [
        str(sources / "timm_jem" / "__init__.py"),
        str(sources / "recipes" / "train.py"),
    ]


@pytest.mark.slow
def test_training_from_the_wheel_with_its_dependencies(wheel, tmp_path):
    run([sys.executable, "-m", "venv", str(tmp_path / "env")], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", str(wheel)], tmp_path)
    assert_trains(python, tmp_path)


def assert_trains(python: Path, folder: Path) -> None:
    found = run([python, "-c", "from importlib.util import find_spec; print(find_spec('timm_jem').origin)"], folder)
    assert Path(found.strip()).is_relative_to(folder / "env")
    assert "test accuracy" in run([python, *TRAIN], folder)
    assert json.loads((folder / "runs" / "digits" / "summary.json").read_text())["steps"] == 4
    assert run([python, "-m", "timm_jem.recipes.push", "--help"], folder).startswith("usage:")


def test_citation_and_changelog_agree_with_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[(\d\S+)\] - (\S+)$", changelog, re.MULTILINE).groups()
    assert citation["version"] == version
    # What has changed since is no longer that release, and says so in reports, cards and configurations.
    unreleased = re.search(r"^## \[Unreleased\]\n+## ", changelog, re.MULTILINE) is None and "## [Unreleased]" in changelog
    own = Version(timm_jem.__version__)
    assert own.is_devrelease == unreleased
    assert own > Version(version) if unreleased else own == Version(version)
    assert citation["date-released"] == date
    assert citation["references"][0]["url"].endswith("1912.03263")
