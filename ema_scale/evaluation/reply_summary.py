"""The summary of a judge's replies: what could not be read, and what they took."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ema_scale.core.text import percent
from ema_scale.evaluation.judges.scores import unread_replies
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import Judgement, Summary
from ema_scale.evaluation.reply_records import JudgeUsage, UnreadReplies
from ema_scale.evaluation.store import Store
from ema_scale.inference.usage import Usage

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)

UNREAD_ALARM = 0.05  # a larger share of unread replies is an alarm


def warn_of_unread(summary: Summary) -> None:
    """Show three replies in the log if more than a twentieth of the judged answers has one that cannot be read."""
    if (found := summary.unread) and found.answers > UNREAD_ALARM * found.of:
        replies = "\n".join(f"    {text!r:.200}" for text in found.examples)
        log.warning(
            "ALARM: %s: the judge's replies about %d of %d answers (%s) cannot be read; these answers count in no "
            "rate. Such replies, by the grammar of docs/judge_replies.md:\n%s",
            summary.name,
            found.answers,
            found.of,
            percent(found.answers / found.of),
            replies,
        )


def reply_figures(groups: Iterable[PromptGroup], store: Store, settings: JudgeRecipe) -> dict[str, Any]:
    """The summary's `unread`, None where every reply could be read, and `judge_usage`, None where nothing was paid."""
    used, with_replies, unreadable, examples = Usage(), 0, 0, list[str]()
    for row in _judgements(groups, store):
        if row.raw:
            with_replies += 1
            if found := unread_replies(row):
                unreadable += 1
                examples += found[: len(examples) < 3]
        if row.usage:
            calls, read, written = (row.usage.get(name, 0) for name in used.to_row())
            used.add(Usage(calls, read, written))
    price = used.price(settings.price_input, settings.price_output)
    return {
        "unread": UnreadReplies(answers=unreadable, of=with_replies, examples=examples) if unreadable else None,
        "judge_usage": JudgeUsage(**used.to_row(), price=price) if used.calls else None,
    }


def _judgements(groups: Iterable[PromptGroup], store: Store) -> Iterator[Judgement]:
    """The judgements of these answers that have replies or usage."""
    rows = store.judgements
    for group in groups:
        for key in group.keys:
            judged = rows.judged(key, group.judge.identity)
            if judged is not None and judged.has_replies:
                yield rows[key, group.judge.identity]
