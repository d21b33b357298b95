"""Base models on a node's own disk."""

import shutil
from pathlib import Path

import pytest

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.uri import locate
from ema_scale.models.load import load_base
from ema_scale.models.staging import staged


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE", str(tmp_path))
    monkeypatch.setenv("EMA_SCRATCH", "$NODE/scratch")
    return tmp_path / "scratch"


@pytest.fixture
def model(tiny_world, tmp_path):
    return Path(shutil.copytree(locate(f"{tiny_world}aligned?size=tiny"), tmp_path / "model"))


def test_a_model_is_copied_once_loaded_from_there_and_keeps_its_name(scratch, model, caplog):
    caplog.set_level("INFO")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    copy = Path(staged(str(model)))
    assert copy.parent.parent == scratch and copy.parent.stat().st_mode & 0o77 == 0
    assert {f.name for f in copy.iterdir()} == {f.name for f in model.iterdir()} - {"pytorch_model.bin"}
    loaded = load_base(ModelRecipe(path=str(model)))
    assert (loaded.name_or_path, loaded.config._name_or_path) == (str(model), str(model))
    assert caplog.text.count("copying ") == 1
    (copy / "model.safetensors").unlink()  # it is the copy that is read
    with pytest.raises(UserError, match="scratch"):
        load_base(ModelRecipe(path=str(model)))

    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert staged(str(model)) != str(copy), "another model"


def test_what_cannot_be_copied_is_loaded_from_where_it_is(scratch, model, caplog, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert staged(str(model)) == str(model)
    assert "is loaded from where it is, not from EMA_SCRATCH: it takes" in caplog.text
    scratch.joinpath("file").touch()
    monkeypatch.setenv("EMA_SCRATCH", str(scratch / "file"))
    assert staged(str(model)) == str(model)
    monkeypatch.setenv("EMA_SCRATCH", "$NOWHERE/x")
    with pytest.raises(UserError, match="EMA_SCRATCH: found '\\$NOWHERE/x'"):
        staged(str(model))
    monkeypatch.delenv("EMA_SCRATCH")
    assert staged("smallworld:aligned") == "smallworld:aligned"
