"""Tables of the page: no columns without a value, labels for narrow screens, and a header that counts defenses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import pytest

from ema_scale.evaluation.records import QuestionSummary, Summary
from ema_scale.report.aggregate import RunGroup
from ema_scale.report.curves import heat_map
from ema_scale.report.figures import bars, headline
from ema_scale.report.pictures import MOST_LETTERS_AMONG_POINTS, MOST_NAMES, _keyed
from ema_scale.report.records import METRIC_NAMES, METRICS, Collection, ReportedRate, Run
from ema_scale.report.style import NARROW_INCHES, settings
from ema_scale.report.table import Cell, Table, TableRow, filled
from ema_scale.report.write import CriteriaRow, Section, _byline, render

RATE = ReportedRate(0.2, 0.1, 0.35, 100, 10, 0, any_task=(0.0, 0.7))


def page(rates: list[ReportedRate | None]) -> str:
    row = CriteriaRow("KL 0.1", "2 runs", "defense", rates, [None] * len(METRICS), "0.8 %")
    return render("A study", [], [Section("m", ["Said."], {}, [row], [row], [])], [], [])


def test_a_metric_that_nothing_has_gets_no_column() -> None:
    first, second, *others = METRIC_NAMES.values()
    text = page([RATE, None, None, None, None])
    assert f'<th scope="col">{first}</th>' in text and f'data-label="{first}"' in text
    assert not any(f'<th scope="col">{name}</th>' in text for name in (second, *others))
    assert all(f'<th scope="col">{name}</th>' in page([RATE] * 5) for name in METRIC_NAMES.values())


def test_both_readings_of_an_interval_and_what_dropped_means_are_on_the_page() -> None:
    text = page([RATE] * 5)
    assert "[10.0, 35.0]" in text and "any task [0.0, 70.0]" in text
    assert "Dropped: answers that count in no rate, because the judge gave no score." in text


def test_a_table_loses_the_columns_that_hold_only_dashes() -> None:
    lines = [TableRow("a", "defense", [Cell("1"), None, None]), TableRow("b", "defense", [None, None, Cell("2")])]
    found = filled(Table("Heading", "Note.", ["x", "y", "z"], lines))
    assert found.columns == ["x", "z"] and [line.cells for line in found.lines] == [
        [Cell("1"), None],
        [None, Cell("2")],
    ]


def run(label: str, *specs: dict[str, object]) -> Run:
    summary = Summary(name=label, model="m", adapter="a", sampler={}, samples=10, metrics={}, per_suite={}, judge="j")
    return Run(Path(label), label, "m", "t", 0, specs, label, "narrow", summary=summary)


def test_two_strengths_are_one_defense() -> None:
    kl = [run(f"KL {s}", {"kind": "kl", "strength": s}) for s in (0.1, 0.3)]
    other = run("LDIFS 1", {"kind": "ldifs", "strength": 1.0})
    assert "1 defense in 2 settings" in _byline(Collection(runs=[run("No defense"), *kl]))
    assert "2 defenses in 3 settings" in _byline(Collection(runs=[*kl, other]))
    assert "1 defense" in _byline(Collection(runs=[other]))


@pytest.mark.parametrize("defenses", [3, 25])
def test_a_phone_shows_every_panel_whole_with_the_names_of_its_rows(defenses: int) -> None:
    """In a figure that is scrolled sideways, nobody sees the names at its left edge."""
    arms = [
        RunGroup("m", f"KL {i}", False, ("kl",), float(i), None, [asked(f"KL {i}")], {"general_misaligned": RATE})
        for i in range(defenses)
    ]
    with matplotlib.rc_context(settings()):
        for draw in (partial(heat_map, arms), partial(bars, arms, {"code": arms, "medical": arms})):
            figure = draw(True)
            assert figure is not None and figure.get_figwidth() == NARROW_INCHES < 6 < draw(False).get_figwidth()
            figure.draw_without_rendering()
            for axis in figure.axes:
                names = [name.get_window_extent().x0 for name in axis.get_yticklabels() if name.get_visible()]
                assert names and min(names) >= 0
        heads = [head.get_text() for axis in heat_map(arms, True).axes for head in axis.get_xticklabels()]
    assert heads == [arm.label for arm in arms]


def asked(label: str) -> Run:
    said = [QuestionSummary(suite="g", role="general", id=str(i), text="what now ?", misaligned=0.5) for i in range(9)]
    return replace(run(label), questions=said)


def arms_named(name: str, count: int) -> list[RunGroup]:
    return [
        replace(
            RunGroup("m", f"KL {i} {name}", False, ("kl",), float(i), None, [asked(f"KL {i}")], {}),
            metrics={"general_misaligned": RATE, "in_domain_misaligned": RATE, "benign_learned": RATE},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("defenses", "numbered"), [(8, False), (16, True)])
def test_names_beside_points_are_numbered_where_they_would_lie_upon_each_other(defenses: int, numbered: bool) -> None:
    arms = arms_named("on prompts + Ceiling 1", defenses)
    with matplotlib.rc_context(settings()):
        figure = _keyed(arms, headline, arms, MOST_LETTERS_AMONG_POINTS)(True)
        assert figure is not None and bool(figure.legends) == numbered


@pytest.mark.parametrize(("defenses", "name"), [(MOST_NAMES + 1, "on prompts of one's own"), (9, "on prompts " * 5)])
def test_defenses_too_many_or_too_long_to_name_are_numbered_above_a_key(
    recwarn: pytest.WarningsRecorder, defenses: int, name: str
) -> None:
    arms = arms_named(name, defenses)
    with matplotlib.rc_context(settings()):
        for draw in (heat_map, headline):
            plain = [replace(arm, label=f"KL {i}") for i, arm in enumerate(arms[1:])]
            assert not _keyed(plain, draw, plain)(True).legends
            figure = _keyed(arms, draw, arms[2:])(True)
            figure.draw_without_rendering()
            (key,) = figure.legends
            assert [line.get_text() for line in key.texts] == [f"{i + 1}  {arms[i].label}" for i in range(2, len(arms))]
            assert key.get_window_extent().y1 < min(axis.get_window_extent().y0 for axis in figure.axes)
            assert key.get_window_extent().x1 < figure.bbox.x1
    assert not [warning for warning in recwarn if "collapsed" in str(warning.message)]
