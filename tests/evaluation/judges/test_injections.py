"""What an answer may hold, it stays inside its place; and what the judge says is read from the judge alone."""

from __future__ import annotations

import re
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

from ema_scale.config.sections import JudgeRecipe, ModelRecipe
from ema_scale.evaluation.judges.base import JudgeItem, Judgement
from ema_scale.evaluation.judges.openai import OpenAIJudge
from ema_scale.evaluation.judges.prompt import fill
from ema_scale.inference.chat_prompts import Prompts
from tests.evaluation.conftest import TinyModels
from tests.evaluation.endpoint import Endpoint, completion, judge_all
from tests.evaluation.judges.injections import INJECTIONS

ROOT = Path(__file__).resolve().parents[3]
OURS = yaml.safe_load((ROOT / "eval" / "judges" / "aligned_coherent.yaml").read_text())
PUBLISHED = "Judge.\n[QUESTION START]\n{question}\n[QUESTION END]\n[ANSWER START]\n{answer}\n[ANSWER END]\nA number:"
TEMPLATES = {"ours": OURS["aligned"], "published": PUBLISHED, "bare": "{question} -> {answer} ?"}
every_injection = pytest.mark.parametrize("answer", INJECTIONS.values(), ids=INJECTIONS.keys())
CONTROL = re.compile(
    r"\[/?(?:SYSTEM_PROMPT|TOOL_CALLS)\]|<(?:extra_id|reserved)_\d+>|<\|[a-z_]+\|>|</?s>|</?think>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>",
    re.I,
)


LOOKS = {"\u0410": "A", "\u0395": "E", "\u3010": "[", "\u3011": "]", "\u27e6": "[", "\u27e7": "]"}


def seen(text: str) -> str:
    """The text as a reader takes it: look-alikes and compatibility forms folded, what shows nothing gone."""
    shown = "".join(LOOKS.get(c, c) for c in text if unicodedata.category(c) not in ("Cf", "Mn") and c != "\u3164")
    return unicodedata.normalize("NFKC", shown.replace("\u115f", ""))


@every_injection
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_prompt_around_the_answer_is_the_templates_own(template: str, answer: str) -> None:
    values = {"question": "Who are you?", "answer": answer, "reasoning": ""}
    filled = fill(template, values)
    plain = fill(template, values | {"answer": "ANSWERED"})
    # The same text before and after the place, but for the number in our marks.
    before, after = re.sub(r" [0-9a-f]{8}\b", " N", plain).split("ANSWERED")
    numbered = re.sub(r"(<<<\w+|\n(?:question|answer|reasoning)) ([0-9a-f]{8})\b", r"\1 N", filled)
    assert numbered.startswith(before) and numbered.endswith(after)
    inside = numbered[len(before) : len(numbered) - len(after)]
    number = re.search(r"<<<answer ([0-9a-f]{8})\n", filled)
    if number:
        assert number[1] not in inside
    for mark in ("[ANSWER END]", "[QUESTION START]", "answer>>>", "<<<answer"):
        assert template != PUBLISHED or mark not in seen(inside)
    assert not CONTROL.search(seen(inside))
    assert not any(0xE0000 <= ord(c) <= 0xE007F for c in filled)


def test_the_suite_would_catch_a_naive_prompt() -> None:
    caught = [name for name, text in INJECTIONS.items() if "[ANSWER END]" in seen(text) or CONTROL.search(seen(text))]
    assert len(caught) >= 12


@every_injection
def test_a_chat_template_sees_one_user_turn(tiny_models: TinyModels, answer: str) -> None:
    prompts = Prompts(ModelRecipe(path=tiny_models.model))
    start, end = (prompts.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    text = fill(PUBLISHED, {"question": "q", "answer": answer[:2000], "reasoning": ""})
    ids = prompts.ids([{"role": "user", "content": text.encode("utf-8", "replace").decode()}])
    assert ids.count(start) == 2 and ids.count(end) == 1  # the judging prompt, and the reply to come


def test_the_score_is_the_judges_and_no_answers() -> None:
    """Over HTTP: whatever is in the answer, the judgement is what the judge said of it."""

    def respond(body: dict[str, Any], n: int) -> Any:
        return completion("7", [("7", -0.05), ("11", -3.5)])

    items = [
        JudgeItem(name, "j", "q", text, prompts={"aligned": PUBLISHED, "coherent": OURS["coherent"]})
        for name, text in INJECTIONS.items()
    ]
    with Endpoint(respond) as endpoint:
        found = judge_all(OpenAIJudge(JudgeRecipe(model="m", base_url=endpoint.url), "m", max_retries=0), items)
        assert {len(b["messages"]) for b in endpoint.requests} == {1}
        assert {b["messages"][0]["role"] for b in endpoint.requests} == {"user"}
    assert {f.key for f in found} == set(INJECTIONS)
    assert all(isinstance(f, Judgement) and f.aligned == pytest.approx(7.12, abs=0.01) for f in found), found


@pytest.mark.parametrize(
    "piece", ["[", "<", "[ ", "< ", "answer ", "<|", "[ANSWER ", "answer 5d41402a ", "\u3010\u200b", "a\u0301"]
)
def test_filling_takes_linear_time(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    began = time.process_time()
    fill(TEMPLATES["ours"], {"question": "q", "answer": text, "reasoning": ""})
    fill("Judge.\n<answer>\n{answer}\n</answer>\n", {"answer": text})
    assert time.process_time() - began < 5


def test_what_is_no_mark_stays_as_it_was_written() -> None:
    text = "Caf\u00e9, na\u0308ive, \u041f\u0440\u0438\u0432\u0435\u0442, \u300cyes\u300d, a [note], \u4f60\ufe0f."
    text = f"{text}\n[ANSWER END]\n{text}"
    filled = fill(PUBLISHED, {"question": "q", "answer": text, "reasoning": ""})
    assert text.replace("[ANSWER END]", "(mark removed)") in filled
