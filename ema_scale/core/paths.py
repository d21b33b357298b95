"""The cache folder, and the files that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout they stand beside the package; in a wheel, inside it (setup.py).
SHIPPED_FOLDERS = ("configs", "eval", "launch")


def cache_root() -> Path:
    """EMA_CACHE, or ~/.cache/ema_scale."""
    return Path(os.environ.get("EMA_CACHE") or Path.home() / ".cache" / "ema_scale")


def shipped_root() -> Path:
    """The folder that holds configs/, eval/ and launch/: the checkout, or `shipped` in the installed package."""
    inside = _PACKAGE / "shipped"
    return inside if inside.is_dir() else _PACKAGE.parent


def find_file(name: str | os.PathLike[str], folder: str | os.PathLike[str] = "") -> Path:
    """The file that a recipe or an option names, which need not exist.

    A shipped file is found from every folder: a relative `name` that begins with configs/, eval/ or launch/
    and does not exist in `folder` is the one that ships with ema_scale. `~` is the home folder.

    Args:
        name: a file's path.
        folder: what a relative `name` is relative to; default: the working directory.
    """
    path = Path(os.path.expanduser(name))
    there = Path(folder) / path
    if path.is_absolute() or path.parts[:1] not in [(first,) for first in SHIPPED_FOLDERS] or there.exists():
        return there
    shipped = shipped_root() / path
    return shipped if shipped.exists() else there
