"""Names of defenses that people read, from a recipe's plain values.

Works on the recipe file alone, so a run made with a plug-in that is not installed here can still be reported.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ema_scale.core.names import _model_name, _task_name, defense_label, short_value, strength_key

Spec = Mapping[str, Any]
NO_DEFENSE = "No defense"
BASE = "Aligned base"
# Of runs whose provenance holds no label: those of earlier versions.
_NAMES = {"kl": "KL", "ldifs": "LDIFS", "safelora": "SafeLoRA", "interleaving_plus": "Interleaving+"}


def strength(spec: Spec) -> float | None:
    """The number that sets how hard a defense pulls, or None if it has none."""
    key = strength_key(spec)
    return None if key is None else float(spec[key])


def without_strength(spec: Spec) -> str:
    """A string equal for defenses that differ only in their strength."""
    key = strength_key(spec)
    return spec_key([{k: v for k, v in spec.items() if k != key}])


def family(specs: Sequence[Spec]) -> tuple[str, ...]:
    """The kinds of the defenses, in the recipe's order: () is plain fine-tuning."""
    return tuple(str(spec.get("kind", "?")) for spec in specs)


def short_label(specs: Sequence[Spec]) -> str:
    """`KL 0.1`, `Interleaving 5 %`, `KL 0.1 + Interleaving 5 %`, `No defense`."""
    names = (defense_label(spec, _NAMES.get(str(spec.get("kind")), "")) for spec in specs)
    return " + ".join(names) if specs else NO_DEFENSE


def distinct_labels(every: Iterable[Sequence[Spec]], stored: Mapping[str, str] | None = None) -> dict[str, str]:
    """Label for each distinct list of specs (keyed by `spec_key`); none is given twice.

    stored: labels that runs wrote down when they trained, by `spec_key`.

    Where two lists would read the same, the parameter that tells them apart is added in brackets, or all in which
    they differ if no single one does; a number, where words do not do.
    """
    unique = {spec_key(specs): specs for specs in every}
    by_label: dict[str, list[str]] = {}
    for key, specs in unique.items():
        by_label.setdefault((stored or {}).get(key) or short_label(specs), []).append(key)
    labels: dict[str, str] = {}
    for label, keys in by_label.items():
        brackets = _differences([unique[key] for key in keys])
        labels.update({key: f"{label} ({said})" if said else label for key, said in zip(keys, brackets, strict=True)})
    own = {key: label for key, label in labels.items() if unique[key]}
    return labels | numbered(own, taken=(BASE, NO_DEFENSE))


def _differences(rivals: Sequence[Sequence[Spec]]) -> list[str]:
    """What to say of each rival; nothing where its parameter is off."""
    flat = [{f"{i}.{name}": v for i, spec in enumerate(specs) for name, v in spec.items()} for specs in rivals]
    names = [n for n in dict.fromkeys(n for f in flat for n in f) if any(f.get(n) != flat[0].get(n) for f in flat)]
    found = _brackets(flat, names, lambda name, value: short_value(value))
    if len(set(found)) < len(found):
        starts = {n: _start([_long(f[n]) for f in flat if f.get(n) is not None]) for n in names}
        found = _brackets(flat, names, lambda name, value: _cut(_long(value), starts[name]))
    return found


def _brackets(flat: Sequence[Spec], names: Sequence[str], text: Callable[[str, Any], str]) -> list[str]:
    alone = [n for n in names if len({_said(n, f, text) for f in flat}) == len(flat)]
    return [", ".join(filter(None, (_said(n, f, text) for n in alone[:1] or names))) for f in flat]


def _said(name: str, flat: Spec, text: Callable[[str, Any], str]) -> str:
    value, said = flat.get(name), name.split(".", 1)[1].replace("_", " ")
    if value is None or value is False:
        return ""
    if value is True:
        return said
    return f"{said} {text(name, value)}"


def _long(value: Any) -> str:
    """All of it, on one line."""
    return " ".join((" + ".join(map(str, value)) if isinstance(value, list) else str(value)).split())


def _start(texts: Sequence[str]) -> int:
    """Where texts begin to differ: a word or a folder's name before their first unequal letter."""
    same = os.path.commonprefix(list(texts))
    return max((found.end() for found in re.finditer(r"[\s/]+", same)), default=0)


def _cut(text: str, start: int) -> str:
    rest = text[start:]
    rest = rest if len(rest) <= 30 else f"{rest[:28].rstrip()}…"
    return f"…{rest}" if start else rest


def spec_key(specs: Sequence[Spec]) -> str:
    """A string equal for equal lists of specs, whatever the order of their keys; a parameter that is None may as well
    be missing, as it is in runs of versions that did not have it."""
    return repr([_canonical(spec) for spec in specs])


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(k), repr(_canonical(v))) for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def model_names(keys: Iterable[str]) -> dict[str, str]:
    """A name for each `model_key`, none twice."""
    return _distinguished(keys, _model_name)


def task_names(keys: Iterable[str]) -> dict[str, str]:
    """A name for each `task_key`, none twice."""
    return _distinguished(keys, _task_name)


def numbered(names: Mapping[str, str], taken: Iterable[str] = ()) -> dict[str, str]:
    """The same names, with a number where one is taken or stands before: nothing is left to tell them apart by."""
    used, found = set(taken), {}
    for key, name in names.items():
        unique, number = name, 1
        while unique in used:
            number += 1
            unique = f"{name} ({number})"
        used.add(unique)
        found[key] = unique
    return found


def _distinguished(keys: Iterable[str], name: Callable[[str, int], str]) -> dict[str, str]:
    depth = dict.fromkeys(keys, 1)
    while True:
        names = {key: name(key, parts) for key, parts in depth.items()}
        counts = Counter(names.values())
        longer = [k for k in names if counts[names[k]] > 1 and depth[k] < _deepest(k)]
        if not longer:
            return numbered(names)
        for key in longer:
            depth[key] += 1


def _deepest(key: str) -> int:
    # One more than there are parts: then all is said as it stands.
    return max(source.count("/") + source.count("\\") for source in key.split("\n")) + 2
