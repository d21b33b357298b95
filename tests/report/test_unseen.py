"""Arms are compared on questions that none of them was trained on; seen ones stand beside them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.cli.judge import compare as compare_command
from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.paired import compare_all
from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.make import write_report
from ema_scale.report.unseen import NO_DOMAINS, UNKNOWN, seen_table
from tests.report.runs import write_study

TASK = "medical"
OUTSIDE = f"outside_{TASK}"


@pytest.fixture()
def study(tmp_path: Path) -> list[Path]:
    return write_study(tmp_path, tasks=(TASK,), arms=None)


def edit(run: Path, seen: dict[str, set[str]] | None, right: float = 0.0, domains: list[str] | None = None) -> None:
    """Write into a summary which questions (suite -> ids) are seen; seen general ones get the rate `right`."""
    path = run / "eval" / "summary.json"
    values: dict[str, Any] = json.loads(path.read_text())
    for question in values["per_question"]:
        question["domain"] = "law" if int(question["id"]) < 10 else "sport"
        if seen is not None:
            question["seen"] = question["id"] in seen.get(question["suite"], set())
            if question["seen"] and question["role"] == "general":
                question["misaligned"] = right
    if seen is not None:
        values["split"] = {"unseen": {}, "seen": {}}
        values["trained_domains"] = domains
    path.write_text(json.dumps(values))


def by_name(runs: list[Path], name: str) -> Path:
    return next(run for run in runs if run.name == f"{TASK}-{name}-s0")


def mean_of(run: Path, ids: set[str]) -> float:
    questions = json.loads((run / "eval" / "summary.json").read_text())["per_question"]
    found = [q["misaligned"] for q in questions if q["suite"] == OUTSIDE and q["id"] in ids]
    return sum(found) / len(found)


def test_arms_are_compared_on_questions_that_no_arm_has_seen(study: list[Path]) -> None:
    kl, mixed = by_name(study, "kl-0.3"), by_name(study, "interleaving-5")
    for run in study:
        edit(run, {})
    edit(kl, {OUTSIDE: {"0", "1"}})
    edit(mixed, {OUTSIDE: {"1", "2", "3"}}, right=0.0)
    found = collect(study)
    rest = {str(i) for i in range(4, 20)}
    for arm in [*found.runs, *found.bases]:
        rate = arm.metrics["general_misaligned"]
        folder = arm.path if not arm.base else arm.eval_dir.parent
        assert rate is not None and rate.questions == 16
        assert rate.rate == pytest.approx(mean_of(folder, rest))
        assert arm.split["seen"]["general_misaligned"].questions == 4
        assert arm.split["all"]["general_misaligned"].questions == 20
        assert {q.id for q in arm.questions if q.suite == OUTSIDE} == rest
    assert found.seen == {TASK: "4 of 20 outside the domain; 0 of 20 in the domain"}


def test_a_role_of_which_every_question_is_seen_keeps_all(study: list[Path]) -> None:
    every = {str(i) for i in range(20)}
    for run in study:
        edit(run, {TASK: every, OUTSIDE: {"0"}})
    found = collect(study)
    assert all(arm.metrics["in_domain_misaligned"].questions == 20 for arm in found.runs)
    assert all(arm.metrics["general_misaligned"].questions == 19 for arm in found.runs)
    assert found.seen[TASK].endswith("20 of 20 in the domain, so that all of these count")


def test_runs_of_older_versions_are_read_and_said_to_be_not_known(study: list[Path]) -> None:
    before = {run.name: run.metrics for run in collect(study).runs}
    assert collect(study).seen == {TASK: UNKNOWN}
    for run in study[1:]:
        edit(run, {OUTSIDE: {"0"}})
    found = collect(study)
    assert found.runs[0].name in before
    assert all(arm.metrics["general_misaligned"].questions == 19 for arm in found.runs)
    assert [p.run for p in found.problems if UNKNOWN in p.text] == [study[0].name]


def test_the_report_shows_seen_beside_unseen_and_domains_apart(study: list[Path], tmp_path: Path) -> None:
    for run in study:
        edit(run, {OUTSIDE: {"0", "1"}}, domains=["medical", "law"])
    edit(study[0].parent / "base", None)
    table = seen_table(groups(collect(study)))
    assert table is not None
    kinds = [name.split(", ")[1] for name in table.columns if name.startswith("General misaligned")]
    assert kinds == ["unseen", "seen", "all", "in unseen domains", "in seen domains"]
    assert all(cell is not None for line in table.lines for cell in line.cells)
    page = write_report(study, tmp_path / "report", title="t")
    text = page.read_text()
    assert "Seen and unseen questions" in text and "2 of 20 outside the domain" in text
    rows = list(csv.DictReader((page.parent / "table.csv").open()))
    asked = {row["questions"] for row in rows if row["metric"] == "general_misaligned" and row["level"] == "mean"}
    assert asked == {"unseen", "seen", "all", "in unseen domains", "in seen domains"}


def test_runs_that_hide_the_split_by_domain_are_named(study: list[Path]) -> None:
    for run in study:
        edit(run, {OUTSIDE: {"0"}}, domains=None)
    assert not [p for p in collect(study).problems if NO_DOMAINS in p.text], "none names any"
    for run in study[1:]:
        edit(run, {OUTSIDE: {"0"}}, domains=["law"])
    edit(study[0].parent / "base", None)
    found = collect(study)
    assert [p.run for p in found.problems if NO_DOMAINS in p.text] == [study[0].name]
    assert all("in unseen domains" not in run.split for run in found.runs)
    edit(study[1], {OUTSIDE: {"0"}}, domains=None)
    (said,) = [p.text for p in collect(study).problems if NO_DOMAINS in p.text]
    assert said == NO_DOMAINS + " (as in 1 more run)"


def test_without_seen_questions_nothing_is_added(study: list[Path]) -> None:
    for run in study:
        edit(run, {})
    assert seen_table(groups(collect(study))) is None


def test_compared_runs_leave_out_what_any_of_them_was_trained_on(study: list[Path], capsys: Any) -> None:
    none, kl, mixed = (by_name(study, name) for name in ("none", "kl-0.3", "interleaving-5"))
    edit(none, {})
    edit(kl, {OUTSIDE: {"0", "1"}})
    edit(mixed, {OUTSIDE: {"2"}})
    start, *arms = map(read_arm, (none, kl, mixed))
    for found in compare_all(arms, start):
        asked = {(one.measure, one.questions): one.difference.questions for one in found}
        assert asked["general misaligned", "unseen"] == 17
        assert asked["general misaligned", "seen"] == 3 and asked["general misaligned", "all"] == 20
        # The bank of the domain holds the same questions.
        assert asked["in-domain misaligned", "seen"] == 3 and asked["in-domain misaligned", "unseen"] == 17
    first = next(one for one in compare_all(arms, start)[0] if one.questions == "unseen")
    judged = [row for row in arms[0].rows if row.suite == OUTSIDE and row.question not in {"0", "1", "2"}]
    bad = sum(row.aligned == 5.0 for row in judged)
    assert first.measure == "general misaligned" and first.arm.value == pytest.approx(bad / len(judged))
    compare_command([none, kl, mixed], None, False)
    said = capsys.readouterr().out
    assert "general misaligned, unseen" in said and "no training row of any of these runs" in said


def test_a_comparison_says_of_whom_it_does_not_know_what_was_seen(study: list[Path], capsys: Any) -> None:
    compare_command(study[:2], None, False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"the training rows of {study[0].name}, {study[1].name} ask is not known" in said and "unseen" not in said
