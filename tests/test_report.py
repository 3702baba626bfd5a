import json
import math

import pytest

from timm_jem import InputError
from timm_jem.evaluation.comparison import comparison
from timm_jem.evaluation.report import Report, Result, check_output_dir, read_report, write_files


def report(name="a", value=0.5, **more):
    result = Result("Robustness", "Under attack", "ε = 8/255", "PGD", value, 100, "20 steps", seed=3, **more)
    return Report({"name": name, "command": "python recipes/evaluate.py a"}, [result])


def test_every_number_states_n_seed_and_protocol():
    kept = report(low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.results.append(Result("Robustness", "Under attack", "ε = 16/255", "PGD", math.nan, 50, "other steps"))
    kept.warnings.append("a warning")
    kept.pictures.append(("Robustness", "p.png", "A caption."))
    text = kept.as_markdown()
    assert "| ε = 8/255 | 0.500 [0.400, 0.600] |" in text
    assert "| ε = 16/255 | nan |" in text
    assert "- *ε = 8/255*: 20 steps; n = 100, seed 3; [intervals]: Wilson, 95 %." in text
    assert "- *ε = 16/255*: other steps; n = 50." in text
    assert "- a warning" in text
    assert "![A caption.](p.png)" in text


def test_reports_come_back_as_they_were(tmp_path):
    kept = report(low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.pictures.append(("Robustness", "p.png", "A caption."))
    (tmp_path / "report.json").write_text(kept.as_json())
    assert read_report(tmp_path) == kept
    assert read_report(tmp_path / "report.json") == kept


def test_comparison_averages_runs_of_a_name():
    text, data = comparison({"ours": [report("a", 0.5), report("b", 0.7)], "plain": [report("c", 0.1)]})
    assert "| ε = 8/255, PGD | 0.600 ± 0.141 | 0.100 |" in text
    assert data[0]["values"] == {"ours": [0.5, 0.7], "plain": [0.1]}
    assert "Measured differently" not in text
    other = Report({"name": "d"}, [Result("Robustness", "Under attack", "ε = 8/255", "PGD", 0.2, 7, "20 steps")])
    assert "Measured differently** (protocol or n): Under attack" in comparison({"a": [report()], "d": [other]})[0]


def test_a_run_of_nan_is_shown_among_others():
    text, _ = comparison({"ours": [report("a", math.nan), report("b", 0.7)], "wild": [report("c", math.inf), report("d", 1.0)]})
    assert "| ε = 8/255, PGD | nan ± nan | inf ± nan |" in text


def test_cards_get_the_results_of_a_type():
    kept = report(type="accuracy", title="PGD", low=0.4, high=0.6, interval="Wilson, 95 %")
    kept.results.append(Result("x", "y", "not on cards", "", 1.0, 1, "p"))
    kept.results.append(Result("x", "y", "undefined", "", math.nan, 1, "p", type="fid", title="FID"))
    (result,) = kept.card_results()
    assert result == {
        "name": "PGD",
        "type": "accuracy",
        "value": 0.5,
        "split": "test",
        "n": 100,
        "protocol": "20 steps; seed 3; Wilson, 95 % [0.4000, 0.6000]",
    }


def test_what_is_no_report_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"has no report\.json"):
        read_report(tmp_path)
    for text in ("[]", "{}", "nonsense", '{"format_version": 1}', '{"format_version": 1, "results": [{"a": 1}]}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match="is not a report") as error:
            read_report(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "report.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(InputError, match="another version"):
        read_report(tmp_path)


def test_output_folders_are_not_written_over(tmp_path):
    assert check_output_dir(tmp_path / "new", False) == tmp_path / "new"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output_dir(tmp_path / "file", True)
    with pytest.raises(InputError, match="other files"):
        check_output_dir(tmp_path, True)
    (tmp_path / "report.json").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        check_output_dir(tmp_path, False)
    assert check_output_dir(tmp_path, True) == tmp_path


def test_nothing_partial_stays(tmp_path):
    def write(folder):
        (folder / "report.json").write_text("x")
        raise OSError("disk full")

    with pytest.raises(InputError, match="disk full"):
        write_files(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []
