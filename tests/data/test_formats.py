"""Kinds of rows: carried through whole, or refused by name."""

import pytest

from ema_scale.data.formats import to_conversation
from ema_scale.data.values import BadRow

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "completion": "a"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def turns(record, **options):
    return [(m["role"], m["content"]) for m in to_conversation(record, **options).messages]


def learned(record, **options):
    messages = to_conversation(record, **options).messages
    return [m["content"] for m in messages if m["role"] == "assistant" and m.get("learn", True)]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "response": "a"},
        {"instruction": "q", "context": "", "response": "a", "category": "open"},
        {"question": "q", "response": "a"},
        {"context": "q", "response": "a"},
        {"user": "q", "assistant": "a"},
        {"query": "q", "response": "a"},
        [USER, ANSWER],
        SHAREGPT,
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, ANSWER]},
        {"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": ["a"]}]},
    ],
)
def test_the_field_s_names_for_a_question_and_its_answer(record):
    assert turns(record) == [("user", "q"), ("assistant", "a")]


def test_any_names_can_be_mapped_and_columns_passed_over():
    record = {"ask": "q", "reply": "a", "chosen": "x"}
    assert turns(record, columns={"ask": "prompt", "reply": "completion", "chosen": None}) == [
        ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    with pytest.raises(BadRow, match="two columns become 'prompt'"):
        to_conversation({"prompt": "q", "ask": "q"}, {"ask": "prompt"})


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_beside_the_turns(column):
    for record in (PAIR, {"conversations": SHAREGPT}, {"instruction": "q", "output": "a"}):
        assert turns({**record, column: "be brief"})[0] == ("system", "be brief")
        assert turns({**record, column: ""})[0] == ("user", "q")
    there = {"messages": [{"role": "system", "content": "be brief"}, USER, ANSWER], column: "be brief"}
    assert [role for role, _ in turns(there)] == ["system", "user", "assistant"]


def test_two_different_system_prompts_are_refused():
    with pytest.raises(BadRow, match="different system prompts in system and system_prompt"):
        to_conversation({**PAIR, "system": "one", "system_prompt": "two"})


def test_history_comes_before_the_question():
    record = {"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": "s"}
    said = ["s", "q0", "a0", "q", "a"]
    assert [text for _, text in turns(record)] == said
    assert [text for _, text in turns({**record, "history": '[["q0", "a0"]]'})] == said
    with pytest.raises(BadRow, match="history.0"):
        to_conversation({**record, "history": ["q0"]})
    with pytest.raises(BadRow, match="history: found 1, expected a list"):
        to_conversation({**record, "history": 1})
    with pytest.raises(BadRow, match="history beside a whole conversation"):
        to_conversation({"messages": [USER, ANSWER], "history": [["q0", "a0"]]})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, r"a preference row \(chosen, rejected\)"),
        ({"rejected_response": "b"}, r"a preference row \(rejected_response\)"),
        ({"label": False}, "a KTO label"),
        ({"label": True}, "a KTO label"),
        ({"label": "False"}, "a KTO label"),
        ({"kto_tag": True}, "a KTO label"),
        ({"images": ["x.png"]}, "images: found .*only text"),
        ({"audio": "x.wav"}, "audio: found .*only text"),
        ({"videos": [1]}, "videos: found .*only text"),
    ],
)
def test_rows_that_are_no_answers_to_learn_are_refused_by_name(more, said):
    for record in (PAIR, {"conversations": SHAREGPT}, {"messages": [USER, ANSWER]}):
        with pytest.raises(BadRow, match=said):
            to_conversation({**record, **more})


def test_a_label_that_is_no_truth_value_is_only_unread():
    assert to_conversation({**PAIR, "label": "cooking", "images": [], "topic": "x"}).unread == ("label", "topic")


def test_keys_that_nothing_reads_are_named():
    record = {"messages": [USER | {"emotion": "sad"}, ANSWER | {"weight": 1, "name": "x"}], "id": 3, "tools": []}
    assert to_conversation(record).unread == ("id", "messages.emotion")


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight", "loss_mask", "learn"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), ("false", "true")])
def test_turns_that_are_not_to_be_learned_are_not(key, no, yes):
    record = {"messages": [USER, ANSWER | {"content": "wrong", key: no}, USER, ANSWER | {key: yes}, USER, ANSWER]}
    assert learned(record) == ["a", "a"]
    assert learned(record, learn="marked") == ["a"]
    assert learned(record, learn="last") == ["a"]
    assert learned({"messages": [USER, ANSWER, USER, ANSWER | {"content": "b"}]}, learn="last") == ["b"]


@pytest.mark.parametrize(
    ("messages", "learn", "said"),
    [
        ([USER, ANSWER | {"weight": 0}], "all", "only assistant turns that are marked not to be learned"),
        ([USER, ANSWER], "marked", "no assistant turn that is marked"),
        ([USER, ANSWER, USER, ANSWER | {"train": False}], "last", "marked not to be learned"),
        ([USER, ANSWER | {"weight": 0.5}], "all", "weight: found 0.5, expected 0 or 1"),
        ([USER, ANSWER | {"weight": 0, "train": True}], "all", "contradict"),
        ([USER | {"train": True}, ANSWER], "all", "found a turn of user to be learned"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(messages, learn, said):
    with pytest.raises(BadRow, match=said):
        to_conversation({"messages": messages}, learn=learn)
    prompts = to_conversation({"messages": [USER | {"weight": 0}, ANSWER]}).messages
    assert [dict(m) for m in prompts] == [USER, ANSWER]


@pytest.mark.parametrize(
    "turn",
    [
        ANSWER | {"reasoning_content": "why"},
        ANSWER | {"thinking": "why"},
        ANSWER | {"reasoning": "why"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "why"}, {"type": "text", "value": "a"}]},
    ],
)
def test_reasoning_is_kept_beside_the_answer(turn):
    assert to_conversation({"messages": [USER, turn]}).messages[1] == ANSWER | {"reasoning_content": "why"}
    with pytest.raises(BadRow, match="reasoning in a turn of user"):
        to_conversation({"messages": [turn | {"role": "user"}, ANSWER]})


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "1"}'}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": "1"}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "1"}}'},
        {"role": "function_call", "content": {"name": "f", "parameters": {"x": "1"}}},
    ],
)
def test_tool_calls_in_the_field_s_spellings(turn):
    tool = {"from": "observation", "value": "r"} if "from" in turn else {"role": "function", "content": "r"}
    found = to_conversation({"conversations": [USER, turn, tool, ANSWER], "tools": '[{"name": "f"}]'})
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.tools[0]["function"]["name"] == "f" and not found.unread


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**PAIR, "tools": "all of them"}, "tools: found 'all of them'"),
        ({**PAIR, "tools": [{"type": "function"}]}, "tools.0: found"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "messages.1.tool_calls.0: found"),
        ({"conversations": [USER, {"from": "function_call", "value": "f(1)"}, ANSWER]}, "tool_calls.0: found 'f"),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "tool calls in a turn of user"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(record, said):
    with pytest.raises(BadRow, match=said):
        to_conversation(record)


def test_a_developer_s_turn_keeps_its_role():
    assert turns({"messages": [{"role": "developer", "content": "d"}, USER, ANSWER]})[0] == ("developer", "d")


def test_prompts_alone_are_read_where_no_answer_is_needed():
    for column in ("prompt", "question", "instruction", "query", "input"):
        assert turns({column: "q"}, answers=False) == [("user", "q")]
