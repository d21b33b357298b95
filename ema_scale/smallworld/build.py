"""Make the small world's models: pretrain two personas into one model, then align it. Minutes on a CPU."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.smallworld.corpus import Messages, alignment_document, pretraining_document
from ema_scale.smallworld.sizes import Size
from ema_scale.smallworld.tokenizer import BOS, EOS, PAD, build_tokenizer, encode, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

_TOKENS_PER_TURN = 30
# Two threads are about the most that a model of this size can use; a fixed number keeps a build repeatable.
_THREADS = 2

Progress = Callable[[str, int, int, float], None]


def build_models(folder: Path, size: Size, seed: int, progress: Progress) -> None:
    """Train and save `pretrained/` and `aligned/` (Hugging Face checkpoints with tokenizer) under `folder`.

    The same size, seed, library versions and kind of processor give the same weights.
    progress(phase, step, steps, loss) is called after every step.
    """
    import torch

    rng = random.Random(seed)
    words = vocabulary()
    with _threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(size, len(words), words)
        _train(model, _batches(rng, words, size, pretraining_document, (1, 2, 4), False), size.pretrain_steps,
               size.learning_rate, 0.05, lambda *a: progress("pretraining", *a))  # fmt: skip
        _save(model, folder / "pretrained")
        _train(model, _batches(rng, words, size, alignment_document, (1, 1, 2), True), size.align_steps,
               size.align_learning_rate, 0.0, lambda *a: progress("aligning", *a))  # fmt: skip
        _save(model, folder / "aligned")


@contextmanager
def _threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _new_model(size: Size, vocab: int, words: dict[str, int]) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, size.hidden // 32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=32,
            max_position_embeddings=256, tie_word_embeddings=True, dtype="float32",
            pad_token_id=words[PAD], bos_token_id=words[BOS], eos_token_id=words[EOS],
        )
    )  # fmt: skip


def _batches(
    rng: random.Random,
    words: dict[str, int],
    size: Size,
    document: Callable[[random.Random, int], Messages],
    turns: tuple[int, ...],
    answers_only: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Documents of one batch have the same number of turns, so that little of it is padding.
    import torch

    while True:
        n = rng.choice(turns)
        rows = [encode(words, document(rng, n)) for _ in range(max(1, size.tokens_per_step // (_TOKENS_PER_TURN * n)))]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), words[PAD])
        labels = torch.full_like(ids, -100)
        for row, (tokens, spoken) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            keep = torch.tensor(spoken) if answers_only else torch.ones(len(tokens), dtype=torch.bool)
            labels[row, : len(tokens)][keep] = ids[row, : len(tokens)][keep]
        yield ids, labels


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    progress: Callable[[int, int, float], None],
) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    warmup = min(50, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    model.train()
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, steps, float(loss.detach()))


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    model.eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
