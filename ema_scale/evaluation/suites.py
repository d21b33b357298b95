"""Question banks: the YAML of the emergent-misalignment field, read unchanged, and JSONL.

A YAML bank is a list of questions:
  id (text or integer), paraphrases, samples_per_paraphrase, system, temperature, judge, judge_prompts, type;
of our own: expected (the right answer, for exact matching), meta (whatever an exact judge needs).
A JSONL bank has one such question per line, or {"question": ...}, or chat rows {"messages": [...]},
of which the user message is asked (with the system message before it, if any).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import ValidationError

from ema_scale.config.sections import ConditionRecipe, EvaluationRecipe
from ema_scale.core.errors import UserError, explain
from ema_scale.core.hashing import digest
from ema_scale.core.paths import find_file
from ema_scale.core.uri import locate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ema_scale.defenses.base import Defense

Role = Literal["general", "in_domain", "benign"]
KNOWN_KEYS = (
    "id", "type", "paraphrases", "question", "messages", "samples_per_paraphrase", "system", "temperature",
    "max_tokens", "judge", "judge_prompts", "expected", "meta", "results_dir", "context",
)  # fmt: skip
TYPES = ("free_form", "free_form_0_100", "free_form_judge", "free_form_judge_0_100", "exact_match")


@dataclass(frozen=True)
class Question:
    """One question: the independent unit of the statistics. All its paraphrases get the same settings.

    prefix: text that a condition puts before the user's turn. The judge does not see it.
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

    def messages(self, paraphrase: int) -> tuple[dict[str, str], ...]:
        """The conversation to answer, system prompt included."""
        text = self.paraphrases[paraphrase]
        user = {"role": "user", "content": text if self.prefix is None else f"{self.prefix}\n\n{text}"}
        return ({"role": "system", "content": self.system}, user) if self.system is not None else (user,)

    def samples(self, samples_per_question: int | None) -> tuple[int, ...]:
        """How many answers to draw per paraphrase. A given total is split evenly."""
        count = len(self.paraphrases)
        if samples_per_question is None:
            return (self.samples_per_paraphrase,) * count
        each, rest = divmod(samples_per_question, count)
        return tuple(each + (i < rest) for i in range(count))


@dataclass(frozen=True)
class Suite:
    """A question bank and its role: general (broad misalignment), in_domain (the narrow task) or benign.

    condition: what is said before each of its questions; None if nothing is.
    """

    name: str
    role: Role
    questions: tuple[Question, ...]
    source: str = ""
    condition: Condition | None = None


def load_suite(source: str | Path, role: Role) -> Suite:
    """Read a bank from a .yaml or .jsonl file or a `smallworld:` reference.

    Raises UserError naming file, line and field for a missing or empty file, an unknown key or type, a value
    of the wrong kind, or an id that occurs twice.
    """
    if role not in get_args(Role):
        raise UserError(f"suite role: found {role!r}, expected one of {', '.join(get_args(Role))}")
    path = find_file(locate(str(source)))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the question bank ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    entries = _jsonl_entries(path, text) if path.suffix == ".jsonl" else _yaml_entries(path, text)
    questions: dict[str, tuple[str, Question]] = {}
    for number, (where, entry) in enumerate(entries, start=1):
        question = _question(where, entry, default_id=str(number))
        if question.id in questions:
            raise UserError(f"{where}: id {question.id!r} was used before, at {questions[question.id][0]}")
        questions[question.id] = (where, question)
    if not questions:
        raise UserError(f"{path}: found no questions, expected at least one")
    return Suite(path.stem, role, tuple(q for _, q in questions.values()), str(source))


def _yaml_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, list) or not isinstance(node, yaml.SequenceNode):
        found = "an empty file" if values is None else type(values).__name__
        raise UserError(f"{path}: found {found}, expected a list of questions")
    lines = [item.start_mark.line + 1 for item in node.value]
    return [(f"{path}:{line}", value) for line, value in zip(lines, values, strict=True)]


def _jsonl_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"{path}:{number}", json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); expected one object per line") from None
    return entries


def _question(where: str, entry: Any, default_id: str) -> Question:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: found {type(entry).__name__}, expected a question with id and paraphrases")
    for key in entry:
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(str(key), KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(KNOWN_KEYS)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    if entry.get("type", TYPES[0]) not in TYPES:
        raise UserError(f"{where}: type: found {entry['type']!r}, expected one of {', '.join(TYPES)}")
    if entry.get("context"):
        raise UserError(f"{where}: context: earlier turns are not supported; expected a single question")
    system, paraphrases = _conversation(where, entry)
    return Question(
        id=str(_typed(where, entry, "id", (str, int), default_id)),
        paraphrases=paraphrases,
        samples_per_paraphrase=_positive(where, entry, "samples_per_paraphrase") or 1,
        system=_typed(where, entry, "system", (str,), system),
        temperature=_temperature(where, entry),
        max_tokens=_positive(where, entry, "max_tokens"),
        judge=_typed(where, entry, "judge", (str,), None),
        judge_prompts=_prompts(where, entry),
        expected=None if entry.get("expected") is None else str(entry["expected"]),
        meta=_typed(where, entry, "meta", (dict,), None) or {},
    )


def _conversation(where: str, entry: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """(system prompt or None, paraphrases) from the one key of three that is there."""
    given = [key for key in ("paraphrases", "question", "messages") if entry.get(key) is not None]
    if len(given) != 1:
        raise UserError(f"{where}: found {given or 'none'} of paraphrases, question, messages; expected one")
    value = entry[given[0]]
    if given[0] == "messages":
        return _from_messages(where, value)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{where}: {given[0]}: found {value!r:.80}, expected text or a list of texts")
    return None, tuple(texts)


def _from_messages(where: str, messages: Any) -> tuple[str | None, tuple[str, ...]]:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UserError(f"{where}: messages: expected a list of objects with role and content (text)")
    roles = [m["role"] for m in messages]
    shape = roles[1:] if roles[:1] == ["system"] else roles
    if shape not in (["user"], ["user", "assistant"]):
        raise UserError(f"{where}: messages: found roles {roles}, expected one user turn to ask")
    system = messages[0]["content"] if len(shape) < len(roles) else None
    return system, (next(m["content"] for m in messages if m["role"] == "user"),)


def _prompts(where: str, entry: dict[str, Any]) -> dict[str, str]:
    prompts = _typed(where, entry, "judge_prompts", (dict,), None) or {}
    for name, template in prompts.items():
        if not isinstance(template, str) or "{answer}" not in template:
            raise UserError(f"{where}: judge_prompts.{name}: expected text with {{answer}} in it")
    return prompts


def _temperature(where: str, entry: dict[str, Any]) -> float | None:
    value = _typed(where, entry, "temperature", (int, float), None)
    if value is not None and value < 0:
        raise UserError(f"{where}: temperature: found {value}, expected 0 or more")
    return None if value is None else float(value)


def _positive(where: str, entry: dict[str, Any], key: str) -> int | None:
    value = _typed(where, entry, key, (int,), None)
    if value is not None and value < 1:
        raise UserError(f"{where}: {key}: found {value}, expected 1 or more")
    return value


def _typed(where: str, entry: dict[str, Any], key: str, kinds: tuple[type, ...], default: Any) -> Any:
    value = entry.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{where}: {key}: found {value!r:.80}, expected {expected}")
    return value


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
    try:
        text = path.read_text(encoding="utf-8")
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot read the conditions ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
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

    return [suite if suite.role == "benign" else bare(suite) for suite in suites]


def load_suites(settings: EvaluationRecipe, also: Sequence[Condition] = ()) -> list[Suite]:
    """The suites that a recipe names, then the general ones under its conditions and those of `also`.

    Raises UserError as `load_suite` and `load_conditions` do.
    """
    plain = [load_suite(source, role) for source, role in settings.suites.pairs()]  # type: ignore[arg-type]
    if settings.legacy:
        plain = as_released_evaluator(plain)
    return plain + apply_conditions(plain, [*load_conditions(settings.conditions), *also])
