"""What evaluations beside each other share: the answers of a base model, and what judges said of labelled answers.

Each run or study keeps them in a folder of its own (its place), so that it can be moved:

    runs/own/base/eval     runs/own/judge_check        a run
    runs/demo/base*/eval   runs/demo/judge_check       a study

Before anything is asked, rows of the same key are taken from the places beside it. A key says everything that decides
an answer (`store`), and a judgement is known by its answer's key and its judge's identity. So nothing is asked twice,
and nothing is taken that would come out another way.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ema_scale.core.errors import UserError
from ema_scale.core.io import file_lock
from ema_scale.core.run_dir import STUDY, is_run
from ema_scale.evaluation.judges.assignment import SCORING, warn_of_other_address
from ema_scale.evaluation.judges.own import OWN
from ema_scale.evaluation.plan import PromptGroup
from ema_scale.evaluation.records import JUDGEMENTS_FILE, MANIFEST_FILE, SAMPLES_FILE, Judgement, Manifest, Sample
from ema_scale.evaluation.store import Store

if TYPE_CHECKING:
    from ema_scale.config.sections import JudgeRecipe

log = logging.getLogger(__name__)

BASES = "base*/eval"

RowType = TypeVar("RowType", Sample, Judgement)
Judged = tuple[str, str]
"""(key of an answer, identity of a judge)"""
_DIGEST = re.compile(rb'#([0-9a-f]{12})"')


@dataclass(frozen=True)
class Found:
    """Rows of one folder that another one wants."""

    folder: Path
    samples: list[Sample]
    judgements: list[Judgement]


def folders_beside(place: Path, pattern: str) -> list[Path]:
    """The folders of this pattern in the runs and studies beside `place`, and in the folder that holds them.

    Those that were written to last come first.
    """
    parent = place.resolve().parent
    if not parent.is_dir():
        return []
    children = (child for child in parent.iterdir() if is_run(child) or (child / STUDY).is_file())
    found = [folder for one in (parent, *children) for folder in one.glob(pattern) if (folder / SAMPLES_FILE).is_file()]
    return sorted(found, key=lambda folder: (folder / SAMPLES_FILE).stat().st_mtime, reverse=True)


def find_rows(answers: Iterable[str], judged: Iterable[Judged], folders: Iterable[Path]) -> Iterator[Found]:
    """Folder by folder, the rows that are wanted and were not found before. A folder that cannot be read is left out
    with a warning.

    Args:
        answers: keys of answers.
        judged: judgements, each also of an answer that is wanted or there.
        folders: evaluation folders, also those that another process writes to.
    """
    answers, judged = set(answers), set(judged)
    digests = {key.rpartition("#")[2].encode() for key in answers.union(key for key, _ in judged)}
    for folder in folders:
        if not answers and not judged:
            return
        try:
            samples = [row for row in _rows(Sample, folder / SAMPLES_FILE, digests) if row.key in answers]
            judgements = [
                row for row in _rows(Judgement, folder / JUDGEMENTS_FILE, digests) if (row.key, row.judge) in judged
            ]
        except UserError as error:
            log.warning("nothing is taken from %s: %s", folder, error)
            continue
        if samples or judgements:
            answers -= {row.key for row in samples}
            judged -= {(row.key, row.judge) for row in judgements}
            yield Found(folder, samples, judgements)


def wanted(groups: Iterable[PromptGroup]) -> tuple[list[str], list[Judged]]:
    """The keys of answers, and their judgements by judges that may cost something.

    Exact judges judge again: what a bank expects may have changed.
    """
    keys = [(g, key) for g in groups for key in g.keys]
    return [key for _, key in keys], [(key, g.judge.identity) for g, key in keys if g.judge.kind in (*SCORING, OWN)]


def take_rows(
    store: Store,
    target: str,
    answers: Iterable[str],
    judged: Iterable[Judged],
    folders: Sequence[Path],
    judge: JudgeRecipe,
) -> None:
    """Copy the rows that a store lacks from `folders`.

    Args:
        store: an open one.
        target: whose answers they are there.
        answers: keys of answers.
        judged: their judgements.
        folders: other evaluation folders.
        judge: the recipe's; a warning says if judgements were made at another address.
    """
    answers = [key for key in answers if key not in store.samples]
    judged = [pair for pair in judged if pair not in store.judgements]
    for found in find_rows(answers, judged, [folder for folder in folders if not folder.samefile(store.folder)]):
        for sample in found.samples:
            store.add_sample(sample.model_copy(update={"target": target}))
        taken = [row for row in found.judgements if row.key in store.samples]
        for row in taken:
            store.add_judgement(row.model_copy(update={"usage": None}))  # they cost nothing here
        log.info(
            "%s: takes %d answers and %d judgements from %s, which asked the same",
            store.folder, len(found.samples), len(taken), found.folder,
        )  # fmt: skip
        if (asked := Manifest.read_if_valid(found.folder / MANIFEST_FILE)) is not None:
            warn_of_other_address(found.folder, asked.settings.judge, judge, {row.judge for row in taken})


def stored_rows(kind: type[RowType], path: Path) -> list[RowType]:
    """The rows in use and those put aside, which come back if they are asked for."""
    return kind.read_all(path.with_name(f"superseded_{path.name}")) + kind.read_all(path)


def _rows(kind: type[RowType], path: Path, digests: set[bytes]) -> list[RowType]:
    """Those of `stored_rows`; [] if none of them has one of these digests in its key, which is seen without parsing."""
    files = (path, path.with_name(f"superseded_{path.name}"))
    data = (file.read_bytes() for file in files if file.is_file())
    return stored_rows(kind, path) if any(not digests.isdisjoint(_DIGEST.findall(one)) for one in data) else []


@contextlib.contextmanager
def turn(place: Path, what: str, *, wait: bool) -> Iterator[None]:
    """Be the one process that asks what is shared beside `place`; the others then take its rows.

    Raises AnotherAsks if another process does and `wait` is False.

    Args:
        place: the folder of a run or study.
        what: a digest of what is asked.
        wait: until no other process does.
    """
    lock = place.resolve().parent / f".base-{what}.lock"
    with file_lock(lock, AnotherAsks(f"{lock}: another evaluation asks the same"), timeout=-1 if wait else 0):
        yield


class AnotherAsks(UserError):
    """Another process asks the same base model in the same way."""
