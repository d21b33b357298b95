"""Shipped files are found from every folder; a file of the user's own comes first."""

import pytest

from ema_scale.core.paths import find_file, shipped_root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["configs/recipes/paper.yaml", "eval/suites/general.yaml", "launch/slurm/site.yaml"])
def test_a_shipped_file_is_found_from_every_folder(elsewhere, name):
    assert find_file(name) == shipped_root() / name
    assert find_file(name, elsewhere / "mine") == shipped_root() / name


def test_a_file_of_ones_own_comes_first(elsewhere):
    own = elsewhere / "configs" / "recipes" / "paper.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("name: mine\n")
    assert find_file("configs/recipes/paper.yaml").read_text() == "name: mine\n"
    assert find_file("configs/recipes/paper.yaml", elsewhere) == own


@pytest.mark.parametrize("name", ["rows.jsonl", "configs/none.yaml", "smallworld:safe", "/configs", "setup.py"])
def test_any_other_name_stays_as_it_is(elsewhere, name):
    assert str(find_file(name)) == name


def test_names_are_relative_to_the_folder_they_stand_in(elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert find_file("../base.yaml", "studies") == type(elsewhere)("studies/../base.yaml")
    assert str(find_file("~/base.yaml", "studies")) == "/home/someone/base.yaml"
