"""What reads answers, replies and names takes linear time, whatever stands in them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ema_scale.core.hashing import question_key
from ema_scale.core.names import file_slug, task_label
from ema_scale.core.text import printable
from ema_scale.core.thoughts import opened_by
from ema_scale.evaluation.judges.base import last_number, normal_form
from ema_scale.evaluation.judges.readings import _NUMBER
from ema_scale.evaluation.judges.reply_grammar import read_reply
from ema_scale.inference.thoughts import join_channels, split_reasoning
from ema_scale.report.table import _escaped

CHARACTERS = 200_000
READERS: dict[str, Callable[[str], object]] = {
    "reply": read_reply,
    "thoughts": split_reasoning,
    "channels": join_channels,
    "opened": opened_by,
    "last number": last_number,
    "rating": _NUMBER.search,
    "normal form": normal_form,
    "question": question_key,
    "file name": file_slug,
    "task": task_label,
    "terminal": printable,
    "table": _escaped,
}
PIECES = (
    " ", "\n", "a", "1", "1,", "1.", "0 ", "0.", "1 ", "1 to ", "[[", "[[1", "**", "** ", "*", "{", '{"score": ',
    "score ", "score 1 ", "rating: is ", "<|channel|>", "<|channel|>a<|message|>", "<think>", "</think>", "analysis",
    "assistantfinal", "\\boxed{ ", "<score>", "CODE or ", "REFUSAL ", "- ", "1. ", "<|constrain|>", "e\u0301", "\u202e",
    "\ufdfa",
)  # fmt: skip
STARTS = ("", "<|channel|>", "**", "score", "1 ", "[[", "{", "analysis", "0", "Score: 5. ")


@pytest.mark.parametrize("reader", READERS)
def test_reading_takes_linear_time(reader: str) -> None:
    slow = {}
    for piece in PIECES:
        for start in STARTS:
            text = start + piece * (CHARACTERS // (20 * len(piece)))
            began = time.process_time()
            READERS[reader](text)
            if (took := time.process_time() - began) > 0.05:  # most take a millisecond; then it is worth a long one
                began = time.process_time()
                READERS[reader](text * 10)
                slow[start + piece] = (took, time.process_time() - began)
    assert all(long < 30 * took for took, long in slow.values()), slow
