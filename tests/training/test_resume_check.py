"""Which run a folder holds, told by what it was made from."""

import shutil

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import build_recipe
from ema_scale.training.resume_check import is_finished
from ema_scale.training.run import train
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


def test_a_run_of_other_weights_is_another_run(world, tmp_path):
    """The base model, or the adapter that a run started from, made anew at the same place, or moved to another."""
    shutil.copytree(world / "model", tmp_path / "model")
    first = recipe_of(world, tmp_path, "first", max_steps=1)
    first = build_recipe(first.to_dict() | {"model": {"path": str(tmp_path / "model")}})
    start = train(first, RunDir(first.run_path))
    second = build_recipe(first.to_dict() | {"name": "second", "adapter": {"start": str(start.adapter)}})
    run = train(second, RunDir(second.run_path))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}

    def is_it():
        return is_finished(second, run)

    for folder in (start.adapter, tmp_path / "model"):
        (weights_file,) = folder.glob("*.safetensors")
        whole = weights_file.read_bytes()
        weights_file.write_bytes(whole)  # the same with another date
        assert is_it()
        weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not is_it()
        with pytest.raises(UserError, match=rf"the checkpoint {folder} has changed.*--no-resume"):
            train(second, run)
        weights_file.write_bytes(whole)
        assert is_it()
    moved = shutil.copytree(start.adapter, tmp_path / "moved")
    elsewhere = build_recipe(second.to_dict() | {"adapter": {"start": str(moved)}})
    assert is_finished(elsewhere, run)
    (weights_file,) = moved.glob("*.safetensors")
    weights_file.write_bytes(whole)  # the base model's
    assert not is_finished(elsewhere, run)
    shutil.rmtree(start.adapter)  # a finished run needs it no more
    assert is_it() and {path: path.stat().st_mtime_ns for path in before} == before
