"""Classes and functions in a user's own Python file, named in a recipe as `my_file.py:MyClass`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError


def is_file_spec(text: str) -> bool:
    """Whether a text has the form `path/file.py:Name`."""
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def file_of(text: str) -> str:
    """The file of `path/file.py:Name`; any other text as it is."""
    return text.rpartition(":")[0] if is_file_spec(text) else text


def absolute_spec(spec: str) -> str:
    """The same `file.py:Name`, valid in every working directory."""
    path, _, name = spec.rpartition(":")
    return f"{Path(path).expanduser().absolute()}:{name}"


def load_object(spec: str) -> Any:
    """The object `Name` of `path/file.py:Name`. The file is run once per process.

    Raises UserError if there is no such file or name, or the file raises; it names the line.
    """
    path_text, _, name = absolute_spec(spec).rpartition(":")
    path = Path(path_text)
    module_name = f"ema_user_{path.stem}_{hashlib.sha256(path_text.encode()).hexdigest()[:8]}"
    module = sys.modules.get(module_name)
    if module is None:
        if not path.is_file():
            raise UserError(f"{spec}: no such file; a relative path starts where `ema` is run, ./ beside the recipe")
        found = importlib.util.spec_from_file_location(module_name, path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module  # dataclasses and pydantic look their module up there
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise UserError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        public = ", ".join(n for n in vars(module) if not n.startswith("_") and n[0].isupper()) or "none"
        raise UserError(f"{path}: found no {name}; its classes: {public}")
    return getattr(module, name)


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""
