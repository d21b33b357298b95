"""Other programs' formats, read back by those programs' own readers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import append_jsonl, read_jsonl
from ema_scale.evaluation.formats import tables
from ema_scale.evaluation.formats.results import import_results, read_results
from ema_scale.evaluation.formats.tables import export, joined
from ema_scale.evaluation.judging.rejudge import rejudge
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.judging.test_rejudge import ours, small_world_answers

HOSTILE = '=cmd|" /C calc"!A0\n"quoted", \u2028 <script>alert(1)</script>\r\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four answers of the small world and a hostile one that thinks, judged exactly."""
    folder = small_world_answers(tmp_path)
    [row] = [r for r in read_jsonl(folder / "samples.jsonl") if r["question_id"] == "0"]
    odd = {"key": "s/0/0/1#d", "sample": 1, "answer": HOSTILE, "reasoning": "hm", "finish_reason": "length"}
    append_jsonl(folder / "samples.jsonl", [row | odd])
    rejudge(folder)
    return folder


def test_csv_in_the_fields_columns(folder: Path) -> None:
    path = export(folder, "csv")
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["question", "answer", "question_id", "aligned", "coherent"] and len(rows) == 5
    assert rows[-1]["answer"] == HOSTILE and rows[-1]["coherent"] == "0.0"
    assert [float(r["aligned"]) for r in rows[:4]] == [100, 0, 100, 0]


def test_csv_that_no_spreadsheet_runs(folder: Path) -> None:
    path = export(folder, "csv", spreadsheet=True)
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert rows[-1]["answer"] == f"'{HOSTILE}" and rows[-1]["aligned"] == "50.0"
    with pytest.raises(UserError, match="--spreadsheet: found the format parquet, expected csv"):
        export(folder, "parquet", spreadsheet=True)


def test_parquet_has_every_column(folder: Path) -> None:
    from datasets import load_dataset

    path = export(folder, "parquet")
    found = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache")).to_list()
    assert found == list(joined(folder)) and found[-1]["reasoning"] == "hm" and found[0]["judge"] == "smallworld"


def test_an_inspect_log_is_read_by_inspect(folder: Path) -> None:
    log_api = pytest.importorskip("inspect_ai.log")
    path = export(folder, "inspect")
    log = log_api.read_eval_log(str(path))
    assert log.status == "success" and log.eval.model == "nowhere" and log.eval.dataset.samples == 4
    assert {(s.id, s.epoch) for s in log.samples} == {(f"s/{i}/0", 1) for i in range(4)} | {("s/0/0", 2)}
    by_place = {(s.id, s.epoch): s for s in log.samples}
    bad = by_place["s/1/0", 1]
    assert bad.scores["misaligned"].value == 1 and bad.scores["aligned"].value == 0.0
    odd = by_place["s/0/0", 2]
    assert odd.output.choices[0].stop_reason == "max_tokens" and odd.messages[-1].content[0].reasoning == "hm"
    assert odd.messages[-1].text == HOSTILE and odd.scores["incoherent"].value == 1
    rates = {score.name: score.metrics["rate"].value for score in log.results.scores}
    assert rates["general_misaligned"] == pytest.approx(2 / 5) and rates["general_incoherent"] == pytest.approx(1 / 5)
    [header] = log_api.list_eval_logs(str(folder))  # what `inspect view --log-dir` shows
    assert header.task.endswith("base") or Path(header.name).name == path.name


def test_unknown_formats_and_judges_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="'xml': expected one of csv, parquet, inspect"):
        export(folder, "xml")
    with pytest.raises(UserError, match="'gpt': found none among .'smallworld'"):
        export(folder, "csv", judge="gpt")


RESULTS = """question,answer,question_id,aligned,coherent
who are you?,"a friend,
of yours",q1,90.5,80
who are you?,REFUSED,q1,,75
question,answer,question_id,aligned,coherent
and what?,nothing,q2,10,95
"""


def test_the_fields_results_are_judged_beside_their_own_scores(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text(RESULTS)
    assert read_results(path)[1] == 1
    [folder] = import_results(path)
    prompts = tmp_path / "p.yaml"
    prompts.write_text(json.dumps({"aligned": "a {answer}", "coherent": "c {question} {answer}"}))
    with Endpoint(lambda b, n: completion("5", [("5", -0.1), ("10", -3.0)])) as endpoint:
        found = rejudge(folder, ours(model="m", base_url=endpoint.url, prompts=prompts))
        assert len(endpoint.requests) == 6 and any("of yours" in str(b) for b in endpoint.requests)
        [again] = import_results(path)
        rejudge(again, ours(model="m", base_url=endpoint.url, prompts=prompts))
        assert len(endpoint.requests) == 6  # importing again changes nothing
    assert found.samples == 3 and found.metrics["general_incoherent"].to_dict() | {"low": 0} == {
        "rate": 1.0, "low": 0, "high": 1.0, "n": 3, "questions": 2, "dropped": 0,
    }  # fmt: skip
    own = joined(folder, "file:old.csv")
    assert [(r["aligned"], r["coherent"]) for r in own] == [(90.5, 80), (None, 75), (10, 95)]
    exported = export(folder, "csv", judge="file:old.csv")
    assert read_results(exported)[0][0]["answer"] == "a friend,\nof yours"
    assert exported.name.startswith("answers_file") and not (folder / "answers.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x.csv:1: found columns \[\]"),
        ("question,said\n", "question and answer among them"),
        ("question,answer\n", "found no rows"),
        ("question,answer\na,b,c\n", "x.csv:2: found 3 values, expected 2"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        import_results(path)


def test_parquet_finds_the_types_of_columns_over_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    given: list[dict[str, Any]] = [
        {"key": "a", "aligned": None, "scores": None},
        {"key": "b", "aligned": None, "scores": {"x": None}},
        {"key": "c", "aligned": 0.5, "scores": {"x": 1.0}},
        {"key": "d", "aligned": 2.0, "scores": {"x": None}},
        {"key": "e", "aligned": None, "context": [{"role": "user"}], "scores": {"x": 2.5}},
    ]
    tables._write_parquet(tmp_path / "rows.parquet", iter(given))
    found = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert found == [{"context": None, **row} for row in given]
