"""The rows of an evaluation on disk, found by key without being held in memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from ema_scale.core.errors import UserError
from ema_scale.core.files import open_file
from ema_scale.core.io import append_lines, atomic_path, jsonl_text
from ema_scale.evaluation.records import Judgement, Sample

RowType = TypeVar("RowType", Sample, Judgement)

# Places of a row, besides offsets in the file in use (0 and more) and ~offsets in `superseded_<file>` (below 0).
ABSENT, PENDING = -(2**62), 2**62
_UNKNOWN_SEED = -1


class StoredAnswer(NamedTuple):
    """Which answer to which question a row of samples.jsonl is."""

    key: str
    suite: str
    question_id: str
    paraphrase: int
    sample: int
    seed: int | None


class Judged(NamedTuple):
    """What a judgement counts for; fields as in `Judgement`. has_replies: whether its row has replies or usage."""

    aligned: float | None
    coherent: float | None
    scores: Mapping[str, float | None] | None
    label: str | None
    dropped: str | None
    scored: str | None
    has_replies: bool

    @classmethod
    def of(cls, row: Judgement) -> Judged:
        """The same of a whole row."""
        has_replies = row.raw is not None or row.usage is not None
        return cls(row.aligned, row.coherent, row.scores, row.label, row.dropped, row.scored, has_replies)


class RowFile(Generic[RowType]):
    """A file of rows in use, and `superseded_<file>` with those put aside. Rows are read where they lie."""

    def __init__(self, path: Path, kind: type[RowType], *, repair: bool) -> None:
        """repair: cut a last line that a kill has cut off the file; for whoever writes it."""
        self.path, self.aside = path, path.with_name(f"superseded_{path.name}")
        self.kind: type[RowType] = kind
        self.repair = repair
        self._open: dict[Path, BinaryIO] = {}

    def scan(self, path: Path) -> Iterator[tuple[int, Any]]:
        """(offset, fields of a row) of each whole line of one of the two files. Raises UserError as `Row.scan` does."""
        return self.kind.scan_fields(path, repair=self.repair)

    def line(self, place: int) -> bytes:
        """The line at a place, with its newline."""
        path = self.path if place >= 0 else self.aside
        if path not in self._open:
            self._open[path] = open_file(path)
        handle = self._open[path]
        handle.seek(place if place >= 0 else ~place)
        return handle.readline()

    def read(self, place: int) -> RowType:
        return self.kind.parse(self.line(place))

    def append(self, rows: Sequence[RowType]) -> list[int]:
        """Bring rows to the disk; returns their places. Raises UserError if it cannot."""
        lines = [jsonl_text([row.to_row()]).encode() for row in rows]
        place = append_lines(self.path, [b"".join(lines)])
        places = []
        for line in lines:
            places.append(place)
            place += len(line)
        return places

    def keep_only(self, wanted: Iterable[int], rest: Sequence[int]) -> None:
        """Write the rows at the `wanted` places anew, in that order, after putting those of `rest` aside."""
        if rest:  # they are on the disk before the file that they came from shrinks
            append_lines(self.aside, (self.line(place) for place in rest))
        with atomic_path(self.path) as temporary, open(temporary, "wb") as out:
            for place in wanted:
                out.write(self.line(place))
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def size(self) -> int:
        """Bytes of both files."""
        return sum(os.path.getsize(path) for path in (self.path, self.aside) if path.exists())


class Samples(Mapping[str, Sample]):
    """The answers of a folder by key. 60 to 250 bytes of memory an answer, whatever its length."""

    def __init__(self, file: RowFile[Sample], numbers: dict[str, int]) -> None:
        self._file, self._numbers = file, numbers
        self._places = array("q")
        self._questions, self._indices, self._seeds = array("i"), array("q"), array("q")
        self._question_numbers: dict[tuple[str, str, int], int] = {}
        self._pending: dict[int, Sample] = {}
        self.in_use, self._count, self._twice = 0, 0, set[int]()
        for offset, row in file.scan(file.aside):
            self._places[self._note(row)] = ~offset
        for offset, row in file.scan(file.path):
            number = self._note(row)
            self.in_use += 1
            if ABSENT < self._places[number] < 0:
                self._twice.add(number)
            self._places[number] = offset

    def _note(self, row: Sample) -> int:
        """The number of a row, of which everything but the place is noted."""
        number = self._numbers.setdefault(row.key, len(self._numbers))
        while number >= len(self._places):
            self._places.append(ABSENT)
            self._questions.append(0)
            self._indices.append(0)
            self._seeds.append(0)
        self._count += self._places[number] == ABSENT
        question = (row.suite, row.question_id, row.paraphrase)
        self._questions[number] = self._question_numbers.setdefault(question, len(self._question_numbers))
        try:
            self._indices[number] = row.sample
            self._seeds[number] = _UNKNOWN_SEED if row.seed is None else row.seed
        except OverflowError:
            raise UserError(
                f"{self._file.path}: {row.key}: found sample {row.sample} and seed {row.seed}, expected 64-bit numbers"
            ) from None
        return number

    def add(self, row: Sample) -> None:
        """Note a row that is not on the disk yet."""
        number = self._note(row)
        if ABSENT < self._places[number] < 0:
            self._twice.add(number)
        self._places[number] = PENDING
        self._pending[number] = row
        self.in_use += 1

    def settle(self, rows: Iterable[Sample], places: Iterable[int]) -> None:
        """Note where rows have gone."""
        for row, place in zip(rows, places, strict=True):
            number = self._numbers[row.key]
            self._pending.pop(number, None)
            self._places[number] = place

    def place(self, key: str) -> int:
        """Where a row lies, or ABSENT."""
        number = self._numbers.get(key)
        return ABSENT if number is None or number >= len(self._places) else self._places[number]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.place(key) != ABSENT

    def __getitem__(self, key: str) -> Sample:
        place = self.place(key)
        if place == ABSENT:
            raise KeyError(key)
        return self._pending[self._numbers[key]] if place == PENDING else self._file.read(place)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._numbers if key in self)

    def __len__(self) -> int:
        return self._count

    def present(self) -> Iterator[StoredAnswer]:
        """The answers that were not superseded."""
        questions = list(self._question_numbers)
        for key, number in self._numbers.items():
            if number < len(self._places) and self._places[number] >= 0:
                seed = self._seeds[number]
                yield StoredAnswer(
                    key,
                    *questions[self._questions[number]],
                    self._indices[number],
                    None if seed == _UNKNOWN_SEED else seed,
                )

    def are_all_in_use(self, keys: Iterable[str], count: int) -> bool:
        """Whether the rows in use are exactly these. Raises KeyError for one that is not there."""
        used = 0
        for key in keys:
            place = self.place(key)
            if place == ABSENT:
                raise KeyError(key)
            used += place >= 0
        return used == count == self.in_use

    def not_among(self, keys: Iterable[str]) -> list[int]:
        """Places of rows in use, of other keys, that are not aside yet."""
        kept = {self._numbers[key] for key in keys} | self._twice
        return [place for number, place in enumerate(self._places) if place >= 0 and number not in kept]


class Judgements(Mapping[tuple[str, str], Judgement]):
    """The judgements of a folder by (key, judge). What they count for is in memory, the replies on the disk."""

    def __init__(self, file: RowFile[Judgement], numbers: dict[str, int]) -> None:
        self._file, self._numbers = file, numbers
        self._places: dict[str, array[int]] = {}
        self._judged: dict[str, list[Judged | None]] = {}
        self._equal: dict[tuple[object, ...], Judged] = {}
        self._pending: dict[tuple[str, str], Judgement] = {}
        self.in_use, self._twice = 0, set[tuple[str, int]]()
        for offset, row in file.scan(file.aside):
            number = self._note(row)
            self._places[row.judge][number] = ~offset
        for offset, row in file.scan(file.path):
            number, places = self._note(row), self._places[row.judge]
            self.in_use += 1
            if ABSENT < places[number] < 0:
                self._twice.add((row.judge, number))
            places[number] = offset

    def _note(self, row: Judgement) -> int:
        number = self._numbers.setdefault(row.key, len(self._numbers))
        if row.judge not in self._places:
            self._places[row.judge], self._judged[row.judge] = array("q"), []
        places, judged = self._places[row.judge], self._judged[row.judge]
        while number >= len(places):
            places.append(ABSENT)
            judged.append(None)
        found = Judged.of(row)
        # Few different values stand for many exact judgements.
        judged[number] = found if found.scores is not None else self._equal.setdefault(found, found)
        return number

    def add(self, row: Judgement) -> None:
        """Note a row that is not on the disk yet."""
        number = self._note(row)
        if ABSENT < self._places[row.judge][number] < 0:
            self._twice.add((row.judge, number))
        self._places[row.judge][number] = PENDING
        self._pending[row.key, row.judge] = row
        self.in_use += 1

    def settle(self, rows: Iterable[Judgement], places: Iterable[int]) -> None:
        """Note where rows have gone."""
        for row, place in zip(rows, places, strict=True):
            self._pending.pop((row.key, row.judge), None)
            self._places[row.judge][self._numbers[row.key]] = place

    @property
    def judges(self) -> set[str]:
        """The judges of any answer."""
        return set(self._places)

    def place(self, key: str, judge: str) -> int:
        """Where a row lies, or ABSENT."""
        places, number = self._places.get(judge), self._numbers.get(key)
        return ABSENT if places is None or number is None or number >= len(places) else places[number]

    def judged(self, key: str, judge: str) -> Judged | None:
        """What the judgement counts for; None if there is none."""
        rows, number = self._judged.get(judge), self._numbers.get(key)
        return None if rows is None or number is None or number >= len(rows) else rows[number]

    def last_of(self, key: str, judges: Iterable[str]) -> tuple[str, Judged] | None:
        """(judge, what it counts for) of the last judgement in use by one of these judges; None without any."""
        last, last_judge = ABSENT, ""
        for judge in judges:
            if (place := self.place(key, judge)) >= 0 and place > last:
                last, last_judge = place, judge
        found = self.judged(key, last_judge)
        return None if found is None else (last_judge, found)

    def in_use_by(self, judge: str) -> Iterator[Judged]:
        """What the judgements in use by one judge count for."""
        rows = zip(self._places.get(judge, ()), self._judged.get(judge, ()), strict=True)
        return (found for place, found in rows if place >= 0 and found is not None)

    def score_names(self, judges: Iterable[str]) -> list[str]:
        """The names of further scores in judgements in use, in the order of the file."""
        rows = [
            (place, found.scores)
            for judge in judges
            for place, found in zip(self._places.get(judge, ()), self._judged.get(judge, ()), strict=True)
            if place >= 0 and found is not None and found.scores
        ]
        rows.sort(key=lambda row: row[0])
        return list(dict.fromkeys(name for _, scores in rows for name in scores))

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, tuple) and self.place(*pair) != ABSENT

    def __getitem__(self, pair: tuple[str, str]) -> Judgement:
        place = self.place(*pair)
        if place == ABSENT:
            raise KeyError(pair)
        return self._pending[pair] if place == PENDING else self._file.read(place)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for judge, places in self._places.items():
            for key, number in self._numbers.items():
                if number < len(places) and places[number] != ABSENT:
                    yield key, judge

    def __len__(self) -> int:
        return sum(len(places) - places.count(ABSENT) for places in self._places.values())

    def of_keys(self, keys: Iterable[str]) -> list[int]:
        """The places of all judgements of some answers, those put aside first, in the order of the files."""
        numbers = [self._numbers[key] for key in keys]
        columns = self._places.values()
        found = [column[n] for n in numbers for column in columns if n < len(column) and column[n] != ABSENT]
        return sorted(found, key=lambda place: (place >= 0, place if place >= 0 else ~place))

    def not_among(self, keys: Iterable[str]) -> list[int]:
        """Places of judgements in use, of other answers, that are not aside yet."""
        kept = {self._numbers[key] for key in keys}
        return [
            place
            for judge, places in self._places.items()
            for number, place in enumerate(places)
            if place >= 0 and number not in kept and (judge, number) not in self._twice
        ]
