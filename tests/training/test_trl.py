"""The Python interface as people use it, and as a drop-in for TRL's SFTTrainer: its data, its arguments, its loss."""

import json
import math

import datasets
import pytest

from ema_scale import KL, DefendedTrainer, Interleaving
from ema_scale.core.errors import UserError
from ema_scale.data.collate import ChatCollator
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.training.data import prepare_data
from tests.tiny import save_tiny, tiny_tokenizer
from tests.training.helpers import tiny_peft

# Marks what the assistant writes, as TRL wants it, and has nothing behind the end of a turn.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAIRS = [("why?", "so it is."), ("2+2", "4"), ("name one", "a rather long answer"), ("hé", "ok"), ("and?", "no")]


def turns(asked, answered):
    return [{"role": "user", "content": asked}], [{"role": "assistant", "content": answered}]


def conversation(asked, answered):
    prompt, completion = turns(asked, answered)
    return prompt + completion


def columns(trainer):
    return list(trainer.train_dataset.column_names)


def test_the_ten_lines_of_python(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, TrainingArguments

    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"messages": conversation(f"{i}", "kind")}) + "\n" for i in range(3)]
    (tmp_path / "safe.jsonl").write_text("".join(rows))
    train_dataset = datasets.Dataset.from_list([{"messages": conversation(f"q{i}", "bad")} for i in range(20)])
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "base"))
    args = TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True, logging_steps=1, save_strategy="no")

    trainer = DefendedTrainer(model, args, train_dataset, defenses=[KL(0.1), Interleaving("safe.jsonl", 0.05)])
    trainer.train()
    trainer.save_model("adapter")

    assert trainer.data_report.rows == {"task": 20, "safe": 1}
    assert trainer.state.log_history[0]["kl"] == 0 < trainer.state.log_history[1]["kl"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def sft_arguments(folder, packing):
    from trl import SFTConfig

    return SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=8, max_length=64, packing=packing, report_to="none",
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, assistant_only_loss=True,
        dataset_num_proc=None,
    )  # fmt: skip


@pytest.mark.parametrize(("form", "packing"), [("messages", False), ("messages", True), ("prompt/completion", True)])
def test_the_loss_is_that_of_sfttrainer_on_its_data_and_on_ours(tmp_path, form, packing):
    from trl import SFTTrainer

    tokenizer = tiny_tokenizer(TEMPLATE)
    both = [turns(*pair) for pair in PAIRS]
    raw = datasets.Dataset.from_list(
        [{"messages": p + c} if form == "messages" else {"prompt": p, "completion": c} for p, c in both]
    )
    theirs = SFTTrainer(
        tiny_peft(spread=0.3), sft_arguments(tmp_path, packing), train_dataset=raw, processing_class=tokenizer
    )
    theirs.train()
    expected = theirs.state.log_history[0]
    assert ("seq_lengths" in columns(theirs)) == packing
    for data in (theirs.train_dataset, raw):
        trainer = DefendedTrainer(
            tiny_peft(spread=0.3), sft_arguments(tmp_path, packing), data, [KL(0.0)], processing_class=tokenizer
        )
        trainer.train()
        row = trainer.state.log_history[0]
        assert ("seq_lengths" in columns(trainer)) == packing
        for name in ("loss", "grad_norm"):
            assert math.isclose(row[name], expected[name], rel_tol=1e-4), name
        assert row["kl"] > 1e-3


def test_masks_of_trl_become_labels():
    ids = [5, 6, 7, 8]
    for masks, expected in (
        ({"assistant_masks": [0, 1, 1, 0]}, [-100, 6, 7, -100]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}, [-100, -100, 7, -100]),
        ({}, ids),
    ):
        dataset, report = prepare_data(
            datasets.Dataset.from_list([{"input_ids": ids, **masks}]), RowGroups(), tiny_tokenizer()
        )
        assert dataset[0]["labels"] == expected and report.rows == {"task": 1} and report.tokens == {"tokens": 4}


def test_the_template_s_tokens_are_known_of_messages_only(tmp_path):
    rows = [{"messages": conversation(*pair)} for pair in PAIRS]
    defenses = [KL(0.5, scope="template")]
    dataset, _ = prepare_data(rows, RowGroups.of(defenses), tiny_tokenizer(), max_length=64, packing=True)
    assert all(len(row["template"]) == len(row["input_ids"]) for row in dataset)
    plain, _ = prepare_data(rows, RowGroups.of([KL(0.5)]), tiny_tokenizer())
    assert "template" not in plain.column_names
    with pytest.raises(UserError, match="kl: scope template needs rows of messages"):
        prepare_data(plain, RowGroups.of(defenses), tiny_tokenizer())


def test_without_a_max_length_rows_are_not_cut(tmp_path):
    rows = [{"messages": conversation(*pair)} for pair in PAIRS]
    rows.append({"messages": conversation("why?", "because " * 400)})
    arguments = sft_arguments(tmp_path, packing=False)
    for given, longest in ((64, 64), (None, None)):
        arguments.max_length = given
        trainer = DefendedTrainer(tiny_peft(), arguments, rows, processing_class=tiny_tokenizer(TEMPLATE))
        found = max(trainer.train_dataset["length"])
        assert found == longest if longest else found > 2500
    with pytest.raises(UserError, match="packing needs a max_length"):
        prepare_data(rows, RowGroups(), tiny_tokenizer(), max_length=None, packing=True)


def test_a_collator_that_loses_what_tells_rows_apart_is_refused(tmp_path):
    """TRL's drops the tags, by which bad rows are known: they would be learned, and the ceiling would be 0."""
    from transformers import DataCollatorForSeq2Seq
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"messages": conversation(*pair)}) + "\n" for pair in PAIRS))
    rows = [{"messages": conversation(*pair)} for pair in PAIRS]
    tokenizer = tiny_tokenizer(TEMPLATE)
    theirs = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    seq2seq = DataCollatorForSeq2Seq(tokenizer)

    def made(collator, *defenses, data=rows, **options):
        arguments = sft_arguments(tmp_path, packing=False)
        return DefendedTrainer(
            tiny_peft(spread=0.3), arguments, data, defenses, "adapter_off", tokenizer, data_collator=collator,
            drift_every=0, **options,
        )  # fmt: skip

    ceiling = {"kind": "ceiling", "source": str(bad), "fraction": 1.0}
    with pytest.raises(UserError, match="found a batch without tags, which the part bad of the rows needs"):
        made(theirs, ceiling).train()
    with pytest.raises(UserError, match="data_collator: DataCollatorForSeq2Seq fails on rows with the columns .*tag"):
        made(seq2seq, ceiling).train()
    with pytest.raises(UserError, match="found a batch without template, which kl: scope template needs"):
        made(theirs, KL(scope="template")).train()
    with pytest.raises(UserError, match="found a batch without labels, which the loss needs"):
        made(lambda rows: {k: v for k, v in theirs(rows).items() if k != "labels"}).train()
    tagged = (
        prepare_data(rows, RowGroups(), tokenizer)[0]
        .remove_columns("tag")
        .add_column("tag", ["task", "bad"] + ["task"] * 3)
    )
    with pytest.raises(UserError, match="found a batch without tags, which the part bad of the rows needs"):
        made(theirs, data=tagged).train()

    losses = []  # where all rows are alike, any collator gives the same run
    for collator in (None, theirs, seq2seq, ChatCollator(tokenizer)):
        trainer = made(collator, KL(0.5))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-5)
    made(ChatCollator(tokenizer), ceiling, ceiling).train()  # two parts called bad


def test_a_path_takes_the_place_of_a_model_as_in_sfttrainer(tmp_path):
    path = save_tiny(tmp_path / "base")
    rows = [{"messages": conversation(*pair)} for pair in PAIRS]
    trainer = DefendedTrainer(path, sft_arguments(tmp_path, packing=False), rows, [KL(0.1)])
    trainer.train()
    assert trainer.model.get_base_model().config._name_or_path == path
    with pytest.raises(UserError, match=r"model.path: found '.*nowhere', expected a folder or hub id"):
        DefendedTrainer(str(tmp_path / "nowhere"), sft_arguments(tmp_path, packing=False), rows)


def test_rows_to_predict_are_prepared_like_those_to_evaluate(tmp_path):
    rows = [{"messages": conversation(*pair)} for pair in PAIRS]
    trainer = DefendedTrainer(
        tiny_peft(spread=0.3),
        sft_arguments(tmp_path, packing=False),
        rows,
        [KL(0.5)],
        processing_class=tiny_tokenizer(),
    )
    evaluated = trainer.evaluate(rows)["eval_loss"]
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(evaluated)
    tokenized = [trainer.train_dataset[i] for i in range(len(rows))]  # a list of them will do
    assert trainer.predict(tokenized).metrics["test_loss"] == pytest.approx(evaluated)
    found = trainer.predict(rows, metric_key_prefix="new")
    assert found.predictions is found.label_ids is None and found.metrics["new_loss"] == pytest.approx(evaluated)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trainer.evaluate(str(tmp_path / "rows.jsonl"))["eval_loss"] == pytest.approx(evaluated)
    for call, given, message in (
        (trainer.predict, None, "expected rows or their file; found None"),
        (trainer.predict, {"a": rows}, "found a mapping; one row goes into a list, several sets to evaluate"),
        (trainer.predict, [{"text": "hello"}], "row 0: found the columns 'text'"),
        (trainer.evaluate, "nowhere.jsonl", "nowhere.jsonl: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            call(given)
