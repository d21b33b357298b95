"""Each defense looks at the rows that it brought in, and at no other's: in value, gradient and what is logged."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row
from ema_scale.defenses import KL, Ceiling, Defense, Divergence, EarlyStopping, Interleaving, RowsContext
from ema_scale.defenses.registry import parse
from ema_scale.defenses.row_groups import RowGroups, token_sets
from tests.training.helpers import make_trainer, step_gradients, tiny_peft


def chat(text, answer="answer"):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{answer} to {text}"}]}


@pytest.fixture
def write(tmp_path):
    def write(name, count=3, **turns):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(chat(f"{name} {i}", **turns)) + "\n" for i in range(count)))
        return str(path)

    return write


class Near(Defense):
    """A penalty on rows of its own, called bad like the ceiling's."""

    kind = "near"
    source: str

    def transform_rows(self, rows, ctx):
        return [*rows, *(Row(row.messages, row.origin, "bad") for row in ctx.load(self.source))]

    def penalty_layers(self, num_layers):
        return (1,)

    def penalty(self, inputs):
        return inputs.mean((inputs.policy[1] - inputs.reference[1]).square().sum(-1), "assistant", "bad")


def definition(trainer, terms):
    """CE on the task's rows and strength * a mean over the rows of one part for each term, by full logits and autograd;
    returns values by name and gradients."""
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
    tags = dataset["tag"]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    fresh = tiny_peft(spread=0.3).double()
    out = fresh(**inputs, output_hidden_states=True)
    with torch.no_grad(), fresh.disable_adapter():
        ref = fresh(**inputs, output_hidden_states=True)
    log_p, log_q = out.logits.log_softmax(-1), ref.logits.log_softmax(-1)
    target, mask = F.pad(batch["labels"][:, 1:], (0, 1), value=-100), batch["attention_mask"].bool()
    p, q = (x.gather(-1, target.clamp_min(0)[..., None])[..., 0] for x in (log_p, log_q))
    measures = {
        "ce": (-p, target != -100),
        "kl": ((log_p.exp() * (log_p - log_q)).sum(-1), mask),
        "ceiling": (F.relu(p - q), target != -100),
        "near": ((out.hidden_states[1] - ref.hidden_states[1]).square().sum(-1), target != -100),
    }
    values, loss = {}, torch.zeros((), dtype=torch.float64)
    for name, (strength, measure, tag) in {"ce": (1.0, "ce", "task"), **terms}.items():
        value, where = measures[measure]
        rows = torch.tensor([t == tag for t in tags])
        assert rows.any(), tag
        values[name] = value[where & rows[:, None]].mean()
        loss = loss + strength * values[name]
    loss.backward()
    return values, {n: x.grad for n, x in fresh.named_parameters() if x.requires_grad}


CASES: dict[str, tuple[Callable[..., list[Defense]], dict[str, Any], dict[str, int]]] = {
    "ceiling beside a probe": (
        lambda w: [Ceiling(0.9, w("bad"), 1.0), EarlyStopping("probe", 99.0, w("probe", answer="no"), 1.0)],
        {"ceiling": (0.9, "ceiling", "bad"), "early_stopping_probe": (0.0, "ceiling", "bad_2")},
        {"task": 3, "bad": 3, "bad_2": 3},
    ),
    "a probe before two ceilings": (
        lambda w: [EarlyStopping("probe", 99.0, w("probe"), 1.0), Ceiling(0.9, w("a"), 1.0), Ceiling(0.2, w("b"), 1.0)],
        {"early_stopping_probe": (0.0, "ceiling", "bad"), "ceiling": (0.9, "ceiling", "bad_2"),
         "ceiling_2": (0.2, "ceiling", "bad_3")},
        {"task": 3, "bad": 3, "bad_2": 3, "bad_3": 3},
    ),
    "two sets of prompts": (
        lambda w: [KL(0.7, prompts=w("one"), fraction=1.0), KL(0.2, prompts=w("two", 2), fraction=0.7)],
        {"kl": (0.7, "kl", "prompts"), "kl_2": (0.2, "kl", "prompts_2")},
        {"task": 3, "prompts": 3, "prompts_2": 2},
    ),
    "a penalty of another package": (
        lambda w: [Ceiling(0.9, w("bad"), 1.0), Near(source=w("far"))],
        {"ceiling": (0.9, "ceiling", "bad"), "near": (1.0, "near", "bad_2")},
        {"task": 3, "bad": 3, "bad_2": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_defense_looks_at_its_own_rows(case, write, tmp_path):
    make, terms, counts = CASES[case]
    defenses, task = make(write), [chat(f"task {i}") for i in range(3)]
    found = []
    for options in ({}, {"packing": True, "max_length": 128}, {"reference": "cached"}):
        model = tiny_peft(spread=0.3).double()
        trainer = make_trainer(
            tmp_path / "run", model, task, defenses, max_steps=1, max_grad_norm=0, per_device_train_batch_size=16,
            **options,
        )  # fmt: skip
        assert trainer.data_report.rows == counts
        if not options:
            values, gradients = definition(trainer, terms)
        found.append(step_gradients(trainer))
        log = trainer.state.log_history[0]
        for name, value in values.items():
            assert math.isclose(log[name], value.item(), rel_tol=2e-5), name
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[-1][name], gradient, rtol=1e-7, atol=1e-10)
    assert len({round(v.item(), 9) for v in values.values()}) == len(values)  # one for another would be seen


def test_one_defense_of_a_kind_keeps_the_plain_names():
    parts = RowGroups.of([Interleaving("x"), KL(0.1, prompts="y"), Ceiling(1.0, "z")])
    assert parts.tags == ("task", "safe", "prompts", "bad") and parts.token_sets == token_sets()
    assert parts.separate_tags == {"prompts", "bad"} and RowGroups.of([KL(part="safe")]).separate_tags == {"safe"}
    assert RowGroups.of([KL(0.1), Interleaving("x")]).separate_tags == set()


def test_rows_that_nobody_looks_at_are_an_error(write):
    class Idle(Near):
        kind = "idle"

        def divergences(self):
            return (Divergence("idle", 0.0, part="prompts"),)

        penalty = Defense.penalty  # type: ignore[pydantic-field]  # a method, and no field

    with pytest.raises(UserError, match="idle: brings rows of the part bad, but none of its terms"):
        RowGroups.of([Idle(source=write("x"))]).transform_rows([Row(())], RowsContext())


def test_a_term_on_rows_that_are_not_there_is_an_error(tmp_path, write):
    """It would be 0 throughout, and the run an undefended one."""
    rows = [{"prompt": f"task {i}?", "completion": "answer 1"} for i in range(8)]
    with pytest.raises(UserError, match=r"kl: looks at safe rows, and there are none; mix some in \(interleaving\)"):
        make_trainer(tmp_path, tiny_peft(), rows, [KL(1.0, part="safe")])
    mixed = [KL(1.0, part="safe"), Interleaving(write("safe"), 0.5)]
    trainer = make_trainer(tmp_path, tiny_peft(), rows, mixed, eval_dataset=rows)
    assert trainer.data_report.rows == {"task": 8, "safe": 4}
    with pytest.raises(UserError, match=r"defenses.0: give prompts, which are a part of their own, or part, not both"):
        parse([{"kind": "kl", "part": "safe", "prompts": "x.jsonl"}])
    with pytest.raises(UserError, match="ceiling: source: found an empty list"):
        Ceiling(1.0, []).transform_rows([Row(())], RowsContext())


def test_prompts_need_no_answers_where_none_are_separate_tags(tmp_path):
    path = tmp_path / "prompts.jsonl"
    asked = [{"messages": [{"role": "user", "content": "how?"}]}, {"prompt": "why?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    task = [chat(f"task {i}") for i in range(4)]
    for scope in ("all", "prompt", "template"):
        defense = KL(0.5, prompts=str(path), fraction=0.5, scope=scope)
        trainer = make_trainer(
            tmp_path / "run", tiny_peft(spread=0.3), task, [defense], max_steps=1, per_device_train_batch_size=8
        )
        assert trainer.data_report.rows == {"task": 4, "prompts": 2}
        ends = [trainer.processing_class.decode(r["input_ids"]) for r in trainer.train_dataset if r["tag"] != "task"]
        assert all(text.endswith("?<|im_end|>\n<|im_start|>assistant\n") for text in ends)
        trainer.train()
        assert trainer.state.log_history[0]["kl"] > 1e-3
    with pytest.raises(UserError, match="found no assistant turn"):
        make_trainer(tmp_path / "run", None, task, [KL(0.5, prompts=str(path), scope="assistant")])
