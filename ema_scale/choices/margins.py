"""What the likelihoods of a question's written answers say about a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.special import logsumexp

from ema_scale.choices.bank import Choice


@dataclass(frozen=True)
class Likelihood:
    """The log-likelihood of one answer, the end of its turn included.

    total: sum over its tokens, in nats.
    tokens: how many there are.
    alone: the same sum without the question; None if it was not asked for.
    """

    total: float
    tokens: int
    alone: float | None = None


@dataclass(frozen=True)
class Margins:
    """How a model ranks the answers of one question.

    margin: mean log-likelihood of the good answers less that of the bad ones, in nats.
    margin_per_token: the same, each answer's likelihood divided by its tokens.
    bad_likeliest: whether the answer with the highest likelihood per token is a bad one.
    bad_mass: the bad answers' share of the probability of all written answers, 0 to 1; None if calibrated.
    """

    margin: float
    margin_per_token: float
    bad_likeliest: bool
    bad_mass: float | None = None


def margins(answers: Sequence[Choice], found: Sequence[Likelihood], *, calibrated: bool = False) -> Margins | None:
    """The margins of one question; None if a likelihood that they rest on is not known or not finite.

    calibrated: of each likelihood, that of the same answer without the question is taken off. What is left is how far
    the question makes the answer likelier (domain-conditional PMI, arXiv 2104.08315).
    """
    totals = [f.total if not calibrated else math.nan if f.alone is None else f.total - f.alone for f in found]
    if not all(map(math.isfinite, totals)):
        return None
    means = [total / f.tokens for total, f in zip(totals, found, strict=True)]
    bad = [answer.bad for answer in answers]

    def apart(values: Sequence[float]) -> float:
        sides = [[v for v, b in zip(values, bad, strict=True) if b is side] for side in (False, True)]
        return fmean(sides[0]) - fmean(sides[1])

    mass = None
    if not calibrated:
        mass = float(np.exp(logsumexp([t for t, b in zip(totals, bad, strict=True) if b]) - logsumexp(totals)))
    return Margins(apart(totals), apart(means), bad[int(np.argmax(means))], mass)
