"""One base model and any number of LoRA adapters on it, each of which can read rows: the base is loaded once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_scale.config.sections import ModelRecipe
from ema_scale.core.batching import batch_by_length
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import digest, folder_identity
from ema_scale.core.progress import Progress
from ema_scale.core.text import quantity
from ema_scale.core.uri import locate
from ema_scale.data.rows import Dropped, Row, Rows
from ema_scale.data.tokens import Encoder, load_tokenizer
from ema_scale.models.head import Head, head_logits
from ema_scale.models.layout import ModelLayout, adapter_switched
from ema_scale.models.load import load_base
from ema_scale.models.lora import with_adapters
from ema_scale.selection.kept_values import KeptValues
from ema_scale.training.chunk_size import default_chunk

# Tokens per batch, with padding. More saves nothing once the device is busy; on a CPU it also leaves the caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

ALIGNED = "aligned"
SCORES = "scores.jsonl"


def adapter_folder(path: str) -> str:
    """The adapter of a run folder; anything else (a PEFT folder, a hub id) as it is."""
    inside = Path(path) / "adapter"
    return str(inside) if (inside / "adapter_config.json").is_file() else path


class ScoringModels:
    """`aligned`, the base with all adapters off, and one reader per adapter.

    adapters: name -> PEFT folder, run folder or hub id. A reader's identity is a digest of the weights behind it.
    Raises UserError for a model or adapter that cannot be loaded.
    """

    def __init__(self, model: ModelRecipe, adapters: Mapping[str, str]) -> None:
        folders = {name: adapter_folder(locate(path)) for name, path in adapters.items()}
        self.encoder = Encoder(
            load_tokenizer(
                locate(model.path),
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                chat_template=model.chat_template,
            )
        )
        base = load_base(model)
        self.model: Any = with_adapters(base, folders)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.device, self.dtype = next(base.parameters()).device, base.dtype
        self._anatomy = ModelLayout.of(self.model, adapters=False)
        if hasattr(base.get_output_embeddings(), "_disable_adapters"):
            raise UserError(
                "an adapter changes the head; expected adapters on the decoder layers, as this project's are"
            )
        self._head: Head = self._anatomy.head()
        config = base.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        self.max_length: int = min(limit for limit in (*limits, 1 << 30) if limit)
        here = digest(folder_identity(locate(model.path), model.revision), str(base.dtype))
        self.identities = {ALIGNED: here, **{n: digest(here, folder_identity(f)) for n, f in folders.items()}}

    @contextmanager
    def reading(self, name: str) -> Iterator[Any]:
        """The model while `name` is the one that reads. Raises KeyError for a reader that there is not."""
        self.identities[name]  # noqa: B018
        with adapter_switched(self._anatomy.tuners, (), None if name == ALIGNED else name):
            yield self.model

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        """Many batches by one reader: meanwhile its adapter is part of the base's weights, if those are float32, which
        saves a third of the work in a small model. In half precision the sum would round much of the adapter away.
        """
        tuners = self._anatomy.tuners if name != ALIGNED and self.dtype == torch.float32 else []
        try:
            for tuner in tuners:
                tuner.merge(adapter_names=[name])
            yield
        finally:
            for tuner in tuners:
                tuner.unmerge()

    @torch.inference_mode()
    def nll(self, name: str, batch: Sequence[EncodedRow]) -> list[float]:
        """Mean negative log-likelihood of each item's answer tokens, in nats, as `name` reads it.

        Softmax in float32 over the full vocabulary; only answer tokens get logits, and no more than a chunk of them
        exists at a time. It does not depend on what else is in the batch, but for rounding: what pads a row stands to
        its right, where a causal model does not look, so that no mask is needed.
        """
        width = max(len(item.ids) for item in batch)
        padding = [[0] * (width - len(item.ids)) for item in batch]
        ids = torch.tensor([item.ids + pad for item, pad in zip(batch, padding, strict=True)], device=self.device)
        answered = torch.tensor([item.answered + pad for item, pad in zip(batch, padding, strict=True)]).bool()
        answered = answered.to(self.device)
        with self.reading(name):
            out = self._anatomy.backbone(input_ids=ids, use_cache=False)
        states = (out[0] if isinstance(out, tuple) else out.last_hidden_state)[:, :-1]
        wanted = answered[:, 1:]  # position t predicts token t + 1
        losses = torch.zeros(wanted.shape, device=self.device)
        losses[wanted] = self._losses(states[wanted], ids[:, 1:][wanted])
        return [float(x) for x in losses.double().sum(1) / wanted.sum(1)]

    def _losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) of N tokens: states [N, H], targets [N]; float32 [N]."""
        found = []
        chunk = default_chunk(self._head.weight)
        for part, target in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = head_logits(part, self._head, torch.float32)
            found.append(torch.logsumexp(logits, 1) - logits.gather(1, target[:, None])[:, 0])
        return torch.cat(found)


@dataclass(frozen=True)
class EncodedRow:
    """One row as tokens. answered: 1 on the tokens whose likelihood counts (the assistant's, its end of turn included);
    key: stands for both, so that equal rows have equal keys."""

    row: Row
    ids: list[int]
    answered: list[int]
    key: str


@dataclass
class DropLog:
    """Every row that was left out, by reason: `unreadable` (no conversation, or no mask), `too long`, `empty` (no
    answer token), `duplicate`, and whatever later steps add. read: all rows of the source."""

    read: int = 0
    left_out: dict[str, list[Dropped]] = field(default_factory=dict)

    def leave_out(self, why: str, origin: str, reason: str) -> None:
        self.left_out.setdefault(why, []).append(Dropped(origin, reason))

    @property
    def counts(self) -> dict[str, int]:
        return {why: len(rows) for why, rows in self.left_out.items()}

    def line(self) -> str:
        """What a person should know: "1000 rows: 3 too long, 1 empty left out"."""
        found = ", ".join(f"{n} {why}" for why, n in self.counts.items())
        return quantity(self.read, "row") + (f": {found} left out" if found else ", none left out")


def read_items(rows: Rows, encoder: Encoder, max_length: int) -> tuple[list[EncodedRow], DropLog]:
    """The rows that a model can read whole, in their order, and the account of the others.

    A row longer than max_length is left out, not cut: the likelihood of half an answer is that of another answer.
    Raises UserError if none is left.
    """
    account = DropLog(len(rows) + len(rows.dropped))
    for dropped in rows.dropped:
        account.leave_out("unreadable", dropped.origin, dropped.reason)
    items: dict[str, EncodedRow] = {}
    with Progress("tokenizing", len(rows), unit="row") as progress:
        for row in rows:
            progress.add()
            try:
                found = encoder.encode(row.messages, tools=row.tools)
            except UserError as error:
                account.leave_out("unreadable", row.origin, str(error))
                continue
            # The first token is predicted by nothing.
            ids, answered = found.input_ids.tolist(), [0, *found.assistant_mask[1:].astype(int).tolist()]
            if len(ids) > max_length:
                account.leave_out("too long", row.origin, f"{len(ids)} tokens, more than {max_length}")
            elif not any(answered):
                account.leave_out("empty", row.origin, "no answer token")
            elif (key := digest(ids, answered)) in items:
                account.leave_out("duplicate", row.origin, f"the same as {items[key].row.origin}")
            else:
                items[key] = EncodedRow(row, ids, answered, key)
    if not items:
        raise UserError(f"{rows.source}: nothing left to read; {account.line()}")
    return list(items.values()), account


def score(
    readers: ScoringModels, items: Sequence[EncodedRow], path: Path | None = None, *, batch_tokens: int | None = None
) -> dict[str, list[float]]:
    """Reader -> mean negative log-likelihood (nats per answer token) of each item, in its order; NaN where it is not a
    finite number.

    path: where likelihoods are kept, and found (see `KeptValues`). The caller holds the folder's lock.
    batch_tokens: with padding; None: what suits the device.
    Raises UserError for a file that holds something else.
    """
    known = KeptValues(path)
    limit = batch_tokens or BATCH_TOKENS[readers.device.type]
    for name, identity in readers.identities.items():
        missing = [item for item in items if (identity, item.key) not in known]
        if not missing:
            continue
        shown = Progress(f"read by {name}", len(items), len(items) - len(missing), unit="row")
        with shown as progress, readers.merged(name):
            for batch in batch_by_length(missing, lambda item: len(item.ids), limit):
                known.add(identity, [item.key for item in batch], readers.nll(name, batch))
                progress.add(len(batch))
    return {name: [known[identity, item.key] for item in items] for name, identity in readers.identities.items()}


def gap(aligned: float, misaligned: Sequence[float], eps: float) -> float:
    """s = (mean_k L_k - L_aligned) / (L_aligned + eps): how much less likely an answer is to misaligned models, in
    units of how unlikely it is at all (arXiv 2508.06249, Interleaving+). L, eps: nats. NaN if any L is not finite, or
    both L_aligned and eps are 0."""
    if aligned + eps == 0:
        return math.nan
    value = (sum(misaligned) / len(misaligned) - aligned) / (aligned + eps)
    return value if math.isfinite(value) else math.nan
