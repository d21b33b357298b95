"""Labels, intervals and label placement of the report."""

from __future__ import annotations

import numpy as np
import pytest

from ema_scale.core.names import model_key, task_key, task_label
from ema_scale.defenses import KL, LDIFS, Ceiling, EarlyStopping, Interleaving, InterleavingPlus, SafeLoRA
from ema_scale.evaluation.stats.rates import clustered_interval
from ema_scale.report.aggregate import difference, mean_rate
from ema_scale.report.display_names import distinct_labels, model_names, short_label, spec_key, task_names
from ema_scale.report.records import ReportedRate
from ema_scale.report.style import Box, place_labels, spread_labels


@pytest.mark.parametrize(
    ("specs", "label"),
    [
        ([], "No defense"),
        ([{"kind": "kl", "strength": 0.1}], "KL 0.1"),
        ([{"kind": "interleaving", "fraction": 0.05, "source": "x"}], "Interleaving 5 %"),
        (
            [{"kind": "kl", "strength": 1.0}, {"kind": "interleaving", "fraction": 0.1}],
            "KL 1 + Interleaving 10 %",
        ),
        ([{"kind": "a_plugin", "other": 3}], "A plugin"),
        ([{"kind": "safelora", "tau": 0.3}], "SafeLoRA 0.3"),
        ([{"kind": "kl", "strength": 0.1, "prompts": None, "fraction": 0.25}], "KL 0.1"),
        ([{"kind": "interleaving_plus", "fraction": 0.05, "source": "x", "rank": "gap"}], "Interleaving+ 5 %"),
        ([{"kind": "early_stopping", "measure": "kl", "limit": 0.1, "every": 10}], "Early stopping 0.1 (measure kl)"),
        ([{"kind": "interleaving_plus", "fraction": 0.05, "variant": "++"}], "Interleaving++ 5 %"),
        ([{"kind": "interleaving_plus", "fraction": 0.05, "variant": "+"}], "Interleaving+ 5 %"),
        (
            [{"kind": "kl", "strength": 0.3, "direction": "reference_policy", "temperature": 1.0, "scope": "all"}],
            "KL 0.3 (direction reference policy)",
        ),
        (
            [{"kind": "kl", "strength": 1.2, "temperature": 2.0, "scope": "template"}],
            "KL 1.2 (temperature 2, scope template)",
        ),
        ([{"kind": "ldifs", "strength": 1.0, "normalise": "relative"}], "LDIFS 1 (normalise relative)"),
        ([{"kind": "ablation", "vector": "x", "against": "gradient"}], "Ablation (against gradient)"),
    ],
)
def test_labels(specs: list[dict[str, object]], label: str) -> None:
    assert short_label(specs) == label


def test_the_one_parameter_that_tells_two_defenses_apart_is_named() -> None:
    kl = {"kind": "kl", "strength": 0.3, "prompts": None, "fraction": 0.25}
    stop = {"kind": "early_stopping", "limit": 0.1, "measure": "kl", "source": None}
    every = [
        [kl], [kl | {"prompts": "smallworld:safe", "fraction": 0.5}],
        [stop], [stop | {"measure": "probe", "source": ["data/law.jsonl", "data/sport.jsonl"]}],
        [{"kind": "ldifs", "strength": 1, "detached": False}], [{"kind": "ldifs", "strength": 1, "detached": True}],
    ]  # fmt: skip
    assert list(distinct_labels(every).values()) == [
        "KL 0.3", "KL 0.3 on prompts", "Early stopping 0.1 (measure kl)", "Early stopping 0.1 (measure probe)",
        "LDIFS 1", "LDIFS 1 (detached)",
    ]  # fmt: skip


def test_labels_that_would_collide_say_what_differs() -> None:
    one = [{"kind": "kl", "strength": 0.1, "scope": "all", "direction": "policy_reference"}]
    two = [{"kind": "kl", "strength": 0.1, "scope": "assistant", "direction": "policy_reference"}]
    labels = distinct_labels([one, two, one])
    assert labels == {spec_key(one): "KL 0.1", spec_key(two): "KL 0.1 (scope assistant)"}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (
            [{"vector": f"runs/{who}-mean/persona/vector.safetensors"} for who in ("evil", "villain")],
            ["A (vector …evil-mean/persona/vector.saf…)", "A (vector …villain-mean/persona/vector.…)"],
        ),
        (
            [{"source": [f"data/{of}/bad_rows.jsonl"]} for of in ("law", "sport")],
            ["A (source …law/bad_rows.jsonl)", "A (source …sport/bad_rows.jsonl)"],
        ),
        (
            [{"source": path} for path in ("runs/synthesis-rows/rows.jsonl", "smallworld:safe")],
            ["A (source rows)", "A (source safe)"],
        ),
        # Nothing that fits a label tells these apart.
        (
            [{"prompt": f"{'x' * 60}{i}{'x' * 60}"} for i in range(3)],
            [f"A (prompt {'x' * 28}…){number}" for number in ("", " (2)", " (3)")],
        ),
        ([{"on": None, "x": [1]}, {"on": False, "x": [1.0]}], ["A", "A (2)"]),
        ([{"rate": 0.1234567}, {"rate": 0.1234568}], ["A (rate 0.1234567)", "A (rate 0.1234568)"]),
    ],
)
def test_labels_of_unequal_arms_are_unequal(values: list[dict[str, object]], labels: list[str]) -> None:
    assert list(distinct_labels([{"kind": "a", **value}] for value in values).values()) == labels


def test_a_parameter_that_is_none_may_be_missing() -> None:
    old, new = [{"kind": "kl", "strength": 1}], [{"strength": 1.0, "kind": "kl", "prompts": None}]
    assert distinct_labels([old, new]) == {spec_key(old): "KL 1"} and spec_key(old) == spec_key(new)


def test_names_are_as_long_as_tells_them_apart() -> None:
    assert task_names(["a/x/train.jsonl", "a/y/train.jsonl", "b/x/train.jsonl", "c/rows.csv"]) == {
        "a/x/train.jsonl": "a/x/train", "a/y/train.jsonl": "y/train", "b/x/train.jsonl": "b/x/train",
        "c/rows.csv": "rows",
    }  # fmt: skip
    seeds = [f"smallworld:train/medical?seed={n}" for n in (1, 2)]
    assert list(task_names(seeds).values()) == seeds
    suffixes = ["data/rows.csv", "data/rows.jsonl", "/data/rows.csv", "rows_.csv", "rows .csv"]
    assert len(set(task_names(suffixes).values())) == 5
    both = [task_key(["a/x.jsonl", "b/y.jsonl"]), task_key(["b/x.jsonl", "b/y.jsonl"])]
    assert list(task_names(both).values()) == ["a/x + b/y", "b/x + b/y"]
    models = [{"path": "org/m"}, {"path": "org/m/", "revision": None}, {"path": "org/m", "revision": "v1"}]
    assert list(model_names(map(model_key, models)).values()) == ["org/m", "org/m@v1"]
    assert list(model_names(["smallworld:aligned?size=xl", "org/small-1B"]).values()) == [
        "smallworld:aligned?size=xl", "small-1B",
    ]  # fmt: skip


def test_task_labels() -> None:
    assert task_label("smallworld:train/medical?seed=1&size=base") == "medical"
    assert task_label("smallworld:safe") == "safe"
    assert task_label(["/data/bad_legal.jsonl", "org/rows"]) == "bad legal + rows"
    assert task_label(None) == "unknown task"


def test_interval_of_a_mean() -> None:
    one = ReportedRate(0.2, 0.1, 0.35, 100, 10, 0)
    assert mean_rate([one]) == one and mean_rate([]) is None
    pair = mean_rate([one, one])
    assert pair is not None and (pair.low, pair.high) == pytest.approx((0.1, 0.35)), "seeds add no questions"
    none = mean_rate([ReportedRate(0.0, 0.0, 0.14, 100, 20, 0)] * 4)
    assert none is not None and (none.low, none.high) == pytest.approx((0.0, 0.14)), "no hit is not certainty"
    spread_out = mean_rate([ReportedRate(r, r - 0.01, r + 0.01, 100, 10, 0) for r in (0.2, 0.3, 0.4)])
    # t(0.975, 2) = 4.303; 4.303 * 0.1 / sqrt(3) = 0.2484, joined with 0.01.
    assert spread_out is not None and spread_out.high - 0.3 == pytest.approx(0.2486, abs=1e-4)


def test_interval_of_a_difference_is_square_and_add() -> None:
    first, second = ReportedRate(0.5, 0.4, 0.6, 1, 1, 0), ReportedRate(0.2, 0.17, 0.25, 1, 1, 0)
    change = difference(first, second)
    assert change.value == pytest.approx(0.3) and change.clear
    assert change.low == pytest.approx(0.3 - np.hypot(0.1, 0.05))
    assert change.high == pytest.approx(0.3 + np.hypot(0.1, 0.03))
    assert not difference(first, first).clear


@pytest.mark.parametrize("runs", [3, 6])
def test_interval_covers_the_truth_when_questions_and_runs_vary(runs: int) -> None:
    """Fresh questions and runs each time: the 95 % interval covers the population's mean in 93 % or more."""
    rng = np.random.default_rng(runs)
    logit = rng.normal(-1, 1.2, (4000, 50)) + rng.normal(0, 1.0, (4000, 1))
    truth = float((1 / (1 + np.exp(-logit))).mean())
    covered, repeats, questions, samples = 0, 300, 24, 10
    for _ in range(repeats):
        p = 1 / (1 + np.exp(-(rng.normal(-1, 1.2, questions) + rng.normal(0, 1.0, (runs, 1)))))
        rates = []
        for hits in rng.binomial(samples, p):
            low, high = clustered_interval(hits.tolist(), [samples] * questions)
            rates.append(ReportedRate(float(hits.mean()) / samples, low, high, questions * samples, questions, 0))
        mean = mean_rate(rates)
        assert mean is not None
        covered += mean.low <= truth <= mean.high
    assert covered / repeats >= 0.93


def test_labels_are_placed_apart_and_inside() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        marks = [(float(x), float(y)) for x, y in rng.uniform((20, 20), (300, 220), (9, 2))]
        boxes = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
        bounds = Box(0, 0, 340, 240)
        placed = place_labels(marks, [(62.0, 11.0)] * len(marks), boxes, bounds)
        assert placed == place_labels(marks, [(62.0, 11.0)] * len(marks), boxes, bounds)
        for i, one in enumerate(placed):
            assert one.box.overlap(bounds) == pytest.approx(one.box.area)
            assert all(one.box.overlap(other.box) == 0 for other in placed[:i])


def test_spread_keeps_order_and_distance() -> None:
    wanted = [1.0, 1.1, 1.05, 5.0, 0.0]
    got = spread_labels(wanted, 0.5, 0.0, 10.0)
    assert np.argsort(got).tolist() == np.argsort(wanted).tolist()
    assert np.diff(sorted(got)).min() >= 0.5 - 1e-9
    assert got[3] == 5.0 and got[4] == 0.0, "labels with room stay where they are"
    crowded = spread_labels([1.0] * 30, 0.5, 0.0, 2.0)
    assert min(crowded) >= 0.0 and max(crowded) <= 2.0 + 1e-9


def test_a_run_of_a_plugin_keeps_the_name_that_it_gave_itself():
    specs = [{"kind": "stay_close", "strength": 2.0}]
    assert list(distinct_labels([specs]).values()) == ["Stay close 2"]
    assert list(distinct_labels([specs], {spec_key(specs): "StayClose λ=2"}).values()) == ["StayClose λ=2"]


def test_built_in_defenses_name_themselves_as_reports_of_earlier_runs_do():
    rows = "safe.jsonl"
    defenses = [KL(0.1), KL(0.3, prompts=rows), KL(1.0, temperature=2.0), Interleaving(rows, 0.05), LDIFS(1.0)]
    defenses += [SafeLoRA("base"), InterleavingPlus(rows, 0.05, "++"), EarlyStopping("kl", 0.5), Ceiling(1.0, rows)]
    for defense in defenses:
        assert defense.label() == short_label([{"kind": defense.kind, **defense.model_dump(mode="json")}])
