"""`ema data check`: what is in a training file, before it costs a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.data.rows import Dropped, Row, load_rows
from ema_scale.data.tokens import Encoder

_SHOWN = 10


@dataclass
class DataReport:
    """Counts of one source. lengths: percentile -> tokens (only with a tokenizer); bad: records left out, and why."""

    source: str
    sha256: str
    rows: int
    roles: dict[str, int]
    turns: dict[int, int]
    with_system: int
    duplicates: int
    characters: int
    bad: list[Dropped] = field(default_factory=list)
    max_length: int | None = None
    tokens: int | None = None
    assistant_tokens: int | None = None
    lengths: dict[str, int] = field(default_factory=dict)
    truncated: int | None = None
    unmaskable: list[Dropped] = field(default_factory=list)
    disarmed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_data(source: str, tokenizer: Any = None, max_length: int = 2048) -> DataReport:
    """Read every record of `source` and count; with a tokenizer, count tokens too.

    Raises UserError if there is nothing to read at all.
    """
    rows = load_rows(source, on_bad="drop")
    texts = Counter(json.dumps(row.messages, sort_keys=True) for row in rows)
    report = DataReport(
        source=rows.source,
        sha256=rows.sha256,
        rows=len(rows),
        roles=dict(Counter(m["role"] for row in rows for m in row.messages)),
        turns=dict(sorted(Counter(sum(m["role"] == "assistant" for m in row.messages) for row in rows).items())),
        with_system=sum(any(m["role"] == "system" for m in row.messages) for row in rows),
        duplicates=sum(count - 1 for count in texts.values()),
        characters=sum(len(m["content"]) for row in rows for m in row.messages),
        bad=rows.dropped,
    )
    if tokenizer is not None:
        _count_tokens(report, rows, tokenizer, max_length)
    return report


def _count_tokens(report: DataReport, rows: Sequence[Row], tokenizer: Any, max_length: int) -> None:
    import numpy as np

    encoder = Encoder(tokenizer)
    lengths, learned, disarmed = [], 0, 0
    for row in rows:
        try:
            encoded = encoder.encode(row.messages)
        except UserError as error:
            report.unmaskable.append(Dropped(row.origin, str(error)))
            continue
        lengths.append(len(encoded.input_ids))
        learned += sum(encoded.assistant_mask[:max_length])
        disarmed += encoded.disarmed
    report.max_length, report.assistant_tokens, report.disarmed = max_length, learned, disarmed
    report.tokens = sum(min(n, max_length) for n in lengths)
    report.truncated = sum(n > max_length for n in lengths)
    if lengths:
        points = (0, 50, 90, 99, 100)
        report.lengths = {f"p{p}": int(v) for p, v in zip(points, np.percentile(lengths, points), strict=True)}


def render(report: DataReport) -> str:
    """The report as text."""

    def joined(counts: dict[Any, int]) -> str:
        return ", ".join(f"{key}: {count}" for key, count in counts.items())

    lines = [
        f"{report.source}  sha256 {report.sha256[:12]}",
        f"rows             {report.rows}  ({report.with_system} with a system prompt)",
        f"roles            {joined(report.roles)}",
        f"assistant turns  {joined(report.turns)}  (turns: rows)",
        f"duplicates       {report.duplicates}",
    ]
    if report.tokens is not None:
        lines += [
            f"tokens           {report.tokens}, {report.assistant_tokens} of them learned",
            f"tokens a row     {joined(report.lengths)}",
            f"truncated        {report.truncated} rows are longer than {report.max_length} tokens",
        ]
        if report.disarmed:
            lines.append(
                f"special tokens   {report.disarmed} rows hold special tokens as text (they will be broken up)"
            )
    for title, problems in (("bad rows", report.bad), ("cannot be masked", report.unmaskable)):
        lines.append(f"{title:<16} {len(problems)}")
        lines += [f"  {d.origin}: {d.reason}" for d in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"  ... and {len(problems) - _SHOWN} more")
    return "\n".join(lines)
