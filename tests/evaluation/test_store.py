from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest, folder_identity
from ema_scale.core.io import read_jsonl
from ema_scale.evaluation.records import Judgement, Sample
from ema_scale.evaluation.store import Store, Stores, locked_store


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


def test_of_many_stores_a_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is locked while it is open, and what is written to a closed one opens it again."""
    monkeypatch.setattr("ema_scale.evaluation.store.MOST_OPEN", 3)
    folders = {str(i): tmp_path / str(i) for i in range(50)}

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    with Stores(folders) as stores:
        for turn in "ab":
            for name, store in stores.items():
                assert turn not in store.samples
                store.add_sample(sample(turn, f"{name}{turn}"))
                store.add_judgement(verdict(turn))
                assert store.samples[turn].answer == f"{name}{turn}" and open_files() <= before + 3 * 3
        with locked_store(folders["0"]) as free:
            assert set(free.samples) == set("ab")
        with pytest.raises(UserError, match="another evaluation is writing"), locked_store(folders["49"]):
            pass
    assert open_files() == before
    assert [r["key"] for r in read_jsonl(folders["7"] / "judgements.jsonl")] == ["a", "b"]


def test_rows_are_read_where_they_lie(tmp_path: Path) -> None:
    """Rows of this process, of an earlier one, put aside, and taken back."""
    with locked_store(tmp_path) as store:
        for key in "abc":
            store.add_sample(sample(key, key * 3))
            store.add_judgement(Judgement(key=key, judge="j", aligned=1.0, raw={"aligned": {"said": key}}))
        assert store.samples["b"].answer == "bbb" and store.judgements["b", "j"].raw == {"aligned": {"said": "b"}}
        store.flush()
        assert store.samples["b"].answer == "bbb" and store.judgements["b", "j"].raw == {"aligned": {"said": "b"}}
        store.keep_only("ca")
        assert [store.samples[key].answer for key in "abc"] == ["aaa", "bbb", "ccc"]
        assert [(store.judgements[key, "j"].raw or {})["aligned"]["said"] for key in "abc"] == list("abc")
        assert store.judged("b", "j") == store.judged("a", "j") and store.judged("d", "j") is None
    assert [r["key"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["c", "a"]
    (tmp_path / "huge").mkdir()
    line = json.dumps(sample("k").to_row() | {"sample": 99999999999999999999})
    (tmp_path / "huge" / "samples.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="samples.jsonl: k: found sample 99999999999999999999 .*64-bit"):
        len(Store(tmp_path / "huge").samples)


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
