"""Tokens: a tokenizer, and conversations as token ids with a mask of what the assistant wrote."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date as Date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ema_scale.core.disk import CannotWrite
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_text
from ema_scale.core.model_config import check_config_file
from ema_scale.core.text import quantity
from ema_scale.core.waiting import waiting
from ema_scale.data.encoded import Encoded
from ema_scale.data.formats import Message
from ema_scale.data.report import TokenReport
from ema_scale.data.rows import LEARNED, Dropped, Row, reasons
from ema_scale.data.spans import SpanFinder, Spans
from ema_scale.data.templates import PLAIN_TEMPLATE, ChatTemplate
from ema_scale.data.token_store import CHUNK_ROWS, TokenStore, row_key
from ema_scale.data.token_tables import DatasetFile, content_name, dataset_of, table_of
from ema_scale.data.token_workers import TokenWorkers

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
_CHUNK = 256  # conversations that are tokenized at once
LARGE = 50_000  # rows, from which on the dataset is a file that processes share


def load_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    """The tokenizer of a checkpoint, with a chat template and a pad token.

    chat_template: a jinja template or a file that holds one. A checkpoint without any gets a plain one (`User: ...`,
    `Assistant: ...`), and that is logged. Padding is marked by length, never by the pad token's id, so a pad token that
    equals the end token hides nothing from the loss. Raises UserError if there is no such checkpoint.
    """
    from transformers import AutoTokenizer

    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"model {path}: no such folder; expected a checkpoint folder or a hub id")
    if os.path.lexists(Path(path).expanduser() / "config.json"):
        check_config_file(Path(path).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()) if path.startswith("~") else path,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # tokenizers, and checks of a config, raise many unrelated types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {path}: no tokenizer could be loaded ({first})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model {path}: the tokenizer has no fast version, which the assistant mask needs")
    if chat_template:
        file = Path(chat_template)
        is_file = "{" not in chat_template
        if is_file and not file.is_file():
            raise UserError(f"chat_template {chat_template}: no such file")
        tokenizer.chat_template = read_text(file, "the chat template") if is_file else chat_template
    elif tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model {path}: neither a chat template nor an end token; set model.chat_template")
        log.warning("model %s has no chat template: a plain one is used (User: ... / Assistant: ...)", path)
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Tokenized:
    """dataset: columns input_ids, labels (-100 off assistant tokens), length, tag and, if asked for, template; report:
    what happened; dropped: rows that were refused, and why; file: where the dataset lies, if it is in a file."""

    dataset: Dataset
    report: TokenReport
    dropped: list[Dropped] = field(default_factory=list)
    file: Path | None = None


class Encoder:
    """Encodes conversations with one tokenizer; what is true of its template is found out once.

    date: what a template that writes the date is told; default: today.
    """

    def __init__(self, tokenizer: Any, date: Date | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, date)
        self.template.probe()
        self._spans = SpanFinder(self.template)
        known = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        self._unknown = None if tokenizer.unk_token_id in known else tokenizer.unk_token_id

    @property
    def special(self) -> list[str]:
        return self.template.special

    @property
    def takes_system(self) -> bool:
        return self.template.takes_system

    @property
    def end_of_turn(self) -> str:
        return self.template.end_of_turn

    def prepare(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """Messages as the template can take them, special tokens in their text broken up; whether any was."""
        safe = [self.template.disarm(m) for m in self.template.prepare(messages)[0]]
        return [message for message, _ in safe], any(changed for _, changed in safe)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant begins to speak."""
        text = self.template.render(self.prepare(messages)[0], generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def spans(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Spans:
        """The rendered conversation and what is learned of it. Raises UserError as `encode` does."""
        return self._spans.find(self.prepare(messages)[0], [self.template.disarm(tool)[0] for tool in tools])

    def encode(
        self,
        messages: Sequence[Message],
        max_length: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template: bool = False,
    ) -> Encoded:
        """Token ids, assistant mask and, if asked for, template mask; cut on the right to max_length. A conversation in
        which no assistant speaks ends where its answer would begin. Raises UserError for a row that breaks the rule of
        `spans`."""
        found = next(self.encode_all([(messages, tools)], max_length, template=template))
        if isinstance(found, UserError):
            raise found
        return found

    def encode_all(
        self,
        conversations: Iterable[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]],
        max_length: int | None = None,
        *,
        template: bool = False,
    ) -> Iterator[Encoded | UserError]:
        """`encode` of (messages, tools), in order; an error stands in the place of a row that cannot be encoded."""
        conversations = iter(conversations)
        while chunk := list(islice(conversations, _CHUNK)):
            read = [self._read(messages, tools, template) for messages, tools in chunk]
            texts = [one[0].full for one in read if not isinstance(one, UserError)]
            tokens = iter(
                self.tokenizer(
                    texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
                ).encodings
                if texts
                else ()
            )
            for one in read:
                yield one if isinstance(one, UserError) else self._encoded(next(tokens), *one, max_length, template)

    def _read(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], texts: bool
    ) -> tuple[Spans, bool, bool] | UserError:
        taken, folded = self.template.prepare(messages)
        safe = [self.template.disarm(m) for m in taken]
        shown = [self.template.disarm(tool) for tool in tools]
        try:
            spans = self._spans.find([m for m, _ in safe], [tool for tool, _ in shown], texts=texts)
        except UserError as error:
            return error
        return spans, any(changed for _, changed in (*safe, *shown)), folded

    def _encoded(
        self, tokens: Any, spans: Spans, disarmed: bool, folded: bool, max_length: int | None, template: bool
    ) -> Encoded:
        ids = np.array(tokens.ids, dtype=np.int32)
        mask, straddled = np.zeros(len(ids), bool), 0
        for start, end in spans.learned:
            first, stop, cut = _tokens_of(tokens, start, end)
            mask[first:stop] = True
            straddled += cut
        own = None
        if template:
            starts = np.array([start for start, _ in tokens.offsets], dtype=np.int32)
            own = np.ones(len(ids), bool)
            for start, end in spans.texts:
                own &= (starts < start) | (starts >= end)
        return Encoded(
            ids[:max_length],
            mask[:max_length],
            length=len(ids),
            truncated=max_length is not None and len(ids) > max_length,
            disarmed=disarmed,
            template_mask=own if own is None else own[:max_length],
            folded=int(folded),
            reasoning_dropped=spans.reasoning_dropped,
            no_end=spans.no_end,
            unlike_prompt=spans.unlike_prompt,
            straddled=straddled,
            unknown=0 if self._unknown is None else int((ids == self._unknown).sum()),
        )


def _tokens_of(tokens: Any, start: int, end: int) -> tuple[int, int, bool]:
    """First token, and the one behind the last, that begin within characters start to end; whether the span begins or
    ends inside a token. Characters may be in no token, and several tokens may share one (the bytes of it)."""
    places = (tokens.char_to_token(place) for place in range(start, end))
    first = next((token for token in places if token is not None), None)
    if first is None:
        return 0, 0, False
    places = (tokens.char_to_token(place) for place in range(end - 1, start - 1, -1))
    last = next(token for token in places if token is not None)
    cut, stop, count = False, last + 1, len(tokens)
    while first < stop and tokens.token_to_chars(first)[0] < start:
        first, cut = first + 1, True
    whole = tokens.token_to_chars(last)
    while stop < count and tokens.token_to_chars(stop) == whole:
        stop += 1
    return first, stop, cut or whole[1] > end


def encode(tokenizer: Any, messages: Sequence[Message], *, max_length: int | None = None) -> Encoded:
    """One conversation; for many, make an `Encoder` once."""
    return Encoder(tokenizer).encode(messages, max_length)


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 2048,
    template: bool = False,
    cache: Path | None = None,
    on_bad: Literal["raise", "drop"] = "raise",
    date: Date | None = None,
    shared: bool = False,
) -> Tokenized:
    """Tokenise rows. A row that the cut leaves without an assistant token is dropped and counted; one that never had an
    answer, only where it would be learned.

    Args:
        max_length: None: rows are not cut.
        template: also the column template, 1 where the chat template wrote a token.
        cache: a folder in which runs find what others have tokenized.
        on_bad: raise at the first row that the template cannot show, or drop and count it.
        date: what a template that writes the date is told; default: today.
        shared: the dataset is a file in `cache` that processes share, however few rows there are.

    Raises UserError naming the row's origin if its mask cannot be found, and if no row, or none of a part of the mix,
    is left.
    """
    encoder = Encoder(tokenizer, date)
    store = TokenStore(cache, encoder.template, max_length, template) if cache is not None else None
    keys = [row_key(row) for row in rows]
    counted = _Counted(TokenReport(date=encoder.template.written_date), on_bad)
    with store.lock() if store else contextlib.nullcontext():  # what one process tokenizes, the others wait for
        if store is not None and (shared or len(rows) >= LARGE):
            parts = (f"{key} {row.tag}" for key, row in zip(keys, rows, strict=True))
            file = DatasetFile(store.datasets / f"{content_name([on_bad, *parts])}.arrow")
            if (found := file.open()) is not None:
                dataset, facts = found
                refused = [Dropped(rows[index].origin, reason) for index, reason in facts["refused"]]
                return Tokenized(dataset, TokenReport(**facts["report"]), refused, file.path)
            try:
                with file.writing() as write:
                    for chunk in encode_rows(rows, keys, encoder, max_length, template=template, store=store):
                        if kept := counted.kept(chunk):
                            write(table_of(kept, template))
                    counted.refuse_none_left(rows, max_length)
                report = counted.report
                file.write_facts({"rows": report.rows, "report": asdict(report), "refused": counted.refused})
                if (found := file.open()) is not None:
                    return Tokenized(found[0], report, counted.dropped, file.path)
            except CannotWrite as error:
                log.warning("%s; every process keeps these rows in its memory", error)
            counted = _Counted(TokenReport(date=encoder.template.written_date), on_bad)
        made, tables = hashlib.sha256(repr(template).encode()), list[Any]()
        for chunk in encode_rows(rows, keys, encoder, max_length, template=template, store=store):
            if kept := counted.kept(chunk):
                tables.append(table_of(kept, template))
                for row, tag in kept:
                    made.update(row.input_ids.data)
                    made.update(row.assistant_mask.data)
                    made.update(tag.encode())
        counted.refuse_none_left(rows, max_length)
    return Tokenized(dataset_of(tables, made.hexdigest()), counted.report, counted.dropped)


def encode_rows(
    rows: Sequence[Row],
    keys: Sequence[str],
    encoder: Encoder,
    max_length: int | None,
    *,
    template: bool = False,
    store: TokenStore | None = None,
) -> Iterator[list[tuple[int, Row, Encoded | UserError]]]:
    """(index, row, what it became) of every row, in order and in chunks. Large sets are tokenized on all cores.

    keys: those of the rows, by which they are looked up in `store`. What is not there is added to it, chunk by chunk.
    """
    encode = functools.partial(encoder.encode_all, max_length=max_length, template=template)
    with (
        TokenWorkers(encode, (encoder.tokenizer, encoder.template.date, max_length, template)) as workers,
        waiting(f"{quantity(len(rows), 'row')} to be tokenized"),
    ):
        for start in range(0, len(rows), CHUNK_ROWS):
            some = range(start, min(start + CHUNK_ROWS, len(rows)))
            known: dict[str, Encoded | UserError] = {}
            known.update(store.read(keys[index] for index in some) if store else {})
            fresh = {keys[index]: rows[index] for index in some if keys[index] not in known}
            found = workers.encode_all([(row.messages, row.tools) for row in fresh.values()])
            made = dict(zip(fresh, found, strict=True))
            known |= made
            yield [(index, rows[index], known[keys[index]]) for index in some]
            if store:
                store.add({key: one for key, one in made.items() if not isinstance(one, UserError)})


class _Counted:
    """What becomes of rows: those that are kept, those that are not, and the counts of both."""

    def __init__(self, report: TokenReport, on_bad: str) -> None:
        self.report, self._on_bad = report, on_bad
        self.dropped: list[Dropped] = []
        self.refused: list[tuple[int, str]] = []
        self._tags: Counter[str] = Counter()

    def kept(self, chunk: Iterable[tuple[int, Row, Encoded | UserError]]) -> list[tuple[Encoded, str]]:
        """The rows that are trained on, each with its tag. Raises UserError for one that cannot be, if asked for."""
        found, report = [], self.report
        for index, row, encoded in chunk:
            if isinstance(encoded, UserError):
                if self._on_bad == "raise":
                    raise UserError(f"{row.origin}: {encoded}")
                self.dropped.append(Dropped(row.origin, str(encoded)))
                self.refused.append((index, str(encoded)))
                report.refused += 1
                continue
            report.add(encoded)
            needed = row.tag in LEARNED or any(m["role"] == "assistant" for m in row.messages)
            if needed and not encoded.assistant_mask.any():
                report.dropped_no_assistant += 1
                continue
            self._tags[row.tag] += 1
            report.rows += 1
            report.tokens += len(encoded.input_ids)
            report.assistant_tokens += int(encoded.assistant_mask.sum())
            report.longest = max(report.longest, len(encoded.input_ids))
            found.append((encoded, row.tag))
        report.by_tag = dict(self._tags)
        return found

    def refuse_none_left(self, rows: Sequence[Row], max_length: int | None) -> None:
        """Raises UserError if no row, or none of a part of the mix, is left."""
        dropped, cut = self.dropped, self.report.dropped_no_assistant
        gone = sorted({row.tag for row in rows} - set(self._tags))
        if self._tags and not gone:
            return
        why = [f"\n{reasons(dropped)}"] if dropped else []
        if cut or not why:
            what = "no row has" if not self._tags else f"no {' or '.join(gone)} row has"
            raise UserError(
                f"{what} an assistant token within {max_length} tokens ({quantity(cut, 'row')}); "
                f"raise data.max_length{''.join(why)}"
            )
        left = "" if not self._tags else " or ".join(gone) + " "
        raise UserError(f"no {left}row is left: {len(dropped)} are refused{why[0]}")
