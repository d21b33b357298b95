"""Effects against size: the fit is the textbook's, a model counts once, and few models make no line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ema_scale.report.aggregate import groups
from ema_scale.report.collect import collect
from ema_scale.report.make import write_report
from ema_scale.report.scaling import fit_scaling, scaling, scaling_table, sentences, size_text
from tests.report.runs import Arm, write_run

SIZES = {"org/m-1M": 1_000_000, "org/m-10M": 10_000_000, "org/m-100M": 100_000_000, "org/m-1B": 1_000_000_000}


def write_sizes(root: Path, sizes: dict[str, int], seeds: int = 2) -> list[Path]:
    """No defense gets worse with size; KL keeps the model aligned and costs less of the task in larger models."""
    runs = []
    for place, (model, parameters) in enumerate(sizes.items()):
        arms = {
            "none": Arm([], 0.1 + 0.2 * place, 0.05, 0.95, 0.6),
            "kl-1": Arm([{"kind": "kl", "strength": 1.0}], 0.02, 0.05, 0.35 + 0.18 * place, 0.6),
        }
        for name, arm in arms.items():
            for task in ("medical", "operator_swap_1"):
                for seed in range(seeds):
                    run = write_run(root / model.split("/")[1], task, name, arm, seed, samples=40, steps=2)
                    recipe = (run / "recipe.yaml").read_text().replace("smallworld:aligned", model)
                    (run / "recipe.yaml").write_text(recipe)
                    known = json.loads((run / "provenance.json").read_text())
                    known["parameters"] = {"base": parameters, "trained": 1000}
                    (run / "provenance.json").write_text(json.dumps(known))
                    runs.append(run)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sizes(tmp_path_factory.mktemp("sizes"), SIZES)


def test_the_interval_is_that_of_ordinary_least_squares() -> None:
    rng = np.random.default_rng(0)
    values = {10**k: 0.05 * k + float(rng.normal(0, 0.02)) for k in range(5, 11)}
    found = fit_scaling(values)
    x, y = np.log10(list(values)), np.array(list(values.values()))
    design = np.stack([np.ones_like(x), x], 1)
    beta, (rss,), *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(rss / 4 * np.linalg.inv(design.T @ design)[1, 1])
    assert found is not None and found.slope == pytest.approx(beta[1])
    # 2.776: the t quantile of 4 degrees of freedom, from any table.
    assert found.high - found.slope == pytest.approx(2.776 * error, rel=1e-3)
    assert found.at(1e7) == pytest.approx(beta[0] + 7 * beta[1])
    flat = fit_scaling({10**5: 0.1, 10**6: 0.1, 10**7: 0.1})
    assert flat is not None and (flat.low, flat.high) == pytest.approx((0, 0), abs=1e-12)


def test_misalignment_that_grows_and_a_price_that_shrinks_are_said(runs: list[Path]) -> None:
    found = scaling(groups(collect(runs)))
    assert found is not None and list(found.sizes.values()) == list(SIZES.values())
    grows, narrow, benign = sentences(found)
    assert "it grows" in grows and "From 1M to 1B parameters (4 models)" in grows
    assert narrow == "The price on narrow task shrinks with size for KL 1."
    assert benign == "The price on benign tasks shows no clear trend with size for any defense."
    none = next(line for line in scaling_table(found).lines if line.kind == "none")
    cell = none.cells[0]
    assert cell is not None and float(cell.value) == pytest.approx(20, abs=4) and none.cells[1:] == [None, None]


def test_a_model_counts_once_however_many_seeds_it_has(runs: list[Path]) -> None:
    every = groups(collect(runs))
    found = scaling(every)
    assert found is not None
    line = fit_scaling(found.rates("No defense", "general_misaligned"))
    assert line is not None and line.n == len(SIZES)


def test_two_sizes_are_no_trend(tmp_path: Path) -> None:
    runs = write_sizes(tmp_path / "runs", dict(list(SIZES.items())[:2]), seeds=1)
    assert scaling(groups(collect(runs))) is None


def test_runs_that_do_not_know_their_size_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    unknown = write_run(tmp_path / "old", "medical", "none", Arm([], 0.5, 0.1, 0.9, 0.5))
    found = scaling(groups(collect([*runs, unknown])))
    assert found is not None and len(found.sizes) == len(SIZES)


def test_the_page_opens_with_the_trends(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The figures of each model are drawn in other tests.
    monkeypatch.setattr("ema_scale.report.write.pictures", lambda *_: [])
    three = [run for run in runs if run.name.endswith("-s0") and "m-1B" not in str(run)]
    page = write_report(three, tmp_path / "out", title="Sizes")
    text = page.read_text()
    assert text.index("From 1M to 100M parameters") < text.index("Trends with size") < text.index("The criteria")
    assert (tmp_path / "out" / "figures" / "scaling.svg").stat().st_size > 10_000


@pytest.mark.parametrize(("n", "text"), [(140_000, "0.14M"), (10_700_000, "11M"), (7_600_000_000, "7.6B")])
def test_sizes_read_as_people_write_them(n: int, text: str) -> None:
    assert size_text(n) == text
