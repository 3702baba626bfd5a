"""What the README says runs as it says."""

import re
import shlex
import shutil

import push
import pytest
import torch
import train
from recipe_processes import ROOT, launch

import timm_jem
from timm_jem.data import digits

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_opens_with_two_commands():
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(block) == 2
    assert block[0].endswith("accelerate launch recipes/train.py")
    assert block[1].endswith("python -m pytest")
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_the_readmes_python_runs(hub, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    jem = timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8))
    jem.chains = timm_jem.PublishedChains.of_pixels(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10)
    jem.push_to_hub("user/digits-jem")
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number], {})


COMMANDS = re.findall(r"^accelerate launch (recipes/train\.py.*?)(?:  +#.*)?$", README, re.MULTILINE)
PUSH = re.search(r"^python (recipes/push\.py.*?)  +#", README, re.MULTILINE)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_training_commands_run(hub, tmp_path, monkeypatch, command):
    """As written but for the number of steps, a data set that needs no network, and the size of the network.

    The first is launched as a shell would; the others, which differ in their flags alone, run in this process.
    """
    monkeypatch.chdir(tmp_path)
    rows = digits().select(range(60))
    if "cifar10" in command:
        (tmp_path / "cifar10").mkdir()
        rows = rows.map(lambda row: {"image": row["image"].convert("RGB").resize((16, 16))})
        rows = rows.rename_column("image", "img")
        rows.to_parquet(tmp_path / "cifar10" / "train-0.parquet")
        rows.to_parquet(tmp_path / "cifar10" / "test-0.parquet")
    (tmp_path / "my_images").mkdir()
    for i, row in enumerate(rows.select(range(40))):
        folder = tmp_path / "my_images" / f"class{row['label'] % 2}"
        folder.mkdir(exist_ok=True)
        row[next(iter(row))].save(folder / f"{i}.png")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    short = (
        "--train.threads 1 --train.steps 1 --train.batch_size 4 --train.sample_steps [3] "
        "--train.sample_count 4 --sgld.num_steps 2"
    )
    small = "--model.name wrn_10_1" if "wrn_28_10" in command or "cifar10_jem" in command else ""
    if command == COMMANDS[0]:
        done = launch(f"{command} {short} {small}", tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        train.main(shlex.split(f"{command} {short} {small}".removeprefix("recipes/train.py")))
    assert len(list((tmp_path / "runs").glob("*/samples.png"))) == 1
    if "push_to" in command:
        assert len(hub.revisions["user/digits-jem"]) == 2
        push.main(shlex.split(PUSH.removeprefix("recipes/push.py")))
        assert len(hub.revisions["user/digits-jem"]) == 3
