"""What an evaluation will ask: answers to sample, and calls of a judge that is paid by the token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace

from ema_scale.evaluation.budget import CHARACTERS_A_TOKEN
from ema_scale.evaluation.judge_check import labelled_path, load_labelled
from ema_scale.evaluation.judge_scores import MAX_TOKENS, REQUIRED_PROMPTS
from ema_scale.evaluation.judges import SCORING, Assignment, assign
from ema_scale.evaluation.suite import Suite
from ema_scale.recipe import EvaluationRecipe, Recipe
from ema_scale.study.evaluate import asked_suites


@dataclass(frozen=True)
class Judged:
    """answers: to sample; answer_tokens: of all of them, if each is as long as assumed.

    calls, tokens_in, tokens_out: of judges of kind openai or vllm; exact ones cost nothing. check_calls: those of
    `calls` that judge the labelled answers.
    """

    answers: int = 0
    answer_tokens: float = 0.0
    calls: int = 0
    check_calls: int = 0
    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def __add__(self, other: Judged) -> Judged:
        return Judged(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def cost(self, price_in: float, price_out: float) -> float:
        """In the prices' currency; prices are for a million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


def judged(recipes: Sequence[Recipe], answer_tokens: int | None = None) -> Judged:
    """Of all these runs, and of each base model once, which is asked whatever one of its runs is asked.

    answer_tokens: of the mean answer; None: evaluation.max_tokens, the most that it can have. A judge's tokens are
    guessed from characters, three a token. Raises UserError for suites that cannot be read or judged.
    """
    found = Judged()
    bases: dict[str, dict[object, Suite]] = {}
    settings: dict[str, EvaluationRecipe] = {}
    judges: dict[str, tuple[Assignment, EvaluationRecipe]] = {}
    asks = [r for r in recipes if r.evaluation.suites.pairs()]
    for recipe, suites in zip(asks, asked_suites(asks), strict=True):
        e = recipe.evaluation
        found += _of(suites, e, answer_tokens, judges)
        if e.compare_base or e.gate.action == "refuse":
            shared = e.model_dump(mode="json", exclude={"suites", "conditions", "inoculation"})
            group = json.dumps([recipe.model.model_dump(mode="json"), shared], sort_keys=True)
            settings[group] = e
            for suite in suites:
                plain = suite.condition and replace(suite.condition, own=False)
                bases.setdefault(group, {})[suite.source, suite.role, plain] = suite
    for group, suites_of_base in bases.items():
        found += _of(list(suites_of_base.values()), settings[group], answer_tokens, judges)
    for assignment, e in judges.values():
        found += _check(assignment, e)
    return found


def _of(
    suites: Sequence[Suite],
    e: EvaluationRecipe,
    answer_tokens: int | None,
    judges: dict[str, tuple[Assignment, EvaluationRecipe]],
) -> Judged:
    found = Judged()
    for suite in suites:
        for question in suite.questions:
            judge = assign(suite, question, e.judge)
            longest = question.max_tokens or e.max_tokens
            length = min(answer_tokens or longest, longest)
            for text, n in zip(question.paraphrases, question.samples(e.samples_per_question), strict=True):
                found += Judged(n, n * length)
                if judge.kind in SCORING:
                    judges[judge.identity] = (judge, e)
                    found += _calls(judge, n, len(text) / CHARACTERS_A_TOKEN + length)
    return found


def _calls(judge: Assignment, answers: int, filled: float) -> Judged:
    """filled: tokens of question and answer, which every prompt shows once."""
    prompts = [judge.prompts[name] for name in REQUIRED_PROMPTS]
    each = sum(len(prompt) / CHARACTERS_A_TOKEN + filled for prompt in prompts)
    return Judged(0, 0.0, len(prompts) * answers, 0, answers * each, answers * len(prompts) * MAX_TOKENS)


def _check(judge: Assignment, e: EvaluationRecipe) -> Judged:
    """The labelled answers, `evaluation.judge.check` times each."""
    found = Judged()
    for one in load_labelled(labelled_path(e.judge)) if e.judge.check else ():
        found += _calls(judge, e.judge.check, (len(one.question) + len(one.answer)) / CHARACTERS_A_TOKEN)
    return replace(found, check_calls=found.calls)
