"""Studies of many runs: what planning one takes, and a permutation test over many questions.

Each measurement is a process of its own, so that its peak memory and processor seconds are its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.alone import alone
from benchmarks.harness import Measured, cpu_seconds, peak_rss
from ema_scale.core.errors import UserError
from ema_scale.evaluation.stats.difference import RESAMPLES, Counts, swap_p

RECIPE = """\
name: many
model: {path: "smallworld:aligned"}
training: {max_steps: 10}
evaluation: {suites: {general: ["smallworld:suite/outside_medical"], in_domain: ["smallworld:suite/medical"]}}
"""
ROW = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "A number."}]}\n'
TASKS, SEEDS = 10, 10
# An earlier version of the package may not have anything but its command line.
PROGRAM = """\
import atexit, pathlib, re, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print("peak", re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1], file=sys.stderr))
from ema_scale.cli import main
main()
"""


def write_study(folder: Path, runs: int) -> Path:
    """A study of at least `runs` runs: 10 tasks, 10 seeds, and as many strengths of KL as that takes."""
    (folder / "recipe.yaml").write_text(RECIPE)
    for task in range(TASKS):
        (folder / f"rows{task}.jsonl").write_text(ROW % task)
    strengths = range(1, 1 + -(-runs // (TASKS * SEEDS)))
    path = folder / "study.yaml"
    path.write_text(
        "\n".join([
            "name: many", "title: Many runs", "recipe: recipe.yaml", f"seeds: {list(range(SEEDS))}", "tasks:",
            *(f"  task-{task}: {{data: {{train: rows{task}.jsonl}}}}" for task in range(TASKS)), "defenses:",
            *(f"  kl-{n}: [{{kind: kl, strength: {n / 1000}}}]" for n in strengths), "",
        ])
    )  # fmt: skip
    return path


def planned(study: Path, package: Path | None) -> tuple[float, int]:
    """(processor seconds, peak bytes) of `ema study --dry-run`; package: a checkout of another version."""
    environment = os.environ if package is None else {**os.environ, "PYTHONPATH": str(package.resolve())}
    command = [sys.executable, "-c", PROGRAM, "study", str(study), "--dry-run"]
    start = cpu_seconds()
    done = subprocess.run(command, env=environment, cwd=study.parent, capture_output=True, text=True)
    seconds = cpu_seconds() - start
    if done.returncode:
        raise UserError(f"ema study --dry-run of {package or 'this version'} failed:\n{done.stderr[-2000:]}")
    return seconds, 1024 * int(done.stderr.split()[-1])


def the_counts(questions: int, answers: int = 10) -> Counts:
    """Two arms' answers to the same questions, one of which is a little worse."""
    rng, n = np.random.default_rng(0), np.full(questions, answers)
    return Counts(rng.binomial(answers, 0.30, questions), n, rng.binomial(answers, 0.29, questions), n)


def by_scipy(counts: Counts) -> float:
    """The p value by scipy.stats.permutation_test, which holds all resamples at once."""

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(a.mean(axis) - b.mean(axis))

    arms = (counts.x / counts.m, counts.y / counts.k)
    found = stats.permutation_test(
        arms,
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def tested(way: str, questions: int) -> dict[str, float]:
    """Processor seconds, bytes that it adds at its peak, and the p value of one way."""
    counts, before, start = the_counts(questions), peak_rss(), time.process_time()
    p = {"scipy": by_scipy, "ours": swap_p}[way](counts)
    return {"seconds": time.process_time() - start, "bytes": peak_rss() - before, "p": p}


def bench_many_runs(runs: int, questions: int, before: Path | None) -> Iterator[Measured]:
    """One row per measurement. before: a checkout of an earlier version, which plans the same study."""
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        study = write_study(Path(folder), runs)
        for name, package in ([(f" by {before}", before)] if before else []) + [("", None)]:
            seconds, peak = planned(study, package)
            yield Measured(f"`ema study --dry-run`, {runs} runs{name}", [seconds], peak)
    for way, name in (("scipy", "scipy.stats.permutation_test"), ("ours", "`ema compare`'s")):
        row = f"a permutation test, {questions} questions: {name}"
        done = alone("benchmarks.many_runs:tested", way=way, questions=questions)
        if done is None:
            yield Measured(row, note="out of memory")
        else:
            yield Measured(row, [done["seconds"]], int(done["bytes"]), figures={"p": done["p"]})
