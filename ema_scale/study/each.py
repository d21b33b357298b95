"""One defense of a study file as several arms: a field that says `{each: [a, b]}` makes name-a and name-b of name."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

# Arms' names are in the names of folders, which have an end.
LONGEST = 40


def spread(name: str, specs: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(arm, its defenses) for every combination of values. Raises ValueError if `each` is no list of unequal values."""
    for i, spec in enumerate(specs):
        for field, value in spec.items():
            if isinstance(value, Mapping) and set(value) == {"each"}:
                where, values = f"{name}.{i}.{field}.each", value["each"]
                if not isinstance(values, list) or not values:
                    raise ValueError(f"{where}: expected a list of values")
                if twice := [one for n, one in enumerate(values) if one in values[:n]]:
                    raise ValueError(f"{where}: {twice[0]!r} stands there twice")
                for one, slug in zip(values, slugs(values), strict=True):
                    yield from spread(f"{name}-{slug}", [*specs[:i], {**spec, field: one}, *specs[i + 1 :]])
                return
    yield name, specs


def slugs(values: Sequence[Any]) -> list[str]:
    """What of each value goes into a folder's name, none twice.

    A number or word is itself. Of a path it is the last part, or as many as tell it from the others; of a text its
    beginning. A digest of the value follows where that is cut, or does not tell two apart.
    """
    texts = [str(value) for value in values]
    parts = [1] * len(texts)
    while True:
        found = [_slug(text, n) for text, n in zip(texts, parts, strict=True)]
        counts = Counter(found)
        deepest = [len(PurePosixPath(text).parts) for text in texts]
        longer = [i for i, slug in enumerate(found) if counts[slug] > 1 and parts[i] < deepest[i]]
        if not longer:
            break
        for i in longer:
            parts[i] += 1
    cut = [slug if slug == text else slug[:LONGEST].strip("-") for slug, text in zip(found, texts, strict=True)]
    counts = Counter(cut)
    return [
        slug if slug and slug == whole and counts[slug] == 1 else _with_digest(slug, text)
        for slug, whole, text in zip(cut, found, texts, strict=True)
    ]


def _with_digest(slug: str, text: str) -> str:
    return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("-")


def _slug(text: str, parts: int) -> str:
    if re.fullmatch(r"[A-Za-z0-9._-]+", text):
        return text
    if "/" in text:
        text = "/".join(PurePosixPath(text).parts[-parts:])
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
