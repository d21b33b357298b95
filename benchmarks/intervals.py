"""Coverage and power of the project's intervals and tests, by simulation: `python -m benchmarks.intervals`.

Prints the tables of docs/statistics.md. --trials sets the size; a share of 1,000 trials is known to about 1.4 points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from ema_scale.audit.verdict import more_often
from ema_scale.evaluation.stats.difference import Counts, equivalent, holm, paired_difference, swap_p
from ema_scale.evaluation.stats.rates import clustered_interval
from ema_scale.report.aggregate import mean_rate
from ema_scale.report.records import ReportedRate

# (questions, answers per question, rate, intra-question correlation)
RATES = (
    (24, 100, 0.01, 0.3), (48, 140, 0.003, 0.3), (48, 100, 0.005, 0.1), (48, 100, 0.01, 0.5), (24, 100, 0.02, 0.5),
    (24, 100, 0.02, 0.6), (24, 100, 0.03, 0.8), (8, 300, 0.02, 0.3), (8, 300, 0.3, 0.3),
)  # fmt: skip


def draw(rng: np.random.Generator, questions: int, rate: float, correlation: float) -> np.ndarray:
    """The questions' true shares."""
    size = 1 / correlation - 1
    return rng.beta(rate * size, (1 - rate) * size, questions)


def rate_row(rng: np.random.Generator, trials: int, setting: tuple[int, int, float, float]) -> tuple[str, ...]:
    questions, answers, rate, correlation = setting
    found = []
    for _ in range(trials):
        hits = rng.binomial(answers, draw(rng, questions, rate, correlation))
        found.append(clustered_interval(list(hits), [answers] * questions))
    low, high = np.array(found).T
    covered = np.mean((low <= rate) & (rate <= high))
    return (
        f"{questions} x {answers}",
        f"{rate:.1%}",
        f"{correlation}",
        f"{covered:.1%}",
        f"{100 * (high - low).mean():.1f}",
    )


def forms_row(rng: np.random.Generator, trials: int, rate: float) -> tuple[str, ...]:
    """8 questions in three forms that a model answers alike, clustered by topic and, wrongly, by question."""
    covered = np.zeros(2)
    for _ in range(trials):
        hits = rng.binomial(100, draw(rng, 8, rate, 0.3).repeat(3))
        sums = ((hits.reshape(8, 3).sum(1), 300), (hits, 100))
        for place, (x, m) in enumerate(sums):
            low, high = clustered_interval(list(x), [m] * len(x))
            covered[place] += low <= rate <= high
    return (f"{rate:.0%}", *(f"{share / trials:.1%}" for share in covered))


def pair(rng: np.random.Generator, answers: tuple[int, int], rates: tuple[float, float], questions: int = 24) -> Counts:
    """Two arms on the same questions, whose shares have the same ranks (intra-question correlation 0.1)."""
    ranks = rng.random(questions)
    shares = [special.betaincinv(rate * 9, (1 - rate) * 9, ranks) for rate in rates]
    x, y = (rng.binomial(n, share).astype(float) for n, share in zip(answers, shares, strict=True))
    return Counts(x, np.full(questions, float(answers[0])), y, np.full(questions, float(answers[1])))


def share(trials: int, happens: Callable[[], bool]) -> str:
    return f"{np.mean([happens() for _ in range(trials)]):.1%}"


def comparisons(rng: np.random.Generator, trials: int) -> list[tuple[str, str]]:
    def equal_spread() -> Counts:
        m = np.full(24, 50.0)
        return Counts(rng.binomial(50, 0.125, 24) * 1.0, m, 50.0 * (rng.random(24) < 0.125), m)

    def significant(answers: tuple[int, int], rates: tuple[float, float]) -> str:
        return share(trials, lambda: swap_p(pair(rng, answers, rates)) < 0.05)

    def within_margin(rates: tuple[float, float]) -> bool:
        found = paired_difference(pair(rng, (50, 50), rates))
        return equivalent(found.low, found.high, 0.1)

    def any_of_ten() -> bool:
        return min(holm([swap_p(pair(rng, (20, 20), (0.2, 0.2), 12)) for _ in range(10)])) < 0.05

    def audit(rate: float) -> bool:
        files = []
        for chance in (rate, 0.05):
            shares = draw(rng, 100, chance, 0.3)
            files.append([(q, bool(hit)) for q, s in enumerate(shares) for hit in rng.random(10) < s])
        return more_often(files[0], files[1], draws=999) < 0.01

    return [
        ("p < 0.05, no difference, 100 against 10 answers", significant((100, 10), (0.2, 0.2))),
        ("p < 0.05, 20 against 30 %, 10 against 10 answers", significant((10, 10), (0.2, 0.3))),
        ("p < 0.05, 20 against 30 %, 100 against 10 answers", significant((100, 10), (0.2, 0.3))),
        ("p < 0.01, equal means, very different spread", share(trials, lambda: swap_p(equal_spread()) < 0.01)),
        ("Holm: any of ten equal arms below 0.05", share(max(20, trials // 10), any_of_ten)),
        ("margin of 10 points: the true difference is 10", share(trials, lambda: within_margin((0.3, 0.2)))),
        ("margin of 10 points: there is no difference", share(trials, lambda: within_margin((0.2, 0.2)))),
        ("`ema data audit` at 1 %: clean file called suspect", share(trials, lambda: audit(0.05))),
        ("`ema data audit` at 1 %: 20 against 5 % suspect rows", share(trials, lambda: audit(0.2))),
    ]  # fmt: skip


def study_row(rng: np.random.Generator, trials: int, tasks: int, seeds: int, between: float) -> tuple[str, ...]:
    """Rates of tasks with standard deviation `between`, of seeds with 3 points."""
    covered = np.zeros(2)
    for _ in range(trials):
        truth = np.clip(rng.normal(0.4, between, tasks), 0, 1)
        values = np.clip(truth[:, None] + rng.normal(0, 0.03, (tasks, seeds)), 0, 1)
        rates = [ReportedRate(v, max(0, v - 0.002), min(1, v + 0.002), 100, 24, 0) for v in values.ravel()]
        found = mean_rate(rates, [str(task) for task in range(tasks) for _ in range(seeds)])
        assert found is not None and found.any_task is not None
        covered += (found.low <= truth.mean() <= found.high, found.any_task[0] <= 0.4 <= found.any_task[1])
    return (f"{tasks} x {seeds}", f"{100 * between:.0f}", *(f"{one / trials:.1%}" for one in covered))


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args(arguments).trials
    rng = np.random.default_rng(0)
    head = ("questions x answers", "rate", "correlation", "coverage", "mean width in points")
    print(table(head, [rate_row(rng, trials, setting) for setting in RATES]))
    print(table(("rate", "by topic", "by question"), [forms_row(rng, trials, rate) for rate in (0.05, 0.3)]))
    print(table(("test", "share of trials"), comparisons(rng, trials)))
    of_study = ("tasks x seeds", "tasks differ by, in points", "these tasks", "tasks in general")
    print(table(of_study, [study_row(rng, trials, *one) for one in ((3, 3, 0.0), (3, 3, 0.15), (6, 2, 0.15))]))


if __name__ == "__main__":
    main()
