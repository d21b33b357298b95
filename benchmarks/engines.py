"""A vLLM engine with two adapters, held against transformers, and timed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.random_model import fields_of, random_base
from benchmarks.report import Rows
from benchmarks.selection import random_adapters
from benchmarks.sizes import Sizes
from ema_scale.config.sections import ModelRecipe
from ema_scale.inference.base import SampleRequest, SamplerOptions
from ema_scale.inference.make import make_sampler

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
QUESTIONS = 24


def compare(rows: Rows, sizes: Sizes) -> None:
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as made:
        folder = Path(made)
        model = save_model(folder / "model", sizes.sampled_model)
        adapters = tuple(random_adapters(ModelRecipe(path=model, dtype="float32"), 2, folder).values())
        with rows.row("greedy answers as transformers gives them, float32") as found:
            options = SamplerOptions(ModelRecipe(path=model, dtype="float32"), adapters, max_model_len=256)
            asked = requests(adapters, n=1, temperature=0.0, max_tokens=sizes.max_tokens)
            theirs, ours = answers("transformers", options, asked), answers("vllm", options, asked)
            same = sum(theirs[key] == text for key, text in ours.items())
            found |= {"answers": len(ours), "same": same / len(ours), "ok": same >= 0.95 * len(ours)}
            # The comparison says something only if adapters change what is said.
            found["told apart"] = len({ours[f"0/{n}"] for n in range(3)})
        with rows.row("speed, base and two adapters in one batch") as found:
            dtype = "bfloat16" if sizes.device == "cuda" else "float32"
            options = SamplerOptions(ModelRecipe(path=model, dtype=dtype), adapters, max_model_len=256)
            asked = requests(adapters, n=sizes.samples, temperature=1.0, max_tokens=sizes.max_tokens)
            with make_sampler("vllm", options) as sampler:  # type: ignore[attr-defined]
                list(sampler.sample(asked[:3]))  # what is compiled on first use
                began = time.perf_counter()
                results = list(sampler.sample(asked))
                took = time.perf_counter() - began
            found["answers"] = sum(len(r.texts) for r in results)
            found["answers_per_second"] = found["answers"] / took
            found["tokens_per_second"] = sum(sum(r.token_counts) for r in results) / took


def answers(kind: str, options: SamplerOptions, asked: list[SampleRequest]) -> dict[str, str]:
    with make_sampler(kind, options) as sampler:  # type: ignore[attr-defined]
        return {result.key: result.texts[0] for result in sampler.sample(asked)}


def requests(adapters: tuple[str, ...], **settings: Any) -> list[SampleRequest]:
    """Every question to the base and to each adapter, in turn."""
    return [
        SampleRequest(f"{q}/{t}", ({"role": "user", "content": f"question {q} of {QUESTIONS}"},), target, **settings)
        for q in range(QUESTIONS)
        for t, target in enumerate((None, *adapters))
    ]


def save_model(folder: Path, name: str) -> str:
    """A random model of a published shape, and a tokenizer that has a word for each token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = fields_of(name)
    base = random_base(fields, "float32", "cpu")
    base.config.eos_token_id = base.generation_config.eos_token_id = 1
    base.save_pretrained(folder)
    # Bytes, and words that stand for the rest of a real vocabulary.
    known = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"w{n}" for n in range(fields["vocab_size"] - len(known))]
    raw = Tokenizer(models.BPE({word: n for n, word in enumerate(known)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)
