import json
import math
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import evaluate
import push
import pytest
import timm
import torch
import train
from datasets import ClassLabel
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.data.sources import absolute
from timm_jem.errors import quoted
from timm_jem.evaluation.ood import SCORES
from timm_jem.evaluation.report import Report, read_report
from timm_jem.evaluation.settings import DEFAULT_DETECTORS
from timm_jem.evaluation.subject import data_config, sampling_of, some
from timm_jem.files import fingerprint
from timm_jem.pixels import to_pixels

SMALL = (
    "--attack_images 20 --attack_steps 3 --auto_attack_images 2 --refinement_images 4 --refinement_steps 2 --eot 2 "
    "--samples 120 --curve_samples 40 --longest_chain 8 --real_images 200 --ood_images 60 "
    "--linf_epsilons [0.03,0.1] --l2_epsilons [0.5]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twenty steps of training: sure of nothing, but no constant."""
    folder = tmp_path_factory.mktemp("evaluate") / "digits"
    train.main(
        shlex.split(
            f"--train.steps 20 --train.warmup_steps 2 --train.sample_steps [1,2] --train.sample_count 40 --sgld.num_steps 5 "
            f"--train.threads 1 --output_dir {folder}"
        )
    )
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A timm classifier that knows nothing of this package."""
    folder = tmp_path_factory.mktemp("plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
        torch.nn.init.normal_(model.fc.weight)  # sure of everything, so that distal adversarials take few steps
    model.pretrained_cfg.update(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def evaluated(run, plain):
    evaluate.main(shlex.split(f"{run} {SMALL} --baseline {plain}"))
    return run / "evaluation"


def test_one_command_gives_the_whole_report(run, evaluated):
    report = read_report(evaluated)
    assert {result.section for result in report.results} == {
        "Classification and calibration",
        "Out-of-distribution detection",
        "Robustness",
        "Generation",
    }
    assert all(result.n > 0 and result.protocol for result in report.results)
    columns = {result.column for result in report.results if result.table == "AUROC"}
    assert columns == {SCORES[name] for name in DEFAULT_DETECTORS}
    text = (evaluated / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {path.name for path in evaluated.glob("*.png")} == set(shown)
    assert {"samples.png", "distal.png", "counterfactuals.png", "interpolations.png", "reliability.png"} <= set(shown)
    for file in shown:
        PILImage.open(evaluated / file).verify()
    assert not list(run.glob(".evaluation-*"))


def test_all_detectors_are_in_one_table(run, tmp_path):
    evaluate.main(shlex.split(f"{run} {SMALL} --sections [ood] --detectors all --output_dir {tmp_path}"))
    found = [result for result in read_report(tmp_path).results if result.table == "AUROC"]
    assert {result.column for result in found} == set(SCORES.values())
    sets = {"interpolation", "uniform noise", "constant colours"}
    assert {result.row for result in found} == set(read_report(tmp_path).sections[0].settings["outliers"]) == sets
    assert all(0 <= result.low <= result.value <= result.high <= 1 and result.n == 60 for result in found)
    assert "ViM: timm_jem.ood's vim (fitted to " in found[0].protocol
    assert "KNN: timm_jem.ood's knn (fitted to" in found[0].protocol


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--detectors vlm", "detectors has 'vlm': give all, or some of msp"),
        ("--detectors []", "detectors is empty"),
    ],
)
def test_detectors_that_there_are_not_are_named(run, capsys, flags, message):
    assert message in fails(capsys, f"{run} --sections [ood] {flags}")


def test_the_report_says_what_the_run_said(run, evaluated):
    summary = json.loads((run / "summary.json").read_text())
    values = {(r.table, r.row, r.column): r for r in read_report(evaluated).results}
    top = values["p(y|x) of test images", "Accuracy, top-1", "as it is"]
    assert (top.value, top.n) == (pytest.approx(summary["test_accuracy"]), 359)
    assert top.low < top.value < top.high
    ece = values["p(y|x) of test images", "ECE, 15 equal bins, L1", "as it is"]
    assert ece.value == pytest.approx(summary["test_ece"], abs=1e-6)
    # Of the untrained the value is partly chance, which the interval has no part of.
    assert ece.interval.startswith("basic bootstrap")
    assert 0 <= ece.low < ece.value
    clean = values["Accuracy under PGD, ℓ∞", "ε = 0/255", ""]
    jem, test = timm_jem.from_pretrained(run / "model"), load_splits(DataConfig()).test
    images, y = some(test, 20, 0, "")
    with torch.no_grad():
        right = jem(jem.normalize(to_pixels(images))).argmax(1) == y
    assert clean.value == right.double().mean().item()


def test_sections_do_not_change_each_other(run, tmp_path):
    evaluate.main(shlex.split(f"{run} {SMALL} --sections [ood] --output_dir {tmp_path / 'alone'}"))
    alone = {(r.table, r.row, r.column): r.value for r in read_report(tmp_path / "alone").results}
    whole = {(r.table, r.row, r.column): r.value for r in read_report(run / "evaluation").results}
    assert alone
    assert all(whole[key] == value for key, value in alone.items())


def test_any_timm_classifier_is_measured_by_the_same_code(plain, tmp_path):
    flags = f"--data.dataset digits --sections [classification,ood] --output_dir {tmp_path / 'out'}"
    evaluate.main(shlex.split(f"{plain} {SMALL} {flags}"))
    report = read_report(tmp_path / "out")
    accuracy = next(r for r in report.results if r.row == "Accuracy, top-1")
    model = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    test = load_splits(DataConfig()).test
    with torch.no_grad():
        expected = (model(to_pixels(test.images)).argmax(1) == test.labels).double().mean().item()
    assert accuracy.value == pytest.approx(expected)
    assert any("may have been trained on" in warning for warning in report.warnings)


def test_models_side_by_side(evaluated, tmp_path, capsys):
    evaluate.main(shlex.split(f"--compare '[a={evaluated}, a={evaluated}, b={evaluated}]' --output_dir {tmp_path / 'c'}"))
    text = (tmp_path / "c" / "compare.md").read_text()
    accuracy = next(r for r in read_report(evaluated).results if r.row == "Accuracy, top-1").value
    assert f"| Accuracy, top-1, as it is | {accuracy:.3f} ± 0.000 | {accuracy:.3f} |" in text
    assert {"pgd_linf.png", "pgd_l2.png", "reliability.png", "chain_length.png"} <= {p.name for p in (tmp_path / "c").iterdir()}


def test_the_card_says_what_was_measured(hub, run, evaluated):
    push.main([str(run), "user/evaluated"])
    files = hub.files("user/evaluated")
    card = files["README.md"].decode()
    assert {"evaluation/reliability.png", "evaluation/ood_auroc.png", "evaluation/pgd_linf.png"} <= set(files)
    assert "Wilson, 95 %" in card
    assert "Accuracy under AutoAttack, ℓ∞, ε = 8/255" in card
    assert "AUROC of log p(x) against interpolation" in card
    report = json.loads((evaluated / "report.json").read_text())
    # A picture that the report doesn't list is an earlier one's.
    without = json.loads(json.dumps(report))
    without["sections"][0]["pictures"] = []
    (run / "evaluation" / "report.json").write_text(json.dumps(without))
    push.main([str(run), "user/listed"])
    assert "evaluation/reliability.png" not in hub.files("user/listed")
    (run / "evaluation" / "report.json").write_text(json.dumps({**report, "subject": {**report["subject"], "weights": "x"}}))
    try:
        with pytest.raises(InputError, match="other weights"):
            push.main([str(run), "user/evaluated"])
        others = {**report["subject"], "function": {**report["subject"]["function"], "std": [1.0]}}
        (run / "evaluation" / "report.json").write_text(json.dumps({**report, "subject": others}))
        with pytest.raises(InputError, match="architecture or normalisation"):
            push.main([str(run), "user/evaluated"])
        told = report["subject"]["sampling"]
        others = {**report["subject"], "sampling": {**told, "sgld": {**told["sgld"], "sample_steps": 99}}}
        (run / "evaluation" / "report.json").write_text(json.dumps({**report, "subject": others}))
        with pytest.raises(InputError, match="chains with other settings"):
            push.main([str(run), "user/evaluated"])
    finally:
        (run / "evaluation" / "report.json").write_text(json.dumps(report))
    # What robustness tells is beside the run's own accuracy, not in its place.
    sections = [section for section in report["sections"] if section["title"] == "Robustness"]
    (run / "evaluation" / "report.json").write_text(json.dumps({**report, "sections": sections}))
    push.main([str(run), "user/robust"])
    (run / "evaluation" / "report.json").write_text(json.dumps(report))
    names = [
        result["name"] for result in json.loads(hub.files("user/robust")["config.json"])["timm_jem"]["provenance"]["results"]
    ]
    assert names[:2] == ["Accuracy", "Expected calibration error"]
    assert "Accuracy under AutoAttack, ℓ∞, ε = 8/255" in names


def test_numbers_of_other_images_are_on_no_card(hub, run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("evaluation"))
    folder = digits_folder(tmp_path / "half", digits().select(range(900)))
    evaluate.main(shlex.split(f"{copied} {SMALL} --sections [classification] --data.dataset {folder}"))
    with pytest.raises(InputError, match="other images") as error:
        push.main([str(copied), "user/other"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("results", [None, "x", [1], [{"a": 1}]])
def test_provenance_whose_results_are_none(hub, tmp_path, results):
    jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    jem.provenance = {"results": results}
    jem.save_pretrained(tmp_path / "model")
    told = {"weights": fingerprint(jem.backbone.state_dict()), "sampling": sampling_of(jem), "as_in_training": True}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.json").write_text(Report({"name": "a", **told}).as_json())
    if results is None:
        push.main([str(tmp_path), "user/none"])
        return
    with pytest.raises(InputError, match=r"provenance\['results'\]") as error:
        push.main([str(tmp_path), "user/wrong"])
    assert "\n" not in str(error.value)


def test_one_report_is_of_one_set_of_images_and_one_way_to_draw(run, tmp_path, capsys):
    model, out = tmp_path / "model", f"--output_dir {tmp_path / 'out'}"
    shutil.copytree(run / "model", model)
    folder = digits_folder(tmp_path / "grown", digits().select(range(900)))
    command = f"{model} {SMALL} {out} --data.dataset {folder} --sections"
    evaluate.main(shlex.split(f"{command} [classification]"))
    digits().to_parquet(folder / "train-0.parquet")
    assert "report of other images" in fails(capsys, f"{command} [classification,ood]")
    jem = timm_jem.from_pretrained(model)
    jem.sgld = replace(jem.sgld, num_steps=jem.sgld.num_steps + 1)
    jem.save_pretrained(model)
    assert "settings or starts of chains" in fails(capsys, f"{command} [classification]")
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    jem.fit_reference(images, torch.arange(40) % 10)
    jem.sgld = replace(jem.sgld, rest=0.2)
    jem.save_pretrained(model)
    for _ in range(2):  # made, and then known again
        evaluate.main(shlex.split(f"{command} [classification] --output_dir {tmp_path / 'rests'}"))
    assert "all that is asked for is measured already" in capsys.readouterr().out
    jem.fit_reference(images * 0.5, torch.arange(40) % 10)
    jem.save_pretrained(model)
    assert "starts of chains" in fails(capsys, f"{command} [classification] --output_dir {tmp_path / 'rests'}")


def test_a_report_goes_on_where_its_images_lie_elsewhere(run, tmp_path, capsys):
    command = f"{run} {SMALL} --test_images 50 --output_dir {tmp_path / 'out'} --data.dataset {tmp_path}"
    digits_folder(tmp_path / "here", digits().select(range(900)))
    evaluate.main(shlex.split(f"{command}/here --sections [classification]"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert "report of other images" in fails(capsys, f"{command}/there --sections [classification]")  # they aren't loaded
    evaluate.main(shlex.split(f"{command}/there --sections [classification,ood]"))
    assert len(read_report(tmp_path / "out").sections) == 2
    digits_folder(tmp_path / "other", digits().select(range(800)))
    assert "report of other images" in fails(capsys, f"{command}/other --sections [pictures]")


def test_provenance_that_says_nothing_of_its_settings():
    for config in (None, [], {"data": None}, {"data": {"dataset": 3}}):
        jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
        jem.provenance = {"config": config}
        with pytest.raises(InputError, match=r"--data\.dataset"):
            data_config(jem, "it", {})


@pytest.mark.parametrize("path", ["{}/photos", "./photos", "~/photos", "photos"])
def test_a_model_that_is_no_folder_here_chooses_no_images_of_this_machine(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "model"):
        (tmp_path / folder).mkdir()
    jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    jem.provenance = {"config": {"data": {"dataset": path.format(tmp_path)}}}
    local = re.escape(f"a local {quoted(absolute(path.format(tmp_path)))}: give --data.dataset")
    with pytest.raises(InputError, match=f"user/model is no folder here, .* {local}"):
        data_config(jem, "user/model", {})
    assert data_config(jem, "user/model", {"dataset": "photos"})[0].dataset == str(tmp_path / "photos")
    assert data_config(jem, "model", {})[0].dataset.endswith("/photos")
    asked = []
    monkeypatch.setattr("timm_jem.evaluation.subject.check_remote", lambda *of: asked.append(of))
    for anywhere in ("digits", "user/photos"):
        jem.provenance = {"config": {"data": {"dataset": anywhere, "config_name": "small"}}}
        assert data_config(jem, "user/model", {})[0].dataset == anywhere
    assert asked == [("user/photos", "small")]  # whose README may name files here


def test_flags_of_data_change_the_settings_of_training_one_by_one(run, tmp_path):
    _, _, told = evaluate.parse(["m", "--data.cache_gib", "1"])
    assert told == {"cache_gib": 1.0}
    jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    of_training = DataConfig("digits", split_seed=7, skip_broken=True, labels_per_class=10)
    jem.provenance = {"config": {"data": asdict(of_training)}}
    found, alike = data_config(jem, "it", told)
    assert (found, alike) == (replace(of_training, cache_gib=1.0, labels_per_class=None, channels=1, image_size=8), True)
    assert data_config(jem, "it", {"dataset": "digits", "streaming": False})[1]
    found, alike = data_config(jem, "it", {"split_seed": 0})
    assert (found.split_seed, found.skip_broken, alike) == (0, True, False)
    (tmp_path / "data.yaml").write_text("dataset: digits\nval_fraction: 0.2\n")
    _, _, told = evaluate.parse(["m", "--data", str(tmp_path / "data.yaml")])
    assert told == {"dataset": "digits", "val_fraction": 0.2}
    jem.provenance = {}
    with pytest.raises(InputError, match=r"doesn't say what it was trained on: give --data\.dataset"):
        data_config(jem, "it", {"cache_gib": 1.0})


def test_test_images_that_training_may_have_seen_are_told_of(run, tmp_path):
    options = f"--sections [classification] --test_images 50 --output_dir {tmp_path / 'o'}"
    evaluate.main(shlex.split(f"{run} {options} --data.dataset digits"))
    assert read_report(tmp_path / "o").warnings == []
    headline = "digits: 359 test images, of which each number tells how many it is of, and images held out of split train"
    assert f"- **Data**: {headline}, as in training\n" in (tmp_path / "o" / "report.md").read_text()
    evaluate.main(shlex.split(f"{run} {options} --overwrite true --data.split_seed 1"))
    assert any("all numbers may look too good" in warning for warning in read_report(tmp_path / "o").warnings)


def digits_folder(folder: Path, rows) -> Path:
    folder.mkdir()
    rows.to_parquet(folder / "train-0.parquet")
    return folder


def fails(capsys, command: str) -> str:
    with pytest.raises(InputError) as error:
        evaluate.main(shlex.split(command))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line_and_leaves_nothing(run, plain, tmp_path, capsys):
    out = f"--output_dir {tmp_path / 'out'} --sections [classification]"
    assert "which model" in fails(capsys, out)
    assert "doesn't say what it was trained on" in fails(capsys, f"{plain} {out}")
    assert "no data set" in fails(capsys, f"{run} {out} --data.dataset ./nowhere")
    assert "sections" in fails(capsys, f"{run} --sections [all] --output_dir {tmp_path / 'out'}")
    assert "seed is 4294967296" in fails(capsys, f"{run} {out} --seed 4294967296")
    assert fails(capsys, f"{run} {out} --data.val_fraction 2").startswith("data val_fraction is 2.0: give")

    headless = tmp_path / "headless"
    model = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    model.pretrained_cfg.update(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    timm.models.save_for_hf(model, headless, safe_serialization=True)
    assert "no classes" in fails(capsys, f"{headless} {out} --data.dataset digits")

    seven = digits_folder(tmp_path / "seven", digits().filter(lambda row: row["label"] < 7).cast_column("label", ClassLabel(7)))
    assert "has 10 classes and" in fails(capsys, f"{run} {out} --data.dataset {seven}")
    names = ClassLabel(names=["zero", *map(str, range(1, 10))])
    other = digits_folder(tmp_path / "other", digits().cast_column("label", names))
    assert "class 0 of" in fails(capsys, f"{run} {out} --data.dataset {other}")
    one = digits_folder(tmp_path / "one", digits().filter(lambda row: row["label"] == 3))
    assert "one class" in fails(capsys, f"{run} {out} --data.dataset {one}")

    broken = tmp_path / "broken"
    shutil.copytree(run / "model", broken)
    weights = load_file(broken / "model.safetensors")
    save_file({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, broken / "model.safetensors")
    assert "not finite" in fails(capsys, f"{broken} {out}")

    fake = tmp_path / "fake.safetensors"
    save_file({"weight": torch.zeros(3)}, fake)
    command = f"{run} --output_dir {tmp_path / 'out'} --sections [generation] --extractors [inception:{fake}]"
    assert "Inception" in fails(capsys, command)
    missing = tmp_path / "auto.pth"  # a name that holds "auto" stays what it is
    command = f"{run} --output_dir {tmp_path / 'out'} --sections [generation] --extractors [inception:{missing}]"
    assert str(missing) in fails(capsys, command)
    assert "ood is empty" in fails(capsys, f"{run} --output_dir {tmp_path / 'out'} --sections [ood] --ood []")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    assert "other files" in fails(capsys, f"{run} --output_dir {tmp_path / 'taken'}")
    assert "no report.json" in fails(capsys, f"--compare [{tmp_path}] --output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_chains_that_run_away_are_reported_and_the_rest_is_kept(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "wild")
    config = json.loads((tmp_path / "wild" / "config.json").read_text())
    config["timm_jem"]["sgld"] |= {"step_size": 1e9, "sample_steps": 1, "denoise_steps": 1}
    weights = load_file(tmp_path / "wild" / "model.safetensors")
    save_file(weights | {"fc.weight": weights["fc.weight"] * 1e30}, tmp_path / "wild" / "model.safetensors")
    (tmp_path / "wild" / "config.json").write_text(json.dumps(config))
    command = f"{tmp_path / 'wild'} {SMALL} --sections [classification,generation] --output_dir {tmp_path}"
    evaluate.main(shlex.split(f"{command}/one"))
    lengths = [r for r in read_report(tmp_path / "one").results if "chain length" in r.table]
    assert lengths
    assert any(math.isnan(r.value) for r in lengths)
    assert "| nan |" in (tmp_path / "one" / "report.md").read_text()
    config["timm_jem"]["sgld"]["sample_steps"] = 8
    (tmp_path / "wild" / "config.json").write_text(json.dumps(config))
    assert "generation" in evaluate.main(shlex.split(f"{command}/two"))
    report = read_report(tmp_path / "two")
    assert {r.section for r in report.results} == {"Classification and calibration"}
    assert any("120 of 120 fresh chains are not finite after 8 steps" in warning for warning in report.warnings)
