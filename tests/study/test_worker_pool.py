"""The local queue: runs that fail are tried again, and take no other run with them."""

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses.registry import parse, plugins
from ema_scale.study import worker_pool
from ema_scale.study.worker_pool import listed, train_all
from tests.slurm.helpers import write_plugin
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


@pytest.fixture
def troubled(world, tmp_path, monkeypatch):
    """Recipes by name; keyword arguments are the trouble that one meets."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    write_plugin(folder)
    monkeypatch.syspath_prepend(str(folder))

    def make(name, **trouble):
        recipe = recipe_of(world, tmp_path / "runs", name, max_steps=4)
        specs = [{"kind": "trouble", "rank": 0, **trouble}] if trouble else []
        return recipe.model_copy(update={"defenses": parse(specs)})

    yield make
    plugins.cache_clear()


def test_a_failed_run_is_tried_again_from_its_checkpoint(troubled, tmp_path, caplog):
    caplog.set_level("INFO")
    once = str(tmp_path / "once")
    recipes = [troubled("passing", at=2, once=once), troubled("calm"), troubled("lasting", at=2)]
    failed = train_all(recipes, retries=2)
    assert failed == {"lasting": "ValueError: the disk of this rank is on fire"}
    assert listed(failed) == "  lasting: ValueError: the disk of this rank is on fire"
    runs = {r.name: RunDir(r.run_path) for r in recipes}
    assert {name: run.status().state for name, run in runs.items()} == {
        "passing": "finished", "calm": "finished", "lasting": "failed",
    }  # fmt: skip
    assert f"{runs['passing'].path}: going on from step 2" in caplog.text
    assert [row["step"] for row in read_jsonl(runs["passing"].metrics_path)] == [1, 2, 3, 4]
    order = [message.split(":")[0] for message in caplog.messages if message.startswith("[")]
    once_more = ["[1/2] passing", "[2/2] lasting", "[1/1] lasting"]
    assert order == ["[1/3] passing", "[2/3] calm", "[3/3] lasting", *once_more]


@pytest.mark.slow
def test_a_killed_worker_costs_no_run(troubled, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    made = []

    def locate(model):
        made.append(model)
        raise UserError("it cannot be built")

    monkeypatch.setattr(worker_pool, "locate", locate)
    killed = troubled("killed", at=2, way="SIGKILL", once=str(tmp_path / "once"))
    recipes = [killed, troubled("slow", at=-1, pause=0.5), troubled("waiting")]
    assert train_all(recipes, 2, tmp_path / "logs", retries=1) == {}
    assert "killed: FAILED: its worker process was killed from outside" in caplog.text
    assert "waiting: FAILED" not in caplog.text
    assert [RunDir(r.run_path).status().state for r in recipes] == ["finished"] * 3
    assert set(made) == {killed.model.path}, "built where its progress shows; the workers find it, or say why not"
