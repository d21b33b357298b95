"""Where the small world lives on disk: built on first use, cached by content, published whole.

Its models and its data are kept apart: rows and question banks are there at once, and a new task is no reason to train
the models again.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """EMA_CACHE, or ~/.cache/ema_scale."""
    return Path(os.environ.get("EMA_CACHE") or Path.home() / ".cache" / "ema_scale")
