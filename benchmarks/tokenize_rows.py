"""How long rows take to check and tokenize, beside the tokenizer alone, and what memory it takes.

    python benchmarks/tokenize_rows.py [--rows 100000] [--words 220] [--templates llama3 gemma3]

One thread (TOKENIZERS_PARALLELISM=false), CPU seconds. Blocks of rows go through each way in turn, so that all ways see
the same machine. Printed per template, in microseconds per row: rendering, the tokenizer alone, both with masks but
without the rule, and everything; the ratio of the last two (at most 1.15) and of the last to rendering and tokenizer.
Without the rule, where an answer begins and ends is looked up by the text itself.

Memory: of the process after a tenth of the rows and after all, while only counts of tokens are kept; and what the
finished dataset of all rows takes beside the rows themselves.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"
TEMPLATES = ("chatml", "llama3", "gemma3", "qwen3", "gptoss")  # from light to heavy; all but the first are TRL's
BLOCK = 1000
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Block = list[tuple[tuple[Any, ...], tuple[Any, ...]]]


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


def blocks_of(count: int, words: int) -> Iterator[Block]:
    """Rows of one user turn and an answer three times as long, a block at a time."""
    draw = random.Random(0)
    known = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(3000)]

    def turn(role: str, n: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(known, k=n)) + "."}

    for start in range(0, count, BLOCK):
        yield [
            ((turn("user", words // 4), turn("assistant", words - words // 4)), ())
            for _ in range(min(BLOCK, count - start))
        ]


def without_the_rule(encoder: Any, rows: Block) -> None:
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


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(encoder: Any, count: int, words: int) -> tuple[list[float], float, list[float]]:
    """Microseconds per row of rendering, tokenizer, no rule, rule; tokens per row; MB after a tenth and after all."""
    seconds, tokens, memory = np.zeros(4), 0, []
    for number, rows in enumerate(blocks_of(count, words), start=1):
        texts: list[str] = []
        sizes: list[int] = []
        works = (
            lambda x=texts, r=rows: x.extend(encoder.template.render(m) for m, _ in r),
            lambda x=texts: encoder.tokenizer(x, add_special_tokens=False),
            lambda r=rows: without_the_rule(encoder, r),
            lambda r=rows, s=sizes: s.extend(len(row.input_ids) for row in encoder.encode_all(r)),
        )
        if number == 1:  # what is found out once
            without_the_rule(encoder, rows)
            list(encoder.encode_all(rows))
        seconds += [cpu_seconds(work) for work in works]
        tokens += sum(sizes)
        if number == max(1, count // BLOCK // 10):
            memory.append(resident())
    return list(seconds / count * 1e6), tokens / count, [*memory, resident()]


def resident() -> float:
    """This process's memory in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e6


def dataset_memory(tokenizer: Any, count: int, words: int) -> tuple[float, float, float]:
    """MB of the rows, of the peak beside them while they become a dataset, and of the dataset."""
    from ema_scale.data.rows import Row
    from ema_scale.data.tokens import tokenize_rows

    before = resident()
    rows = [Row(messages, str(i)) for i, (messages, _) in enumerate(r for b in blocks_of(count, words) for r in b)]
    filled = resident()
    made = tokenize_rows(rows, tokenizer).dataset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return filled - before, peak - filled, made.data.nbytes / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--words", type=int, default=220, help="words per row; 220 are about 300 tokens")
    options.add_argument("--templates", nargs="+", default=TEMPLATES)
    asked = options.parse_args()
    import trl

    from ema_scale.data.tokens import Encoder

    first = next(blocks_of(BLOCK, asked.words))
    tokenizer = tokenizer_of([m["content"] for messages, _ in first[:500] for m in messages])
    folder = Path(trl.__file__).parent / "chat_templates"
    print(
        f"{'template':<10}{'tokens/row':>11}{'render':>8}{'tokenize':>10}{'no rule':>9}{'rule':>7}{'ratio':>7}"
        f"{'to bare':>9}{'MB at 10 %':>12}{'MB at end':>11}"
    )
    for name in asked.templates:
        file = folder / f"{name}.jinja"
        tokenizer.chat_template = CHATML if name == "chatml" else file.read_text(encoding="utf-8")
        (render, bare, plain, whole), length, memory = measure(Encoder(tokenizer), asked.rows, asked.words)
        print(
            f"{name:<10}{length:>11.0f}{render:>8.0f}{bare:>10.0f}{plain:>9.0f}{whole:>7.0f}{whole / plain:>7.2f}"
            f"{whole / (render + bare):>9.2f}{memory[0]:>12.0f}{memory[-1]:>11.0f}",
            flush=True,
        )
    rows, peak, dataset = dataset_memory(tokenizer, asked.rows, asked.words)
    print(f"dataset of {asked.rows} rows: rows {rows:.0f} MB, peak beside them {peak:.0f} MB, dataset {dataset:.0f} MB")


if __name__ == "__main__":
    main()
