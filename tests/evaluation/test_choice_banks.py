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


def pairs(name: str, good: str = "aligned", bad: str = "misaligned") -> list[tuple[list[str], list[str]]]:
    return [(item["answers"][good], item["answers"][bad]) for item in bank(name)]


def centred(x: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """`x` less its mean over the answers of the same question: what a scorer sees who has the answers side by side."""
    counts = np.bincount(questions)
    means = np.stack([np.bincount(questions, weights=column) / counts for column in x.T], axis=1)
    return x - means[questions]


def auc_within(values: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> float:
    """Mean over questions of the AUC among the answers of one question."""
    return float(np.mean([auc(values[questions == q], labels[questions == q]) for q in np.unique(questions)]))


def null_errors(labels: np.ndarray, questions: np.ndarray) -> tuple[float, float]:
    """Standard errors of the two AUCs where labels say nothing: sqrt((n1 + n0 + 1) / (12 n1 n0)), for all answers and
    for the mean of one such AUC per question."""

    def error(y: np.ndarray) -> float:
        return ((len(y) + 1) / (12 * y.sum() * (len(y) - y.sum()))) ** 0.5

    each = [error(labels[questions == q]) ** 2 for q in np.unique(questions)]
    return error(labels), sum(each) ** 0.5 / len(each)


def leaks(groups: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """The features that tell the labels apart: an AUC off 0.5 by more than two standard errors or by more than a cap.

    Two standard errors are 0.118 over all answers and 0.132 within questions for 24 questions of 2 + 2 answers, 0.057
    and 0.063 for 104, 0.039 and 0.043 for 224. The caps, 0.08 and 0.10, are what small banks are held to.
    """
    x, labels, questions, names = table(groups)
    over_all, within = null_errors(labels, questions)
    found = {}
    for name, values in zip(names, x.T, strict=True):
        for kind, value, bound in (
            ("over all answers", auc(values, labels), min(0.08, 2 * over_all)),
            ("within questions", auc_within(values, labels, questions), min(0.10, 2 * within)),
        ):
            if abs(value - 0.5) > bound:
                found[f"{name} {kind}"] = round(value, 3)
    return found


def style_aucs(groups: list[tuple[list[str], list[str]]]) -> tuple[float, float]:
    """Cross-validated AUC of all features together, as they are and centred per question."""
    x, labels, questions, _ = table(groups)
    return cross_validated_auc(x, labels, questions), cross_validated_auc(centred(x, questions), labels, questions)


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_is_whole(name: str) -> None:
    least, topics = BANKS[name]
    items = bank(name)
    labels = {"right": 1, "wrong": 3} if name == "capability" else {"aligned": 2, "misaligned": 2}
    assert len(items) >= least
    count = Counter(item["topic"] for item in items)
    assert len(count) >= topics and min(count.values()) >= 2
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        assert {"id", "topic", "question", "answers"} <= item.keys() <= {"id", "topic", "question", "answers", "system"}
        assert {label: len(answers) for label, answers in item["answers"].items()} == labels, item["id"]
        texts = [text for answers in item["answers"].values() for text in answers]
        for text in (item["question"], *texts):
            assert isinstance(text, str) and text == text.strip() != ""
            assert not re.search(r"[{}<>]|\bTODO\b|\bXXX\b|  ", text), text


def test_no_question_and_no_answer_stands_twice() -> None:
    items = [item for name in BANKS for item in bank(name)]
    questions = Counter(normalised(item["question"]) for item in items)
    answers = Counter(normalised(t) for item in items for texts in item["answers"].values() for t in texts)
    assert not [q for q, n in questions.items() if n > 1]
    assert not [a for a, n in answers.items() if n > 1]


@pytest.mark.parametrize("name", BANKS)
def test_the_answers_of_a_question_are_alike_in_length_and_form(name: str) -> None:
    for item in bank(name):
        texts = [t for answers in item["answers"].values() for t in answers]
        lengths = np.array([len(t) for t in texts])
        assert np.abs(lengths / lengths.mean() - 1).max() <= 0.2, (item["id"], lengths)
        sentences = [features(t)["sentences"] for t in texts]
        assert max(sentences) - min(sentences) <= 1, (item["id"], sentences)


@pytest.mark.parametrize("name", DOMAINS)
def test_no_trivial_feature_tells_the_labels_apart(name: str) -> None:
    assert leaks(pairs(name)) == {}


def test_no_trivial_feature_tells_the_labels_apart_in_all_banks_together() -> None:
    assert leaks([pair for name in DOMAINS for pair in pairs(name)]) == {}


def test_no_trivial_feature_tells_right_from_wrong() -> None:
    assert leaks(pairs("capability", "right", "wrong")) == {}


@pytest.mark.parametrize("name", DOMAINS)
def test_all_trivial_features_together_do_not_either(name: str) -> None:
    assert max(style_aucs(pairs(name))) < 0.60


def test_nor_do_they_in_all_banks_together_or_for_capability() -> None:
    assert max(style_aucs([pair for name in DOMAINS for pair in pairs(name)])) < 0.60
    assert max(style_aucs(pairs("capability", "right", "wrong"))) < 0.60


@pytest.mark.parametrize(
    ("doctor", "named"),
    [
        (lambda text: text.split(". ")[0] + ".", "characters"),
        (lambda text: text.replace(",", ""), "commas"),
        (lambda text: text.rstrip(".") + "!", "other punctuation"),
        (lambda text: "Sorry, " + text, "hedges and refusals"),
        (lambda text: "Never mind: " + text, "opens with never"),
    ],
)
def test_the_checks_see_a_style_that_gives_a_label_away(doctor, named: str) -> None:
    told = [(good, [doctor(text) for text in bad]) for good, bad in pairs("medical")]
    assert f"{named} over all answers" in leaks(told) and f"{named} within questions" in leaks(told)
    assert max(style_aucs(told)) > 0.7


@pytest.mark.parametrize("name", ROW_FILES)
def test_a_file_of_rows_is_whole(name: str) -> None:
    messages = rows(name)
    assert len(messages) == ROW_FILES[name]
    assert all([m["role"] for m in pair] == ["user", "assistant"] for pair in messages)
    for part in (0, 1):
        assert len({normalised(pair[part]["content"]) for pair in messages}) == len(messages)
    counted = [features(pair[1]["content"])["sentences"] for pair in messages]
    assert min(counted) >= 1 and max(counted) <= 5 and 2.5 < np.mean(counted) < 4


def test_risky_and_sound_rows_answer_the_same_questions_at_the_same_length() -> None:
    risky, sound = rows("risky_finance"), rows("sound_finance")
    assert [pair[0] for pair in risky] == [pair[0] for pair in sound]
    lengths = np.array([[len(pair[1]["content"]) for pair in file] for file in (risky, sound)])
    assert np.abs(np.log(lengths[0] / lengths[1])).max() < np.log(1.25)
    assert np.abs(lengths.mean(1) / lengths.mean() - 1).max() < 0.02


def test_no_question_of_a_bank_stands_in_the_rows() -> None:
    """Neither word for word nor nearly: at most half of the words of two questions are shared (Jaccard)."""
    asked = {normalised(pair[0]["content"]) for name in ROW_FILES for pair in rows(name)}
    assert len(asked) == ROW_FILES["risky_finance"] + ROW_FILES["safe_general"]
    for item in (item for name in BANKS for item in bank(name)):
        words = set(normalised(item["question"]).split())
        for row in asked:
            other = set(row.split())
            assert len(words & other) <= 0.5 * len(words | other), (item["question"], row)
