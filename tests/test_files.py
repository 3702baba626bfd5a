import os

import pytest

from timm_jem.files import folder_aside, replaced_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_file(file) as aside:
        aside.write_text(f"half of the n{1 / 0}")
    with pytest.raises(FileNotFoundError), replaced_file(file):
        pass  # nothing was written
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["figures.json"])
    with replaced_file(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert (file.read_text(), os.listdir(tmp_path)) == ("new", ["figures.json"])


def test_a_folder_aside_is_a_neighbour_and_goes_away(tmp_path):
    with folder_aside(tmp_path / "a" / "model") as aside:
        assert aside.parent == tmp_path / "a"
        (aside / "weights").write_text("half")
    assert os.listdir(tmp_path / "a") == []
