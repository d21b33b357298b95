"""One base model and any number of LoRA adapters on it, each of which can read rows: the base is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_scale.chat.tokens import Encoder, load_tokenizer
from ema_scale.errors import UserError
from ema_scale.locate import locate
from ema_scale.recipe import ModelRecipe
from ema_scale.reference.anatomy import Anatomy, Head, switched
from ema_scale.rundir import digest, folder_identity
from ema_scale.selection.rows import Item
from ema_scale.training.adapter import load_base, with_adapters
from ema_scale.training.loss import default_chunk, head_logits

# Tokens a batch, with padding. More saves nothing once the device is busy; on a CPU it also leaves the caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
ALIGNED = "aligned"


def adapter_folder(path: str) -> str:
    """The adapter of a run folder; anything else (a PEFT folder, a hub id) as it is."""
    inside = Path(path) / "adapter"
    return str(inside) if (inside / "adapter_config.json").is_file() else path


class Readers:
    """`aligned`, the base with all adapters off, and one reader an adapter.

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
        self._anatomy = Anatomy.of(self.model, adapters=False)
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
        with switched(self._anatomy.tuners, (), None if name == ALIGNED else name):
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
    def nll(self, name: str, batch: Sequence[Item]) -> list[float]:
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
