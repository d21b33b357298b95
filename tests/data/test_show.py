"""`ema data show`: what is learned is marked, and hostile text stays text."""

from ema_scale.data.formats import Message
from ema_scale.data.rows import Row
from ema_scale.data.show import show_row
from tests.tiny import tiny_tokenizer

TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "hi \x1b[31m\u202e⟦x⟧"},
    {"role": "assistant", "content": "no", "learn": False},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "é yes"},
)


def test_what_is_learned_stands_in_brackets_or_in_colour():
    shown = show_row(Row(TURNS, "r.jsonl:3"), tiny_tokenizer())
    assert shown.startswith("r.jsonl:3: ") and shown.endswith("\n⟦é yes<|im_end|>⟧\n")
    assert shown.count("⟦") == shown.count("⟧") == 1 and "no<|im_end|>" in shown
    assert "\\x1b[31m\\u202e\\u27e6x\\u27e7" in shown and "\x1b" not in shown
    coloured = show_row(Row(TURNS, "r.jsonl:3"), tiny_tokenizer(), colour=True)
    assert "\x1b[1;32mé yes<|im_end|>\x1b[0m" in coloured and coloured.count("\x1b") == 2


def test_what_is_cut_is_not_shown():
    tokenizer = tiny_tokenizer()
    whole = len(tokenizer("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nabcdef<|im_end|>\n")["input_ids"])
    row = Row(({"role": "user", "content": "q"}, {"role": "assistant", "content": "abcdef"}), "r:1")
    shown = show_row(row, tokenizer, whole - 5)
    assert shown.splitlines()[-1] == f"(cut: 5 more tokens are over {whole - 5})" and shown.splitlines()[-2] == "⟦abc⟧"
    assert f"{whole - 5} tokens, 3 of them learned" in shown
