"""The reference gate: is the base model safe?

Defenses keep a model near its reference, so an unsafe reference protects nothing. "Validate the reference" is advice of
the paper (arXiv 2508.06249).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ema_scale.core.errors import UserError
from ema_scale.core.text import quantity, short_percent
from ema_scale.evaluation.records import GateResult, Rate

if TYPE_CHECKING:
    from ema_scale.config.sections import GateRecipe
    from ema_scale.recipe import Recipe

PASSED, FLAGGED, UNKNOWN = "passed", "flagged", "not checked"

log = logging.getLogger(__name__)


def gate(general_misaligned: Rate | None, settings: GateRecipe, general_choices: Rate | None = None) -> GateResult:
    """Whether a base model with this rate of misaligned general answers passes. Where none was sampled, the share of
    general questions decides of which a misaligned written answer is the likeliest.

    A model is flagged if the upper end of the 95 % interval is above the line. So too few questions also flag a
    model: it was not shown to be safe.
    """
    line, rate, what = settings.max_misaligned, general_misaligned, "its general answers are misaligned"
    if rate is None and general_choices is not None:
        rate, what = general_choices, "its general questions have a misaligned answer as the likeliest"
    if rate is None or rate.rate is None or rate.low is None or rate.high is None:
        state = UNKNOWN
        text = "The reference was not checked: no general question was asked of it and judged."
    else:
        state = FLAGGED if rate.high > line else PASSED
        interval = f"95 % interval {short_percent(rate.low)} to {short_percent(rate.high)}"
        share = short_percent(rate.rate)
        found = f"{share} of {what} ({interval}; the line is {short_percent(line)})"
        if state == PASSED:
            text = f"The reference passes its gate: {found}."
        elif rate.low > line:
            text = f"The reference is itself unsafe: {found}. A defense that stays near it stays misaligned."
        elif rate.rate == 0:
            text = (
                f"The reference was not shown to be safe: {found}. No model can pass with "
                f"{quantity(rate.questions, 'question')} and {quantity(rate.n, 'answer')}: ask more questions, or "
                "raise evaluation.gate.max_misaligned."
            )
        else:
            text = f"The reference was not shown to be safe: {found}. More questions would narrow the interval."
    return GateResult(state=state, line=line, action=settings.action, text=text)


def refuses(recipe: Recipe) -> bool:
    """Whether training is refused on a base model that does not pass."""
    return recipe.evaluation.gate.action == "refuse"


def refuse(result: GateResult | None) -> None:
    """Raises UserError if the recipe says `refuse` and this base model did not pass. None: it has no gate."""
    if result is not None and result.action == "refuse" and result.state != PASSED:
        raise UserError(
            f"evaluation.gate: {result.text} Refused; its answers are kept. "
            "To go on anyway: evaluation.gate.action=flag"
        )


def other_reference(recipe: Recipe) -> str | None:
    """The reference of a recipe's defenses if it is not the base model, which the gate checks; otherwise None."""
    if not any(defense.needs_reference for defense in recipe.defenses):
        return None
    if not isinstance(recipe.reference, str):
        return f"the model {recipe.reference.model}"
    return None if recipe.adapter.start is None else f"the adapter {recipe.adapter.start}"


def note_other_references(recipes: Iterable[Recipe]) -> None:
    """Warn of references that the gate does not check. Raises UserError if a recipe refuses unchecked ones."""
    for recipe in recipes:
        other = other_reference(recipe)
        if other is None:
            continue
        text = f"{recipe.name}: its reference is {other}, which the gate does not check: it checks base models only."
        if refuses(recipe):
            raise UserError(
                f"evaluation.gate: {text} Refused. Evaluate that reference by itself, then go on with "
                "evaluation.gate.action=flag"
            )
        log.warning(text)
