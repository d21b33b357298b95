"""Numbers as people read them: shares in percent, bytes, durations."""

from __future__ import annotations

import unicodedata
from collections.abc import Container


def printable(text: str, also: Container[str] = ()) -> str:
    """`text` with control, direction and invisible characters, and those in `also`, written as escapes.

    A terminal that prints it does nothing but print.
    """
    return "".join(c if c in "\n\t" or _prints(c, also) else c.encode("unicode_escape").decode() for c in text)


def _prints(character: str, also: Container[str]) -> bool:
    if character.isascii():
        return character.isprintable()
    return character not in also and unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")


def one_line(text: str) -> str:
    """The same text. Raises ValueError for a line break or another control character: in a job script, in a log or on
    a terminal it would be more than text."""
    found = next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)
    if found is not None:
        raise ValueError(f"expected one line without control characters, found {found!r} in it")
    return text


def spreadsheet_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: a leading quote before what would begin one."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20") else text


def quantity(count: float, noun: str, plural: str = "") -> str:
    """`1 question`, `1,240 questions`. plural: where it is not the noun with an s."""
    shown = f"{count:g}" if isinstance(count, float) else f"{count:,}"
    return f"{shown} {noun if count == 1 else plural or noun + 's'}"


def percent(share: float, decimals: int = 1) -> str:
    """`8.3 %` for a share in 0..1."""
    return f"{100 * share:.{decimals}f} %"


def short_percent(share: float) -> str:
    """`8.3 %`, and `8 %` in place of `8.0 %`."""
    return percent(share).replace(".0 %", " %")


def limits(low: float, high: float, decimals: int = 1) -> str:
    """`[5.1, 12.0]`: an interval of shares, in percent."""
    return f"[{100 * low:.{decimals}f}, {100 * high:.{decimals}f}]"


def points(value: float) -> str:
    """`+4.2`: a difference of shares in percentage points, with a true minus sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def unbroken(text: str) -> str:
    """The same text, on one line of a page."""
    return text.replace(" ", "\u00a0")


def format_bytes(count: float) -> str:
    """`1.5 GB`"""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def format_seconds(value: float) -> str:
    """`1.25 s`, or `12.5 ms` below a tenth of a second."""
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def format_hours(value: float) -> str:
    """`1.5 hours`, or `30.0 minutes` below one hour."""
    return f"{value:,.1f} hours" if value >= 1 else f"{60 * value:,.1f} minutes"


def format_clock(seconds: float) -> str:
    """`1:02:03`"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
