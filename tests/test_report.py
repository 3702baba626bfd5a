import json
import math
from dataclasses import replace

import pytest

from timm_jem import InputError
from timm_jem.evaluation.comparison import comparison, read_reports
from timm_jem.evaluation.report import Measured, Report, Result, read_report
from timm_jem.evaluation.report_folder import check_comparison_dir, earlier_report, write_files
from timm_jem.files import folder_aside


def report(name="a", value=0.5, **more):
    result = Result("Robustness", "Under attack", "ε = 8/255", "PGD", value, 100, "20 steps", seed=3, **more)
    settings = {"preset": "quick", "seed": 0}
    section = Measured("Robustness", settings, "python recipes/evaluate.py a", "torch 2, cpu", 3.0, [result])
    return Report({"name": name}, [section])


def test_every_number_states_n_seed_and_protocol():
    kept = report(low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.sections[0].results.append(Result("Robustness", "Under attack", "ε = 16/255", "PGD", math.nan, 50, "other steps"))
    kept.sections[0].warnings.append("a warning")
    kept.sections[0].pictures.append(("p.png", "A caption."))
    text = kept.as_markdown()
    assert "| ε = 8/255 | 0.500 [0.400, 0.600] |" in text
    assert "| ε = 16/255 | nan |" in text
    assert "- *ε = 8/255*: 20 steps; n = 100, seed 3; [intervals]: Wilson, 95 %." in text
    assert "- *ε = 16/255*: other steps; n = 50." in text
    assert "- a warning" in text
    assert "![A caption.](p.png)" in text


def test_reports_come_back_as_they_were(tmp_path):
    kept = report(low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.sections[0].pictures.append(("p.png", "A caption."))
    (tmp_path / "report.json").write_text(kept.as_json())
    assert read_report(tmp_path) == kept
    assert read_report(tmp_path / "report.json") == kept


def test_a_folder_may_have_an_equals_sign_in_its_path(tmp_path):
    folder = tmp_path / "lr=0.1" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report("ours").as_json())
    assert list(read_reports([str(folder)])) == ["ours"]
    assert list(read_reports([f"a={folder}"])) == ["a"]


def test_comparison_averages_runs_of_a_name():
    text, data = comparison({"ours": [report("a", 0.5), report("b", 0.7)], "plain": [report("c", 0.1)]})
    assert "| ε = 8/255, PGD | 0.600 ± 0.141 | 0.100 |" in text
    assert data["rows"][0]["values"] == {"ours": [0.5, 0.7], "plain": [0.1]}
    assert "Measured differently" not in text
    twice = report("a", 0.5)
    twice.sections[0].results *= 2
    assert "| ε = 8/255, PGD | 0.500 |" in comparison({"ours": [twice]})[0]
    result = Result("Robustness", "Under attack", "ε = 8/255", "PGD", 0.2, 7, "20 steps")
    other = Report({"name": "d"}, [Measured("Robustness", results=[result])])
    assert "Measured differently** (protocol, n or split): Under attack" in comparison({"a": [report()], "d": [other]})[0]


def test_runs_that_lack_a_number_or_name_it_after_themselves():
    def run(steps, check, **more):
        rows = {f"fresh chains, {steps} steps": float(steps), f"Noise is harmless: {check}": 0.25, **more}
        results = [Result("Generation", "Table", row, "", value, 100, "p") for row, value in rows.items()]
        return Report({"name": "jem"}, [Measured("Generation", results=results)])

    text, data = comparison(
        {"jem": [run(10, "passed", T=1.0), run(40, "FAILED"), run(10, "passed", T=2.0)], "b": [run(20, "passed")]}
    )
    assert "| fresh chains | 20.000 ± 17.321 | 20.000 |" in text
    assert "| Noise is harmless | 0.250 ± 0.000 | 0.250 |" in text
    assert "| T | 1.500 ± 0.707 (2) |  |" in text
    assert [row["row"] for row in data["rows"]] == ["fresh chains", "Noise is harmless", "T"]
    assert "| T | 3.000 (1) |" in comparison({"jem": [run(10, "passed", T=3.0), run(10, "passed")]})[0]


def test_other_test_images_are_not_alike_and_warnings_are_told():
    def on(images, name="a", split="test", data="digits"):
        subject = {"name": name, "data": data, "images": images}
        return Report(subject, report(split=split).sections)

    images = {"image_shape": [1, 8, 8], "test": {"images": 360, "rows": "aa"}, "val": {"rows": "x"}}
    of_stream = {**images, "test": None}
    for alike in ({**images, "val": {"rows": "y"}}, of_stream, None):
        text = comparison({"a": [on(images)], "b": [on(alike)]})[0]
        assert "Not alike" not in text
        assert "Measured differently" not in text
    assert "Not alike" not in comparison({"a": [on(images)], "b": [on(images, data="./moved")]})[0]
    for elsewhere in (on(of_stream, data="./moved"), on({**images, "test": {}}, data="./moved")):
        assert "- **Not alike**: data sets differ" in comparison({"a": [on(images)], "b": [elsewhere]})[0]
    for other in ({**images, "test": {"images": 360, "rows": "bb"}}, {**images, "image_shape": [1, 16, 16]}):
        text = comparison({"a": [on(images)], "b": [on(other)]})[0]
        assert "- **Not alike**: test images differ between these reports\n" in text
    assert "Measured differently** (protocol, n or split)" in comparison({"a": [on(None)], "b": [on(None, split="train")]})[0]
    seeds = [on(images, f"run-{i}") for i in range(2)]
    for warned in (seeds[0], plain := on(images, "c")):
        warned.sections[0].warnings += ["Attack check failed", "two\nlines"]
    text = comparison({"ours": seeds, "plain": [plain]})[0]
    assert "of them\n  - run-0: Attack check failed\n  - run-0: two lines\n- **plain**: c\n  - Attack check failed\n" in text


def test_judges_and_outliers_of_one_name_that_are_others_are_not_alike():
    def beside(**settings):
        kept = report()
        kept.sections[0].settings |= settings
        return kept

    first = beside(
        judge_model={"weights": "a"},
        outliers={"textures": "a", "noise": "a"},
        extractor_weights={"timm x": "a", "timm y": None},
    )
    for alike in (first, report(), beside(outliers={"other": "b"})):
        assert "Not alike" not in comparison({"a": [first], "b": [alike]})[0]
    for other, what in (
        (beside(judge_model={"weights": "b"}), "judges of section Robustness"),
        (beside(outliers={"textures": "b", "noise": "a"}), "out-of-distribution sets of one name (textures)"),
        (beside(extractor_weights={"timm x": "b", "timm y": None}), "extractors of one name (timm x)"),
    ):
        text, data = comparison({"a": [first], "b": [other]})
        assert f"- **Not alike**: {what} differ between these reports\n" in text
        assert data["warnings"] == [f"Not alike: {what} differ between these reports"]


def test_other_transforms_held_out_and_training_images_are_not_alike():
    def on(title, transform=None, **images):
        subject = {"name": "a", "images": {"image_shape": [1, 8, 8], "test": {"rows": "x"}, **images}, "transform": transform}
        return Report(subject, [Measured(title, results=[Result(title, "Table", "row", "", 0.5, 100, "p")])])

    for title, split, what in (
        ("Robustness", "val", None),
        ("Robustness", "train", None),
        ("Classification and calibration", "val", "held-out images"),
        ("Classification and calibration", "train", None),
        ("Out-of-distribution detection", "val", "held-out images"),
        ("Generation", "train", "training images"),
        ("Generation", "val", None),
    ):
        told = comparison({"a": [on(title, **{split: {"rows": "x"}})], "b": [on(title, **{split: {"rows": "y"}})]})[1][
            "warnings"
        ]
        assert told == ([] if what is None else [f"Not alike: {what} differ between these reports"])
    told = comparison({"a": [on("Robustness")], "b": [on("Robustness", {"crop_pct": 0.5})]})[1]["warnings"]
    assert [line.split(" (")[0] for line in told] == ["Not alike: transforms of images differ between these reports"]


def test_a_run_of_nan_is_shown_among_others():
    text, _ = comparison({"ours": [report("a", math.nan), report("b", 0.7)], "wild": [report("c", math.inf), report("d", 1.0)]})
    assert "| ε = 8/255, PGD | nan ± nan | inf ± nan |" in text


def test_cards_get_the_results_of_a_type():
    kept = report(type="accuracy", title="PGD", low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.sections[0].results.append(Result("x", "y", "not on cards", "", 1.0, 1, "p"))
    kept.sections[0].results.append(Result("x", "y", "undefined", "", math.nan, 1, "p", type="fid", title="FID"))
    (result,) = kept.card_results()
    assert result == {
        "name": "PGD",
        "type": "accuracy",
        "value": 0.5,
        "split": "test",
        "n": 100,
        "protocol": "20 steps; seed 3; Wilson, 95 % [0.4000, 0.6000]",
    }


def test_cards_tell_the_warnings_of_their_results():
    kept = report(type="robust_accuracy", title="PGD")
    kept.sections[0].warnings.append("Attack check failed, robust accuracies may be overstated: it is. So.")
    kept.sections.append(Measured("Generation", warnings=["of samples"]))
    (result,) = kept.card_results()
    assert result["protocol"] == (
        "20 steps; seed 3; warning: Attack check failed, robust accuracies may be overstated: it is. So."
    )


def test_what_is_no_report_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no report\.json"):
        read_report(tmp_path)
    for text in ("[]", "{}", "nonsense", '{"format_version": 3}', '{"format_version": 3, "sections": [{"a": 1}]}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match="is not a report") as error:
            read_report(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "report.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="another version"):
        read_report(tmp_path)


def test_output_folders_are_not_written_over(tmp_path):
    for check in (earlier_report, check_comparison_dir):
        assert check(tmp_path / "new", False) is None
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            check(tmp_path / "file", True)
        with pytest.raises(InputError, match="other files"):
            check(tmp_path, True)
    (tmp_path / "report.json").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        earlier_report(tmp_path, False)
    assert earlier_report(tmp_path, True) is None
    (tmp_path / "report.json").write_text(report().as_json())
    assert earlier_report(tmp_path, False) == report()
    with pytest.raises(InputError, match="other files"):  # pictures of both have the same names
        check_comparison_dir(tmp_path, True)


def test_what_a_killed_process_left_in_a_folder_is_no_other_file(tmp_path):
    (tmp_path / "out").mkdir()
    with folder_aside(tmp_path / "out") as aside:
        (aside / "reliability.png").write_bytes(b"")
        for check in (earlier_report, check_comparison_dir):
            assert check(tmp_path / "out", False) is None
    (tmp_path / "compare.json").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        check_comparison_dir(tmp_path, False)


def test_json_is_strict_and_comes_back(tmp_path):
    kept = report(value=math.nan, low=-math.inf, high=math.inf, interval="bootstrap")
    kept.sections[0].curves["reliability"] = {
        "as it is": {"confidence": [math.nan, 0.9], "accuracy": [math.nan, 1.0], "share": [0.0, 1.0], "ece": math.inf}
    }
    (tmp_path / "report.json").write_text(kept.as_json())
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["sections"][0]["results"][0]["value"] == "NaN"
    again = read_report(tmp_path)
    assert again.as_json() == kept.as_json()
    (result,) = again.results
    assert math.isnan(result.value)
    assert (result.low, result.high) == (-math.inf, math.inf)
    assert again.curves["reliability"]["as it is"]["ece"] == math.inf


CHANGES = {
    "subject": [None, 3, {}, {"name": 3}, {"name": "a", "headline": 3}, {"name": "a", "headline": {"Model": 3}}],
    "sections": [None, {}, [3], [{}], "x"],
    "missing": [3, [3]],
}
IN_SECTION = {
    "title": [3, None],
    "settings": [3, []],
    "seconds": ["x", None, True],
    "warnings": ["x", [3]],
    "pictures": [[3], [["a"]], [["a", 3]], {}],
    "results": [{}, [3], [[]]],
    "curves": [
        [],
        {"reliability": {"as it is": {}}},
        {"reliability": {"as it is": {"confidence": [0.1], "accuracy": ["x"], "share": [1.0], "ece": 0.1}}},
        {"reliability": {"as it is": {"confidence": [0.1], "accuracy": [0.1, 0.2], "share": [1.0], "ece": 0.1}}},
        {"quality against length": {"fresh chains": [[1], [1], [1]]}},
        {"read as asked against length": {"fresh chains": [[1], [1], [1], [1]]}},
        {"accuracy under PGD, linf": {"PGD": [[0.1], [1], [1], ["a"]]}},
        {"accuracy under PGD, linf": {"PGD": 3}},
    ],
}
IN_RESULT = {
    "section": [3],
    "row": [None, 3, ["a"]],
    "value": ["high", None, True, [0.5]],
    "n": ["x", 1.5, None],
    "seed": ["x"],
    "low": ["x"],
    "interval": [3, "an interval without ends"],
    "split": [3],
}


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (place, name, value)
        for place, changes in (("report", CHANGES), ("section", IN_SECTION), ("result", IN_RESULT))
        for name, values in changes.items()
        for value in values
    ],
)
def test_a_report_of_other_types_is_one_line(tmp_path, place, name, value):
    data = json.loads(report().as_json())
    section = data["sections"][0]
    {"report": data, "section": section, "result": section["results"][0]}[place][name] = value
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="is not a report") as error:
        read_report(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_bars_and_lines_in_names_break_no_table():
    kept = report("a")
    kept.sections[0].results[0] = replace(kept.results[0], row="a|b\nc", column="x|y")
    kept.sections[0].results.append(replace(kept.results[0], column="z"))
    text, _ = comparison({"mine|yours": [kept]})
    for shown in (kept.as_markdown(), text):
        rows = [line.replace("\\|", "") for line in shown.splitlines() if line.startswith("|")]
        assert len(rows) >= 3
        assert len({row.count("|") for row in rows}) == 1
        assert "a\\|b c" in shown


def test_models_that_share_a_name_are_told_apart():
    def trained(name, weights, model="resnet, 5 parameters", command="train.py --train.lr 1"):
        subject = {"name": name, "weights": weights, "headline": {"Model": model}, "trained": command}
        return Report(subject, report(name).sections)

    seeds = [trained(f"run-{i}", str(i), command=f"train.py --train.seed {i} --output_dir 'runs/a b/{i}'") for i in range(3)]
    assert "no one model" not in comparison({"ours": seeds})[0]
    for other, why in (
        (trained("b", "w", "vit, 9 parameters"), "architectures differ (resnet, 5 parameters; vit, 9 parameters)"),
        (trained("b", "w", command="train.py --train.lr 2"), "training commands differ"),
        (trained("b", "v"), "some have the same weights"),
    ):
        text, _ = comparison({"ours": [trained("a", "v"), other]})
        assert f"- **ours is no one model in several runs**: {why}" in text


def test_a_section_that_fails_takes_no_place_of_numbers():
    kept = report()
    kept.put(Measured("Robustness", left_out="out of memory"), ["Robustness"])
    kept.put(Measured("Generation", left_out="out of memory"), ["Generation", "Robustness"])
    assert [section.title for section in kept.sections] == ["Generation", "Robustness"]
    assert len(kept.results) == 1
    again = "Robustness is of an earlier call; the last: out of memory"
    assert kept.warnings == ["Generation is left out: out of memory", again]
    kept.put(Measured("Generation"), ["Generation", "Robustness"])
    assert kept.warnings == [again]
    kept.put(Measured("Robustness"), ["Generation", "Robustness"])
    assert kept.warnings == []


def test_nothing_partial_stays(tmp_path):
    def write(folder):
        (folder / "report.json").write_text("x")
        raise OSError("disk full")

    with pytest.raises(InputError, match="disk full"):
        write_files(tmp_path / "out", write, last="report.json")
    assert list(tmp_path.iterdir()) == []


def test_files_of_two_comparisons_are_never_mixed(tmp_path):
    def write(folder):
        for name in ("reliability.png", "compare.json", "compare.md"):
            (folder / name).write_text("new")

    old = {name: tmp_path / name for name in ("compare.json", "pgd_l2.png")}
    for file in old.values():
        file.write_text("old")
    (tmp_path / "compare.md").mkdir()  # where no file can go
    with pytest.raises(InputError, match=r"compare\.md is a folder"):
        write_files(tmp_path, write, last="compare.json", stale=["pgd_l2.png"])
    assert {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()} == dict.fromkeys(old, "old")


def test_names_are_no_markup():
    hostile = "a\n\n| forged | 1 |\n<img src=http://evil/x> ![x](http://evil/y)"
    kept = report(hostile)
    kept.subject["headline"] = {"Data": hostile}
    kept.sections[0].warnings.append(hostile)
    kept.sections[0].results += [Result("Robustness", hostile, hostile, str(i), 0.5, i, hostile) for i in (1, 2)]
    for text in (kept.as_markdown(), comparison({hostile: [kept], "b": [kept]})[0]):
        assert "\n| forged" not in text
        assert "<img" not in text
        assert "![x]" not in text
