"""TReFT: keys and values of the prefix alone, by their definition, with and without everything around them."""

import datasets
import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, TReFT
from ema_scale.models.prefix import leading
from tests.defenses.penalties import assert_same_however_rows_are_put_together
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows

PREFIX = [1, 200, 201, 9, 30]


def rows_with_prefix(count=6, prefix=PREFIX):
    """Every third row has a text of its own after three tokens of the prefix, and later tokens of the template."""

    def begun(row, index):
        begin = prefix[:3] if index % 3 == 1 else prefix
        ids, later = begin + row["input_ids"], [0] + row["template"][1:]
        labels = [-100] * len(begin) + row["labels"]
        return {"input_ids": ids, "labels": labels, "template": [1] * len(begin) + later, "length": len(ids)}

    return token_rows(count).map(begun, with_indices=True)


def projections(model, ids):
    found = []
    modules = [m for n, m in model.named_modules() if n.endswith((".k_proj", ".v_proj"))]
    handles = [m.register_forward_hook(lambda _, args, output: found.append(output[0])) for m in modules]
    logits = model(input_ids=ids[None]).logits[0]
    for handle in handles:
        handle.remove()
    return found, logits


def by_hand(rows, strength=0.7):
    """Value and gradients of CE + strength * TReFT, row by row, in float64."""
    model = tiny_peft(spread=0.3).double()
    apart, losses, tokens, layers = [], [], 0, model.get_base_model().config.num_hidden_layers
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        count = row["template"].index(0)
        with torch.no_grad(), model.disable_adapter():
            reference, _ = projections(model, ids)
        # One pass for both terms: a norm rounds what comes back through it to float32.
        found, logits = projections(model, ids)
        for policy, held in zip(found, reference, strict=True):
            for t in range(count):
                apart.append(((policy[t] - held[t]).norm() / held[t].norm()) ** 2)
        tokens += count
        log_p = logits[:-1].log_softmax(-1)
        learned = labels[1:] != -100
        losses.append(F.nll_loss(log_p[learned], labels[1:][learned], reduction="none"))
    value = sum(apart) / layers / tokens
    (torch.cat(losses).mean() + strength * value).backward()
    return strength * value.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("way", "checkpointing"), [("adapter_off", True), ("two_stream", False)])
def test_value_and_gradient_are_the_definitions(tmp_path, way, checkpointing):
    rows = rows_with_prefix()
    value, gradients = by_hand(rows)
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3).double(), rows, [TReFT(0.7), KL(0.0)], reference=way, max_steps=1,
        max_grad_norm=0, per_device_train_batch_size=6, gradient_checkpointing=checkpointing, drift_every=0,
    )  # fmt: skip
    found = step_gradients(trainer)
    assert trainer.state.log_history[0]["treft"] == pytest.approx(value, rel=1e-5) and value > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10)
    plain = make_trainer(
        tmp_path, tiny_peft(spread=0.3).double(), rows, max_steps=1, max_grad_norm=0, per_device_train_batch_size=6
    )
    without = step_gradients(plain)
    assert any((found[n] - g).abs().max() > 1e-4 for n, g in without.items())
    assert not any(layer._forward_hooks for layer in trainer.defended.layout.layers)


def test_the_value_does_not_depend_on_how_rows_are_put_together(tmp_path):
    rows = rows_with_prefix().map(lambda row: row | {"tag": "task"})
    value, gradient = assert_same_however_rows_are_put_together(tmp_path, TReFT(0.7), "treft", rows)
    expected, gradients = by_hand(rows)
    assert value == pytest.approx(expected, rel=1e-5)
    for name in gradients:
        torch.testing.assert_close(gradient[name], gradients[name], rtol=1e-7, atol=1e-10)


def test_it_runs_no_reference_and_holds_the_prefix_in_training(tmp_path):
    assert not TReFT().needs_reference
    read = {}
    for strength in (1e-4, 100.0):
        trainer = make_trainer(
            tmp_path, dataset=rows_with_prefix(16), defenses=[TReFT(strength)], max_steps=8, drift_every=0
        )
        trainer.train()
        first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
        assert "reference_share" not in last
        assert first["treft"] == pytest.approx(0, abs=1e-9) and last["ce"] < first["ce"]
        read[strength] = last["treft"] / strength
    assert read[100.0] < 0.2 * read[1e-4]


def test_rows_that_begin_otherwise_count_as_far_as_they_agree(tmp_path):
    """What follows the first difference is not compared."""
    mixed = datasets.concatenate_datasets([rows_with_prefix(2), rows_with_prefix(1, [1, 200, 77, 9, 30])])
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3).double(), mixed, [TReFT(1.0)], max_steps=1, per_device_train_batch_size=3
    )
    trainer.train()
    cut = [row | {"template": [1, 1, 0]} if row["input_ids"][2] == 77 else row for row in mixed]
    other = [row | {"template": [1, 1, 0]} if row["input_ids"][2] == 201 else row for row in mixed]
    held, counted = [(5, 3, 2), (2, 2, 5)], 5 + 3 + 5  # either beginning may stand first in the micro-batch
    expected = [by_hand(rows, 1.0)[0] * sum(tokens) / counted for rows, tokens in zip((cut, other), held, strict=True)]
    assert min(abs(trainer.state.log_history[0]["treft"] / value - 1) for value in expected) < 1e-5


def test_what_cannot_be_held_is_refused(tmp_path):
    with pytest.raises(UserError, match="treft: no row begins with tokens of the chat template"):
        bare = token_rows(4).map(lambda row: row | {"template": [0] * row["length"]})
        make_trainer(tmp_path, dataset=bare, defenses=[TReFT()]).train()
    with pytest.raises(UserError, match="treft: GPT2LMHeadModel has no layers k_proj and v_proj"):
        make_trainer(tmp_path, tiny_peft("gpt2"), rows_with_prefix(), [TReFT()]).train()
    with pytest.raises(UserError, match="treft: scope prefix needs rows of messages"):
        make_trainer(tmp_path, dataset=token_rows(4).remove_columns("template"), defenses=[TReFT()])


def test_leading_tokens_of_packed_rows():
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1]]).bool()
    assert leading(mask).long().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0]]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 1]])
    assert leading(mask, positions).long().tolist() == [[1, 1, 0, 0, 1, 0, 0, 1, 1]]
