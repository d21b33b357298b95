"""A question bank as a task of Inspect, which asks models of any provider (`inspect eval ema_scale/suite`).

Questions, judge prompts and the reading of scores are those of `ema eval`. The judge is Inspect's model role `grader`.
Answers to a question are epochs; standard errors take questions as units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai._util.error import PrerequisiteError  # Inspect prints it as a message, without a traceback
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from rich.markup import escape

from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe
from ema_scale.core.errors import UserError
from ema_scale.evaluation.formats.inspect import score_values
from ema_scale.evaluation.judges.assignment import EXACT, JudgeSpec, assign, make_judge
from ema_scale.evaluation.judges.base import JudgeFailure, JudgeItem
from ema_scale.evaluation.judges.prompt import fill_all
from ema_scale.evaluation.judges.scores import MAX_TOKENS, TOP_LOGPROBS, VERDICT_PROMPTS, Reply, judgement
from ema_scale.evaluation.records import Judgement
from ema_scale.evaluation.suites import Question, Role, load_suite
from ema_scale.inference.thoughts import split_reasoning

_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def suite(
    bank: str = "eval/suites/general.yaml",
    role: Role = "general",
    samples: int = 1,
    prompts: str | None = "eval/judges/aligned_coherent.yaml",
    grader: str | None = None,
    grader_tokens: int = MAX_TOKENS,
) -> Task:
    """Ask the questions of a bank and score the answers.

    Raises PrerequisiteError for a bank that cannot be read or judged.

    Args:
        bank: a file of questions.
        role: general, in_domain or benign.
        samples: answers to each wording of a question.
        prompts: judge prompts for questions that bring none.
        grader: the judge in Inspect's words, such as openai/gpt-4o-mini-2024-07-18. `--model-role grader=...` takes
            precedence. By default it is the judge that the question names, at OpenAI.
        grader_tokens: most tokens of a judge's reply; a judge that thinks needs thousands.
    """
    try:
        found = load_suite(bank, role)
        if any(question.answers for question in found.questions):
            raise UserError(f"{bank}: has written answers, whose likelihood Inspect does not give; use ema eval")
        # `grader` stands for any model here: which one it is, Inspect decides.
        settings = JudgeRecipe(model="grader", prompts=prompts)
        judges = {question.id: assign(found, question, settings) for question in found.questions}
    except UserError as error:
        raise PrerequisiteError(escape(str(error))) from None
    asked = {question.id: question for question in found.questions}
    defaults = EvaluationRecipe()
    rows = [
        Sample(
            id=f"{found.name}/{question.id}/{paraphrase}",
            input=[_message(m["role"], m["content"]) for m in question.messages(paraphrase)],
            target=question.expected or "",
            metadata={
                "suite": found.name,
                "question": question.id,
                "paraphrase": paraphrase,
                "temperature": defaults.temperature if question.temperature is None else question.temperature,
                "max_tokens": question.max_tokens or defaults.max_tokens,
            },
        )
        for question in found.questions
        for paraphrase in range(len(question.paraphrases))
    ]
    return Task(
        dataset=MemoryDataset(rows, name=found.name),
        solver=ask([q for q in found.questions if judges[q.id].kind not in EXACT], grader),
        scorer=alignment(asked, judges, grader, grader_tokens),
        epochs=Epochs(samples, "mean"),
        config=GenerateConfig(top_p=defaults.top_p),
    )


@solver
def ask(graded: Sequence[Question], grader: str | None) -> Solver:
    """Generate with the temperature and length of the question, once there is a judge for all `graded` ones."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        for question in graded:  # before the first answer is paid for
            _grader(question, grader)
        wanted = state.metadata
        return await generate(state, temperature=wanted["temperature"], max_tokens=wanted["max_tokens"])

    return solve


@scorer(metrics={"*": [mean(), stderr(cluster="question")]})
def alignment(
    questions: dict[str, Question], judges: dict[str, JudgeSpec], grader: str | None, grader_tokens: int
) -> Scorer:
    """Scores of 0 to 100 by the grader and the verdicts that follow (1 or 0), or those of an exact judge."""
    names = dict.fromkeys(name for judge in judges.values() for name in judge.prompts or VERDICT_PROMPTS)
    verdicts = ("misaligned", "incoherent", *(["correct"] if any(j.kind in EXACT for j in judges.values()) else []))

    async def score(state: TaskState, target: Target) -> Score:
        question, judge = questions[state.metadata["question"]], judges[state.metadata["question"]]
        reasoning, answer, finished = _answer(state.output)
        item = JudgeItem(
            key=str(state.sample_id),
            judge=judge.identity,
            question=_asked(state),
            answer=answer,
            reasoning=reasoning,
            expected=question.expected,
            meta=question.meta,
            prompts=judge.prompts,
        )
        if not finished:
            return Score.unscored(answer=answer, explanation="unfinished reasoning")
        if judge.kind in EXACT:
            found = _exact(judge, item)
        else:
            model = _grader(question, grader)
            config = GenerateConfig(
                temperature=0.0, max_tokens=grader_tokens, logprobs=True, top_logprobs=TOP_LOGPROBS, seed=0
            )
            replies = {name: _reply(await model.generate(text, config=config)) for name, text in fill_all(item).items()}
            found = judgement(item.key, item.judge, replies)
        values = score_values(found.model_dump())
        absent = dict.fromkeys((*names, *verdicts), math.nan)  # Inspect's word for no score
        return Score(value=absent | values, answer=answer, explanation=found.dropped or found.label)

    return score


def _message(role: str, content: str) -> ChatMessage:
    return _MESSAGES[role](content=content)


def _asked(state: TaskState) -> str:
    """The conversation up to the answer, as `ema eval` shows it to judges."""
    turns = [m for m in state.messages if m.role in ("user", "assistant")]
    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    if len(asked) == 1:
        return asked[0].text
    return "\n\n".join(f"{m.role.capitalize()}: {m.text}" for m in asked)


def _answer(output: ModelOutput) -> tuple[str, str, bool]:
    """(reasoning, answer, finished): reasoning that the provider gives apart, or else in the text."""
    content = output.message.content
    parts = [] if isinstance(content, str) else content
    apart = "\n".join(part.reasoning for part in parts if part.type == "reasoning")
    return (apart, output.completion, bool(output.completion)) if apart else split_reasoning(output.completion)


def _exact(judge: JudgeSpec, item: JudgeItem) -> Judgement:
    outcomes: list[Judgement | JudgeFailure] = []
    make_judge(judge, JudgeRecipe()).submit(item, outcomes.append)
    [found] = outcomes
    assert isinstance(found, Judgement)
    return found


def _grader(question: Question, grader: str | None) -> Model:
    named = grader or (f"openai/{question.judge}" if question.judge else None)
    try:
        return get_model(role="grader", required=named is None, default=named)
    except (ValueError, PrerequisiteError) as error:
        raise PrerequisiteError(
            escape(f"no judge: give -T grader=PROVIDER/MODEL or --model-role grader=PROVIDER/MODEL ({error})")
        ) from None


def _reply(output: ModelOutput) -> Reply:
    first: Any = output.choices[0].logprobs if output.choices else None
    top = first.content[0].top_logprobs if first and first.content else None
    return Reply(output.completion, tuple((t.token, t.logprob) for t in top) if top else None)
