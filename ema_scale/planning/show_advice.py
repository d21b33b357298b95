"""The lines of `ema recommend`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ema_scale.core.names import strength_key
from ema_scale.core.text import limits, quantity, short_percent
from ema_scale.defenses.registry import load
from ema_scale.planning.evidence import Arm, Evidence
from ema_scale.planning.recommend import OPTIONS, OUTSIDE, RULE, Advice, Recommendation

_TOLD = {
    OUTSIDE: "misaligned outside the domain",
    "general_incoherent": "incoherent there",
    "in_domain_misaligned": "narrow task learned",
    "benign_learned": "benign tasks learned",
}


def advice_lines(
    advice: Advice, evidence: Evidence, owned: Mapping[str, Any], *, adapter: Path | None = None, model: str = ""
) -> Iterator[str]:
    """adapter: one that is finished; model: the one it belongs to."""
    yield f"You have: {', '.join(owned) or 'neither rows nor directions nor a base model'}"
    yield ""
    if not advice.ranked:
        yield "No measured defense fits what you have."
    for number, one in enumerate(advice.ranked, start=1):
        assert one.evidence is not None
        yield f"{number}. {one.evidence.label}: {one.evidence.standing}"
        yield from (f"   {line}" for line in _evidence(one.evidence, evidence))
        yield from _rest(one, adapter, model)
    if advice.ranked:
        yield RULE
        yield ""
    if advice.unmeasured:
        yield "Unmeasured: no study of the package has these yet"
        for one in advice.unmeasured:
            yield f"- {_kinds(one.defenses)}: {load(one.defenses[0]['kind']).summary}"
            yield from _rest(one, adapter, model)
    for assets in sorted(set(advice.missing.values())):
        kinds = sorted(kind for kind, needed in advice.missing.items() if needed == assets)
        options = " ".join(OPTIONS[asset] for asset in assets if asset in OPTIONS)
        yield (
            f"With {' and '.join(assets)} ({options}) also: {', '.join(kinds)}"
            if options
            else (f"With {' and '.join(assets)} also: {', '.join(kinds)}")
        )
    if any("safe rows" in assets for assets in advice.missing.values()):
        yield f"No safe rows? Let the aligned model write some: ema data synthesize {model or 'MODEL'} -o safe.jsonl"
    for why in sorted(set(advice.refused.values())):
        kinds = sorted(kind for kind, reason in advice.refused.items() if reason == why)
        yield f"Not for this recipe ({why}): {', '.join(kinds)}"


def _evidence(arm: Arm, evidence: Evidence) -> Iterator[str]:
    made = evidence.made.get(arm.study)
    ran = f"{quantity(arm.runs, 'run')} on {quantity(arm.tasks, 'task')}"
    yield f"evidence: study {arm.study} of {made}, {arm.model}, {ran}"
    none = evidence.undefended(arm)
    for name, words in _TOLD.items():
        if name in arm.metrics:
            own = arm.metrics[name]
            without = none.metrics.get(name) if none else None
            beside = f" (no defense {short_percent(without.value)})" if without else ""
            yield f"  {words}: {short_percent(own.value)} {limits(own.low, own.high, 0)}{beside}"
    for text in arm.costs:
        yield f"  but it {text}"


def _rest(one: Recommendation, adapter: Path | None, model: str) -> Iterator[str]:
    price = "unknown, for the model's shape is not" if one.price is None else f"{one.price:.2f} times the time without"
    if adapter is not None and len(one.defenses) == 1 and one.defenses[0]["kind"] == "safelora":
        spec = one.defenses[0]
        threshold = f" --threshold {spec['threshold']:g}" if spec.get("threshold") is not None else ""
        yield f"   ema safelora {adapter} --base {spec['base']} --aligned {model}{threshold}"
    else:
        yield f"   price: {price}"
        yield "   defenses:"
        yield from (f"     - {_inline(spec)}" for spec in one.defenses)
    yield ""


def _inline(spec: Mapping[str, Any]) -> str:
    """One entry of a recipe, as YAML that fits on a line. JSON of a value is YAML."""
    defaults = load(spec["kind"]).model_fields
    always = ("kind", strength_key(spec))
    kept = {n: v for n, v in spec.items() if n in always or v != defaults[n].default or defaults[n].is_required()}
    return "{" + ", ".join(f"{name}: {_value(value)}" for name, value in kept.items()) + "}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value.replace("_", "").isalnum() else json.dumps(value)


def _kinds(specs: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(str(spec["kind"]) for spec in specs)
