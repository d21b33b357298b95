"""References in recipes: a path or hub id stands for itself; `scheme:part` is resolved by a registered scheme.

A scheme is a module with `resolve(reference) -> Path` and, where it has them, `model_config(reference)` and
`grade(question, answer, meta)`. It is imported on first use, so that registering one costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SCHEMES: dict[str, str] = {}


def register(scheme: str, module: str) -> None:
    """Have `scheme:...` resolved by `module`, a dotted name that is imported when it is first needed."""
    _SCHEMES[scheme] = module


def scheme_of(reference: str) -> str | None:
    """The registered scheme that `reference` begins with, or None."""
    scheme, colon, _ = reference.partition(":")
    return scheme if colon and scheme in _SCHEMES else None


def load_scheme(scheme: str) -> Any:
    """The module behind a registered scheme. Raises KeyError for another name."""
    return import_module(_SCHEMES[scheme])


def locate(reference: str) -> str:
    """A path for a `scheme:part` (built on first use); any other reference is returned as it is.

    Raises UserError for a part that the scheme does not have.
    """
    scheme = scheme_of(reference)
    return reference if scheme is None else str(load_scheme(scheme).resolve(reference))


def model_config(reference: str) -> dict[str, Any] | None:
    """config.json of a scheme's model, without building it; None for a path or hub id.

    Raises UserError for a part that is not a model of the scheme.
    """
    scheme = scheme_of(reference)
    config: dict[str, Any] | None = None if scheme is None else load_scheme(scheme).model_config(reference)
    return config
