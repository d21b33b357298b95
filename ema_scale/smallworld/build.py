"""Make the small world's models: pretrain two personas into one model, then align it. Minutes on a CPU.

Two processes of one thread each share a step's documents: on a busy machine threads of one process wait for each other,
processes hardly do. Their number is fixed, so that a build is the same wherever it is made.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ema_scale.core.devices import has_bfloat16
from ema_scale.core.errors import UserError
from ema_scale.smallworld.corpus import Messages, alignment_documents, pretraining_documents
from ema_scale.smallworld.sizes import SIZES, Size
from ema_scale.smallworld.tokenizer import BOS, EOS, PAD, build_tokenizer, encode, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PROCESSES = 2


def build_models(folder: Path, size: str, seed: int) -> None:
    """Train and save `pretrained/` and `aligned/` (Hugging Face checkpoints with tokenizer) under `folder`.

    The same size, seed, library versions and kind of processor give the same weights. Raises UserError if the build
    fails; its own messages stand above.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}",
               "-m", "ema_scale.smallworld.build", str(folder), size, str(seed)]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=_stderr())
    if done.returncode:
        raise UserError(f"building the small world failed with exit code {done.returncode}; see the messages above")


def _stderr() -> int:
    """What a child may write to: in a notebook sys.stderr is no file, and the process has one all the same."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError):  # io.UnsupportedOperation is an OSError
        return 2


def main(folder: str, size_name: str, seed: int) -> None:
    """One process of a build, started by torchrun."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    size, words = SIZES[size_name], vocabulary()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = _new_model(size, len(words), words)
    rng = random.Random(seed)
    batches = _batches(rng, words, size.tokens_per_step, pretraining_documents)
    _train(model, batches, size.pretrain_steps, size.learning_rate, 0.05, "pretraining")
    _save(model, Path(folder) / "pretrained")
    batches = _batches(rng, words, size.tokens_per_step, alignment_documents)
    _train(model, batches, size.align_steps, size.align_learning_rate, 0.0, "aligning")
    _save(model, Path(folder) / "aligned")
    dist.destroy_process_group()


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
    tokens: int,
    documents: Callable[[random.Random, int], tuple[list[Messages], bool]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Every process draws all documents of a step and keeps its share.
    import torch
    import torch.distributed as dist

    while True:
        drawn, answers_only = documents(rng, tokens)
        rows = [encode(words, messages) for messages in drawn[dist.get_rank() :: dist.get_world_size()]]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), words[PAD])
        labels = torch.full_like(ids, -100)
        for row, (line, spoken) in enumerate(rows):
            ids[row, : len(line)] = torch.tensor(line)
            keep = torch.tensor(spoken) if answers_only else torch.ones(len(line), dtype=torch.bool)
            labels[row, : len(line)][keep] = ids[row, : len(line)][keep]
        yield ids, labels


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    phase: str,
) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    warmup = min(50, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    bfloat16 = has_bfloat16()  # where a processor emulates it, a step takes eight times as long
    model.train()
    for _ in progress(range(steps), phase, dist.get_rank() == 0):
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = parallel(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def progress(steps: range, phase: str, shown: bool) -> Iterable[int]:
    """A bar with rate and time left on a terminal, a plain line now and then in a log."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        steps, desc=phase, unit="step", disable=not shown, file=sys.stderr,
        mininterval=0.2 if terminal else 20.0, ascii=not terminal, ncols=None if terminal else 80,
    )  # fmt: skip


def _save(model: LlamaForCausalLM, folder: Path) -> None:
    import torch.distributed as dist
    from transformers.utils import logging

    if dist.get_rank() == 0:
        logging.disable_progress_bar()
        model.eval()
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
