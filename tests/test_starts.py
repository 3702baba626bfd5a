"""Where fresh chains start: Gaussians that a model carries, from training to its readers."""

import json
import shlex
import warnings
from dataclasses import replace

import pytest
import timm
import torch
import train
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

import timm_jem
from timm_jem import ClassGaussians, InputError, ReplayBuffer, SGLDConfig
from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.evaluation.chain_length import chains_by_length
from timm_jem.gaussians import STARTS_FILE
from timm_jem.hub.card import model_card
from timm_jem.hub.provenance import Provenance
from timm_jem.noise import chain_generators, draw_seeds, uniform_noise
from timm_jem.pixels import to_pixels
from timm_jem.sampling import sgld
from timm_jem.training.run_folder import RunFolder
from timm_jem.training.starts import ImageStarts, class_gaussians
from timm_jem.training.state import copy_tree, load_tree


@pytest.fixture
def gaussians():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ClassGaussians.fit(images, torch.arange(40) % 3, 3)


@pytest.fixture
def jem(gaussians):
    torch.manual_seed(0)
    sgld_config = SGLDConfig(num_steps=3, noise_std=0.05, sample_steps=5, denoise_steps=2)
    jem = timm_jem.create_model("wrn_10_1", num_classes=3, input_size=(1, 8, 8), sgld=sgld_config).eval()
    jem.starts = gaussians
    return jem


def drawn(jem, y, seeds, starts):
    generators = chain_generators(seeds)
    u = starts((len(seeds), 1, 8, 8), generator=generators, y=y)
    options = {"num_steps": 5, "denoise_steps": 2, "batch_size": 256}
    return jem.normalize(sgld(jem.pixel_energy, u, jem.sgld, y=y, generator=generators, **options)).detach()


def test_fresh_chains_start_from_the_models_own_and_noise_is_at_hand(jem, gaussians):
    y, seeds = torch.tensor([2, 0, 1, 1]), [5, 6, 7, 8]
    assert torch.equal(jem.sample(y=y, seeds=seeds), drawn(jem, y, seeds, gaussians))
    assert torch.equal(jem.sample(seeds=seeds), drawn(jem, None, seeds, gaussians))  # of the classes' mixture
    assert torch.equal(jem.sample(y=y, seeds=seeds, init="noise"), drawn(jem, y, seeds, uniform_noise))
    from_starts = jem.sample(y=y, seeds=seeds)
    jem.starts = None
    assert not torch.equal(jem.sample(y=y, seeds=seeds), from_starts)
    assert torch.equal(jem.sample(y=y, seeds=seeds), jem.sample(y=y, seeds=seeds, init="noise"))


def test_the_evaluations_chains_are_those_that_sample_draws(jem):
    y = torch.arange(6) % 3
    seeds = draw_seeds(6, torch.Generator().manual_seed(3))
    ((_, u),) = chains_by_length(jem, [5], y=y, generator=torch.Generator().manual_seed(3))
    assert torch.equal(jem.normalize(u), jem.sample(y=y, seeds=seeds))


def test_they_are_saved_with_the_model_and_go_with_it(jem, gaussians, tmp_path):
    jem.save_pretrained(tmp_path)
    again = timm_jem.from_pretrained(tmp_path, replay_buffer=False)
    assert torch.equal(again.sample(4, seeds=range(4)), jem.sample(4, seeds=range(4)))
    assert set(load_file(tmp_path / STARTS_FILE)) == {"means", "factors", "scales", "residual_std", "weights"}
    again.starts = None
    again.save_pretrained(tmp_path)
    assert not (tmp_path / STARTS_FILE).exists()
    assert timm_jem.from_pretrained(tmp_path).starts is None


def test_the_hub_has_them_as_long_as_the_model_does(hub, jem):
    jem.push_to_hub("user/starts")
    assert STARTS_FILE in hub.files("user/starts")
    assert torch.equal(timm_jem.from_pretrained("user/starts").starts.factors, jem.starts.factors)
    jem.starts = None
    jem.push_to_hub("user/starts")
    assert STARTS_FILE not in hub.files("user/starts")
    assert timm_jem.from_pretrained("user/starts").starts is None


def test_starts_that_are_not_in_the_cache_are_missed(hub, jem, tmp_path):
    jem.push_to_hub("user/starts")
    timm.create_model("hf-hub:user/starts", pretrained=True)
    with pytest.warns(UserWarning, match="user/starts was saved with a chain_starts.*load it once while online"):
        assert timm_jem.from_pretrained("user/starts", local_files_only=True).starts is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timm_jem.from_pretrained("user/starts").starts is not None
        assert timm_jem.from_pretrained("user/starts", local_files_only=True).starts is not None
        jem.save_pretrained(tmp_path)
        (tmp_path / STARTS_FILE).unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["timm_jem"].pop("starts") is True  # older files say nothing
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert timm_jem.from_pretrained(tmp_path).starts is None


def test_a_card_says_where_chains_start(jem):
    about = {
        "repo_id": "me/x", "architecture": "wrn_10_1", "parameters": 1, "input_size": (1, 8, 8), "class_names": None,
        "num_classes": 3, "sgld": {"num_steps": 5}, "provenance": Provenance.read({"config": {"train": {}}}),
        "weights_license": None, "chains": 0, "pictures": (),
    }  # fmt: skip
    for starts, words in ((3, "Gaussians of the classes\n"), (1, "a Gaussian\n"), (0, "noise\n")):
        card = model_card(**about, starts=starts)
        assert f"5 SGLD steps from {words}" in card
        assert ("eight images\nor more, not images" in card) == (starts > 0)
        assert ("of each class" in card) == (starts == 3)
    about["provenance"] = Provenance.read({"config": {"data": {"starts": "user/others"}}})
    card = model_card(**about, starts=1)
    assert "5 SGLD steps from a Gaussian\n" in card
    assert "at images of another data set, which are not published" in card


def broken(**changes):
    return lambda tensors: {**tensors, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"means": tensors["means"]}, "holds"),
        (lambda tensors: {str(i): torch.empty(0) for i in range(2000)}, "header of 1.. KiB: above 64 it is no such file"),
        (lambda tensors: {name: tensor.long() for name, tensor in tensors.items()}, "floating-point tensor"),
        (broken(means=torch.full((3, 1, 8, 8), torch.nan)), "means holds NaN"),
        (broken(residual_std=torch.full((3, 1, 8, 8), 1e38)), "far outside"),
        (broken(residual_std=torch.full((3, 1, 8, 8), -0.1)), "residual_std holds numbers below 0"),
        (broken(scales=torch.full((3, 1), torch.nan)), "scales holds NaN"),
        (broken(scales=torch.full((3, 1), torch.inf)), "far outside"),
        (broken(scales=torch.full((3, 1), -0.1)), "scales holds numbers below 0"),
        (broken(scales=torch.zeros(3, 1, dtype=torch.int8)), "scales of class Gaussians is torch.int8"),
        (broken(factors=torch.zeros(3, 64, 1)), "factors of class Gaussians is torch.float32"),
        (broken(factors=torch.zeros(3, 64, 1, dtype=torch.uint8)), "give int8"),
        (broken(factors=torch.zeros(3, 63, 1, dtype=torch.int8)), "disagree"),
        (broken(factors=torch.zeros(3, 64, 2, dtype=torch.int8)), "disagree"),
        (broken(scales=torch.zeros(2, 1)), "disagree"),
        (broken(weights=torch.tensor([1.0, -1.0, 1.0])), "weights holds numbers below 0"),
        (broken(weights=torch.zeros(3)), "none of its classes"),
        (lambda tensors: {name: tensor[:2] for name, tensor in tensors.items()}, "3 classes"),
        (None, "not a complete safetensors file"),
    ],
)
def test_what_no_model_wrote_is_one_line(jem, tmp_path, change, message):
    jem.save_pretrained(tmp_path)
    file = tmp_path / STARTS_FILE
    if change is None:
        file.write_bytes(b"nothing")
    else:
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    with pytest.raises(InputError, match=message) as error:
        timm_jem.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_others_are_refused_when_they_are_set_and_when_the_head_is_another(jem, gaussians):
    for wrong in (5, "noise", replace(gaussians, means=torch.zeros(3, 1, 4, 16), residual_std=torch.zeros(3, 1, 4, 16))):
        with pytest.raises(InputError, match=r"starts is|class Gaussians are"):
            jem.starts = wrong
    jem.backbone.reset_classifier(2)
    with pytest.raises(InputError, match=r"2 classes .*: set jem\.starts = None"):
        jem.sample(1)
    jem.starts = None
    assert jem.sample(1, num_steps=1).isfinite().all()


def test_chains_start_at_images_drawn_by_the_generator_alone():
    images = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for classes in (None, 3):
        rng = torch.Generator().manual_seed(1)
        buffer = ReplayBuffer(
            (1, 8, 8), init=ImageStarts(images), generator=rng, capacity=60, num_classes=classes, restart_prob=1
        )
        which = (buffer.chains[:, None] == to_pixels(images)).flatten(2).all(2)
        assert (which.sum(1) == 1).all()
        assert (which.sum(0) > 3).all()
        saved = copy_tree(buffer.state_dict())
        drawn = [buffer.draw(9)[0] for _ in range(3)]
        buffer.load_state_dict(saved)
        assert all(torch.equal(buffer.draw(9)[0], chains) for chains in drawn)
    with pytest.raises(InputError, match=r"chains of shape \(1, 4, 4\)"):
        ImageStarts(images)((2, 1, 4, 4), generator=rng)
    for bad in (images.float(), images[0], images[:0], None):
        with pytest.raises(InputError, match="images to start chains at are not 8-bit"):
            ImageStarts(bad)


def test_gaussians_are_of_the_same_images_whether_these_are_kept_in_memory_or_not():
    kept, read = (class_gaussians(load_splits(DataConfig(cache_gib=gib)), 0) for gib in (2, 0))
    for name in ("means", "factors", "scales", "residual_std", "weights"):
        assert torch.equal(getattr(kept, name), getattr(read, name))


def test_a_run_whose_chains_start_at_images_of_others_publishes_none_of_them(tmp_path, capsys):
    rows, others, run = digits(), tmp_path / "others.parquet", tmp_path / "run"
    rows.select(range(300)).to_parquet(others)
    flags = (
        f"--data.starts {others} --train.objective.w_x 0 --train.objective.w_xy 1 --train.batch_size 16 --sgld.num_steps 1 "
        f"--sgld.denoise_steps 0 --sgld.noise_std 0 --sgld.step_size 1e-3 --train.sample_steps [1] --train.sample_count 20 "
        f"--train.buffer_size 200 --model.name wrn_10_1 --data.dataset digits --train.threads 1 --output_dir {run}"
    )
    train.main(shlex.split(f"{flags} --train.steps 2 --train.warmup_steps 1"))
    told = capsys.readouterr().out
    assert "chains started at images of others.parquet, which are not published" in told
    assert {path.name for path in (run / "model").iterdir()} == {"config.json", "model.safetensors", STARTS_FILE}
    assert set(RunFolder(run).pictures()) == {"samples.png"}
    assert (run / "chains.png").is_file()
    jem = timm_jem.from_pretrained(run / "model")
    assert len(jem.starts.means) == 1
    images = to_pixels(torch.stack([pil_to_tensor(image) for image in rows["image"][:300]]))
    torch.testing.assert_close(jem.starts.means[0], images.mean(0))
    state = load_tree(next(run.glob("checkpoints/*/rank*0.safetensors")))
    chains = state["state"]["learner"]["buffer"]["chains"]  # after steps so short that they are where they started
    assert (torch.cdist(chains.flatten(1), images.flatten(1)).amin(1) < 0.05).all()
    with pytest.raises(InputError, match="chains that may show such images are published, or not"):
        train.main(shlex.split(f"--resume {run} --train.steps 3 --data.starts null"))


@pytest.mark.parametrize("weights", ["--train.objective.w_x 0 --train.objective.w_xy 1", "--train.objective.w_x 1"])
def test_a_run_draws_from_where_its_chains_started(tmp_path, weights):
    """With chains of E(x) as well, which start from the mixture of the classes."""
    run = tmp_path / "run"
    train.main(
        shlex.split(
            f"--train.init gaussian {weights} --train.steps 2 --train.warmup_steps 1 --train.batch_size 16 --sgld.num_steps 2 "
            f"--sgld.denoise_steps 1 --train.sample_steps [1] --train.sample_count 20 --train.buffer_size 200 "
            f"--train.ema_decay 0.5 --model.name wrn_10_1 --data.dataset digits --train.threads 1 --output_dir {run}"
        )
    )
    starts = timm_jem.from_pretrained(run / "model").starts
    assert len(starts.means) == 10
    rows = digits()
    images = to_pixels(torch.stack([pil_to_tensor(image) for image in rows["image"]]))
    means = [images[torch.tensor(rows["label"]) == c].mean(0) for c in range(10)]
    nearest = [min(range(10), key=lambda c, of_class=of_class: (of_class - means[c]).abs().mean()) for of_class in starts.means]
    assert nearest == list(range(10))
