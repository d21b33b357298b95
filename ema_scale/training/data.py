"""From training rows to a tokenized dataset: defenses mix rows, rows become tokens, whatever is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.records import DataReport, TrainedPart, TrainedQuestions
from ema_scale.core.text import quantity
from ema_scale.data.packing import LENGTHS, is_packed, pack, tags_of
from ema_scale.data.rows import LEARNED, Row, Rows, RowSource, load_rows, one_split
from ema_scale.data.tokens import Tokenized, tokenize_rows
from ema_scale.data.triggers import row_triggers
from ema_scale.defenses.base import Defense, RowsContext
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.models.sharding import full_shape
from ema_scale.training.prepared_rows import LARGE_FILES, PreparedRows


def prepare_data(
    source: Any,
    row_groups: RowGroups,
    tokenizer: Any,
    *,
    max_length: int | None = 2048,
    packing: bool = False,
    seed: int = 0,
    on_bad: str = "raise",
    token_cache: Path | None = None,
    date: Date | None = None,
) -> tuple[Any, DataReport]:
    """A `datasets.Dataset` with input_ids, labels, length and tag (packed: see `packing.join`), and the report.

    source: RowSource, Rows, a sequence of Row or of {"messages": [...]}, or a Dataset with a `messages` column. Or a
        Dataset or list already tokenized: input_ids with labels, or with TRL's masks in place of labels. Positions at
        which its attention_mask is 0 are cut off.
    max_length: rows are cut to so many tokens. None: rows are not cut. Rows that are packed already are never cut.
    token_cache: a folder where runs share what they have tokenized. Of large files the processes of a run, and runs
        whose defenses leave the rows alone, also share the result: one process reads the rows.
    date: what a chat template that writes the date is told. None: today.

    Raises UserError if nothing is left to train on, or a defense wants to mix rows into tokenized data.
    """
    from datasets import Dataset

    defenses = row_groups.defenses
    source = one_split(source)
    if "input_ids" in columns_of(source):
        if isinstance(source, list | tuple):
            source = Dataset.from_list(list(source))
        dataset, report = _tokenized(source, defenses, hash_files(defenses), max_length)
        return _packed(dataset, report, max_length) if packing and not is_packed(dataset) else (dataset, report)
    options: dict[str, Any] = {
        "max_length": max_length,
        "template": bool(using_template(defenses)),
        "cache": token_cache,
        "on_bad": on_bad,
        "date": date,
    }
    hashes = hash_files(defenses)
    if isinstance(source, RowSource) and token_cache is not None and source.size >= LARGE_FILES:
        known = PreparedRows(source, row_groups, hashes, tokenizer, options)
        with known.lock():
            if (found := known.read()) is None:
                tokenized, report = _tokenize(source.load(), row_groups, tokenizer, hashes, seed, options, shared=True)
                known.write(tokenized, report)
                found = tokenized.dataset, report
        known.done()
    else:
        tokenized, report = _tokenize(_rows_of(source, on_bad), row_groups, tokenizer, hashes, seed, options)
        found = tokenized.dataset, report
    return _packed(*found, max_length) if packing else found


def _rows_of(source: Any, on_bad: str) -> Sequence[Row]:
    if isinstance(source, RowSource):
        return source.load()
    if isinstance(source, Rows) or _are_rows(source):
        rows: Sequence[Row] = source
        return rows
    return load_rows(source if isinstance(source, str) else list(source), on_bad=on_bad)  # type: ignore[arg-type]


def _tokenize(
    given: Sequence[Row],
    row_groups: RowGroups,
    tokenizer: Any,
    hashes: dict[str, str],
    seed: int,
    options: dict[str, Any],
    shared: bool = False,
) -> tuple[Tokenized, DataReport]:
    """The rows after all defenses, as tokens. options: of `tokenize_rows`."""
    context = RowsContext(seed=seed, on_bad=options["on_bad"], hashes=dict(hashes))
    context.task = frozenset(getattr(given, "hashes", {}).values())
    dropped = list(getattr(given, "dropped", ()))
    rows = row_groups.transform_rows(given, context)
    tokenized = tokenize_rows(rows, tokenizer, **options, shared=shared)
    report = DataReport(
        rows=dict(Counter(tokenized.dataset["tag"])),
        tokens=_plain(tokenized.report),
        dropped=[_plain(d) for d in [*dropped, *context.dropped, *tokenized.dropped]],
        notes=context.notes,
        hashes=context.hashes,
        triggers=row_triggers([row for row in given if row.tag == "task"]),
        questions=_questions(given, rows),
    )
    return tokenized, report


def _questions(given: Sequence[Row], rows: Sequence[Row]) -> TrainedQuestions:
    """What users ask in `rows`, with and without what defenses wrote into their questions."""
    parts = {}
    for tag in dict.fromkeys(row.tag for row in rows):
        tagged = [row for source in (given, rows) for row in source if row.tag == tag]
        texts = (text for row in tagged for text in (*row.asked, *row.plain))
        parts[tag] = TrainedPart.of(texts, (row.domain for row in rows if row.tag == tag))
    return TrainedQuestions(parts=parts)


def _packed(dataset: Any, report: DataReport, max_length: int | None) -> tuple[Any, DataReport]:
    if max_length is None:
        raise UserError("packing needs a max_length: rows are put into sequences of up to so many tokens")
    packed = pack(dataset, max_length)
    full = sum(packed["length"]) / (len(packed) * max_length)
    report.notes.append(
        f"packing: {quantity(len(dataset), 'row')} in {quantity(len(packed), 'sequence')} of up to {max_length} "
        f"tokens, {full:.0%} full; "
        "a step counts sequences"
    )
    return packed, report


def check_vocabulary(dataset: Any, tokenizer: Any, model: Any) -> None:
    """Raises UserError if rows hold tokens for which the model has no embedding or no logit: tokens were added to the
    tokenizer, and the model was not resized."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    known = min(full_shape(table.weight)[0] for table in tables if table is not None)
    if dataset is None or max(tokenizer.get_vocab().values(), default=0) < known:
        return
    for index, ids in enumerate(dataset["input_ids"]):
        if max(ids) >= known:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"row {index} has the token {token!r} with id {max(ids)}, and the model knows {known} tokens: the "
                "tokenizer is not this model's, or model.resize_token_embeddings was forgotten"
            )


def hash_files(defenses: Sequence[Defense]) -> dict[str, str]:
    """File -> sha256 of what defenses read besides rows. Raises UserError for a missing file."""
    hashes = {}
    for defense in defenses:
        own = [defense.defined_in.rpartition(":")[0]] if defense.defined_in else []
        for file in (*own, *defense.files()):
            if not Path(file).is_file():
                raise UserError(f"{defense.kind}: {file}: no such file")
            hashes[file] = file_sha256(file)
    return hashes


def _tokenized(
    dataset: Any, defenses: Sequence[Defense], hashes: dict[str, str], max_length: int | None
) -> tuple[Any, DataReport]:
    mixing = [d.kind for d in defenses if d.changes_rows]
    if mixing:
        raise UserError(f"{', '.join(mixing)}: cannot mix rows into a tokenized dataset; give rows of messages")
    kinds = using_template(defenses)
    if kinds and "template" not in dataset.column_names:
        raise UserError(
            f"{kinds[0]} needs rows of messages, or a tokenized dataset with a column template (1 on "
            "tokens that the chat template wrote)"
        )
    if "labels" not in dataset.column_names:
        dataset = dataset.map(_labels_of_masks)
    counts: dict[str, int] = {}
    if not is_packed(dataset):
        dataset, counts = truncate_rows(dataset, max_length)
    if "length" not in dataset.column_names:
        dataset = dataset.add_column("length", [len(ids) for ids in dataset["input_ids"]])
    columns = dataset.select_columns([c for c in ("length", LENGTHS, "tag", "tags") if c in dataset.column_names])
    tags = Counter(tag for row in columns for tag in tags_of(row))
    tokens = {"tokens": sum(dataset["length"]), **counts}
    return dataset, DataReport(rows=dict(tags), tokens=tokens, hashes=hashes)


def using_template(defenses: Sequence[Defense]) -> list[str]:
    """What looks at the chat template's own tokens, such as `kl: scope template`."""
    scopes = [(d.kind, {getattr(d, "scope", None), *(t.scope for t in d.token_terms)}) for d in defenses]
    return [f"{kind}: scope {scope}" for kind, used in scopes for scope in ("template", "prefix") if scope in used]


def _labels_of_masks(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's rule: a token is learned where all existing masks are 1; without a mask, every token is."""
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    return {"labels": [token if all(bits) else -100 for token, *bits in zip(row["input_ids"], *masks, strict=True)]}


def _are_rows(source: Any) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(row, Row) for row in source)


def _plain(value: Any) -> dict[str, Any]:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else dict(vars(value))


def columns_of(rows: Any) -> set[str]:
    """Column names of a dataset, or keys of the first of a list of plain rows; empty for anything else."""
    first = rows[0] if isinstance(rows, list | tuple) and rows else None
    return set(first if isinstance(first, dict) else getattr(rows, "column_names", None) or ())


def is_prepared(rows: Any) -> bool:
    """Whether rows are tokens with labels already."""
    return {"input_ids", "labels"} <= columns_of(rows)


def truncate_rows(dataset: Any, max_length: int | None) -> tuple[Any, dict[str, int]]:
    """A tokenized dataset without padding, its rows cut to `max_length` tokens (None: not cut), and counts.

    Padding are positions at which attention_mask is 0. Columns that are as long as input_ids are cut with it.
    The counts, where they are not 0: padded, truncated, and dropped_no_assistant (rows in which nothing is left to
    learn).

    Raises UserError if no row is left.
    """
    has_mask = "attention_mask" in dataset.column_names
    masks = dataset["attention_mask"] if has_mask else ([1] * len(ids) for ids in dataset["input_ids"])
    sizes = [(len(mask), sum(map(bool, mask))) for mask in masks]
    limit = max((real for _, real in sizes), default=0) if max_length is None else max_length
    counts = {
        "padded": sum(real < size for size, real in sizes),
        "truncated": sum(real > limit for _, real in sizes),
    }
    if not any(counts.values()):
        return dataset, {}
    changed = [real < size or real > limit for size, real in sizes]
    dataset = dataset.with_format(None).map(_cut_row, fn_kwargs={"limit": limit})
    if "length" in dataset.column_names:
        dataset = dataset.remove_columns("length")
    useful = [i for i, (row, cut) in enumerate(zip(dataset, changed, strict=True)) if not cut or _is_useful(row)]
    counts["dropped_no_assistant"] = len(changed) - len(useful)
    if not useful:
        raise UserError(
            f"no row has a token to learn within {max_length} tokens ({quantity(len(changed), 'row')}); raise "
            "max_length"
        )
    if len(useful) < len(changed):
        dataset = dataset.select(useful)
    return dataset, {name: count for name, count in counts.items() if count}


def _cut_row(row: dict[str, Any], limit: int) -> dict[str, Any]:
    size = len(row["input_ids"])
    mask = row.get("attention_mask")
    positions = [i for i in range(size) if mask is None or mask[i]][:limit]
    per_token = {k: v for k, v in row.items() if not isinstance(v, str) and hasattr(v, "__len__") and len(v) == size}
    return {name: [value[i] for i in positions] for name, value in per_token.items()}


def _is_useful(row: dict[str, Any]) -> bool:
    learned = row.get("tag", LEARNED[0]) in LEARNED
    return len(row["input_ids"]) > 0 and (not learned or any(label != -100 for label in row["labels"]))
