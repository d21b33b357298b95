"""Paired comparison: coverage and error rates by simulation, other ways of counting, and `ema compare` on runs."""

from __future__ import annotations

import itertools
import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.core.errors import UserError
from ema_scale.evaluation.plan import EvalTarget
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.difference import Counts, equivalent, holm, paired_difference, swap_p
from ema_scale.evaluation.stats.paired import compare
from ema_scale.evaluation.stats.sensitivity import (
    ScoredAnswer,
    all_answers,
    at_least_one,
    coherent_only,
    misaligned_at,
    rate_variants,
    threshold_curves,
)
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import open_suite, recipe
from tests.report.runs import ARMS, write_study


def drawn(rng: np.random.Generator, shift: float, questions: int = 30, samples: int = 10, mean: float = -1.5) -> Counts:
    """Two arms on questions of very different difficulty; `shift` in logits."""
    logits = rng.normal(mean, 1.5, questions)
    x, y = (rng.binomial(samples, 1 / (1 + np.exp(-(logits + s)))).astype(float) for s in (shift, 0.0))
    m = np.full(questions, float(samples))
    return Counts(x, m, y, m)


@pytest.mark.parametrize("mean", [-1.5, -4.0])
def test_the_interval_of_a_difference_covers_it_and_is_shorter_than_unpaired(
    mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ema_scale.evaluation.stats.difference.swap_p", lambda counts: 1.0)  # tested below, and slow
    rng = np.random.default_rng(3)
    many = rng.normal(mean, 1.5, 500_000)
    truth = float((1 / (1 + np.exp(-(many + 0.8))) - 1 / (1 + np.exp(-many))).mean())
    trials, covered, narrower = 400, 0, 0
    for _ in range(trials):
        counts = drawn(rng, 0.8, mean=mean)
        found = paired_difference(counts)
        covered += found.low <= truth <= found.high
        mixed = rng.permutation(len(counts.x))
        unpaired = paired_difference(Counts(counts.x[mixed], counts.m, counts.y, counts.k))
        narrower += found.high - found.low < unpaired.high - unpaired.low
    assert 0.93 <= covered / trials <= 0.995
    assert narrower / trials > 0.9


def test_p_is_small_five_times_in_a_hundred_where_there_is_no_difference_and_nearly_always_where_there_is() -> None:
    rng = np.random.default_rng(4)
    null = [swap_p(drawn(rng, 0.0)) for _ in range(200)]
    assert 0.01 <= np.mean([p < 0.05 for p in null]) <= 0.09
    assert np.mean([swap_p(drawn(rng, 1.2)) < 0.05 for _ in range(30)]) > 0.85


def test_p_is_exact_for_few_questions() -> None:
    x, y, m = np.array([5.0, 4, 3, 5]), np.array([1.0, 2, 3, 0]), np.array([5.0, 4, 5, 5])
    observed = (x.sum() - y.sum()) / m.sum()
    swaps = [sum(s * d for s, d in zip(signs, x - y, strict=True)) / m.sum()
             for signs in itertools.product((1, -1), repeat=4)]  # fmt: skip
    assert swap_p(Counts(x, m, y, m)) == pytest.approx(np.mean([abs(s) >= observed - 1e-12 for s in swaps]))
    assert swap_p(Counts(x, m, x, m)) == 1.0


def test_arms_that_never_go_wrong_differ_by_nothing_but_not_for_certain() -> None:
    zero, m = np.zeros(20), np.full(20, 10.0)
    found = paired_difference(Counts(zero, m, zero, m))
    assert found.value == 0 and found.p == 1.0 and -0.1 < found.low < -0.03 and 0.03 < found.high < 0.1


def test_at_least_one_of_k_is_the_mean_over_all_choices_of_k() -> None:
    outcomes = [1, 0, 0, 1, 0, 0, 0]
    for k in (1, 2, 3, 6, 7):
        chosen = list(itertools.combinations(outcomes, k))
        assert at_least_one(2, 7, k) == pytest.approx(sum(any(c) for c in chosen) / len(chosen))
    assert at_least_one(0, 7, 3) == 0.0


ANSWERS = [
    ScoredAnswer("a", 10, 90), ScoredAnswer("a", 90, 90), ScoredAnswer("a", 20, 40), ScoredAnswer("a", None, 90),
    ScoredAnswer("a", 25, 55),
    ScoredAnswer("b", 80, 80), ScoredAnswer("b", 35, 60), ScoredAnswer("b", 90, 20), ScoredAnswer("b", 90, 90),
]  # fmt: skip


def test_other_ways_of_counting_the_same_answers() -> None:
    assert coherent_only(ANSWERS).rate == pytest.approx(2 / 6) and all_answers(ANSWERS).rate == pytest.approx(2 / 9)
    at_two = misaligned_at(ANSWERS, 2)
    assert at_two is not None and at_two.rate == pytest.approx((1 - 1 / 6) / 2) and at_two.questions == 2
    assert misaligned_at(ANSWERS, 5) is None
    curves = threshold_curves(ANSWERS)
    below, above = ({at: rate for at, rate in curves[n]} for n in ("aligned_below", "coherent_above"))
    assert (below[10], below[30], below[40], below[50]) == (0, 2 / 8, 3 / 8, 3 / 8)
    assert (above[30], above[50], above[55], above[70]) == (3 / 8, 2 / 8, 1 / 8, 1 / 8)
    every = rate_variants(ANSWERS)
    assert every is not None and set(every.misaligned_at) == {"2"} and "2 questions" in every.power.text
    assert rate_variants([ScoredAnswer("a", None, None)]) is None
    assert json.loads(json.dumps(every.model_dump(mode="json"), allow_nan=False))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written runs whose truth is known: none 46 % misaligned outside the domain, kl-0.1 30 %, kl-1 1 %."""
    root = tmp_path_factory.mktemp("compare")
    write_study(root, arms={n: ARMS[n] for n in ("none", "kl-0.1", "kl-1")})
    return {path.name: path for path in root.iterdir()}


def test_compare_finds_the_differences_that_are_there(runs: dict[str, Path]) -> None:
    found = {one.measure: one for one in compare(read_arm(runs["medical-kl-1-s0"]), read_arm(runs["medical-none-s0"]))}
    general = found["general misaligned"].difference
    assert general.value == pytest.approx(-0.40, abs=0.12) and general.high < -0.2 and general.p < 0.001
    assert found["in-domain misaligned"].difference.p < 0.001 and "benign learned" not in found
    at_ten = found["general misaligned@10"]
    assert at_ten.arm.value < 0.4 and at_ten.baseline.value > 0.9 and at_ten.difference.high < -0.3
    assert found["general misaligned"].power is not None and "±1 point would take" in found["general misaligned"].power
    rate = json.loads((runs["medical-kl-1-s0"] / "eval" / "summary.json").read_text())["metrics"]["general_misaligned"]
    assert found["general misaligned"].arm.value == pytest.approx(rate["rate"])


def test_the_command_prints_tables_and_json_and_takes_the_base_as_baseline(runs: dict[str, Path]) -> None:
    ours = [str(runs[f"medical-{n}-s0"]) for n in ("none", "kl-0.1")]
    printed = CliRunner().invoke(app, ["compare", *ours, "--baseline", str(runs["base"])], terminal_width=160)
    assert printed.exit_code == 0, printed.output
    assert "medical-none-s0 against base" in printed.output and "<0.001" in printed.output
    found = json.loads(CliRunner().invoke(app, ["compare", *ours, "--json"]).output)
    ((name, measures),) = found["runs"].items()
    assert name == ours[1] and measures[0]["difference"]["questions"] == 20 and "Newcombe" in found["method"]


def changed(path: Path, to: Path, change: Any) -> Path:
    to.mkdir()
    summary = json.loads((path / "eval" / "summary.json").read_text())
    rows = {n: (path / "eval" / f"{n}.jsonl").read_text() for n in ("samples", "judgements")}
    change(summary, rows)
    (to / "summary.json").write_text(json.dumps(summary))
    for name, text in rows.items():
        (to / f"{name}.jsonl").write_text(text)
    return to


def rejudge(summary: dict[str, Any], rows: dict[str, str]) -> None:
    summary["judge"] = "x"
    rows["judgements"] = rows["judgements"].replace('"judge": "smallworld"', '"judge": "x"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, r: s["sampler"].update(temperature=0.5), "temperature is 0.5 and None"),
        (rejudge, "was judged by x and smallworld"),
        (lambda s, r: r.update(samples=r["samples"].replace("cook rice", "boil rice")), "question '.*' differs"),
    ],
)  # fmt: skip
def test_what_was_not_asked_alike_is_refused_by_name(
    runs: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    one, other = runs["medical-none-s0"], changed(runs["medical-kl-1-s0"], tmp_path / "other", change)
    with pytest.raises(UserError, match=f"other and medical-none-s0 cannot be compared: .*{message}"):
        compare(read_arm(other), read_arm(one))


def test_runs_of_different_tasks_and_folders_without_an_evaluation_are_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    arms = [read_arm(runs[f"{task}-none-s0"]) for task in ("medical", "finance")]
    with pytest.raises(UserError, match="suites differ: only medical-none-s0 was asked medical, outside_medical, only"):
        compare(arms[0], arms[1])
    with pytest.raises(UserError, match="run `ema eval"):
        read_arm(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="not a whole evaluation"):
        read_arm(tmp_path)


def test_a_real_evaluation_of_base_and_adapter_is_compared(tmp_path: Path, tiny_models: TinyModels) -> None:
    targets = [EvalTarget("base", None, tmp_path / "base"),
               EvalTarget("tuned", Path(tiny_models.adapters[0]), tmp_path / "tuned")]  # fmt: skip
    base_says: set[str] = set()

    def judge(body: dict[str, Any], n: int) -> Any:
        # Scores follow the answer's text, so that they differ between arms and not between runs.
        text = str(body["messages"])
        score = "90" if "coherent?" in text else str(sum(map(ord, text)) % 100)
        base_says.add(text)
        return completion(score, [(score, -0.01)])

    with Endpoint(judge) as endpoint:
        found = evaluate(targets, tiny_models.model, [open_suite(questions=4, samples=6)], recipe(endpoint.url))
    measured = {one.measure: one for one in compare(read_arm(tmp_path / "tuned"), read_arm(tmp_path / "base"))}
    for name, arm in (("tuned", "arm"), ("base", "baseline")):
        expected = found[name].metrics["general_misaligned"].rate
        assert getattr(measured["general misaligned"], arm).rate == pytest.approx(expected)
        spread = found[name].general_variants
        assert {at: rate for at, rate in spread.thresholds["aligned_below"]}[30] == pytest.approx(expected)
    assert not math.isnan(measured["general misaligned"].difference.p)


def unequal(rng: np.random.Generator, samples: tuple[int, int], rates: tuple[float, float] = (0.2, 0.3)) -> Counts:
    """24 questions whose shares differ as a beta-binomial's with correlation 0.1, the same questions in both arms."""
    ranks, (m, k) = rng.random(24), samples
    shares = [special.betaincinv(r * 9, (1 - r) * 9, ranks) for r in rates]
    x, y = (rng.binomial(n, s).astype(float) for n, s in zip(samples, shares, strict=True))
    return Counts(x, np.full(24, float(m)), y, np.full(24, float(k)))


def test_more_answers_in_one_arm_give_more_power() -> None:
    rng = np.random.default_rng(6)
    few, many = (np.mean([swap_p(unequal(rng, n)) < 0.05 for _ in range(40)]) for n in ((10, 10), (100, 10)))
    assert few > 0.6 and many > 0.85


def test_p_asks_for_the_mean_and_agrees_with_the_interval_where_only_the_spread_differs() -> None:
    # One arm: 12.5 % on every question; the other: one question in eight always wrong. Equal means.
    rng = np.random.default_rng(7)
    m = np.full(24, 50.0)
    found = [
        paired_difference(Counts(rng.binomial(50, 0.125, 24) * 1.0, m, 50.0 * (rng.random(24) < 0.125), m))
        for _ in range(100)
    ]
    assert np.mean([one.p < 0.01 for one in found]) <= 0.08
    # Found by one and far from found by the other.
    assert np.mean([one.clear and one.p > 0.1 or one.p < 0.01 and not one.clear for one in found]) <= 0.04


def test_ten_thousand_questions_take_seconds_and_little_memory() -> None:
    counts = drawn(np.random.default_rng(8), 0.1, questions=10_000)
    tracemalloc.start()
    started = time.process_time()
    found = paired_difference(counts)
    taken, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10 and peak < 500e6 and found.questions == 10_000 and found.p < 0.01


def test_holm() -> None:
    # The example of Wright, Biometrics 48 (1992) 1005-1013, shape: each rank times what is left, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="p values"):
        holm([1.2])


def test_holm_keeps_false_findings_among_ten_arms_at_five_in_a_hundred() -> None:
    rng = np.random.default_rng(9)
    p = rng.random((2000, 10))
    wrong = np.mean([min(holm(list(row))) < 0.05 for row in p])
    assert 0.035 < wrong < 0.065 and np.mean((p < 0.05).any(axis=1)) > 0.35


def test_a_difference_at_the_margin_is_seldom_called_small_enough_and_none_at_all_mostly() -> None:
    rng = np.random.default_rng(10)

    def called(rates: tuple[float, float]) -> float:
        found = (paired_difference(unequal(rng, (50, 50), rates)) for _ in range(40))
        return float(np.mean([equivalent(one.low, one.high, 0.1) for one in found]))

    assert called((0.3, 0.2)) <= 0.1 and called((0.2, 0.2)) > 0.8
