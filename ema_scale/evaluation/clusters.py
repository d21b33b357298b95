"""Which questions are one cluster: the independent unit of every interval and p value."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from scipy.cluster.hierarchy import DisjointSet


def clusters(labels: Iterable[Iterable[Hashable]]) -> list[int]:
    """The cluster of each item, a number from 0. Items that share a label are one cluster, directly or by others.

    Args:
        labels: one or more labels per item.
    """
    joined = DisjointSet()
    first = []
    for names in labels:
        head, *others = names
        first.append(head)
        joined.add(head)
        for name in others:
            joined.add(name)
            joined.merge(head, name)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(joined[name], len(numbers)) for name in first]


def question_labels(
    suite: str, topic: str, text: str, context: Iterable[Mapping[str, str]] = ()
) -> tuple[Hashable, Hashable]:
    """The labels of a question: its topic within its suite, and what is said, by which it is known in every suite.

    Forms of one question (plain, as JSON, with a template) share a topic; the same text under two system prompts, or
    in two suites, is the same question.
    """
    before = tuple(tuple(sorted(turn.items())) for turn in context)
    return ("topic", suite, topic), ("text", before, " ".join(text.split()))
