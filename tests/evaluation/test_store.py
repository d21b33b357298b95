from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest, folder_identity
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.records import Judgement, Sample
from ema_scale.evaluation.store import Store, locked_store


def sample(key: str, text: str = "x") -> Sample:
    return Sample(key=key, suite="s", question_id="1", question="?", answer=text)


def verdict(key: str, judge: str = "j") -> Judgement:
    return Judgement(key=key, judge=judge, aligned=1.0)


def test_rows_come_back_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    with locked_store(tmp_path) as store:
        store.add_sample(sample("a"))
        store.add_judgement(verdict("a"))
    with open(tmp_path / "samples.jsonl", "a") as handle:
        handle.write('{"key": "b", "ans')
    with locked_store(tmp_path) as store:
        assert list(store.samples) == ["a"] and list(store.judgements) == [("a", "j")]
        store.add_sample(sample("b", "\u2028 \U0001f600"))
    assert [r["key"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["a", "b"]


def test_a_paid_judgement_is_on_the_disk_at_once_and_after_its_sample(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add_sample(sample("a"))
    store.add_judgement(verdict("a"), at_once=True)
    assert len(read_jsonl(tmp_path / "judgements.jsonl")) == len(read_jsonl(tmp_path / "samples.jsonl")) == 1


def test_rows_no_longer_asked_for_are_put_aside_and_come_back(tmp_path: Path) -> None:
    with locked_store(tmp_path) as store:
        for key in "abc":
            store.add_sample(sample(key))
            store.add_judgement(verdict(key, "old"))
        store.add_judgement(verdict("a", "new"))
        assert store.keep_only(["a"]) == 2
    assert [r["key"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["a"]
    assert [r["judge"] for r in read_jsonl(tmp_path / "judgements.jsonl")] == ["old", "new"]
    with locked_store(tmp_path) as store:
        assert set(store.samples) == set("abc") and len(store.judgements) == 4
        assert [r.key for r in store.present] == ["a"] and store.judges == {"old", "new"}
        store.keep_only(["a", "c"])
        store.keep_only(["a", "c"])
    assert [r["key"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["a", "c"]
    assert len(Store(tmp_path).samples) == 3 and len(Store(tmp_path).judgements) == 4
    with pytest.raises(KeyError):
        Store(tmp_path).keep_only(["nowhere"])


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with locked_store(tmp_path), pytest.raises(UserError, match="another evaluation is writing"):
        with locked_store(tmp_path):
            pass


def test_identity_follows_content_not_place(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    moved = shutil.copytree(folder, tmp_path / "b")
    assert folder_identity(str(folder)) == folder_identity(str(moved))
    (moved / "model.safetensors").write_bytes(bytes(range(256)) * 99 + bytes(256))
    assert folder_identity(str(folder)) != folder_identity(str(moved))
    assert folder_identity("org/model", "v1") != folder_identity("org/model", "v2")
    assert digest("a", 1) != digest("a", 2)
