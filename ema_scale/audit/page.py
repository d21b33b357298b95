"""The page of an audit (`ema data audit`): verdict, distributions, the worst rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ema_scale.audit.audit import Audit, Measure
from ema_scale.audit.verdict import interval
from ema_scale.core.io import atomic_write_text
from ema_scale.core.text import short_percent
from ema_scale.report.pictures import make_picture
from ema_scale.report.style import INK, MISALIGNED, MUTED, panels
from ema_scale.report.write import environment, style_sheet

PAGE = "audit.html"
TITLES = {"gap": "Perplexity gap", "projection": "Projection onto the persona vector"}
WORSE = {"gap": "← misaligned models find it likelier", "projection": "more like the persona →"}
_CAPTION = (
    "Share of distinct rows by each measure: the file filled, the clean set as an outline. The dashed line is where a "
    "row stops looking clean; a suspect row is beyond every line."
)


def write_audit_page(made: Audit, out: Path) -> Path:
    """Write `out`/audit.html and figures/audit.svg; returns the page's path. Every text of a row is escaped."""
    summary = made.summary
    alt = "; ".join(
        f"{TITLES[name]}: median {found['median']:.3f}, of the clean set {found['clean_median']:.3f}, line "
        f"{found['line']:.3f}"
        for name, found in summary["measures"].items()
    )
    picture = make_picture("audit", "audit", alt, _CAPTION, partial(distributions, made.measures))
    assert picture is not None
    atomic_write_text(out / "figures" / "audit.svg", picture.svg)
    page = out / PAGE
    atomic_write_text(
        page,
        environment(Path(__file__).parent)
        .get_template("audit.html.j2")
        .render(summary=summary, picture=picture, rows=_rows(summary["measures"]), css=style_sheet()),
    )
    return page


def _rows(measures: dict[str, dict[str, object]]) -> list[tuple[str, ...]]:
    """One line of text per measure."""
    lines = []
    for name, found in measures.items():
        auc = found["auc"]
        assert isinstance(auc, dict)
        numbers = [f"{found[key]:.3f}" for key in ("median", "clean_median", "line")]
        beyond = [short_percent(float(str(found[key]))) for key in ("beyond_line", "clean_beyond_line")]
        lines.append((TITLES[name], *numbers, *beyond, f"{auc['auc']:.3f}", interval(auc)))
    return lines


def distributions(measures: Sequence[Measure], stacked: bool = False) -> Figure:
    """One panel per measure: histograms of the file (filled) and of the clean set (outlined), with the line."""
    figure, axes = panels(len(measures), 5.4 * len(measures), 3.6, stacked=stacked)
    for axis, one in zip(axes, measures, strict=True):
        edges = np.histogram_bin_edges(np.concatenate([one.rows, one.clean, [one.line]]), bins=50)
        drawn: list[tuple[np.ndarray, dict[str, Any]]] = [
            (one.rows, {"histtype": "stepfilled", "color": MISALIGNED, "alpha": 0.75, "label": "this file"}),
            (one.clean, {"histtype": "step", "color": INK, "lw": 1.4, "label": "clean set"}),
        ]
        for values, settings in drawn:
            axis.hist(values, edges.tolist(), weights=np.full(len(values), 1 / len(values)), **settings)
        axis.axvline(one.line, color=MUTED, lw=1.2, ls=(0, (5, 4)))
        axis.set(title=TITLES[one.name], xlabel=WORSE[one.name], yticks=[])
        axis.spines["left"].set_visible(False)
        axis.tick_params(length=0)
        axis.legend(frameon=False, fontsize=9)
    return figure
