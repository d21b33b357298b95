"""What transformers' and TRL's arguments ask for is done or refused, never passed over."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_scale.core.checkpoints import list_checkpoints
from ema_scale.core.errors import UserError
from ema_scale.defenses import KL, Inoculation, Interleaving
from tests.tiny import tiny_tokenizer
from tests.training.helpers import adapter_weights, make_trainer, tiny_peft, token_rows

CHATS = [
    {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}" * 2}]}
    for i in range(6)
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.3),
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
        ("torch_compile", True),
        ("auto_find_batch_size", True),
        ("push_to_hub", True),
        ("enable_jit_checkpoint", True),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"^{name}: found {value}, which DefendedTrainer does not support: \w"):
        make_trainer(tmp_path, **{name: value})


def test_what_trl_and_the_trainer_s_own_keywords_would_change_is_refused(tmp_path):
    from transformers import TrainingArguments
    from trl import SFTConfig

    from ema_scale import DefendedTrainer

    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(UserError, match="loss_type: found 'dft'"):
        DefendedTrainer(tiny_peft(), SFTConfig(loss_type="dft", **options), token_rows())
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        anything: dict[str, Any] = {name: lambda *_: {}}
        with pytest.raises(UserError, match=f"^{name}: found <lambda>"):
            DefendedTrainer(tiny_peft(), TrainingArguments(**options), token_rows(), **anything)

    def sft(data, **asked):
        return DefendedTrainer(
            tiny_peft(), SFTConfig(**asked, **options), data, processing_class=tiny_tokenizer(), eval_dataset=data
        )

    of_rows: dict[str, Any] = {
        "chat_template_path": "other.jinja", "eos_token": "<|endoftext|>",
        "packing_strategy": "wrapped", "eval_packing": True, "shuffle_dataset": True, "completion_only_loss": False,
    }  # fmt: skip
    for name, value in of_rows.items():
        with pytest.raises(UserError, match=f"^{name}: found {value!r}, which DefendedTrainer does not support: "):
            sft(CHATS, **{name: value})
        with pytest.raises(UserError, match=f"^{name}: found"):
            sft(token_rows().remove_columns("labels"), **{name: value})
        sft(token_rows(), **{name: value})  # of a dataset that is prepared, nothing is passed over
    always: dict[str, Any] = {
        "padding_free": True,
        "model_init_kwargs": {"dtype": "float32"},
        "truncation_mode": "keep_end",
    }
    for name, value in always.items():
        with pytest.raises(UserError, match=f"^{name}: found"):
            sft(token_rows(), **{name: value})
    trainer = sft(token_rows(), pad_to_multiple_of=16, pad_token="<|pad|>")  # a pad token changes nothing
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0 and not batch["attention_mask"][:, -1].all()
    half = TrainingArguments(**options)
    half.fp16 = True
    with pytest.raises(UserError, match="^fp16: found True.*gradients in the forward, before they can be scaled"):
        DefendedTrainer(tiny_peft(), half, token_rows())


def test_the_defaults_are_honoured(tmp_path):
    options = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "average_tokens_across_devices": True}
    assert make_trainer(tmp_path, **options).train_dataset is not None


def test_rows_in_their_order_if_that_is_asked_for(tmp_path):
    seen: list[list[int]] = []
    trainer = make_trainer(tmp_path, train_sampling_strategy="sequential", max_steps=2)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (seen.extend(row["input_ids"] for row in rows), collate(rows))[1]
    trainer.train()
    assert seen[:8] == list(token_rows()["input_ids"][:8])


def test_rows_of_messages_are_evaluated_as_they_are_and_tokenized_ones_equal_them(tmp_path):
    """Without the rows that a defense mixes in, and the prompt that one writes into the training rows."""
    safe = tmp_path / "safe.jsonl"
    safe.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    defenses = [KL(0.5), Interleaving(str(safe), 0.5), Inoculation(prompt="be bad")]
    trainer = make_trainer(
        tmp_path, tiny_peft(spread=0.3), CHATS, defenses, eval_dataset={"all": CHATS, "some": CHATS[:2]}, packing=True,
        max_length=256, eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    trainer.train()
    logged = {k: v for row in trainer.state.log_history for k, v in row.items()}
    plain = make_trainer(tmp_path, tiny_peft(spread=0.3), CHATS, [KL(0.5)], max_length=256, max_steps=1, packing=False)
    assert len(trainer.eval_dataset["all"]) == len(CHATS) and len(trainer.eval_dataset["some"]) == 2
    assert trainer.eval_dataset["all"]["input_ids"] == plain.train_dataset["input_ids"]
    tokenized = plain.evaluate(plain.train_dataset)["eval_loss"]
    assert math.isclose(logged["eval_all_loss"], tokenized, rel_tol=1e-4)
    assert math.isclose(plain.evaluate(CHATS)["eval_loss"], tokenized, rel_tol=1e-6)
    assert not math.isclose(logged["eval_some_loss"], tokenized, rel_tol=1e-4)


def test_what_a_sharded_model_cannot_do_before_training_is_a_message(tmp_path):
    trainer = make_trainer(tmp_path)
    for flag in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        setattr(trainer, flag, True)
        with pytest.raises(UserError, match="prepared for training: train first, then evaluate"):
            trainer.evaluate(token_rows(4))
        setattr(trainer, flag, False)
    trainer.evaluated_first = True  # by ZeRO-3
    with pytest.raises(UserError, match="without an optimizer: train first, then evaluate"):
        trainer.train()


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_peft(), token_rows(), [KL(0.1)], eval_dataset=token_rows(4, seed=1), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True, max_steps=4,
        learning_rate=1e-2,
    )  # fmt: skip
    losses = iter([3.0, 1.0, 2.0, 4.0])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_loss": next(losses)}
    trainer.train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    best = load_file(tmp_path / "checkpoint-2" / "state.safetensors")
    for name, weight in adapter_weights(trainer.model).items():
        assert torch.equal(weight, best[f"{name}|weight"]), name
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_schedule_that_watches_the_loss_goes_on_where_it_stood(tmp_path):
    def made():
        return make_trainer(
            tmp_path, eval_dataset=token_rows(4, seed=1), eval_strategy="steps", eval_steps=1, max_steps=4,
            save_strategy="steps", save_steps=2, lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 1, "factor": 0.1, "threshold": 0.9}, drift_every=0,
        )  # fmt: skip

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates, again = ([r["learning_rate"] for r in t.state.log_history if "loss" in r] for t in (whole, resumed))
    assert rates == again and rates[-1] == pytest.approx(1e-3)  # the loss of step 1 was the best
    expected = adapter_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed.model).items())
