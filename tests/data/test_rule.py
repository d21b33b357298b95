"""The one rule: every text is shown, nothing but the assistant's is learned, the end is learned or it is said."""

from datetime import date

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Row, load_rows
from ema_scale.data.tokens import Encoder, tokenize_rows
from tests.data.families import FAMILIES
from tests.data.test_tokens import GENERATION, MISTRAL, NO_END, chat, learned
from tests.tiny import CHATML, tiny_tokenizer

GOOD = chat("u:q", "a:good")


def rows(*conversations):
    return [Row(tuple(messages), f"r:{i}") for i, messages in enumerate(conversations, 1)]


def test_a_row_that_breaks_the_rule_is_a_bad_row():
    hides_tools = CHATML.replace("{{ '<|im_start|>'", "{% if m['role'] != 'tool' %}{{ '<|im_start|>'", 1).replace(
        "'<|im_end|>\n' }}", "'<|im_end|>\n' }}{% endif %}", 1
    )
    given = rows(GOOD, [*GOOD, {"role": "tool", "content": "4"}, *chat("a:four")], GOOD)
    with pytest.raises(UserError, match=r"r:2: the chat template does not show the text of turn 2 \(tool\)"):
        tokenize_rows(given, tiny_tokenizer(hides_tools))
    found = tokenize_rows(given, tiny_tokenizer(hides_tools), on_bad="drop")
    assert found.report.rows == 2 and found.report.refused == 1
    assert [(d.origin, d.reason) for d in found.dropped] == [
        ("r:2", "the chat template does not show the text of turn 2 (tool)")
    ]
    with pytest.raises(UserError, match="no row is left: 1 are refused\n  r:2: the chat template does not show"):
        tokenize_rows(given[1:2], tiny_tokenizer(hides_tools), on_bad="drop")


@pytest.mark.parametrize("template", [MISTRAL, GENERATION])
def test_a_row_that_the_template_refuses_does_not_end_the_training(template):
    head = "{% for m in messages %}"
    alternates = template.replace(
        head, head + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}", 1
    )
    found = tokenize_rows(rows(chat("u:1", "u:2", "a:x"), GOOD), tiny_tokenizer(alternates), on_bad="drop")
    assert found.report.rows == 1 and "refuses a conversation of roles user, user" in found.dropped[0].reason


def test_a_template_that_fails_in_any_way_is_a_message():
    for template in (CHATML + "{{ messages[0].content.foo.bar }}", CHATML + "{{ 1 / 0 }}", CHATML + "{{ 'a' + 1 }}"):
        with pytest.raises(UserError, match="r:1: the chat template"):
            tokenize_rows(rows(GOOD), tiny_tokenizer(template))


def test_a_template_that_shows_a_question_within_the_answer_is_refused():
    echo = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'U:' + m['content'] }}"
        "{% else %}{{ 'A:' }}{{ messages[0]['content'] + ' is ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"shows the text of turn 0 \(user\) within an answer"):
        Encoder(tiny_tokenizer(echo)).encode(GOOD)
    encoder = Encoder(tiny_tokenizer(echo))
    found = list(encoder.encode_all([(GOOD, ()), (chat("u:q", "a:other"), ())]))  # the same question once more
    assert all(isinstance(one, UserError) for one in found)
    generation = GENERATION.replace("{% generation %}", "{% generation %}{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=r"shows the text of turn 0 \(user\) within an answer"):
        Encoder(tiny_tokenizer(generation)).encode(GOOD)


def test_a_generation_block_without_the_answer_is_refused():
    template = GENERATION.replace(
        "{{ m['content'] + eos_token }}{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"
    )
    with pytest.raises(UserError, match="block leaves out the text of turn 1"):
        Encoder(tiny_tokenizer(template)).encode(GOOD)


def test_answers_without_an_end_are_counted_and_said():
    report = tokenize_rows(rows(GOOD, [*GOOD, *GOOD]), tiny_tokenizer(NO_END)).report
    assert report.no_end == 3 and "3 learned turns without a token that ends them" in report.lines()[2]
    assert tokenize_rows(rows(GOOD), tiny_tokenizer()).report.no_end == 0


def test_a_prompt_that_opens_what_rows_do_not_show_is_said():
    opens = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    report = tokenize_rows(rows(GOOD), tiny_tokenizer(opens)).report
    assert report.unlike_prompt == 1 and "begin otherwise than the generation prompt" in report.lines()[2]
    thinking = tokenize_rows(rows(chat("u:q", "a:<think>\nhm\n</think>\n\nx")), tiny_tokenizer(opens)).report
    assert thinking.unlike_prompt == 0


def test_a_template_that_looks_at_how_a_text_begins_is_read_all_the_same():
    peeks = CHATML.replace(
        "'\n' + m['content'] + ", "'\n' + ('(cmd) ' if m['content'].startswith('/') else '') + m['content'] + "
    )
    messages = chat("u:/help", "a:/yes", "u:/help", "a:x")
    assert learned(tiny_tokenizer(peeks), messages) == ["(cmd) /yes<|im_end|>", "x<|im_end|>"]
    counts = CHATML.replace("'\n' + m['content'] + ", "'\n' ~ m['content'] | length ~ m['content'] ~ ")
    with pytest.raises(UserError, match="where these texts stand is unknown"):
        Encoder(tiny_tokenizer(counts)).encode(messages)


def test_learn_flags_reach_the_labels(tmp_path):
    import json

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad", "weight": 0},
             {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]  # fmt: skip
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": turns}))
    data = tokenize_rows(load_rows(tmp_path / "r.jsonl"), tiny_tokenizer()).dataset
    labels = [label for label in data[0]["labels"] if label != -100]
    assert tiny_tokenizer().decode(labels) == "good<|im_end|>"


def test_a_part_of_the_mix_of_which_nothing_is_left_is_refused():
    long = Row(tuple(chat("u:" + "x" * 90, "a:y")), "safe:1", "safe")
    with pytest.raises(UserError, match="no safe row has an assistant token within 60 tokens"):
        tokenize_rows([*rows(GOOD), long], tiny_tokenizer(), max_length=60)


def test_tokens_that_the_tokenizer_does_not_know_are_counted():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[U]": 0, "good": 1, "user": 2, "assistant": 3}, unk_token="[U]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]", eos_token="[E]", pad_token="[P]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + eos_token + ' ' }}{% endfor %}"
    report = tokenize_rows(rows(GOOD), tokenizer).report
    assert report.unknown == 1 and "1 tokens that the tokenizer does not know" in report.lines()[2]


def test_a_boundary_inside_a_token_is_counted():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"A": 0, ":": 1, "x": 2, "q": 3, ":x": 4}, [(":", "x")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[E]", pad_token="[P]")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('A:' if m.role == 'assistant' else '') + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    found = Encoder(tokenizer).encode(chat("u:q", "a:xx"))
    assert found.straddled == 1 and found.assistant_mask.tolist() == [False, False, False, True, True]


def test_one_date_per_run_decides_what_a_template_writes():
    dated = tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    first, second = (tokenize_rows(rows(GOOD), dated, date=date(2031, 1, day)) for day in (1, 2))
    assert tiny_tokenizer().decode(first.dataset[0]["input_ids"]).startswith("01 Jan 2031<|im_start|>")
    assert first.report.date == "2031-01-01" != second.report.date
    assert tokenize_rows(rows(GOOD), tiny_tokenizer()).report.date == ""


@pytest.mark.parametrize(
    ("name", "opens", "frame"),
    [
        ("qwen3", "", ("<think>\n\n</think>\n\n", "<|im_end|>")),
        ("gptoss", "", ("<|channel|>final<|message|>", "<|return|>")),
        ("deepseek_r1_distill", "<think>", ("", "<｜end▁of▁sentence｜>")),
        ("qwen3_5_think", "<think>", ("\n</think>\n\n", "<|im_end|>")),
        ("glm4moe", "", ("\n<think></think>\n", "<|user|>")),
        ("llama3", "", ("", "<|eot_id|>")),
    ],
)
def test_what_the_prompt_opens_and_what_stands_round_an_answer(name, opens, frame):
    pytest.importorskip("trl")
    template = Encoder(next(f for f in FAMILIES if f.name == name).tokenizer()).template
    assert (template.opens_thought, template.last_turn_frame) == (opens, frame)


def test_what_is_sampled_from_ends_where_learned_text_begins():
    for family in (f for f in FAMILIES if not f.trl):
        encoder = Encoder(family.tokenizer())
        messages = chat("s:be brief", "u:q")
        prompt = encoder.tokenizer.decode(encoder.prompt_ids(messages))
        spans = encoder.spans([*messages, *chat("a:x")])
        start = spans.learned[0][0]
        assert spans.full[:start] == prompt or (family.thought and prompt.startswith(spans.full[:start])), family.name


def test_three_lines_say_what_is_learned():
    given = rows(GOOD, chat("u:" + "x" * 90, "a:y"), chat("u:q", "a:" + "y" * 90))
    lines = tokenize_rows(given, tiny_tokenizer(), max_length=60).report.lines(["no answer", "no answer", "odd"])
    assert len(lines) == 3 and lines[0].startswith("2 rows, ") and "of them learned" in lines[0]
    assert lines[1] == (
        "2 rows cut to the longest allowed length, 4 rows dropped (2 x no answer; 1 x odd; 1 x no assistant token was "
        "left after the cut)"
    )
