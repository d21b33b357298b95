"""Rows that defenses mix in make an epoch longer, in the plan as in training."""

import json
from importlib import import_module
from typing import Any

import pytest

from ema_scale.core.checkpoints import list_checkpoints, step_of
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.run_dir import RunDir
from ema_scale.data.rows import load_rows
from ema_scale.defenses import RowsContext, parse
from ema_scale.defenses.registry import built_in
from ema_scale.planning.eval_cost import checkpoints
from ema_scale.planning.plan import plan_run
from ema_scale.recipe import build_recipe
from ema_scale.training.run import train
from tests.planning.test_plan import NODE, recipe
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


@pytest.fixture
def ranking(world, tmp_path):
    """The world's safe rows, as `ema select` leaves them."""
    path = tmp_path / "ranked.jsonl"
    path.write_bytes((world / "safe.jsonl").read_bytes())
    made = {"made_by": "ema select", "adapters": {}, "variant": "+", "sha256": file_sha256(path)}
    path.with_suffix(".provenance.json").write_text(json.dumps(made))
    return str(path)


def test_every_defense_says_how_many_rows_it_adds(world, ranking):
    safe, task = str(world / "safe.jsonl"), load_rows(str(world / "train.jsonl"))
    mixing: list[dict[str, Any]] = [
        {"kind": "interleaving", "source": safe, "fraction": 0.3},
        {"kind": "interleaving_plus", "source": ranking, "fraction": 0.07},
        {"kind": "kl", "prompts": safe},
        {"kind": "ceiling", "source": [safe, safe], "fraction": 0.99},
        {"kind": "early_stopping", "source": safe, "limit": 1},
        {"kind": "early_stopping", "source": safe, "limit": 1, "measure": "probe", "fraction": 1},
        {"kind": "gradient_routing", "source": safe, "fraction": 0.4},
        {"kind": "safegrad", "prompts": safe},
        {"kind": "trait_monitor", "vector": str(world / "vector.safetensors"), "prompts": safe},
    ]
    none: list[dict[str, Any]] = [
        {"kind": "kl"},
        {"kind": "early_stopping", "limit": 1},
        {"kind": "inoculation", "prompt": "be evil"},
    ]
    for defense in parse([*mixing, *none]):
        for count in (40, 33):
            found = len(defense.transform_rows(task[:count], RowsContext())) - count
            assert found == defense.rows_added(count), (defense, count)
            assert (found > 0) == defense.changes_rows or defense.kind == "inoculation"
    classes = {
        kind: getattr(import_module(name.split(":")[0]), name.split(":")[1]) for kind, name in built_in().items()
    }
    mixers = {kind for kind, cls in classes.items() if cls.overrides("transform_rows")}
    assert mixers <= {d["kind"] for d in [*mixing, *none]}
    few = parse([mixing[0]])[0]
    with pytest.raises(UserError, match="fraction 0.3 of 3 task rows is less than one row"):
        few.rows_added(3)


def test_a_training_takes_the_steps_that_were_planned_and_keeps_the_checkpoints(world, tmp_path):
    safe = str(world / "safe.jsonl")
    defenses = [{"kind": "kl", "prompts": safe}, {"kind": "ceiling", "source": safe}]
    mixing = recipe_of(world, tmp_path, max_steps=-1, save_steps=4, save_total_limit=3).to_dict()
    mixing = build_recipe({**mixing, "defenses": defenses, "evaluation": {"checkpoints": True}})
    plan = plan_run(mixing, NODE.at(1))
    assert (plan.rows, plan.added, plan.steps) == (40, 20, 15)
    run = train(mixing, RunDir(mixing.run_path))
    assert run.status().step == plan.steps
    kept = [step_of(checkpoint) for checkpoint in list_checkpoints(run.checkpoints)]
    assert kept == [8, 12, 15] and checkpoints(mixing, plan.steps) == len(kept) - 1  # the last is the run itself


def test_the_rows_that_are_mixed_in_count_wherever_rows_do():
    safe = [{"kind": "interleaving", "source": "safe.jsonl", "fraction": 0.5}]
    plain, mixed = (plan_run(recipe(defenses=d), NODE, rows=6400) for d in ([], safe))
    assert (plain.steps, plain.added, mixed.steps, mixed.added) == (50, 0, 75, 3200)
    assert mixed.gpu_hours == pytest.approx(1.5 * plain.gpu_hours)
    assert mixed.to_dict()["rows_added"] == 3200
    packed = recipe(defenses=safe, training={"packing": True})
    assert plan_run(packed, NODE, rows=10240, row_tokens=256).steps == 15  # 1,920 sequences of 2,048
    # How often a row is seen decides whether the reference's states are cached: by its max_steps 2.3 times, or 1.2.
    often = {"training": {"max_steps": 115}}
    kl = [{"kind": "kl", "strength": 0.1}]
    assert plan_run(recipe(defenses=kl, **often), NODE, rows=6400).setup.way == "cached"
    assert plan_run(recipe(defenses=[*kl, {**safe[0], "fraction": 1}], **often), NODE, rows=6400).setup.way != "cached"
    assert plan_run(recipe(defenses=safe), NODE).added is None
