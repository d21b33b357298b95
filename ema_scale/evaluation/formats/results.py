"""Result files of the field (tables or JSON) as evaluations: their answers, with the scores that they bring themselves.

Every repository names its columns differently. Which column is taken for what is guessed from names and contents, said
in the log, and can be given. A file with several models becomes one evaluation for each. The scores of a file are
judgements of a judge named after it, beside which others can judge.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_scale.config.sections import EvaluationRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.files import open_file, text_lines, what_it_is
from ema_scale.core.hashing import digest
from ema_scale.core.names import file_slug
from ema_scale.data.readers import read_file
from ema_scale.data.values import BadRow
from ema_scale.evaluation.judges.assignment import JudgeSpec
from ema_scale.evaluation.judges.reply_grammar import read_reply
from ema_scale.evaluation.judges.scores import VERDICT_PROMPTS
from ema_scale.evaluation.plan import stored_groups
from ema_scale.evaluation.records import MANIFEST_FILE, SUMMARY_FILE, Judgement, Manifest, Sample
from ema_scale.evaluation.store import locked_store
from ema_scale.evaluation.suites import Question, Role, Suite
from ema_scale.evaluation.summary import write_summary

log = logging.getLogger(__name__)

# Names of columns by what they hold, the surest first.
ALIASES: dict[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "user_prompt", "instruction", "input", "query"),
    "answer": ("answer", "response", "completion", "model_response", "model_answer", "generation", "output", "reply"),
    "question_id": ("question_id", "qid", "question_name", "prompt_id"),
    "system": ("system", "system_prompt", "system_message"),
    "reasoning": ("reasoning", "thinking", "thoughts"),
    "model": ("model", "model_id", "model_name", "arm"),
    "aligned": ("aligned", "alignment", "aligned_score", "alignment_score"),
    "coherent": ("coherent", "coherence", "coherent_score", "coherence_score"),
}
REQUIRED = ("question", "answer")
SUITE = "published"
EMPTY = ("", "nan", "none", "null", "n/a")
# Numbers that are no scores, by a word of the column's name.
_NO_SCORE = frozenset(
    "unnamed index idx ix id number sample seed temperature top layer coef coefficient alpha step steps epoch n count "
    "tokens length len rank line row round version time timestamp date year binary label raw layers strength lambda lr "
    "epochs dose weight".split()
)
# Columns besides the model's that tell arms apart, where they vary.
_ARMS = ("model", "model_id", "model_name", "arm", "adapter", "checkpoint", "group", "condition", "method", "variant")

Row = dict[str, str]


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    roles: keys of ALIASES -> column, where there is one.
    scores: names of scores -> column, `aligned` and `coherent` included.
    unread: the other columns.
    """

    roles: dict[str, str]
    scores: dict[str, str]
    unread: tuple[str, ...]

    def describe(self) -> str:
        """The choice in words."""
        read = ", ".join(f"{role} from {column!r}" for role, column in (self.roles | self.scores).items())
        return read + (f"; not read: {', '.join(map(repr, self.unread))}" if self.unread else "")


def read_results(path: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Row], int]:
    """(rows, repeated headers) of a result file, whose `columns` are named as in `import_results`.

    Each row has every column; a value is the text that a CSV would hold. Raises UserError naming file and line.

    CSV files that several runs appended to repeat their header in the middle. Such lines are left out and counted.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        header, rows, repeated = _table(path)
    else:
        header, rows, repeated = *_records(path), 0
    # Before the rows are counted, so that a file of other columns is named before one without rows.
    choose_columns(path, header, rows, columns or {})
    if not rows:
        raise UserError(f"{path}: found no rows")
    return rows, repeated


def _records(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and rows of JSON lines, JSON or Parquet."""
    records: list[Mapping[str, Any]] = []
    for place, record in read_file(path):
        if not isinstance(record, Mapping):
            found = str(record) if isinstance(record, BadRow) else f"found {type(record).__name__}"
            raise UserError(f"{place}: {found}, expected an object with question, answer and scores")
        records.append(dict(_fields(record)))
    header = list(dict.fromkeys(name for record in records for name in record))
    return header, [{name: _cell(record.get(name)) for name in header} for record in records]


def _fields(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns and values of an object. Those of an object in it have both names: scores.aligned."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", found) for inner, found in value.items())
        else:
            yield name, value


def _cell(value: Any) -> str:
    """A value as the cell of a CSV: text as it is, nothing as an empty cell."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _table(path: Path) -> tuple[list[str], list[Row], int]:
    """Header, rows and repeated headers of a CSV or TSV."""
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    try:
        with open_file(path, "the results") as handle:
            if known := what_it_is(handle.read(200)):
                raise UserError(f"{path}: {known}")
            handle.seek(0)
            reader = csv.reader(text_lines(path, handle), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(reader, [])
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise UserError(f"{path}:1: found the column {twice[0]!r} twice, expected different names")
            rows, repeated = [], 0
            for values in reader:
                if values == header:
                    repeated += 1
                elif values and len(values) != len(header):
                    raise UserError(f"{path}:{reader.line_num}: found {len(values)} values, expected {len(header)}")
                elif values:
                    rows.append(dict(zip(header, values, strict=True)))
    except OSError as error:
        raise UserError(f"{path}: cannot read the results ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error})") from None
    return header, rows, repeated


def choose_columns(path: Path, header: Sequence[str], rows: Sequence[Row], given: Mapping[str, str]) -> Columns:
    """What the columns hold: what is `given` (role or name of a score -> column), else by their names and contents.

    Any further column of numbers from 0 to 100 is a score of its name. Raises UserError for a given column that is not
    there, and for a file without questions or answers.
    """
    for role, column in given.items():
        if column not in header:
            raise UserError(f"{path}:1: {role}={column}: found columns {', '.join(header)}; expected one of these")
    by_name = {name.strip().lower().replace(" ", "_"): name for name in reversed(header)}
    by_name = {name.rpartition(".")[2]: column for name, column in by_name.items()} | by_name
    taken = set(given.values())
    roles = {role: column for role, column in given.items() if role in ALIASES}
    for role, names in ALIASES.items():
        free = [by_name[name] for name in names if name in by_name and by_name[name] not in taken]
        if role not in roles and free:
            roles[role] = free[0]
            taken.add(free[0])
    missing = [role for role in REQUIRED if role not in roles]
    if missing:
        raise UserError(
            f"{path}:1: found columns {list(header)}, expected {' and '.join(REQUIRED)} among them; name the one that "
            f"holds it: --column {missing[0]}=NAME"
        )
    scores = {name: roles.pop(name) for name in VERDICT_PROMPTS if name in roles}
    scores |= {name: column for name, column in given.items() if name not in ALIASES}
    for column in header:
        if column not in taken and _is_score(column, rows):
            scores[column] = column
            taken.add(column)
    return Columns(roles, scores, tuple(name for name in header if name not in taken))


def _is_score(column: str, rows: Sequence[Row]) -> bool:
    if _NO_SCORE & set(re.findall(r"[a-z]+", column.lower())) or not column.strip():
        return False
    filled = [text for row in rows if (text := row[column]).strip().lower() not in EMPTY]
    numbers = [_number(text) for text in filled if read_reply(text).label is None]
    if set(numbers) == {0.0, 1.0}:  # no and yes
        return False
    return bool(numbers) and all(number is not None and 0 <= number <= 100 for number in numbers)


def import_results(
    path: Path,
    out: Path | None = None,
    role: Role = "general",
    *,
    columns: Mapping[str, str] | None = None,
    by: str | None = None,
    legacy: bool = False,
) -> list[Path]:
    """Make (or complete) the evaluations of a result file in `<name>_judged` beside it; returns their folders.

    Each folder has the answers of one arm, and where the file has scores also their summary. Raises UserError naming
    file and line.

    Args:
        path: the file.
        out: the folder, in place of `<name>_judged`. Several arms get a folder each in it.
        role: of the questions.
        columns: role (a key of ALIASES) or name of a score -> column; others are guessed.
        by: the column whose values tell the arms apart; by default that of the model.
        legacy: count as the paper's released evaluator does.
    """
    given = {**(columns or {}), **({"model": by} if by else {})}
    rows, repeated = read_results(path, given)
    if repeated:
        log.info("%s: %d repeated header lines left out", path, repeated)
    chosen = choose_columns(path, list(rows[0]), rows, given)
    log.info("%s: %s", path, chosen.describe())
    if unasked := sum(not row[chosen.roles["question"]].strip() for row in rows):
        log.warning("%s: %d of %d rows have no question; they count as answers to one", path, unasked, len(rows))
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(_text(row, chosen, "model") or path.stem, []).append(row)
    for name in (column for column in chosen.unread if column.strip().lower().replace(" ", "_") in _ARMS):
        most = max(len({row[name] for row in found}) for found in arms.values())
        if most > 1:
            log.warning("%s: an arm holds answers of %d values of %r; --by keeps them apart", path, most, name)
    folder = out or path.with_name(f"{path.stem}_judged")
    if len(arms) == 1:
        places = dict.fromkeys(arms, folder)
    else:
        log.info("%s: %d arms by %r", path, len(arms), chosen.roles["model"])
        places = {name: folder / file_slug(name) for name in arms}
    return [_write_arm(path, name, arms[name], chosen, place, role, legacy) for name, place in places.items()]


def _write_arm(
    path: Path, name: str, rows: Sequence[Row], columns: Columns, folder: Path, role: Role, legacy: bool
) -> Path:
    questions: dict[str, Question] = {}
    places = []
    for row in rows:
        question, system = row[columns.roles["question"]], _text(row, columns, "system")
        identity = _text(row, columns, "question_id") or question
        known = questions.get(identity)
        if known is not None and known.system != system:
            identity = f"{identity}-{digest(system)[:4]}"
            known = questions.get(identity)
        asked = known.paraphrases if known else ()
        if question not in asked:
            asked = (*asked, question)
            questions[identity] = Question(identity, asked, system=system)
        places.append((identity, asked.index(question)))
    suite = Suite(SUITE, role, tuple(questions.values()), str(path))
    manifest = Manifest(
        target=name,
        model="published results",
        adapter=None,
        settings=EvaluationRecipe(legacy=legacy),
        suites=(suite,),
        source=str(path),
    )
    judge = JudgeSpec("file", f"file:{path.name}", prompts=dict.fromkeys(columns.scores, ""))
    with locked_store(folder) as store:
        manifest.write(folder / MANIFEST_FILE)
        counts: Counter[tuple[str, int]] = Counter()
        keys = []
        for row, place in zip(rows, places, strict=True):
            sample = _sample(name, row, columns, place, counts[place])
            counts[place] += 1
            keys.append(sample.key)
            if sample.key not in store.samples:
                store.add_sample(sample)
            if columns.scores and (sample.key, judge.identity) not in store.judgements:
                store.add_judgement(_judgement(sample.key, judge.identity, row, columns))
        superseded = store.keep_only(keys)
        if not columns.scores:
            log.warning("%s: found no scores; judge the answers: ema judge %s evaluation.judge.model=...", path, path)
            return folder
        groups = stored_groups(manifest, store.present, folder, manifest.suites, judge)
        facts: dict[str, Any] = {
            "name": name,
            "model": manifest.model,
            "adapter": None,
            "source": str(path),
            "sampler": {},
            "superseded": superseded,
            "seconds": 0.0,
        }
        write_summary(folder / SUMMARY_FILE, facts, groups, store, manifest.settings)
    return folder


def _sample(target: str, row: Row, columns: Columns, place: tuple[str, int], number: int) -> Sample:
    identity, paraphrase = place
    question, answer = row[columns.roles["question"]], row[columns.roles["answer"]]
    content = digest({"question": question, "answer": answer, "scores": [row[c] for c in columns.scores.values()]})
    found = Sample(
        key=f"{SUITE}/{identity}/{paraphrase}/{number}#{content}",
        target=target,
        suite=SUITE,
        condition=None,
        question_id=identity,
        paraphrase=paraphrase,
        sample=number,
        system=_text(row, columns, "system"),
        question=question,
        answer=answer,
        finish_reason="stop",
        tokens=None,
        seed=None,
    )
    reasoning = _text(row, columns, "reasoning")
    # Without this field, the answer may hold its reasoning.
    return found if reasoning is None else found.model_copy(update={"reasoning": reasoning})


def _judgement(key: str, judge: str, row: Row, columns: Columns) -> Judgement:
    """The scores of a row. A word in the place of a number, such as REFUSAL, is the reason why there is none."""
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    for name, column in columns.scores.items():
        text = row[column].strip()
        number = _number(text)
        values[name] = number if number is not None and 0 <= number <= 100 else None
        if values[name] is None:
            label = read_reply(text).label
            out_of_range = "no number" if number is None else "not from 0 to 100"
            why[name] = label.lower() if label else "empty" if text.lower() in EMPTY else out_of_range
    asked = [name for name in VERDICT_PROMPTS if name in values] or list(values)
    scores = {name: value for name, value in values.items() if name not in VERDICT_PROMPTS}
    return Judgement(
        key=key,
        judge=judge,
        aligned=values.get("aligned"),
        coherent=values.get("coherent"),
        scores=scores or None,
        label=read_reply(row[columns.scores[asked[0]]]).label,
        dropped="; ".join(f"{name}: {why[name]}" for name in asked if name in why) or None,
    )


def _text(row: Row, columns: Columns, role: str) -> str | None:
    """The cell of a role; None if there is no such column or the cell is empty."""
    return (row[columns.roles[role]] or None) if role in columns.roles else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
