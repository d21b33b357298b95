"""The table that an evaluation ends with."""

from __future__ import annotations

from pathlib import Path

from ema_scale.cli.runs import describe_evaluated
from ema_scale.evaluation.record_types import ChoiceFigures, ChoiceSummary, Mean
from ema_scale.evaluation.records import SUMMARY_FILE, Rate, SuiteSummary, Summary
from ema_scale.evaluation.table import rates_table, work_done

FIGURES = ChoiceFigures(
    bad_likeliest=Rate(0.5, 0.4, 0.6, 10, 10, 0),
    margin_per_token=Mean(0.1, 0.0, 0.2, 10, 10, 0),
    margin=Mean(1, 0, 2, 10, 10, 0),
)
ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "fixtures" / "run_v1"


def summary(**changes: object) -> Summary:
    found = Summary.read(next(RUN.rglob(SUMMARY_FILE)))
    return found.model_copy(update={"adapter": None, **changes})


def test_rates_with_intervals_and_what_counts_in_none() -> None:
    rate = Rate(0.25, 0.2, 0.31, 100, 10, 0)
    none = Rate(None, None, None, 0, 0, 7)
    one = summary(metrics={"general_misaligned": rate, "benign_learned": None}, dropped={}, samples=100)
    two = summary(metrics={"general_misaligned": none, "benign_learned": rate}, dropped={"a": 1, "b": 6}, samples=7)
    lines = rates_table({"base": one, "my run": two}).splitlines()
    assert lines[0].endswith("  benign learned") and "general misaligned" in lines[0]
    assert lines[1].split() == ["base", "25.0", "%", "[20.0,", "31.0]", "not", "asked"]
    assert lines[2].split() == ["my", "run", "no", "score", "25.0", "%", "[20.0,", "31.0]"]
    assert lines[0].index("benign") == lines[1].index("not asked") == lines[2].index("25.0")
    assert lines[4:] == ["my run: 6 of 7 answers in no rate: b", "my run: 1 of 7 answers in no rate: a"]


def test_an_evaluation_says_what_it_took_and_what_comes_next(tmp_path: Path) -> None:
    text = describe_evaluated({"base": summary(seconds=65.0), "run": summary(seconds=65.0)}, tmp_path)
    *_, judged, answers, following = text.splitlines()
    assert judged.endswith("in 0:01:05") and answers.split() == ["answers", str(tmp_path)]
    assert following == f"next     ema report {tmp_path}"
    # The base model of a recipe, which an override sends elsewhere.
    recipe = ROOT / "configs" / "recipes" / "smallworld.yaml"
    told = describe_evaluated({"base": summary()}, recipe, (f"output={tmp_path}", "name=elsewhere"))
    assert f"answers  {tmp_path}/elsewhere" in told


def test_only_judged_answers_count_as_judged() -> None:
    scored = SuiteSummary(role="general", samples=40, likelihoods=ChoiceSummary(raw=FIGURES))
    judged = SuiteSummary(role="general", samples=60)
    both = summary(per_suite={"c": scored, "s": judged}, judge="likelihood, openai:m#1", samples=100, dropped={})
    assert work_done({"a": both}) == [
        "judged   60 answers by openai:m#1",
        "scored   40 written answers by their likelihood",
    ]
    some = both.model_copy(update={"dropped": {"not judged": 5, "aligned: no number": 3}})
    assert work_done({"a": some, "b": both})[0] == "judged   115 answers by openai:m#1"
    only = summary(per_suite={"c": scored}, judge="likelihood", samples=40, dropped={})
    assert work_done({"a": only}) == ["scored   40 written answers by their likelihood"]
    read = summary(per_suite={"s": judged}, judge="none", samples=60, dropped={"no judge was asked for": 60})
    assert work_done({"a": read}) == ["sampled  60 answers, which nobody judged"]
