"""Numbers as people read them."""

import pytest

from ema_scale.core import text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.percent(0.0831), "8.3 %"),
        (text.percent(0.0831, 0), "8 %"),
        (text.short_percent(0.08), "8 %"),
        (text.short_percent(0.125), "12.5 %"),
        (text.limits(0.051, 0.12), "[5.1, 12.0]"),
        (text.points(-0.042), "−4.2"),
        (text.points(0.042), "+4.2"),
        (text.quantity(1, "question"), "1 question"),
        (text.quantity(0, "question"), "0 questions"),
        (text.quantity(1240, "reply", "replies"), "1,240 replies"),
        (text.quantity(1.0, "epoch"), "1 epoch"),
        (text.quantity(1.5, "epoch"), "1.5 epochs"),
        (text.format_bytes(999), "999 bytes"),
        (text.format_bytes(1.5e9), "1.5 GB"),
        (text.format_seconds(1.25), "1.25 s"),
        (text.format_seconds(0.0125), "12.5 ms"),
        (text.format_hours(0.5), "30.0 minutes"),
        (text.format_clock(3725), "1:02:05"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected
