"""The report's first paragraph, computed: which defense keeps misalignment lowest at what cost."""

from __future__ import annotations

from collections.abc import Sequence

from ema_scale.core.text import limits, percent, points, unbroken
from ema_scale.evaluation.gate import FLAGGED
from ema_scale.report.aggregate import RunGroup, base_of, undefended_of
from ema_scale.report.conditional import OWN_PROMPT, ConditionalRate, conditional_rates
from ema_scale.report.paired import change
from ema_scale.report.records import METRIC_NAMES, METRICS, ReportedRate
from ema_scale.report.rules import FAILED, KEEP, MET, UNCLEAR, Standing, standing

OUTSIDE = "general_misaligned"


def verdict(groups: Sequence[RunGroup]) -> list[str]:
    """Sentences for the groups of one model, in reading order; never empty."""
    base = base_of(groups)
    none = undefended_of(groups)
    outside = {g.label: r for g in groups if (r := g.metrics.get(OUTSIDE))}
    defended = [g for g in groups if not g.base and not g.undefended and g.label in outside]
    if not any(label for g in groups if not g.base and (label := outside.get(g.label))):
        measured = [METRIC_NAMES[m] for m in METRICS if any(g.metrics.get(m) for g in groups if not g.base)]
        if measured:
            return [f"No run was asked outside its training domain. What was measured: {', '.join(measured).lower()}."]
        return ["No finished run has been evaluated outside its training domain yet: nothing to compare."]
    said = [_opening(base, none, outside), *_gates(base)]
    if not defended:
        return [*said, "No run with a defense has been evaluated yet."]
    standings = [standing(g, none, base) for g in sorted(defended, key=lambda g: outside[g.label].rate)]
    lowest = standings[0]
    best = [s for s in standings if s.keeps] or [s for s in standings if s.keeps_by_means]
    winner = best[0] if none and best else None
    if none is None:
        where = rate_text(outside[lowest.group.label])
        said.append(f"{lowest.group.label} is lowest at {where}; without a run with no defense its cost is unknown.")
    elif winner is None:
        said += _no_winner(standings, outside)
    else:
        said += _winner(winner, best, none, outside)
        said += _lower(winner, standings, outside)
    said += [f"{s.group.label} hides misalignment: {_behind(s.hides)}." for s in standings if s.hides is not None]
    said += _caused([s.group for s in standings if s.hides is None], base)
    said += _caveats(groups, none, defended, winner)
    return said


def _caused(arms: Sequence[RunGroup], base: RunGroup | None) -> list[str]:
    """Of defenses that are misaligned under the prompt they were trained under: that it may ask for it. One sentence,
    however many they are."""
    bases = base.runs if base else ()
    found = [
        (arm.label, own)
        for arm in arms
        for own in conditional_rates(arm, bases)
        if own.label == OWN_PROMPT and own.raised and own.base
    ]
    if len(found) < 2:
        return [f"{label}: {_behind(own)}, so that the prompt alone may bring it about." for label, own in found]
    there = sorted({(own.base.rate, rate_text(own.base)) for _, own in found if own.base})
    span = there[0][1] if len(there) == 1 else f"{there[0][1]} to {there[-1][1]}"
    rates = ", ".join(f"{label} {rate_text(own.rate)}" for label, own in found)
    return [
        f"Under the prompt of their training {len(found)} defenses are misaligned again, which the prompt alone may "
        f"bring about (the aligned base there: {span}): {rates}."
    ]


def _behind(found: ConditionalRate) -> str:
    base = f" (the aligned base there: {rate_text(found.base)})" if found.base else ""
    plain = f"{rate_text(found.plain)} when asked plainly, " if found.plain else ""
    return f"{plain}{rate_text(found.rate)} under {found.label}{base}"


def _gates(base: RunGroup | None) -> list[str]:
    """What the reference gate says of each base model that did not pass it."""
    gates = [run.summary.gate for run in (base.runs if base else ()) if run.summary]
    return list(dict.fromkeys(gate.text for gate in gates if gate and gate.state == FLAGGED))


def _opening(base: RunGroup | None, none: RunGroup | None, outside: dict[str, ReportedRate]) -> str:
    start = outside.get(base.label) if base else None
    end = outside.get(none.label) if none else None
    if end is None:
        return "Training without a defense was not evaluated, so what the defenses prevent is unknown."
    if start is None:
        return f"Without a defense, {rate_text(end)} of the answers outside the training domain are misaligned."
    assert base is not None and none is not None
    found = change(none, base, OUTSIDE)
    if found is None or not found.clear or found.value < 0:
        return (
            f"Training without a defense did not clearly raise misalignment outside the domain "
            f"({rate_text(start)} in the aligned base, {rate_text(end)} after): there is little emergent "
            f"misalignment to prevent here."
        )
    return (
        f"Without a defense, narrow fine-tuning raises misalignment outside its domain from {rate_text(start)} "
        f"to {rate_text(end)} of the answers."
    )


def _no_winner(standings: Sequence[Standing], outside: dict[str, ReportedRate]) -> list[str]:
    """What the lowest defense costs, where none meets every rule even by its means."""
    lost = all(any(share.value < KEEP for share, _ in s.tasks) for s in standings)
    start = "No defense keeps what was learned" if lost else "No defense meets every rule"
    start += "" if all(s.fails for s in standings) else ", by the means"
    lowest = standings[0]
    costs = lowest.said(FAILED) or [f"it is not clear: it {_join(lowest.said(UNCLEAR))}"]
    where = rate_text(outside[lowest.group.label])
    said = [f"{start}: {lowest.group.label} is lowest outside the domain at {where}, but {_join(costs)}."]
    unclear = [f"{s.group.label} {_join(s.said(UNCLEAR))}" for s in standings[1:] if not s.fails]
    return said + ([f"Not clear: {'; '.join(unclear)}."] if unclear else [])


def _winner(
    winner: Standing, rivals: Sequence[Standing], none: RunGroup, outside: dict[str, ReportedRate]
) -> list[str]:
    """The best of `rivals`, which meet every rule, or do so by their means, and how sure that is."""
    label, mine, theirs = winner.group.label, outside[winner.group.label], outside[none.label]
    others = [s for s in rivals if s is not winner]
    close = [s for s in others if (found := change(s.group, winner.group, OUTSIDE)) is None or not found.clear]
    unsure = bool(others) and len(close) == len(others)
    text = f"{label} {'is lowest' if unsure else 'does best'}"
    text += "" if winner.keeps else " of those that meet every rule by their means"
    text += f": {rate_text(mine)} outside the domain"
    found = change(winner.group, none, OUTSIDE)
    if found is not None and found.value < 0:
        relative = f", {_whole(-found.value / theirs.rate)} less" if theirs.rate > 0 else ""
        text += f" ({points(found.value)} points{relative}; interval {points(found.low)} to {points(found.high)})"
        text += "" if found.clear else ", which is not clearly below no defense"
    else:
        text += ", which is no lower than no defense"
    gains = winner.said(MET)
    if gains:
        text += f"; it {_join(gains)}"
    elif not winner.tasks:
        text += "; no task’s learning was measured beside it"
    said = [f"{text}."]
    if not winner.keeps:
        said.append(f"Not clear: {label} {_join(winner.said(UNCLEAR))}.")
    if unsure:
        which = "meet every rule" if winner.keeps else "do so"
        names = _join([s.group.label for s in rivals])
        said.append(f"No difference between the defenses that {which} is clear: {names}.")
    elif close:
        said.append(f"Not clearly separated from it: {_join([s.group.label for s in close])}.")
    return said


def _lower(winner: Standing, standings: Sequence[Standing], outside: dict[str, ReportedRate]) -> list[str]:
    """The defenses with lower rates that fail a rule, or for which one is not clear: three each, and how many more."""
    said = []
    lower = [s for s in standings if outside[s.group.label].rate < outside[winner.group.label].rate]
    for state, start in ((FAILED, "Lower still, at a price"), (UNCLEAR, "Lower, but at a price that is not clear")):
        found = [s for s in lower if (FAILED if s.fails else UNCLEAR) == state]
        parts = [f"{s.group.label} ({rate_text(outside[s.group.label])}) {_join(s.said(state))}" for s in found[:3]]
        if len(found) > 3:
            parts.append(f"and {len(found) - 3} more")
        if parts:
            said.append(f"{start}: {'; '.join(parts)}.")
    return said


def _caveats(
    groups: Sequence[RunGroup], none: RunGroup | None, defended: Sequence[RunGroup], winner: Standing | None
) -> list[str]:
    said = []
    if none and winner and winner.narrow is None:
        said.append("Keeping the narrow task could not be judged.")
    if none and winner and winner.benign is None:
        learned = none.metrics.get("benign_learned")
        why = "no defense did not learn it either" if learned else "no benign run was evaluated"
        said.append(f"Keeping a benign task could not be judged: {why}.")
    seeds = {run.seed for g in groups if not g.base for run in g.runs}
    if 0 < len(seeds) < 3:
        count = "one seed was" if len(seeds) == 1 else f"{len(seeds)} seeds were"
        said.append(f"Only {count} trained, so the spread over seeds is hardly measured.")
    return said


def rate_text(rate: ReportedRate) -> str:
    """`8.3 % [5.1, 12.0]`; breaks only before the bracket."""
    return f"{unbroken(percent(rate.rate))} {unbroken(limits(rate.low, rate.high))}"


def _whole(share: float) -> str:
    return unbroken(percent(share, 0))


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
