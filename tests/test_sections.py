"""The report of an evaluation while it is made: sections that fail, stop, or take the place of earlier ones."""

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
from dataclasses import fields, replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import timm
import torch
from PIL import Image as PILImage
from timm.layers import use_fused_attn

import timm_jem
from timm_jem import InputError
from timm_jem.data import DataConfig, digits, load_splits
from timm_jem.data.identity import data_identity
from timm_jem.evaluation import classification_section, generation_section, pictures_section, subject
from timm_jem.evaluation.comparison import overlays
from timm_jem.evaluation.extractors import classifier_extractor, load_extractors
from timm_jem.evaluation.generation import frechet_distance, within_class_distance
from timm_jem.evaluation.pictures_section import _pairs
from timm_jem.evaluation.report import Measured, Report, read_report
from timm_jem.evaluation.report_folder import claimed
from timm_jem.evaluation.section import Section
from timm_jem.evaluation.settings import SECTIONS, TITLES, EvaluationConfig
from timm_jem.evaluation.subject import function_of, load_model, load_subject
from timm_jem.files import left_aside
from timm_jem.hub.published_chains import PublishedChains
from timm_jem.pixels import to_pixels

ON_DIGITS = {"config": {"data": {"dataset": "digits"}}}


def saved(folder, backbone):
    jem = timm_jem.wrap(backbone, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), provenance=ON_DIGITS)
    jem.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    return saved(tmp_path_factory.mktemp("sections") / "model", backbone)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **size)
        torch.nn.init.normal_(backbone.head.weight)
    return saved(tmp_path_factory.mktemp("sections") / "vit", backbone)


@pytest.fixture(scope="module")
def loaded(model):
    config, jem = EvaluationConfig(auto_attack_images=0, test_images=20, real_images=20), load_model(str(model))
    return load_subject(str(model), jem, DataConfig(channels=1, image_size=8), config, alike=True)


@pytest.fixture
def measure(model, loaded, tmp_path, monkeypatch):
    """Evaluate with these functions as sections, into tmp_path / "out"; those not given measure one number, one picture."""

    def run(flags="", **sections):
        def simple(name):
            def section_of_one(subject, config, section):
                section.add("table", "row", 1.0, 1, "counted")
                section.picture(f"{name}.png", PILImage.new("L", (4, 4)), "grey")

            return section_of_one

        measures = {name: (sections.get(name) or simple(name), less) for name, (_, less) in evaluate.MEASURES.items()}
        monkeypatch.setattr(evaluate, "MEASURES", measures)
        monkeypatch.setattr(evaluate, "TITLES", {name: name.capitalize() for name in SECTIONS})
        monkeypatch.setattr(evaluate, "load_subject", lambda *given, **more: loaded)
        return evaluate.main(shlex.split(f"{model} --output_dir {tmp_path / 'out'} {flags}"))

    return run


def pictures(folder):
    return {path.stem for path in folder.glob("*.png")}


def titles(folder):
    return {result.section for result in read_report(folder).results}


def test_each_section_is_on_disk_as_soon_as_it_is_measured(measure, tmp_path):
    found = []

    def look(subject, config, section):
        found.append((read_report(tmp_path / "out"), pictures(tmp_path / "out")))

    assert measure("--sections [classification,ood,generation]", generation=look) is None
    (report, drawn), *_ = found
    assert [result.section for result in report.results] == ["Classification", "Ood"]
    assert drawn == {"classification", "ood"}
    (warning,) = report.warnings
    assert warning.startswith("Unfinished: Generation not measured, because the evaluation is still running or was stopped.")
    assert read_report(tmp_path / "out").warnings == []
    assert "Unfinished" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("a score is not finite"), "a score is not finite"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "lower --batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch_size"),
        (MemoryError("Unable to allocate 30 GiB"), "lower --batch_size"),
    ],
    ids=["input", "cuda", "cpu", "numpy"],
)
def test_a_section_that_fails_takes_no_other_along(measure, tmp_path, error, reason):
    def fail(subject, config, section):
        section.add("table", "row", 1.0, 1, "counted")
        section.curves["curve"] = 1
        section.picture("partial.png", PILImage.new("L", (4, 4)), "grey")
        raise error

    message = measure(robustness=fail)
    assert "robustness" in message
    report = read_report(tmp_path / "out")
    assert titles(tmp_path / "out") == {"Classification", "Ood", "Generation", "Pictures"}
    assert pictures(tmp_path / "out") == {"classification", "ood", "generation", "pictures"}
    assert report.curves == {}
    (warning,) = report.warnings
    assert warning.startswith("Robustness is left out: ")
    assert reason in warning
    assert warning in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), IndexError("a bug")])
def test_what_stops_the_evaluation_leaves_what_was_measured(measure, tmp_path, error):
    def stop(subject, config, section):
        section.picture("partial.png", PILImage.new("L", (4, 4)), "grey")
        raise error

    with pytest.raises(type(error)):
        measure(robustness=stop)
    assert titles(tmp_path / "out") == {"Classification", "Ood"}
    assert pictures(tmp_path / "out") == {"classification", "ood"}
    assert "Robustness, Generation, Pictures not measured" in (tmp_path / "out" / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_section_asked_for_twice_is_measured_once(measure, tmp_path, capsys):
    measure("--sections [ood,ood]")
    told = capsys.readouterr().out
    assert "already measured" not in told
    assert told.count("ood: ") == 1


def test_the_same_command_goes_on_with_what_is_missing(measure, tmp_path, capsys):
    def stop(subject, config, section):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(generation=stop)
    before = (tmp_path / "out" / "ood.png").stat().st_ino
    assert measure() is None
    report = read_report(tmp_path / "out")
    assert [section.title for section in report.sections] == [name.capitalize() for name in SECTIONS]
    assert report.warnings == []
    assert (tmp_path / "out" / "ood.png").stat().st_ino == before
    assert "already measured: classification, ood, robustness" in capsys.readouterr().out
    assert measure() is None
    assert "all that is asked for is measured already" in capsys.readouterr().out


def test_a_section_that_failed_is_tried_again_with_less(measure, tmp_path):
    def fail(subject, config, section):
        if config.batch_size > 8:
            raise MemoryError("Unable to allocate 30 GiB")
        section.add("table", "row", 1.0, 1, "counted")

    assert "ood" in measure(ood=fail)
    assert "lower --batch_size or --ood_images" in read_report(tmp_path / "out").warnings[0]
    assert measure("--batch_size 8", ood=fail) is None
    assert [section.title for section in read_report(tmp_path / "out").sections] == [name.capitalize() for name in SECTIONS]
    assert read_report(tmp_path / "out").warnings == []


def test_other_sections_join_the_report_and_keep_their_settings(measure, tmp_path):
    measure("--sections [classification]")
    measure("--sections [ood] --ood_images 7 --overwrite true")
    report = read_report(tmp_path / "out")
    assert {section.title: section.settings["ood_images"] for section in report.sections} == {"Classification": 1000, "Ood": 7}
    assert pictures(tmp_path / "out") == {"classification", "ood"}


@pytest.mark.parametrize("flags", ["--ood_images 7", "--ood [uniform]", "--seed 1", "--preset full"])
def test_a_section_of_other_settings_is_not_silently_kept(measure, tmp_path, flags):
    measure("--sections [ood]")
    with pytest.raises(InputError, match=r"section ood is there with .*--overwrite true") as error:
        measure(flags)
    assert "\n" not in str(error.value)
    assert titles(tmp_path / "out") == {"Ood"}
    assert measure(f"--sections [ood] {flags} --overwrite true") is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"weights": "x"}, "weights"),
        ({"data_settings": {}}, "images"),
        ({"transform": {"crop_pct": 0.9}}, "transforms of images"),
        ({"function": {}}, "architecture or normalisation"),
    ],
)
def test_a_report_of_another_model_is_no_start(measure, tmp_path, change, what):
    measure("--sections [ood]")
    file = tmp_path / "out" / "report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "subject": {**report["subject"], **change}}))
    with pytest.raises(InputError, match=f"a report of other {what}: give a new folder"):
        measure("--sections [classification]")
    assert titles(tmp_path / "out") == {"Ood"}
    measure("--sections [classification] --overwrite true")
    assert titles(tmp_path / "out") == {"Classification"}
    assert pictures(tmp_path / "out") == {"classification"}


def test_the_same_weights_may_be_another_function(measure, model, tmp_path, capsys):
    jem = load_model(str(model))
    told = function_of(jem)
    assert (
        json.loads(json.dumps(told))
        == told
        == function_of(timm_jem.wrap(jem.backbone, input_size=(1, 8, 8), mean=0.5, std=0.5))
    )
    others = [timm_jem.wrap(jem.backbone, input_size=(1, 8, 8), mean=(0.5,), std=(std,)) for std in (1.0, 0.25)]
    with torch.random.fork_rng():
        backbone = timm.create_model("test_resnet", num_classes=10, in_chans=1, act_layer="silu")
    backbone.load_state_dict(jem.backbone.state_dict())
    others.append(timm_jem.wrap(backbone, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)))
    assert len({json.dumps(function_of(other)) for other in (jem, *others)}) == 4
    measure("--sections [ood]")
    file = tmp_path / "out" / "report.json"
    report = json.loads(file.read_text())
    assert report["subject"].pop("function") == told
    file.write_text(json.dumps(report))  # as it was before it was told
    measure("--sections [ood]")
    assert "all that is asked for is measured already" in capsys.readouterr().out


def test_a_baseline_that_was_trained_again_is_another(measure, model, loaded, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    monkeypatch.setattr(loaded, "baseline", base)
    flags = f"--baseline {tmp_path / 'base'} --sections"
    for _ in range(2):
        measure(f"{flags} [robustness]")
    assert "all that is asked for is measured already" in capsys.readouterr().out
    torch.nn.init.ones_(base.backbone.fc.bias)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"section robustness is there with another model as baseline '.*base': ") as error:
        measure(f"{flags} [classification,robustness]")
    assert "\n" not in str(error.value)
    measure(f"{flags} [classification]")  # which has none
    for more in ("--overwrite true", ""):
        assert measure(f"{flags} [robustness] {more}") is None
    shutil.rmtree(tmp_path / "base")
    capsys.readouterr()
    measure(f"{flags} [robustness]")
    assert "all that is asked for is measured already" in capsys.readouterr().out


def test_a_killed_evaluation_leaves_what_was_measured_and_nothing_else(model, tmp_path, monkeypatch):
    def kill(subject, config, section):
        section.picture("partial.png", PILImage.new("L", (4, 4)), "grey")
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    flags = f"{model} --sections [classification,ood] --test_images 60 --ood_images 20 --output_dir {out}"
    with monkeypatch.context() as patch:
        patch.setitem(evaluate.MEASURES, "ood", (kill, ""))
        process = multiprocessing.get_context("fork").Process(target=evaluate.main, args=(shlex.split(flags),))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert titles(out) == {"Classification and calibration"}
    assert left_aside(out)
    (tmp_path / ".out-2-0123abcd").mkdir()  # another folder's
    numbers = read_report(out).results
    assert evaluate.main(shlex.split(flags)) is None
    assert read_report(out).results[: len(numbers)] == numbers
    assert titles(out) == {"Classification and calibration", "Out-of-distribution detection"}
    assert left_aside(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-2-0123abcd"}


def test_one_evaluation_writes_to_a_folder(measure, tmp_path):
    """A second one is told of the first before any work, and takes nothing away from it, which has its working folder there."""

    def second(subject, config, section):
        with pytest.raises(InputError, match=f"another process, pid {os.getpid()} on .*, is writing to {tmp_path / 'out'}: "):
            measure("--sections [classification]")
        section.add("table", "row", 1.0, 1, "counted")

    assert measure("--sections [robustness]", robustness=second) is None
    assert titles(tmp_path / "out") == {"Robustness"}
    (tmp_path / "out" / ".lock").write_text("pid 1 on a machine")  # of a process that was killed
    measure("--sections [classification]")
    assert titles(tmp_path / "out") == {"Classification", "Robustness"}
    assert not (tmp_path / "out" / ".lock").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").write_text("pid 1 on a machine")
    with claimed(tmp_path / "new") as note:
        assert note is None


@pytest.mark.parametrize("name", SECTIONS)
def test_the_settings_that_a_section_reads_are_those_that_it_is_told_apart_by(name):
    known = {f.name for f in fields(EvaluationConfig)}
    source = Path(subject.__file__).with_name(f"{name}_section.py").read_text()
    reads = set(re.findall(r"config\.(\w+)", source)) & known
    of = {"ood": {"ood"}, "generation": {"extractors", "judge", "real_images"}, "robustness": {"baseline"}}.get(name, set())
    assert reads - {"batch_size"} <= set(EvaluationConfig().of_section(name))
    assert set(EvaluationConfig().of_section(name)) <= reads | of | {"seed", "test_images"}


def test_every_setting_changes_a_section_or_none():
    used = {setting for name in SECTIONS for setting in EvaluationConfig().of_section(name)}
    assert {f.name for f in fields(EvaluationConfig)} - used == {"preset", "sections", "batch_size"}


def test_settings_that_no_section_asks_for_are_said(model, tmp_path, capsys):
    assert EvaluationConfig(preset="full", judge="a", baseline="b", samples=40).without_effect == []
    assert EvaluationConfig(sections=["pictures"], judge="a", baseline="b", samples=40).without_effect == ["judge", "samples"]
    evaluate.main(shlex.split(f"{model} --output_dir {tmp_path} --sections [classification] --samples 40 --seed 3"))
    assert "note: samples does nothing in the sections classification\n" in capsys.readouterr().out


def test_a_report_names_no_file_outside_its_folder(measure, tmp_path):
    measure("--sections [ood]")
    (tmp_path / "secret.png").write_bytes(b"")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    report["sections"][0]["pictures"].append(["../secret.png", "not ours"])
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    measure("--sections [ood] --overwrite true")
    assert (tmp_path / "secret.png").exists()
    assert pictures(tmp_path / "out") == {"ood"}


def test_where_nothing_can_be_measured_an_earlier_report_stays(measure, tmp_path):
    def fail(subject, config, section):
        raise InputError("chains ran away")

    with pytest.raises(InputError, match="nothing could be measured: ood: chains ran away"):
        measure("--sections [ood]", ood=fail)
    assert not (tmp_path / "out").exists()
    measure("--sections [classification]")
    with pytest.raises(InputError, match="chains ran away"):
        measure("--sections [ood] --overwrite true", ood=fail)
    assert titles(tmp_path / "out") == {"Classification"}
    assert pictures(tmp_path / "out") == {"classification"}


def test_a_picture_that_cannot_be_written_is_a_reason(measure, tmp_path):
    def full(subject, config, section):
        section.folder.rmdir()
        try:
            section.picture("a.png", PILImage.new("L", (4, 4)), "grey")
        finally:
            section.folder.mkdir()

    assert "ood" in measure("--sections [classification,ood]", ood=full)
    assert "a.png can't be written" in (tmp_path / "out" / "report.md").read_text()


def test_several_processes_are_refused(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process, not in 2"):
        measure()
    assert not (tmp_path / "out").exists()


def test_fused_attention_is_built_without_for_the_refinement(vit, tmp_path):
    before = use_fused_attn()
    flags = (
        "--sections [robustness] --attack_images 4 --attack_steps 1 --auto_attack_images 0 --refinement_images 2 "
        "--refinement_steps 1 --eot 1 --linf_epsilons [0.1] --l2_epsilons [0.5]"
    )
    assert evaluate.main(shlex.split(f"{vit} {flags} --output_dir {tmp_path / 'out'}")) is None
    assert "attack through the refinement" in {result.column for result in read_report(tmp_path / "out").results}
    assert use_fused_attn() == before
    assert load_model(str(vit)).backbone.blocks[0].attn.fused_attn == before
    assert not load_model(str(vit), second_derivatives=True).backbone.blocks[0].attn.fused_attn


@pytest.mark.skipif(not use_fused_attn(), reason="timm's fused attention is off")
def test_a_backbone_without_second_derivatives_is_refused_before_anything_is_measured(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "set_fused_attn", lambda *enable: None)  # as in a backbone with kernels of its own
    with pytest.raises(InputError, match=r"no second derivatives.*--refinement_steps 0"):
        evaluate.main(shlex.split(f"{vit} --auto_attack_images 0 --output_dir {tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SECTIONS)
def test_the_network_never_sees_more_than_batch_size_images(model, loaded, tmp_path, monkeypatch, name):
    sizes = {"attack_images": 6, "attack_steps": 1, "auto_attack_images": 0, "refinement_images": 6, "refinement_steps": 1}
    sizes |= {"samples": 20, "curve_samples": 9, "longest_chain": 4, "ood_images": 9, "eot": 2}
    config = EvaluationConfig(batch_size=5, baseline="itself", linf_epsilons=[0.1], l2_epsilons=[0.5], **sizes)
    whole = replace(loaded, model=load_model(str(model)), outliers={"noise": loaded.test})
    whole.model.sgld = replace(whole.model.sgld, num_steps=2)
    whole.baseline = whole.model
    monkeypatch.setattr(pictures_section, "distal_adversarials", partial(pictures_section.distal_adversarials, steps=2))
    monkeypatch.setattr(timm_jem.JEM, "counterfactual", partialmethod(timm_jem.JEM.counterfactual, steps=2))
    whole.extractors = load_extractors(["pixels"], input_size=(1, 8, 8))
    seen = []
    first = next(module for module in whole.model.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    found = Measured(name)
    evaluate.MEASURES[name][0](whole, config, Section(found, tmp_path))
    assert found.results or found.pictures
    assert max(seen) <= 5
    refined = [result.protocol for result in found.results if "refinement" in result.table]
    assert all(protocol.endswith(", 5 images at once") for protocol in refined)  # others have other noise
    assert len(refined) == 6 * (name == "robustness")


def test_held_out_images_that_are_all_right_tell_no_temperature(model, loaded, tmp_path):
    whole = replace(loaded, model=load_model(str(model)))
    y = whole.model(whole.model.normalize(to_pixels(whole.val))).argmax(1)
    for labels, columns in ((y, {"as it is"}), (torch.cat([(y[:1] + 1) % 10, y[1:]]), {"as it is", "temperature scaled"})):
        found = Measured("Classification")
        section = classification_section.classification_section
        section(replace(whole, val_y=labels), EvaluationConfig(), Section(found, tmp_path))
        assert {result.column for result in found.results} == columns == set(found.curves["reliability"])
        told = f"p(y|x) is the network's own: {len(y)} {whole.held_out} can't tell a temperature."
        assert (told in found.warnings) == (len(columns) == 1)


@pytest.mark.parametrize(("name", "least"), [("curve_samples", 2), ("real_images", 5)])
def test_fewer_images_than_distances_need_are_refused_at_once(name, least):
    assert getattr(EvaluationConfig(**{name: least}), name) == least
    with pytest.raises(InputError, match=f"{name} is {least - 1}"):
        EvaluationConfig(**{name: least - 1})


@pytest.mark.parametrize("setting", [{"l2_epsilon": 128.0}, {"l2_epsilons": [0.5, 128.0]}])
def test_balls_wider_than_all_images_are_named(model, setting):
    config = EvaluationConfig(auto_attack_images=0, test_images=20, sections=["robustness"], **setting)
    with pytest.raises(InputError, match=r"size 128, and no two images are further apart than 8 .*: divide grey levels by 255"):
        load_subject(str(model), load_model(str(model)), DataConfig(channels=1, image_size=8), config, alike=True)


def test_too_few_test_images_are_named_before_chains_are_drawn(model):
    config, jem = EvaluationConfig(auto_attack_images=0, test_images=4, real_images=20), load_model(str(model))
    with pytest.raises(InputError, match="generation needs 5 test images, and there are 4: raise --test_images"):
        load_subject(str(model), jem, DataConfig(channels=1, image_size=8), config, alike=True)


def test_few_chains_and_images_lose_what_they_cannot_tell_alone(model, loaded, tmp_path):
    whole, found = replace(loaded, model=load_model(str(model)), test=loaded.test[:7], test_y=loaded.test_y[:7]), Measured("G")
    whole.model.sgld = replace(whole.model.sgld, num_steps=2, denoise_steps=0)
    whole.model.chains = PublishedChains(loaded.test[:4], loaded.test_y[:4])
    whole.extractors, whole.judge = [classifier_extractor(loaded.model, "features")], loaded.model
    config = EvaluationConfig(samples=20, curve_samples=10, longest_chain=4, judge=str(model))
    generation_section.generation_section(whole, config, Section(found, tmp_path))
    scored = {result.row for result in found.results if result.column == "IS"}
    assert len(scored) == 1
    assert "fresh chains" in scored.pop()
    assert "The replay buffer is left out: it has 4 chains, and distances take 5." in found.warnings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"linf_epsilons": [0.03, 8]}, "linf_epsilons is 8: give a finite number above 0 and at most 1"),
        ({"linf_epsilon": 8}, "linf_epsilon is 8: give a finite number above 0 and at most 1"),
        ({"l2_epsilons": [0.5, 0]}, "l2_epsilons is 0: give a finite number above 0"),
        ({"preset": "fast"}, "preset is 'fast': give quick or full"),
        ({"sections": ["ood", "clasification"]}, "one of the sections is 'clasification': give classification, ood, "),
        ({"chain_precision": "fp16"}, "chain_precision is 'fp16': give no or bf16"),
        ({"linf_epsilons": 8 / 255}, "linf_epsilons is 0.03.*: give a list of sizes"),
    ],
)
def test_settings_outside_their_range_are_one_line(setting, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        EvaluationConfig(**setting)
    assert "\n" not in str(error.value)


def test_medians_of_an_even_number_are_between_the_middle_ones(tmp_path):
    levels = torch.tensor([9, 1, 4, 2], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    whole, found = SimpleNamespace(train=torch.zeros_like(levels), test=levels, seed=0), Measured("Generation")
    generation_section._neighbours(whole, EvaluationConfig(), Section(found, tmp_path), levels)
    assert [result.value for result in found.results] == pytest.approx([2 * 3 / 255] * 2)


def test_chains_without_noise_have_no_curve_against_their_length(model, loaded, tmp_path):
    whole, found = replace(loaded, model=load_model(str(model))), Measured("Generation")
    whole.model.sgld = replace(whole.model.sgld, num_steps=2, sample_steps=2, denoise_steps=3)
    whole.extractors = load_extractors(["pixels"], input_size=(1, 8, 8))
    config = EvaluationConfig(samples=20, curve_samples=10, longest_chain=3)
    generation_section.generation_section(whole, config, Section(found, tmp_path))
    assert any("chains of up to 3 steps are free of noise" in warning for warning in found.warnings)
    assert "Distance to the nearest training image" in {result.table for result in found.results}


def test_chains_alone_are_of_the_precision_asked_for(model, loaded, tmp_path, monkeypatch):
    whole, tables = replace(loaded, model=load_model(str(model))), []
    whole.extractors = load_extractors(["pixels"], input_size=(1, 8, 8))
    energy, extract = whole.model.pixel_energy, generation_section.extract

    def spied(call, in_bf16):
        return lambda *given, **more: in_bf16.add(torch.is_autocast_enabled("cpu")) or call(*given, **more)

    for precision, said in (("no", False), ("bf16", True)):
        of_chains, of_features, found = set(), set(), Measured("Generation")
        monkeypatch.setattr(whole.model, "pixel_energy", spied(energy, of_chains))
        monkeypatch.setattr(generation_section, "extract", spied(extract, of_features))
        config = EvaluationConfig(samples=20, curve_samples=10, longest_chain=21, chain_precision=precision)
        generation_section.generation_section(whole, config, Section(found, tmp_path))
        assert (of_chains, of_features) == ({said}, {False})
        for told in (" SGLD steps in bf16 from uniform noise", " chains in bf16 from uniform noise seen"):
            assert any(told in result.protocol for result in found.results) == said
        tables.append([(result.table, result.row, result.column) for result in found.results])
    assert tables[0] == tables[1]
    assert "chain_precision" in config.of_section("generation")


@pytest.mark.parametrize("ran_away", [False, True])
def test_chains_are_seen_to_be_near_legible_diverse_and_level(model, loaded, tmp_path, monkeypatch, ran_away):
    splits, judges, found = load_splits(DataConfig()), [], Measured("Generation")
    train, test, test_y = splits.train.images, splits.test.images[:40], splits.test.labels[:40]
    rows = torch.cat([torch.nonzero(splits.train.labels == label).flatten()[:4] for label in range(10)]).reshape(10, 4)
    real, copies = train[rows.T.flatten()], train[rows[:, 0].repeat(4)]  # of the classes 0 to 9 in turn
    last = torch.where(torch.arange(40) == 7, torch.inf, 0.5)[:, None, None, None].expand(40, 1, 8, 8)

    def chains(jem, lengths, *, y, **_):
        assert (lengths, y.tolist()) == ([2, 4, 8], [i % 10 for i in range(40)])
        yield from ((2, to_pixels(real)), (4, to_pixels(copies)), (8, last if ran_away else to_pixels(255 - real)))

    def fit(*given, **more):
        judges.append(fit_judge(*given, **more))
        return judges[-1]

    fit_judge = generation_section.fit_judge
    monkeypatch.setattr(generation_section, "fit_judge", fit)
    monkeypatch.setattr(generation_section, "chains_by_length", chains)
    whole = replace(loaded, model=load_model(str(model)), train=train, train_y=splits.train.labels, test=test, test_y=test_y)
    whole.model.sgld = replace(whole.model.sgld, num_steps=2, denoise_steps=0)
    whole.extractors = load_extractors(["auto"], input_size=(1, 8, 8))
    config = EvaluationConfig(samples=20, curve_samples=40, longest_chain=8)
    generation_section.generation_section(whole, config, Section(found, tmp_path))
    (judge,) = judges  # one for all tables
    values = {(result.table.split(", in ")[0], result.row, result.column): result.value for result in found.results}

    apart = within_class_distance(real, torch.arange(40) % 10) / within_class_distance(test, test_y)
    table = "Distance within a class against chain length"
    assert [values[table, row, ""] for row in ("2 steps", "4 steps")] == [pytest.approx(apart), 0]
    assert 0.7 < apart < 1.3
    assert values["Distance within a class", "real test images", "relative to real images"] == 1
    fresh = values["Distance within a class", "fresh chains, 2 steps", "distance"]
    of_20 = within_class_distance(test[:20], test_y[:20])
    assert values["Distance within a class", "fresh chains, 2 steps", "relative to real images"] == fresh / of_20
    assert values["Distance within a class", "real test images", "distance"] == of_20

    read = values["Read as asked against chain length", "2 steps", ""]
    assert read == judge.accuracy(real, torch.arange(40) % 10) == 1
    frechet = [values["Fréchet distance against chain length", f"{n} steps", ""] for n in (2, 4, 8)]
    assert frechet[0] == frechet_distance(to_pixels(real).flatten(1), to_pixels(train).flatten(1))
    level = values["Fréchet distance against chain length", "longest / best", ""]
    at_last = [value for (name, row, _), value in values.items() if "against chain length" in name and row == "8 steps"]
    assert len(at_last) == 3
    if ran_away:
        assert all(map(math.isnan, [*at_last, level]))
    else:
        assert level == frechet[2] / frechet[0] > 2
        assert at_last[2] == pytest.approx(apart)  # inverted images are as far apart

    (picture, _) = overlays({"a": [Report({"name": "a"}, [found])], "b": [Report({"name": "b"}, [found])]})["chain_length.png"]
    assert [len(axis.lines) for axis in picture.axes] == [2, 2, 2]
    assert (tmp_path / "chain_length.png").is_file()


def test_vits_come_to_the_end(vit, tmp_path):
    flags = (
        "--attack_images 4 --attack_steps 1 --auto_attack_images 0 --refinement_images 2 --refinement_steps 1 --eot 1 "
        "--linf_epsilons [0.1] --l2_epsilons [] --samples 20 --curve_samples 10 --longest_chain 21 --real_images 60 "
        "--test_images 60 --ood_images 20"
    )
    assert evaluate.main(shlex.split(f"{vit} {flags} --output_dir {tmp_path / 'out'}")) is None
    assert [section.title for section in read_report(tmp_path / "out").sections] == list(TITLES.values())


def test_pairs_of_classes_where_one_image_alone_is_of_another():
    first, second = _pairs(torch.tensor([3, 3, 5, 3]))
    assert (first.tolist(), second.tolist()) == ([0, 2], [2, 1])
    first, second = _pairs(torch.tensor([1, 2, 2, 0, 1]))
    assert (first.tolist(), second.tolist()) == ([3, 0, 1], [1, 2, 3])


@pytest.mark.parametrize(("missing", "extra"), [("matplotlib", "eval"), ("pyautoattack", "robust"), ("torch_fidelity", "eval")])
def test_a_missing_library_is_named_after_the_model_is_found(model, tmp_path, monkeypatch, missing, extra):
    monkeypatch.setattr("timm_jem.errors.find_spec", lambda name: None if name == missing else True)
    out = f"--output_dir {tmp_path / 'out'}"
    with pytest.raises(InputError) as error:
        evaluate.main(shlex.split(f"{model} {out}"))
    for command in (f"pip install 'timm_jem[{extra}]'", f"pip install -e '.[{extra}]'"):
        assert command in str(error.value)
    with pytest.raises(InputError) as error:
        evaluate.main(shlex.split(f"{tmp_path / 'nosuch'} {out}"))
    assert "needs" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_held_out_in_training_are_known_by_themselves_wherever_they_lie(model):
    config = EvaluationConfig(auto_attack_images=0, test_images=20, sections=["classification"])
    jem, data = load_model(str(model)), DataConfig(channels=1, image_size=8)
    trained_on = data_identity(load_splits(data))

    def warned(alike, of=data):
        subject = load_subject(str(model), jem, of, config, alike=alike)
        return len(subject.warnings), len(subject.of_test)

    assert (warned(True), warned(False)) == ((0, 0), (1, 1))  # settings alone tell
    jem.provenance = {"data": trained_on}
    assert warned(False) == (0, 0)
    assert warned(True, replace(data, split_seed=1)) == (1, 1)
    jem.provenance = {"data": {**trained_on, "val": None}}
    assert warned(True) == (1, 0)  # the test images are those of then


def test_a_test_split_that_is_not_known_to_be_trainings_own_is_told_of(tmp_path):
    for split, rows in (("train", range(300)), ("test", range(300, 400))):
        digits().select(rows).to_parquet(tmp_path / f"{split}.parquet")
    data = DataConfig(str(tmp_path), channels=1, image_size=8)
    config = EvaluationConfig(auto_attack_images=0, test_images=20, sections=["classification"])
    jem = timm_jem.create_model("test_resnet", num_classes=10, input_size=(1, 8, 8))
    exchanged = replace(data, train_split="test", test_split="train")

    def told(provenance, alike, of=exchanged):
        jem.provenance = provenance
        return load_subject("it", jem, of, config, alike=alike).of_test

    own = {"data": data_identity(load_splits(data))}
    assert told(own, False, data) == told(ON_DIGITS, True, data) == told({}, False) == []
    for provenance in (own, ON_DIGITS):
        (warning,) = told(provenance, False)
        assert warning.startswith("Test images are split train, which is not known to be")


def test_chains_of_the_buffer_are_of_all_classes():
    y = torch.arange(5).repeat_interleave(40)  # as a buffer's slots are
    jem = SimpleNamespace(chains=timm_jem.PublishedChains(y.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), y))
    of = SimpleNamespace(model=jem, generator=lambda offset: torch.Generator().manual_seed(offset))
    drawn = generation_section._buffered(of, EvaluationConfig(samples=40))
    assert drawn.asked.bincount(minlength=5).min() >= 4
    assert torch.equal(drawn.images[:, 0, 0, 0].long(), drawn.asked)
    assert len(generation_section._buffered(of, EvaluationConfig(samples=500)).images) == 200
