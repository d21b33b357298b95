"""`ema cache`: the reference computed ahead of the runs that read it."""

import json
import re

import pytest
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import build_recipe
from ema_scale.training.run import fill_cache, train


def recipe(folder, **more):
    return build_recipe(
        {
            "name": "cached",
            "output": str(folder / "runs"),
            "model": {"path": "smallworld:aligned?size=tiny"},
            "data": {"train": "smallworld:train/medical?size=tiny", "limit": 12},
            "training": {
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "report_to": "none",
            },
            "defenses": [{"kind": "kl", "strength": 0.3}],
            **more,
        }
    )


@pytest.fixture
def own_cache(tmp_path, tiny_world, monkeypatch):
    """The world as it is, and a cache of the reference that is empty."""
    from ema_scale.training import reference_setup

    monkeypatch.setattr(reference_setup, "cache_root", lambda: tmp_path / "cache")
    return tmp_path


def test_training_finds_everything_there_and_a_second_time_computes_nothing(own_cache):
    file = own_cache / "recipe.yaml"
    file.write_text(recipe(own_cache).to_yaml())
    first, second = (CliRunner().invoke(app, ["cache", str(file)], catch_exceptions=False) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert re.search(r"12 rows computed, [1-9]\d* tokens", first.output)
    assert re.search(r"0 rows computed, 0 tokens", second.output)
    run = RunDir(recipe(own_cache).run_path)
    train(recipe(own_cache), run)
    provenance = json.loads((run.path / "provenance.json").read_text())
    why = {"way": "cached", "why": "every row's reference is on disk already", "of": "the base model"}
    assert provenance["reference"] == why, "auto takes what is there"


def test_nothing_to_cache_is_an_error(own_cache):
    with pytest.raises(UserError, match="none of them reads the reference"):
        fill_cache(recipe(own_cache, defenses=[]))
