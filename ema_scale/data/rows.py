"""Rows: conversations to learn from, each knowing where it came from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.data.formats import Message, to_conversation
from ema_scale.data.readers import SUFFIXES as FILE_SUFFIXES
from ema_scale.data.readers import check_beginning, read_file
from ema_scale.data.values import BadRow

# Which part of a mix a row is: the user's own rows, rows mixed in to be learned too, rows that only a penalty reads,
# and rows whose answers must not be learned.
TAGS = ("task", "safe", "prompts", "bad")
LEARNED = ("task", "safe")
_REASONS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. origin: `file:line` or `hub-id[index]`; tag: one of TAGS; tools: JSON schemas of functions that
    the assistant may call; domain: what the conversation is about, where its record says so; plain: what the user said
    before a defense put a text in front of it."""

    messages: tuple[Message, ...]
    origin: str = ""
    tag: str = "task"
    tools: tuple[Mapping[str, Any], ...] = ()
    domain: str | None = None
    plain: tuple[str, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """What the user says, turn by turn."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")


@dataclass(frozen=True)
class Dropped:
    """A record that was left out, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows of one or several sources.

    dropped: what was left out. hashes: source -> sha256 of what was read. unread: name of a column, or of a key of a
    message, that nothing reads -> rows that have it.
    """

    rows: Sequence[Row]
    dropped: list[Dropped] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return ", ".join(self.hashes)

    @property
    def sha256(self) -> str:
        """The hash of the one source; of several, that of their hashes."""
        if len(self.hashes) == 1:
            return next(iter(self.hashes.values()))
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


def load_rows(
    source: str | Path | Sequence[Any],
    *,
    limit: int | None = None,
    on_bad: Literal["raise", "drop"] = "raise",
    columns: Mapping[str, str | None] | None = None,
    learn: Literal["all", "last", "marked"] = "all",
    split: str = "train",
    answers: bool = True,
) -> Rows:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file, a hub id, a dataset, or a list of records or sources.

    Args:
        limit: at most this many rows of each source.
        on_bad: raise at the first bad record, or drop and count it.
        columns: rename a record's columns first (theirs -> ours; None: pass over it). `formats` lists the formats.
        learn: which assistant turns are learned: all that are not marked otherwise, the last, or those marked.
        split: of a hub id or of a `DatasetDict`.
        answers: each row must have an assistant turn.

    Raises UserError for a missing or empty source, if no record can be read and, unless dropped, for a bad record,
    naming file and line.
    """
    read = {"columns": columns, "answers": answers, "learn": learn}
    source = one_split(source, split)
    if not isinstance(source, str | Path):
        if source and all(isinstance(part, str | Path) for part in source):
            parts = [load_rows(p, limit=limit, on_bad=on_bad, split=split, **read) for p in source]  # type: ignore[arg-type]
            return _join(parts)
        digest = hashlib.sha256(json.dumps(list(source), sort_keys=True, default=str).encode()).hexdigest()
        return _read(((f"row {i}", r) for i, r in enumerate(source)), "rows", digest, limit, on_bad, read)
    path = Path(source)
    if path.suffix.lower() in FILE_SUFFIXES or path.exists():
        if not path.exists():
            raise UserError(f"{path}: no such file; expected training rows (.jsonl, .json, .csv, .parquet) or a hub id")
        digest = ""
        if not path.is_dir():
            check_beginning(path)
            digest = file_sha256(path)
        return _read(read_file(path), str(path), digest, limit, on_bad, read)
    dataset = _load_hub(str(source), split)
    digest = hashlib.sha256(str(getattr(dataset, "_fingerprint", source)).encode()).hexdigest()
    records = ((f"{source}[{i}]", r) for i, r in enumerate(dataset))
    return _read(records, str(source), digest, limit, on_bad, read)


@dataclass
class RowSource:
    """Rows that are not read yet. The arguments are those of `load_rows`.

    hashes: source -> sha256, once the rows or their files have been read.
    """

    sources: Sequence[str]
    limit: int | None = None
    on_bad: Literal["raise", "drop"] = "raise"
    columns: Mapping[str, str | None] | None = None
    learn: Literal["all", "last", "marked"] = "all"
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the files; 0 if a source is anything else."""
        files = [Path(source) for source in self.sources]
        return sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else 0

    def hash_files(self) -> None:
        """Fill in `hashes` without reading rows. All sources are files."""
        self.hashes = {source: file_sha256(source) for source in map(str, map(Path, self.sources))}

    def load(self) -> Rows:
        """Raises UserError as `load_rows` does."""
        rows = load_rows(
            list(self.sources), limit=self.limit, on_bad=self.on_bad, columns=self.columns, learn=self.learn
        )
        self.hashes = rows.hashes
        return rows


def one_split(source: Any, split: str = "train") -> Any:
    """The split of a `DatasetDict`, or its only one; anything else as it is. Raises UserError naming its splits."""
    if not isinstance(source, Mapping):
        return source
    if split not in source and len(source) != 1:
        found = ", ".join(map(str, source)) or "none"
        raise UserError(
            f"training rows: found a DatasetDict with the splits {found}, expected {split}; pass one of them"
        )
    return source[split] if split in source else next(iter(source.values()))


def _read(
    records: Iterable[tuple[str, Any]],
    source: str,
    sha256: str,
    limit: int | None,
    on_bad: str,
    options: Mapping[str, Any],
) -> Rows:
    rows: list[Row] = []
    dropped: list[Dropped] = []
    unread: Counter[str] = Counter()
    for origin, record in islice(records, limit):
        if isinstance(record, Row):
            rows.append(record)
            continue
        try:
            if isinstance(record, BadRow):
                raise record
            found = to_conversation(record, **options)
            rows.append(Row(found.messages, origin, tools=found.tools, domain=found.domain))
            unread.update(found.unread)
        except BadRow as problem:
            if on_bad == "raise":
                raise UserError(f"{origin}: {problem}") from None
            dropped.append(Dropped(origin, str(problem)))
    if not rows:
        if not dropped:
            raise UserError(f"{source}: found no rows, expected at least one conversation")
        raise UserError(
            f"{source}: found {len(dropped)} bad rows, expected at least one conversation\n{reasons(dropped)}"
        )
    return Rows(rows, dropped, {source: sha256}, dict(unread))


def reasons(dropped: Sequence[Dropped], shown: int = _REASONS) -> str:
    """The commonest reasons, one a line: where first, why, and how often."""
    first: dict[str, str] = {}
    for one in dropped:
        first.setdefault(one.reason, one.origin)
    counts = Counter(one.reason for one in dropped)
    lines = [
        f"  {first[reason]}: {reason}" + (f" (and {count - 1} more)" if count > 1 else "")
        for reason, count in counts.most_common(shown)
    ]
    if len(counts) > shown:
        lines.append(f"  ... and {len(counts) - shown} other reasons")
    return "\n".join(lines)


def _join(parts: Sequence[Rows]) -> Rows:
    unread: Counter[str] = Counter()
    for part in parts:
        unread.update(part.unread)
    return Rows(
        [row for part in parts for row in part],
        [d for part in parts for d in part.dropped],
        {source: sha256 for part in parts for source, sha256 in part.hashes.items()},
        dict(unread),
    )


def _load_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise UserError(f"{name}: cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from None
