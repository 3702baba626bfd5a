import importlib
import io
import math
import sys

import numpy as np
import pytest
from PIL import Image

from timm_jem import InputError
from timm_jem.evaluation import plots
from timm_jem.evaluation.plots import (
    AGAINST_LENGTH,
    accuracy_curves,
    auroc_table,
    quality_curves,
    reliability_diagram,
    save_figure,
    score_histograms,
)

BINS = {
    "confidence": [math.nan, 0.3, 0.5, math.nan, 0.9],
    "accuracy": [math.nan, 0.25, 0.75, math.nan, 0.95],
    "share": [0.0, 0.1, 0.2, 0.0, 0.7],
    "ece": 0.1234,
}
CURVE = ([0.0, 2 / 255, 8 / 255], [0.9, 0.6, 0.2], [0.8, 0.5, 0.1], [0.95, 0.7, 0.3])
LENGTHS = ([10, 20, 40, 70, 80, 160], [9.0, 5.0, 4.0, 3.0, 3.2, 6.0])
QUALITY, READ, APART = AGAINST_LENGTH
rng = np.random.default_rng(0)
SCORES = {
    "log p(x)": {"test": rng.normal(-3000, 1, 1000), "noise": rng.normal(-3003, 1, 500)},
    "max softmax": {"test": rng.uniform(0.5, 1, 1000), "noise": rng.uniform(0.1, 0.6, 500)},
}
FIGURES = {
    "reliability": lambda: reliability_diagram({"a": BINS, "b": BINS}),
    "scores": lambda: score_histograms(SCORES, "test"),
    "auroc": lambda: auroc_table(
        {"noise": {"log p(x)": 0.25, "max softmax": 1.0}, "svhn": {"log p(x)": 0.5, "max softmax": 0.7}}
    ),
    "accuracy": lambda: accuracy_curves({"a": CURVE, "b": CURVE}, "linf", "title"),
    "quality": lambda: quality_curves({QUALITY: {"a": LENGTHS, "b": LENGTHS}}, floors={QUALITY: 0.3}, marks={"a": 70}),
    "all against length": lambda: quality_curves(
        {measure: {"a": LENGTHS, "b": LENGTHS} for measure in AGAINST_LENGTH}, features="raw pixels (64 dimensions)"
    ),
}


def texts(figure):
    """All that a reader reads."""
    figure.draw_without_rendering()
    found = {artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    return " | ".join(sorted(found))


def test_names_are_no_formulas(tmp_path):
    name = "a$\\frac$"
    for i, figure in enumerate(
        (
            reliability_diagram({name: BINS}),
            score_histograms({"log p(x)": {name: SCORES["log p(x)"]["test"]}}, name),
            auroc_table({name: {"log p(x)": 0.5}}),
            accuracy_curves({name: CURVE}, "linf", name),
            quality_curves({QUALITY: {name: LENGTHS}}, features=name),
        )
    ):
        save_figure(figure, tmp_path / f"{i}.png")


def line(axis, label):
    return next(line for line in axis.lines if line.get_label().startswith(label))


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_data_gives_the_same_small_file(name, tmp_path):
    save_figure(FIGURES[name](), tmp_path / "a.png")
    save_figure(FIGURES[name](), tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert len(data) < 200_000
    picture = Image.open(io.BytesIO(data))
    assert picture.width < 1500
    assert not {"Software", "Creation Time"} & set(picture.info)


@pytest.mark.parametrize("name", FIGURES)
def test_axes_say_what_they_are(name):
    figure = FIGURES[name]()
    for axis in figure.axes:
        assert axis.get_ylabel()
    assert all(axis.get_xlabel() for axis in figure.axes[-1:])
    assert any(axis.get_title(loc=side) for axis in figure.axes for side in ("center", "left"))


def test_no_pyplot_state():
    pyplot = sys.modules.get("matplotlib.pyplot")
    for make in FIGURES.values():
        make()
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert pyplot is None or not pyplot.get_fignums()


def test_reliability_leaves_empty_bins_out():
    figure = reliability_diagram({"jem": {**BINS, "n": 1234}, "plain": BINS})
    above, below = figure.axes
    for dots, label in zip(above.collections, ("jem: ECE 0.123 (n = 1,234)", "plain: ECE 0.123"), strict=True):
        assert np.asarray(dots.get_offsets()).tolist() == [[0.3, 0.25], [0.5, 0.75], [0.9, 0.95]]
        assert dots.get_label() == label
        assert label in texts(figure)
        sizes = dots.get_sizes()
        assert sizes[0] < sizes[1] < sizes[2]
    assert line(above, "calibrated").get_xydata().tolist() == [[0, 0], [1, 1]]
    for stairs in below.patches:
        values, edges, _ = stairs.get_data()
        assert values.tolist() == BINS["share"]
        assert np.allclose(edges, [0, 0.2, 0.4, 0.6, 0.8, 1])
    assert above.collections[0].get_facecolor().tolist() != above.collections[1].get_facecolor().tolist()


def heights(patch):
    """Heights of a step histogram's 50 bins."""
    return patch.get_xy()[1:100:2, 1]


def test_histograms_share_bins_and_show_shares():
    figure = score_histograms(SCORES, "test")
    assert len(figure.axes) == 2
    for axis, sets in zip(figure.axes, SCORES.values(), strict=True):
        inside, outside = axis.patches
        assert (inside.get_fill(), outside.get_fill()) == (True, False)
        low = min(np.quantile(values, 0.005) for values in sets.values())
        high = max(np.quantile(values, 0.995) for values in sets.values())
        for patch, values in ((inside, sets["test"]), (outside, sets["noise"])):
            counts, _ = np.histogram(values, np.linspace(low, high, 51))
            assert np.allclose(heights(patch), counts / len(values))
        lost = sum(((values < low) | (values > high)).sum() for values in sets.values())
        assert f"({lost} of the values lie outside)" in axis.get_title()
    shown = texts(figure)
    assert "test (n = 1,000)" in shown
    assert "noise (n = 500)" in shown
    assert "−3000" in shown  # the ticks themselves, without an offset elsewhere
    assert all(axis.xaxis.get_major_formatter().get_offset() == "" for axis in figure.axes)


def test_far_outliers_do_not_squash_a_histogram():
    values = np.r_[rng.normal(-3000, 1, 2000), [-1e9] * 3]
    (axis,) = score_histograms({"log p(x)": {"test": values, "other": rng.normal(-3001, 1, 2000)}}, "test").axes
    low, high = axis.get_xlim()
    assert -3010 < low < high < -2990
    assert heights(axis.patches[0]).max() < 0.2


def test_a_small_set_is_not_pushed_out_by_a_large_one():
    sets = {"test": rng.normal(0, 1, 10_000), "small": rng.normal(-50, 1, 20)}  # 0.2 % of all
    (axis,) = score_histograms({"score": sets}, "test").axes
    assert heights(axis.patches[1]).sum() >= 0.9


@pytest.mark.parametrize("value", [0.0, 1.0, -3000.0, 1e12, -1e-12])
def test_scores_that_are_all_the_same(value):
    sets = {"test": np.full(10, value), "noise": np.full(5, value) * (1 + 1e-15)}
    figure = score_histograms({"score": sets}, "test")
    assert texts(figure)
    for patch in figure.axes[0].patches:
        assert heights(patch).sum() == pytest.approx(1)


def test_auroc_table_has_the_numbers():
    figure = auroc_table({"noise": {"log p(x)": 0.25, "max softmax": 1.0}, "svhn": {"log p(x)": 0.5, "max softmax": 0.7}})
    (axis,) = figure.axes
    assert {(text.get_position(), text.get_text()) for text in axis.texts} == {
        ((0, 0), "0.250"),
        ((1, 0), "1.000"),
        ((0, 1), "0.500"),
        ((1, 1), "0.700"),
    }
    (picture,) = axis.images
    assert picture.get_array().tolist() == [[0.25, 1.0], [0.5, 0.7]]
    assert min(picture.cmap(picture.norm(0.5))) > 0.96  # white at chance
    assert [label.get_text() for label in axis.get_xticklabels()] == ["log p(x)", "max softmax"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["noise", "svhn"]


def test_accuracy_curves_have_their_units():
    figure = accuracy_curves({"jem": CURVE, "plain": CURVE}, "linf", "under attack", band="95 % interval")
    (axis,) = figure.axes
    for name, band in zip(("jem", "plain"), axis.collections, strict=True):
        assert np.allclose(line(axis, name).get_xydata(), [[0, 0.9], [2, 0.6], [8, 0.2]])
        corners = {(round(x, 9), y) for x, y in band.get_paths()[0].vertices.tolist()}
        assert {(0.0, 0.8), (2.0, 0.5), (8.0, 0.1), (0.0, 0.95), (2.0, 0.7), (8.0, 0.3)} <= corners
    assert "1/255" in axis.get_xlabel()
    assert "shaded: 95 % interval" in texts(figure)
    (axis,) = accuracy_curves({"jem": CURVE}, "l2", "under attack").axes
    assert np.allclose(line(axis, "jem").get_xdata(), CURVE[0])
    assert "[0, 1]" in axis.get_xlabel()


def test_quality_curves_mark_the_models_own_length():
    curves = {"jem": LENGTHS, "other": LENGTHS}
    figure = quality_curves({QUALITY: curves}, features="pixels", floors={QUALITY: 2.0}, marks={"jem": 70})
    (axis,) = figure.axes
    assert (axis.get_ylabel(), axis.get_title(loc="left")) == ("Fréchet distance", "In pixels; lower is better")
    assert axis.get_xscale() == "log"
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] == 0
    assert line(axis, "jem (ring: the model's own 70 steps)").get_xydata().tolist() == [
        list(p) for p in zip(*LENGTHS, strict=True)
    ]
    rings = [line.get_xydata() for line in axis.lines if line.get_markersize() == 11]
    assert np.allclose(rings, [[[70, 3.0]]])
    assert set(line(axis, "real test images").get_ydata()) == {2.0}
    assert "real test images" in texts(figure)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["10", "20", "40", "70", "160"]  # 80 would lie on 70


def test_quality_between_lengths_and_of_chains_that_ran_away():
    (axis,) = quality_curves({QUALITY: {"jem": ([10, 1000], [1.0, 3.0])}}, marks={"jem": 100}).axes
    assert np.allclose(axis.lines[1].get_xydata(), [[100, 2.0]])
    for values in ([4.0, 1e6, 1e7], [4.0, 1e6, math.nan]):
        figure = quality_curves({QUALITY: {"jem": ([10, 20, 40], values)}}, floors={QUALITY: 0.3})
        assert figure.axes[0].get_yscale() == "log"
        assert "log scale" in figure.axes[0].get_ylabel()
        assert np.array_equal(line(figure.axes[0], "jem").get_ydata(), values, equal_nan=True)
    figure = quality_curves({QUALITY: {"jem": ([10, 20], [4.0, math.nan])}, APART: {"jem": ([10, 20], [math.nan] * 2)}})
    assert texts(figure).count("NaN at every length") == 1


def test_each_measure_against_length_has_a_panel_and_each_model_one_style():
    shares, ratios = ([10, 20, 40], [0.01, 0.5, 1.0]), ([10, 20, 40], [1.8, 1.1, 0.9])
    panels = {QUALITY: {"old": LENGTHS, "new": LENGTHS}, READ: {"new": shares}, APART: {"new": ratios}}
    figure = quality_curves(panels, floors={READ: 0.97, APART: 1.0}, marks={"new": 20})
    quality, read, apart = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "Fréchet distance", "share read as asked", "distance within a class",
    ]  # fmt: skip
    assert len({line(axis, "new").get_color() for axis in figure.axes} | {line(quality, "old").get_color()}) == 2
    assert read.get_ylim() == (0, 1.04)  # a share, though it varies much
    assert (read.get_yscale(), apart.get_ylim()[0]) == ("linear", 0)
    assert set(line(apart, "real test images").get_ydata()) == {1.0}
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert len(figure.legends[0].get_texts()) == 3  # old, new, real test images: once each


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reliability_diagram({}), "nothing to draw"),
        (lambda: auroc_table({}), "nothing to draw"),
        (lambda: auroc_table({"a": {"x": 0.5}, "b": {"y": 0.5}}), "same ones"),
        (lambda: accuracy_curves({}, "linf", ""), "nothing to draw"),
        (lambda: accuracy_curves({"a": CURVE}, "l1", ""), "linf or l2"),
        (lambda: quality_curves({QUALITY: {"a": LENGTHS}}, marks={"b": 3}), "no curve"),
        (lambda: quality_curves({"a": {"a": LENGTHS}}), "measures against length"),
        (lambda: quality_curves({QUALITY: {}}), "nothing to draw"),
        (lambda: score_histograms({"s": {"a": np.ones(3)}}, "b"), "no set b"),
        (lambda: score_histograms({"s": {"a": np.array([1.0, math.nan])}}, "a"), "not finite"),
        (lambda: score_histograms({"s": {"a": np.array([])}}, "a"), "empty"),
    ],
)
def test_bad_input_is_said_in_a_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_without_matplotlib_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    spec = importlib.util.find_spec(plots.__name__)
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)  # what draws can still be imported
    with pytest.raises(InputError, match=r"pip install 'timm_jem\[eval\]'"):
        bare.auroc_table({"a": {"s": 0.5}})
