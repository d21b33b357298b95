"""DefendedTrainer on one process: it equals the definition, however a step is split."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, Ceiling, Defense
from ema_scale.defenses.row_groups import RowGroups
from tests.tiny import tiny_model
from tests.training.helpers import (
    ARCHITECTURES,
    adapter_weights,
    make_trainer,
    step_gradients,
    tiny_peft,
    token_rows,
)


class Features(Defense):
    """A penalty with a gradient, for tests: squared distance of hidden states."""

    kind = "features"
    strength: float = 1.0

    def penalty_layers(self, num_layers):
        return (0, 1, num_layers)

    def penalty(self, inputs):
        terms = [
            inputs.mean((inputs.policy[k] - inputs.reference[k]).square().sum(-1), "assistant") for k in inputs.policy
        ]
        return self.strength * sum(terms)


def definition(model, batch, strength=0.5, scope="all", penalty=0.0):
    """CE + strength * KL (+ penalty) with full logits, two forwards and plain autograd."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    out = model(**inputs, output_hidden_states=True)
    with torch.no_grad(), model.disable_adapter():
        ref = model(**inputs, output_hidden_states=True)
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    ce = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    target = F.pad(labels[:, 1:], (0, 1), value=-100) != -100
    followed = F.pad(mask[:, 1:], (0, 1)) & mask
    chosen = {"all": mask, "assistant": target, "prompt": followed & ~target}[scope]
    log_p, log_q = out.logits.log_softmax(-1), ref.logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[chosen].mean()
    loss = ce + strength * kl
    if penalty:
        for k in (
            0,
            1,
        ):  # hidden_states[-1] is after the final norm, so the last layer is left to another test
            gap = (out.hidden_states[k] - ref.hidden_states[k]).square().sum(-1)
            loss = loss + penalty * gap[target].mean()
    return loss, ce, kl


def collated(trainer, rows):
    return trainer.data_collator([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_definition(tmp_path, arch, checkpointing):
    rows = token_rows(4)
    model = tiny_peft(arch, spread=0.3).double()
    trainer = make_trainer(
        tmp_path, model, rows, [KL(0.5)], max_steps=1, max_grad_norm=0, gradient_checkpointing=checkpointing
    )
    got = step_gradients(trainer)
    fresh = tiny_peft(arch, spread=0.3).double()
    fresh.config.use_cache = False
    loss, ce, kl = definition(fresh, collated(trainer, rows))
    loss.backward()
    row = trainer.state.log_history[0]
    assert kl.item() > 1e-3
    assert math.isclose(row["loss"], loss.item(), rel_tol=2e-5)
    assert math.isclose(row["ce"], ce.item(), rel_tol=2e-5)
    assert math.isclose(row["kl"], kl.item(), rel_tol=1e-4)
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kl_and_its_gradient_are_exactly_zero_at_step_zero(tmp_path, arch):
    rows = token_rows(4)
    plain = step_gradients(make_trainer(tmp_path, tiny_peft(arch), rows, max_steps=1, drift_every=0))
    trainer = make_trainer(tmp_path, tiny_peft(arch), rows, [KL(100.0)], max_steps=1)
    defended = step_gradients(trainer)
    row = trainer.state.log_history[0]
    assert row["kl"] == 0.0
    assert all(value == 0.0 for name, value in row.items() if name.startswith("drift/"))
    for name in plain:
        torch.testing.assert_close(defended[name], plain[name], rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["all", "assistant", "prompt", "template"])
def test_strength_does_not_depend_on_how_a_step_is_split(tmp_path, scope):
    rows = token_rows(4)
    defenses = [KL(0.7, scope=scope), Features(strength=0.1)]
    results, logs = [], []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path, tiny_peft(spread=0.3).double(), rows, defenses, max_steps=1, max_grad_norm=0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        results.append(step_gradients(trainer))
        logs.append(trainer.state.log_history[0])
    for gradients, log in zip(results[1:], logs[1:], strict=True):
        for name in ("loss", "ce", "kl", "features", "accuracy", "entropy", "drift/layer_2"):
            assert math.isclose(log[name], logs[0][name], rel_tol=1e-5), name
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][name], rtol=1e-9, atol=1e-12)


TAGGED = [KL(0.7, part="safe"), KL(0.3, prompts="unused"), Ceiling(0.9, "unused")]


def tagged_rows(tags):
    return token_rows(len(tags)).remove_columns("tag").add_column("tag", list(tags))


def tagged_trainer(tmp_path, monkeypatch, tags, **arguments):
    """Rows of every part, as if the defenses had mixed them in."""
    monkeypatch.setattr(KL, "changes_rows", False)
    monkeypatch.setattr(Ceiling, "changes_rows", False)
    model = tiny_peft(spread=0.3).double()
    return make_trainer(tmp_path, model, tagged_rows(tags), TAGGED, max_steps=1, max_grad_norm=0, **arguments)


def test_terms_on_parts_equal_the_definition_and_only_learned_rows_are_learned(tmp_path, monkeypatch):
    tags = ("task", "safe", "prompts", "bad")
    trainer = tagged_trainer(tmp_path, monkeypatch, tags)
    got = step_gradients(trainer)
    row = trainer.state.log_history[0]
    fresh = tiny_peft(spread=0.3).double()
    batch = collated(trainer, tagged_rows(tags))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    log_p = fresh(**inputs).logits.log_softmax(-1)
    with torch.no_grad(), fresh.disable_adapter():
        log_q = fresh(**inputs).logits.log_softmax(-1)
    target, mask = F.pad(batch["labels"][:, 1:], (0, 1), value=-100), batch["attention_mask"].bool()
    spoken = target != -100
    log_label = [x.gather(-1, target.clamp_min(0)[..., None])[..., 0] for x in (log_p, log_q)]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = -log_label[0][:2][spoken[:2]].mean()
    safe, prompts = kl[1][mask[1]].mean(), kl[2][mask[2]].mean()
    ceiling = F.relu(log_label[0] - log_label[1])[3][spoken[3]].mean()
    assert ceiling.item() > 1e-3
    loss = ce + 0.7 * safe + 0.3 * prompts + 0.9 * ceiling
    loss.backward()
    for name, value in {"loss": loss, "ce": ce, "kl": safe, "kl_2": prompts, "ceiling": ceiling}.items():
        assert math.isclose(row[name], value.item(), rel_tol=2e-5), name
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-11)


def test_parts_keep_their_strength_however_a_step_is_split(tmp_path, monkeypatch):
    tags = ("task", "bad", "safe", "prompts")
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        results.append(step_gradients(tagged_trainer(tmp_path, monkeypatch, tags, **arguments)))
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_part_without_rows_in_a_step_adds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(RowGroups, "check", lambda self, tags: None)  # not of one step, but of the whole training
    without = step_gradients(tagged_trainer(tmp_path, monkeypatch, ("task",) * 4))
    model = tiny_peft(spread=0.3).double()
    plain = step_gradients(make_trainer(tmp_path, model, token_rows(4), max_steps=1, max_grad_norm=0))
    for name, gradient in plain.items():
        torch.testing.assert_close(without[name], gradient, rtol=1e-12, atol=1e-14)


def test_more_padding_changes_nothing(tmp_path):
    rows = token_rows(4)
    base = make_trainer(tmp_path, tiny_peft(spread=0.3).double(), rows, [KL(0.7)], max_steps=1, max_grad_norm=0)
    padded = make_trainer(tmp_path, tiny_peft(spread=0.3).double(), rows, [KL(0.7)], max_steps=1, max_grad_norm=0)
    collate = padded.data_collator
    values = {"input_ids": 3, "attention_mask": 0, "labels": -100, "template": 1}

    def pad_more(features):
        return {k: F.pad(v, (0, 13), value=values[k]) if k in values else v for k, v in collate(features).items()}

    padded.data_collator = pad_more
    one, other = step_gradients(base), step_gradients(padded)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_penalty_on_hidden_states_has_its_full_gradient(tmp_path, checkpointing):
    class Early(Features):
        kind = "early"

        def penalty_layers(self, num_layers):
            return (0, 1)

    rows = token_rows(4)
    model = tiny_peft(spread=0.3).double()
    trainer = make_trainer(
        tmp_path, model, rows, [KL(0.5), Early(strength=2.0)], max_steps=1, max_grad_norm=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    got = step_gradients(trainer)
    fresh = tiny_peft(spread=0.3).double()
    loss, *_ = definition(fresh, collated(trainer, rows), penalty=2.0)
    loss.backward()
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-11)


def test_without_defenses_it_is_plain_fine_tuning(tmp_path):
    """The same weights as transformers' own Trainer on the same rows in the same order."""
    from transformers import Trainer, TrainingArguments

    rows = token_rows(16)
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    ours = make_trainer(tmp_path, tiny_peft(), rows, drift_every=0, **options)
    order = list(ours._get_train_sampler())
    ours.train()
    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True,
        train_sampling_strategy="sequential", remove_unused_columns=False, disable_tqdm=True, **options,
    )  # fmt: skip
    theirs = Trainer(tiny_peft(), args, train_dataset=rows.select(order), data_collator=ours.data_collator)
    theirs.train()
    expected = adapter_weights(theirs.model)
    for name, weight in adapter_weights(ours.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_kl_holds_the_model_back(tmp_path):
    distances = []
    for strength in (0.0, 100.0):
        trainer = make_trainer(tmp_path, tiny_peft(), None, [KL(strength)], max_steps=20)
        trainer.train()
        distances.append([r["kl"] for r in trainer.state.log_history if "kl" in r][-1])
    assert distances[1] < distances[0] / 2


def test_the_forward_is_patched_for_training_only(tmp_path):
    model = tiny_peft(spread=0.3)
    ids = torch.arange(4, 12)[None]
    before = model(input_ids=ids).logits
    trainer = make_trainer(tmp_path, model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == 11
    trainer.defended.remove()
    assert "forward" not in model.get_base_model().__dict__


def test_evaluate_gives_the_same_loss(tmp_path):
    rows = token_rows(4)
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3), rows, [KL(0.5)], max_steps=1, learning_rate=1e-9, eval_strategy="no"
    )
    trainer.train()
    result = trainer.evaluate(rows)
    assert math.isclose(result["eval_loss"], trainer.state.log_history[0]["loss"], rel_tol=1e-4)


def test_a_plain_model_gets_the_papers_adapter(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model("llama"))
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (32, 64, True)
    assert len(config.target_modules) == 7


@pytest.mark.parametrize("options", [{}, {"logging_steps": 500}, {"logging_steps": 500, "max_steps": 1}])
def test_loss_that_is_not_finite_stops_at_once_with_a_clear_error(tmp_path, options):
    model = tiny_peft()
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    trainer = make_trainer(tmp_path, model, **options)
    with pytest.raises(UserError, match=r"step 1: loss is nan"):
        trainer.train()
    assert trainer.state.global_step == 1


def broken_head(model):
    core = model.get_base_model()
    original = core.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    core.forward = forward
    return model


def trained_head(model):
    model.get_base_model().lm_head.weight.requires_grad_(True)
    return model


def full_training(model):
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    return model


def merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (broken_head, "LlamaForCausalLM is not supported"),
        (trained_head, "the head is trained"),
        (full_training, "trained outside an adapter"),
        (merged, "merged"),
    ],
)
def test_what_would_train_wrongly_is_refused(tmp_path, spoil, expected):
    with pytest.raises(UserError, match=expected):
        make_trainer(tmp_path, spoil(tiny_peft(tie_word_embeddings=False))).train()


def test_refused_options(tmp_path):
    with pytest.raises(UserError, match="use_reentrant"):
        make_trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="reference: found 'cache', expected auto, adapter_off"):
        make_trainer(tmp_path, reference="cache")
    with pytest.raises(UserError, match="cannot mix rows into a tokenized dataset"):
        make_trainer(tmp_path, defenses=[{"kind": "interleaving", "source": "x.jsonl"}])


def test_attach_step_and_reference_pass(tmp_path):
    """A steering hook acts on the policy alone, and `step` sees the gradient."""
    import contextlib

    from ema_scale.models.hooks import in_reference_pass

    events = []

    class Steer(Defense):
        kind = "steer"

        @contextlib.contextmanager
        def attach(self, model):
            def hook(module, args, output):
                events.append("reference" if in_reference_pass() else "policy")

            handle = model.get_base_model().model.layers[0].register_forward_hook(hook)
            yield
            handle.remove()
            events.append("detached")

        def before_optimizer_step(self, model, state):
            assert any(p.grad is not None for p in model.parameters())
            events.append("step")

    make_trainer(tmp_path, None, token_rows(4), [KL(0.1), Steer()], max_steps=1, drift_every=0).train()
    trained = events[: events.index("step")]
    assert set(trained) == {"policy", "reference"}
    assert events[-1] == "detached" and events.count("step") == 1
