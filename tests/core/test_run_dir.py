"""Run folders: atomic writes, torn lines, one writer."""

import json
import os
import subprocess
import sys

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.io import (
    _HOST,
    append_jsonl,
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    file_lock,
    read_jsonl,
)
from ema_scale.core.records import DataReport, Provenance
from ema_scale.core.run_dir import RunDir


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    atomic_write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        atomic_write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_write_cleans_up_after_an_error_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_torn_last_line_is_left_out_and_repaired(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": 2}])
    with open(path, "a") as handle:
        handle.write('{"a": 3')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    assert read_jsonl(path, repair=True) == [{"a": 1}, {"a": 2}]
    append_jsonl(path, [{"a": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("before", [[], [{"a": 1}], [{"a": "x" * 100_000}]])
def test_a_row_after_a_torn_one_is_a_line_of_its_own(tmp_path, before):
    """Whoever appends may not have read the file."""
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, before)
    with open(path, "ab") as handle:
        handle.write(b'{"a": "' + b"y" * 70_000)
    append_jsonl(path, [{"a": 3}])
    assert read_jsonl(path) == [*before, {"a": 3}]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        read_jsonl(path)


def test_second_writer_is_refused(tmp_path):
    code = (
        "import sys; from ema_scale.core.run_dir import RunDir; from ema_scale.core.errors import UserError\n"
        f"r = RunDir({str(tmp_path / 'run')!r})\n"
        "try:\n    r.lock().__enter__(); print('taken')\nexcept UserError as e: print('refused')"
    )
    with RunDir(tmp_path / "run").lock():
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "refused"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "taken"


def test_provenance_holds_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    run = RunDir(tmp_path / "run").create()
    made = Provenance.of_this_process(recipe={"name": "x"}, data_sha256={"rows.jsonl": "00"}, seed=7)
    made.write(run.provenance_path)
    text = run.provenance_path.read_text()
    assert "sk-very-secret" not in text
    assert json.loads(text)["seed"] == 7 and "torch" in json.loads(text)["packages"]


def test_status_states(tmp_path):
    run = RunDir(tmp_path / "run").create()
    assert run.status().state == "not started"
    run.set_status("running", step=3)
    assert run.status().state == "running" and run.status().step == 3
    with pytest.raises(ValueError):
        run.set_status("exploded")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and (out / "whole").exists()


def test_a_lock_that_is_held_raises_the_given_error(tmp_path):
    with file_lock(tmp_path / "new" / ".lock", UserError("busy")):
        with pytest.raises(UserError, match="busy"), file_lock(tmp_path / "new" / ".lock", UserError("busy")):
            pass


def test_a_later_state_keeps_what_is_said_of_the_whole_run(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.set_status("running", started=5.0, pid=7, processes=2)
    run.set_status("running", keep=True, max_steps=9)
    run.set_status("failed", keep=True, reason="why")
    status = run.status()
    assert (status.state, status.started, status.processes, status.max_steps) == ("failed", 5.0, 2, 9)
    run.set_status("running", keep=True)
    assert run.status().reason is None
    run.set_status("finished", step=9)
    assert run.status().started is None and "started" not in json.loads(run.status_path.read_text())


def test_records_of_older_versions_are_read(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.status_path.write_text('{"state": "failed", "updated": 1.5, "error": "disk full"}')
    run.provenance_path.write_text('{"schema": 1, "data_sha256": {"rows": "00"}, "later": [1]}')
    run.data_path.write_text('{"schema": 1, "rows": {"task": 4}, "dropped": [{"origin": "x:1", "reason": "empty"}]}')
    assert run.status().reason == "disk full"
    made = run.provenance()
    assert made is not None and made.data_sha256 == {"rows": "00"} and made.to_dict()["later"] == [1]
    report = DataReport.read(run.data_path)
    assert report is not None and report.rows == {"task": 4} and len(report.dropped) == 1


def test_damaged_and_newer_records_are_errors_for_people(tmp_path):
    run = RunDir(tmp_path / "run").create()
    for text, said in (
        ('{"state": ', r"status.json: cannot be read .*expected JSON"),
        ('{"state": "exploded"}', r"status.json: state: .*found 'exploded'"),
        ('{"schema": 2, "state": "running"}', r"status.json: schema: found 2, expected at most 1.*upgrade"),
    ):
        run.status_path.write_text(text)
        with pytest.raises(UserError, match=said):
            run.status()


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    """Not what a living process writes, nor another machine's before a day has passed, nor another file's."""
    path, mine = tmp_path / "a.json", _HOST
    gone, living, other = f".a.json.{mine}-999999999.tmp", f".a.json.{mine}-1.tmp", ".a.json.000000-5.tmp"
    kept = [living, f".b.json.{mine}-999999999.tmp", ".a.json.tmp", ".a.json.x-1.tmp"]
    for name in (gone, other, *kept):
        (tmp_path / name).touch()
    (tmp_path / f".a.json.{mine}-999999998.tmp" / "folder").mkdir(parents=True)
    atomic_write_text(path, "new")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", other, *kept}
    os.utime(tmp_path / other, (0, 0))
    atomic_write_text(path, "newer")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", *kept}
