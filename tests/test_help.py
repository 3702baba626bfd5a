"""--help of every recipe: each setting is explained, and none of the extras is needed."""

import argparse
import os
import re
import subprocess
import sys

import benchmark
import convert
import demo
import evaluate
import jsonargparse
import predict
import push
import pytest
import stability
import train

RECIPES = [benchmark, convert, demo, evaluate, predict, push, stability, train]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_every_setting_is_explained(recipe, monkeypatch):
    parsers = []

    def caught(self, *given, **more):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", caught)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    actions = [action for action in parsers[-1]._actions if action.help is not argparse.SUPPRESS]
    assert len(actions) > 3
    for action in actions:
        # jsonargparse adds the type and the default to what is written there.
        assert len((action.help or "").split("(type:")[0].strip()) > 5, (
            f"{action.option_strings or action.dest} is not explained"
        )
    assert len(parsers[-1].format_usage().splitlines()) < 25
    assert not re.search(r"``|:[a-z]+:`|\bNone\b", parsers[-1].format_help())  # as docstrings have it


def test_names_of_classes_are_short(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "or of images, see ImageFiles), or" in said
    assert "split that is only reported; null: the first of test" in said


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gradio", "matplotlib", "pyautoattack", "pytorch_ood", "torch_fidelity"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for recipe in sys.argv[1:]:
    try:
        __import__(recipe).main(["--help"])
    except SystemExit as stopped:
        print(recipe, "ended with", stopped.code)
"""


@pytest.mark.slow
def test_help_needs_no_extra():
    names = [recipe.__name__ for recipe in RECIPES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"{name} ended with 0" in done.stdout.replace("None", "0")
