"""What became of rows when they were tokenized: counts, and the three lines that a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ema_scale.core.records import DataReport
from ema_scale.core.text import quantity
from ema_scale.data.encoded import Encoded

_REASONS = 3


@dataclass
class TokenReport:
    """Counts of a tokenised set; every row that was changed or left out is in it.

    rows, tokens, assistant_tokens: what is trained on; assistant tokens are those that are learned.
    longest: tokens of the longest row.
    truncated: rows that were cut to max_length.
    dropped_no_assistant: rows that the cut left without a learned token.
    refused: rows that the chat template cannot show, or in which what is learned cannot be found.
    disarmed: rows that held special tokens as text.
    system_folded: rows whose system prompt was put into a user turn.
    reasoning_dropped: earlier turns whose reasoning the template leaves out.
    no_end: learned turns for which no token that ends them is learned.
    unlike_prompt: learned turns that begin otherwise than the generation prompt does, as sampling asks for them.
    straddled: learned spans that begin or end inside a token.
    unknown: tokens that the tokenizer does not know.
    by_tag: rows of each part of the mix.
    date: the date that the chat template writes; "" if it writes none.
    """

    rows: int = 0
    tokens: int = 0
    assistant_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped_no_assistant: int = 0
    refused: int = 0
    disarmed: int = 0
    system_folded: int = 0
    reasoning_dropped: int = 0
    no_end: int = 0
    unlike_prompt: int = 0
    straddled: int = 0
    unknown: int = 0
    by_tag: dict[str, int] = field(default_factory=dict)
    date: str = ""

    def add(self, encoded: Encoded) -> None:
        """Count what was changed in a row."""
        self.truncated += encoded.truncated
        self.disarmed += encoded.disarmed
        self.system_folded += encoded.folded
        self.reasoning_dropped += encoded.reasoning_dropped
        self.no_end += encoded.no_end
        self.unlike_prompt += encoded.unlike_prompt
        self.straddled += encoded.straddled
        self.unknown += encoded.unknown

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, reasons: Sequence[str] = ()) -> list[str]:
        """What a person should know, in three lines: what is learned; what was cut or dropped, with the commonest of
        these reasons (one per dropped row); what was changed."""
        return [
            f"{quantity(self.rows, 'row')}, {self.tokens:,} tokens, {self.assistant_tokens:,} of them learned",
            self._lost(reasons),
            "; ".join(self.notes()) or "every text is trained on as it stands in the rows",
        ]

    def _lost(self, reasons: Sequence[str]) -> str:
        out = [f"{quantity(self.truncated, 'row')} cut to the longest allowed length"]
        counts = Counter(reasons)
        if self.dropped_no_assistant:
            counts["no assistant token was left after the cut"] += self.dropped_no_assistant
        common = "; ".join(f"{count:,} x {reason}" for reason, count in counts.most_common(_REASONS))
        more = f"; {len(counts) - _REASONS} other reasons" if len(counts) > _REASONS else ""
        out.append(f"{quantity(sum(counts.values()), 'row')} dropped" + (f" ({common}{more})" if counts else ""))
        return ", ".join(out)

    def notes(self) -> list[str]:
        """What was changed, or is worth a look."""
        said = (
            (self.system_folded, "system prompts put into a user turn, for the template shows none there"),
            (self.disarmed, "rows held special tokens as text; these were broken up"),
            (self.reasoning_dropped, "earlier turns without their reasoning, which the template leaves out"),
            (self.no_end, "learned turns without a token that ends them: the model does not learn to stop there"),
            (
                self.unlike_prompt,
                "learned turns that begin otherwise than the generation prompt (it may open a thought): answers are "
                "sampled behind what these rows do not show",
            ),
            (self.straddled, "learned spans that begin or end inside a token"),
            (self.unknown, "tokens that the tokenizer does not know"),
        )
        found = [f"{count:,} {what}" for count, what in said if count]
        return [*found, f"the chat template writes the date {self.date}"] if self.date else found


def report_lines(report: DataReport) -> list[str]:
    """What is learned, what was cut or dropped and why, and what was changed: one line each.

    None for rows that came as tokens, of which only the number is known.
    """
    if "assistant_tokens" not in report.tokens:
        return []
    known = TokenReport(rows=sum(report.rows.values())).to_dict()
    counts = TokenReport(**{**known, **{k: v for k, v in report.tokens.items() if k in known}})
    return counts.lines([one["reason"] for one in report.dropped if "reason" in one])


def cut_line(report: DataReport) -> str:
    """What was cut or dropped and why; "" if nothing was."""
    counts = {name: report.tokens.get(name) or 0 for name in ("truncated", "dropped_no_assistant")}
    if not report.dropped and not any(counts.values()):
        return ""
    if known := report_lines(report):
        return known[1]
    gone = len(report.dropped) + counts["dropped_no_assistant"]
    return f"{quantity(counts['truncated'], 'row')} cut to the longest allowed length, {quantity(gone, 'row')} dropped"
