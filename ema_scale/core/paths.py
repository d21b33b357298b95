"""The cache folder, and the files that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout they stand beside the package; in a wheel, inside it.
SHIPPED_FOLDERS = ("configs", "eval", "launch")


def cache_root() -> Path:
    """EMA_CACHE, or ~/.cache/ema_scale."""
    return Path(os.environ.get("EMA_CACHE") or Path.home() / ".cache" / "ema_scale")


def shipped_root() -> Path:
    """The folder that holds configs/, eval/ and launch/: the checkout, or the installed package's own copy."""
    inside = _PACKAGE / "shipped"
    return inside if inside.is_dir() else _PACKAGE.parent


def find_file(name: str | os.PathLike[str]) -> Path:
    """`name` if it exists; else, below configs/, eval/ or launch/, the file that ships with the package."""
    path = Path(name)
    if path.is_absolute() or path.exists() or path.parts[:1] not in [(folder,) for folder in SHIPPED_FOLDERS]:
        return path
    shipped = shipped_root() / path
    return shipped if shipped.exists() else path
