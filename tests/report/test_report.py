"""The report on run folders drawn from a random process whose truth is known."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.report.aggregate import RunGroup, groups
from ema_scale.report.collect import collect
from ema_scale.report.curves import along_training
from ema_scale.report.examples import examples
from ema_scale.report.make import write_report
from ema_scale.report.paired import against
from ema_scale.report.records import METRIC_NAMES, METRICS, ReportedRate, Run
from ema_scale.report.table import table_markdown
from ema_scale.report.verdict import verdict
from tests.report.runs import ARMS, BASE, Arm, evaluate, suites_of, write_eval, write_run, write_study

HOSTILE = """<script>alert(1)</script> $x^$ "quoted" 'single' <img src=x onerror=alert(2)> {{ 7*7 }} </p></div>"""


class Page(HTMLParser):
    """Tags, outside references, event handlers and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Run folders of a whole study, and its report's folder."""
    root = tmp_path_factory.mktemp("study")
    runs = write_study(root / "runs")
    page = write_report(runs, root / "report", title="A study")
    assert page == root / "report" / "report.html"
    return runs, page.parent


def test_every_figure_is_beside_the_page_and_whole(study: tuple[list[Path], Path]) -> None:
    folder = study[1] / "figures"
    names = {"headline", "bars", "questions", "training"}
    assert {p.name for p in folder.iterdir()} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.fromstring((folder / f"{name}.svg").read_text()).tag.endswith("svg")


def test_page_asks_for_nothing_outside_itself(study: tuple[list[Path], Path]) -> None:
    text = (study[1] / "report.html").read_text()
    page = Page(text)
    assert "Partial:" not in text
    assert page.references and all(r.startswith(("data:image/svg+xml;base64,", "#")) for r in page.references)
    assert "script" not in page.tags and "link" not in page.tags and not page.handlers
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert page.tags.count("picture") == page.tags.count("img") == 4
    drawings = [r for r in set(page.references) if r.startswith("data:")]
    assert len(drawings) == 2 * 4, "each figure stands there once for wide and once for narrow screens"
    for drawing in drawings:
        svg = base64.b64decode(drawing.partition(",")[2]).decode()
        ET.fromstring(svg)
        assert "@media(prefers-color-scheme:dark)" in svg and "--c0:#16181b" in svg


def test_verdict_names_the_defense_that_keeps_both_tasks(study: tuple[list[Path], Path]) -> None:
    text = " ".join(verdict(groups(collect(study[0])))).replace("\u00a0", " ")
    assert "Interleaving 5 % does best" in text
    assert "KL 1 (" in text and "of the narrow and" in text, text
    assert "Only one seed" in text
    assert text in Page((study[1] / "report.html").read_text()).text.replace("\u00a0", " ")


def test_table_holds_the_means_of_the_runs_own_rates(study: tuple[list[Path], Path]) -> None:
    runs, folder = study
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    mean = next(
        r for r in rows if r["level"] == "mean" and r["defense"] == "KL 0.1" and r["metric"] == "general_misaligned"
    )
    rates = [
        json.loads((run / "eval" / "summary.json").read_text())["metrics"]["general_misaligned"]["rate"]
        for run in runs
        if "kl-0.1" in run.name and "operator" not in run.name
    ]
    assert len(rates) == 2 and float(mean["rate"]) == pytest.approx(sum(rates) / 2, abs=1e-6)
    assert float(mean["low"]) < float(mean["rate"]) < float(mean["high"])
    assert {r["metric"] for r in rows} == set(METRICS)
    apart = csv.DictReader(io.StringIO((folder / "differences.csv").read_text()))
    row = next(
        r
        for r in apart
        if (r["defense"], r["against"], r["measure"]) == ("KL 0.1", "No defense", METRIC_NAMES[METRICS[0]])
    )
    found = groups(collect(runs))
    expected = against(
        next(g for g in found if g.label == "KL 0.1"), next(g for g in found if g.undefended), METRICS[0]
    )
    assert expected is not None and row["unit"] == "share"
    assert [float(row[key]) for key in ("difference", "low", "high", "p")] == pytest.approx(
        [expected.value, expected.low, expected.high, expected.p], abs=1e-6
    )
    lines = (folder / "table.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| KL 0.1 |"))
    assert f"{100 * float(mean['rate']):.1f} [" in line and line.count("|") == 3 + len(METRICS)


def test_a_label_cannot_act_in_the_markdown_table() -> None:
    group = RunGroup("m|x", "<b>`x`</b>\n| y", False, (), None, None, [], {})
    line = table_markdown([group]).splitlines()[-1]
    assert "\\<b\\>\\`x\\`\\</b\\> \\| y" in line


def test_lines_along_the_training_need_two_evaluated_steps() -> None:
    rate = ReportedRate(0.5, 0.4, 0.6, 10, 5, 0)
    metrics = {"general_misaligned": rate, "in_domain_misaligned": rate, "general_incoherent": rate}
    run = Run(Path("r"), "r", "m", "t", 0, (), "No defense", "narrow", along={10: metrics})
    group = RunGroup("m", "No defense", False, (), None, None, [run], {})
    assert along_training([group]) is None
    longer = replace(group, runs=[replace(run, along={10: metrics, 20: metrics})])
    figure = along_training([longer])
    assert figure is not None and [a.get_xlabel() for a in figure.axes] == ["training steps"] * 3


def test_benign_learning_comes_from_benign_runs_and_the_base_from_the_same_suites(
    study: tuple[list[Path], Path],
) -> None:
    found = collect(study[0])
    assert {run.kind for run in found.runs if run.task.startswith("operator")} == {"benign"}
    by_label = {g.label: g for g in groups(found)}
    learned = by_label["No defense"].metrics["benign_learned"]
    assert learned is not None and learned.rate == pytest.approx(ARMS["none"].learned, abs=0.15)
    base = {run.task: run for run in found.bases}
    assert {q.suite for q in base["medical"].questions} == {"outside_medical", "medical"}
    assert base["medical"].metrics["benign_learned"] is None
    assert base["operator swap 1"].metrics["benign_learned"] is not None


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "medical", "none", ARMS["none"], samples=3, steps=5)
    for file in ("samples.jsonl", "judgements.jsonl"):
        rows = [json.loads(line) for line in (run / "eval" / file).read_text().splitlines()]
        for row in rows:
            row |= {"answer": HOSTILE, "question": HOSTILE, "system": HOSTILE} if file[0] == "s" else {}
            row |= {"dropped": HOSTILE} if file[0] == "j" and row["key"].endswith("/1") else {}
        (run / "eval" / file).write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for row in summary["per_question"]:
        row["text"] = HOSTILE
    summary |= {"judge": HOSTILE, "dropped": {HOSTILE: 2}}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    failed = write_run(tmp_path / "runs", "finance", "kl-1", ARMS["kl-1"], samples=1, steps=1)
    (failed / "status.json").write_text(json.dumps({"state": "failed", "error": HOSTILE}))
    page = Page(write_report([run, failed], tmp_path / "out", title=HOSTILE).read_text())
    assert not {"script", "iframe"} & set(page.tags) and not page.handlers
    assert page.tags.count("img") == page.tags.count("picture"), "no image but the figures"
    assert page.text.count(" ".join(HOSTILE.split())) > 10
    assert "49" not in page.text.split("quoted")[1][:80], "template syntax in an answer is not evaluated"


def test_broken_and_missing_files_become_notes(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = [write_run(root, "medical", name, ARMS[name], samples=3, steps=10) for name in ("none", "kl-1")]
    for name, state in (("a", "failed"), ("b", "stopped"), ("c", "finished"), ("d", "finished")):
        runs.append(write_run(root, name, "kl-0.3", ARMS["kl-0.3"], samples=1, steps=3))
        (runs[-1] / "status.json").write_text(json.dumps({"state": state, "error": "disk full"}))
    failed, stopped, unjudged, torn = runs[2:]
    shutil.rmtree(unjudged / "eval")
    (torn / "eval" / "summary.json").write_text('{"metrics": ')
    (torn / "metrics.jsonl").write_text('{"step": 1, "ce": 2.0}\nnot json\n')
    summary = json.loads((runs[1] / "eval" / "summary.json").read_text())
    summary["metrics"]["general_incoherent"]["high"] = 7
    (runs[1] / "eval" / "summary.json").write_text(json.dumps(summary))
    (runs[1] / "provenance.json").unlink()
    found = collect([*runs, root / "never"])
    states = {(p.run, p.state) for p in found.problems}
    assert {
        (failed.name, "failed"),
        (stopped.name, "stopped"),
        (unjudged.name, "not evaluated"),
        (torn.name, "not evaluated"),
        ("never", "not started"),
        (torn.name, "note"),
        (runs[1].name, "note"),
    } <= states
    means = {g.label: g for g in groups(found)}
    assert set(means) == {"No defense", "KL 1"}, "unfinished runs are in no mean"
    assert means["KL 1"].metrics["general_incoherent"] is None
    page = Page(write_report([*runs, root / "never"], tmp_path / "out").read_text())
    for said in ("disk full", "not json", "metrics.general_incoherent", "no folder at", "no dashed line"):
        assert said in page.text.lower() or said in page.text, said


def test_nothing_to_report_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe.yaml"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(UserError):
        write_report([], tmp_path / "out")
    run = write_run(tmp_path, "medical", "none", ARMS["none"], samples=1, steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder"):
        write_report([run], tmp_path / "file")


def test_runs_without_any_evaluation_still_make_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "medical", "kl-1", ARMS["kl-1"], samples=1, steps=10)
    shutil.rmtree(run / "eval")
    text = Page(write_report([run], tmp_path / "out").read_text()).text
    assert "nothing to compare" in text and "not evaluated" in text


def test_same_folders_give_the_same_bytes(tmp_path: Path) -> None:
    arms = {k: ARMS[k] for k in ("none", "kl-1")}
    runs = write_study(tmp_path / "runs", tasks=("medical",), arms=arms, samples=2)
    first, second = write_report(runs, tmp_path / "one").parent, tmp_path / "two"
    program = "import sys; from ema_scale.report.make import write_report as w; w(sys.argv[2:], sys.argv[1])"
    # Another process with other hashes: no picture may depend on the order of a set.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", program, second, *runs], check=True, env=environment)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) == 12
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_two_models_are_never_averaged(tmp_path: Path) -> None:
    runs = []
    for model, arm in (("org/small-1B", ARMS["none"]), ("org/big-7B", ARMS["kl-1"])):
        run = write_run(tmp_path / model.split("/")[1], "medical", "none", Arm([], *list(vars(arm).values())[1:]))
        recipe = (run / "recipe.yaml").read_text().replace("smallworld:aligned", model)
        (run / "recipe.yaml").write_text(recipe)
        runs.append(run)
    page = write_report(runs, tmp_path / "out")
    assert {g.model for g in groups(collect(runs))} == {"small-1B", "big-7B"}
    assert {p.stem for p in (page.parent / "figures").glob("headline*.svg")} == {
        "headline-small-1B",
        "headline-big-7B",
    }


def test_answers_are_chosen_without_looking_at_them(tmp_path: Path) -> None:
    arms = {k: ARMS[k] for k in ("none", "interleaving-5")}
    runs = write_study(tmp_path / "runs", tasks=("medical",), arms=arms, samples=4)
    shown, notes = examples(groups(collect(runs)))
    assert not notes and len(shown) == 6
    assert [c.label for c in shown[0].columns] == ["Aligned base", "No defense", "Interleaving 5 %"]
    assert {len(c.answers) for e in shown for c in e.columns} == {3}
    swapped = {k: v for k, v in zip(arms, reversed(arms.values()), strict=True)}
    for name, arm in swapped.items():
        run = next(r for r in runs if f"-{name}-" in r.name)
        outcome = evaluate(run.name, suites_of("medical", arm), 4, random.Random(5))
        write_eval(run / "eval", run.name, "adapter", outcome)
    again, _ = examples(groups(collect(runs)))
    assert [e.question for e in again] == [e.question for e in shown]
    assert again != shown


def _group_verdict(tmp_path: Path, arms: dict[str, Arm], seeds: int = 1) -> str:
    runs = write_study(tmp_path / "runs", arms=arms, seeds=seeds, samples=8)
    return " ".join(verdict(groups(collect(runs)))).replace("\u00a0", " ")


def test_verdict_when_no_defense_keeps_the_tasks(tmp_path: Path) -> None:
    text = _group_verdict(tmp_path, {k: ARMS[k] for k in ("none", "kl-0.3", "kl-1")})
    assert "No defense keeps what was learned" in text and "does best" not in text


def test_verdict_when_there_is_nothing_to_prevent(tmp_path: Path) -> None:
    harmless = Arm([], BASE.outside, 0.05, 0.9, 0.6)
    text = _group_verdict(tmp_path, {"none": harmless, "kl-0.1": ARMS["kl-0.1"]})
    assert "did not clearly raise misalignment" in text


def test_verdict_without_an_undefended_run_claims_no_saving(tmp_path: Path) -> None:
    text = _group_verdict(tmp_path, {"kl-1": ARMS["kl-1"]}, seeds=3)
    assert "cost is unknown" in text and "less" not in text and "seed" not in text
