"""A folder that is a Hugging Face Space: the page, this package, and a model."""

import copy
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import yaml

import timm_jem.version
from timm_jem.errors import InputError
from timm_jem.files import as_path, folder_aside, move_in
from timm_jem.hub.local_paths import without_local_paths
from timm_jem.hub.markdown import inline
from timm_jem.hub.provenance import printable
from timm_jem.model import JEM

__all__ = ["GRADIO", "write_space"]

GRADIO = "6.31.0"  # what the page is tested with

_TEXT = """
# {title}

A classifier seen as an energy-based model: it says what a picture shows, how likely such a picture is, and draws its own.
Made by timm_jem {version}.

Publish this folder with `hf upload user/name . --repo-type space`; a CPU is enough. `python app.py` shows the same page
here.
"""


def write_space(jem: JEM, folder: str | os.PathLike, *, title: str, app: Path) -> None:
    """Write a Space to a new folder, or raise and leave nothing. Of local paths no more goes along than their last part.

    Args:
        jem: the model, with its reference.
        folder: where; must not be there yet.
        title: of the page.
        app: the program, which shows the model in the folder "model" beside it.

    Raises:
        InputError: something is there, or it can't be written.
    """
    target = as_path(folder)
    if os.path.lexists(target):
        raise InputError(f"{target} is there already: give a new folder")
    with folder_aside(target) as aside:
        published = copy.copy(jem)
        published.provenance = without_local_paths(jem.provenance)
        published.save_pretrained(aside / "model")
        package = Path(timm_jem.version.__file__).parent
        shutil.copytree(package, aside / "timm_jem", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(app, aside / "app.py")
        header = {"title": printable(title), "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py", "pinned": False}
        text = _TEXT.format(title=inline(title), version=timm_jem.version.__version__)
        card = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{text}"
        (aside / "README.md").write_text(card, encoding="utf-8")
        (aside / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
        move_in(aside, target, last="README.md")


def _requirements() -> list[str]:
    """Of this package, without its extras, and PyTorch's wheels for CPUs."""
    try:
        needed = metadata.requires("timm_jem") or []
    except metadata.PackageNotFoundError as error:
        raise InputError("timm_jem is not installed, so what it needs is unknown: pip install -e . first") from error
    needed = [line for line in needed if not re.search(r"\bextra\s*==", line)]
    return ["--extra-index-url https://download.pytorch.org/whl/cpu", *needed]
