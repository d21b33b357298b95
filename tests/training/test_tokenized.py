"""Rows that somebody else has tokenized: padding and what is too long are cut off, and counted."""

import datasets
import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.data.report import cut_line
from ema_scale.defenses import KL
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.training.data import prepare_data
from tests.tiny import tiny_tokenizer
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


def padded(rows, size, side="right"):
    """As tokenizer(..., padding="max_length") leaves them; labels of pads are those of the pad token."""
    filled = []
    for row in rows:
        fill = size - row["length"]
        pads = {"input_ids": 3, "labels": 3, "template": 1, "attention_mask": 0}
        row = {**row, "attention_mask": [1] * row["length"], "length": size}
        for name, pad in pads.items():
            row[name] = [pad] * fill + row[name] if side == "left" else row[name] + [pad] * fill
        filled.append(row)
    return datasets.Dataset.from_list(filled)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_neither_learned_nor_looked_at(tmp_path, side):
    rows = token_rows(4)
    found = []
    for data in (rows, padded(rows, 32, side)):
        model = tiny_peft(spread=0.3).double()
        trainer = make_trainer(tmp_path, model, data, [KL(0.5)], max_steps=1, max_grad_norm=0, eval_dataset=data)
        found.append((step_gradients(trainer), trainer.evaluate()["eval_loss"]))
        assert trainer.data_report.tokens["tokens"] == sum(rows["length"])
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, rtol=1e-9, atol=1e-12)
    assert found[1][1] == pytest.approx(found[0][1])


def test_the_trainer_warns_of_rows_that_it_cuts_or_drops(tmp_path, caplog):
    rows = [{"prompt": "q" * n, "completion": "a" * 5} for n in (5, 20, 200)]
    make_trainer(tmp_path, tiny_peft(), rows, max_length=60, eval_dataset=rows[1:])
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for what in ("training", "evaluation"):
        told = next(one for one in said if one.startswith(f"{what} rows: "))
        assert "1 row cut" in told and "1 row dropped (1 x no assistant token" in told
    caplog.clear()
    make_trainer(tmp_path, tiny_peft(), rows[:1])
    assert not [record for record in caplog.records if "rows cut" in record.getMessage()]


def test_rows_are_cut_to_the_longest_allowed_length_and_counted():
    ids, names = list(range(10, 20)), ["ten chars.", "", "", ""]
    given = datasets.Dataset.from_dict(
        {
            "input_ids": [ids, ids, ids, ids[:3]],
            "labels": [ids, [-100] * 8 + ids[8:], [-100] * 10, ids[:3]],
            "template": [[0] * 10, [1] * 10, [1] * 10, [0] * 3],
            "length": [10, 10, 10, 3],
            "tag": ["task", "safe", "prompts", "task"],
            "name": names,
        }
    )
    tensors = given.with_format("torch", ["input_ids", "labels", "template", "tag", "length"])
    for source in (given, list(given), tensors):
        dataset, report = prepare_data(source, RowGroups(), tiny_tokenizer(), max_length=6)
        found = dataset.with_format(None)[:]
        assert found["input_ids"] == [ids[:6], ids[:6], ids[:3]] and found["length"] == [6, 6, 3]
        assert found["labels"][0] == ids[:6] and found["template"][1] == [1] * 6 and found["name"] == names[:3]
        assert report.rows == {"task": 2, "prompts": 1}
        assert report.tokens == {"tokens": 15, "truncated": 3, "dropped_no_assistant": 1}
        assert cut_line(report) == "3 rows cut to the longest allowed length, 1 row dropped"
    packed, _ = prepare_data(given, RowGroups(), tiny_tokenizer(), max_length=6, packing=True)
    assert max(packed["length"]) <= 6
    theirs = given.add_column("seq_lengths", [[4, 6], [5, 5], [5, 5], [3]])  # as TRL packs
    for source, longest in ((given, None), (theirs, 6)):
        whole, report = prepare_data(source, RowGroups(), tiny_tokenizer(), max_length=longest)
        assert whole["length"][:] == [10, 10, 10, 3] and report.tokens == {"tokens": 33}
    with pytest.raises(UserError, match=r"no row has a token to learn within 6 tokens \(1 row\); raise max_length"):
        prepare_data(given.select([1]), RowGroups(), tiny_tokenizer(), max_length=6)


def test_a_column_tag_of_somebody_s_own_is_named(tmp_path):
    rows = token_rows(4).remove_columns("tag")
    own = rows.add_column("tag", ["task", "math", "task", "task"])
    with pytest.raises(UserError, match="^column tag: found 'math', expected task, safe, prompts, bad"):
        make_trainer(tmp_path, None, own)
    with pytest.raises(UserError, match="^column tag: found 'math'"):
        make_trainer(tmp_path, None, rows, eval_dataset=own)
