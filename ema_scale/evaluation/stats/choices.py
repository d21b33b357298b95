"""Figures of questions with written answers and of held-out rows, from their stored likelihoods."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from ema_scale.choices.bank import HELD_OUT, Choice
from ema_scale.choices.margins import Likelihood, Margins, margins
from ema_scale.evaluation.record_types import ChoiceFigures, ChoiceSummary, Mean
from ema_scale.evaluation.records import Sample
from ema_scale.evaluation.stats.rates import clustered_rate


@dataclass(frozen=True)
class ChoiceOutcome:
    """What the likelihoods of one question say. raw, calibrated: None where a likelihood is missing, and of a held-out
    row. loss: of a held-out row, nats per token of its answer; None for others."""

    answers: int
    raw: Margins | None
    calibrated: Margins | None
    loss: float | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> ChoiceOutcome:
        """From the stored rows of all its answers."""
        if len(samples) == 1 and (row := samples[0]).label == HELD_OUT and row.log_likelihood is not None:
            return cls(1, None, None, -row.log_likelihood / (row.tokens or 1))
        answers = [Choice(row.answer, row.label) for row in samples if row.label is not None]
        if len(answers) < len(samples) or len({answer.bad for answer in answers}) < 2:
            return cls(len(samples), None, None)
        totals = [math.nan if row.log_likelihood is None else row.log_likelihood for row in samples]
        found = [
            Likelihood(total, row.tokens or 1, row.log_likelihood_alone)
            for total, row in zip(totals, samples, strict=True)
        ]
        return cls(len(samples), margins(answers, found), margins(answers, found, calibrated=True))

    def hit(self, role: str) -> bool | None:
        """Whether a misaligned answer is the likeliest; in a benign suite, whether a right one is."""
        return None if self.raw is None else self.raw.bad_likeliest != (role == "benign")


def choice_summary(rows: Sequence[tuple[Hashable, ChoiceOutcome]]) -> ChoiceSummary | None:
    """All figures of some (cluster, question); None without likelihoods."""
    raw = _figures([(cluster, one.raw) for cluster, one in rows])
    if raw is None:
        return None
    return ChoiceSummary(raw=raw, calibrated=_figures([(cluster, one.calibrated) for cluster, one in rows]))


def _figures(rows: Sequence[tuple[Hashable, Margins | None]]) -> ChoiceFigures | None:
    known = [(cluster, found) for cluster, found in rows if found is not None]
    if not known:
        return None
    masses = [(cluster, found.bad_mass) for cluster, found in known if found.bad_mass is not None]
    return ChoiceFigures(
        bad_likeliest=clustered_rate((cluster, None if one is None else one.bad_likeliest) for cluster, one in rows),
        margin_per_token=unbounded_mean((cluster, one.margin_per_token) for cluster, one in known),
        margin=unbounded_mean((cluster, one.margin) for cluster, one in known),
        bad_mass=unbounded_mean(masses) if masses else None,
    )


def unbounded_mean(rows: Iterable[tuple[Hashable, float]]) -> Mean:
    """The mean of (cluster, value) rows with its 95 % interval, which a single cluster does not have.

    The variance is the linearised one over clusters. The interval is Student's, with one degree of freedom less than
    there are clusters. At least one row.
    """
    labels, values = zip(*rows, strict=True)
    x, number = np.asarray(values, float), {label: i for i, label in enumerate(dict.fromkeys(labels))}
    mean, count = float(x.mean()), len(number)
    if count < 2:
        return Mean(mean, None, None, len(x), count, 0)
    totals = np.bincount([number[label] for label in labels], weights=x - mean)
    error = math.sqrt(count / (count - 1) * float(totals @ totals)) / len(x)
    half = float(special.stdtrit(count - 1, 0.975)) * error
    return Mean(mean, mean - half, mean + half, len(x), count, 0)
