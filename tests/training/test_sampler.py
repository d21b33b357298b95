"""The order of rows."""

import pytest
import torch

from ema_scale.training.dataloading import EpochSampler


def order(count=23, epoch=0, seed=0, rows=4, lengths=None, kinds=None):
    return list(EpochSampler(count, seed=seed, epoch=lambda: epoch, rows_per_step=rows, lengths=lengths, kinds=kinds))


LENGTHS = torch.randint(5, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_row_once_an_epoch_in_an_order_of_its_own():
    for lengths in (None, LENGTHS[:23]):
        assert sorted(order(lengths=lengths)) == list(range(23))
        assert order(lengths=lengths) == order(lengths=lengths)
        assert order(lengths=lengths) != order(lengths=lengths, epoch=1)
        assert order(lengths=lengths) != order(lengths=lengths, seed=1)


def test_the_order_does_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    one = order()
    torch.rand(7)
    assert order() == one


def test_rows_of_a_step_have_similar_lengths_and_the_longest_comes_first():
    rows = order(1003, rows=16, lengths=LENGTHS)
    assert sorted(rows) == list(range(1003))
    steps = [[LENGTHS[i] for i in rows[s : s + 16]] for s in range(0, 1003, 16)]
    assert max(LENGTHS) in steps[0]
    assert sum(max(s) - min(s) for s in steps[:-1]) / len(steps) < 20
    assert len(steps[-1]) == 1003 % 16
    means = [sum(s) / len(s) for s in steps[1:]]
    assert any(a < b for a, b in zip(means, means[1:], strict=False))  # not sorted from long to short


def test_fewer_rows_than_a_step():
    assert sorted(order(3, rows=16, lengths=[5, 9, 7])) == [0, 1, 2]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("shares", [{1: 0.1}, {1: 0.0625}, {1: 0.25, 2: 0.125, 3: 0.1}])
def test_rows_that_a_term_looks_at_are_spread_over_the_steps(shares, lengths):
    counts = {kind: int(share * 800) for kind, share in shares.items()}
    kinds = [kind for kind, n in counts.items() for _ in range(n)]
    count = 1003
    kinds += [0] * (count - len(kinds))
    for epoch in (0, 1):
        rows = order(count, epoch=epoch, rows=16, lengths=lengths, kinds=kinds)
        assert sorted(rows) == list(range(count))
        steps = [[kinds[i] for i in rows[s : s + 16]] for s in range(0, count - 15, 16)]
        slack = 0 if len(counts) == 1 else 1  # several kinds may push each other aside
        for kind, n in counts.items():
            found = [step.count(kind) for step in steps]
            assert max(found) <= -(-16 * n // count) + slack + (lengths is not None), (kind, found)
            assert min(found) >= 16 * n // count - slack - (lengths is not None), (kind, found)
            assert sum(f > 0 for f in found) >= min(n, len(steps)) - (2 if lengths else 1) * (1 + slack)
    again = order(count, epoch=1, rows=16, lengths=lengths, kinds=kinds)
    assert again == rows != order(count, epoch=0, rows=16, lengths=lengths, kinds=kinds)
    mine = [row for row in rows if kinds[row] == 1]
    assert mine != sorted(mine)
    if lengths is not None:
        spans = [max(s) - min(s) for s in ([lengths[i] for i in rows[a : a + 16]] for a in range(0, 16 * 50, 16))]
        assert sum(spans) / len(spans) < 120 and max(lengths) in [lengths[i] for i in rows[:16]]
