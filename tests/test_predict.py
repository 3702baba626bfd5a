"""The recipe that predicts a folder: rows, order, errors, and a table that is whole or not there."""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import predict
import pytest
import torch
from PIL import Image as PILImage

import timm_jem
from timm_jem import InputError
from timm_jem.data import folders

NUMBERS = ("p", "energy", "percentile")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model with a reference, with one of a few images, and with none."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    jem = timm_jem.create_model(
        "wrn_10_1", num_classes=3, input_size=(3, 8, 8), class_names=["ant", "bee, or so", "cat"]
    ).eval()
    x = torch.randn(40, 3, 8, 8)
    y = jem(x).argmax(1)
    jem.fit_reference(x[:4], y[:4])
    jem.save_pretrained(folder / "few")
    jem.fit_reference(x, torch.where(torch.arange(40) % 5 == 0, (y + 1) % 3, y))
    jem.save_pretrained(folder / "saved")
    jem.reference = None
    jem.save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def images(tmp_path):
    """Seven rows, of which two can't be read, and files that are no images."""
    folder = tmp_path / "photos"
    for i, name in enumerate(("b.png", "a 1.JPG", "deep/er/c.webp", "deep/d.png", "é, 'ü'.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        PILImage.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    (folder / "deep" / "text.png").write_text("no image")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_text("x")
    os.symlink(folder, folder / "deep" / "loop", target_is_directory=True)
    return folder


FILES = ["a 1.JPG", "b.png", "deep/d.png", "deep/er/c.webp", "deep/text.png", "pipe.png", "é, 'ü'.png"]
NOT_READ = {"deep/text.png": "no known format", "pipe.png": "not a file"}


def read(path):
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        words = {"": None, "true": True, "false": False}
        numbers = {**dict.fromkeys(NUMBERS, float), "y": int}
        return [
            {name: words[text] if text in words else numbers.get(name, str)(text) for name, text in row.items()} for row in rows
        ]
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def test_rows(model, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tables = []
    for name, flags in (("predictions.csv", ""), ("a.json", "--batch_size 2 --workers 2"), ("b.JSONL", "--workers 0")):
        given = f"{model / 'saved'} photos {flags}" + (f" --output {name}" if flags else "")
        assert predict.main(shlex.split(given)) == f"2 of 7 could not be read: see error in {name}"
        tables.append(read(tmp_path / name) if name != "b.JSONL" else read((tmp_path / name).rename(tmp_path / "b.jsonl")))
        said = capsys.readouterr().out
        assert "compared with 40 held-out images, of which 95% are accepted; p is calibrated, temperature" in said
        assert "passed over 1 .txt\n" in said
        assert said.endswith(f", 2 with errors: {name}\n")
    rows = tables[0]
    assert [row["file"] for row in rows] == FILES
    for other in tables[1:]:
        for one, two in zip(rows, other, strict=True):
            assert {**one, **dict.fromkeys(NUMBERS)} == {**two, **dict.fromkeys(NUMBERS)}
            assert all(
                one[name] == (two[name] if two[name] is None else pytest.approx(two[name], abs=1e-3)) for name in NUMBERS
            )
    jem = timm_jem.from_pretrained(model / "saved")
    for row in rows:
        if row["file"] in NOT_READ:
            assert NOT_READ[row["file"]] in row["error"]
            assert not row["error"].startswith(str(images))
            assert all(row[name] is None for name in predict.COLUMNS[1:-1])
            continue
        r = jem.predict(images / row["file"])
        assert (row["label"], row["y"], row["outlier"], row["error"]) == (r.label, r.y, r.outlier, None)
        assert [row[name] for name in NUMBERS] == pytest.approx([r.p, r.energy, r.percentile], abs=1e-3)
    outliers = sum(bool(row["outlier"]) for row in rows)
    assert f"7 rows, {outliers} outliers, 2 with errors" in said


def test_without_a_reference_and_with_one(model, images, tmp_path, capsys):
    table = tmp_path / "x.jsonl"
    flags = [str(model / "plain"), str(images / "b.png"), "--output", str(table)]
    assert predict.main(flags) is None
    (row,) = read(table)
    assert (row["file"], row["percentile"], row["outlier"], row["error"]) == ("b.png", None, None, None)
    said = capsys.readouterr().out
    assert "no reference: p is not calibrated and nothing is told of outliers" in said
    assert f"\n1 row, 0 with errors: {table}\n" in said
    (images / "pipe.png").unlink()
    (images / "deep" / "text.png").unlink()
    for name, calibrated in (("plain", "p is not calibrated"), ("saved", "p is calibrated, temperature ")):
        flags[0] = str(model / name)
        assert predict.main([*flags, "--overwrite", "true", "--reference", str(images), "--batch_size", "2"]) is None
        (row,) = read(table)
        assert row["outlier"] is False
        assert f"compared with 5 held-out images, of which all are accepted; {calibrated}" in capsys.readouterr().out
    (images / "cut.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"cut\.png has an image that can't be decoded"):
        predict.main([*flags, "--overwrite", "true", "--reference", str(images)])


def test_a_few_images_that_are_all_right_calibrate_nothing(model, images, tmp_path, capsys):
    table = tmp_path / "x.jsonl"
    predict.main([str(model / "few"), str(images / "b.png"), "--output", str(table)])
    told = "accepted; p is not calibrated but the network's own: 4 held-out images can't tell a temperature"
    assert told in capsys.readouterr().out
    assert read(table)[0]["p"] < 1


def test_a_folder_that_can_not_be_listed_is_a_row(model, images, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert "3 of 7 could not" in predict.main([str(model / "saved"), str(images), "--output", str(tmp_path / "x.json")])
    rows = read(tmp_path / "x.json")
    assert rows[-1]["file"] == "deep/er"
    assert "can't be listed: [Errno 13] Permission denied" in rows[-1]["error"]


def test_ends_of_lines_in_names_end_no_row(tmp_path):
    names = ["a\rb.png", "a\nb.png", "a\r\n", "\r", "c, d"]
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
        predict.write_csv((predict.row_of(Path(name), f"broken\r{name}") for name in names), file)
    rows = read(tmp_path / "t.csv")
    assert [(row["file"], row["error"]) for row in rows] == [(name, f"broken\r{name}") for name in names]
    assert (tmp_path / "t.csv").read_bytes().startswith(b"file,label,y,p,energy,percentile,outlier,error\n")


def test_names_that_are_not_utf8(model, images, tmp_path):
    with open(os.fsencode(images) + b"/\xff.png", "wb") as file:
        file.write((images / "b.png").read_bytes())
    for kind in ("csv", "json"):
        predict.main([str(model / "saved"), str(images), "--output", str(tmp_path / f"x.{kind}")])
        (tmp_path / f"x.{kind}").read_text(encoding="utf-8")
    assert "\\udcff.png" in (tmp_path / "x.csv").read_text(encoding="utf-8")
    assert os.fsencode(read(tmp_path / "x.json")[-1]["file"]) == b"\xff.png"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("gone", "there is no folder and no file gone"),
        ("empty", "empty has no images: give"),
        ("texts", "texts has no images among 1 .txt"),
        ("photos --output x.txt", r"output is 'x\.txt': give a file that ends in \.csv, \.json, \.jsonl"),
        ("photos --output .csv", "give a file that ends in"),
        ("photos --output there.csv", r"output there\.csv is there already: give another, or --overwrite true"),
        ("photos --output folder.csv", r"output folder\.csv is there and is no file"),
        ("photos --output pipe.csv --overwrite true", r"output pipe\.csv is there and is no file"),
        ("photos --output gone/x.csv", "can't be written to gone"),
        ("photos --batch_size 0", "batch_size is 0"),
        ("photos --workers -1", "workers is -1"),
        ("photos --reference gone", "there is no folder and no file gone"),
        ("photos --colour red", "--colour is no setting"),
        ("", "images"),
    ],
)
def test_what_can_not_be_done_is_said_before_any_work(model, images, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").touch()
    before = sorted(tmp_path.iterdir())
    if "reference" not in flags:
        monkeypatch.setattr(predict, "load_model", pytest.fail)
    with pytest.raises(InputError, match=message) as error:
        predict.main([str(model / "saved"), *shlex.split(flags)])
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_a_table_is_whole_or_not_there(model, images, tmp_path, monkeypatch):
    table = tmp_path / "x.csv"
    table.write_text("earlier")
    flags = [str(model / "saved"), str(images), "--output", str(table), "--overwrite", "true", "--batch_size", "2"]
    done, row_of = [], predict.row_of

    def stop(*given):
        done.append(given)
        if len(done) == 3:
            raise KeyboardInterrupt
        return row_of(*given)

    monkeypatch.setattr(predict, "row_of", stop)
    with pytest.raises(KeyboardInterrupt):
        predict.main(flags)
    assert table.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir() if re.match(r"\.", path.name)] == []
    monkeypatch.setattr(predict, "row_of", row_of)
    predict.main(flags)
    assert len(read(table)) == len(FILES)


def test_several_processes_are_refused(monkeypatch, images, model):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a prediction runs in one process, not in 2"):
        predict.main([str(model / "saved"), str(images)])
