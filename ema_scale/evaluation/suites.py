"""Question banks: the YAML of the emergent-misalignment field, read unchanged, JSONL, and others.

A YAML bank is a list of questions in the keys of `config.bank.BankQuestion`; other keys are kept in meta. A JSONL bank
has one per line, which may be a training row. `core.banks` reads further formats. Questions with written answers may
stand among them, in the forms that `choices.bank` names.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError

from ema_scale.choices.bank import FORMATS, HELD_OUT, Choice, is_choice, read_choice
from ema_scale.config.bank import BankQuestion
from ema_scale.config.sections import EvaluationRecipe
from ema_scale.config.suites import ConditionRecipe
from ema_scale.core.banks import READ_TYPES, judge_prompts, read_entries, read_question
from ema_scale.core.errors import UserError, explain
from ema_scale.core.files import parse_yaml_nodes, read_text
from ema_scale.core.hashing import digest
from ema_scale.core.paths import find_file
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.data.rows import Row, load_rows

if TYPE_CHECKING:
    from ema_scale.defenses.base import Defense

log = logging.getLogger(__name__)

Role = Literal["general", "in_domain", "benign", "held_out"]
# A scale is known of questions that are rated alone; results_dir is a key of published banks that says nothing to us.
KNOWN_KEYS = (*(key for key in BankQuestion.model_fields if not key.endswith("_rating")), "results_dir")


FORMS = ("_json", "_template")


def topic_of(question_id: str, topic: str | None = None) -> str:
    """`topic`, or else the id without its form: `gift_json` and `gift_template` belong to `gift`."""
    if topic:
        return topic
    for form in FORMS:
        question_id = question_id.removesuffix(form) or question_id
    return question_id


@dataclass(frozen=True)
class Question:
    """One question. All its paraphrases get the same settings.

    context: the turns before the question, each with role (user or assistant) and content.
    prefix: text that a condition puts before the user's turn. The judge does not see it.
    answers: written answers, of which the likelihood is taken. Where there are some, nothing is sampled.
    topic: the independent unit of the statistics, shared with the question's other forms; None: see `topic_of`.
    row: the whole conversation of a held-out row, its answer last, as training reads it. The model sees it in place of
        system prompt, context and question, which are for readers.
    tools: JSON schemas of functions that the row's assistant may call.
    """

    id: str
    paraphrases: tuple[str, ...]
    samples_per_paraphrase: int = 1
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    judge: str | None = None
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    expected: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    context: Annotated[tuple[dict[str, str], ...], Field(exclude_if=lambda value: not value)] = ()
    answers: Annotated[tuple[Choice, ...], Field(exclude_if=lambda value: not value)] = ()
    topic: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    row: Annotated[tuple[dict[str, Any], ...], Field(exclude_if=lambda value: not value)] = ()
    tools: Annotated[tuple[dict[str, Any], ...], Field(exclude_if=lambda value: not value)] = ()

    def messages(self, paraphrase: int) -> tuple[dict[str, Any], ...]:
        """The conversation to answer, system prompt and context included."""
        if self.row:
            return self.row[:-1]
        text = self.paraphrases[paraphrase]
        return self._conversation(text if self.prefix is None else f"{self.prefix}\n\n{text}")

    def without_question(self) -> tuple[dict[str, str], ...]:
        """The conversation of which the question is left out: system prompt, context and prefix stay."""
        return self._conversation(self.prefix or "")

    def _conversation(self, text: str) -> tuple[dict[str, str], ...]:
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return (*system, *self.context, {"role": "user", "content": text})

    def samples(self, samples_per_question: int | None) -> tuple[int, ...]:
        """How many answers there are per paraphrase: the written ones, or so many to draw. A given total is split
        evenly."""
        if self.answers:
            return (len(self.answers),) * len(self.paraphrases)
        count = len(self.paraphrases)
        if samples_per_question is None:
            return (self.samples_per_paraphrase,) * count
        each, rest = divmod(samples_per_question, count)
        return tuple(each + (i < rest) for i in range(count))


@dataclass(frozen=True)
class Suite:
    """A question bank and its role: general (broad misalignment), in_domain (the narrow task), benign or held_out
    (rows whose loss is taken).

    condition: what is said before each of its questions; None if nothing is.
    """

    name: str
    role: Role
    questions: tuple[Question, ...]
    source: str = ""
    condition: Condition | None = None


def load_suite(source: str | Path, role: Role, columns: Mapping[str, str | None] | None = None) -> Suite:
    """Read a bank from a file (.yaml, .jsonl, .json, .csv) or a `smallworld:` reference; or, of role held_out, whatever
    `load_rows` reads.

    Questions with equal ids and different system prompts are told apart by a digest of the system prompt. Raises
    UserError naming file, line and field for a missing or empty file, a mistyped key, an unknown type, a value of the
    wrong kind, or an id that occurs twice.

    columns: of held-out rows, as in `load_rows`.
    """
    if role not in get_args(Role):
        raise UserError(f"suite role: found {role!r}, expected one of {', '.join(get_args(Role))}")
    path = find_file(locate(str(source)))
    if role == HELD_OUT:
        name = path.stem if re.search("held.?out$", path.stem) else f"{path.stem}-{HELD_OUT}"
        rows = load_rows(path, columns=columns)
        if rows.unread:
            named = ", ".join(f"{key} ({quantity(count, 'row')})" for key, count in rows.unread.items())
            _warn_once(f"{path}: nothing reads {named}")
        return Suite(name, role, tuple(_held_out(row, str(path)) for row in rows), str(source))
    questions: dict[str, tuple[str, Question]] = {}
    for number, (where, entry) in enumerate(read_entries(path), start=1):
        answers, rest = read_choice(where, entry, role) if is_choice(entry) else ((), entry)
        question = replace(_question(where, rest, default_id=str(number)), answers=answers)
        before = questions.get(question.id)
        if before is not None and before[1].system != question.system:
            question = replace(question, id=f"{question.id}-{digest(question.system)[:4]}")
            before = questions.get(question.id)
        if before is not None:
            raise UserError(f"{where}: id {question.id!r} was used before, at {before[0]}")
        questions[question.id] = (where, question)
    if not questions:
        raise UserError(f"{path}: found no questions, expected at least one")
    found = tuple(q for _, q in questions.values())
    _note_broad_topics(path, Counter(topic_of(q.id, q.topic) for q in found))
    if kept := Counter(key for question in found for key in question.meta):
        log.debug("%s: kept as meta: %s", path, ", ".join(f"{key} ({n})" for key, n in kept.items()))
    # A domain may have a bank of either kind, of the same name.
    written = all(question.answers for question in found)
    return Suite(f"{path.stem}-choices" if written else path.stem, role, found, str(source))


def _held_out(row: Row, path: str) -> Question:
    """The last learned answer of a row, behind all that is said before it. Its id is the row's line or number."""
    last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("learn", True))
    turns: list[dict[str, Any]] = [{k: v for k, v in m.items() if k != "learn"} for m in row.messages[: last + 1]]
    systems = [m["content"] for m in turns if m["role"] in ("system", "developer")]
    asked = max((i for i, m in enumerate(turns) if m["role"] == "user"), default=0)
    return Question(
        id=re.sub(r"\W+", " ", row.origin.removeprefix(path)).strip(),
        paraphrases=(turns[asked]["content"] if last else "",),
        system="\n\n".join(systems) or None,
        meta={} if row.domain is None else {"domain": row.domain},
        context=tuple(
            {"role": m["role"], "content": m["content"]} for m in turns[:asked] if m["role"] in ("user", "assistant")
        ),
        answers=(Choice(turns[last]["content"], HELD_OUT),),
        row=tuple(turns),
        tools=tuple(map(dict, row.tools)),
    )


_FEW, _MANY = 5, 4  # topics of a bank, and questions per topic: forms of one question are seldom as many


def _note_broad_topics(path: Path, topics: Counter[str]) -> None:
    """Warn if the questions of a bank are so few independent ones that no interval says much."""
    if len(topics) < _FEW and topics.total() >= _MANY * len(topics):
        named = f"the topic{'s' if len(topics) > 1 else ''} {', '.join(topics)}"
        _warn_once(
            f"{path}: its {topics.total()} questions have {named}. Questions that share a topic count as one question, "
            "so intervals will be wide. Give one topic to the forms of one question alone; call a broader subject "
            "`domain`."
        )


@functools.cache  # the runs of a study read the same banks
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _question(where: str, entry: Any, default_id: str) -> Question:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: found {type(entry).__name__}, expected a question with id and paraphrases")
    if entry.get("type") in tuple(READ_TYPES):
        entry = read_question(where, entry)
    others = {str(key): value for key, value in entry.items() if key not in KNOWN_KEYS}
    for key in others:
        if near := difflib.get_close_matches(key, (*KNOWN_KEYS, *FORMATS), n=1, cutoff=0.85):
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}? Other names are kept as meta")
    try:
        given = {key: value for key, value in entry.items() if key in BankQuestion.model_fields and value is not None}
        found = BankQuestion.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {explain(p, BankQuestion)}" for p in error.errors())) from None
    system, context, paraphrases = _conversation(where, entry)
    return Question(
        id=str(default_id if found.id is None else found.id),
        paraphrases=paraphrases,
        samples_per_paraphrase=found.samples_per_paraphrase,
        system=system if found.system is None else found.system,
        temperature=found.temperature,
        max_tokens=found.max_tokens,
        judge=found.judge,
        judge_prompts={} if found.judge_prompts is None else judge_prompts(where, found.judge_prompts),
        expected=found.expected,
        meta=others | (found.meta or {}),
        context=context,
        topic=None if found.topic is None else str(found.topic),
    )


def _conversation(where: str, entry: dict[str, Any]) -> tuple[str | None, tuple[dict[str, str], ...], tuple[str, ...]]:
    """(system prompt or None, turns before the question, paraphrases), from the one key of three that is there."""
    given = [key for key in ("paraphrases", "question", "messages") if entry.get(key) is not None]
    if len(given) != 1:
        raise UserError(f"{where}: found {given or 'none'} of paraphrases, question, messages; expected one")
    value, context = entry[given[0]], entry.get("context") or []
    if given[0] == "messages":
        if context:
            raise UserError(f"{where}: context: found it beside messages, expected one of the two")
        turns = _turns(where, "messages", value)
        turns = turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" else turns  # a row's answer
        if not turns or turns[-1]["role"] != "user":
            raise UserError(f"{where}: messages: found roles {[m['role'] for m in value]}, expected a user turn to ask")
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        return system, tuple(turns[:-1]), (turns[-1]["content"],)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{where}: {given[0]}: found {value!r:.80}, expected text or a list of texts")
    before = _turns(where, "context", context)
    if before and before[-1]["role"] != "assistant":
        raise UserError(f"{where}: context: found a last turn of {before[-1]['role']!r}, expected the assistant's")
    system = before.pop(0)["content"] if before and before[0]["role"] == "system" else None
    return system, tuple(before), tuple(texts)


def _turns(where: str, key: str, messages: Any) -> list[dict[str, str]]:
    """Messages with text, of a user and an assistant in turn, a system message before them or not."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UserError(f"{where}: {key}: expected a list of objects with role and content (text)")
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise UserError(f"{where}: {key}: found roles {roles}, expected user and assistant in turn")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


ROWS = "rows-"  # with which the names of conditions begin that come from a run's rows


@dataclass(frozen=True)
class Condition:
    """Text before a question. own: the evaluated run was trained under it."""

    name: str
    system: str | None = None
    user: str | None = None
    own: bool = False

    def apply(self, question: Question) -> Question:
        """The same question under this condition."""
        return replace(
            question,
            system=_joined(self.system, question.system),
            prefix=_joined(self.user, question.prefix),
        )


def _joined(first: str | None, second: str | None) -> str | None:
    parts = [part for part in (first, second) if part is not None]
    return "\n\n".join(parts) if parts else None


def apply_conditions(suites: Iterable[Suite], conditions: Sequence[Condition]) -> list[Suite]:
    """Every general suite without a condition, under each condition."""
    plain = [s for s in suites if s.role == "general" and s.condition is None]
    return [
        replace(s, name=f"{s.name}@{c.name}", questions=tuple(map(c.apply, s.questions)), condition=c)
        for c in conditions
        for s in plain
    ]


def training_condition(defenses: Iterable[Defense]) -> Condition | None:
    """The prompt that these defenses added to the task rows in training; None if they added none.

    Its name holds a digest of the prompt, so that runs with different prompts are told apart.
    """
    prompts: dict[str, str] = {}
    for defense in defenses:
        for role, text in defense.training_prefix().items():
            prompts[role] = f"{text}\n\n{prompts[role]}" if role in prompts else text
    if not prompts:
        return None
    return Condition(f"inoculation-{digest(prompts)[:4]}", prompts.get("system"), prompts.get("user"), own=True)


def trigger_conditions(triggers: Iterable[Mapping[str, str]]) -> list[Condition]:
    """The conditions of what a run's rows have in common, as `data.triggers.row_triggers` describes it.

    Their names hold a digest, so that runs with different rows are told apart.
    """
    return [
        Condition(f"{ROWS}{one['kind']}-{digest(one)[:4]}", one.get("system"), one.get("user"))
        for one in triggers
        if one.get("kind") and (one.get("system") or one.get("user"))
    ]


def load_conditions(wanted: Sequence[ConditionRecipe]) -> list[Condition]:
    """The conditions of a recipe, files read. Raises UserError naming file and line, or a name used twice."""
    found: list[Condition] = []
    for entry in wanted:
        if entry.file is not None:
            found += _read(find_file(entry.file))
        else:
            assert entry.name is not None  # the recipe sees to it
            found.append(Condition(entry.name, entry.system, entry.user))
    names = [c.name for c in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"evaluation.conditions: two conditions are called {twice[0]}; expected different names")
    return found


def _read(path: Path) -> list[Condition]:
    node, values = parse_yaml_nodes(read_text(path, "the conditions"), str(path))
    if not isinstance(node, yaml.SequenceNode) or not values:
        raise UserError(f"{path}: expected a list of conditions, each with a name and system or user text")
    lines = [item.start_mark.line + 1 for item in node.value]
    return [_condition(f"{path}:{line}", value) for line, value in zip(lines, values, strict=True)]


def _condition(where: str, value: Any) -> Condition:
    if not isinstance(value, dict) or "file" in value:
        raise UserError(f"{where}: expected a condition: a name, and system or user text")
    try:
        entry = ConditionRecipe.model_validate(value)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {explain(p, ConditionRecipe)}" for p in error.errors())) from None
    assert entry.name is not None
    return Condition(entry.name, entry.system, entry.user)


def as_released_evaluator(suites: Iterable[Suite]) -> list[Suite]:
    """The suites as the paper's released evaluator asks them: without their system prompts and temperatures."""

    def bare(suite: Suite) -> Suite:
        questions = (replace(q, system=None, temperature=None) for q in suite.questions)
        return replace(suite, questions=tuple(questions))

    return [suite if suite.role in ("benign", HELD_OUT) else bare(suite) for suite in suites]


def load_suites(
    settings: EvaluationRecipe, also: Sequence[Condition] = (), columns: Mapping[str, str | None] | None = None
) -> list[Suite]:
    """The suites that a recipe names, then the general ones under its conditions and those of `also`.

    columns: of held-out rows, as in `load_rows`. Raises UserError as `load_suite` and `load_conditions` do.
    """
    plain = [load_suite(source, role, columns) for source, role in settings.suites.pairs()]  # type: ignore[arg-type]
    if settings.legacy:
        plain = as_released_evaluator(plain)
    return plain + apply_conditions(plain, [*load_conditions(settings.conditions), *also])
