"""Packed rows are trained on as if each stood alone: loss, every penalty and every gradient."""

import itertools
import math
import tracemalloc

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.data import packing
from ema_scale.data.collate import ChatCollator
from ema_scale.data.packing import join, pack, texts
from ema_scale.defenses import KL, LDIFS, Ceiling
from tests.tiny import tiny_tokenizer
from tests.training.helpers import ARCHITECTURES, make_trainer, step_gradients, tiny_peft, token_rows

TAGS = ("task", "bad", "safe", "task", "prompts", "task", "bad")
DEFENSES = [
    KL(0.5), KL(0.7, "reference_policy", 2.0, scope="assistant", part="safe"),
    KL(0.4, "jensen_shannon", scope="prompt"), KL(0.3, prompts="unused"),
    KL(0.2, scope="template"), Ceiling(0.9, "unused"), LDIFS(0.2, count=2),
]  # fmt: skip
TERMS = ("loss", "ce", "kl", "kl_2", "kl_3", "kl_4", "kl_5", "ceiling", "ldifs", "entropy", "drift/layer_1")


@pytest.fixture(autouse=True)
def rows_are_there_already(monkeypatch):
    """As if the defenses had mixed them in."""
    monkeypatch.setattr(KL, "changes_rows", False)
    monkeypatch.setattr(Ceiling, "changes_rows", False)


def rows(count=7):
    return token_rows(count).remove_columns("tag").add_column("tag", list(TAGS[:count]))


def one_step(folder, arch="llama", *, spread=0.3, defenses=DEFENSES, collate=None, **options):
    """(gradients, first log) of a step over all rows."""
    arguments = {"per_device_train_batch_size": 7, "max_steps": 1, "max_grad_norm": 0, "max_length": 40, **options}
    trainer = make_trainer(folder, tiny_peft(arch, spread=spread).double(), rows(), defenses, **arguments)
    trainer.data_collator = collate or trainer.data_collator
    return step_gradients(trainer), trainer.state.log_history[0]


def assert_same(one, other):
    for name in TERMS:
        assert math.isclose(one[1][name], other[1][name], rel_tol=1e-5), name
        assert one[1][name] != 0, name
    for name, gradient in one[0].items():
        torch.testing.assert_close(other[0][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loss_penalties_and_gradients_are_those_of_rows_apart(tmp_path, arch):
    alone = one_step(tmp_path, arch, reference="adapter_off")
    packed = one_step(tmp_path, arch, packing=True, reference="two_stream", gradient_checkpointing=True)
    assert_same(alone, packed)


def test_no_way_of_batching_packed_rows_changes_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    count = len(pack(rows(), 40))
    assert 2 < count < 7
    alone = one_step(tmp_path)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": count}
    left = ChatCollator(tiny_tokenizer(), padding_side="left")
    flat = ChatCollator(tiny_tokenizer(), one_sequence=True)
    for options in (split, {"collate": left}, {"collate": flat}, {"reference": "cached", "drift_every": 0}):
        other = one_step(tmp_path, packing=True, **options)
        other[1].setdefault("drift/layer_1", alone[1]["drift/layer_1"])
        assert_same(alone, other)


def test_every_term_and_its_gradient_are_zero_at_step_zero(tmp_path):
    plain, _ = one_step(tmp_path, spread=0.0, defenses=[], packing=True)
    defended, row = one_step(tmp_path, spread=0.0, packing=True, reference="adapter_off")
    assert all(row[name] == 0 for name in TERMS if name.startswith(("kl", "ceiling", "ldifs", "drift")))
    for name, gradient in plain.items():
        torch.testing.assert_close(defended[name], gradient, rtol=0, atol=0)


def test_packing_joins_what_join_joins_and_makes_no_lists(monkeypatch):
    monkeypatch.setattr(packing, "_AT_ONCE", 2)
    given = rows()
    packed = pack(given.select([6, 0, 1, 2, 3, 4, 5]), 40)
    assert len(packed) > 2, "more than are joined at once"
    rest = list(given)
    for row in packed:
        starts = [0, *itertools.accumulate(row["seq_lengths"])]
        apart = [row["input_ids"][start:end] for start, end in itertools.pairwise(starts)]
        members = [next(one for one in rest if one["input_ids"] == ids) for ids in apart]
        assert row == join(members)
        rest = [one for one in rest if one not in members]
    assert rest == [] and len(pack(given.select([]), 40)) == 0
    monkeypatch.undo()
    many = token_rows(20, longest=400).select([i % 20 for i in range(4000)])
    tracemalloc.start()
    pack(many, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * sum(many["length"]), "a list takes eight bytes per token and column"


def test_every_row_is_packed_once_and_found_again():
    dataset = token_rows(200, longest=30)
    packed = pack(dataset, 64)
    assert sorted(texts(packed)) == sorted(dataset["input_ids"]) and list(texts(dataset)) == list(dataset["input_ids"])
    assert max(packed["length"]) <= 64 and sum(packed["length"]) > 0.9 * 64 * len(packed)
    both = join([packed[0], dataset[0]])
    assert both["seq_lengths"] == [*packed[0]["seq_lengths"], dataset[0]["length"]]
    assert len(both["tags"]) == len(both["seq_lengths"]) and both["length"] == len(both["labels"])
    with pytest.raises(UserError, match="row 0 has"):
        pack(dataset, 5)
    with pytest.raises(UserError, match="packed already"):
        pack(packed, 64)


def test_a_model_that_lets_rows_see_each_other_is_refused(tmp_path, monkeypatch):
    import transformers.masking_utils as masking

    trainer = make_trainer(tmp_path, None, rows(), packing=True)
    trainer.model.get_base_model().config.attention_chunk_size = 8
    with pytest.raises(UserError, match="chunks of absolute position"):
        trainer.train()
    monkeypatch.setattr(masking, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(UserError, match=r"training.packing: LlamaForCausalLM does not keep packed rows apart"):
        make_trainer(tmp_path, None, rows(), packing=True).train()


def test_the_check_is_not_skipped_where_rows_apart_were_evaluated_first(tmp_path, monkeypatch):
    import transformers.masking_utils as masking

    monkeypatch.setattr(masking, "find_packed_sequence_indices", lambda position_ids: None)
    trainer = make_trainer(tmp_path, None, rows(), packing=True)
    trainer.evaluate(token_rows(2))
    with pytest.raises(UserError, match=r"does not keep packed rows apart"):
        trainer.train()
