"""The summary of a judge's replies: what could not be read, and what they took."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

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


def unread(groups: Iterable[PromptGroup], store: Store) -> UnreadReplies | None:
    """The answers of which a reply could not be read; None if there are none."""
    rows = [row for row in _judgements(groups, store) if row.raw]
    replies = [found for row in rows if (found := unread_replies(row))]
    if not replies:
        return None
    return UnreadReplies(answers=len(replies), of=len(rows), examples=[found[0] for found in replies[:3]])


def judge_usage(groups: Iterable[PromptGroup], store: Store, settings: JudgeRecipe) -> JudgeUsage | None:
    """What the judgements of these answers took; None if none was paid for."""
    used = Usage()
    for row in _judgements(groups, store):
        if row.usage:
            calls, read, written = (row.usage.get(name, 0) for name in used.to_row())
            used.add(Usage(calls, read, written))
    if not used.calls:
        return None
    return JudgeUsage(**used.to_row(), price=used.price(settings.price_input, settings.price_output))


def _judgements(groups: Iterable[PromptGroup], store: Store) -> list[Judgement]:
    pairs = [(key, group.judge.identity) for group in groups for key in group.keys]
    return [store.judgements[pair] for pair in pairs if pair in store.judgements]
