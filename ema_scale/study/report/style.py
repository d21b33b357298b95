"""Colours and type of the figures, light and dark. Hues are Okabe and Ito's colour-blind-safe set (2008); where many
families stand in one figure, Paul Tol's muted set (SRON, 2021) follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from matplotlib import font_manager

_FACES = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
# Later faces only fill in letters that the first lacks.
_FALLBACK = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans", "Noto Emoji")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")


@dataclass(frozen=True)
class Theme:
    """One colour scheme; colours as hex strings."""

    name: str
    paper: str
    ink: str
    muted: str
    rule: str
    misaligned: str
    incoherent: str
    known: tuple[tuple[str, str], ...]
    spare: tuple[str, ...]
    heat: tuple[str, ...]
    """colour map of the heat map from 0 to 1"""

    def colours(self, families: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
        """A colour for each family of defenses; a known kind always has the same one."""
        known, spare = dict(self.known), list(self.spare)
        given: dict[tuple[str, ...], str] = {(): self.ink}
        wanted = [f for f in dict.fromkeys(families) if f]
        for one in wanted:
            if len(one) == 1 and one[0] in known:
                given[one] = known[one[0]]
        free = [c for c in spare + list(known.values()) if c not in given.values()] or spare
        for number, one in enumerate(f for f in wanted if f not in given):
            given[one] = free[number % len(free)]
        return given


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c1e21",
    muted="#6a6f76",
    rule="#dcdfe3",
    misaligned="#d55e00",
    incoherent="#9aa3ad",
    known=(
        ("kl", "#0072b2"),
        ("interleaving", "#e69f00"),
        ("ldifs", "#009e73"),
        ("safelora", "#cc79a7"),
        ("steering", "#56b4e9"),
        ("inoculation", "#d55e00"),
    ),
    spare=("#b8a800", "#882255", "#332288", "#117733", "#8c510a", "#44aa99", "#aa4499"),
    heat=("#f4f5f6", "#fbd9a8", "#f0a04b", "#d55e00", "#7a2f00"),
)
DARK = Theme(
    name="dark",
    paper="#16181b",
    ink="#e9eaec",
    muted="#9ba1a9",
    rule="#34383e",
    misaligned="#e8772a",
    incoherent="#7b838d",
    known=(
        ("kl", "#56b4e9"),
        ("interleaving", "#e69f00"),
        ("ldifs", "#17b98a"),
        ("safelora", "#d98fb8"),
        ("steering", "#2f8fcb"),
        ("inoculation", "#e8772a"),
    ),
    spare=("#f0e442", "#ee8fb0", "#a59be8", "#7fc97f", "#c99a5b", "#7fd6c8", "#d77fd0"),
    heat=("#1f2226", "#4a2c12", "#9c4a0b", "#e8772a", "#ffd9a8"),
)
THEMES = (LIGHT, DARK)


@cache
def faces() -> tuple[str, ...]:
    """The first face of ours that is installed, then those that fill its gaps."""
    installed = set(font_manager.get_font_names())
    first = next((f for f in _FACES if f in installed), "DejaVu Sans")
    return tuple(dict.fromkeys((first, *(f for f in _FALLBACK if f in installed))))


def settings(theme: Theme) -> Any:
    """matplotlib settings for `rc_context`. Fixed salt, outlined letters: equal data, equal bytes."""
    return {
        "font.family": list(faces()),
        "font.size": 10,
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.labelsize": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "grid.color": theme.rule,
        "grid.linewidth": 0.6,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "svg.hashsalt": "ema_scale",
        "svg.fonttype": "path",
    }


def markers(families: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A marker for each family, so that no reading rests on colour alone; a disc is no defense."""
    wanted = [f for f in dict.fromkeys(families) if f]
    return {(): "o"} | {f: _MARKERS[1 + i % (len(_MARKERS) - 1)] for i, f in enumerate(wanted)}
