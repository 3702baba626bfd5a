"""What the page shows and does, without a browser and without Gradio."""

import base64
import copy
import io
import re
import socket
import struct
import threading
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import timm_jem
from timm_jem import InputError
from timm_jem.demo import exhibit as exhibits
from timm_jem.demo import panels, views
from timm_jem.demo.exhibit import Exhibit, load_exhibit
from timm_jem.demo.space import GRADIO, write_space
from timm_jem.pixels import eight_bit
from timm_jem.reference import Reference

NAMES = ["zero", "<img src=x onerror=alert(1)>", "${alert(1)}", "{{value}}", '" onload="x', "`", "\\", "'", "&lt;", "nine"]
STEPS = 5


def small_model(**options) -> timm_jem.JEM:
    torch.manual_seed(0)
    return timm_jem.create_model("wrn_10_1", num_classes=10, input_size=(1, 8, 8), **options).eval()


@pytest.fixture(scope="module")
def shown() -> Exhibit:
    jem = small_model(class_names=NAMES, sgld=timm_jem.SGLDConfig(num_steps=STEPS, step_size=0.1))
    u = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    jem.fit_reference(jem.normalize(u), torch.arange(100) % 10)
    jem.reference = replace(jem.reference, temperature=0.5)  # which so few can't tell of a network that was not trained
    return Exhibit("a model", jem, NAMES, jem.normalize(u[:4]), "pictures")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(panels, "_PACE", 0.0)
    monkeypatch.setattr(panels, "_ATTACK_STEPS", 5)
    monkeypatch.setattr(panels, "_CHANGE_STEPS", 30)


class Tags(HTMLParser):
    """All tags and attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words, self.sources = set(), set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.words.append(data)


def pixels_of(source: str) -> torch.Tensor:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))


def test_names_mean_nothing_as_html(shown):
    """Class names come with models of strangers, and HTML is a template to Gradio."""
    x = shown.examples[:1]
    parts = [panels.look(shown, x), panels.chooser(shown), *panels.draw(shown, 1, 2, 0), *panels.attack(shown, x, 8)]
    parts += [*panels.restore(shown, x, "1" * 64, 0), views.problem(NAMES[1]), views.note(NAMES[2])]
    parts += list(panels.change(shown, x, 1))[-1]
    for html in parts:
        found = Tags(html)
        assert not [name for name in found.attributes if name.startswith("on")]
        assert "script" not in found.tags
        assert all(source.startswith("data:image/") for source in found.sources)
        assert not any(sign in html for sign in ("${", "{{", "`", "\\"))
    bars = Tags(views.belief(torch.zeros(1, 8, 8), shown.jem.predict(x)[0], NAMES, None))
    assert set(bars.words) & set(NAMES)


def test_a_picture_is_its_pixels():
    u = torch.rand(3, 8, 8) * 2 - 1
    assert torch.equal(pixels_of(Tags(views.picture(u, "it")).sources[0]).movedim(-1, 0), eight_bit(u))
    assert torch.equal(pixels_of(Tags(views.picture(u[:1], "it")).sources[0]), eight_bit(u[0]))
    with pytest.raises(InputError, match="ran away"):
        views.picture(u * float("nan"), "it")
    assert "image/jpeg" in views.picture(torch.zeros(3, 100, 100), "it")


@pytest.mark.parametrize(
    ("p", "words"), [(1, "> 99.9 %"), (0.9991, "> 99.9 %"), (0.5, "50.0 %"), (0.001, "0.1 %"), (0, "< 0.1 %")]
)
def test_no_probability_is_certain(p, words):
    assert views.percent(p) == words.replace(" ", "\u00a0")


def reference(*energies: float) -> Reference:
    quantiles = tuple(np.quantile(energies, np.linspace(0, 1, 101)).tolist())
    return Reference(temperature=None, quantiles=quantiles, threshold=quantiles[95], accept=0.95, n=len(energies))


@pytest.mark.parametrize("energy", [-1e30, -3, 0.5, 0.99, 1, 50, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("held_out", [reference(*np.linspace(0, 1, 50)), reference(2.0), reference(-1e20, 1e20), None])
def test_charts_stay_in_their_frame(energy, held_out):
    charts = [
        views.histogram(energy, held_out),
        views.curve([0.0, energy, 1.0, energy], 9, held_out, shares=[0.0, 1.0, 0.5, 1.0], share_of=NAMES[1]),
    ]
    for chart in filter(None, charts):
        places = [float(part) for name in ("x", "x1", "x2", "cx") for part in places_of(chart, name)]
        assert places
        assert all(0 <= place <= 360 for place in places)
        assert all(0 <= float(part) <= 120 for name in ("y", "y1", "y2", "cy") for part in places_of(chart, name))
        assert "nan" not in chart.split("aria-label")[0]


def places_of(chart: str, name: str) -> list[str]:
    return [part.partition('"')[0] for part in chart.split(f' {name}="')[1:]]


def test_a_histogram_tells_where_a_picture_is():
    held_out = reference(*np.linspace(0, 1, 1000))
    at = [
        float(places_of(views.histogram(energy, held_out).split('class="threshold"')[1], "x1")[0]) for energy in (0.1, 0.5, 0.9)
    ]
    assert at == sorted(at)
    assert abs(at[1] - 180) < 1
    assert views.histogram(0.5, held_out).count('class="beyond"') <= 3
    assert "this picture ›" in views.histogram(99, held_out)
    assert "‹ this picture" in views.histogram(-99, held_out)


def test_the_flag_is_that_of_the_prediction(shown):
    usual = shown.jem.predict(shown.examples[0])
    for prediction in (replace(usual, outlier=False), replace(usual, outlier=True)):
        words = views.belief(torch.zeros(1, 8, 8), prediction, NAMES, shown.jem.reference)
        assert ("Unlike the training data" in words) == prediction.outlier
        assert ("Like the training data" in words) == (not prediction.outlier)
        assert "calibrated on 100 held-out images" in words
    untold = views.belief(torch.zeros(1, 8, 8), small_model().predict(shown.examples[0]), NAMES, None)
    assert "nothing is flagged" in untold
    assert "not calibrated" in untold
    few = replace(shown.jem.reference, temperature=None, n=4)
    untold = views.belief(torch.zeros(1, 8, 8), replace(usual, temperature=None), NAMES, few)
    assert "as the network has them, not calibrated: 4 held-out images can&#x27;t tell a temperature." in untold


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "file",
    [
        *(file_of(COLOURS, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")),
        file_of(COLOURS.convert("CMYK"), "JPEG"),
        file_of(COLOURS.convert("RGBA"), "PNG"),
        file_of(COLOURS.convert("L"), "GIF", save_all=True, append_images=[COLOURS.convert("L")]),
        file_of(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999), "PNG"),
        file_of(Image.new("1", (1, 1)), "PNG"),
    ],
)
def test_an_upload_is_taken_as_predict_takes_files(shown, file, tmp_path):
    (tmp_path / "it").write_bytes(file)
    event = {"file": f"data:image/png;base64,{base64.b64encode(file).decode()}", "size": len(file)}
    assert torch.equal(panels.uploaded(shown, event), shown.jem.model_input(tmp_path / "it"))


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"a text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"PK\x03\x04" + bytes(100),
        b"\x89PNG\r\n\x1a\n",
        file_of(COLOURS, "PNG")[:100],
        file_of(COLOURS, "JPEG")[:300],
        file_of(COLOURS, "ICO"),  # which are decoded before their size is known
        file_of(COLOURS.resize((16, 16)), "ICNS"),
        bomb(20_000, 10_000),
        bomb(2**31 - 1, 2**31 - 1),
        bomb(7_000, 7_143),
        bytes(panels.MOST_BYTES + 1),
    ],
)
def test_a_broken_upload_is_one_line(shown, file):
    with pytest.raises(InputError) as refused:
        panels.opened(shown, file)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("this file ")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"size": 10**12},
        {"file": None},
        {"file": 3},
        {"file": "data:,"},
        {"file": "/etc/passwd"},
        {"file": "data:a;base64,@@"},
    ],
)
def test_what_is_no_upload_is_one_line(shown, event):
    with pytest.raises(InputError):
        panels.uploaded(shown, event)


@pytest.mark.parametrize("row", [-1, 4, 10**9, "1", 1.5, None, True, float("nan")])
def test_no_other_example_than_those_shown(shown, row):
    with pytest.raises(InputError):
        panels.example(shown, {"row": row})
    assert torch.equal(panels.example(shown, {"row": 3}), shown.examples[3:])


def test_drawing_shows_every_step_and_how_to_do_it_again(shown):
    frames = list(panels.draw(shown, 2, 3, 7))
    assert len(frames) == STEPS + 1
    drawn = shown.jem.sample(3, y=2, generator=torch.Generator().manual_seed(7))
    last = [pixels_of(source) for source in Tags(frames[-1]).sources]
    assert torch.equal(torch.stack(last)[:, None], eight_bit(shown.jem.denormalize(drawn)))
    assert "jem.sample(3, y=2, generator=torch.Generator().manual_seed(7))" in "".join(Tags(frames[-1]).words)
    assert "y=" not in "".join(Tags(list(panels.draw(shown, None, 1, 0))[-1]).words)


def test_it_is_said_where_chains_start(shown):
    assert "start from noise and" in panels.begun(shown)
    for count, words in ((10, "Gaussians of the classes"), (1, "a Gaussian of images")):
        started = copy.copy(shown.jem)
        started.starts = timm_jem.ClassGaussians.fit(torch.rand(100, 1, 8, 8) * 2 - 1, torch.arange(100) % count, count)
        assert f"start from {words} and" in panels.begun(replace(shown, jem=started))


def test_a_chain_ends_when_nobody_looks(shown):
    before = threading.active_count()
    for panel in (
        panels.draw(shown, 2, 1, 0),
        panels.attack(shown, shown.examples[:1], 8),
        panels.change(shown, shown.examples[:1], 3),
        panels.restore(shown, shown.examples[:1], "1" * 64, 0),
    ):
        next(panel)
        assert threading.active_count() == before + 1
        panel.close()
        assert threading.active_count() == before


def test_an_attack_lowers_what_was_believed_within_its_bound(shown):
    x = shown.examples[:1]
    believed = shown.jem.predict(x)[0]
    frames = list(panels.attack(shown, x, 16))
    before, after, _ = (pixels_of(source).int() for source in Tags(frames[-1]).sources)
    assert torch.equal(before, eight_bit(shown.jem.denormalize(x))[0, 0].int())
    assert 0 < (after - before).abs().max() <= 16
    moved = shown.jem.predict(shown.jem.normalize(after[None, None] / 127.5 - 1))[0]
    assert moved.probabilities[believed.y] < believed.p


def test_a_change_ends_with_its_way(shown):
    x, y = shown.examples[:1], 9
    *steps, way = panels.change(shown, x, y)
    assert all(isinstance(step, str) for step in steps)
    assert 2 <= len(way) <= 24
    assert way[-1] == panels.frame(way, 10**6)
    assert "step 0 of" in panels.frame(way, 0)
    first, last = (pixels_of(Tags(way[i]).sources[1]) for i in (0, -1))
    assert torch.equal(first, eight_bit(shown.jem.denormalize(x))[0, 0])
    assert not torch.equal(first, last)
    assert panels.frame(None, 3) == ""


def test_restoring_leaves_what_is_known(shown):
    cells = "1" * 24 + "0" * 40
    frames = list(panels.restore(shown, shown.examples[:1], cells, 0))
    assert len(frames) == STEPS + 1
    before, hole, restored = (pixels_of(source) for source in Tags(frames[-1]).sources)
    known = torch.tensor([cell == "0" for cell in cells]).view(8, 8)
    assert torch.equal(before[known], restored[known])
    assert not torch.equal(before[~known], restored[~known])
    assert (hole[~known] == 128).all()


@pytest.mark.parametrize("cells", ["", "0" * 64, "1" * 63, "1" * 65, "2" * 64, "1" * 63 + "\n", None, 3, "١" * 64])
def test_only_a_mask_restores(shown, cells):
    with pytest.raises(InputError, match="paint over"):
        next(panels.restore(shown, shown.examples[:1], cells, 0))


@pytest.mark.parametrize("number", [0, 129, -3, 2.5, "8", None, True, float("nan"), 10**30])
def test_numbers_out_of_range_are_one_line(shown, number):
    x = shown.examples[:1]
    for panel in (panels.draw(shown, 0, number, 0), panels.attack(shown, x, number)):
        with pytest.raises(InputError):
            next(panel)
    if number != 0:
        for panel in (panels.change(shown, x, number), *([panels.draw(shown, number, 1, 0)] if number is not None else [])):
            with pytest.raises(InputError):
                next(panel)


def test_a_large_picture_is_painted_in_coarse_cells():
    model = timm_jem.create_model("wrn_10_1", num_classes=2, input_size=(3, 40, 50))
    large = Exhibit("large", model.eval(), ["a", "b"], torch.zeros(1, 3, 40, 50), "one picture")
    assert panels.side_of_mask(large) == 16
    cells = "0" * 128 + "1" * 128
    last = list(panels.restore(large, large.examples, cells, 0))[-1]
    _, hole, _ = (pixels_of(source) for source in Tags(last).sources)
    assert (hole[20:] == 128).all()


def saved(folder, **options) -> str:
    jem = small_model(**options)
    jem.provenance = {"config": {"data": {"dataset": "digits", "val_fraction": 0.1}}}
    jem.save_pretrained(folder / "m")
    return str(folder / "m")


def test_examples_are_held_out_one_a_class_and_noise(tmp_path):
    shown, instead = load_exhibit(saved(tmp_path, class_names=list("0123456789")))
    assert instead == ""
    assert shown.names == list("0123456789")
    assert shown.examples.shape == (11, 1, 8, 8)
    assert shown.jem.reference.n > 100
    assert "digits" in shown.of_examples
    assert "8×8" in shown.about


def test_without_data_the_model_draws_its_examples(tmp_path):
    small_model().save_pretrained(tmp_path / "plain")
    shown, instead = load_exhibit(str(tmp_path / "plain"))
    assert len(shown.examples) == 12
    assert "doesn't say what it was trained on" in instead
    assert shown.jem.reference is None
    chained = small_model()
    chained.chains = timm_jem.PublishedChains.of_pixels(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10)
    chained.save_pretrained(tmp_path / "chains")
    assert "drew in training" in load_exhibit(str(tmp_path / "chains"))[0].of_examples


def test_images_of_other_channels_are_refused(tmp_path):
    timm_jem.create_model("wrn_10_1", num_classes=2, input_size=(2, 8, 8)).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="images of 2 channels: a page shows grey or colour images, of 1 or 3"):
        load_exhibit(str(tmp_path / "m"))


def test_what_draws_nothing_is_said_to(tmp_path):
    jem = small_model()
    jem.provenance = {"converted": {"energies": "logsumexp", "chains": "none"}}
    jem.save_pretrained(tmp_path / "scored")
    shown, instead = load_exhibit(str(tmp_path / "scored"))
    assert shown.about.endswith("its chains were not trained, and draw no images")
    assert len(shown.examples) == 0
    assert instead.endswith("none to begin with")
    jem.provenance = {"config": "by hand"}
    jem.save_pretrained(tmp_path / "odd")
    small_model().save_pretrained(tmp_path / "plain")
    for name in ("odd", "plain"):
        assert "chains" not in load_exhibit(str(tmp_path / name))[0].about


def test_large_models_draw_nothing_before_the_page_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(exhibits, "_QUICK", 63)
    small_model().save_pretrained(tmp_path / "plain")
    shown, _ = load_exhibit(str(tmp_path / "plain"))
    assert len(shown.examples) == 0
    assert "Give a picture" in panels.look(shown, None)
    assert "no picture" in panels.canvas(shown, None)
    assert "Press one" not in panels.chooser(shown)
    assert "Upload, drop or paste" in panels.chooser(shown)


def test_data_that_are_given_must_fit(tmp_path):
    small_model(class_names=list("abcdefghij")).save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="is 'a' and of digits '0'"):
        load_exhibit(str(tmp_path / "plain"), {"dataset": "digits"})


def test_a_space_is_whole(tmp_path, shown):
    write_space(shown.jem, tmp_path / "space", title="A: title", app=demo.__file__)
    space = tmp_path / "space"
    head = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert head["sdk"] == "gradio"
    assert head["title"] == "A: title"
    assert head["sdk_version"] == GRADIO
    assert (space / head["app_file"]).read_bytes() == Path(demo.__file__).read_bytes()
    assert (space / "timm_jem" / "demo" / "page.css").is_file()
    assert timm_jem.from_pretrained(space / "model").reference == shown.jem.reference
    needed = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("timm>=") for line in needed)
    assert not any("extra" in line for line in needed if not line.startswith("--"))
    with pytest.raises(InputError, match="already"):
        write_space(shown.jem, space, title="again", app=demo.__file__)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space"]


def test_a_space_tells_nothing_of_folders_and_its_title_is_a_title(tmp_path, shown):
    jem = copy.copy(shown.jem)
    jem.provenance = {"dataset": "/home/anna/client/photos", "command": "train.py --data.dataset /home/anna/client/photos"}
    write_space(jem, tmp_path / "space", title="a\n\n# Free!\n[here](http://there) <b>", app=demo.__file__)
    assert "anna" not in (tmp_path / "space" / "model" / "config.json").read_text()
    assert jem.provenance["dataset"] == "/home/anna/client/photos"
    _, head, text = (tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---", 2)
    assert yaml.safe_load(head)["title"] == "a # Free! [here](http://there) <b>"
    assert [line for line in text.splitlines() if "Free" in line] == ["# ` a # Free! [here](http://there) <b> `"]


def test_the_version_of_gradio_that_is_tested_is_one_that_installs():
    setup = (Path(demo.__file__).parent.parent / "setup.py").read_text(encoding="utf-8")
    least = re.search(r'"gradio>=([\d.]+),', setup)[1]
    assert GRADIO.startswith(least)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"served at 127.0.0.1, port {port} "):
            demo.main(["nowhere", "--port", str(port)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "which model"),
        (["nowhere", "--port", "0"], "port is 0"),
        (["nowhere", "--port", "99999"], "port is 99999"),
        (["nowhere", "--prot", "1"], "--port"),
        (["nowhere", "--host", "256.1.1.1"], "can't be served at 256.1.1.1"),
        (["nowhere", "--host", "::2"], "can't be served at ::2"),
        (["nowhere", "--host", "a" * 300], "can't be served at a"),
        (["nowhere"], "needs gradio"),
        (["nowhere", "--space", "x"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(argv, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm_jem.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=words):
        demo.main(argv)
