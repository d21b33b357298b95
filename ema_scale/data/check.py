"""`ema data check`: what is in a training file, before it costs a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ema_scale.core.errors import UserError
from ema_scale.core.text import quantity
from ema_scale.data.report import TokenReport
from ema_scale.data.rows import Dropped, Rows, load_rows, reasons
from ema_scale.data.token_store import TokenStore, row_key
from ema_scale.data.tokens import Encoder, encode_rows

_SHOWN = 10


@dataclass
class DataReport:
    """Counts of one source.

    turns: assistant turns of a row -> rows. learned_turns: assistant turns that are learned.
    bad: records left out, and why. unread: columns, and keys of messages, that nothing reads -> rows that have them.
    Only with a tokenizer: tokens, lengths (percentile -> tokens), unmaskable (rows in which what is learned cannot be
    found, and why), and notes (what training would change).
    """

    source: str
    sha256: str
    rows: int
    roles: dict[str, int]
    turns: dict[int, int]
    learned_turns: int
    with_system: int
    with_tools: int
    duplicates: int
    characters: int
    bad: list[Dropped] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    max_length: int | None = None
    tokens: int | None = None
    assistant_tokens: int | None = None
    lengths: dict[str, int] = field(default_factory=dict)
    truncated: int | None = None
    without_answer: int | None = None
    unmaskable: list[Dropped] = field(default_factory=list)
    disarmed: int | None = None
    unknown: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether every row can be trained on."""
        return not self.bad and not self.unmaskable

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_data(
    source: str,
    tokenizer: Any = None,
    max_length: int = 2048,
    *,
    columns: Mapping[str, str | None] | None = None,
    learn: Literal["all", "last", "marked"] = "all",
    cache: Path | None = None,
) -> DataReport:
    """Read every record of `source` and count; with a tokenizer, count tokens too.

    columns, learn: as in `load_rows`. cache: a folder in which a training finds what was tokenized here.

    Raises UserError if no record can be read.
    """
    rows = load_rows(source, on_bad="drop", columns=columns, learn=learn)
    keys = [row_key(row) for row in rows]
    answers = [[m for m in row.messages if m["role"] == "assistant"] for row in rows]
    report = DataReport(
        source=rows.source,
        sha256=rows.sha256,
        rows=len(rows),
        roles=dict(Counter(m["role"] for row in rows for m in row.messages)),
        turns=dict(sorted(Counter(map(len, answers)).items())),
        learned_turns=sum(m.get("learn", True) for turns in answers for m in turns),
        with_system=sum(any(m["role"] in ("system", "developer") for m in row.messages) for row in rows),
        with_tools=sum(bool(row.tools) for row in rows),
        duplicates=len(keys) - len(set(keys)),
        characters=sum(len(m["content"]) for row in rows for m in row.messages),
        bad=rows.dropped,
        unread=rows.unread,
    )
    if tokenizer is not None:
        _count_tokens(report, rows, keys, tokenizer, max_length, cache)
    return report


def _count_tokens(
    report: DataReport, rows: Rows, keys: Sequence[str], tokenizer: Any, max_length: int, cache: Path | None
) -> None:
    import numpy as np

    encoder = Encoder(tokenizer)
    store = TokenStore(cache, encoder.template, max_length, False) if cache is not None else None
    lengths = []
    counts = TokenReport(date=encoder.template.written_date)
    chunks = encode_rows(rows, keys, encoder, max_length, store=store)
    for row, encoded in ((row, encoded) for chunk in chunks for _, row, encoded in chunk):
        if isinstance(encoded, UserError):
            report.unmaskable.append(Dropped(row.origin, str(encoded)))
            continue
        lengths.append(encoded.length)
        learned = int(encoded.assistant_mask.sum())
        counts.assistant_tokens += learned
        counts.dropped_no_assistant += not learned
        counts.add(encoded)
    report.max_length, report.assistant_tokens, report.disarmed = max_length, counts.assistant_tokens, counts.disarmed
    report.tokens = sum(min(n, max_length) for n in lengths)
    report.truncated = sum(n > max_length for n in lengths)
    report.without_answer, report.unknown, report.notes = counts.dropped_no_assistant, counts.unknown, counts.notes()
    if lengths:
        points = (0, 50, 90, 99, 100)
        report.lengths = {f"p{p}": int(v) for p, v in zip(points, np.percentile(lengths, points), strict=True)}


def render(report: DataReport) -> str:
    """The report as text."""

    def joined(counts: Mapping[Any, int]) -> str:
        return ", ".join(f"{key}: {count}" for key, count in counts.items())

    lines = [
        f"{report.source}  sha256 {report.sha256[:12]}",
        f"rows             {report.rows}  ({report.with_system} with a system prompt, {report.with_tools} with tools)",
        f"roles            {joined(report.roles)}",
        f"assistant turns  {joined(report.turns)}  (turns: rows), {report.learned_turns} of them learned",
        f"duplicates       {report.duplicates}",
    ]
    if report.unread:
        lines.append(f"not read         {joined(report.unread)}  (columns or keys: rows that have them)")
    if report.tokens is not None:
        are = "is" if report.truncated == 1 else "are"
        lines += [
            f"tokens           {report.tokens}, {report.assistant_tokens} of them learned",
            f"tokens per row   {joined(report.lengths)}",
            f"truncated        {quantity(report.truncated or 0, 'row')} {are} longer than {report.max_length} tokens; "
            f"{report.without_answer} of all rows have no learned token within them",
        ]
        if report.unknown:
            lines.append(f"unknown tokens   {report.unknown / max(report.tokens, 1):.1%} of all")
        lines += [f"note             {note}" for note in report.notes]
    for title, problems in (("bad rows", report.bad), ("cannot be masked", report.unmaskable)):
        lines.append(f"{title:<16} {len(problems)}")
        lines += [reasons(problems, _SHOWN)] if problems else []
    return "\n".join(lines)
