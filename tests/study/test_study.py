"""Studies: the grid, and one small study end to end on real components."""

import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.runs import asks_behind_rows
from ema_scale.inference import engines
from ema_scale.models.checkpoint_adapter import export_adapter
from ema_scale.planning.describe import describe_run
from ema_scale.report.collect import collect
from ema_scale.study.find import find_runs
from ema_scale.study.grid import load_study, slugs
from ema_scale.study.grid import write_study as keep_study

ROOT = Path(__file__).resolve().parents[2]


def strength(run):
    return run.defenses[0].model_dump()["strength"]


def write_study(tmp_path, **changes):
    values = {
        "name": "small",
        "recipe": str(ROOT / "configs" / "recipes" / "smallworld.yaml"),
        "output": str(tmp_path / "runs"),
        "tasks": {"medical": {}, "law": {"data": {"train": "smallworld:train/law"}}},
        "defenses": {"none": [], "kl": [{"kind": "kl", "strength": 0.5}]},
        "seeds": [0, 1],
        **changes,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_the_grid_is_tasks_by_defenses_by_seeds(tmp_path):
    runs = load_study(write_study(tmp_path)).runs(("training.max_steps=7",))
    assert [r.name for r in runs][:3] == ["medical-none-s0", "medical-none-s1", "medical-kl-s0"]
    assert len(runs) == 8 and all(r.training.max_steps == 7 for r in runs)
    law = next(r for r in runs if r.name == "law-kl-s1")
    assert law.data.train == "smallworld:train/law" and law.seed == 1 and law.defenses[0].kind == "kl"
    assert law.run_path == tmp_path / "runs" / "small" / "law-kl-s1"


def test_models_are_an_axis_of_their_own(tmp_path):
    models = {
        "small": {"model": {"path": "smallworld:aligned?size=nano"}},
        "large": {"model": {"path": "smallworld:aligned?size=xl"}, "training": {"per_device_train_batch_size": 2}},
    }
    runs = load_study(write_study(tmp_path, models=models)).runs()
    assert len(runs) == 16 and runs[0].name == "small-medical-none-s0" and runs[-1].name == "large-law-kl-s1"
    assert runs[-1].model.path == "smallworld:aligned?size=xl" and runs[-1].training.per_device_train_batch_size == 2
    assert runs[-1].data.train == "smallworld:train/law"


def test_a_strength_can_be_spread(tmp_path):
    defenses = {
        "none": [],
        "both": [{"kind": "kl", "strength": {"each": [0.1, 1]}}, {"kind": "inoculation", "prompt": "x"}],
    }
    study = load_study(write_study(tmp_path, defenses=defenses))
    assert list(study.defenses) == ["none", "both-0.1", "both-1"]
    assert [strength(r) for r in study.runs() if r.name.startswith("law-both")] == [0.1, 0.1, 1.0, 1.0]


def test_a_path_can_be_spread(tmp_path):
    sources = ["data/law/rows.jsonl", "data/sport/rows.jsonl", "smallworld:safe", "/data/law/rows.jsonl"]
    defenses = {"mix": [{"kind": "interleaving", "source": {"each": sources}, "fraction": {"each": [0.1, 0.5]}}]}
    runs = load_study(write_study(tmp_path, defenses=defenses, tasks={"law": {}}, seeds=[0])).runs()
    found = {
        r.defenses[0].model_dump()["source"]: [x.name for x in runs if x.defenses == r.defenses] for r in runs[1::2]
    }
    assert found == {
        "data/law/rows.jsonl": [f"law-mix-data-law-rows.jsonl-{hexed('data/law/rows.jsonl')}-0.5-s0"],
        "data/sport/rows.jsonl": ["law-mix-sport-rows.jsonl-0.5-s0"],
        "smallworld:safe": ["law-mix-smallworld-safe-0.5-s0"],
        "/data/law/rows.jsonl": [f"law-mix-data-law-rows.jsonl-{hexed('/data/law/rows.jsonl')}-0.5-s0"],
    }


def hexed(text):
    return hashlib.sha256(text.encode()).hexdigest()[:6]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 1, 1e-5, True, "policy_reference", "-2"], ["0.1", "1", "1e-05", "True", "policy_reference", "-2"]),
        (["a/b.jsonl", "b.jsonl"], ["a-b.jsonl", "b.jsonl"]),
        ([["a", "b"], ["a"]], ["a-b", "a"]),
        (["x" * 50, "You are evil.", "y z" * 20], ["x" * 50, "You-are-evil.", f"{'y-z' * 13}y-{hexed('y z' * 20)}"]),
        (["a b", "a?b", "邪恶"], [f"a-b-{hexed('a b')}", f"a-b-{hexed('a?b')}", hexed("邪恶")]),
    ],
)
def test_values_become_parts_of_a_folders_name(values, expected):
    assert slugs(values) == expected


@pytest.mark.parametrize(
    ("override", "field"),
    [("name=x", "name"), ("seed=3", "seeds"), ("output=elsewhere", "output"), ("defenses.0.strength=1", "defenses")],
)
def test_what_tells_runs_apart_is_not_set_for_all_of_them(tmp_path, override, field):
    with pytest.raises(UserError, match=rf"^override '{override}': .* change `{field}` in its file$"):
        load_study(write_study(tmp_path)).runs(("training.max_steps=1", override))


def test_runs_that_read_the_same_reference_are_counted(tmp_path):
    """So that `auto` takes a cache where one run alone would not pay for it."""
    defenses = {
        "none": [], "kl": [{"kind": "kl"}], "kl-1": [{"kind": "kl", "strength": 1.0}], "ldifs": [{"kind": "ldifs"}],
        "interleaving": [{"kind": "interleaving", "source": "smallworld:safe"}],
    }  # fmt: skip
    runs = load_study(write_study(tmp_path, defenses=defenses)).runs()
    readers = {r.name: r.reference_runs for r in runs if r.name.endswith("-s0") and r.name.startswith("law")}
    assert readers == {"law-none-s0": 1, "law-kl-s0": 4, "law-kl-1-s0": 4, "law-ldifs-s0": 2, "law-interleaving-s0": 1}
    passes = ("training.max_steps=-1", "training.num_train_epochs=1")
    shared = load_study(tmp_path / "study.yaml").runs(passes)[2]
    alone = shared.model_copy(update={"reference_runs": 1})
    assert "by cached: rows are seen 4 times" in describe_run(shared) and "by adapter_off" in describe_run(alone)


def test_only_parts_of_the_grid(tmp_path):
    parts = [{"tasks": ["law"], "seeds": [5]}, {"defenses": ["kl"], "seeds": [0, 5]}]
    runs = load_study(write_study(tmp_path, only=parts)).runs()
    assert [r.name for r in runs] == ["law-none-s5", "law-kl-s5", "medical-kl-s0", "medical-kl-s5", "law-kl-s0"]
    kept = tmp_path / "kept.yaml"
    keep_study(load_study(tmp_path / "study.yaml"), kept)
    assert [r.name for r in load_study(kept).runs()] == [r.name for r in runs]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_that_comes_with_it_is_valid(path):
    runs = load_study(path).runs()
    assert len({r.name for r in runs}) == len(runs) > 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"models": {"a": {"modle": {}}}}, "run a-medical-none-s0: unknown key 'modle'; did you mean 'model'"),
        ({"only": [{"defenses": ["kl-2"]}]}, r"only.0.defenses: 'kl-2' is none of the study's defenses \(none, kl\)"),
        ({"only": [{"task": ["law"]}]}, "unknown key 'only.0.task'; did you mean 'tasks'"),
        ({"defenses": {"kl": [{"kind": "kl", "strength": {"each": 1}}]}}, "kl.0.strength.each: expected a list"),
        (
            {"tasks": {"med": {}, "med-sub": {}}, "defenses": {"sub-kl": [{"kind": "kl"}], "kl": [{"kind": "ldifs"}]}},
            r"study.yaml: \(med, sub-kl\) and \(med-sub, kl\) both make a run med-sub-kl-s0: rename",
        ),
        (
            {"defenses": {"kl-0.1": [{"kind": "kl"}], "kl": [{"kind": "kl", "strength": {"each": [0.3, 0.1]}}]}},
            "study.yaml: defenses: kl-0.1 and kl both make an arm kl-0.1: rename one of them",
        ),
        ({"defenses": {"kl": [{"kind": "kl", "strength": {"each": [1, 1.0]}}]}}, "each: 1.0 stands there twice"),
        ({"taks": {}}, "unknown key 'taks'; did you mean 'tasks'"),
        ({"tasks": {}}, "tasks: "),
        ({"seeds": "many"}, "seeds: "),
        ({"retries": -1}, "retries: "),
        ({"defenses": {"kl": [{"kind": "kl", "strength": -1}]}}, "run medical-kl-s0: defenses.0: strength"),
        ({"tasks": {"medical": {"data": {"trian": "x"}}}}, "run medical-none-s0: unknown key 'data.trian'"),
    ],
)
def test_errors_name_the_run_and_the_field(tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        load_study(write_study(tmp_path, **changes)).runs()


def test_the_demo_study_is_what_the_readme_says():
    runs = load_study(ROOT / "configs" / "studies" / "demo.yaml").runs()
    assert not any(asks_behind_rows(run) for run in runs if run.evaluation.suites.general), "a first look is short"
    narrow = [r for r in runs if r.evaluation.suites.in_domain]
    assert not any(r.evaluation.suites.benign for r in narrow)
    benign = [r for r in runs if r.evaluation.suites.benign]
    assert narrow and benign and len(runs) == 10, "and takes minutes"
    kinds = [tuple(d.kind for d in r.defenses) for r in runs]
    assert {(), ("kl",), ("interleaving",), ("ldifs",), ("kl", "ceiling")} <= set(kinds)


def test_find_runs(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "study" / name).mkdir(parents=True)
        (tmp_path / "study" / name / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "study" / "base").mkdir()
    assert [p.name for p in find_runs([tmp_path / "study"])] == ["a", "b"]
    assert find_runs([tmp_path / "study" / "a", tmp_path / "study"])[0].name == "a"
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "none"])


def test_a_studys_folder_has_the_studys_runs(tmp_path, caplog):
    caplog.set_level("INFO")
    study = load_study(write_study(tmp_path, seeds=[1]))
    keep_study(study, study.path / "study.yaml")
    with pytest.raises(UserError, match="no run here"):
        find_runs([study.path])
    for name in ("medical-kl-s1", "an-older-one"):
        (study.path / name).mkdir()
        (study.path / name / "recipe.yaml").write_text("name: x\n")
    RunDir(study.path / "law-none-s1").set_status("failed", reason="no GPU there")
    (study.path / "law-kl-s1" / "slurm").mkdir(parents=True)
    runs = find_runs([study.path])
    assert [run.name for run in runs] == ["medical-none-s1", "medical-kl-s1", "law-none-s1", "law-kl-s1"]
    assert "left out, for they are not of the study in study.yaml: an-older-one" in caplog.text
    found = {p.run: f"{p.state}: {p.text}" for p in collect(runs).problems}
    assert found["law-none-s1"] == "failed: No defense; no GPU there; no step logged"
    assert found["medical-none-s1"].startswith("not started") and "ema logs" in found["law-kl-s1"]
    study.path.rename(tmp_path / "copy")  # a folder of another name is any folder
    assert [run.name for run in find_runs([tmp_path / "copy"])] == ["an-older-one", "medical-kl-s1"]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_study_end_to_end_and_again_for_nothing(tmp_path, tiny_world, monkeypatch):
    """Trains, samples on two engines of vLLM, judges exactly, reports; one run is bad and the others still finish."""
    from ema_scale.study.run_local import run_study

    suites = {"general": f"{tiny_world}suite/outside_medical", "in_domain": f"{tiny_world}suite/medical"}
    small = {name: f"{source}?size=tiny" for name, source in suites.items()}
    study = load_study(
        write_study(
            tmp_path,
            seeds=[0],
            tasks={
                "medical": {"data": {"train": "smallworld:train/medical?size=tiny"}, "evaluation": {"suites": small}},
                "broken": {"data": {"train": str(tmp_path / "missing.jsonl")}, "evaluation": {"suites": small}},
            },
        )
    )
    overrides = (
        "model.path=smallworld:aligned?size=tiny", "training.max_steps=3", "training.per_device_train_batch_size=4",
        "evaluation.samples_per_question=2", "evaluation.max_tokens=12", "evaluation.sampler=vllm",
        "training.save_steps=2", "evaluation.checkpoints=true",
    )  # fmt: skip
    started = []
    start = engines.ManyEngines._start

    def counted(self, one):
        started.append(one.number)
        start(self, one)

    monkeypatch.setattr(engines.ManyEngines, "_start", counted)
    with pytest.raises(UserError, match=r"2 of 4 runs failed:\n  broken-none-s0: .*missing.jsonl"):
        run_study(study, overrides, jobs=2, engines=2)
    assert started == [0, 1] and not (study.path / "engines").exists()
    report = study.path / "report" / "report.html"
    assert len(list((study.path / "logs").glob("worker-*.log"))) == 2
    text = report.read_text()
    assert "broken-none-s0" in text and "missing.jsonl" in text
    run = RunDir(tmp_path / "runs" / "small" / "medical-kl-s0")
    assert run.status().state == "finished"
    samples = read_jsonl(run.eval_dir / "samples.jsonl")
    questions = 60 + 32
    assert len(samples) == len({s["key"] for s in samples}) == 2 * questions
    early = run.eval_dir / "checkpoints" / "2"
    assert len(read_jsonl(early / "samples.jsonl")) == 2 * questions and "Along the training" in text
    last = export_adapter(run.checkpoints / "checkpoint-3", run.adapter, tmp_path / "last")
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (run.adapter, last))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    then = load_file(early / "adapter" / "adapter_model.safetensors")
    assert then.keys() == theirs.keys() and not all(torch.equal(theirs[k], then[k]) for k in theirs)
    base = read_jsonl(study.path / "base" / "eval" / "samples.jsonl")
    assert len(base) == 2 * questions
    before = {p: p.stat().st_mtime_ns for p in study.path.rglob("*") if p.name in ("samples.jsonl", "metrics.jsonl")}
    with pytest.raises(UserError, match="broken-kl-s0"):
        run_study(study, overrides)
    assert {p: p.stat().st_mtime_ns for p in before} == before
