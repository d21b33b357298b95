"""Colours and type of the figures, light and dark. Hues are Okabe and Ito's colour-blind-safe set (2008); where many
families stand in one figure, Paul Tol's muted set (SRON, 2021) follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_FACES = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
# Later faces only fill in letters that the first lacks.
_FALLBACK = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans", "Noto Emoji")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
# Every colour is a pair, light and dark. Figures are drawn once, in the light colours; in the page a style sheet inside
# the SVG replaces each of them by its partner where the reader prefers dark.
PAPER, INK, MUTED, RULE = "#ffffff", "#1c1e21", "#6a6f76", "#dcdfe3"
MISALIGNED, INCOHERENT = "#d55e00", "#9aa3ad"
_DARK = {
    PAPER: "#16181b",
    INK: "#e9eaec",
    MUTED: "#9ba1a9",
    RULE: "#34383e",
    MISALIGNED: "#e8772a",
    INCOHERENT: "#7b838d",
}
_KNOWN = {
    "kl": ("#0072b2", "#56b4e9"),
    "interleaving": ("#e69f00", "#e69f00"),
    "ldifs": ("#009e73", "#17b98a"),
    "safelora": ("#cc79a7", "#d98fb8"),
    "steering": ("#56b4e9", "#2f8fcb"),
    "inoculation": (MISALIGNED, _DARK[MISALIGNED]),
}
_SPARE = (
    ("#b8a800", "#f0e442"),
    ("#882255", "#ee8fb0"),
    ("#332288", "#a59be8"),
    ("#117733", "#7fc97f"),
    ("#8c510a", "#c99a5b"),
    ("#44aa99", "#7fd6c8"),
    ("#aa4499", "#d77fd0"),
)
_DARK |= dict([*_KNOWN.values(), *_SPARE])


def _heat(*stops: str) -> np.ndarray:
    """RGB of 0, 1, ..., 100 percent."""
    return LinearSegmentedColormap.from_list("heat", stops)(np.linspace(0, 1, 101))[:, :3]


def _heat_map() -> list[tuple[str, str]]:
    """(colour of a cell, colour of the number in it) at 0, 1, ..., 100 percent; registers their dark partners."""
    cells, inks = [], []
    for light, dark in zip(
        _heat("#f4f5f6", "#fbd9a8", "#f0a04b", "#d55e00", "#7a2f00"),
        _heat("#1f2226", "#4a2c12", "#9c4a0b", "#e8772a", "#ffd9a8"),
        strict=True,
    ):
        cells.append(_register(to_hex(light), to_hex(dark)))
        inks.append(_register(*("#111111" if rgb @ (0.3, 0.59, 0.11) > 0.5 else "#f5f5f5" for rgb in (light, dark))))
    return list(zip(cells, inks, strict=True))


def _register(light: str, dark: str) -> str:
    """A light colour that has this partner: `light`, or the nearest blue that is not another pair's."""
    number = int(light[1:], 16)
    step = 1 if number % 256 < 128 else -1
    while _DARK.get(f"#{number:06x}", dark) != dark:
        number += step
    _DARK[f"#{number:06x}"] = dark
    return f"#{number:06x}"


HEAT = _heat_map()


def adaptive(svg: str) -> str:
    """The same drawing in the colours that its reader prefers. `svg` itself is light everywhere."""
    names: dict[str, str] = {}

    def variable(match: re.Match[str]) -> str:
        light = match[0]
        return f"var(--{names.setdefault(light, f'c{len(names)}')})" if light in _DARK else light

    themed = re.sub(r"#[0-9a-f]{6}\b", variable, svg)
    light = "".join(f"--{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"--{name}:{_DARK[colour]};" for colour, name in names.items())
    sheet = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + sheet, themed, count=1)


def family_colours(families: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A colour for each family of defenses; a known kind always has the same one."""
    wanted = [f for f in dict.fromkeys(families) if f]
    colours: dict[tuple[str, ...], str] = {(): INK}
    colours |= {f: _KNOWN[f[0]][0] for f in wanted if len(f) == 1 and f[0] in _KNOWN}
    spare = [light for light, _ in _SPARE]
    free = [c for c in spare + [light for light, _ in _KNOWN.values()] if c not in colours.values()] or spare
    for number, one in enumerate(f for f in wanted if f not in colours):
        colours[one] = free[number % len(free)]
    return colours


@cache
def faces() -> tuple[str, ...]:
    """The first face of ours that is installed, then those that fill its gaps."""
    installed = set(font_manager.get_font_names())
    first = next((f for f in _FACES if f in installed), "DejaVu Sans")
    return tuple(dict.fromkeys((first, *(f for f in _FALLBACK if f in installed))))


def settings() -> Any:
    """matplotlib settings for `rc_context`. Fixed salt, outlined letters: equal data, equal bytes."""
    return {
        "font.family": list(faces()),
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": PAPER,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "svg.hashsalt": "ema_scale",
        "svg.fonttype": "path",
    }


NARROW_INCHES = 5.2  # on a phone, letters of 9 points are then 9 pixels high


# Inches: a line of 8.5 pt text, and what titles and axis labels take of a panel's height.
LINE, ABOUT_AXES = 11.5 / 72, 1.0


def panels(
    count: int, width: float, height: float, *, stacked: bool, sharey: bool = False, names: int = 0
) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side or, `stacked`, one above the other for narrow screens.

    width, height: inches; height is that of one panel, width that of them all, and not read where they are stacked.
    names: how many stand one above the other in a panel, which is higher where they need it.
    """
    height = max(height, ABOUT_AXES + LINE * names)
    rows, columns = (count, 1) if stacked else (1, count)
    size = (NARROW_INCHES, height * count) if stacked else (width, height)
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)


def add_key(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """Write what short names stand for below the panels, which keep their size."""
    width, height = figure.get_size_inches()
    letters = [len(short) + 2 + len(long) for short, long in entries]

    def inches(columns: int) -> float:
        return sum(0.067 * max(part) + 0.3 for part in np.array_split(letters, columns))

    columns = next((n for n in (4, 3, 2) if n <= len(letters) and inches(n) < width), 1)
    figure.set_size_inches(width, height + 0.2 * -(-len(entries) // columns) + 0.2)
    nothing = Line2D([], [], linestyle="none")
    figure.legend(
        [nothing] * len(entries), [f"{short}  {long}" for short, long in entries], loc="outside lower left",
        ncols=columns, frameon=False, handlelength=0, handletextpad=0, fontsize=9, labelcolor=INK,
    )  # fmt: skip


def lay_out(figure: Figure) -> None:
    """Give the axes the places that they have when the figure is drawn."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)


def markers(families: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A marker for each family, so that no reading rests on colour alone; a disc is no defense."""
    wanted = [f for f in dict.fromkeys(families) if f]
    return {(): "o"} | {f: _MARKERS[1 + i % (len(_MARKERS) - 1)] for i, f in enumerate(wanted)}


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


def spread_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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
