"""A term on the labels' log-likelihoods, written in somebody else's package, trains as its float64 definition says."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row
from ema_scale.defenses import Defense, LabelTerm
from ema_scale.models.head import Head
from ema_scale.training.loss import LossTerm, fused_loss
from tests.training.helpers import make_trainer, step_gradients, tiny_peft


def squared_hinge(labels):
    """max(0, 0.5 + log policy - log reference)^2: it pulls before the label is likelier than under the reference."""
    return torch.relu(0.5 + labels.log_ratio).square()


def unlikelihood(labels):
    """-log(1 - policy), of the policy alone (Welleck et al., arXiv 1908.04319)."""
    return -torch.log1p(-labels.policy.exp())


def squared_difference(labels):
    """Made of the two likelihoods, and not of their ratio."""
    return (labels.policy - labels.reference).square()


MEASURES = {
    squared_hinge: lambda log_p, log_q: F.relu(0.5 + log_p - log_q) ** 2,
    unlikelihood: lambda log_p, log_q: -torch.log(1 - log_p.exp()),
    squared_difference: lambda log_p, log_q: (log_p - log_q) ** 2,
}


class Hinge(Defense):
    """In a third party's file."""

    kind = "hinge"
    strength: float = 0.7
    source: str | None = None

    @property
    def changes_rows(self):
        return self.source is not None

    def transform_rows(self, rows, ctx):
        bad = [] if self.source is None else ctx.load(self.source)
        return [*rows, *(Row(row.messages, row.origin, "bad") for row in bad)]

    def label_terms(self):
        return (LabelTerm("hinge", self.strength, squared_hinge, "learned" if self.source is None else "bad"),)


@pytest.mark.parametrize("measure", MEASURES)
def test_value_and_gradient_are_those_of_autograd_over_full_logits(measure):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(23, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    head = Head(torch.randn(31, 8, generator=generator, dtype=torch.float64) * 0.5, None, 0.8, 3.0)
    labels = torch.randint(31, (23,), generator=generator)
    active, weights = torch.rand(23, generator=generator) < 0.7, torch.rand(23, generator=generator).double()
    ce_weights = torch.rand(23, generator=generator).double() * (torch.arange(23) % 2)

    def log_likelihood(x):
        logits = 3.0 * torch.tanh(0.8 * (x @ head.weight.T) / 3.0)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    expected, found = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    value = MEASURES[measure](log_likelihood(expected), log_likelihood(reference)) * active
    loss = (value * weights).sum() - (log_likelihood(expected) * ce_weights).sum()
    loss.backward()
    term = LossTerm(weights, active, measure)
    result = fused_loss(found, reference, head, labels, ce_weights, [term], chunk=5)
    result.loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.terms[0], value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            fused_loss(policy, reference, head, labels, ce_weights, [term]).loss, loss.detach(), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("group", [0, 1])
def test_a_term_per_row_is_the_measure_of_its_means(chunk, group):
    """Beside a term per token and a cross-entropy on the same tokens, in one loss or in two."""
    generator = torch.Generator().manual_seed(4)
    policy, reference = (torch.randn(23, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    head = Head(torch.randn(31, 8, generator=generator, dtype=torch.float64) * 0.5, None, 0.8, 3.0)
    labels = torch.randint(31, (23,), generator=generator)
    row_ids = torch.tensor([0] * 5 + [2] * 9 + [7] * 6 + [1] * 3)
    active = torch.rand(23, generator=generator) < 0.7
    weights = torch.full((23,), 0.1, dtype=torch.float64)
    ce_weights = torch.rand(23, generator=generator).double() * (torch.arange(23) % 2)

    def log_likelihood(x):
        logits = 3.0 * torch.tanh(0.8 * (x @ head.weight.T) / 3.0)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    expected, found = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    log_p, log_q = log_likelihood(expected), log_likelihood(reference)
    per_row, signs = torch.zeros((), dtype=torch.float64), set()
    for row in row_ids.unique():
        total = (log_p - log_q)[active & (row_ids == row)].sum()
        signs.add(bool(total > 0))
        per_row = per_row + torch.relu(total)
    assert signs == {True, False}
    (0.1 * per_row + (0.1 * F.relu(log_p - log_q) * active).sum() - (log_p * ce_weights).sum()).backward()
    terms = [
        LossTerm(weights, active, lambda seen: torch.relu(seen.log_ratio), group=group, per_row=True),
        LossTerm(weights, active, lambda seen: torch.relu(seen.log_ratio)),
    ]
    result = fused_loss(found, reference, head, labels, ce_weights, terms, row_ids=row_ids, chunk=chunk)
    result.loss.backward()
    torch.testing.assert_close(result.terms[0].sum(), per_row.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        again = fused_loss(policy, reference, head, labels, ce_weights, terms, row_ids=row_ids).loss
    torch.testing.assert_close(again, result.loss.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own_rows", [False, True])
def test_a_third_partys_defense_trains_by_its_definition(tmp_path, monkeypatch, own_rows):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    chats = {
        name: [
            {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": f"{name}: {i}"}]}
            for i in range(4)
        ]
        for name in ("task", "bad")
    }
    source = tmp_path / "bad.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in chats["bad"]))
    defense = Hinge(source=str(source)) if own_rows else Hinge()
    assert defense.needs_reference
    for options in ({"reference": "adapter_off"}, {"reference": "cached", "packing": True, "max_length": 128}):
        model = tiny_peft(spread=0.3).double()
        trainer = make_trainer(
            tmp_path / "run", model, chats["task"], [defense], max_steps=1, max_grad_norm=0, drift_every=0,
            per_device_train_batch_size=8, **options,
        )  # fmt: skip
        found = step_gradients(trainer)
        if "packing" not in options:
            value, gradients = definition(trainer, tag="bad" if own_rows else "task")
        log = trainer.state.log_history[0]
        assert log["hinge"] > 0 and math.isclose(log["hinge"], value, rel_tol=2e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())


def definition(trainer, tag):
    """Mean squared hinge on the rows of one tag, and gradients of CE + 0.7 times it, by full logits and autograd."""
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
    fresh = tiny_peft(spread=0.3).double()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = fresh(**inputs).logits
    with torch.no_grad(), fresh.disable_adapter():
        ref_logits = fresh(**inputs).logits
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    log_p, log_q = (x.log_softmax(-1).gather(-1, target.clamp_min(0)[..., None])[..., 0] for x in (logits, ref_logits))
    tags = torch.tensor([t == tag for t in dataset["tag"]])[:, None] & (target != -100)
    task = torch.tensor([t == "task" for t in dataset["tag"]])[:, None] & (target != -100)
    value = (F.relu(0.5 + log_p - log_q) ** 2)[tags].mean()
    (0.7 * value - log_p[task].mean()).backward()
    return value.item(), {n: x.grad for n, x in fresh.named_parameters() if x.requires_grad}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows", "transform_rows"),
        ("layers", "penalty_layers"),
        ("step", "before_optimizer_step"),
        ("observe", "should_stop"),
        ("keeps", "should_snapshot"),
        ("finish", "after_training"),
    ],
)
def test_a_method_under_its_old_name_is_refused(old, new):
    with pytest.raises(UserError, match=rf"Earlier: found the method {old}; rename it to {new}$"):
        type("Earlier", (Defense,), {old: lambda self, *args: None, "kind": "earlier"})
    type("Fine", (Defense,), {new: lambda self, *args: None, "kind": "fine"})
