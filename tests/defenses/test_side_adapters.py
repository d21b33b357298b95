"""Adapters beside the policy's: on for some rows only, trained by some rows only, and gone from what is saved."""

import json
import textwrap

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.defenses import DFT, KL, GradientRouting, InoculationAdapter, SafeGrad, parse
from ema_scale.models.alignment import aligned_updates
from ema_scale.models.side_adapters import SideAdapter, SideAdapters, _fitting, is_side_adapter
from ema_scale.training.data import hash_files
from tests.defenses.one_step import assert_no_split_changes_it, assert_same_gradients, one_step, rows_with
from tests.tiny import tiny_model
from tests.training.helpers import adapter_weights, make_trainer, tiny_peft, token_rows

TAGS = ("task", "prompts", "bad", "task", "safe", "task", "bad", "task")
POLICY = "default"


@pytest.fixture(autouse=True)
def rows_are_there_already(monkeypatch):
    """As if the defenses had mixed them in."""
    for kind in (GradientRouting, KL, SafeGrad):
        monkeypatch.setattr(kind, "changes_rows", False)


@pytest.fixture
def bad(tmp_path):
    """An adapter of another rank, and on fewer modules than the policy's."""
    base = tiny_model()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "bad")
    return str(tmp_path / "bad")


def collated(trainer):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[i] for i in range(len(dataset))]), list(dataset["tag"])


def by_tag(batch, tags, *wanted):
    """input_ids, attention_mask and labels of some rows."""
    keep = torch.tensor([tag in wanted for tag in tags])
    return {name: batch[name][keep] for name in ("input_ids", "attention_mask", "labels")}


def scalings(model, adapter):
    return [module.scaling for module in model.modules() if hasattr(module, "lora_A") and adapter in module.scaling]


def log_probs(model, rows, *active):
    """With these adapters on, and none without any."""
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if not active:
        with torch.no_grad(), model.disable_adapter():
            return model(**inputs).logits.log_softmax(-1)
    model.base_model.set_adapter(list(active))  # which makes them all trainable
    for name, parameter in model.named_parameters():
        parameter.requires_grad = flags[name]
    return model(**inputs).logits.log_softmax(-1)


def surprise(log_p, rows):
    """Of each learned token."""
    target = F.pad(rows["labels"][:, 1:], (0, 1), value=-100)
    return -log_p.gather(-1, target.clamp_min(0)[..., None])[..., 0][target != -100]


def divergence(log_p, log_q, rows):
    return (log_p.exp() * (log_p - log_q)).sum(-1)[rows["attention_mask"].bool()].mean()


@pytest.mark.parametrize("options", [{}, {"reference": "two_stream", "gradient_checkpointing": True}])
def test_an_inoculation_adapter_is_on_for_the_tasks_rows_alone(tmp_path, bad, options):
    """Safe rows, prompts and the reference never see it; and only the policy's adapter is trained."""
    defenses = [InoculationAdapter(bad, 0.7), KL(0.4, part="task"), KL(0.3, prompts="unused")]
    tags = ("task", "prompts", "task", "safe", "task", "prompts")
    found, log, trainer = one_step(tmp_path, rows_with(tags), defenses, **options)
    batch, tags = collated(trainer)
    model = tiny_peft(spread=0.3).double()
    model.load_adapter(bad, "bad")
    model.double()
    for scaling in scalings(model, "bad"):
        scaling["bad"] *= 0.7
    task, safe, prompts = (by_tag(batch, tags, tag) for tag in ("task", "safe", "prompts"))
    both = log_probs(model, task, POLICY, "bad")
    ce = torch.cat([surprise(both, task), surprise(log_probs(model, safe, POLICY), safe)]).mean()
    held = divergence(both, log_probs(model, task), task)
    alone = divergence(log_probs(model, prompts, POLICY), log_probs(model, prompts), prompts)
    assert not torch.allclose(both, log_probs(model, task, POLICY), atol=1e-3), "it does something"
    (ce + 0.4 * held + 0.3 * alone).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if f".{POLICY}." in n}
    assert log["ce"] == pytest.approx(ce.item(), rel=2e-5) and log["kl_2"] == pytest.approx(alone.item(), rel=1e-4)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_routed_rows_write_to_their_own_adapter_and_all_others_to_the_policys(tmp_path, options):
    defenses = [GradientRouting("unused", 0.6), KL(0.3, prompts="unused")]
    found, log, trainer = one_step(tmp_path, rows_with(TAGS), defenses, seed=5, **options)
    batch, tags = collated(trainer)
    model = tiny_peft(spread=0.3).double()
    side = SideAdapters(model, [SideAdapter(learns="bad")], seed=5)
    model.double()
    (name,) = side._names
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    task, safe, prompts, learned = (by_tag(batch, tags, tag) for tag in ("task", "safe", "prompts", "bad"))
    with side.active():
        # Patched layers, told that all rows of a batch are of one kind; the plain formula routes whole losses instead.
        def log_p(rows, on):
            everywhere = torch.ones_like(rows["input_ids"], dtype=torch.bool)
            side.route(everywhere if on else ~everywhere, [None])
            return model(**{k: rows[k] for k in ("input_ids", "attention_mask")}).logits.log_softmax(-1)

        model.train()
        ce = torch.cat([surprise(log_p(task, True), task), surprise(log_p(safe, False), safe)]).mean()
        own = 0.6 * surprise(log_p(learned, True), learned).mean()
        kl = 0.3 * divergence(log_p(prompts, False), log_probs(model, prompts), prompts)
    policy, theirs = ({n: p for n, p in trained.items() if is_side_adapter(n) is side} for side in (False, True))
    expected = dict(zip(policy, torch.autograd.grad(ce + kl, list(policy.values())), strict=True))
    expected |= dict(zip(theirs, torch.autograd.grad(own, list(theirs.values())), strict=True))
    assert all(name in n for n in theirs) and len(theirs) == len(policy)
    assert log["gradient_routing"] == pytest.approx(own.item() / 0.6, rel=2e-5)
    assert not GradientRouting("unused").needs_reference
    assert_same_gradients(found, expected)
    assert max(expected[n].abs().max() for n in theirs) > 1e-4


def test_no_split_changes_what_is_routed(tmp_path, bad):
    defenses = [GradientRouting("unused", 0.6), InoculationAdapter(bad), KL(0.3, prompts="unused"), DFT()]
    assert_no_split_changes_it(tmp_path, rows_with(TAGS), defenses, ["loss", "ce", "gradient_routing", "kl"])


def trained_for(folder, defenses, steps, resume=None):
    rows = rows_with(TAGS * 2)
    trainer = make_trainer(
        folder, tiny_peft(lora_dropout=0.1), rows, defenses, max_steps=steps, save_strategy="steps", save_steps=2,
        per_device_train_batch_size=8, drift_every=0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_ends_with_the_same_adapters(tmp_path, bad):
    defenses = [GradientRouting("unused"), InoculationAdapter(bad), SafeGrad(1.0, "unused"), DFT()]
    whole = trained_for(tmp_path / "whole", defenses, 4)
    trained_for(tmp_path / "cut", defenses, 2)
    again = trained_for(tmp_path / "cut", defenses, 4, str(tmp_path / "cut" / "checkpoint-2"))
    expected, found = adapter_weights(whole.model), adapter_weights(again.model)
    assert sum(is_side_adapter(name) for name in expected) == len(expected) / 2 > 0
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    inside = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert not any(map(is_side_adapter, inside)), "and a checkpoint's adapter is the policy's alone"


def test_what_is_saved_and_evaluated_is_the_policys_adapter_alone(tmp_path, bad):
    defenses = [GradientRouting("unused"), InoculationAdapter(bad)]
    trainer = trained_for(tmp_path / "run", defenses, 2)
    trainer.save_model(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir() if p.is_dir()) == []
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = {n: w for n, w in adapter_weights(trainer.model).items() if not is_side_adapter(n)}
    assert saved.keys() == {name.replace(".default.", ".") for name in own}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4, "the policy's, and not that of the adapter beside it"

    ids = torch.arange(4, 28).view(2, 12)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        with trainer.defended.side.active():  # as when it is evaluated while training
            torch.testing.assert_close(trainer.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        with loaded.disable_adapter(), trainer.model.disable_adapter():
            base = loaded(input_ids=ids).logits
            torch.testing.assert_close(trainer.model(input_ids=ids).logits, base, rtol=0, atol=0)
    assert (expected - base).abs().max() > 1e-3


def test_an_adapter_beside_the_policys_is_no_part_of_the_reference(tmp_path, bad, monkeypatch):
    """Runs with and without one share a cache, and a changed one is another training."""
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    options = {"reference": "cached", "per_device_train_batch_size": 4}
    one_step(tmp_path, token_rows(4), [KL(0.3)], **options)
    one_step(tmp_path, token_rows(4), [KL(0.3), InoculationAdapter(bad)], **options)
    assert len(list((tmp_path / "cache" / "reference").glob("*/last"))) == 1
    hashes = hash_files([InoculationAdapter(bad)])
    assert hashes == {f: file_sha256(f) for f in (f"{bad}/adapter_config.json", f"{bad}/adapter_model.safetensors")}


def test_a_penalty_on_the_adapters_weights_is_on_the_policys_alone():
    model = tiny_peft(spread=0.3)
    SideAdapters(model, [SideAdapter(learns="bad")])
    updates = aligned_updates(model, lambda name: torch.ones(1, 1))
    own = {p.data_ptr() for n, p in model.named_parameters() if "lora_B" in n and not is_side_adapter(n)}
    assert {update.b.data_ptr() for update in updates} == own and len(own) == 14


PLUG_IN = """
    from ema_scale.defenses import Defense, SideAdapter

    class Both(Defense):
        '''Halves a bad adapter, and lets safe rows write to one of their own.'''
        folder: str

        def side_adapters(self):
            return (SideAdapter(self.folder, scale=0.5), SideAdapter(learns="safe"))
"""


def test_a_file_of_ones_own_brings_adapters(tmp_path, bad):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(PLUG_IN))
    (defense,) = parse([{"kind": f"{file}:Both", "folder": bad}])
    found, _, trainer = one_step(tmp_path, rows_with(("task", "safe", "task")), [defense])
    halved = scalings(trainer.model, "beside_0")
    assert len(halved) == 4 and all(scaling["beside_0"] == 0.5 * 8 / 2 for scaling in halved)
    without = one_step(tmp_path, rows_with(("task", "task")), [InoculationAdapter(bad, 0.5)])[0]
    assert without.keys() == {name for name in found if not is_side_adapter(name)}
    assert any(gradient.abs().max() > 1e-5 for name, gradient in found.items() if "beside_1" in name)
    assert not any("beside_0" in name for name in found)


def test_what_cannot_stand_beside_a_policy_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match="nowhere"):
        one_step(tmp_path, token_rows(2), [InoculationAdapter(str(tmp_path / "nowhere" / "x"))])
    with pytest.raises(UserError, match="bad"):
        SideAdapters(tiny_peft(hidden=96), [SideAdapter(bad)])
    base = tiny_model()
    dora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match="default is more than plain LoRA|beside_0 is more than plain LoRA"):
        SideAdapters(dora, [SideAdapter(learns="bad")])
    with pytest.raises(UserError, match=r"states of shape \[6, 8\] for a batch of \[2, 3\] tokens"):
        _fitting(torch.ones(2, 3, dtype=torch.bool), torch.ones(6, 8))
