"""What an image cell may name besides its bytes: an ordinary file, or one on the Hub."""

import io
import os
import zipfile

import pytest
from PIL import Image as PILImage

from timm_jem.data.images import stored_bytes
from timm_jem.decoding import BrokenImage, open_image

HUB = "hf://datasets/user/name@0123"


def file_of(kind: str) -> bytes:
    content = io.BytesIO()
    PILImage.new("RGB", (8, 8), (1, 2, 3)).save(content, kind)
    return content.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """Files on the Hub by their addresses."""
    files = {f"{HUB}/1.png": file_of("PNG"), f"zip://1.png::{HUB}/all.zip": file_of("PNG"), f"{HUB}/1.eps": file_of("EPS")}
    monkeypatch.setattr("datasets.utils.file_utils.xopen", lambda address, mode: io.BytesIO(files[address]))


@pytest.mark.parametrize("address", [f"{HUB}/1.png", f"zip://1.png::{HUB}/all.zip"])
def test_files_on_the_hub_are_read(hub, address):
    assert open_image({"bytes": None, "path": address}, "row 0").getpixel((0, 0)) == (1, 2, 3)


def test_postscript_is_not_run_wherever_it_lies(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it runs"))
    (tmp_path / "1.png").write_bytes(file_of("EPS"))
    for cell in (
        {"bytes": file_of("EPS"), "path": None},
        {"bytes": None, "path": str(tmp_path / "1.png")},
        {"bytes": None, "path": f"{HUB}/1.eps"},
    ):
        with pytest.raises(BrokenImage, match="PostScript is a program, and none is run"):
            open_image(cell, "row 0")


def test_other_addresses_are_nobodys_to_choose(hub, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("1.png", file_of("PNG"))
    for address in (f"zip://1.png::{tmp_path}/all.zip", "http://127.0.0.1/1.png", "s3://a/1.png", f"file://{tmp_path}/1.png"):
        with pytest.raises(BrokenImage, match="no file here and none on the Hub: store the image's bytes"):
            open_image({"bytes": None, "path": address}, "row 0")


def test_a_file_on_the_hub_has_its_limit(hub, monkeypatch):
    monkeypatch.setattr("timm_jem.decoding._MOST_BYTES", 20)
    with pytest.raises(BrokenImage, match="larger than 0 MiB"):
        open_image({"bytes": None, "path": f"{HUB}/1.png"}, "row 0")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        assert stored_bytes({"bytes": None, "path": str(path)}) is None
        with pytest.raises(BrokenImage, match="not a file"):
            open_image({"bytes": None, "path": str(path)}, "row 0")
