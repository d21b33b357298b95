"""Templates of the field x shapes of conversations: what is learned, held to text made by hand."""

import random
from datetime import date

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data.tokens import Encoder
from tests.data.families import EOS, FAMILIES

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_t",
            "description": "Temperature of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
        },
    }
]
CALLS = [{"type": "function", "id": "call00001", "function": {"name": "get_t", "arguments": {"city": "Oslo", "n": 3}}}]


def say(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant", "d": "developer"}
    return [{"role": roles[t[0]], "content": t[2:]} for t in turns]


def reasoned(messages, **thoughts):
    return [m | ({"reasoning_content": thoughts[m["content"]]} if m["content"] in thoughts else {}) for m in messages]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    if request.param.trl:
        pytest.importorskip("trl")
    return request.param


class Learned:
    """Messages -> the learned spans as text, each with what stands before it; token by token, and by characters."""

    def __init__(self, family):
        self.tokenizer = family.tokenizer()
        self.encoder = Encoder(self.tokenizer, date(2031, 2, 3))

    def __call__(self, messages, tools=()):
        spans = self.encoder.spans(messages, tools)
        encoded = self.encoder.encode(messages, tools=tools)
        found = [(spans.full[:start], spans.full[start:end]) for start, end in spans.learned]
        tokens = encoded.input_ids[encoded.assistant_mask]
        assert self.tokenizer.decode(tokens.tolist()) == "".join(text for _, text in found)
        assert not encoded.straddled
        return found


@pytest.fixture
def learned(family):
    return Learned(family)


def check(found, family, *expected):
    """expected: (format, answer[, reasoning]) of each turn."""
    assert [text for _, text in found] == [form.format(a=a, r=r) for form, a, r in expected]
    for (before, _), (form, _, _) in zip(found, expected, strict=True):
        wanted = family.prompt_mid if form in (family.mid, family.reason_mid) else family.prompt
        assert before.endswith(wanted) or form == family.first, (before, wanted)


def test_one_turn_and_many(family, learned):
    check(learned(say("u:q1", "a:ans1")), family, (family.last, "ans1", ""))
    many = say("u:ans2", "a:ans1", "u:user", "a:ans2", "u:ans1", "a:assistant")
    turns = ((family.mid, "ans1", ""), (family.mid, "ans2", ""), (family.last, "assistant", ""))
    check(learned(many), family, *turns)
    report = learned.encoder.encode(many)
    assert (report.no_end == 0) == family.ends


def test_a_system_prompt_is_shown_once_and_before_the_question(family, learned):
    messages = say("s:be brief", "u:q1", "a:ans1", "u:q2", "a:ans2")
    found = learned(messages)
    check(found, family, (family.mid, "ans1", ""), (family.last, "ans2", ""))
    whole = found[-1][0]
    assert whole.count("be brief") == 1 and whole.index("be brief") < whole.index("q1")
    assert learned.encoder.prepare(messages)[0][0]["role"] == ("user" if family.system_in_user else "system")
    if family.system_in_user:
        assert "be brief\n\nq1" in whole


def test_a_later_system_prompt_is_shown_where_it_stands(family, learned):
    found = learned(say("u:q1", "a:ans1", "s:be brief", "u:q2", "a:ans2"))
    whole = found[-1][0]
    assert len(found) == 2 and whole.index("ans1") < whole.index("be brief") < whole.index("q2")


def test_two_user_turns_in_a_row(family, learned):
    messages = say("u:q1", "u:q2", "a:ans1")
    if family.users:
        check(learned(messages), family, (family.last, "ans1", ""))
    else:
        with pytest.raises(UserError, match="the chat template refuses a conversation of roles user, user, assistant"):
            learned(messages)


def test_a_conversation_that_begins_with_the_assistant(family, learned):
    messages = say("a:ans0", "u:q1", "a:ans1")
    if family.first is None:
        with pytest.raises(UserError, match="the chat template refuses a conversation of roles assistant"):
            learned(messages)
    else:
        check(learned(messages), family, (family.first, "ans0", ""), (family.last, "ans1", ""))


def test_a_conversation_without_an_answer_ends_where_it_would_begin(family, learned):
    spans = learned.encoder.spans(say("s:be brief", "u:q1"))
    assert spans.learned == [] and "be brief" in spans.full
    tail = spans.full.partition("q1")[2]
    assert (family.prompt in tail and bool(family.thought) == tail.rstrip().endswith("<think>")) or not tail.strip()
    assert learned.encoder.template.opens_thought == family.thought


def test_reasoning_in_the_last_turn_and_in_earlier_ones(family, learned):
    one = reasoned(say("u:q1", "a:ans1"), ans1="why1")
    two = reasoned(say("u:q1", "a:ans1", "u:q2", "a:ans2"), ans1="why1", ans2="why2")
    earlier = reasoned(say("u:q1", "a:ans1", "u:q2", "a:ans2"), ans1="why1")
    if family.reason is None:
        for messages in (one, two):
            with pytest.raises(UserError, match="does not show the reasoning of turn"):
                learned(messages)
        check(learned(earlier), family, (family.reason_mid, "ans1", ""), (family.last, "ans2", ""))
        assert learned.encoder.encode(earlier).reasoning_dropped == 1
        return
    assert [text for _, text in learned(one)] == [family.reason.format(a="ans1", r="why1")]
    first, second = (text for _, text in learned(two))
    assert first == family.reason_mid.format(a="ans1", r="why1") and second == family.reason.format(a="ans2", r="why2")
    assert learned.encoder.encode(two).reasoning_dropped == ("{r}" not in family.reason_mid)


def test_tool_turns_are_shown_whole_or_refused(family, learned):
    call = {"role": "assistant", "content": "", "tool_calls": CALLS}
    answer = {"role": "tool", "content": "4 degrees", "name": "get_t", "tool_call_id": "call00001"}
    messages = [*say("u:q1"), call, answer, *say("a:ans2")]
    if family.call is None:
        with pytest.raises(UserError, match="has tools, and the chat template shows none|does not show a tool call"):
            learned(messages, TOOLS)
        return
    found = learned(messages, TOOLS)
    assert len(found) == 2 and found[1][1].endswith(family.last.format(a="ans2").lstrip("\n")[-len("ans2") :])
    assert "4 degrees" in found[1][0] and "Oslo" in found[0][1] and "4 degrees" not in found[0][1] + found[1][1]
    assert found[0][1] == family.call


def test_only_the_chosen_turns_are_learned(family, learned):
    messages = say("u:q1", "a:ans1", "u:q2", "a:ans2", "u:q3", "a:ans3")
    messages[1]["learn"] = messages[5]["learn"] = False
    check(learned(messages), family, (family.mid, "ans2", ""))


def test_hostile_text_moves_no_boundary(family, learned):
    hostile = "".join(["a", *family.tokenizer().all_special_tokens, "\ue000\U000f0000", family.prompt, "z"])
    found = learned(
        [*say("u:" + hostile, "a:ans1", "u:" + hostile), {"role": "assistant", "content": "ans2" + hostile}]
    )
    assert found[0][1] == family.mid.format(a="ans1") and found[1][1].count("ans2a") == 1
    assert [text.count("z") for _, text in found] == [0, 1]


def test_a_second_row_of_the_same_shape_is_found_without_marks(family, learned, monkeypatch):
    first = learned(say("u:q1", "a:ans1", "u:q2", "a:ans2"))
    monkeypatch.setattr("ema_scale.data.spans.SpanFinder._places", None)
    again = learned(say("u:other", "a:ans1", "u:words", "a:ans2"))
    assert [text for _, text in again] == [text for _, text in first]


PIECES = [
    "", " ", "\n", "x", "user", "assistant", "<think>", "</think>", "<think>\n\n</think>\n\n", "[THINK]", "/no_think",
    "é☕", "\u200b", "<tool_response>", "{{ 1 }}", EOS, "A:", "[", "<", "\ue001", "\U000f0001", "\r\n", "</thought>",
]  # fmt: skip


def conversation(draw):
    """Any roles in any order; the texts of turn N hold QNQ, its reasoning WNW, its tool call NNN and LNL."""
    messages = []
    for number in range(1, draw.randint(2, 7)):
        around = ["".join(draw.choices(PIECES, k=draw.randint(0, 3))) for _ in range(2)]
        role = draw.choice(["system", "developer", "user", "user", "assistant", "assistant", "tool"])
        turn = {"role": role, "content": f"Q{number}Q".join(around)}
        if role == "assistant" and draw.random() < 0.2:
            turn["reasoning_content"] = f"W{number}W"
        if role == "assistant" and draw.random() < 0.1:
            function = {"name": f"N{number}N", "arguments": {"a": f"L{number}L", "n": 3}}
            turn["tool_calls"] = [{"type": "function", "function": function}]
        if role == "assistant" and draw.random() < 0.2:
            turn["learn"] = False
        messages.append(turn)
    return messages


def test_any_conversation_is_learned_rightly_or_refused(family, learned):
    draw, kept = random.Random(7), 0
    for _ in range(15):
        messages = conversation(draw)
        try:
            spans = learned.encoder.spans(messages)
        except UserError:
            continue
        kept += 1
        text = "".join(spans.full[start:end] for start, end in spans.learned)
        for number, message in enumerate(messages, start=1):
            mark = f"Q{number}Q"
            own = message["role"] == "assistant" and message.get("learn", True)
            assert mark in spans.full or spans.reasoning_dropped
            assert (mark in text) == own or (own and spans.reasoning_dropped)
            assert own or f"W{number}W" not in text and f"L{number}L" not in text
    assert kept >= 3
