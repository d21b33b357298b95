"""Padding by the order of rows: lengths inside a step save most of it, and rows of one length have none."""

from benchmarks.padding import ACROSS, INSIDE, RANDOM, draw_lengths, padding_shares


def test_padding_counts_by_hand_and_by_order():
    lengths = draw_lengths(1600, 240, 0.4, 2048)
    assert sorted(lengths)[800] in range(225, 255) and max(lengths) <= 2048
    shares = padding_shares(lengths, 4, 4)
    assert 0.25 < shares[RANDOM] < 0.35 and shares[ACROSS] < shares[INSIDE] < shares[RANDOM] / 2
    assert padding_shares(lengths, 16, 1)[INSIDE] == padding_shares(lengths, 16, 1)[RANDOM]  # one batch per step
    assert set(padding_shares([7] * 64, 4, 4).values()) == {0.0}
    # Two rows per step in two batches of one row: nothing to pad.
    assert set(padding_shares([3, 9, 5, 7], 1, 2).values()) == {0.0}
    # Two processes wait for the longer of their rows.
    assert padding_shares([2, 6], 1, 1, processes=2)[RANDOM] == 1 - 8 / 12
