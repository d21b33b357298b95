"""How many GPUs an engine takes. It imports nothing that takes seconds: `ema launch` and `ema status` come here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ema_scale.core.errors import UserError


def engine_gpus(engine: Mapping[str, Any], where: str) -> int:
    """tensor_parallel_size x pipeline_parallel_size.

    where: the field, for the message. Raises UserError if they are no numbers of GPUs.
    """
    product = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = engine.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{where}.{name}: found {size!r}, expected a number of GPUs")
        product *= size
    return product
