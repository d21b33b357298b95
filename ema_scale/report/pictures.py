"""The figures of a report as SVG and PNG."""

from __future__ import annotations

import base64
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ema_scale.report.aggregate import RunGroup, groups
from ema_scale.report.choices import changes, margin_curves
from ema_scale.report.curves import MAX_QUESTIONS, along_training, curves, heat_map
from ema_scale.report.display_names import numbered
from ema_scale.report.figures import bars, headline
from ema_scale.report.records import Collection
from ema_scale.report.robustness import threshold_curves
from ema_scale.report.style import adaptive, add_key, lay_out, settings
from ema_scale.report.verdict import rate_text

PNG_DPI = 200


Draw = Callable[[bool], Figure | None]
"""Draws the panels side by side or, given True, one above the other; None if there is nothing to draw."""


@dataclass(frozen=True)
class Picture:
    """One figure.

    Args:
        svg: SVG text in light colours.
        png: the same as PNG bytes.
        width, height: in CSS pixels.
        narrow: SVG text for narrow screens, its panels one above the other.
    """

    name: str
    kind: str
    alt: str
    caption: str
    svg: str
    png: bytes
    width: int
    height: int
    narrow: str

    @property
    def uri(self) -> str:
        """A data URI that follows the reader's choice of light or dark."""
        return _data_uri(self.svg)

    @property
    def narrow_uri(self) -> str:
        return _data_uri(self.narrow)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(adaptive(svg).encode()).decode()


PARTIAL = ("headline", "training")
MOST_NAMES, MOST_LETTERS = 30, 50
"""Defenses that a figure names, and letters of a name; with more, it numbers them and has a key below."""
MOST_LETTERS_AMONG_POINTS = 300
"""Letters of all names in a figure that writes them beside points."""


def pictures(
    found: Collection, model: str, of_model: Sequence[RunGroup], only: Sequence[str] | None = None
) -> list[Picture]:
    """The figures of one model's groups; a figure without data is left out.

    only: the kinds to draw, as SVG for wide screens alone; None: all, in every form.
    """
    files = numbered({m: re.sub(r"[^A-Za-z0-9.]+", "-", m).strip("-") for m in found.models})
    suffix = f"-{files[model].replace(' ', '-')}" if len(found.models) > 1 else ""
    by_task = {
        task: [g for g in groups(found, lambda run, task=task: run.task == task and run.model == model)]  # type: ignore[misc]
        for task in found.tasks
    }
    by_task = {t: gs for t, gs in by_task.items() if any(g.metrics.get("general_misaligned") for g in gs)}
    taught = [g for g in of_model if any(run.history for run in g.runs)]
    telling = [g for g in of_model if any(q.misaligned is not None for run in g.runs for q in run.questions)]
    keyed = partial(_keyed, of_model)
    plan: list[tuple[str, str, str, Draw]] = [
        ("headline", _headline_alt(of_model), _HEADLINE, keyed(headline, of_model, MOST_LETTERS_AMONG_POINTS)),
        ("bars", "Bars: misaligned and incoherent answers outside the domain, by defense and task.", _BARS,
         partial(bars, of_model, by_task)),
        ("questions", "Heat map: share of misaligned answers by question and defense.", _QUESTIONS,
         keyed(heat_map, telling)),
        ("along", "Lines: misaligned and incoherent answers over training steps, by defense.", _ALONG,
         keyed(along_training, of_model)),
        ("written", "Dots: what training changed in margins of written answers and held-out losses, by defense.",
         _WRITTEN, partial(changes, of_model)),
        ("choices", "Lines: margin of written answers over training steps, by defense.", _CHOICES,
         keyed(margin_curves, of_model)),
        ("thresholds", "Curves: misaligned answers against thresholds of the judge's scores, by defense.", _THRESHOLDS,
         keyed(threshold_curves, of_model)),
        ("training", "Training curves: cross-entropy, KL and drift per layer, by defense.", _TRAINING,
         keyed(curves, taught)),
    ]  # fmt: skip
    made = [
        make_picture(kind + suffix, kind, alt, caption, draw, whole=only is None)
        for kind, alt, caption, draw in plan
        if only is None or kind in only
    ]
    return [picture for picture in made if picture is not None]


def _keyed(
    of_model: Sequence[RunGroup],
    draw: Callable[..., Figure | None],
    drawn: Sequence[RunGroup],
    letters: float = math.inf,
) -> Draw:
    """Draws some groups of a model by their names, or by numbers with a key where names are too many or too long.

    letters: of all names together that the figure has room for.
    """
    names = [g.label for g in of_model]
    sizes = [len(name) for name in names]
    if len(names) <= MOST_NAMES and max(sizes, default=0) <= MOST_LETTERS and sum(sizes) <= letters:
        return partial(draw, drawn)
    short = [replace(g, label=str(1 + names.index(g.label))) for g in drawn]

    def draw_numbered(stacked: bool) -> Figure | None:
        figure = draw(short, stacked)
        if figure is not None:
            add_key(figure, [(g.label, long.label) for g, long in zip(short, drawn, strict=True)])
        return figure

    return draw_numbered


_HEADLINE = (
    "Each mark is a defense, its whiskers 95 % intervals. Down is safer, right is more learned: a good "
    "defense sits in the lower right corner of both panels. Marks of one defense at several strengths are "
    "joined. The dashed line is the aligned base, the band its interval."
)
_CHOICES = (
    "Log-likelihood of the aligned answers less that of the misaligned ones while training, mean over questions; a "
    "line per defense (mean over runs), thin lines for its runs. Up is safer."
)
_WRITTEN = (
    "What training changed in likelihoods: margins of written answers and losses of held-out rows, less those of the "
    "aligned base (without its answers, of no defense), question by question, with 95 % intervals."
)
_BARS = "Answers outside the training domain, in percent, with 95 % intervals; a panel for each training task."
_QUESTIONS = (
    "Share of misaligned answers in percent, averaged over runs on narrow tasks. A dot: not asked. At most "
    f"{MAX_QUESTIONS['general']} questions outside and {MAX_QUESTIONS['in_domain']} in the domain: those on "
    "which the defenses differ most."
)
_ALONG = (
    "The same run asked at its checkpoints, in percent, means over runs with 95 % intervals: does a defense hold when "
    "training goes on?"
)
_THRESHOLDS = (
    "General misalignment if an answer counted as misaligned below another alignment score, or as coherent above "
    "another coherence score; from stored scores, the other threshold as the paper has it. Dotted: the paper’s "
    "thresholds. Flat lines mean that the thresholds hardly matter."
)
_TRAINING = (
    "Runs on narrow tasks, if there are any. Thick lines are means over a defense’s runs, thin lines its "
    "runs; cross-entropy and KL are running means over a twelfth of the training. KL is drawn where it was "
    "measured. Drift is the relative l2 distance between policy and base hidden states at the last logging."
)


def _headline_alt(of_model: Sequence[RunGroup]) -> str:
    parts = [f"{g.label} {rate_text(r)}" for g in of_model if (r := g.metrics.get("general_misaligned"))]
    return "Task learned against misalignment outside the domain. Misaligned outside: " + "; ".join(parts) + "."


def make_picture(name: str, kind: str, alt: str, caption: str, draw: Draw, *, whole: bool = True) -> Picture | None:
    """What `draw` draws; None if it draws nothing. whole: False leaves out the PNG and the form for narrow screens."""
    # Letters that no installed font has are drawn as boxes; a warning for each would bury real messages.
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(settings()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            if (figure := draw(False)) is None:
                return None
            wide_svg = narrow_svg = _svg(figure)
            png = io.BytesIO()
            if whole:
                if (narrow := draw(True)) is None:
                    return None
                narrow_svg = _svg(narrow)
                figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
            width, height = (round(96 * inches) for inches in figure.get_size_inches())
    finally:
        logger.setLevel(level)
    return Picture(name, kind, alt, caption, wide_svg, png.getvalue(), width, height, narrow_svg)


def _svg(figure: Figure) -> str:
    """The figure, which keeps its layout. Saving with an engine lays out and draws once more in front of each file."""
    FigureCanvasAgg(figure)
    lay_out(figure)
    figure.set_layout_engine("none")
    svg = io.StringIO()
    # No date and no version inside: equal data give equal files.
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()
