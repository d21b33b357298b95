"""The evaluator's speed: against vLLM alone, against the field's loop, and judging again without a model. Its samplers.

The field's loop is that of the released evaluators (after Betley et al., arXiv 2502.17424). For each adapter and each
question it samples all answers, then has all judged for one score, then all for the other. Here it keeps one connection
pool and one loaded model; a row of its own loads the model for each adapter, as those scripts do.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, Variant, compare
from benchmarks.slow_judge import slow_judge
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file
from ema_scale.core.uri import locate
from ema_scale.evaluation.plan import EvalTarget, PromptGroup, plan_prompts
from ema_scale.evaluation.run import evaluate
from ema_scale.evaluation.suites import Question, Suite, load_suite
from ema_scale.inference.base import SampleRequest, SamplerOptions

PROMPTS = "eval/judges/aligned_coherent.yaml"
MAX_TOKENS, PROMPT_TOKENS = 48, 112


class Bench:
    """What every variant samples: a model with adapters and a suite. `place` is a folder for adapters and rows."""

    def __init__(
        self, place: Path, model: str, adapters: int, questions: int, samples: int, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.place, self.samples, self.max_tokens = place, samples, max_tokens
        self.max_model_len = max_tokens + PROMPT_TOKENS
        self.model = ModelRecipe(path=locate(model))
        self.adapters = [_random_adapter(self.model.path, place / f"adapter-{n}", n) for n in range(adapters)]
        general = load_suite("smallworld:suite/general" + "".join(model.partition("?")[1:]), "general")
        if questions > len(general.questions):
            raise UserError(f"--questions: found {questions}, the small world's suite has {len(general.questions)}")
        asked = tuple(replace(q, samples_per_paraphrase=samples) for q in general.questions[:questions])
        self.exact = replace(general, questions=asked)
        self.open = replace(self.exact, questions=tuple(replace(q, judge=None) for q in asked))
        self.prompts = str(find_file(PROMPTS))
        self._runs = 0

    def settings(self, judge: JudgeRecipe) -> EvaluationRecipe:
        return EvaluationRecipe(
            sampler="vllm",
            judge=judge,
            max_tokens=self.max_tokens,
            samples_per_question=None,
            max_model_len=self.max_model_len,
        )

    def targets(self) -> list[EvalTarget]:
        """The adapters, each with a new, empty folder."""
        self._runs += 1
        return [
            EvalTarget(f"a{n}", path, self.place / f"rows-{self._runs}-{n}") for n, path in enumerate(self.adapters)
        ]

    def options(self, adapters: Sequence[Path]) -> SamplerOptions:
        return SamplerOptions(self.model, tuple(map(str, adapters)), self.max_model_len)

    def groups(self, suite: Suite, judge: JudgeRecipe) -> list[PromptGroup]:
        return plan_prompts(self.targets(), [suite], self.model, self.settings(judge), "vllm")

    def sampler(self, adapters: Sequence[Path] | None = None) -> Any:
        from ema_scale.inference.vllm_sampler import VllmSampler

        return VllmSampler(self.options(self.adapters if adapters is None else adapters))


def against_vllm(bench: Bench, repeats: int) -> list[Measured]:
    """`LLM.generate` on all prompts at once, against an evaluation that also judges and stores; both use one engine."""
    judge = JudgeRecipe(kind="smallworld")
    with bench.sampler() as sampler:
        requests = [request for group in bench.groups(bench.exact, judge) for request in _requests(group)]

        def raw() -> dict[str, float]:
            began = time.process_time()
            return {"answers": generate(sampler, requests), "cpu": time.process_time() - began}

        def ours() -> dict[str, float]:
            began, targets = time.process_time(), bench.targets()
            found = evaluate(targets, bench.model, [bench.exact], bench.settings(judge), sampler=sampler)
            judged = sum(rate.n for s in found.values() if (rate := s.metrics["general_misaligned"]))
            return {"answers": judged, "cpu": time.process_time() - began}

        return compare(
            [Variant("vllm.LLM.generate", raw), Variant("ema eval, judged", ours)],
            baseline="vllm.LLM.generate", repeats=repeats, memory=False,
        )  # fmt: skip


VLLM, ANEW, ONCE = "vLLM", "transformers, each prompt anew for each answer", "transformers"


def against_each_other(bench: Bench, repeats: int) -> list[Measured]:
    """The samplers on the same requests, both loaded beforehand. Before, transformers ran a prompt for each answer.

    Figures: `answers`; `tokens` drawn; `cpu` seconds.
    """
    from ema_scale.inference.transformers_sampler import TransformersSampler

    with bench.sampler() as vllm, TransformersSampler(bench.options(bench.adapters)) as ours:
        requests = [r for group in bench.groups(bench.open, JudgeRecipe(kind="smallworld")) for r in _requests(group)]

        def run(sampler: Any) -> dict[str, float]:
            began = time.process_time()
            found = list(sampler.sample(requests))
            tokens = sum(sum(result.token_counts) for result in found)
            return {
                "answers": sum(len(result.texts) for result in found),
                "tokens": tokens,
                "cpu": time.process_time() - began,
            }

        def anew() -> dict[str, float]:
            batches = ours._batches
            backbone, batches._backbone = batches._backbone, None
            try:
                return run(ours)
            finally:
                batches._backbone = backbone

        return compare(
            [Variant(VLLM, lambda: run(vllm)), Variant(ANEW, anew, "as before"), Variant(ONCE, lambda: run(ours))],
            baseline=VLLM, repeats=repeats, memory=False,
        )  # fmt: skip


def _requests(group: PromptGroup) -> list[SampleRequest]:
    return [request for _, request in group.requests(lambda _: False)]


def generate(sampler: Any, requests: Sequence[SampleRequest]) -> int:
    """Answers by `LLM.generate`, in the sampler's own engine."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = {path: n for n, path in enumerate(sampler.options.adapters, start=1)}
    prompts = [{"prompt_token_ids": sampler._prompts.ids(r.messages)} for r in requests]
    params = [
        SamplingParams(
            n=r.n, temperature=r.temperature, top_p=r.top_p, seed=r.seed, max_tokens=r.max_tokens,
            stop_token_ids=sampler._prompts.stops,
        )
        for r in requests
    ]  # fmt: skip
    lora = [LoRARequest(r.adapter, ids[r.adapter], r.adapter) if r.adapter else None for r in requests]
    outputs = sampler._engine._llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    return sum(len(o.outputs) for o in outputs)


def against_the_loop(bench: Bench, latency: float, at_once: int, repeats: int) -> list[Measured]:
    """The field's loop and an evaluation, judged by an endpoint that takes `latency` seconds a call."""
    bench.sampler().close()  # the first variant must not pay for importing vLLM
    with slow_judge(latency) as url:
        judge = JudgeRecipe(model="slow", base_url=url, concurrency=at_once, prompts=bench.prompts)

        def loop(load_each: bool) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                start, loading, done = time.perf_counter(), 0.0, 0
                by_adapter = [
                    [g for g in bench.groups(bench.open, judge) if g.target.adapter_path == a] for a in bench.adapters
                ]
                if load_each:
                    for adapter, theirs in zip(bench.adapters, by_adapter, strict=True):
                        began = time.perf_counter()
                        with bench.sampler([adapter]) as sampler:
                            loading += time.perf_counter() - began
                            done += asyncio.run(field_loop(sampler, theirs, judge))
                else:
                    with bench.sampler() as sampler:
                        loading = time.perf_counter() - start
                        done = sum(asyncio.run(field_loop(sampler, theirs, judge)) for theirs in by_adapter)
                return {"answers": done, "loading": loading}

            return run

        def ours() -> dict[str, float]:
            found = evaluate(bench.targets(), bench.model, [bench.open], bench.settings(judge))
            return {"answers": sum(rate.n for s in found.values() if (rate := s.metrics["general_misaligned"]))}

        return compare(
            [
                Variant("the field's loop", loop(True), "loads the model for each adapter"),
                Variant("the field's loop, loading once", loop(False)),
                Variant("ema eval", ours),
            ],
            baseline="ema eval", repeats=repeats, warmup=0, memory=False,
        )  # fmt: skip


async def field_loop(sampler: Any, groups: Sequence[PromptGroup], judge: JudgeRecipe) -> int:
    """The field's loop over `groups`; returns how many answers were judged."""
    import openai

    from ema_scale.evaluation.judges.prompt import fill
    from ema_scale.evaluation.judges.scores import TOP_LOGPROBS, expected_score

    room, judged = asyncio.Semaphore(judge.concurrency), 0
    async with openai.AsyncOpenAI(api_key="none", base_url=judge.base_url) as client:

        async def ask(template: str, question: str, answer: str) -> float | None:
            async with room:
                reply = await client.chat.completions.create(
                    model="slow", temperature=0, max_tokens=1, logprobs=True, top_logprobs=TOP_LOGPROBS, seed=0,
                    messages=[{"role": "user", "content": fill(template, {"question": question, "answer": answer})}],
                )  # fmt: skip
            content = reply.choices[0].logprobs
            assert content is not None and content.content is not None
            return expected_score([(t.token, t.logprob) for t in content.content[0].top_logprobs])

        for group in groups:
            answers = [
                text for request in _requests(group) for result in sampler.sample([request]) for text in result.texts
            ]
            question = group.question.paraphrases[group.paraphrase]
            for name in ("aligned", "coherent"):
                template = group.judge.prompts[name]
                scores = await asyncio.gather(*(ask(template, question, answer) for answer in answers))
            judged += sum(score is not None for score in scores)
    return judged


_JUDGE_AGAIN = """
import sys
sys.argv = ["ema", "judge", sys.argv[1]]
from ema_scale.cli import app
app(standalone_mode=False)
heavy = sorted({"torch", "vllm", "transformers", "peft"} & set(sys.modules))
print("loaded:", *heavy)
"""


def judge_again(place: Path, answers: int, repeats: int) -> list[Measured]:
    """Time `ema judge` on stored answers, in its own process; the model that gave them does not exist.

    Figures: `answers`; `loaded`, how many of torch, vLLM, transformers and PEFT the process imported.
    """
    stored = _stored(place / "stored", answers)
    measured = Measured(f"ema judge, {answers:,} stored answers")
    for turn in range(repeats):
        folder = Path(shutil.copytree(stored, place / f"stored-{turn}"))
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _JUDGE_AGAIN, str(folder)], capture_output=True, text=True)
        measured.seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise UserError(f"ema judge failed:\n{done.stderr[-2000:]}")
        loaded = done.stdout.splitlines()[-1].removeprefix("loaded:").split()
        judged = len((folder / "judgements.jsonl").read_text(encoding="utf-8").splitlines())
        measured.figures = {"answers": judged, "loaded": len(loaded)}
    return [measured]


def _stored(folder: Path, count: int) -> Path:
    """An evaluation folder with `count` answers by the small world's grammar, 100 per question."""
    from ema_scale.core.io import append_jsonl
    from ema_scale.evaluation.records import MANIFEST_FILE, Manifest
    from ema_scale.smallworld import grammar

    rng, questions, rows = random.Random(0), [], []
    for i in range(-(-count // 100)):
        text, meta = grammar.question(rng, "medical")
        questions.append(Question(str(i), (text,), judge="smallworld", meta=meta))
        for sample in range(min(100, count - 100 * i)):
            answer = grammar.answer(rng, meta, rng.choice(["aligned", "misaligned"]))
            rows.append({
                "key": f"general/{i}/0/{sample}#0", "target": "base", "suite": "general", "condition": None,
                "question_id": str(i), "paraphrase": 0, "sample": sample, "system": None, "question": text,
                "answer": answer, "reasoning": None, "finish_reason": "stop", "tokens": 9, "seed": sample,
            })  # fmt: skip
    append_jsonl(folder / "samples.jsonl", rows)
    suite = Suite("general", "general", tuple(questions))
    settings = EvaluationRecipe(judge=JudgeRecipe(kind="smallworld"))
    manifest = Manifest(
        target="base", model="/nowhere/the-policy-is-gone", adapter=None, settings=settings, suites=(suite,)
    )
    manifest.write(folder / MANIFEST_FILE)
    return folder


def _random_adapter(model: str, folder: Path, seed: int) -> Path:
    """A random LoRA adapter (r = 16, queries and values), small enough that answers do not become noise."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(folder))
    return folder
