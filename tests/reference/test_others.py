"""References that are not the base model: another checkpoint, and the adapter that training goes on from."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from ema_scale.config.sections import AdapterRecipe, ModelRecipe, SeparateReference
from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, LDIFS
from ema_scale.models.lora import build_model, save_adapter
from ema_scale.recipe import build_recipe
from tests.reference.test_cached import assert_same_step, cache, one_step  # noqa: F401
from tests.tiny import save_tiny, tiny_tokenizer
from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def separate(path):
    return {"kind": "separate", "model": str(path)}


def test_a_separate_copy_of_the_base_equals_the_adapter_turned_off(tmp_path, base):
    expected = one_step(tmp_path, reference="adapter_off")
    for options in ({}, {"gradient_checkpointing": True}):
        step = one_step(tmp_path, reference=separate(base), **options)
        assert step[2].defended.reference.name == "separate"
        assert_same_step(expected, step)


def test_a_separate_model_is_put_in_place_once_and_for_an_evaluation_that_comes_first(tmp_path, base, monkeypatch):
    from ema_scale.reference.separate import Separate

    placed, before = [], Separate.forward
    prepare = Separate.prepare
    monkeypatch.setattr(
        Separate, "prepare", lambda self, accelerator: (placed.append(1), prepare(self, accelerator))[1]
    )

    def forward(self, *args, **kwargs):
        assert placed, "the model is on no device, and under ZeRO-3 and FSDP2 whole, yet"
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Separate, "forward", forward)
    rows = token_rows(4)
    trainer = make_trainer(tmp_path, tiny_peft(spread=0.3), rows, [KL(0.5)], reference=separate(base), max_steps=1)
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    trainer.evaluate(rows)
    (loss,) = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert placed == [1] and loss == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("way", ["adapter_off", "two_stream", "cached", "separate"])
def test_at_step_zero_no_way_finds_a_divergence_or_gives_it_a_gradient(tmp_path, base, way, request):
    request.getfixturevalue("cache")
    reference = separate(base) if way == "separate" else way
    exact = way in ("adapter_off", "two_stream")

    def first(*defenses, **options):
        trainer = make_trainer(
            tmp_path, tiny_peft(), token_rows(4), defenses, max_steps=1, max_grad_norm=0, drift_every=0, **options
        )
        return step_gradients(trainer), trainer.state.log_history[0]

    plain, _ = first()
    defended, row = first(KL(1.0), KL(1.0, "reference_policy"), KL(1.0, "jensen_shannon"), reference=reference)
    for name in ("kl", "kl_2", "kl_3"):
        assert row[name] == pytest.approx(0, abs=0 if exact else 1e-8)
    for name, gradient in plain.items():
        torch.testing.assert_close(defended[name], gradient, rtol=0, atol=0 if exact else 1e-6)


def test_another_model_with_a_head_and_a_width_of_its_own(tmp_path):
    """Against logits of both models and plain autograd."""
    from transformers import AutoModelForCausalLM

    path = save_tiny(tmp_path / "other", "gpt2", hidden=96, layers=1)
    rows = token_rows(4)
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3), rows, [KL(0.5)], reference=separate(path), max_steps=1, max_grad_norm=0
    )
    got = step_gradients(trainer)
    batch = trainer.data_collator([rows[i] for i in range(4)])
    policy, other = tiny_peft(spread=0.3), AutoModelForCausalLM.from_pretrained(path).eval()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = policy(**inputs).logits
    log_p, log_q = logits.log_softmax(-1), other(**inputs).logits.detach().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[batch["attention_mask"].bool()].mean()
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (ce + 0.5 * kl).backward()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(kl.item(), rel=1e-4) and kl > 0.01
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("mine", "other"), [(300, 280), (270, 300)])
def test_heads_that_pad_the_vocabulary_otherwise_are_compared_over_the_tokens_of_both(tmp_path, mine, other):
    """Cross-entropy over all of the policy's head; every direction, and a ceiling, over the shared rows."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    path = save_tiny(tmp_path / "other", vocab=other, seed=5)
    rows, shared = token_rows(4), min(mine, other)
    terms = [KL(0.5), KL(0.4, "reference_policy", 2.0), KL(0.3, "jensen_shannon", scope="prompt")]
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3, vocab=mine).double(), rows, terms, reference=separate(path), max_steps=1,
        max_grad_norm=0, drift_every=0,
    )  # fmt: skip
    trainer.defended.reference.model.double()
    got, row = step_gradients(trainer), trainer.state.log_history[0]
    batch = trainer.data_collator([rows[i] for i in range(4)])
    inputs, mask = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    policy = tiny_peft(spread=0.3, vocab=mine).double()
    logits = policy(**inputs).logits
    theirs = AutoModelForCausalLM.from_pretrained(path).double()(**inputs).logits.detach()[..., :shared]
    (p, q), (p2, q2) = (
        [(x / t).log_softmax(-1) for x in (logits[..., :shared], theirs)] for t in (1.0, 2.0)
    )  # fmt: skip
    labels = batch["labels"][:, 1:]
    prompts = F.pad(mask[:, 1:] & (labels == -100), (0, 1))
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    expected = {
        "ce": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()),
        "kl": (p.exp() * (p - q)).sum(-1)[mask].mean(),
        "kl_2": (q2.exp() * (q2 - p2)).sum(-1)[mask].mean(),
        "kl_3": 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))[prompts].mean(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-5) and value > 1e-3, name
    loss = sum(w * expected[name] for name, w in {"ce": 1, "kl": 0.5, "kl_2": 0.4, "kl_3": 0.3}.items())
    loss.backward()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_what_cannot_be_compared_is_refused(tmp_path, base):
    def made(path, *defenses):
        make_trainer(tmp_path, tiny_peft(), token_rows(4), defenses, reference=separate(path))

    other = save_tiny(tmp_path / "narrow", hidden=32)
    made(other)
    with pytest.raises(UserError, match="found hidden size 32 and 2 layers, expected 64 and 2"):
        made(other, LDIFS())
    with pytest.raises(UserError, match=r"reference.model: found a head over 250 tokens, expected the tokenizer's 260"):
        made(save_tiny(tmp_path / "short", vocab=250))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="has another tokenizer: for '<new>' found 260, expected nothing"):
        made(other)


def test_a_recipe_says_which(base):
    values = {"name": "x", "model": {"path": base}, "data": {"train": "rows.jsonl"}}
    recipe = build_recipe({**values, "reference": separate(base)})
    assert build_recipe(recipe.to_dict()) == recipe
    assert isinstance(recipe.reference, SeparateReference) and recipe.reference.model == base
    for wrong, message in [
        ("cache", "expected auto, adapter_off, two_stream, cached or {kind: separate"),
        ({"kind": "separate"}, "reference.model: missing"),
        ({"kind": "separate", "modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
    ]:
        with pytest.raises(UserError, match=message):
            build_recipe({**values, "reference": wrong})


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """An adapter that is far from the base."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    model = build_model(ModelRecipe(path=base, dtype="float32"), AdapterRecipe(r=4, alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    save_adapter(model, folder)
    return folder


def continued(base, tuned):
    return build_model(ModelRecipe(path=base, dtype="float32"), AdapterRecipe(start=str(tuned)))


def first_step(folder, model, way, **options):
    trainer = make_trainer(
        folder, model, token_rows(4), [KL(0.5), LDIFS(0.1, count=2)], reference=way, max_grad_norm=0, max_steps=2,
        learning_rate=0.05, **options,
    )  # fmt: skip
    gradients = step_gradients(trainer)
    return gradients, trainer.state.log_history[0], trainer


@pytest.mark.parametrize("way", ["adapter_off", "two_stream", "cached"])
def test_training_that_goes_on_from_an_adapter_starts_at_no_divergence(tmp_path, base, tuned, way, request):
    request.getfixturevalue("cache")
    _, log, trainer = first_step(tmp_path, continued(base, tuned), way)
    assert log["kl"] == pytest.approx(0, abs=1e-7) and log["ldifs"] == pytest.approx(0, abs=1e-7)
    assert trainer.state.log_history[1]["kl"] > 1e-4  # it does move, and from the adapter
    assert trainer.reference_choice.of == "the adapter that training goes on from"
    # With the base as the reference it would not be 0.
    assert one_step(tmp_path, reference="adapter_off")[1]["kl"] > 1e-3


def test_only_the_trained_copy_is_trained_and_saved(tmp_path, base, tuned):
    _, _, trainer = first_step(tmp_path, continued(base, tuned), "two_stream", gradient_checkpointing=True)
    trainer.save_model(str(tmp_path / "adapter"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir() if p.is_dir()) == []
    before, after = (load_file(f / "adapter_model.safetensors") for f in (tuned, tmp_path / "adapter"))
    assert before.keys() == after.keys()
    assert max((before[k] - after[k]).abs().max() for k in before) > 1e-3
    for name, parameter in trainer.model.named_parameters():
        if ".reference." in name:
            saved = before[name.replace(".reference.", ".")]
            assert torch.equal(parameter, saved) and not parameter.requires_grad


def test_an_adapter_that_is_not_there_or_of_another_model(tmp_path, base, tuned):
    with pytest.raises(UserError, match=r"adapter.start: .*found no .*adapter_model.safetensors"):
        continued(base, tmp_path)
    with pytest.raises(UserError, match=r"adapter.start: .*not the weights of this model: .* has the shape"):
        continued(save_tiny(tmp_path / "other", hidden=32), tuned)


def test_an_adapter_that_was_trained_before_and_is_held_to_the_base_is_told_about(tmp_path, base, tuned, caplog):
    from peft import PeftModel

    from tests.tiny import tiny_model

    def told(model, *defenses):
        caplog.clear()
        make_trainer(tmp_path, model, token_rows(4), defenses)
        return "the adapter was trained before, and the reference is the base model" in caplog.text

    assert told(PeftModel.from_pretrained(tiny_model(), tuned, is_trainable=True), KL())
    assert not told(PeftModel.from_pretrained(tiny_model(), tuned, is_trainable=True))  # nothing reads a reference
    assert not told(tiny_peft(), KL())
    assert not told(continued(base, tuned), KL())


def test_an_adapter_that_was_loaded_frozen_is_refused_for_training_alone(tmp_path, tuned):
    from peft import PeftModel

    from ema_scale import DefendedTrainer
    from tests.tiny import tiny_model

    frozen = PeftModel.from_pretrained(tiny_model(), tuned)
    with pytest.raises(UserError, match="adapter is frozen, so nothing would be trained; .*is_trainable=True"):
        make_trainer(tmp_path, frozen)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = DefendedTrainer(frozen, arguments, defenses=[KL(0.5)], processing_class=tiny_tokenizer())
    assert trainer.evaluate(token_rows(4))["eval_loss"] > 0


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_is_taken_out_of_the_base_is_refused(tmp_path, start):
    from peft import LoraConfig

    from tests.tiny import tiny_model

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
    with pytest.raises(UserError, match=f"init_lora_weights: '{start}' also changes the base weights"):
        make_trainer(tmp_path, tiny_model(), token_rows(4), [KL()], peft_config=config)
