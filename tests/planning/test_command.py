"""`ema plan`: recipes, studies, judge calls, JSON, and messages for bad input."""

import itertools
import json
from pathlib import Path

import pytest

from ema_scale.planning.eval_cost import judging_cost
from ema_scale.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
KL = ROOT / "configs" / "recipes" / "qwen2.5-7b-kl.yaml"
SMALL = ROOT / "configs" / "recipes" / "smallworld.yaml"


def test_a_recipe(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--rows", 6000)
    assert code == 0
    assert "fits: " in out and "GPU-hours" in out and "a chunk" not in out
    assert (
        "47 steps of 6,000 rows, " in out
        and "judge: " in out
        and "USD" in out
        and "no measurement of this package's own" in out
        and "of the GPU's peak" in out
    )


def test_json_holds_the_same(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--rows", 6000, "--json")
    run = json.loads(out)["runs"][0]
    assert code == 0 and run["steps"] == 47 and run["fits"] and run["gpus"] == 8
    assert sum(part["bytes"] for part in run["memory"].values()) == pytest.approx(run["memory_bytes"], abs=20)


def test_a_scale(ema):
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", "--gpus", "8x80GB", "--zero", 3, "--scale", "8-1024")
    rows = [line for line in out.splitlines() if line.startswith("| ") and "GPUs" not in line]
    assert code == 0 and len(rows) == 8 and rows[-1].startswith("| 1,024")


def test_a_scale_says_what_a_cache_takes_of_the_disk(ema):
    asked = ["plan", KL, "data.train=rows.jsonl", "reference=cached", "--row-tokens", 400, "--scale", "8-64"]
    line = "the reference's cache on disk: "
    assert line + "17.2 GB (1 hidden state per token)" in ema(*asked, "--rows", 6000, "--gpus", "8x80GB")[1]
    assert line + "unknown; give --rows" in ema(*asked, "--gpus", "8x80GB")[1]
    assert line not in ema("plan", KL, "data.train=rows.jsonl", "--rows", 6000)[1]


def test_a_measured_step_replaces_the_estimate(ema, two_by_two):
    asked = ["plan", KL, "data.train=rows.jsonl", "--row-tokens", 400, "--rows", 6000]
    run = json.loads(ema(*asked, "--measured-step", 4, "--json")[1])["runs"][0]
    assert run["step_seconds"] == pytest.approx(4) and run["gpu_hours"] == pytest.approx(run["steps"] * 4 / 3600)
    out = ema(*asked, "--measured-step", 4, "--scale", "1,2", "--gpus", "2x80GB")[1]
    assert "by the step that was measured" in out
    by_share = json.loads(ema(*asked, "--mfu", run["peak_share"], "--json")[1])["runs"][0]
    assert by_share["step_seconds"] == pytest.approx(4)
    for other in ([two_by_two], [KL, "data.train=rows.jsonl", "--mfu", 0.3]):
        code, _, err = ema("plan", *other, "--measured-step", 4)
        assert code == 2 and "--measured-step: found " in err and "--mfu" in err


def test_a_study_is_the_sum_of_its_runs(ema, tmp_path):
    (tmp_path / "study.yaml").write_text(
        f"name: two\nrecipe: {KL}\nseeds: [0, 1]\n"
        "tasks: {one: {data: {train: rows.jsonl}}}\ndefenses: {none: [], kl: [{kind: kl}]}\n"
    )
    code, out, _ = ema("plan", tmp_path / "study.yaml", "--gpus", "8x80GB", "--rows", 6000, "--json")
    found = json.loads(out)
    assert code == 0 and len(found["runs"]) == 4
    one = judging_cost([load_recipe(KL, ["data.train=rows.jsonl"])])
    # 4 runs and their base against 1 run and its base
    assert found["judge"]["answers"] == one.answers // 2 * 5
    hours = found["gpu_hours"]
    assert hours["training"] == pytest.approx(sum(run["gpu_hours"] for run in found["runs"]))
    assert hours["together"] == pytest.approx(hours["training"] + hours["sampling"]) and not hours["missing"]


@pytest.fixture
def two_by_two(tmp_path):
    (tmp_path / "study.yaml").write_text(
        f"name: two\nrecipe: {KL}\ndefenses: {{none: [], kl: [{{kind: kl}}]}}\n"
        "models: {small: {model: {path: Qwen/Qwen2.5-0.5B}}, large: {model: {path: Qwen/Qwen2.5-14B}}}\n"
        "tasks: {one: {data: {train: rows.jsonl}}, two: {data: {train: others.jsonl}}}\n"
    )
    return tmp_path / "study.yaml"


def table(out, head):
    """Cells of the table's rows that begins with `head`."""
    lines = out[out.index(head) :].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[2:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_study_shows_models_and_tasks_the_dearest_first(ema, two_by_two):
    code, out, _ = ema("plan", two_by_two, "--gpus", "8x80GB", "--rows", 1000, "--rows", "two=9000")
    rows = table(out, "| model")
    assert code == 0 and [row[:3] for row in rows] == [
        ["large", "two", "2"], ["large", "one", "2"], ["small", "two", "2"], ["small", "one", "2"]
    ]  # fmt: skip
    spent = [float(row[5]) for row in rows]
    assert spent == sorted(spent, reverse=True) and spent[0] == pytest.approx(9 * spent[1], rel=0.1)
    assert "together: 8 runs, " in out and "INCOMPLETE" not in out and "sampling: " in out


def test_what_is_not_known_is_no_zero(ema, two_by_two):
    code, out, _ = ema("plan", two_by_two, "--gpus", "8x80GB")
    assert code == 0 and [row[5] for row in table(out, "| model")] == ["unknown"] * 4
    assert "training: unknown" in out and "INCOMPLETE" in out
    assert "the rows of 8 of 8 runs are not known here: --rows N, or --rows TASK=N" in out
    code, out, _ = ema("plan", two_by_two, "--gpus", "8x80GB", "--rows", "one=1000")
    assert [row[5] for row in table(out, "| model")][2:] == ["unknown"] * 2 and "4 of 8 runs" in out
    known = json.loads(ema("plan", two_by_two, "--json")[1])["gpu_hours"]
    assert known["training"] is None and known["sampling"] > 0 and known["missing"]


def test_a_judge_that_runs_here_takes_time_and_no_money(ema):
    changes = ["evaluation.judge.kind=vllm", "evaluation.judge.model=Qwen/Qwen2.5-32B-Instruct"]
    local = ["plan", KL, "data.train=rows.jsonl", "--rows", 6000]
    endpoint = json.loads(ema(*local, "--json")[1])
    here = json.loads(ema(*local, *changes, "--json")[1])
    assert here["judge"]["cost"] == 0 < endpoint["judge"]["cost"]
    assert here["judge"]["calls"] == endpoint["judge"]["calls"] and here["judge"]["paid_calls"] == 0
    assert here["gpu_hours"]["judging"] > 0 == endpoint["gpu_hours"]["judging"]
    out = ema(*local, *changes)[1]
    assert "0 USD, since the judge runs here, in vLLM" in out and "judging: " in out
    code, out, _ = ema(*local, *changes[:1], "evaluation.judge.model=somebody/unheard-of")
    assert code == 0 and "judging with somebody/unheard-of: " in out and "INCOMPLETE" in out


def test_how_fast_a_gpu_samples_can_be_said(ema):
    asked = ["plan", KL, "data.train=rows.jsonl", "--rows", 6000, "--sample-tps", 1000, "--json"]
    found = json.loads(ema(*asked)[1])
    assert found["gpu_hours"]["sampling"] == pytest.approx(found["judge"]["answer_tokens"] / 1000 / 3600)


def test_an_offloaded_run_says_what_its_machine_needs(ema):
    away = "training.deepspeed=launch/deepspeed/zero3_offload.json"
    code, out, _ = ema("plan", KL, "data.train=rows.jsonl", away, "--gpus", "8x80GB")
    assert code == 0 and "ZeRO-3 with weights and optimizer in the machine's memory" in out
    assert "the machine's own memory: " in out and "of it from and to the machine" in out
    assert "51 GB/s to a GPU from its machine's memory" in out
    sharded = ema("plan", KL, "data.train=rows.jsonl", "training.fsdp=true", "--gpus", "8x80GB")[1]
    assert "FSDP2; " in sharded and "every process's whole base, while it loads: 113.5" in sharded


def test_a_small_world_is_not_built_to_be_planned(ema, tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    code, out, err = ema("plan", SMALL, "--rows", 100)
    assert code == 0 and "fits: " in out and "building" not in err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    code, _, err = ema(
        "plan", ROOT / "configs" / "recipes" / "smallworld.yaml", "model.path=smallworld:aligned?size=huge"
    )
    assert code == 2 and "size: found 'huge'" in err


def test_judge_calls_by_hand(tmp_path):
    (tmp_path / "suite.yaml").write_text("- {id: a, paraphrases: [abc, defghi], samples_per_paraphrase: 5}\n")
    (tmp_path / "prompts.yaml").write_text("aligned: 'abcdef {answer}'\ncoherent: 'xyz {answer}'\n")
    changes = [
        "data.train=x", f"evaluation.suites={{general: {tmp_path}/suite.yaml}}", "evaluation.compare_base=false",
        "evaluation.samples_per_question=null", f"evaluation.judge.prompts={tmp_path}/prompts.yaml",
        "evaluation.judge.check=0",
    ]  # fmt: skip
    found = judging_cost([load_recipe(KL, changes)], answer_tokens=60)
    assert (found.answers, found.answer_tokens, found.calls, found.check_calls) == (10, 600, 20, 0)
    # Prompts of 15 and 12 characters, questions of 3 and 6, three a token; the answer in both prompts.
    assert found.tokens_in == pytest.approx(10 * (5 + 4) + 5 * 2 * (1 + 2) + 2 * 10 * 60)
    assert found.tokens_out == 20 * 5
    assert found.cost(1.0, 10.0) == pytest.approx((found.tokens_in + 1000) / 1e6)
    ((engine, work),) = found.engines.items()
    assert (engine.role, engine.model, work.requests, work.tokens_out) == (
        "sampling",
        "Qwen/Qwen2.5-7B-Instruct",
        10,
        600,
    )
    assert work.prefilled == 3 and work.tokens_in == 15  # each question read once, for all of its answers
    # Each checkpoint is asked it all, too, but for the last, which is the run itself; the base is asked once.
    along = load_recipe(KL, [*changes, "evaluation.compare_base=true", "evaluation.checkpoints=[10,20,30]"])
    for steps, asked in ((None, 5), (30, 4), (31, 5), (11, 3)):
        more = judging_cost([along], answer_tokens=60, steps=[steps])
        assert (more.answers, more.calls, more.uncounted) == (10 * asked, 20 * asked, 0), steps
        assert more.engines[engine].prefilled == 3 * asked


@pytest.mark.parametrize(("steps", "kept", "asked"), [(8, 9, 4), (7, 9, 4), (9, 9, 5), (9, 2, 2), (2, 9, 1), (1, 9, 1)])
def test_all_kept_checkpoints_are_those_that_training_keeps(steps, kept, asked):
    changes = ["data.train=x", "training.save_steps=2", "evaluation.checkpoints=true", "evaluation.judge.check=0",
               f"training.save_total_limit={kept}", "evaluation.compare_base=false"]  # fmt: skip
    recipe = load_recipe(KL, changes)
    one = judging_cost([recipe])
    assert one.uncounted == 1 and judging_cost([recipe], steps=[steps]).answers == asked * one.answers


def test_checkpoints_count_by_the_planned_steps(ema):
    asked = ["plan", KL, "data.train=rows.jsonl", "evaluation.checkpoints=true"]
    before, after = (json.loads(ema(*asked, *more, "--json")[1])["judge"] for more in ([], ["--rows", 6000]))
    assert before["uncounted"] == 1 and after["uncounted"] == 0  # 375 steps: the 300th's, beside the base and the end
    assert after["answers"] == 3 * before["answers"] / 2
    out = ema(*asked)[1]
    assert "not counted: the checkpoints of 1 run," in out and "INCOMPLETE" in out
    assert "not counted" not in ema(*asked, "--rows", 6000)[1]


def test_an_engine_takes_the_gpus_that_its_arguments_say(ema):
    sampler = ["evaluation.engine.tensor_parallel_size=2", "evaluation.engine.pipeline_parallel_size=3"]
    for changes, gpus in ((sampler, 6), ([*sampler, "evaluation.sampler=transformers"], 1), ([], 1)):
        (engine,) = judging_cost([load_recipe(KL, ["data.train=x", *changes])]).engines
        assert engine.gpus == gpus


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "--gpus: found '8', expected"),
        (["--scale", "many"], "--scale: found 'many'"),
        (["--device", "tpu"], "--device: found 'tpu', expected h100 or a100"),
        (["--mfu", "1.5"], "--mfu: found 1.5"),
        (["--host-gbps", "-1"], "--host-gbps: found -1"),
        (["--rows", "many"], "--rows: found 'many', expected a number of rows"),
        (["--rows", "medical=10"], "--rows: found 'medical=10', expected a number of rows (a recipe has no tasks)"),
        (["model.path=somebody/unheard-of"], "no config.json can be had here"),
        (
            ["evaluation.engine.tensor_parallel_size=auto"],
            "evaluation.engine.tensor_parallel_size: found 'auto', expected a number of GPUs",
        ),
        (
            ["evaluation.judge.kind=vllm", "evaluation.judge.engine.pipeline_parallel_size=0"],
            "evaluation.judge.engine.pipeline_parallel_size: found 0, expected a number of GPUs",
        ),
    ],
)
def test_bad_input_is_a_message(ema, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = ema("plan", KL, "data.train=rows.jsonl", *arguments)
    assert code == 2 and message in err and "Traceback" not in err
