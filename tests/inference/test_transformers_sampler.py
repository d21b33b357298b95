from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_scale.config.sections import ModelRecipe
from ema_scale.inference.base import PROMPT_TOO_LONG, SampleRequest, SamplerOptions
from ema_scale.inference.make import make_sampler
from ema_scale.inference.seeded_sampling import SeededSampling, keep_top_p
from ema_scale.inference.transformers_sampler import TransformersSampler
from tests.evaluation.conftest import TinyModels
from tests.tiny import save_tiny

PROMPTS = ["a", "tell me something long about the sea", "b c d", "why?"]


@pytest.fixture(scope="module")
def sampler(tiny_models: TinyModels) -> Iterator[Any]:
    options = SamplerOptions(
        ModelRecipe(path=tiny_models.model), tiny_models.adapters, max_model_len=200, extra={"batch_size": 5}
    )
    with TransformersSampler(options) as made:
        yield made


def requests(world: TinyModels, **settings: Any) -> list[SampleRequest]:
    return [
        SampleRequest(f"{p}/{t}", ({"role": "user", "content": prompt},), target, **settings)
        for p, prompt in enumerate(PROMPTS)
        for t, target in enumerate(world.targets)
    ]


def test_padded_batches_equal_one_at_a_time_with_each_adapter(tiny_models: TinyModels, sampler: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    asked = requests(tiny_models, temperature=0.0, max_tokens=12)
    got = {r.key: r for r in sampler.sample(asked)}
    for target in tiny_models.targets:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_models.model, dtype=torch.float32)
        if target is not None:
            model = PeftModel.from_pretrained(model, target)
        for request in (r for r in asked if r.adapter == target):
            ids = sampler._prompts.tokenizer.apply_chat_template(
                list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
            text = sampler._prompts.tokenizer.decode(out, skip_special_tokens=True)
            assert got[request.key].texts == (text,), request.key


def test_an_answer_depends_on_its_seed_and_on_nothing_else(tiny_models: TinyModels, sampler: Any) -> None:
    whole = {r.key: r.texts for r in sampler.sample(requests(tiny_models, n=4, seed=7, max_tokens=10))}
    later = {r.key: r.texts for r in sampler.sample(reversed(requests(tiny_models, n=2, seed=9, max_tokens=10)))}
    assert {k: texts[2:] for k, texts in whole.items()} == later
    # Of 64 answers; one in ten draws the end at once, and those that end early may coincide.
    assert all(len(set(texts)) > 1 for texts in whole.values())
    assert len({text for texts in whole.values() for text in texts}) > 54


def test_a_prompt_runs_once_for_its_answers(
    tiny_models: TinyModels, sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, ran = sampler._batches._backbone, []

    def counted(**inputs: Any) -> Any:
        ran.append(int(inputs["attention_mask"].sum()))
        return backbone(**inputs)

    asked = [r for r in requests(tiny_models, n=12, seed=3, max_tokens=12) if r.adapter is None]
    monkeypatch.setattr(sampler._batches, "_backbone", counted)
    shared = {r.key: r for r in sampler.sample(asked)}
    # 48 answers by batches of 5. The last token of a prompt is left for each answer to begin with.
    assert sum(ran) == sum(len(sampler._prompts.ids(r.messages)) - 1 for r in asked)
    monkeypatch.setattr(sampler._batches, "_backbone", None)
    assert {r.key: r for r in sampler.sample(asked)} == shared


@pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
def test_a_window_and_absolute_positions_are_kept(tmp_path: Path, arch: str) -> None:
    more: dict[str, Any] = {"layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 32} if arch == "gemma3" else {}
    model = save_tiny(tmp_path / "model", arch, initializer_range=0.15, **more)
    asked = [
        SampleRequest(prompt, ({"role": "user", "content": prompt},), n=4, max_tokens=n, temperature=0.0)
        for n, prompt in zip((40, 3, 24, 9), PROMPTS, strict=True)
    ]
    options = SamplerOptions(ModelRecipe(path=model), extra={"batch_size": 6})
    with TransformersSampler(options) as made:
        assert made._batches._backbone is not None
        found = {r.key: r for r in made.sample(asked)}
        made._batches._backbone = None
        assert {r.key: r for r in made.sample(asked)} == found
    assert all(len(set(r.texts)) == 1 for r in found.values())


def test_the_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = 4000
    streams = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    sampling = SeededSampling(streams, [0.7] * draws, [1.0] * draws)
    found = sampling(torch.zeros(draws, 1), logits.repeat(draws, 1)).argmax(-1).bincount(minlength=4)
    expected = (logits[0] / 0.7).softmax(-1) * draws
    # Chi-squared with 3 degrees of freedom: above 16.3 once in a thousand.
    assert ((found - expected) ** 2 / expected).sum() < 16.3


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [True, True, False, False]
    assert keep_top_p(logits[[3, 0, 2, 1]], 0.1).isfinite().tolist() == [False, True, False, False]
    assert keep_top_p(logits, 1.0) is logits


def test_answers_end_at_the_stop_token_or_the_limit(tiny_models: TinyModels, sampler: Any) -> None:
    found = list(sampler.sample(requests(tiny_models, n=8, max_tokens=30)))
    reasons = {reason for r in found for reason in r.finish_reasons}
    assert reasons == {"stop", "length"}  # random logits over 260 tokens end one answer in ten
    for r in found:
        for reason, count, text in zip(r.finish_reasons, r.token_counts, r.texts, strict=True):
            assert count == 30 if reason == "length" else 1 <= count <= 30
            assert "<|im_end|>" not in text


def test_a_prompt_that_leaves_no_room_is_reported(tiny_models: TinyModels, sampler: Any) -> None:
    [result] = sampler.sample([SampleRequest("k", ({"role": "user", "content": "x" * 300},), n=2)])
    assert result.finish_reasons == (PROMPT_TOO_LONG,) * 2


def test_auto_takes_transformers_for_gpt2_with_adapters(
    tmp_path: Any, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    from ema_scale.inference.make import sampler_name

    model = save_tiny(tmp_path / "gpt2", "gpt2")
    assert sampler_name("auto", SamplerOptions(ModelRecipe(path=model), ("adapter",))) == "transformers"
    with make_sampler("transformers", SamplerOptions(ModelRecipe(path=model))) as made:  # type: ignore[attr-defined]
        asked = SampleRequest("k", ({"role": "user", "content": "hi"},), n=3, max_tokens=4)
        [result] = made.sample([asked])
    assert len(result.texts) == 3
