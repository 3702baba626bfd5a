import json
import math

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from timm_jem import InputError
from timm_jem.stability.curves import Curve, Curves, read_curves
from timm_jem.stability.curves_plot import Trace, draw_curves
from timm_jem.stability.results import read_result, tensors_with_nan
from timm_jem.training.run_folder import RunFolder


def rollback(step: int, to_step: int) -> dict:
    return {"step": step, "to_step": to_step, "reason": f"ce not finite at {step}", "remedy": "lr × 0.5"}


def write_metrics(folder: RunFolder, lines: list[dict]) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_end(folder: RunFolder, weight: float = 1.0, **summary) -> None:
    folder.model.mkdir(parents=True)
    save_file({"a": torch.zeros(2), "b": torch.tensor([1.0, weight])}, folder.model / "model.safetensors")
    folder.summary_file.write_text(json.dumps({"outcome": "finished", "rollbacks": [], **summary}))


def test_curves_leave_out_what_a_rollback_undid(tmp_path):
    folder = RunFolder(tmp_path)
    lines = [{"step": step, "loss": 1.0, "gap": float(step)} for step in (10, 20, 30)]
    lines += [{"step": 20, "val_accuracy": 0.5}, {"event": "rollback", **rollback(35, 20)}]
    lines += [{"step": step, "loss": 1.0, "gap": -float(step)} for step in (30, 40)]
    lines += [{"step": 40, "loss": 1.0, "gap": -41.0}]  # resumed from step 30
    write_metrics(folder, lines)
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 50, "lo')
    curves = read_curves(folder.metrics_file)
    assert curves.gap.kept == [(10, 10), (20, 20), (30, -30), (40, -41)]
    assert curves.gap.undone == [[(20, 20), (30, 30)]]
    assert curves.val_accuracy == Curve([(20, 0.5)], [])
    assert [event["to_step"] for event in curves.rollbacks] == [20]


def test_a_rollback_to_the_start_undoes_everything(tmp_path):
    folder = RunFolder(tmp_path)
    write_metrics(
        folder, [{"step": 5, "gap": math.nan}, {"event": "rollback", **rollback(6, 0)}, {"event": "rollback", **rollback(9, 0)}]
    )
    curves = read_curves(folder.metrics_file)
    assert curves.gap.kept == []
    assert [[step for step, _ in part] for part in curves.gap.undone] == [[5]]
    assert len(curves.rollbacks) == 2


def test_the_gap_of_conditional_chains_goes_first(tmp_path):
    folder = RunFolder(tmp_path)
    write_metrics(folder, [{"step": 1, "gap": 9.0, "gap_xy": -1.0}, {"step": 2, "gap": 3.0}, {"step": 3, "ce": 0.1}])
    assert read_curves(folder.metrics_file).gap.kept == [(1, -1.0), (2, 3.0)]


def test_a_result_is_that_of_the_last_lines(tmp_path):
    """Ten lines of −1, and after them five of −3; the last ten have mean −2."""
    folder = RunFolder(tmp_path / "run")
    gaps = [-100.0] * 5 + [-1.0] * 5 + [-3.0] * 5
    write_metrics(folder, [{"step": step, "gap": gap} for step, gap in enumerate(gaps, 1)])
    write_end(folder, val_accuracy=0.5, test_accuracy=0.6, test_ece=0.1, steps=15, seconds=2.0)
    result = read_result(folder)
    assert result.curves.val_accuracy.kept == [(15, 0.5)]
    expected = {"state": "finished", "rollbacks": [], "test_accuracy": 0.6, "test_ece": 0.1, "val_accuracy": 0.5, "gap": -2.0}
    expected |= {"steps": 15, "seconds": 2.0, "explanation": None, "tensors_with_nan": [], "fault": None}
    expected |= {"classifier_rollbacks": []}
    assert result.figures() == json.loads(json.dumps(expected))


def test_a_run_that_gave_up_ends_at_its_last_good_step(tmp_path):
    folder = RunFolder(tmp_path / "run")
    write_metrics(folder, [{"step": 10, "gap": 1.0}, {"step": 20, "gap": 2.0}, {"step": 30, "gap": 1e6}])
    write_end(folder, outcome="stopped", explanation="gave up", steps=20, weight=math.inf, rollbacks=[rollback(5, 0)])
    result = read_result(folder)
    assert (result.state, result.explanation, result.gap) == ("stopped", "gave up", 1.5)
    assert result.curves.gap.undone == [[(20, 2.0), (30, 1e6)]]
    assert result.rollbacks == [rollback(5, 0)]
    assert result.tensors_with_nan == ["b"]


def test_a_run_that_is_not_done_has_no_result(tmp_path):
    assert read_result(RunFolder(tmp_path / "nowhere")).figures() == read_result(RunFolder(tmp_path)).figures()
    write_metrics(RunFolder(tmp_path), [{"step": 1, "gap": 1.0}, {"event": "rollback", **rollback(2, 0)}])
    result = read_result(RunFolder(tmp_path))
    assert result.state is None
    assert result.gap is None
    assert [event["step"] for event in result.rollbacks] == [2]


ODD = (
    "[1]",
    "3",
    "null",
    "[" * 100_000,
    '{"gap": 1.0}',
    '{"step": "7", "gap": 1.0}',
    '{"step": 7, "gap": "1"}',
    '{"step": 7, "gap": [1]}',
)


@pytest.mark.parametrize(
    "line", [*ODD, '{"step": 7, "gap": 1%s}' % ("0" * 400), '{"step": 7, "event": "rollback", "to_step": []}']
)
def test_a_line_that_no_run_writes_is_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "gap": 2}\n' + line + "\n")
    assert read_curves(path) == Curves(gap=Curve([(1, 2)]))


@pytest.mark.parametrize(
    "odd",
    [
        *({"test_accuracy": "0.9"}, {"steps": True}, {"seconds": [1]}, {"explanation": {}}, {"test_ece": 10**400}),
        *({"rollbacks": odd} for odd in (3, [1], [{}], [{"step": 3, "to_step": "2"}])),
    ],
)
def test_a_summary_of_another_shape_is_told(tmp_path, odd):
    folder = RunFolder(tmp_path / "run")
    write_end(folder, **{"steps": 4, **odd})
    result = read_result(folder)
    assert result.state is None
    assert "summary.json is none of a run's" in result.fault


@pytest.mark.parametrize(("summary", "fault"), [("{", "can't be read"), ("[]", "holds a list"), ("{}", "gives no outcome")])
def test_a_summary_that_can_not_be_read_is_told(tmp_path, summary, fault):
    (tmp_path / "summary.json").write_text(summary)
    result = read_result(RunFolder(tmp_path))
    assert result.state is None
    assert fault in result.fault


def test_a_model_that_can_not_be_read_is_told(tmp_path):
    folder = RunFolder(tmp_path / "run")
    write_end(folder)
    (folder.model / "model.safetensors").write_bytes(b"junk")
    result = read_result(folder)
    assert result.state == "finished"
    assert result.fault.startswith("its model can't be read (")
    with pytest.raises(FileNotFoundError):
        tensors_with_nan(tmp_path / "nowhere.safetensors")


def lines_of(ax) -> list[tuple]:
    """(style, steps, values) of what is drawn."""
    return [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]


def marks_of(ax) -> list[tuple]:
    return [
        (line.get_marker(), *line.get_xdata(), *line.get_ydata())
        for line in ax.get_lines()
        if line.get_marker() in ("x", "s", "D")
    ]


def test_a_plot_shows_what_counts_and_marks_the_rest():
    """A rollback out of a stretch that ran away is marked at the edge of what counts, giving up at the last point."""
    gap = Curve([(10, 1.0), (20, 2.0), (30, 0.0)], [[(20, 2.0), (25, 1e6)]])
    good = Trace(0, Curves(gap, Curve([(20, 0.5)])), rollbacks=[27])
    gave_up = Trace(3, Curves(Curve([(10, 0.5), (20, math.nan)])), end="stopped")
    crashed = Trace(4, Curves(), rollbacks=[3], end="crashed")
    figure = draw_curves({"a": [good, gave_up, crashed]})
    top, bottom = figure.axes
    assert (":", [20, 25], [2.0, 1e6]) in lines_of(top)
    assert ("-", [10, 20, 30], [1.0, 2.0, 0.0]) in lines_of(top)
    assert ("-", [20], [0.5]) in lines_of(bottom)
    assert marks_of(top) == [("x", 27, 2.0), ("s", 10, 0.5), ("x", 3, 0.0), ("D", 0, 0.0)]
    assert top.get_ylim() == pytest.approx((-0.16, 2.16))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("seed 0", "seed 3", "seed 4"),
        *("undone by a rollback", "rollback", "gave up", "crashed"),
    ]
    assert figure.get_suptitle().startswith("3 runs, ")


@pytest.mark.parametrize("count", [1, 6])
def test_curves_are_a_picture(tmp_path, count):
    curves = Curves(Curve([(10 * i, -float(i)) for i in range(9)]), Curve([(80, 0.5)]))
    seeds = range(12 if count == 1 else 3)  # twelve have no names in the legend
    figure = draw_curves({f"variant {n}": [Trace(seed, curves, [30] * seed) for seed in seeds] for n in range(count)})
    figure.savefig(tmp_path / "curves.png")
    assert sum(ax.get_visible() for ax in figure.axes) == 2 * count
    assert len(figure.legends[0].get_texts()) == 4 + (3 if count == 6 else 0)
    picture = PILImage.open(tmp_path / "curves.png")
    assert 500 < picture.width < 4000
    assert 500 < picture.height < 4000
    assert len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("variants", [{}, {"a": []}])
def test_nothing_to_draw(variants):
    with pytest.raises(InputError, match="no curves to draw"):
        draw_curves(variants)
