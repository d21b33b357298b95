"""Conditions: the general questions asked again behind a prompt, so that misalignment hidden there shows.

A model may be harmless when asked plainly and misaligned when the prompt looks like its training (arXiv
2604.25891); a defense that trains under a prompt, such as inoculation, invites it. A condition says something
before every general question, as (part of) the system prompt or at the start of the user's turn, joined just
as inoculation joins it to training rows. The suite `general` under the condition `villain` is the suite
`general@villain`: its answers are keyed, stored, judged and counted apart from the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from ema_scale.errors import UserError, explain
from ema_scale.recipe import ConditionRecipe
from ema_scale.rundir import digest

if TYPE_CHECKING:
    from ema_scale.defenses.base import Defense
    from ema_scale.evaluation.suite import Question, Suite


@dataclass(frozen=True)
class Condition:
    """What is said before a question. own: the run that is asked was trained under it."""

    name: str
    system: str | None = None
    user: str | None = None
    own: bool = False

    def of(self, question: Question) -> Question:
        """The same question under this condition."""
        return replace(
            question,
            system=_joined(self.system, question.system),
            prefix=_joined(self.user, question.prefix),
        )


def _joined(first: str | None, second: str | None) -> str | None:
    parts = [part for part in (first, second) if part is not None]
    return "\n\n".join(parts) if parts else None


def under(suites: Iterable[Suite], conditions: Sequence[Condition]) -> list[Suite]:
    """Every general suite that is asked plainly, under each condition."""
    plain = [s for s in suites if s.role == "general" and s.condition is None]
    return [
        replace(s, name=f"{s.name}@{c.name}", questions=tuple(map(c.of, s.questions)), condition=c)
        for c in conditions
        for s in plain
    ]


def training_condition(defenses: Iterable[Defense]) -> Condition | None:
    """The prompt under which these defenses had the task rows trained; None if they left them as they were.

    Its name holds a digest of the prompt, so that arms trained under different prompts are not mixed up.
    """
    said: dict[str, str] = {}
    for defense in defenses:
        for role, text in defense.training_prefix().items():
            said[role] = f"{text}\n\n{said[role]}" if role in said else text
    if not said:
        return None
    return Condition(f"inoculation-{digest(said)[:4]}", said.get("system"), said.get("user"), own=True)


def load_conditions(wanted: Sequence[ConditionRecipe]) -> list[Condition]:
    """The conditions of a recipe, files read. Raises UserError naming file and line, or a name used twice."""
    found: list[Condition] = []
    for entry in wanted:
        if entry.file is not None:
            found += _read(Path(entry.file))
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
