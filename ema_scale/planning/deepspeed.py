"""What of a DeepSpeed config decides memory and communication."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file

_DEFAULT_LIVE = _DEFAULT_REUSE = 10**9


_DEFAULT_PREFETCH = 5 * 10**7


_DEFAULT_BUCKET = 5 * 10**8


@dataclass(frozen=True)
class Zero:
    """stage: ZeRO's. max_live, reuse, prefetch: in parameters, of stage 3; reduced: gradients in a bucket.
    None: `auto`. weights_away, optimizer_away: whether they wait in the machine's memory."""

    stage: int = 0
    max_live: int = _DEFAULT_LIVE
    reuse: int = _DEFAULT_REUSE
    prefetch: int | None = _DEFAULT_PREFETCH
    reduced: int | None = None
    weights_away: bool = False
    optimizer_away: bool = False

    def live(self, hidden: int) -> int:
        """Parameters that may stay gathered beside the layer that runs: those soon used again, and those fetched ahead
        (`auto` is transformers' 0.9 hidden^2)."""
        ahead = int(0.9 * hidden**2) if self.prefetch is None else self.prefetch
        return min(self.max_live, self.reuse + ahead)

    def bucket(self, hidden: int) -> int:
        """Gradients that are reduced together (`auto` is transformers' hidden^2)."""
        return hidden**2 if self.reduced is None else self.reduced


def read_zero(path: str | None) -> Zero:
    """Of a DeepSpeed JSON config; None: no DeepSpeed. Raises UserError if it cannot be read."""
    if path is None:
        return Zero()
    try:
        values: dict[str, Any] = json.loads(find_file(path).read_text(encoding="utf-8")).get("zero_optimization") or {}
        stage = int(values.get("stage", 0))
        return Zero(
            stage,
            _count(values, "stage3_max_live_parameters", _DEFAULT_LIVE) or _DEFAULT_LIVE,
            _count(values, "stage3_max_reuse_distance", _DEFAULT_REUSE) or 0,
            _count(values, "stage3_prefetch_bucket_size", _DEFAULT_PREFETCH),
            _count(values, "reduce_bucket_size", _DEFAULT_BUCKET),
            stage == 3 and _away(values, "offload_param"),
            stage > 0 and _away(values, "offload_optimizer"),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"training.deepspeed: {path}: expected a DeepSpeed JSON config; {error}") from None


def _count(values: Mapping[str, Any], name: str, default: int) -> int | None:
    found = values.get(name, default)
    return None if found == "auto" else int(float(found))


def _away(values: Mapping[str, Any], name: str) -> bool:
    return str((values.get(name) or {}).get("device", "none")) != "none"
