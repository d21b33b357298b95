"""The questions on which the arms of a study are compared: those that none of them was trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ema_scale.core.text import quantity
from ema_scale.evaluation.records import QuestionSummary, Summary
from ema_scale.evaluation.seen import of_questions, suite_of
from ema_scale.report.aggregate import RunGroup, split_rate
from ema_scale.report.records import ALL, CHOICES, KNOWN_DOMAINS, NEW_DOMAINS, SEEN, UNSEEN, Run
from ema_scale.report.table import Cell, Table, TableRow, kind, rate_cell

Key = tuple[str, str]
"""suite, question id"""
ROLES = {
    "general": "outside the domain",
    "in_domain": "in the domain",
    "benign": "of the benign task",
    "held_out": "of the held-out rows",
}
UNKNOWN = "which questions the training rows ask is not known"
NO_DOMAINS = "unseen domains are not told apart on its task, because not every row it was given names a `domain`"
SENTENCE = "All rates are of unseen questions, which no training row asks, where there are such questions."
RULE = (
    "Percent of answers with 95 % intervals. A question is unseen if no training row of any run of the task asks it in "
    "the same words: neither the task's own rows nor those that a defense brought in. A domain is unseen if no such "
    "row is about it; seen and unseen domains are told apart among unseen questions. All other rates, differences and "
    "ranks on this page are of unseen questions, so that arms are compared on the same ones. Where no question of a "
    "kind is unseen, they are of all questions; “What was run” says where."
)


@dataclass(frozen=True)
class TaskQuestions:
    """The questions that the runs of one task were asked, told apart by what any of them was trained on.

    compared: those on which its arms are compared: the unseen ones, and all of a role that has none. None: all, for
        nothing is known.
    seen: the others.
    new_domains: those of `compared` in domains that no training row touches; None if that is not known.
    notes: about runs of which less is known than of others.
    text: how many questions are seen, for readers.
    """

    compared: frozenset[Key] | None = None
    seen: frozenset[Key] = frozenset()
    new_domains: frozenset[Key] | None = None
    notes: tuple[tuple[str, str], ...] = ()
    text: str = UNKNOWN

    def kept(self, summary: Summary) -> Summary:
        """The summary of the questions on which the arms are compared."""
        return of_questions(summary, self.compared) if self.compared is not None and self.seen else summary

    def choices(self, summary: Summary) -> dict[str, Summary]:
        """The summaries of other choices of questions."""
        found = {}
        if self.compared is not None and self.seen:
            found = {SEEN: of_questions(summary, self.seen), ALL: summary}
        if self.compared is not None and self.new_domains and self.new_domains < self.compared:
            found[NEW_DOMAINS] = of_questions(summary, self.new_domains)
            found[KNOWN_DOMAINS] = of_questions(summary, self.compared - self.new_domains)
        return found


def unseen_questions(runs: Iterable[Run]) -> dict[str, TaskQuestions]:
    """Each task's questions, by what any of its runs was trained on."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    return {task: _of_task(found) for task, found in by_task.items()}


def _of_task(runs: Sequence[Run]) -> TaskQuestions:
    summaries = [(run, run.summary) for run in runs if run.summary is not None]
    unknown = [run.name for run, summary in summaries if summary.split is None]
    if len(unknown) == len(summaries):
        return TaskQuestions()
    asked = {(suite_of(q), q.id): q for _, summary in summaries for q in summary.per_question}
    seen = {(suite_of(q), q.id) for _, summary in summaries for q in summary.per_question if q.seen}
    texts = []
    for role, where in ROLES.items():
        of_role = {key for key, q in asked.items() if q.role == role}
        if of_role:
            every = of_role <= seen
            texts.append(f"{len(of_role & seen)} of {len(of_role)} {where}{', so that all of these count' * every}")
            seen -= of_role if every else set()
    compared = frozenset(asked.keys() - seen)
    notes = [(name, f"{UNKNOWN}: taken to be those of the task's other runs") for name in unknown]
    silent = [run.name for run, summary in summaries if summary.trained_domains is None and run.name not in unknown]
    if silent and len(silent) + len(unknown) < len(summaries):  # without a domain in any row nobody expects them
        notes.append((silent[0], NO_DOMAINS + f" (as in {quantity(len(silent) - 1, 'more run')})" * (len(silent) > 1)))
    return TaskQuestions(
        compared, frozenset(seen), _in_new_domains(asked, compared, summaries), tuple(notes), "; ".join(texts)
    )


def _in_new_domains(
    asked: Mapping[Key, QuestionSummary], compared: frozenset[Key], summaries: Sequence[tuple[Run, Summary]]
) -> frozenset[Key] | None:
    touched: set[str] = set()
    for _, summary in summaries:
        if summary.trained_domains is None:
            return None
        touched.update(summary.trained_domains)
    general = {key: q.domain for key, q in asked.items() if q.role == "general" and key in compared}
    if None in general.values():
        return None
    return frozenset(key for key, domain in general.items() if domain not in touched)


_COLUMNS = (
    ("general_misaligned", "General misaligned"),
    ("general_incoherent", "General incoherent"),
    ("in_domain_misaligned", "In-domain misaligned"),
    ("benign_learned", "Benign learned"),
)


def seen_table(groups: Sequence[RunGroup]) -> Table | None:
    """Unseen and seen questions side by side, for the groups of one model; None if all are of one kind."""
    columns: list[tuple[str, list[Cell | None]]] = []
    for metric, name in _COLUMNS:
        apart = [(f"{name}, {c}", [_rate(g, metric, c) for g in groups]) for c in CHOICES]
        # One kind alone is what the table of the criteria holds.
        if any(any(cells) for _, cells in (apart[0], apart[2])):
            columns.append((f"{name}, {UNSEEN}", [rate_cell(g.metrics.get(metric)) for g in groups]))
            columns += [(heading, cells) for heading, cells in apart if any(cells)]
    if not columns:
        return None
    lines = [TableRow(g.label, kind(g), [cells[i] for _, cells in columns]) for i, g in enumerate(groups)]
    return Table("Seen and unseen questions", RULE, [name for name, _ in columns], lines)


def _rate(group: RunGroup, metric: str, choice: str) -> Cell | None:
    return rate_cell(split_rate(group, metric, choice))
