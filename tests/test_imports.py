"""Imports go down only, and what every module may use is written here."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "progress": set(),
    "command_line": {"errors"},
    "files": {"errors"},
    "shell": {"errors"},
    "lock": {"errors"},
    "heap": set(),
    "energy": {"inputs", "errors"},
    "pixels": {"inputs", "errors"},
    "decoding": {"errors"},
    "preprocessing": {"decoding", "pixels", "errors"},
    "temperature": {"errors"},
    "reference": {"energy", "temperature", "inputs", "errors"},
    "prediction": {"decoding", "energy", "preprocessing", "reference", "inputs", "errors"},
    "modes": {"errors"},
    "noise": {"inputs", "errors"},
    "sampling": {"noise", "inputs", "errors"},
    "captured": {"errors"},
    "replay_buffer": {"inputs", "errors"},
    "refinement": {"noise", "sampling", "inputs", "errors"},
    "counterfactual": {"energy", "sampling", "inputs", "errors"},
    "restoration": {"noise", "sampling", "inputs", "errors"},
    "adaptation": {"energy", "modes", "errors"},
    "gaussians": {"files", "noise", "sampling", "inputs", "errors"},
    "objectives": {"energy", "inputs", "errors"},
    "models": {"models", "errors"},
    "backbone": {"modes", "inputs", "errors"},
    "inputs": {"errors"},
    "hub": {"files", "pixels", "inputs", "gaussians", "models", "hub", "errors"},
    "changes": {"modes", "noise", "sampling", "refinement", "counterfactual", "restoration", "adaptation", "inputs", "errors"},
    "model": {
        "energy", "modes", "noise", "sampling", "changes", "gaussians", "backbone", "inputs", "hub", "prediction",
        "preprocessing", "reference", "errors",
    },
    "wrap": {"files", "sampling", "gaussians", "models", "backbone", "hub", "model", "reference", "errors"},
    "ood": {"energy", "files", "modes", "noise", "progress", "backbone", "inputs", "reference", "model", "ood", "errors"},
    "conversion": {"files", "sampling", "inputs", "hub", "model", "wrap", "conversion", "version", "errors"},
    "data": {"decoding", "files", "pixels", "progress", "data", "errors"},
    "evaluation": {
        "backbone", "energy", "files", "lock", "inputs", "pixels", "modes", "noise", "sampling", "refinement", "models",
        "model", "wrap", "ood", "data", "decoding", "preprocessing", "evaluation", "temperature", "progress", "errors",
    },
    "training": {
        "backbone", "captured", "command_line", "energy", "files", "heap", "lock", "pixels", "modes", "noise", "sampling",
        "replay_buffer", "gaussians", "objectives", "models", "hub", "model", "wrap", "data", "evaluation", "training",
        "progress", "version", "errors",
    },
    "demo": {
        "files", "pixels", "modes", "noise", "decoding", "prediction", "reference", "backbone", "hub", "model", "data",
        "evaluation", "demo", "version", "errors",
    },
    "stability": {"files", "progress", "evaluation", "stability", "training", "errors"},
    "speed": {"modes", "data", "ood", "evaluation", "model", "pixels", "wrap", "training", "speed", "errors"},
    "__init__": {
        "energy", "heap", "noise", "sampling", "replay_buffer", "gaussians", "objectives", "models", "hub", "model", "wrap",
        "ood", "prediction", "reference", "version", "errors",
    },
}  # fmt: skip
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
    names = imported(path)
    assert "timm_jem" not in names, "name the room: from here a lower one could use everything unseen"
    ours = {name.split(".")[1] for name in names if name.startswith("timm_jem.")}
    assert ours <= MAY_IMPORT[part]
    recipes = {recipe.stem for recipe in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert not {name.split(".")[0] for name in names} & {"recipes", "pickle", *recipes}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_stand_alone(path):
    """Run as a file or as a module of a package, a recipe finds no other by name."""
    recipes = {recipe.stem for recipe in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert not {name.split(".")[0] for name in imported(path)} & {"recipes", *recipes}


def test_no_module_imports_itself_by_way_of_others():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    below = {name: imported(path) & set(modules) for name, path in modules.items() if path.name != "__init__.py"}
    tuple(TopologicalSorter(below).static_order())  # raises a CycleError
