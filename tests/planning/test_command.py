"""`ema plan`: recipes, studies, judge calls, JSON, and messages for bad input."""

import json
import sys
from pathlib import Path

import pytest

from ema_scale.cli import main
from ema_scale.planning.judging import judged
from ema_scale.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
KL = ROOT / "configs" / "recipes" / "qwen2.5-7b-kl.yaml"


@pytest.fixture
def ema(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ema", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_a_recipe(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--rows", 6000)
    assert code == 0
    assert "fits: " in out and "GPU-hours" in out and "a chunk" not in out
    assert "judge: " in out and "USD" in out and "nothing of this was measured on a GPU" in out


def test_json_holds_the_same(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--rows", 6000, "--json")
    run = json.loads(out)["runs"][0]
    assert code == 0 and run["steps"] == 47 and run["fits"] and run["gpus"] == 8
    assert sum(part["bytes"] for part in run["memory"].values()) == pytest.approx(run["memory_bytes"], abs=20)


def test_a_scale(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--zero", 3, "--scale", "8-1024")
    rows = [line for line in out.splitlines() if line.startswith("| ") and "GPUs" not in line]
    assert code == 0 and len(rows) == 8 and rows[-1].startswith("| 1,024")


def test_a_study_is_the_sum_of_its_runs(ema, tmp_path):
    (tmp_path / "study.yaml").write_text(
        f"name: two\nrecipe: {KL}\nseeds: [0, 1]\n"
        "tasks: {one: {data: {train: rows.jsonl}}}\ndefenses: {none: [], kl: [{kind: kl}]}\n"
    )
    code, out, _ = ema("plan", tmp_path / "study.yaml", "--gpus", "8x80GB", "--rows", 6000, "--json")
    found = json.loads(out)
    assert code == 0 and len(found["runs"]) == 4
    one = judged([load_recipe(KL, ["data.train=rows.jsonl"])])
    # 4 runs and their base against 1 run and its base
    assert found["judge"]["answers"] == one.answers // 2 * 5
    assert "4 runs" in ema("plan", tmp_path / "study.yaml", "--gpus", "8x80GB", "--rows", 6000)[1]


def test_judge_calls_by_hand(tmp_path):
    (tmp_path / "suite.yaml").write_text("- {id: a, paraphrases: [abc, defghi], samples_per_paraphrase: 5}\n")
    (tmp_path / "prompts.yaml").write_text("aligned: 'abcdef {answer}'\ncoherent: 'xyz {answer}'\n")
    changes = [
        "data.train=x", f"evaluation.suites={{general: {tmp_path}/suite.yaml}}", "evaluation.compare_base=false",
        "evaluation.samples_per_question=null", f"evaluation.judge.prompts={tmp_path}/prompts.yaml",
        "evaluation.judge.check=0",
    ]  # fmt: skip
    found = judged([load_recipe(KL, changes)], answer_tokens=60)
    assert (found.answers, found.answer_tokens, found.calls, found.check_calls) == (10, 600, 20, 0)
    # Prompts of 15 and 12 characters, questions of 3 and 6, three a token; the answer in both prompts.
    assert found.tokens_in == pytest.approx(10 * (5 + 4) + 5 * 2 * (1 + 2) + 2 * 10 * 60)
    assert found.tokens_out == 20 * 5
    assert found.cost(1.0, 10.0) == pytest.approx((found.tokens_in + 1000) / 1e6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "--gpus: found '8', expected"),
        (["--scale", "many"], "--scale: found 'many'"),
        (["--device", "tpu"], "--device: found 'tpu', expected h100 or a100"),
        (["--mfu", "1.5"], "--mfu: found 1.5"),
        (["model.path=somebody/unheard-of"], "no config.json can be had here"),
    ],
)
def test_bad_input_is_a_message(ema, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = ema("plan", KL, "data.train=rows.jsonl", *arguments)
    assert code == 2 and message in err and "Traceback" not in err
