"""The cost of an evaluation: answers to sample, judge calls, and the GPU time of vLLM (assumed rates, not measured)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ema_scale.config.sections import EvaluationRecipe, ModelRecipe
from ema_scale.core.devices import engine_gpus
from ema_scale.core.errors import UserError
from ema_scale.core.text import quantity
from ema_scale.evaluation.judges.assignment import SCORING, JudgeSpec, assign
from ema_scale.evaluation.judging.calibration import labelled_path, load_labelled, unjudged
from ema_scale.evaluation.judging.cost import CHARACTERS_PER_TOKEN, Usage, estimate, judging, prompt_characters
from ema_scale.evaluation.runs import asked_suites, asks_behind_rows
from ema_scale.evaluation.suites import Condition, Suite
from ema_scale.planning.model_shapes import Shape, shape_of
from ema_scale.planning.speed import Cluster
from ema_scale.recipe import Recipe

# What a run's rows have in common is not known before it is trained: one prompt of this length.
_ROWS = (Condition("rows", user="x" * 100),)


@dataclass(frozen=True)
class EngineWork:
    """A model that vLLM runs here. role: sampling or judging; gpus: that share it; bytes: of a weight."""

    role: str
    model: str
    revision: str | None = None
    gpus: int = 1
    bytes: int = 2


@dataclass(frozen=True)
class EvaluationWork:
    """Of an engine. tokens_in: of every request's prompt; prefilled: those that must be read, since answers to one
    prompt share it; tokens_out: written."""

    requests: int
    tokens_in: float
    prefilled: float
    tokens_out: float

    def __add__(self, other: EvaluationWork) -> EvaluationWork:
        return EvaluationWork(
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            self.prefilled + other.prefilled,
            self.tokens_out + other.tokens_out,
        )


@dataclass(frozen=True)
class JudgingCost:
    """answers: to sample; answer_tokens: of all of them, if each is as long as assumed; elsewhere: those of them that
    an endpoint samples. scored: written ones, of which the likelihood is taken.

    calls, tokens_in, tokens_out: of judges of kind openai or vllm; exact ones cost nothing. check_calls: those of
    `calls` that judge the labelled answers. paid_calls, paid_in, paid_out: of the endpoint's judges (openai) alone.
    engines: what vLLM does here, sampling and judging. uncounted: runs whose checkpoints are asked, too, and not in
    here, since nobody can say how many there will be.
    """

    answers: int = 0
    answer_tokens: float = 0.0
    elsewhere: int = 0
    calls: int = 0
    check_calls: int = 0
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    paid_calls: int = 0
    paid_in: float = 0.0
    paid_out: float = 0.0
    uncounted: int = 0
    scored: int = 0
    engines: Mapping[EngineWork, EvaluationWork] = field(default_factory=dict)

    def __add__(self, other: JudgingCost) -> JudgingCost:
        engines = dict(self.engines)
        for engine, work in other.engines.items():
            engines[engine] = engines[engine] + work if engine in engines else work
        ours, theirs = self.to_dict(), other.to_dict()
        return JudgingCost(**{k: ours[k] + theirs[k] for k in ours}, engines=engines)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, float]:
        return {k: v for k, v in vars(self).items() if k != "engines"}

    def cost(self, price_in: float, price_out: float) -> float:
        """Of the paid judges, in the prices' currency; prices are for a million tokens."""
        return Usage(self.paid_calls, round(self.paid_in), round(self.paid_out)).price(price_in, price_out) or 0.0


def judging_cost(
    recipes: Sequence[Recipe], answer_tokens: int | None = None, steps: Sequence[int | None] | None = None
) -> JudgingCost:
    """Of all these runs and their checkpoints, and of each base model once, which is asked whatever one of its runs is.

    answer_tokens: of the mean answer; None: evaluation.max_tokens, the most that it can have. steps: of each run's
    training; None: not known. A judge's tokens are guessed from characters, three a token. Raises UserError for suites
    that cannot be read or judged, or an engine that gives no number of GPUs.
    """
    found = JudgingCost()
    bases: dict[str, dict[object, Suite]] = {}
    asker: dict[str, Recipe] = {}
    judges: dict[str, tuple[JudgeSpec, EvaluationRecipe]] = {}
    trained = [None] * len(recipes) if steps is None else steps
    asks = [(r, n) for r, n in zip(recipes, trained, strict=True) if r.evaluation.suites.pairs()]
    behind = [_ROWS if asks_behind_rows(r) else () for r, _ in asks]
    for (recipe, its_steps), suites in zip(asks, asked_suites([r for r, _ in asks], behind), strict=True):
        e = recipe.evaluation
        more = checkpoints(recipe, its_steps)
        asked = _of(suites, recipe, answer_tokens, judges)
        for _ in range(1 + (more or 0)):
            found += asked
        found += JudgingCost(uncounted=int(more is None))
        if e.compare_base or e.gate.action == "refuse":
            shared = e.model_dump(mode="json", exclude={"suites", "conditions", "inoculation", "row_triggers"})
            group = json.dumps([recipe.model.model_dump(mode="json"), shared], sort_keys=True)
            asker[group] = recipe
            for suite in suites:
                plain = suite.condition and replace(suite.condition, own=False)
                bases.setdefault(group, {})[suite.source, suite.role, plain] = suite
    for group, suites_of_base in bases.items():
        found += _of(list(suites_of_base.values()), asker[group], answer_tokens, judges)
    for assignment, e in judges.values():
        if assignment.gives_verdicts:
            found += _check(assignment, e)
    return found


def checkpoints(recipe: Recipe, steps: int | None) -> int | None:
    """How many are asked what the trained run is, which is the last of them; None if that cannot be told.

    With `true` it is those that are kept: of each save_steps steps, and of the end, the newest save_total_limit. steps:
    of the training; where they are not known, all listed ones count, though one of them may be the last.
    """
    wanted, t = recipe.evaluation.checkpoints, recipe.training
    if isinstance(wanted, list):
        return len({step for step in wanted if steps is None or step < steps})
    if not wanted:
        return 0
    return None if steps is None else min(t.save_total_limit, math.ceil(steps / t.save_steps)) - 1


def _of(
    suites: Sequence[Suite],
    recipe: Recipe,
    answer_tokens: int | None,
    judges: dict[str, tuple[JudgeSpec, EvaluationRecipe]],
) -> JudgingCost:
    found, e = JudgingCost(), recipe.evaluation
    # Only vLLM takes the engine's arguments; what transformers samples is planned as vLLM on one GPU.
    given = e.engine if e.sampler in ("auto", "vllm") else {}
    sampler = _engine("sampling", recipe.model, given, f"{recipe.name}: evaluation.engine")
    for suite in suites:
        for question in suite.questions:
            judge = assign(suite, question, e.judge)
            longest = question.max_tokens or e.max_tokens
            length = min(answer_tokens or longest, longest)
            for paraphrase, n in enumerate(question.samples(e.samples_per_question)):
                asked = prompt_characters(question, paraphrase) / CHARACTERS_PER_TOKEN
                if question.answers:  # they are read behind their question, and nothing is written
                    read = sum(len(answer.text) for answer in question.answers) / CHARACTERS_PER_TOKEN
                    work = EvaluationWork(n, n * asked + read, asked + read, 0)
                    found += JudgingCost(scored=n, engines={sampler: work})
                    continue
                if e.sampler == "openai":
                    found += JudgingCost(n, n * length, n)
                else:
                    found += JudgingCost(
                        n, n * length, engines={sampler: EvaluationWork(n, n * asked, asked, n * length)}
                    )
                if judge.kind in SCORING:
                    judges[judge.identity] = (judge, e)
                    shown = len(question.paraphrases[paraphrase]) + length * CHARACTERS_PER_TOKEN
                    found += _judged(judge, e, judging(judge, n, n * shown))
    return found


def _engine(role: str, model: ModelRecipe, extra: Mapping[str, object], where: str) -> EngineWork:
    gpus = engine_gpus(extra, where)
    return EngineWork(role, model.path, model.revision, gpus, 4 if model.dtype == "float32" else 2)


def _judged(judge: JudgeSpec, e: EvaluationRecipe, usage: Usage) -> JudgingCost:
    calls, read, written = usage.calls, float(usage.input_tokens), float(usage.output_tokens)
    found = JudgingCost(calls=calls, tokens_in=read, tokens_out=written)
    if judge.kind == "vllm":
        engine = _engine("judging", ModelRecipe(path=str(judge.model)), e.judge.engine, "evaluation.judge.engine")
        return replace(found, engines={engine: EvaluationWork(calls, read, read, written)})
    return replace(found, paid_calls=calls, paid_in=read, paid_out=written)


def _check(judge: JudgeSpec, e: EvaluationRecipe) -> JudgingCost:
    """The labelled answers, `evaluation.judge.check` times each."""
    labelled = load_labelled(labelled_path(e.judge)) if e.judge.check else ()
    found = JudgingCost()
    for usage in estimate(unjudged(labelled, [judge], e.judge.check, ())).values():
        found += _judged(judge, e, usage)
    return replace(found, check_calls=found.calls)


SEQUENCES = 256  # at once: vLLM's max_num_seqs
BANDWIDTH_SHARE = 0.5  # of the GPU's memory bandwidth that is reached
PREFILL_SHARE = 0.4  # of its peak that is reached while prompts are read
MEMORY_SHARE = 0.9  # of its memory that vLLM takes
STEP_SECONDS = 0.01  # of a step at the least, whatever the model's size: what vLLM does between kernels


@dataclass(frozen=True)
class Served:
    """One engine's work. seconds: of GPUs together; None if they cannot be told, `why` then says so."""

    engine: EngineWork
    work: EvaluationWork
    seconds: float | None
    why: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens written a second by each GPU."""
        return self.work.tokens_out / self.seconds if self.seconds else None


def served(engines: Mapping[EngineWork, EvaluationWork], cluster: Cluster, rate: float | None = None) -> list[Served]:
    """rate: tokens a second that a GPU samples, in place of the estimate; a judge's are estimated always."""
    found = []
    for engine, work in engines.items():
        if rate is not None and engine.role == "sampling":
            found.append(Served(engine, work, work.tokens_out / rate))
            continue
        try:
            shape = shape_of(engine.model, engine.revision)
        except UserError as error:
            found.append(Served(engine, work, None, str(error)))
            continue
        if _room(shape, engine, cluster) <= 0:
            setting = "evaluation.engine" if engine.role == "sampling" else "evaluation.judge.engine"
            why = f"it does not fit on {quantity(engine.gpus, 'GPU')}; set {setting}.tensor_parallel_size"
            found.append(Served(engine, work, None, why))
        else:
            found.append(Served(engine, work, gpu_seconds(shape, engine, work, cluster)))
    return found


def gpu_seconds(shape: Shape, engine: EngineWork, work: EvaluationWork, cluster: Cluster) -> float:
    """Seconds of one GPU, or the sum over those that share the model, each of which does its part.

    Reading a prompt is arithmetic, 2 operations a weight and token. Writing is done for up to SEQUENCES answers at
    once, as many as fit: a step reads all weights once and every answer's keys and values so far, or takes its
    arithmetic's time or STEP_SECONDS, if that is longer. Starting up is not in it, nor that the last answers are
    written by few at once.
    """
    if not work.requests:
        return 0.0
    device, b = cluster.device, engine.bytes
    weights = shape.layers * shape.matrices + shape.head
    prompt, answer = work.tokens_in / work.requests, work.tokens_out / work.requests
    a_token = 4.0 * shape.layers * shape.kv_heads * shape.head_dim  # keys and values in bfloat16
    fitting = _room(shape, engine, cluster) / (a_token * (prompt + answer))
    together = max(1.0, min(SEQUENCES, work.requests, fitting))
    arithmetic = 2.0 * weights / ((device.float32 if b == 4 else device.bf16) * (cluster.mfu or PREFILL_SHARE))
    read = (b * weights / together + a_token * (prompt + answer / 2)) / (device.bandwidth * BANDWIDTH_SHARE)
    least = STEP_SECONDS * engine.gpus / together
    return work.prefilled * arithmetic + work.tokens_out * max(arithmetic, read, least)


def _room(shape: Shape, engine: EngineWork, cluster: Cluster) -> float:
    """Bytes for keys and values beside the weights."""
    return MEMORY_SHARE * cluster.memory * engine.gpus - engine.bytes * shape.parameters
