"""What version 0.1 wrote before records had types (schema 1) is read: tests/fixtures/run_v1 is such a run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.judging.rejudge import eval_folders, rejudge
from ema_scale.evaluation.plan import read_manifest, stored_groups
from ema_scale.evaluation.records import Check, Judgement, Manifest, Sample, Summary, read_rows
from ema_scale.evaluation.stats.arms import read_arm
from ema_scale.evaluation.stats.paired import check_comparable, compare
from ema_scale.evaluation.store import Store
from ema_scale.report.collect import collect

RUN = Path(__file__).resolve().parents[1] / "fixtures/run_v1"
FOLDERS = [RUN / "base/eval", RUN / "eval"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "kl"))


@pytest.mark.parametrize("folder", FOLDERS, ids=["base", "run"])
def test_every_record_of_schema_1_is_read_whole_and_written_as_it_was(folder: Path) -> None:
    for kind, name in ((Summary, "summary.json"), (Manifest, "asked.json")):
        values = json.loads((folder / name).read_text())
        written = json.loads(json.dumps(kind.read(folder / name).to_json()))
        assert written == values | {"schema": kind.VERSION}
    samples, judgements = read_rows(folder)
    assert [row.to_row() for row in samples] == read_jsonl(folder / "samples.jsonl") and len(samples) == 20
    assert [row.to_row() for row in judgements] == read_jsonl(folder / "judgements.jsonl")
    assert {row.judge.partition(":")[0] for row in judgements} == {"openai", "exact_match"}
    assert any(row.raw for row in judgements)
    summary = Summary.read(folder / "summary.json")
    assert summary.schema_version == 1 and summary.samples == 20 and [c.name for c in summary.conditions] == ["evil"]
    assert (summary.gate is None) == (summary.adapter is not None) == (folder.parent == RUN)


def test_the_check_of_a_judge_is_read_and_written_as_it_was() -> None:
    check = Check.read(RUN / "judge_check/check.json")
    values = check.to_json()
    assert values.pop("schema") == 1  # the first files had no version
    assert json.loads(json.dumps(values)) == json.loads((RUN / "judge_check/check.json").read_text())
    (quality,) = check.judges.values()
    assert quality.judged == quality.expected == 104 and quality.labels.kappa is not None


def test_the_report_and_the_comparison_read_the_run(run: Path) -> None:
    found = collect([run])
    assert [r.name for r in found.runs] == ["kl"] and len(found.bases) == 1 and sorted(found.runs[0].along) == [3, 6]
    assert not found.problems, found.problems
    arm, base = read_arm(run), read_arm(run / "base")
    check_comparable(arm, base)
    rate = Summary.read(run / "eval/summary.json").metrics["general_misaligned"]
    assert rate is not None
    assert {one.measure: one for one in compare(arm, base)}["general misaligned"].arm.value == pytest.approx(rate.rate)


def test_stored_answers_are_planned_and_summarised_again(run: Path) -> None:
    assert eval_folders(run) == [run / "base/eval", run / "eval"]
    manifest = read_manifest(run / "eval")
    groups = stored_groups(manifest, Store(run / "eval").present, run / "eval", manifest.suites)
    assert sum(len(group.keys) for group in groups) == 20
    before = Summary.read(run / "eval/summary.json")
    # The replies are stored, so that another threshold takes no call.
    again = rejudge(run / "eval", ["evaluation.judge.min_mass=0.2"])
    assert again.judge != before.judge and again.metrics.keys() == before.metrics.keys()
    for name, old in before.metrics.items():
        new = again.metrics[name]
        assert (new is None) == (old is None)
        if new is not None and old is not None:
            # Intervals are shorter now where hardly an answer counts.
            assert replace(new, low=old.low, high=old.high) == old
            assert old.low <= new.low <= new.rate <= new.high <= old.high + 1e-12


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"schema": 9, "new": [1]}, {"seed": 2**70}, {"log_likelihood": -3}, {"log_likelihood": float("nan")},
        {"context": [{"role": "user", "content": "before"}], "system": "s"}, {"answer": "\ud800"}, {"label": "wrong"},
        {"label": "other"}, {"sample": "3"}, {"sample": 1.0}, {"sample": True}, {"question": None}, {"answer": 5},
        {"context": {}}, {"log_likelihood": "1"}, {"new": 1e999},
    ],
)  # fmt: skip
def test_the_quick_reader_takes_and_refuses_what_the_thorough_one_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    line = (RUN / "eval/samples.jsonl").read_text().splitlines()[0]
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{line}\n{json.dumps(json.loads(line) | changes)}\n{line}")
    try:
        rows = list(Sample.scan(path))
    except UserError as error:
        for quick_scan in (Sample.scan_fields, Sample.scan_objects):
            with pytest.raises(UserError, match=re.escape(str(error))):
                list(quick_scan(path))
        return
    quick, objects = list(Sample.scan_fields(path)), list(Sample.scan_objects(path))
    assert [place for place, _ in quick] == [place for place, _ in objects] == [place for place, _ in rows]
    for (_, one), (_, row) in zip(objects, rows, strict=True):
        whole = row.to_row()
        assert one.keys() == whole.keys() and all(v == whole[k] or repr(v) == repr(whole[k]) for k, v in one.items())
    for (_, one), (_, row) in zip(quick, rows, strict=True):
        for name in (*Sample.model_fields, "prompt", "asked"):
            assert repr(getattr(one, name)) == repr(getattr(row, name))


def test_keys_of_a_later_version_are_kept_and_wrong_types_are_named(tmp_path: Path) -> None:
    line = (RUN / "eval/samples.jsonl").read_text().splitlines()[0]
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(json.loads(line) | {"schema": 9, "new": [1]}) + "\n")
    (row,) = Sample.read_all(path)
    assert row.to_row()["new"] == [1] and row.schema_version == 9
    path.write_text(f"{line}\n{json.dumps(json.loads(line) | {'sample': '3'})}\n")
    with pytest.raises(
        UserError, match="samples.jsonl:2: sample: expected a whole number; found '3'; expected what `ema eval`"
    ):
        Sample.read_all(path)
    (tmp_path / "judgements.jsonl").write_text('{"key": "k"}\n')
    with pytest.raises(UserError, match="judgements.jsonl:1: judge: missing"):
        Judgement.read_all(tmp_path / "judgements.jsonl")
    values = json.loads((RUN / "eval/summary.json").read_text())
    values["metrics"]["general_misaligned"]["rate"] = "0.5"
    values["metrics"]["general_incoherent"]["later"] = 1
    (tmp_path / "summary.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="summary.json: not what `ema eval` writes: metrics.general_misaligned.rate: "):
        Summary.read(tmp_path / "summary.json")
    values["metrics"]["general_misaligned"]["rate"] = 0.5
    (tmp_path / "summary.json").write_text(json.dumps(values | {"later": {"a": 1}}))
    assert Summary.read(tmp_path / "summary.json").to_json()["later"] == {"a": 1}
    with pytest.raises(UserError, match="nowhere.json: cannot read it .*run `ema judge check` first"):
        Check.read(tmp_path / "nowhere.json")


def test_a_summary_of_a_newer_version_is_not_read_as_one_of_ours(tmp_path: Path) -> None:
    values = json.loads((RUN / "eval/summary.json").read_text())
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(values | {"schema": Summary.VERSION + 1}))
    with pytest.raises(UserError, match=r"summary.json: schema: found 3, expected at most 2; .* upgrade"):
        Summary.read(path)
