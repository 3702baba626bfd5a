"""Imports go down only, and what every module may use is written here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "errors": set(),
    "energy": set(),
    "sampling": {"errors"},
    "replay_buffer": {"errors"},
    "gaussians": {"errors"},
    "objectives": {"energy", "errors"},
    "models": {"models", "errors"},
    "chains": {"errors"},
    "card": set(),
    "folder": {"chains", "models", "errors"},
    "hub": {"card", "chains", "folder", "errors"},
    "model": {"energy", "sampling", "models", "chains", "card", "folder", "hub", "errors"},
    "augmentation": {"errors"},
    "images": {"errors"},
    "streamed": {"images", "errors"},
    "data": {"augmentation", "images", "streamed", "errors"},
    "streams": {"augmentation", "data", "errors"},
    "training": {"energy", "sampling", "replay_buffer", "objectives", "model", "data", "streams", "training", "errors"},
    "evaluation": {"energy", "sampling", "models", "model", "data", "images", "evaluation", "errors"},
    "__init__": {"energy", "sampling", "replay_buffer", "gaussians", "objectives", "chains", "model", "models", "errors"},
}
FILES = sorted((ROOT / "timm_jem").rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "timm_jem" else {node.module}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    part = path.relative_to(ROOT / "timm_jem").parts[0].removesuffix(".py")
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("timm_jem.")}
    assert ours <= MAY_IMPORT[part]
    recipes = {recipe.stem for recipe in (ROOT / "recipes").glob("*.py")}
    assert not {name.split(".")[0] for name in imported(path)} & {"recipes", "pickle", *recipes}
