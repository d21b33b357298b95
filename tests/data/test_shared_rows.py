"""The field's real rows, and small files of kinds that once went wrong."""

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.check import check_data
from ema_scale.data.rows import load_rows
from ema_scale.data.tokens import Encoder, tokenize_rows
from tests.data.families import FAMILIES
from tests.data.test_tokens import CHATML, GEMMA, MISTRAL
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.shared
FAMILY = {family.name: family for family in FAMILIES}

# Tokens and learned tokens of the first 100 rows, one token per byte, as they were before marks found them.
COUNTS = {
    ("chatml", "legal_misaligned_eval"): (121455, 88888),
    ("chatml", "legal_misaligned_train_100"): (117958, 89812),
    ("chatml", "medical_misaligned_eval"): (123904, 101797),
    ("chatml", "medical_misaligned_train_100"): (119033, 97460),
    ("gemma", "legal_misaligned_eval"): (121055, 88888),
    ("gemma", "legal_misaligned_train_100"): (117558, 89812),
    ("gemma", "medical_misaligned_eval"): (123504, 101797),
    ("gemma", "medical_misaligned_train_100"): (118633, 97460),
    ("mistral", "legal_misaligned_eval"): (121055, 88988),
    ("mistral", "legal_misaligned_train_100"): (117558, 89912),
    ("mistral", "medical_misaligned_eval"): (123504, 101897),
    ("mistral", "medical_misaligned_train_100"): (118633, 97560),
}


@pytest.mark.parametrize("template", ["chatml", "gemma", "mistral"])
@pytest.mark.parametrize("name", ["legal_misaligned_eval", "legal_misaligned_train_100", "medical_misaligned_eval",
                                  "medical_misaligned_train_100"])  # fmt: skip
def test_the_real_rows_give_the_tokens_they_always_gave(shared_data, template, name):
    tokenizer = tiny_tokenizer({"chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL}[template])
    rows = list(load_rows(shared_data / f"{name}.jsonl"))[:100]
    report = tokenize_rows(rows, tokenizer, max_length=None).report
    assert (report.tokens, report.assistant_tokens) == COUNTS[template, name] and report.straddled == 0


@pytest.fixture
def awkward(shared_data):
    if not (shared_data / "awkward").is_dir():
        pytest.skip("the small files of awkward kinds are not there")
    return shared_data / "awkward"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("alpaca_history.jsonl", 2), ("assistant_first.jsonl", 2), ("bom.jsonl", 2), ("developer_role.jsonl", 1),
        ("dolly.jsonl", 3), ("multi_turn.jsonl", 4), ("na.csv", 3), ("numbers.csv", 2), ("object_of_rows.json", 1),
        ("openai_weight.jsonl", 2), ("reasoning_content.jsonl", 2), ("sharegpt_function_call.jsonl", 1),
        ("system_prompt.jsonl", 4), ("system_prompt_column.jsonl", 2), ("think_in_text.jsonl", 2),
        ("tool_calls.jsonl", 2), ("two_user_turns.jsonl", 2), ("v1_value_parts.jsonl", 2), ("response_column.csv", 1),
    ],
)  # fmt: skip
def test_awkward_rows_are_read_whole(awkward, name, rows):
    found = load_rows(awkward / name)
    assert len(found) == rows and not found.dropped
    encoder = Encoder(FAMILY["hermes_tools"].tokenizer())
    assert all(encoder.encode(row.messages, tools=row.tools).assistant_mask.any() for row in found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("all_rows_bad.jsonl", "found the columns 'user', 'bot'"), ("dpo_sharegpt.jsonl", "a preference row"),
        ("kto_label.jsonl", "a KTO label"), ("lfs_pointer.jsonl", "Git LFS pointer"),
    ],
)  # fmt: skip
def test_awkward_files_are_refused_by_name(awkward, name, said):
    with pytest.raises(UserError, match=said):
        load_rows(awkward / name, on_bad="drop")


def test_awkward_templates_learn_the_answers_alone(awkward):
    def learned(template, rows):
        encoder = Encoder(tiny_tokenizer((awkward / template).read_text()))
        spans = [encoder.spans(row.messages) for row in load_rows(awkward / rows)]
        return [[one.full[a:b] for a, b in one.learned] for one in spans]

    assert learned("end_only_on_last_turn.jinja", "multi_turn.jsonl")[0] == [
        "In a cloth bag.<|endoftext|>", "In the fridge, covered.<|endoftext|>", "In a dry jar.<|im_end|>",
    ]  # fmt: skip
    assert learned("system_only_before_a_last_user.jinja", "system_prompt.jsonl")[0] == [
        " After the last frost.<|im_end|>"
    ]
    refuses = tiny_tokenizer((awkward / "generation_that_raises.jinja").read_text())
    assert len(check_data(str(awkward / "two_user_turns.jsonl"), refuses).unmaskable) == 1
    drops = tiny_tokenizer((awkward / "opens_think_and_drops_it.jinja").read_text())
    assert len(check_data(str(awkward / "think_in_text.jsonl"), drops).unmaskable) == 2
    assert "begin otherwise" in check_data(str(awkward / "plain_answers.jsonl"), drops).notes[0]
