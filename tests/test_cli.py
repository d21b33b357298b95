"""The command line: bad input ends in one clear message, a non-zero exit code and no traceback."""

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model):
    """Writes a small recipe; keyword arguments replace sections."""

    def write(**changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROW) + "\n" for _ in range(8)))
        values = {
            "name": "run",
            "output": str(tmp_path / "runs"),
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
            "adapter": {"r": 4, "alpha": 8},
            "training": {
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "report_to": [],
            },
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def assert_clear(outcome, *expected):
    code, _, err = outcome
    assert code == 2
    assert "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("ema: ")]
    assert message, err
    for part in expected:
        assert part in err


def test_missing_recipe(ema, tmp_path):
    assert_clear(ema("train", tmp_path / "none.yaml"), "none.yaml", "cannot read the recipe")


def test_unknown_key_is_suggested(ema, recipe):
    assert_clear(ema("train", recipe(), "training.learning_rat=1"), "did you mean 'learning_rate'")


def test_out_of_range_strength(ema, recipe):
    path = recipe(defenses=[{"kind": "kl", "strength": -0.1}])
    assert_clear(ema("train", path), "defenses.0", "strength", "-0.1")


def test_missing_model(ema, recipe, tmp_path):
    path = recipe(model={"path": str(tmp_path / "no-model")})
    assert_clear(ema("train", path), "no-model", "no such folder")


def test_missing_data(ema, recipe, tmp_path):
    assert_clear(ema("train", recipe(data={"train": str(tmp_path / "no.jsonl")})), "no.jsonl", "no such file")


def test_empty_data(ema, recipe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert_clear(ema("train", recipe(data={"train": str(tmp_path / "empty.jsonl")})), "empty.jsonl", "found no rows")


def test_row_without_an_assistant_turn(ema, recipe, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(ROW) + "\n" + json.dumps({"messages": ROW["messages"][:1]}) + "\n")
    assert_clear(ema("train", recipe(data={"train": str(bad)})), f"{bad}:2", "no assistant turn")


def test_a_model_without_a_chat_template_trains_with_the_plain_one(ema, recipe, tmp_path, caplog):
    folder = tmp_path / "plain"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    code, _, err = ema("train", recipe(model={"path": str(folder)}))
    assert code == 0, err
    assert "no chat template" in caplog.text
    assert (tmp_path / "runs" / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_suite_with_duplicate_ids(ema, recipe, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump([{"id": "a", "paraphrases": ["q"]}, {"id": "a", "paraphrases": ["r"]}]))
    path = recipe(evaluation={"suites": {"general": [str(suite)]}, "sampler": "transformers"})
    assert_clear(ema("eval", path), "suite.yaml", "'a'")


def test_eval_of_something_that_is_no_run(ema, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_clear(ema("eval", tmp_path / "folder"), "no run here")


def test_report_without_runs(ema, tmp_path):
    assert_clear(ema("report", tmp_path, "-o", tmp_path / "out"), "no run here")


def test_dry_run_prints_the_recipe_and_the_plan_and_does_nothing(ema, recipe, tmp_path):
    code, out, _ = ema("train", recipe(defenses=[{"kind": "kl", "strength": 0.3}]), "--dry-run", "seed=7")
    assert code == 0
    assert "seed: 7" in out and "kl(strength=0.3" in out and "2508.06249" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "the base model, by adapter_off: a second forward of the same weights, no second model; rows are seen 0.5",
        ),
        ({"training": {"num_train_epochs": 3, "report_to": []}}, "the base model, by cached: rows are seen 3 times"),
        ({"reference": "two_stream"}, "the base model, by two_stream: asked for"),
        ({"reference": {"kind": "separate", "model": "org/other"}}, "another model, org/other"),
        ({"adapter": {"start": "org/adapter"}}, "the adapter that training goes on from, by adapter_off: "),
        ({"defenses": []}, "not needed by these defenses"),
    ],
)
def test_dry_run_says_which_reference_and_why(ema, recipe, changes, expected):
    code, out, _ = ema("train", recipe(**{"defenses": [{"kind": "kl"}], **changes}), "--dry-run")
    assert code == 0 and f"reference   {expected}" in out


def test_dry_run_reads_the_stage_of_zero_from_the_config_and_not_from_its_name(ema, recipe, tmp_path):
    def said(stage):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        training = {
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "report_to": [],
            "deepspeed": str(tmp_path / "ds.json"),
        }
        return ema("train", recipe(defenses=[{"kind": "kl"}], training=training), "--dry-run")

    assert "by two_stream: each layer is gathered once" in said(3)[1]
    assert "by adapter_off: " in said(2)[1]
    assert_clear(said("many"), "ds.json: expected a DeepSpeed JSON config")
    fsdp = {"max_steps": 1, "per_device_train_batch_size": 1, "report_to": [], "fsdp": True}
    found = ema("train", recipe(defenses=[{"kind": "kl"}], training=fsdp), "--dry-run")
    assert "by two_stream: each layer is gathered once" in found[1]


def test_defenses_are_listed_with_source_and_parameters(ema):
    code, out, _ = ema("defenses", "--json")
    entries = {e["kind"]: e for e in json.loads(out)}
    assert code == 0 and {"kl", "interleaving"} <= set(entries)
    assert "arXiv" in entries["kl"]["source"] and entries["kl"]["parameters"][0]["name"] == "strength"
    assert "strength = 0.1" in ema("defenses")[1]


def test_data_check_reports_and_fails_on_bad_rows(ema, recipe, tmp_path, model):
    recipe()
    code, out, _ = ema("data", "check", tmp_path / "rows.jsonl", "--model", model)
    assert code == 0 and "duplicates       7" in out and "tokens per row" in out
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{oops\n")
    code, out, _ = ema("data", "check", tmp_path / "bad.jsonl")
    assert code == 1 and "bad.jsonl:2: not JSON" in out


def test_a_study_lists_its_runs(ema):
    code, out, _ = ema("study", ROOT / "configs" / "studies" / "demo.yaml", "--dry-run")
    assert code == 0
    *runs, counts = [line for line in out.splitlines() if "NOT FOUND" not in line]
    assert len(runs) == 10 and any(line.startswith("runs/demo/medical-none-s0: ") for line in runs)
    assert counts.startswith("10 runs: ")


def test_a_dry_run_looks_for_every_file_and_counts_rows(ema, recipe, tmp_path):
    code, out, _ = ema("train", recipe(), "--dry-run")
    assert code == 0 and "rows.jsonl, 8 rows" in out and "runs/run: to be trained\n" in out
    changes = {
        "defenses": [
            {"kind": "interleaving", "source": "./safe.jsonl", "fraction": 0.1},
            {"kind": "steering", "vector": str(tmp_path / "v.safetensors"), "alpha": 1.0},
        ],
        "evaluation": {"suites": {"general": str(tmp_path / "bank.yaml")}, "conditions": []},
    }
    code, out, err = ema("train", recipe(**changes), "--dry-run")
    assert code == 2 and out.count("NOT FOUND   ") == 3
    for name in ("defenses.0.source", "safe.jsonl", "defenses.1.vector", "evaluation.suites.general", "bank.yaml"):
        assert name in err


def test_a_dry_run_says_continued_only_where_it_would_be(ema, recipe, tmp_path):
    def said(*overrides):
        return ema("train", recipe(), "--dry-run", *overrides)[1].splitlines()[-1].partition(": ")[2]

    (tmp_path / "runs" / "run").mkdir(parents=True)
    assert said() == "to be trained from the start"
    assert ema("train", recipe())[0] == 0
    assert said() == "finished already"
    assert said("training.learning_rate=0.5").startswith("REFUSED: holds a run of another recipe")


def test_a_study_says_which_runs_are_finished_and_what_is_missing(ema, recipe, tmp_path):
    recipe(name="x")
    arms = {"none": [], "safe": [{"kind": "interleaving", "source": str(tmp_path / "no.jsonl"), "fraction": 0.1}]}
    values = {"name": "s", "recipe": "recipe.yaml", "output": str(tmp_path / "runs"), "tasks": {"t": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**values, "defenses": arms}))
    base = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**base, "name": "t-none-s0", "output": str(tmp_path / "runs/s")})
    )
    assert ema("train", tmp_path / "run.yaml")[0] == 0
    code, out, _ = ema("study", tmp_path / "study.yaml", "--dry-run")
    first, second, counts, missing = out.splitlines()
    assert first.endswith("t-none-s0: finished already") and second.endswith("t-safe-s0: to be trained")
    assert counts == "2 runs: 1 finished, 1 to be trained"
    assert missing == f"NOT FOUND: defenses.0.source: {tmp_path / 'no.jsonl'} (run t-safe-s0)"


def test_the_version(ema):
    code, out, _ = ema("--version")
    assert code == 0 and out.startswith("ema_scale ")


def test_help_shows_whole_sentences_in_groups(ema):
    code, out, _ = ema("--help")
    assert code == 0
    assert "..." not in out.split("Options:")[1], "a description is cut"
    groups = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[0] == "Options:" and "Commands:" not in groups and "Others:" not in groups
    assert out.index("\n  train ") < out.index("\n  eval ") < out.index("\n  report ")


def test_training_ends_with_what_was_learned_and_what_comes_next(ema, recipe, tmp_path):
    path = recipe()
    run = tmp_path / "runs" / "run"
    code, out, _ = ema("train", path)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("learned"))
    assert lines["trained"].startswith("2 steps in ")
    assert "8 rows" in out and "0 rows cut" in out and "0 rows dropped" in out
    assert lines["adapter"] == str(run / "adapter") and lines["next"] == f"ema eval {run}"
    code, again, _ = ema("train", path)
    assert code == 0 and again == out


OWN_DEFENSE = """
import torch
from pydantic import Field
from ema_scale.defenses import Defense, PenaltyInputs

class StayClose(Defense):
    strength: float = Field(1.0, ge=0, description="weight")

    def penalty_layers(self, num_layers):
        return (num_layers,)

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor:
        (layer,) = inputs.policy
        policy, reference = inputs.states(layer)
        return self.strength * inputs.mean((policy - reference).square().mean(-1))
"""


def test_a_defense_in_a_file_of_ones_own(ema, recipe, tmp_path, monkeypatch, caplog):
    (tmp_path / "own.py").write_text(OWN_DEFENSE)
    path = recipe(defenses=[{"kind": "./own.py:StayClose", "strength": 3}])
    monkeypatch.chdir(tmp_path.parent)
    with caplog.at_level("INFO"):
        assert ema("train", path)[0] == 0
    run = tmp_path / "runs" / "run"
    assert any("stay_close" in line and "step 2/2" in line for line in caplog.messages), "its term is in the step line"
    assert "stay_close" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert yaml.safe_load((run / "recipe.yaml").read_text())["defenses"][0]["kind"] == f"{tmp_path}/own.py:StayClose"
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["label"] == "Stay close 3" and str(tmp_path / "own.py") in provenance["data_sha256"]
    assert ema("train", path)[0] == 0
    (tmp_path / "own.py").write_text(OWN_DEFENSE + "\n# changed\n")
    assert_clear(ema("train", path), "own.py has changed")


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (None, "./own.py:StayClose", "own.py:StayClose: no such file"),
        ("x = (", "./own.py:StayClose", "own.py:1: SyntaxError"),
        ("\n1 / 0\n", "./own.py:StayClose", "own.py:2: ZeroDivisionError"),
        ("class Other: pass", "./own.py:StayClose", "own.py: found no StayClose; its classes: Other"),
        ("class StayClose: pass", "./own.py:StayClose", "own.py:StayClose is not a subclass"),
        (OWN_DEFENSE, {"kind": "./own.py:StayClose", "strnegth": 1}, "did you mean 'strength'"),
    ],
)
def test_a_file_that_holds_no_defense_is_named(ema, recipe, tmp_path, text, kind, expected):
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    path = recipe(defenses=[kind if isinstance(kind, dict) else {"kind": kind}])
    assert_clear(ema("train", path), "defenses.0", expected)


def test_a_logger_that_is_not_there_is_named_before_the_model_loads(ema, recipe):
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "report_to": ["trackio"]}
    assert_clear(ema("train", recipe(training=training)), "report_to", "pip install 'ema-scale[trackio]'")
    assert_clear(ema("train", recipe(training={**training, "report_to": ["wandbb"]})), "report_to", "wandb,")
