"""`ema data show`: a row as the model sees it, with what is learned marked."""

from __future__ import annotations

from typing import Any

from ema_scale.core.text import printable
from ema_scale.data.rows import Row
from ema_scale.data.tokens import Encoder

_COLOUR = ("\x1b[1;32m", "\x1b[0m")
_BRACKETS = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")


def show_row(row: Row, tokenizer: Any, max_length: int | None = None, *, colour: bool = False) -> str:
    """The rendered row. What is learned is green (colour) or in white square brackets; what is cut is left out, and
    characters that do not print are written as escapes. Raises UserError for a row that cannot be masked."""
    encoder = Encoder(tokenizer)
    spans = encoder.spans(row.messages, row.tools)
    encoded = encoder.encode(row.messages, max_length, tools=row.tools)
    offsets = tokenizer(spans.full, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = len(encoded.input_ids)
    cut = offsets[kept - 1][1] if kept < len(offsets) else len(spans.full)
    begin, end = _COLOUR if colour else _BRACKETS
    pieces, position = [], 0
    for start, stop in spans.learned:
        start, stop = min(start, cut), min(stop, cut)
        pieces.append(printable(spans.full[position:start], _BRACKETS))
        if start < stop:
            pieces.append(f"{begin}{printable(spans.full[start:stop], _BRACKETS)}{end}")
        position = stop
    pieces.append(printable(spans.full[position:cut], _BRACKETS))
    learned = int(encoded.assistant_mask.sum())
    lines = [f"{row.origin}: {kept} tokens, {learned} of them learned", "".join(pieces)]
    if cut < len(spans.full):
        lines.append(f"(cut: {len(offsets) - kept} more tokens are over {max_length})")
    if spans.no_end:
        lines.append(f"({spans.no_end} learned turns have no token that ends them)")
    if spans.reasoning_dropped:
        lines.append(f"({spans.reasoning_dropped} earlier turns are shown without their reasoning)")
    return "\n".join(lines)
