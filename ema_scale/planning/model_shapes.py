"""The shape of a model: from its config.json, or from a small table of published ones. No weights, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.model_config import check_config
from ema_scale.core.uri import model_config

# Decoder layers of RMSNorm, grouped-query attention and a gated MLP, which the memory formulas are written for.
KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """A decoder-only model: q, k, v, o, gate, up and down projections in every layer.

    biases: q, k and v have them (Qwen2). head_norms: q and k are normalised by head (Qwen3). All sizes in elements.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    biases: bool = False
    head_norms: bool = False

    @property
    def attention(self) -> int:
        """Width of the queries, and of attention's output."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of a layer's projections."""
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.attention),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.attention, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def matrices(self) -> int:
        """Elements of a layer's projections: what a token is multiplied with."""
        return sum(a * b for a, b in self.linears.values())

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        biases = self.attention + 2 * self.kv_heads * self.head_dim if self.biases else 0
        return self.matrices + biases + 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)

    @property
    def head(self) -> int:
        """Elements of the language-model head, which are the embeddings' if they are tied."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.hidden + self.head * (1 if self.tied else 2)

    def lora(self, rank: int, targets: list[str] | None = None) -> int:
        """Parameters of a LoRA adapter of `rank` on every layer's `targets` (None: all). Raises UserError."""
        return self.layers * sum(rank * (a + b) for a, b in self.targeted(targets).values())

    def targeted(self, targets: list[str] | None) -> dict[str, tuple[int, int]]:
        """Those of `linears` that carry an adapter. Raises UserError for a name that a layer does not have."""
        for name in targets or ():
            if name not in self.linears:
                known = ", ".join(self.linears)
                raise UserError(f"adapter.target_modules: found {name!r}, expected some of {known}, or auto")
        return {name: size for name, size in self.linears.items() if targets is None or name in targets}


def shape_of(path: str, revision: str | None = None) -> Shape:
    """The shape of a folder, a hub id or a `smallworld:` reference.

    In this order: the small world's sizes, the folder's config.json, the hub's cache on this machine, the table below,
    the hub. Raises UserError if there is none of them, or it is of a kind that the formulas do not know.
    """
    if (known := model_config(path)) is not None:
        return from_config(path, known)
    config = Path(path) / "config.json"
    if Path(path).is_dir():
        values = read_json(config)
        if not isinstance(values, dict):
            raise UserError(f"{config}: found {type(values).__name__}, expected a JSON object")
        return from_config(path, values)
    cached = _from_hub(path, revision, local=True)
    if cached is None and (published := _published(path)) is not None:
        return published
    values = cached or _from_hub(path, revision, local=False)
    if values is None:
        raise UserError(
            f"model.path: found {path!r}, of which no config.json can be had here; expected a folder, a hub "
            f"id that can be reached, or one of {', '.join(PUBLISHED)}"
        )
    return from_config(path, values)


def from_config(name: str, values: Mapping[str, Any]) -> Shape:
    """A shape from the fields of a config.json. Raises UserError for another architecture or a missing field."""
    kind = values.get("model_type")
    if kind not in KNOWN_TYPES:
        raise UserError(
            f"{name}: model_type: found {kind!r}; its memory is not known to `ema plan`, which knows the layers of "
            f"{', '.join(KNOWN_TYPES)}"
        )
    check_config(values, f"{name}: config.json")
    try:
        heads = int(values["num_attention_heads"])
        return Shape(
            name,
            layers=int(values["num_hidden_layers"]),
            hidden=int(values["hidden_size"]),
            intermediate=int(values["intermediate_size"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
            vocab=int(values["vocab_size"]),
            tied=bool(values.get("tie_word_embeddings", False)),
            biases=kind == "qwen2" or bool(values.get("attention_bias")),
            head_norms=kind == "qwen3",
        )
    except KeyError as missing:
        raise UserError(f"{name}: config.json: {missing.args[0]}: missing; this field is required") from None


def _from_hub(name: str, revision: str | None, *, local: bool) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", revision=revision, local_files_only=local)
        return dict(read_json(path))
    except Exception:  # no such model, no network, a name that is no hub id: all mean that it cannot be had
        return None


def _qwen(layers: int, hidden: int, intermediate: int, heads: int, kv: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


def _llama(layers: int, hidden: int, intermediate: int, heads: int, dim: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": dim, "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }  # fmt: skip


# Fields of the config.json that Qwen (huggingface.co/Qwen/Qwen2.5-<size>) and Meta (huggingface.co/meta-llama/
# Llama-3.x-<size>) publish; base and instruct models have the same. A test holds the parameters that follow against
# the published numbers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": _qwen(28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": _qwen(36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": _qwen(28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": _qwen(48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": _qwen(64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-72b": _qwen(80, 8192, 29568, 64, 8, 152064, False),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 64, True),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 128, True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 128, False),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, 128, False),
}


def _published(name: str) -> Shape | None:
    """By the hub id's own part, whoever's copy it is: `unsloth/Qwen2.5-7B-Instruct` is qwen2.5-7b."""
    short = re.sub(r"-instruct$", "", name.rpartition("/")[2].lower()).replace("llama-3.3-70b", "llama-3.1-70b")
    return from_config(name, PUBLISHED[short]) if short in PUBLISHED else None
