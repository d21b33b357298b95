"""The reference read from disk: equal to the one that is computed, in any batch, built once, killed and damaged."""

import shutil
from collections import namedtuple
from typing import Any

import pytest
import torch

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, LDIFS
from ema_scale.reference.cached import Cached
from ema_scale.reference.hidden_state_store import RowKeys
from ema_scale.reference.strategy import Cost, choose_strategy
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows
from tests.training.test_trainer import Features


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def one_step(folder, arch="llama", reference="cached", dtype=None, defenses=None, **options):
    """Gradients and the log of one step of two micro-batches."""
    model = tiny_peft(arch, spread=0.3)
    trainer = make_trainer(
        folder, model if dtype is None else model.to(dtype), token_rows(4), defenses or [KL(0.5), LDIFS(0.1, count=2)],
        reference=reference, max_grad_norm=0,
        **{"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options},
    )  # fmt: skip
    return step_gradients(trainer), trainer.state.log_history[0], trainer


def assert_same_step(one, other, tolerance=1e-6):
    for name in ("loss", "ce", "kl", "ldifs", "drift/layer_1", "drift/layer_2"):
        if name in one[1] or name in other[1]:
            assert other[1][name] == pytest.approx(one[1][name], rel=1e-5, abs=1e-7), name
    assert one[0].keys() == other[0].keys()
    for name, gradient in one[0].items():
        torch.testing.assert_close(other[0][name], gradient, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_it_equals_the_computed_one(tmp_path, arch):
    expected = one_step(tmp_path, arch, "adapter_off")
    for options in ({}, {"gradient_checkpointing": True}):
        assert_same_step(expected, one_step(tmp_path, arch, **options))


def test_a_step_of_the_policy_alone_reads_it(tmp_path, monkeypatch):
    one_step(tmp_path)
    monkeypatch.setattr(Cached, "compute", None)  # what fills it
    monkeypatch.setattr("ema_scale.reference.adapter_off.AdapterOff.forward", None)
    step = one_step(tmp_path, drift_every=0)
    assert step[2].defended.reference.name == "cached" and step[1]["kl"] > 0.01


def test_batches_of_any_make_read_the_same(tmp_path, cache):
    """Row by content: other batches, and padding on the other side."""
    _, _, trainer = one_step(tmp_path)
    reference, rows = trainer.defended.reference, token_rows(4)["input_ids"]
    reference.layout.core.train()
    width = max(map(len, rows)) + 3
    for right in (True, False):
        for order in ([0, 1, 2, 3], [3, 1]):
            ids = torch.full((len(order), width), 3)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(order):
                at = slice(0, len(rows[row])) if right else slice(width - len(rows[row]), width)
                ids[i, at], mask[i, at] = torch.tensor(rows[row]), 1
            inputs = {"input_ids": ids, "attention_mask": mask}
            states = reference.forward(inputs, (1, 2))
            live = reference._uncached.forward(inputs, (1, 2))
            seen = mask.bool()
            pairs = [(states.reference, live.reference)]
            pairs += [(states.reference_layers[k], live.reference_layers[k]) for k in (1, 2)]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-5)
            assert not states.reference[~seen].any()


def test_packed_rows_are_told_apart_by_their_positions():
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [7, 8, 5, 6, 7, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    found = RowKeys.of({"input_ids": ids, "attention_mask": mask, "position_ids": positions}).places
    assert [(row, at.tolist()) for row, at, _ in found] == [
        (0, [0, 1, 2]), (0, [3, 4]), (1, [0, 1]), (1, [2, 3, 4]), (1, [5]),
    ]  # fmt: skip
    assert found[0][2] == found[3][2] != found[1][2]


def test_ahead_of_training_it_is_computed_as_training_computes_it(tmp_path, monkeypatch):
    """Under autocast, which casts only a model that has been prepared: as `ema cache` does not."""
    from safetensors.torch import load_file

    from ema_scale.training import reference_setup

    states = []
    for name in ("ahead", "training"):
        monkeypatch.setenv("EMA_CACHE", str(tmp_path / name))
        trainer = make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], reference="cached", bf16=True, max_steps=1)
        if name == "ahead":
            done = reference_setup.prepare_reference(trainer.defended.reference, trainer)
        trainer.train()
        assert trainer.state.log_history[0]["kl"] < 1e-9
        (shard,) = (tmp_path / name).glob("reference/*/last/*.safetensors")
        states.append(load_file(shard)["states"])
    assert torch.equal(*states) and done.bytes == states[0].nbytes


def test_rows_that_are_packed_for_training_are_filled_in_batches_of_as_many_tokens(tmp_path, monkeypatch):
    batches = []
    original = Cached.compute

    def seen(self, inputs):
        batches.append(inputs["attention_mask"].sum(1).tolist())
        return original(self, inputs)

    monkeypatch.setattr(Cached, "compute", seen)
    rows = token_rows(24)
    trainer = make_trainer(
        tmp_path, tiny_peft(), rows, [KL()], reference="cached", packing=True, max_length=60, max_steps=1,
        per_device_train_batch_size=1,
    )  # fmt: skip
    trainer.train()
    assert sorted(n for batch in batches for n in batch) == sorted(rows["length"])
    assert all(len(batch) * max(batch) <= 60 for batch in batches) and len(batches) <= 12


def test_a_step_looks_at_its_tokens_once_and_not_in_every_forward(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, tiny_peft(), token_rows(8), [KL()], reference="cached", max_steps=2, drift_every=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    forward = trainer.defended.reference.forward

    def without_looking(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("ema_scale.reference.cached.RowKeys.of", None)
            return forward(*args, **kwargs)

    trainer.defended.reference.forward = without_looking
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_cache_that_cannot_be_written_is_refused_and_auto_does_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"reference: cached: EMA_CACHE \(.*\) cannot be written: File exists"):
        make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], reference="cached")
    trainer = make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], max_steps=-1, num_train_epochs=3)
    assert trainer.reference_choice.way == "adapter_off" and "cannot be written" in trainer.reference_choice.why


def test_a_killed_build_goes_on_and_damage_is_mended(tmp_path, cache, monkeypatch):
    expected = one_step(tmp_path, reference="adapter_off")
    computed = []
    original = Cached.compute

    def dying(self, inputs):
        computed.append(len(inputs["input_ids"]))
        if len(computed) == 2:
            raise RuntimeError("killed")
        return original(self, inputs)

    monkeypatch.setattr(Cached, "compute", dying)
    with pytest.raises(RuntimeError, match="killed"):
        one_step(tmp_path)
    assert_same_step(expected, one_step(tmp_path))
    assert computed == [2, 2, 2]  # the first batch of two rows was not computed again
    assert_same_step(expected, one_step(tmp_path))
    assert len(computed) == 3
    shard = sorted(cache.glob("*/layer_2/*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 64
    shard.write_bytes(data)
    assert_same_step(expected, one_step(tmp_path))
    assert len(computed) == 4


def test_layers_are_added_to_what_is_there(tmp_path, cache):
    one_step(tmp_path, defenses=[KL(0.5)])
    (folder,) = [p for p in cache.iterdir() if p.is_dir()]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("last/*.safetensors")}
    one_step(tmp_path)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["last", "layer_1", "layer_2"]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("last/*.safetensors")} == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1500))
    with pytest.raises(UserError, match=r"takes \d+(\.\d+)? kB, and the disk has 1.5 kB free"):
        one_step(tmp_path)


def test_stopping_keeps_what_was_computed(tmp_path, cache):
    trainer = make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], reference="cached")
    trainer.stop.requested = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(list(cache.glob("*/last/*.json"))) == 1


def test_other_rows_than_the_cached_are_an_error_in_training_and_computed_in_evaluation(tmp_path):
    _, _, trainer = one_step(tmp_path)
    reference, inputs = trainer.defended.reference, {"input_ids": torch.tensor([[4, 5, 6]])}
    reference.layout.core.train()
    with pytest.raises(UserError, match="no states of a row"):
        reference.forward(inputs)
    reference.layout.core.eval()
    assert reference.forward(inputs).reference is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_all_ways_agree_to_the_bit(tmp_path, autocast):
    """Rows of one length: with others in its batch, or padding, a row's own products may be rounded otherwise."""
    expected = None
    for way in ("adapter_off", "two_stream", "cached"):
        model = tiny_peft(spread=0.3)
        rows = token_rows(4).map(lambda row: {k: v[:6] for k, v in row.items() if k in ("input_ids", "labels")})
        rows = rows.remove_columns(["length", "template"]).add_column("length", [6] * 4)
        trainer = make_trainer(
            tmp_path, model if autocast else model.bfloat16(), rows, [KL(0.5), LDIFS(0.1, count=2)], reference=way,
            max_steps=2, bf16=autocast, drift_every=0, max_grad_norm=0,
        )  # fmt: skip
        gradients = step_gradients(trainer)
        terms = [[row[k] for k in ("loss", "ce", "kl", "ldifs")] for row in trainer.state.log_history if "ce" in row]
        expected = expected or (terms, gradients)
        assert terms == expected[0] and terms[0][2] > 1e-3
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[1][name]), (way, name)


def test_in_half_precision_it_keeps_the_bits(tmp_path, cache):
    one_step(tmp_path, dtype=torch.bfloat16, defenses=[KL(0.5), Features()])
    from safetensors.torch import load_file

    shard = next(cache.glob("*/last/*.safetensors"))
    assert load_file(shard)["states"].dtype == torch.bfloat16


def test_the_choice():
    plenty, little, there = Cost(10**9, 10**10), Cost(10**9, 10**9), Cost(0, 1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"needed": False, "sharded": False, "passes": 5, "cost": there}, "adapter_off"),
        ({"needed": True, "sharded": False, "passes": 1}, "adapter_off"),
        ({"needed": True, "sharded": True, "passes": 1}, "two_stream"),
        ({"needed": True, "sharded": True, "passes": 1, "cost": there}, "cached"),
        ({"needed": True, "sharded": False, "passes": 3, "cost": plenty}, "cached"),
        ({"needed": True, "sharded": False, "passes": 3}, "cached"),
        ({"needed": True, "sharded": True, "passes": 3, "cost": little}, "two_stream"),
    ]
    for facts, way in cases:
        choice = choose_strategy(**facts)
        assert choice.way == way and choice.why, (facts, choice)


def test_auto_takes_a_cache_that_is_there_or_pays(tmp_path):
    def chosen(**options):
        return make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], reference="auto", **options).reference_choice

    assert chosen(max_steps=2).way == "adapter_off"
    assert chosen(max_steps=-1, num_train_epochs=3).way == "cached"
    make_trainer(tmp_path, tiny_peft(), token_rows(8), [KL()], reference="cached", max_steps=1).train()
    assert chosen(max_steps=1).why == "every row's reference is on disk already"
    assert make_trainer(tmp_path, tiny_peft(), token_rows(8), [], max_steps=9).reference_choice.way == "adapter_off"
