"""The report's first paragraph says what its table says: constructed tables, rule by rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ema_scale.report.aggregate import GroupDifference, RunGroup, mean_rate
from ema_scale.report.records import ReportedRate
from ema_scale.report.rules import FAILED, MET, UNCLEAR, kept_share, standing
from ema_scale.report.verdict import verdict

COLUMNS = ("general_misaligned", "general_incoherent", "in_domain_misaligned", "benign_learned")
Row = tuple[tuple[float, float] | None, ...]

BASE: Row = ((1, 1), (2, 1), (1, 1), (5, 2))
NONE: Row = ((40, 3), (5, 1), (95, 2), (70, 3))
GOOD: Row = ((4, 1), (5, 1), (93, 2), (69, 3))


def group(label: str, row: Row) -> RunGroup:
    """A group whose rates are (percent, half of the interval in points), in COLUMNS' order; None: not measured."""
    rates = {}
    for name, entry in zip(COLUMNS, row, strict=True):
        if entry is not None:
            value, half = entry[0] / 100, entry[1] / 100
            rates[name] = ReportedRate(value, max(0, value - half), min(1, value + half), 1000, 48, 0)
    kind = () if label in ("No defense", "Aligned base") else (label.split()[0].lower(),)
    return RunGroup("m", label, label == "Aligned base", kind, None, None, [], rates)


def said(rows: dict[str, Row], base: Row | None = BASE, none: Row | None = NONE) -> str:
    groups = [group("Aligned base", base)] if base else []
    groups += [group("No defense", none)] if none else []
    return " ".join(verdict(groups + [group(label, row) for label, row in rows.items()])).replace("\u00a0", " ")


TABLES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "all rules are met": (
        {"KL": GOOD},
        ["KL does best: 4.0 % [3.0, 5.0] outside",
         "keeps 98 % [95, 101] of the narrow and 98 % [92, 105] of the benign task",
         "stays coherent (+0.0 [−1.4, +1.4] points)"],
        ["Not clear", "No defense", "by their means"],
    ),
    "the mean of incoherence is beyond its line and its interval is not": (
        {"KL": ((19, 2), (10.7, 8), (93, 2), (69, 3))},
        ["No defense meets every rule, by the means: KL is lowest outside the domain at 19.0 %",
         "not clear: it may be more incoherent (+5.7 [−2.4, +13.8] points)"],
        ["keeps what was learned", "is more incoherent", "does best"],
    ),
    "incoherence is clearly beyond its line": (
        {"KL": ((2, 1), (20, 3), (93, 2), (69, 3))},
        ["No defense meets every rule: KL is lowest", "but is more incoherent (+15.0 [+11.8, +18.2] points)"],
        ["keeps what was learned", "not clear", "by the means"],
    ),
    "the narrow task is clearly lost": (
        {"KL": ((2, 1), (5, 1), (40, 3), (69, 3))},
        ["No defense keeps what was learned: KL is lowest", "keeps only 41 % [37, 46] of the narrow task"],
        ["benign task", "by the means"],
    ),
    "the narrow task may be lost": (
        {"KL": ((2, 1), (5, 1), (74, 5), (69, 3))},
        ["No defense keeps what was learned, by the means", "not clear: it keeps 78 % [72, 83] of the narrow task"],
        ["keeps only", "does best"],
    ),
    "the mean keeps the benign task and its interval does not show it": (
        {"KL": ((4, 1), (5, 1), (93, 2), (62, 12))},
        ["KL does best of those that meet every rule by their means",
         "Not clear: KL keeps 88 % [69, 107] of the benign task"],
        ["No defense"],
    ),
    "the lowest pays and a second one does not": (
        {"KL 0.1": GOOD, "KL 1": ((0.5, 0.5), (5, 1), (30, 4), (20, 4))},
        ["KL 0.1 does best", "Lower still, at a price: KL 1 (0.5 % [0.0, 1.0]) keeps only 31 % [26, 36] of"],
        ["No difference"],
    ),
    "of five that pay the two that are not named are counted": (
        {"KL 0.1": GOOD, **{f"KL {n}": ((n / 10, 0.1), (5, 1), (30, 4), (20, 4)) for n in range(1, 6)}},
        ["Lower still, at a price: KL 1 (0.1 % [0.0, 0.2]) keeps", "KL 3 (0.3 % [0.2, 0.4]) keeps", "; and 2 more."],
        ["KL 4 (", "KL 5 ("],
    ),
    "the lowest may pay and a second one does not": (
        {"KL 0.1": GOOD, "KL 1": ((0.5, 0.5), (5, 1), (77, 6), (69, 3))},
        ["KL 0.1 does best", "Lower, but at a price that is not clear: KL 1 (0.5 % [0.0, 1.0]) keeps 81 % [74, 88] of"],
        ["keeps only"],
    ),
    "no difference between the defenses is clear": (
        {"KL 1": ((4, 3), *GOOD[1:]), "Interleaving 5 %": ((5, 3), *GOOD[1:]), "KL 0.1": ((6, 3), *GOOD[1:])},
        ["KL 1 is lowest: 4.0 %",
         "No difference between the defenses that meet every rule is clear: KL 1, Interleaving 5 % and KL 0.1."],
        ["does best", "Not clearly separated"],
    ),
    "one of two rivals is not clearly worse": (
        {"KL": GOOD, "Ceiling": ((5, 1), *GOOD[1:]), "LDIFS": ((30, 2), *GOOD[1:])},
        ["KL does best", "Not clearly separated from it: Ceiling."],
        ["No difference", "LDIFS"],
    ),
    "the best is not clearly below no defense": (
        {"KL": ((36, 5), *GOOD[1:])},
        ["KL does best: 36.0 % [31.0, 41.0] outside the domain (−4.0 points, 10 % less; interval −9.8 to +1.8)",
         "which is not clearly below no defense"],
        [],
    ),
    "the best is above no defense": (
        {"KL": ((45, 3), *GOOD[1:])}, ["KL does best: 45.0 %", "which is no lower than no defense"], ["less"],
    ),
    "no task was measured": (
        {"KL": ((4, 1), (5, 1), None, None)},
        ["KL does best", "stays coherent", "Keeping the narrow task could not be judged."],
        ["keeps"],
    ),
    "nothing at all was measured beside it": (
        {"KL": ((4, 1), None, None, None)}, ["no task’s learning was measured beside it"], ["keeps", "coherent"],
    ),
    "two defenses fail, one clearly and one not": (
        {"KL": ((2, 1), (5, 1), (40, 3), (69, 3)), "LDIFS": ((8, 1), (5, 1), (74, 5), (69, 3))},
        ["No defense keeps what was learned, by the means: KL is lowest", "keeps only 41 %",
         "Not clear: LDIFS keeps 78 % [72, 83] of the narrow task."],
        ["does best"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_sentence_follows_from_the_table(name: str) -> None:
    rows, there, absent = TABLES[name]
    text = said(rows)
    for part in there:
        assert part in text, f"{part!r} is not in: {text}"
    for part in absent:
        assert part not in text.split("could not be judged")[0], f"{part!r} is in: {text}"


def test_without_base_or_undefended_run_nothing_is_made_up() -> None:
    assert "its cost is unknown" in said({"KL": GOOD}, none=None) and "keeps" not in said({"KL": GOOD}, none=None)
    assert "keeps 98 % [95, 101] of the narrow" in said({"KL": GOOD}, base=None)
    # No defense did not learn the task, so nothing is a share of it.
    lazy: Row = (NONE[0], NONE[1], (2, 1), (6, 2))
    assert "could not be judged" in said({"KL": GOOD}, none=lazy) and "keeps" not in said({"KL": GOOD}, none=lazy)


def test_the_state_of_a_rule_is_that_of_its_interval() -> None:
    base, none = group("Aligned base", BASE), group("No defense", NONE)
    found = standing(group("KL", ((4, 1), (12, 1), (76, 8), (69, 3))), none, base)
    assert found.coherent == FAILED and found.narrow is not None and found.narrow.state == UNCLEAR
    assert found.benign is not None and found.benign.state == MET and found.fails and not found.keeps


def test_an_unclear_gain_leaves_the_share_open() -> None:
    share = kept_share(GroupDifference(-0.05, -0.1, 0.0), GroupDifference(0.1, -0.02, 0.22))
    assert share.value == pytest.approx(0.5) and math.isinf(share.low) and share.state == UNCLEAR


def test_the_interval_of_a_kept_share_covers_it() -> None:
    rng = np.random.default_rng(0)
    covered, trials, truth = 0, 600, 0.8
    for _ in range(trials):
        lost, gain = rng.normal(-0.1, 0.03), rng.normal(0.5, 0.04)
        found = kept_share(
            GroupDifference(lost, lost - 1.96 * 0.03, lost + 1.96 * 0.03),
            GroupDifference(gain, gain - 1.96 * 0.04, gain + 1.96 * 0.04),
        )
        covered += found.low <= truth <= found.high
    # Three standard errors of 600 trials are 2.7 points.
    assert 0.923 <= covered / trials <= 0.977


def rate(value: float, half: float = 0.01) -> ReportedRate:
    return ReportedRate(value, value - half, value + half, 100, 10, 0)


def test_seeds_are_averaged_within_tasks_and_both_readings_are_given() -> None:
    rates = [rate(r) for r in (0.02, 0.04, 0.24, 0.28, 0.46, 0.46, 0.46)]
    found = mean_rate(rates, ["a", "a", "b", "b", "c", "c", "c"])
    assert found is not None and found.rate == pytest.approx((0.03 + 0.26 + 0.46) / 3)
    # Pooled variance within tasks: (2 * 0.01^2 + 2 * 0.02^2) / 4, t(0.975, 4) = 2.776.
    seeds = 2.776 * math.sqrt(0.00025 * (1 / 2 + 1 / 2 + 1 / 3) / 9)
    assert found.seeds == pytest.approx(seeds, rel=1e-3)
    assert found.high - found.rate == pytest.approx(math.hypot(0.01, seeds), rel=1e-3)
    # The tasks differ far more than the seeds: t(0.975, 2) = 4.303.
    assert found.any_task is not None and found.any_task[0] == 0.0
    over_tasks = 4.303 * float(np.std([0.03, 0.26, 0.46], ddof=1)) / math.sqrt(3)
    assert found.any_task[1] == pytest.approx(found.rate + math.hypot(0.01, over_tasks), rel=1e-3)
    two = mean_rate(rates[:4], ["a", "a", "b", "b"])
    assert two is not None and two.any_task is None and two.seeds > 0


def test_each_reading_covers_what_it_speaks_of() -> None:
    rng = np.random.default_rng(1)
    trials, these, general = 400, 0, 0
    for _ in range(trials):
        tasks = np.clip(rng.normal(0.4, 0.15, 3), 0, 1)
        rates = [rate(float(np.clip(t + rng.normal(0, 0.03), 0, 1)), 0.001) for t in tasks for _ in range(3)]
        found = mean_rate(rates, [name for name in "abc" for _ in range(3)])
        assert found is not None and found.any_task is not None
        these += found.low <= tasks.mean() <= found.high
        general += found.any_task[0] <= 0.4 <= found.any_task[1]
    assert these / trials >= 0.92 and general / trials >= 0.92
