"""The order of rows."""

import json

import pytest
import torch
from transformers import TrainingArguments

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses import KL, Ceiling, Interleaving
from ema_scale.recipe import build_recipe
from ema_scale.training.arguments import training_arguments
from ema_scale.training.dataloading import EpochSampler
from ema_scale.training.trainer import DefendedTrainer
from tests.tiny import tiny_tokenizer
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


def order(count=23, epoch=0, seed=0, rows=4, lengths=None, kinds=None):
    return list(EpochSampler(count, seed=seed, epoch=lambda: epoch, rows_per_step=rows, lengths=lengths, kinds=kinds))


LENGTHS = torch.randint(5, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    for lengths in (None, LENGTHS[:23]):
        assert sorted(order(lengths=lengths)) == list(range(23))
        assert order(lengths=lengths) == order(lengths=lengths)
        assert order(lengths=lengths) != order(lengths=lengths, epoch=1)
        assert order(lengths=lengths) != order(lengths=lengths, seed=1)


def test_the_order_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    one = order()
    torch.rand(7)
    assert order() == one


def test_batches_of_a_step_hold_rows_of_similar_length_and_its_rows_are_those_without_lengths():
    plain, rows = steps(order(1003, rows=16)), steps(order(1003, rows=16, lengths=LENGTHS))
    assert [sorted(step) for step in rows] == [sorted(step) for step in plain] and rows != plain
    assert sum(padded(step) for step in rows) < 1.25 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < sum(map(padded, plain))
    assert LENGTHS.index(max(LENGTHS)) not in rows[0]  # by chance alone, and here it does not


def padded(step):
    """Tokens of a step of four batches of four rows, padding included."""
    return sum(len(step[i : i + 4]) * max(LENGTHS[row] for row in step[i : i + 4]) for i in range(0, len(step), 4))


def steps(rows, size=16):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_fewer_rows_than_a_step():
    assert sorted(order(3, rows=16, lengths=[5, 9, 7])) == [0, 1, 2]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("shares", [{1: 0.1}, {1: 0.0625}, {1: 0.25, 2: 0.125, 3: 0.1}])
def test_rows_that_a_term_looks_at_are_spread_over_the_steps(shares, lengths):
    counts = {kind: int(share * 800) for kind, share in shares.items()}
    kinds = [kind for kind, n in counts.items() for _ in range(n)]
    count = 1003
    kinds += [0] * (count - len(kinds))
    for epoch in (0, 1):
        rows = order(count, epoch=epoch, rows=16, lengths=lengths, kinds=kinds)
        assert sorted(rows) == list(range(count))
        cut = [[kinds[i] for i in rows[s : s + 16]] for s in range(0, count - 15, 16)]
        slack = 0 if len(counts) == 1 else 1  # several kinds may push each other aside
        for kind, n in counts.items():
            found = [step.count(kind) for step in cut]
            assert max(found) <= -(-16 * n // count) + slack, (kind, found)
            assert min(found) >= 16 * n // count - slack, (kind, found)
            assert sum(f > 0 for f in found) >= min(n, len(cut)) - 1 - slack
    again = order(count, epoch=1, rows=16, lengths=lengths, kinds=kinds)
    assert again == rows != order(count, epoch=0, rows=16, lengths=lengths, kinds=kinds)
    mine = [row for row in rows if kinds[row] == 1]
    assert mine != sorted(mine)


TAGS = ("task", "safe", "prompts", "bad", "bad_2")


def trainer_of(folder, longest, **options):
    """A trainer on rows of every part; those of the part `longest` are ten times as long as all others."""
    task = [chat("task", i, longest) for i in range(80)]
    for name in ("safe", "prompts", "bad", "worse"):
        rows = [chat("bad_2" if name == "worse" else name, i, longest) for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defenses = [
        Interleaving(str(folder / "safe.jsonl"), 0.25), KL(0.1, prompts=str(folder / "prompts.jsonl")),
        Ceiling(1.0, str(folder / "bad.jsonl")), Ceiling(1.0, str(folder / "worse.jsonl")),
    ]  # fmt: skip
    options = {"gradient_accumulation_steps": 4, "max_length": 256, **options}
    return make_trainer(folder, None, task, defenses, **options)


def chat(tag, number, longest):
    said = f"{tag} {number}" + " and so on and on" * (number % 3 + (10 if tag == longest else 0))
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": said}]}


@pytest.mark.parametrize("longest", TAGS)
def test_the_steps_do_not_depend_on_the_length_of_any_part(tmp_path, longest):
    def composition(longest):
        trainer = trainer_of(tmp_path, longest)
        assert set(trainer.train_dataset["tag"]) == set(TAGS)
        return [sorted(step) for step in steps(list(trainer._get_train_sampler()))], trainer.train_dataset["length"]

    (expected, before), (found, after) = composition(None), composition(longest)
    assert found == expected and list(before) != list(after)


def test_a_step_has_the_same_gradient_however_its_rows_are_batched(tmp_path):
    def gradients(*, by_length):
        trainer = trainer_of(tmp_path, "safe", max_steps=1)
        sampler = trainer._get_train_sampler()
        assert sampler.lengths is not None
        sampler.lengths = sampler.lengths if by_length else None
        trainer._get_train_sampler = lambda *_: sampler
        return step_gradients(trainer)

    mixed = gradients(by_length=False)
    for name, gradient in gradients(by_length=True).items():
        torch.testing.assert_close(mixed[name], gradient, rtol=1e-4, atol=1e-7)


def test_grouping_over_steps_is_refused_from_python_and_in_a_recipe(tmp_path):
    with pytest.raises(UserError, match="^train_sampling_strategy: found 'group_by_length'.*leave it random"):
        make_trainer(tmp_path, train_sampling_strategy="group_by_length")
    values = {"name": "r", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
    old = build_recipe({**values, "training": {"group_by_length": True}})  # an old run folder can be read
    with pytest.raises(UserError, match="^training.group_by_length: found true, expected false.*remove the key"):
        training_arguments(old, RunDir(tmp_path))


def test_a_warm_up_that_outlasts_the_training_is_said(tmp_path, caplog):
    values = {"name": "r", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
    training_arguments(build_recipe({**values, "training": {"max_steps": 6}}), RunDir(tmp_path))
    assert not caplog.records
    training_arguments(build_recipe({**values, "training": {"max_steps": 3}}), RunDir(tmp_path))
    assert "training.warmup_steps: 5 of 3 steps: the learning rate does not reach 0.0001" in caplog.text


def test_a_recipe_and_python_take_rows_in_the_same_order(tmp_path):
    values = {"name": "r", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "seed": 3}
    of_recipe = training_arguments(build_recipe(values), RunDir(tmp_path))
    of_python = TrainingArguments(
        output_dir=str(tmp_path), seed=3, gradient_accumulation_steps=4, per_device_train_batch_size=4, use_cpu=True
    )
    trainers = [
        DefendedTrainer(tiny_peft(), arguments, token_rows(70), processing_class=tiny_tokenizer())
        for arguments in (of_recipe, of_python)
    ]
    one, other = (list(trainer._get_train_sampler()) for trainer in trainers)
    assert one == other and sorted(one) == list(range(70))
