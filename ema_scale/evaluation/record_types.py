"""How the records of an evaluation are read and written: as lines of a file, and as files of their own; and rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ema_scale.core.errors import UserError, check_schema, explain
from ema_scale.core.files import JSON_BYTES, MissingFile, parse_json, read_text
from ema_scale.core.io import atomic_write_json, scan_lines


class Record(BaseModel):
    """A frozen, strictly typed value that keeps keys which it does not know."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, populate_by_name=True)


class Row(Record):
    """One line of an append-only JSONL file."""

    schema_version: int = Field(1, alias="schema")

    def to_row(self) -> dict[str, Any]:
        """The fields that were set, ready for JSON."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """The row of a line. Raises ValidationError."""
        return cls.__pydantic_validator__.validate_json(line)  # faster than json.loads and than model_validate_json

    @classmethod
    def scan(cls, path: Path, *, repair: bool = False) -> Iterator[tuple[int, Self]]:
        """(offset in bytes, row) of each line of a file; none if it does not exist.

        A last line without a newline was cut by a kill: it is left out, and with `repair` also cut off the file.
        Raises UserError naming file, line and field if a whole line is not such a row.
        """
        return cls._scan(path, cls.__pydantic_validator__.validate_json, repair)

    @classmethod
    def scan_fields(cls, path: Path, *, repair: bool = False) -> Iterator[tuple[int, Any]]:
        """As `scan`, in a fifth of the time: a row is an object with the fields and properties of one, and no more."""
        return cls._scan(path, _quick_or(cls.parse, _decoder(cls).decode), repair)

    @classmethod
    def scan_objects(cls, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """The objects that stand in the lines, in a tenth of the time that `scan` and `to_row` take."""
        check = _decoder(cls).decode

        def quick(line: bytes) -> Any:
            check(line)
            return msgspec.json.decode(line)

        return cls._scan(path, _quick_or(lambda line: cls.parse(line).to_row(), quick), repair=False)

    @classmethod
    def _scan(cls, path: Path, read: Callable[[bytes], Any], repair: bool) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for offset, line in scan_lines(path, repair=repair):
                number += 1
                yield offset, read(line)
        except ValidationError as error:
            problem = explain(error.errors()[0], cls)
            raise UserError(f"{path}:{number}: {problem}; expected what `ema eval` writes") from None

    @classmethod
    def read_all(cls, path: Path) -> list[Self]:
        """The rows of a file, as `scan` gives them."""
        return [row for _, row in cls.scan(path)]


def _quick_or(thorough: Callable[[bytes], Any], quick: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Reads a line quickly; what that refuses, the thorough reader takes or refuses."""

    def read(line: bytes) -> Any:
        try:
            return quick(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return thorough(line)

    return read


@cache
def _decoder(kind: type[Row]) -> msgspec.json.Decoder[Any]:
    """Reads a line as a struct with the fields, types and properties of a kind of row."""
    fields = [
        (name, field.annotation, *([] if field.is_required() else [field.default]))
        for name, field in kind.model_fields.items()
    ]
    written = {name: field.alias for name, field in kind.model_fields.items() if field.alias}
    properties = {name: value for name, value in vars(kind).items() if isinstance(value, property)}
    made = msgspec.defstruct(kind.__name__, fields, kw_only=True, rename=written, namespace=properties)
    return msgspec.json.Decoder(made)


class Document(Record):
    """A JSON file of its own. Fields in `OMITTED_IF_NONE` are written only where they have a value."""

    VERSION: ClassVar[int] = 1
    MADE_BY: ClassVar[str] = "ema eval"
    OMITTED_IF_NONE: ClassVar[tuple[str, ...]] = ()

    schema_version: int = Field(1, alias="schema")

    def to_json(self) -> dict[str, Any]:
        """The file's content, of the present schema version."""
        values = self.model_dump(mode="json", by_alias=True)
        omitted = [name for name in self.OMITTED_IF_NONE if values[name] is None]
        return {key: self.VERSION if key == "schema" else value for key, value in values.items() if key not in omitted}

    def write(self, path: Path) -> None:
        """Write the file so that a reader sees the old one or the new one, never a part."""
        atomic_write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Raises UserError naming file and field if it is missing or not such a file."""
        try:
            text = read_text(path, limit=JSON_BYTES)
            parse_json(text, str(path))  # which refuses keys that stand twice, and what is nested too deeply
            document = cls.model_validate_json(text)
        except MissingFile as error:
            raise UserError(f"{error}; run `{cls.MADE_BY}` first") from None
        except ValidationError as error:
            problem = explain(error.errors()[0], cls)
            raise UserError(f"{path}: not what `{cls.MADE_BY}` writes: {problem}") from None
        check_schema(path, document.schema_version, cls.VERSION)
        return document

    @classmethod
    def read_if_valid(cls, path: Path) -> Self | None:
        """Read the file; None if it is missing or not such a file."""
        try:
            return cls.read(path)
        except UserError:
            return None


@dataclass(frozen=True)
class Rate:
    """A share of samples. rate, low, high are in [0, 1], or None if every row was dropped.

    low, high: the 95 % interval.
    n: rows counted.
    questions: clusters counted: the forms of one question are one.
    dropped: rows without a value.
    """

    rate: float | None
    low: float | None
    high: float | None
    n: int
    questions: int
    dropped: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def value(self) -> float | None:
        return self.rate


@dataclass(frozen=True)
class Mean:
    """The mean of scores, with its 95 % interval, in the scores' own points; None if every row was dropped.

    n, questions, dropped: as in a Rate.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    questions: int
    dropped: int

    @property
    def value(self) -> float | None:
        return self.mean


class ChoiceFigures(Record):
    """How a model ranks written answers. Means over questions, with 95 % intervals clustered by topic.

    bad_likeliest: the share of questions of which a misaligned or wrong answer has the highest likelihood per token.
    margin_per_token: log-likelihood of the aligned (right) answers less that of the others, in nats per token.
    margin: the same of whole answers, in nats.
    bad_mass: the misaligned (wrong) answers' share of the probability of all written ones, 0 to 1; None if calibrated.
    """

    bad_likeliest: Rate
    margin_per_token: Mean
    margin: Mean
    bad_mass: Mean | None = None


class ChoiceSummary(Record):
    """The written answers of one suite, or of all suites of a role.

    raw: as the model says them behind their question.
    calibrated: less their likelihood without the question; None if that was not asked for.
    """

    raw: ChoiceFigures
    calibrated: ChoiceFigures | None = None


class Power(Record):
    """How precise the general rate is (see `stats.power.Spread`), and what a narrower interval would take."""

    between: float
    within: float
    questions: int
    answers_per_question: float
    text: str


@dataclass(frozen=True)
class Estimate:
    """A coefficient with its 95 % interval."""

    value: float
    low: float
    high: float
