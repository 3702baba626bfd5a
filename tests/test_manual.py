"""Every command and block of Python in the README and the manual runs, as written but for sizes and the network."""

import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

import benchmark
import convert
import demo
import evaluate
import predict
import push
import pytest
import stability
import timm
import torch
import train
from recipe_processes import ROOT, launch
from released_networks import released

import timm_jem
from timm_jem.data import digits
from timm_jem.training import run as run_module

wrap_module = sys.modules["timm_jem.wrap"]

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md", "recipes/RESULTS.md")}
SET_UP = re.search(r"```bash\n(.*?)```", PAGES["README.md"], re.DOTALL)[1].splitlines()
COMMANDS = [
    line.split("  #")[0].strip()
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and line not in SET_UP
]
BLOCKS = [(name, block) for name, page in PAGES.items() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
OWN_METHOD = "class DenoisingScoreMatching"
CODE = [entry for entry in BLOCKS if OWN_METHOD not in entry[1]]
SHORT = (
    "--train.threads 1 --train.steps 1 --train.batch_size 4 --train.sample_steps [3] --train.sample_count 4 --sgld.num_steps 2"
)
FEW = (
    "--attack_images 4 --attack_steps 1 --attack_restarts 1 --auto_attack_images 0 --refinement_images 2 --refinement_steps 1 "
    "--eot 1 --samples 40 --curve_samples 20 --longest_chain 4 --real_images 100 --ood_images 20 --test_images 100"
)


def commands(program: str) -> list[str]:
    found = list(dict.fromkeys(command for command in COMMANDS if program in command))
    assert found, program
    return found


def test_the_readme_opens_with_two_commands():
    assert len(SET_UP) == 2
    assert SET_UP[0].endswith("accelerate launch recipes/train.py")  # the first of the training commands below
    assert SET_UP[1].endswith("python -m pytest")  # this


def test_no_command_is_left_out():
    recipes = ("train", "evaluate", "predict", "push", "convert", "demo", "stability", "benchmark")
    ran = [f"recipes/{recipe}.py" for recipe in recipes]
    for command in COMMANDS:
        assert command.startswith("pip install") or any(program in command for program in ran), command


def test_the_extras_that_pages_name_are_there():
    extras = set(metadata.metadata("timm_jem").get_all("Provides-Extra"))
    for named in re.findall(r"pip install -e '\.\[(.*?)\]'", "".join(PAGES.values())):
        assert set(named.split(",")) <= extras


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_are_there(name):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", PAGES[name]):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGES[name], re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", PAGES[name]):
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings], anchor


def test_the_readme_can_be_finished():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 130


@pytest.mark.parametrize("number", range(len(CODE)), ids=[f"{name} {i}" for i, (name, _) in enumerate(CODE)])
def test_python_runs(hub, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8))
    jem.chains = timm_jem.PublishedChains.of_pixels(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10)
    jem.push_to_hub("user/digits-jem")
    photographs(tmp_path)
    if "model_best.pth.tar" in CODE[number][1]:
        torch.save({"state_dict": timm.create_model("resnet18", num_classes=2).state_dict()}, "model_best.pth.tar")
    exec(CODE[number][1], {})


def test_a_method_of_ones_own_is_short_and_learns(tmp_path, monkeypatch, capsys):
    """The manual's: at most forty lines, no line of the package knows it, and it goes back and resumes like any other."""
    (block,) = [block for _, block in BLOCKS if OWN_METHOD in block]
    body = re.search(r"^class .*?(?=^\S(?!lass))", block, re.DOTALL | re.MULTILINE)[0].rstrip()
    assert body.endswith("pass")
    assert len(body.splitlines()) <= 40
    assert "DenoisingScoreMatching" not in Path(run_module.__file__).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    first: dict = {}
    exec(block, first)
    told = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'dsm': ([\d.]+)", told)]
    assert 0 < losses[-1] < 2  # that of a score of zero is about 1, of a random network far more
    second: dict = {}
    exec(block.replace("< 100", "< 101"), second)  # goes on from the hundredth step
    assert second["run"].step == 101
    assert timm_jem.from_pretrained("out/model").num_classes == 10


def without_download(arguments: dict) -> dict:
    """Arguments of timm.create_model: random weights stand in for those of the Hub."""
    return arguments if arguments["model_name"].startswith("local-dir:") else {**arguments, "pretrained": False}


def photographs(folder: Path) -> None:
    """A file, and two folders of files, as the manual's examples name them."""
    for name in ("photo", "photos/1", "photos/2", "held_out/1", "held_out/2"):
        (folder / name).parent.mkdir(exist_ok=True)
        digits()[0]["image"].save(folder / f"{name}.jpg")


def data_sets(folder: Path) -> None:
    """What the commands name: a Hub data set's stand-in and folders of images, small."""
    rows = digits().select(range(60))
    colour = rows.map(lambda row: {"image": row["image"].convert("RGB").resize((16, 16))})
    sets = (("cifar10", None), ("imagenet", 32), ("textures", None), ("zalando-datasets/fashion_mnist", None))
    for name, size in sets:
        (folder / name).mkdir(parents=True)
        of_size = colour if size is None else colour.map(lambda row: {"image": row["image"].resize((32, 32))})
        for split in ("train", "test"):
            of_size.rename_column("image", "img").to_parquet(folder / name / f"{split}-0.parquet")
    (folder / "my_images").mkdir()
    for i, row in enumerate(rows.select(range(40))):
        of_class = folder / "my_images" / f"class{row['label'] % 2}"
        of_class.mkdir(exist_ok=True)
        row["image"].save(of_class / f"{i}.png")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.usefixtures("precision_of_its_own")
@pytest.mark.parametrize("command", commands("recipes/train.py"))
def test_training_commands_run(hub, tmp_path, monkeypatch, command):
    """The first is launched as a shell would; the others, which differ in their flags alone, run in this process."""
    monkeypatch.chdir(tmp_path)
    data_sets(tmp_path)
    small = "--model.name wrn_10_1" if "wrn_28_10" in command or "cifar10_jem" in command else ""
    first = " --classifier.steps 1 --classifier.batch_size 4"
    small += first if any(name in command for name in ("own_data", "fashion_mnist", "cifar10_small")) else ""
    build = timm.create_model
    monkeypatch.setattr(
        wrap_module.timm, "create_model", lambda name=None, **rest: build(**without_download({"model_name": name} | rest))
    )
    flags = f"{command} {SHORT} {small}".removeprefix("accelerate launch ")
    if command == commands("recipes/train.py")[0]:
        done = launch(flags, tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        train.main(shlex.split(flags)[1:])
    assert len(list((tmp_path / "runs").glob("*/samples.png"))) == 1
    if "push_to" in command:
        assert len(hub.revisions["user/digits-jem"]) == 2
        (pushed,) = commands("recipes/push.py")
        push.main(shlex.split(pushed)[2:])
        assert len(hub.revisions["user/digits-jem"]) == 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data sets and two short runs."""
    folder = tmp_path_factory.mktemp("manual")
    data_sets(folder)
    for name in ("digits", "plain"):
        train.main([*shlex.split(SHORT), "--output_dir", str(folder / "runs" / name)])
    return folder


def test_evaluation_commands_run(runs, monkeypatch):
    monkeypatch.chdir(runs)
    build = timm.create_model

    def untrained(**arguments):
        """Random weights for the ten classes at hand stand in for the download."""
        if arguments["model_name"].startswith("resnet18"):
            arguments |= {"pretrained": False, "num_classes": 10}
        return build(**arguments)

    monkeypatch.setattr(wrap_module.timm, "create_model", lambda name=None, **rest: untrained(**({"model_name": name} | rest)))
    for command in commands("recipes/evaluate.py"):
        words = shlex.split(command)[2:]
        if "--compare" in words:
            evaluate.main(["runs/plain", *shlex.split(FEW), "--sections", "[classification]"])
            evaluate.main(words)
        else:
            large = ["--sections", "[classification]"] if "timm:" in command else []
            evaluate.main([*words, *shlex.split(FEW), *large])
    assert (runs / "runs" / "compared" / "compare.md").is_file()
    assert (runs / "runs" / "full" / "report.md").is_file()


@pytest.mark.parametrize("command", commands("recipes/convert.py"))
def test_conversion_commands_run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    _, _, file, output, *_ = shlex.split(command)
    torch.save(released({"robust_wrn.pt": "dat", "sadajem10.pt": "sada", "jem.pt": "jem"}[file])[1], file)
    convert.main(shlex.split(command)[2:])
    assert timm_jem.from_pretrained(output).num_classes == 10


def test_prediction_commands_run(runs, monkeypatch):
    monkeypatch.chdir(runs)
    photographs(runs)
    build = timm.create_model
    monkeypatch.setattr(
        wrap_module.timm, "create_model", lambda name=None, **rest: build(**without_download({"model_name": name} | rest))
    )
    for command in commands("recipes/predict.py"):
        predict.main(shlex.split(command)[2:])
    assert [len((runs / name).read_text().splitlines()) for name in ("predictions.csv", "photos.jsonl", "unlike.csv")] == [
        3,
        2,
        3,
    ]


def test_demo_commands_run(runs, monkeypatch):
    """All of it up to the page, which never ends: test_page.py opens it in a browser."""
    monkeypatch.chdir(runs)
    build, pages = timm.create_model, []
    monkeypatch.setattr(
        wrap_module.timm, "create_model", lambda name=None, **rest: build(**without_download({"model_name": name} | rest))
    )
    monkeypatch.setattr(demo, "need", lambda *library: None)
    monkeypatch.setattr(demo, "serve", lambda exhibit, given: pages.append((exhibit, given)))
    for command in commands("recipes/demo.py"):
        demo.main(shlex.split(command)[2:])
    assert len(pages) + len(list(runs.glob("*/app.py"))) == len(commands("recipes/demo.py"))
    assert len(pages[0][0].examples) > 2
    assert all(given.host is None and not given.share for _, given in pages)


@pytest.mark.parametrize("command", commands("recipes/stability.py"))
def test_stability_commands_run(tmp_path, monkeypatch, command):
    """All of it up to the runs, which others train: the command lines it starts are understood by the training recipe."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    jobs = []
    monkeypatch.setattr(stability.Pool, "run", lambda self, given: jobs.extend(given) or 15)  # as if stopped at once
    assert stability.main(shlex.split(command)[2:]) == 128 + 15
    assert len(jobs) >= 5
    for job in jobs[:20]:
        settings, _ = train.parse_settings(job.command[2:], train.DIGITS_CONFIG)
        assert settings.resume == "auto"


@pytest.mark.usefixtures("precision_of_its_own")
@pytest.mark.parametrize("command", commands("recipes/benchmark.py"))
def test_benchmark_commands_run(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    small = "--model wrn_10_1 --image_size 8 --batch_size 2 --num_steps 2 --rounds 1 --score_images 4"
    benchmark.main([*shlex.split(command)[2:], *shlex.split(small)])
    out = capsys.readouterr().out
    assert re.search(r"^overhead \d+\.\d{3}$", out, re.MULTILINE)
    assert ("% of an iteration" in out) == (tmp_path / "profile.png").is_file() == ("--profile" in command)
