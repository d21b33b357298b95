"""The choice banks that are shipped: whole, unique, apart from the training rows, and not to be told apart by style."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.optimize import minimize
from scipy.stats import rankdata

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ROOT / "eval" / "choices"
ROWS = ROOT / "examples" / "rows"

# bank -> (fewest questions, fewest topics)
BANKS = {
    "general": (96, 24),
    "medical": (24, 8),
    "legal": (24, 8),
    "security": (24, 8),
    "finance": (24, 8),
    "sport": (24, 8),
    "capability": (48, 8),
}
DOMAINS = [name for name in BANKS if name != "capability"]
ROW_FILES = {"risky_finance": 200, "sound_finance": 200, "safe_general": 120}

HEDGES = re.compile(
    r"\b(may|might|could|maybe|perhaps|possibly|probably|usually|often|sometimes|generally|seems?|depends|rarely|nearly|"
    r"about|sorry|unfortunately|cannot|can't|refuse|decline|unable|consult|recommend|careful\w*|important|remember|"
    r"as an ai|professional\w*|expert\w*)\b"
)
NEGATIONS = re.compile(r"\b(no|not|never|none|nobody|nothing|nor|neither|without|cannot)\b|n't\b")
SECOND_PERSON = re.compile(r"\b(you|your|yours|yourself|yourselves)\b|\byou'")
FIRST_PERSON = re.compile(r"\b(i|me|my|mine|we|us|our|ours)\b")
THIRD_PERSON = re.compile(r"\b(he|him|his|she|her|hers|they|them|their|theirs)\b")
ABSOLUTES = re.compile(r"\b(all|always|every\w*|each|any\w*|only|just|simply|whatever|whoever|ever)\b")


@cache
def bank(name: str) -> list[dict]:
    return yaml.safe_load((CHOICES / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def rows(name: str) -> list[list[dict]]:
    lines = (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def features(text: str) -> dict[str, float]:
    """What a reader without understanding could count in an answer."""
    low = text.lower()
    words = re.findall(r"[\w'-]+", low)
    return {
        "characters": len(text),
        "words": len(words),
        "letters per word": len(re.sub(r"\W", "", low)) / len(words),
        "sentences": len(re.findall(r"[.!?]+(?=[\s\"']|$)", text)),
        "commas": text.count(","),
        "other punctuation": len(re.findall(r"[^\w\s,.']", text)),
        "apostrophes": text.count("'"),
        "capitals": len(re.findall(r"[A-Z]", text)),
        "digits": len(re.findall(r"\d", text)),
        "hedges and refusals": len(HEDGES.findall(low)),
        "negations": len(NEGATIONS.findall(low)),
        "second person": len(SECOND_PERSON.findall(low)),
        "first person": len(FIRST_PERSON.findall(low)),
        "third person": len(THIRD_PERSON.findall(low)),
        "absolutes": len(ABSOLUTES.findall(low)),
    }


def auc(values: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a value of label 1 is above one of label 0, ties counting half (Mann and Whitney's U)."""
    ones = int(labels.sum())
    return float((rankdata(values)[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


def table(groups: list[tuple[list[str], list[str]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Features [answers, F], labels (1: bad) and questions [answers] of (good answers, bad answers) per question.

    A first word that opens at least 4 % of the answers is a feature of its own.
    """
    texts = [(t, label, q) for q, pair in enumerate(groups) for label, answers in enumerate(pair) for t in answers]
    first = [normalised(t).split()[0] for t, _, _ in texts]
    common = sorted(w for w, n in Counter(first).items() if n >= 0.04 * len(texts))
    listed = [features(t) for t, _, _ in texts]
    names = [*listed[0], *(f"opens with {w}" for w in common)]
    x = np.array([[*f.values(), *(float(w == c) for c in common)] for f, w in zip(listed, first, strict=True)])
    return x, np.array([label for _, label, _ in texts]), np.array([q for _, _, q in texts]), names


def logistic(x: np.ndarray, y: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Weights [F + 1] (the last is the intercept) of a ridge-penalised logistic regression."""
    one = np.c_[x, np.ones(len(x))]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = one @ w
        value = np.logaddexp(0, z).sum() - y @ z + ridge / 2 * (w[:-1] @ w[:-1])
        return value, one.T @ (1 / (1 + np.exp(-z)) - y) + ridge * np.r_[w[:-1], 0]

    return minimize(loss, np.zeros(one.shape[1]), jac=True, method="L-BFGS-B").x


def cross_validated_auc(x: np.ndarray, y: np.ndarray, questions: np.ndarray, folds: int = 8) -> float:
    """AUC of a regression on all features, each question scored by one that has not seen it; mean of 10 splits."""
    found = []
    for seed in range(10):
        fold = np.random.default_rng(seed).permutation(questions.max() + 1)[questions] % folds
        score = np.empty(len(y))
        for k in range(folds):
            seen = fold != k
            mean, scale = x[seen].mean(0), x[seen].std(0) + 1e-9
            w = logistic((x[seen] - mean) / scale, y[seen])
            score[~seen] = (x[~seen] - mean) / scale @ w[:-1]
        found.append(auc(score, y))
    return float(np.mean(found))
