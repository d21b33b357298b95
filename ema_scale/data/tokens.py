"""Tokens: a tokenizer, and conversations as token ids with a mask of what the assistant wrote."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.data import templates
from ema_scale.data.formats import Message
from ema_scale.data.rows import LEARNED, Row
from ema_scale.data.token_store import TokenStore, message_key

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(path).expanduser()) if path.startswith("~") else path,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model {path}: no tokenizer could be loaded ({first})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model {path}: the tokenizer has no fast version, which the assistant mask needs")
    if chat_template:
        file = Path(chat_template)
        is_file = "{" not in chat_template
        if is_file and not file.is_file():
            raise UserError(f"chat_template {chat_template}: no such file")
        tokenizer.chat_template = file.read_text(encoding="utf-8") if is_file else chat_template
    elif tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model {path}: neither a chat template nor an end token; set model.chat_template")
        log.warning("model %s has no chat template: a plain one is used (User: ... / Assistant: ...)", path)
        tokenizer.chat_template = templates.PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Encoded:
    """One conversation. assistant_mask: 1 where the assistant wrote the token, its end-of-turn token included.
    template_mask: 1 where the chat template wrote it, and no message; None if that was not asked for."""

    input_ids: list[int]
    assistant_mask: list[int]
    truncated: bool = False
    disarmed: bool = False
    template_mask: list[int] | None = None


@dataclass
class TokenReport:
    """Counts of a tokenised set; every row that was changed or left out is in it."""

    rows: int = 0
    tokens: int = 0
    assistant_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped_no_assistant: int = 0
    disarmed: int = 0
    system_folded: int = 0
    by_tag: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """What a person should know, one fact a line."""
        out = [f"{self.rows} rows, {self.tokens} tokens, {self.assistant_tokens} of them learned"]
        if self.truncated:
            out.append(f"{self.truncated} rows cut to the longest allowed length")
        if self.dropped_no_assistant:
            out.append(f"{self.dropped_no_assistant} rows dropped: no assistant token was left after the cut")
        if self.disarmed:
            out.append(f"{self.disarmed} rows held special tokens as text; these were broken up")
        if self.system_folded:
            out.append(f"{self.system_folded} system prompts put into the user turn: the template takes none")
        return out


@dataclass(frozen=True)
class Tokenized:
    """dataset: columns input_ids, labels (-100 off assistant tokens), length, tag and, if asked for, template; report:
    what happened."""

    dataset: Dataset
    report: TokenReport


class Encoder:
    """Encodes conversations with one tokenizer; what is true of its template is found out once."""

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError("the tokenizer has no chat template; load it with ema_scale.data.tokens.load_tokenizer")
        self.tokenizer = tokenizer
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)

    @cached_property
    def takes_system(self) -> bool:
        return templates.takes_system(self.tokenizer)

    @cached_property
    def end_of_turn(self) -> str:
        return templates.end_of_turn_token(self.tokenizer, self.special)

    @cached_property
    def _marks_generation(self) -> bool:
        return "{% generation" in self.tokenizer.chat_template or "{%- generation" in self.tokenizer.chat_template

    def prepare(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """Messages as the template can take them, special tokens in their text broken up; whether any was."""
        kept = list(messages) if self.takes_system else templates.fold_system(messages)
        safe = [Message(role=m["role"], content=templates.disarm(m["content"], self.special)) for m in kept]
        return safe, any(a["content"] != b["content"] for a, b in zip(kept, safe, strict=True))

    def encode(self, messages: Sequence[Message], max_length: int | None = None, *, template: bool = False) -> Encoded:
        """Token ids, assistant mask and, if asked for, template mask; cut on the right to max_length. A conversation in
        which no assistant speaks ends where its answer would begin. Raises UserError if a mask cannot be found."""
        safe, disarmed = self.prepare(messages)
        opens = not any(m["role"] == "assistant" for m in safe)
        if self._marks_generation:
            out = self.tokenizer.apply_chat_template(
                safe, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=opens
            )
            ids, mask = list(out["input_ids"]), [int(x) for x in out["assistant_masks"]]
        else:
            full = templates.render(self.tokenizer, safe, generation_prompt=opens)
            spans = templates.assistant_spans(self.tokenizer, safe, full, self.end_of_turn)
            out = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
            ids = list(out["input_ids"])
            mask = [int(end > start and any(a <= start < b for a, b in spans)) for start, end in out["offset_mapping"]]
        cut = max_length is not None and len(ids) > max_length
        own = self._template_mask(safe, ids, opens)[:max_length] if template else None
        return Encoded(ids[:max_length], mask[:max_length], cut, disarmed, own)

    def _template_mask(self, messages: Sequence[Message], ids: list[int], opens: bool) -> list[int]:
        full = templates.render(self.tokenizer, messages, generation_prompt=opens)
        spans = templates.text_spans(self.tokenizer, messages, full, generation_prompt=opens)
        out = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        if list(out["input_ids"]) != ids:
            raise UserError(
                "the chat template's text has other tokens than the conversation: scope template is unknown"
            )
        return [int(not any(a <= start < b for a, b in spans)) for start, _ in out["offset_mapping"]]


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
) -> Tokenized:
    """Tokenise rows. A row that the cut leaves without an assistant token is dropped and counted; one that never had an
    answer, only where it would be learned.

    max_length: None: rows are not cut. template: also the column template, 1 where the chat template wrote a token.
    cache: a folder in which runs find what others have tokenized.

    Raises UserError naming the row's origin if its mask cannot be found, or if no row is left.
    """
    from datasets import Dataset

    encoder = Encoder(tokenizer)
    store = TokenStore(cache, tokenizer, max_length, template) if cache is not None else None
    keys = [message_key(row.messages) for row in rows]
    known = store.read(keys) if store else {}
    fresh: dict[str, Encoded] = {}
    report = TokenReport()
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": [], "tag": []}
    if template:
        columns["template"] = []
    for row, key in zip(rows, keys, strict=True):
        encoded = known.get(key)
        if encoded is None:
            try:
                encoded = encoder.encode(row.messages, max_length, template=template)
            except UserError as error:
                raise UserError(f"{row.origin}: {error}") from None
            known[key] = fresh[key] = encoded
        report.truncated += encoded.truncated
        report.disarmed += encoded.disarmed
        report.system_folded += not encoder.takes_system and any(m["role"] == "system" for m in row.messages)
        needed = row.tag in LEARNED or any(m["role"] == "assistant" for m in row.messages)
        if needed and not any(encoded.assistant_mask):
            report.dropped_no_assistant += 1
            continue
        columns["input_ids"].append(encoded.input_ids)
        columns["labels"].append(
            [t if m else -100 for t, m in zip(encoded.input_ids, encoded.assistant_mask, strict=True)]
        )
        columns["length"].append(len(encoded.input_ids))
        columns["tag"].append(row.tag)
        if template:
            columns["template"].append(encoded.template_mask)
        report.assistant_tokens += sum(encoded.assistant_mask)
    report.rows, report.tokens = len(columns["length"]), sum(columns["length"])
    report.longest = max(columns["length"], default=0)
    report.by_tag = dict(Counter(columns["tag"]))
    if store:
        store.add(fresh)
    if not report.rows:
        raise UserError(
            f"no row has an assistant token within {max_length} tokens ({report.dropped_no_assistant} rows); "
            "raise data.max_length"
        )
    return Tokenized(Dataset.from_dict(columns), report)
