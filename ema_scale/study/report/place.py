"""Direct labels that do not overlap. Deterministic: the same data give the same picture.

adjustText, the usual library, stops its search by the clock, so two machines draw two pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Where a label may sit: direction (x, y) and how its box hangs on that point.
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (6.0, 12.0, 20.0, 30.0, 44.0, 60.0)


@dataclass(frozen=True)
class Box:
    """Axis-parallel rectangle in points (1/72 inch)."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Shared area in square points."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)


@dataclass(frozen=True)
class Placed:
    """A label's box, and whether it is far enough from its mark to need a leader line."""

    box: Box
    leader: bool


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
    rounds: int = 4,
) -> list[Placed]:
    """A box for each label beside its anchor.

    anchors: the marks' points; sizes: labels' (width, height); obstacles: boxes that labels should not cover
    (marks, whiskers); bounds: the area they must stay in. All in points. Greedy from the most crowded mark,
    then `rounds` passes in which each label moves to its best place given all others.
    """
    choices = [_candidates(a, s) for a, s in zip(anchors, sizes, strict=True)]
    chosen: list[tuple[Box, float] | None] = [None] * len(choices)
    crowding = [sum(1 for b in anchors if abs(a[0] - b[0]) < 80 and abs(a[1] - b[1]) < 30) for a in anchors]
    order = sorted(range(len(choices)), key=lambda i: (-crowding[i], i))
    for _ in range(rounds):
        before = list(chosen)
        for i in order:
            others = [c[0] for j, c in enumerate(chosen) if c is not None and j != i]
            chosen[i] = min(choices[i], key=lambda c: _cost(c, others, obstacles, bounds))
        if chosen == before:
            break
    return [Placed(c[0], c[1] > 12.0) for c in chosen if c is not None]


def _candidates(anchor: tuple[float, float], size: tuple[float, float]) -> list[tuple[Box, float]]:
    """(box, distance) for every direction and distance, near ones first."""
    (x, y), (w, h) = anchor, size
    found = []
    for distance in _DISTANCES:
        for dx, dy in _DIRECTIONS:
            px, py = x + dx * distance, y + dy * distance * 0.75
            left = px if dx > 0 else px - w if dx < 0 else px - w / 2
            bottom = py if dy > 0 else py - h if dy < 0 else py - h / 2
            found.append((Box(left, bottom, left + w, bottom + h), distance))
    return found


def _cost(choice: tuple[Box, float], labels: Sequence[Box], obstacles: Sequence[Box], bounds: Box) -> float:
    box, distance = choice
    outside = box.area - box.overlap(bounds)
    covered = sum(box.overlap(o) for o in obstacles)
    return 30 * outside + 10 * sum(box.overlap(o) for o in labels) + 3 * covered + 2 * distance


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as possible to `wanted`, at least `gap` apart (less only if low..high is too small).

    Pool-adjacent-violators on the sorted positions: the least-squares answer, order kept.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    # Taking i * gap off each turns "at least gap apart" into "not decreasing".
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        total, count = wanted[i] - rank * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            earlier = blocks.pop()
            total, count = total + earlier[0], count + earlier[1]
        blocks.append((total, count))
    flat = [total / count for total, count in blocks for _ in range(count)]
    limit = high - (len(wanted) - 1) * gap
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = min(max(flat[rank], low), limit) + rank * gap
    return result
