"""Interleaving: exact count, even spread, seeded, reported."""

import json

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row
from ema_scale.defenses import Interleaving, RowsContext


def row(text: str) -> Row:
    return Row(({"role": "user", "content": text}, {"role": "assistant", "content": "a"}), origin=text)


@pytest.fixture
def safe(tmp_path):
    path = tmp_path / "safe.jsonl"
    lines = [{"messages": list(row(f"safe {i}").messages)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


TASK = [row(f"task {i}") for i in range(100)]


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 5), (0.1, 10), (0.03, 3), (0.3, 30), (1.0, 100)])
def test_exact_count_at_any_fraction(safe, fraction, count):
    ctx = RowsContext()
    mixed = Interleaving(safe, fraction).transform_rows(TASK, ctx)
    assert sum(r.tag == "safe" for r in mixed) == count
    assert [r for r in mixed if r.tag == "task"] == TASK
    assert any(f"{count} safe rows among 100" in note for note in ctx.notes)
    assert any("some repeat" in note for note in ctx.notes) == (count > 12)
    assert set(ctx.hashes) == {safe}


def test_one_safe_row_after_every_n(safe):
    mixed = Interleaving(safe, 0.05).transform_rows(TASK, RowsContext())
    assert [i for i, r in enumerate(mixed) if r.tag == "safe"] == [20, 41, 62, 83, 104]


def test_no_safe_row_repeats_before_all_are_used(safe):
    mixed = Interleaving(safe, 0.24).transform_rows(TASK, RowsContext())
    used = [r.messages[0]["content"] for r in mixed if r.tag == "safe"]
    assert len(used) == 24 and set(used[:12]) == set(used[12:]) == {f"safe {i}" for i in range(12)}


def test_order_depends_on_the_seed_alone(safe):
    def order(seed):
        mixed = Interleaving(safe, 0.1).transform_rows(TASK, RowsContext(seed=seed))
        return [r.messages[0]["content"] for r in mixed if r.tag == "safe"]

    assert order(0) == order(0) != order(1)


def test_errors(safe, tmp_path):
    with pytest.raises(UserError, match="less than one row"):
        Interleaving(safe, 0.001).transform_rows(TASK, RowsContext())
    with pytest.raises(UserError, match="none.jsonl"):
        Interleaving(str(tmp_path / "none.jsonl")).transform_rows(TASK, RowsContext())
