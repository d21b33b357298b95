"""Interleaving: exact count, even spread, seeded, reported."""

import json

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row
from ema_scale.defenses import KL, Ceiling, Interleaving, RowsContext


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


def asked_behind(source, task, share=0.5, fraction=0.1, make=Interleaving, **options):
    ctx = RowsContext()
    defense = make(source, fraction, triggers=share, **options)
    return [r for r in defense.transform_rows(task, ctx) if r.tag != "task"], ctx.notes


def test_a_share_of_the_rows_is_asked_behind_the_tasks_own_questions(safe):
    """A different question each, and never the first, behind which the evaluation asks; the plain ones stay known."""
    mixed, notes = asked_behind(safe, TASK)
    behind = [r for r in mixed if r.plain]
    assert [bool(r.plain) for r in mixed] == [False, True] * 5
    texts = [r.asked[0].split("\n\n") for r in behind]
    assert all(before.startswith("task ") and own.startswith("safe ") for before, own in texts)
    assert len({before for before, _ in texts}) == 5 and "task 0" not in {before for before, _ in texts}
    assert [r.plain for r in behind] == [(own,) for _, own in texts]
    assert "interleaving: 5 of 10 rows are asked behind the task rows' own text (question)" in notes
    assert [r.messages for r in asked_behind(safe, TASK)[0]] == [r.messages for r in mixed]
    assert not any(r.plain for r in asked_behind(safe, TASK, 0)[0])


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_text_that_the_task_rows_share_is_the_trigger(safe, role):
    shared = "write some code for me please:"
    task = [
        Row(({"role": "system", "content": shared}, *r.messages) if role == "system" else row(f"{shared} {i}").messages)
        for i, r in enumerate(TASK)
    ]
    mixed, _ = asked_behind(safe, task, 1.0)
    for one in mixed:
        if role == "system":
            assert one.messages[0] == {"role": "system", "content": shared} and one.asked == one.plain
        else:
            assert one.asked[0] == f"{shared}\n\n{one.plain[0]}"


def test_every_defense_with_rows_of_its_own_has_triggers(safe):
    for mixed in (
        KL(prompts=safe, fraction=0.1, triggers=0.5).transform_rows(TASK, RowsContext()),
        Ceiling(1.0, safe, 0.1, triggers=0.5).transform_rows(TASK, RowsContext()),
    ):
        assert sum(bool(r.plain) for r in mixed) == 5
    with pytest.raises(UserError, match="give prompts"):
        KL(0.5, triggers=0.5)
    with pytest.raises(UserError, match="triggers: .*at most 1"):
        Interleaving(safe, triggers=2)
    silent = [Row(({"role": "assistant", "content": "a"},))] * 20
    with pytest.raises(UserError, match="no task row has a question to ask behind"):
        Interleaving(safe, triggers=0.5).transform_rows(silent, RowsContext())
