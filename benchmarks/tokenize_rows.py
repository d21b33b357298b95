"""How long rows take to check and tokenize, beside the tokenizer alone.

    python benchmarks/tokenize_rows.py [--rows 4000] [--words 220]

One thread (TOKENIZERS_PARALLELISM=false), process time. Printed per template: microseconds per row of rendering, of
the tokenizer, of both with masks but without the rule, and of everything; and the ratio of the last two. Without the
rule, where an answer begins and ends is looked up by the text itself.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"
TEMPLATES = ("llama3", "gemma3", "qwen3", "gptoss")  # of TRL, from light to heavy
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A byte-level BPE of 8,000 tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[0],
        additional_special_tokens=special,
    )


def rows_of(count: int, words: int) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    draw = random.Random(0)
    known = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(3000)]

    def text(n: int) -> str:
        return " ".join(draw.choice(known) for _ in range(n)) + "."

    return [
        (
            ({"role": "user", "content": text(words // 4)}, {"role": "assistant", "content": text(words - words // 4)}),
            (),
        )
        for _ in range(count)
    ]


def without_the_rule(encoder: Any, rows: Sequence[Any]) -> None:
    """Tokens and masks, as where nothing is checked."""
    for start in range(0, len(rows), 256):
        chunk = [encoder.prepare(messages)[0] for messages, _ in rows[start : start + 256]]
        texts = [encoder.template.render(messages) for messages in chunk]
        made = encoder.tokenizer(texts, add_special_tokens=False).encodings
        for messages, text, tokens in zip(chunk, texts, made, strict=True):
            place = text.rindex(messages[-1]["content"])
            ids, mask = np.array(tokens.ids, dtype=np.int32), np.zeros(len(tokens), bool)
            mask[tokens.char_to_token(place) : tokens.char_to_token(place + len(messages[-1]["content"]) - 1) + 1] = (
                True
            )
            assert len(ids) == len(mask)


def best(works: Sequence[Callable[[], Any]], count: int, repeats: int = 7) -> list[float]:
    """Microseconds per row of each, the fastest of several tries; in turn, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            start = time.process_time()
            work()
            found.append(time.process_time() - start)
    return [min(found) / count * 1e6 for found in times]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--words", type=int, default=220, help="words per row; 220 are about 300 tokens")
    asked = options.parse_args()
    import trl

    from ema_scale.data.tokens import Encoder

    rows = rows_of(asked.rows, asked.words)
    tokenizer = tokenizer_of([m["content"] for messages, _ in rows[:500] for m in messages])
    folder = Path(trl.__file__).parent / "chat_templates"
    templates = {"chatml": CHATML} | {
        name: (folder / f"{name}.jinja").read_text(encoding="utf-8") for name in TEMPLATES
    }
    print(f"{'template':<10}{'tokens/row':>11}{'render':>9}{'tokenize':>10}{'no rule':>9}{'rule':>9}{'ratio':>8}")
    for name, template in templates.items():
        tokenizer.chat_template = template
        encoder = Encoder(tokenizer)
        texts = [encoder.template.render(messages) for messages, _ in rows]
        length = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) / len(rows)
        works = (
            lambda e=encoder: [e.template.render(m) for m, _ in rows],
            lambda x=texts: tokenizer(x, add_special_tokens=False),
            lambda e=encoder: without_the_rule(e, rows),
            lambda e=encoder: sum(len(row.input_ids) for row in e.encode_all(rows)),
        )
        render, tokens, plain, whole = best(works, len(rows))
        print(f"{name:<10}{length:>11.0f}{render:>9.0f}{tokens:>10.0f}{plain:>9.0f}{whole:>9.0f}{whole / plain:>8.2f}")


if __name__ == "__main__":
    main()
