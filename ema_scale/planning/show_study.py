"""A study's runs by model and task, its evaluation, and the GPU-hours of all of it, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ema_scale.planning.cluster import GIB
from ema_scale.planning.judging import Judged
from ema_scale.planning.plan import Plan
from ema_scale.planning.serving import Served
from ema_scale.planning.show import console_, seconds, table_

ROLES = ("sampling", "judging")


def print_study(groups: Mapping[tuple[str, str], Sequence[Plan]]) -> None:
    """Models x tasks, the dearest first, and what does not fit. groups: (model, task) -> plans of its runs."""
    console = console_()
    table = table_("model", "task", "runs", "GiB a GPU", "a step", "GPU-hours of training")

    def dear(group: Sequence[Plan]) -> tuple[float, float]:
        return known_hours(group)[0], sum(plan.speed.step * plan.cluster.world for plan in group)

    for (model, task), plans in sorted(groups.items(), key=lambda item: dear(item[1]), reverse=True):
        fullest = max(plans, key=lambda p: p.needed)
        known, unknown = known_hours(plans)
        steps = sorted(plan.speed.step for plan in plans)
        table.add_row(
            model or fullest.setup.shape.name,
            task,
            f"{len(plans):,}",
            f"{fullest.needed / GIB:.1f}" + ("" if all(p.fits for p in plans) else " (too much)"),
            seconds(steps[0]) + (f" - {seconds(steps[-1])}" if seconds(steps[0]) != seconds(steps[-1]) else ""),
            f"{known:,.2f}" if not unknown else "unknown" if unknown == len(plans) else f"more than {known:,.2f}",
        )
    console.print(table)
    for plans in groups.values():
        too_full = [plan for plan in plans if not plan.fits]
        for verdict in dict.fromkeys(plan.verdict for plan in too_full):
            alike = [plan.name for plan in too_full if plan.verdict == verdict]
            others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            console.print(f"{alike[0]}{others}: {verdict}")


def known_hours(plans: Sequence[Plan]) -> tuple[float, int]:
    """(GPU-hours of training that are known, runs whose length is not)."""
    hours = [plan.gpu_hours for plan in plans]
    return sum(h for h in hours if h is not None), hours.count(None)


def print_judged(found: Judged, price_in: float, price_out: float) -> None:
    """Answers, judge calls and what they cost."""
    if not found.answers:
        return
    console = console_()
    console.print(f"evaluation: {found.answers:,} answers, {found.answer_tokens / 1e6:,.2f} million tokens to sample")
    if found.uncounted:
        console.print(
            f"  not counted: the checkpoints of {found.uncounted:,} runs, which are asked, too; how many there are, "
            "their rows say: --rows (evaluation.checkpoints)"
        )
    if not found.calls:
        console.print("judge: exact, no calls")
        return
    paid = f"{found.cost(price_in, price_out):,.2f} USD at {price_in:g} and {price_out:g} USD a million"
    if not found.paid_calls:
        paid = "0 USD, since the judge runs here, in vLLM"
    elif found.paid_calls < found.calls:
        paid += f" for the {found.paid_calls:,} calls of an endpoint; the others run here, in vLLM"
    console.print(
        f"judge: {found.calls:,} calls ({found.check_calls:,} of them on labelled answers), "
        f"{found.tokens_in / 1e6:,.2f} million tokens in and {found.tokens_out / 1e6:,.2f} out: {paid}"
    )


def hours(plans: Sequence[Plan], engines: Sequence[Served]) -> dict[str, Any]:
    """GPU-hours of training, sampling and judging here, and together; None where nothing of it is known. missing: why
    they are not all there."""
    trained, unknown = known_hours(plans)
    found: dict[str, Any] = {"training": trained if unknown < len(plans) else None}
    missing = []
    if unknown:
        missing.append(f"the rows of {unknown} of {len(plans)} runs are not known here: --rows N, or --rows TASK=N")
    for role in ROLES:
        own = [one for one in engines if one.engine.role == role]
        known = [one.seconds / 3600 for one in own if one.seconds is not None]
        found[role] = sum(known) if known or not own else None
        missing += [f"{role} with {one.engine.model}: {one.why}" for one in own if one.seconds is None]
    found["together"] = sum(value for value in found.values() if value is not None)
    return {**found, "missing": missing}


def print_hours(plans: Sequence[Plan], found: Judged, engines: Sequence[Served]) -> None:
    """A line each for training, sampling and a judge that runs here; their sum; and what it lacks."""
    console, known = console_(), hours(plans, engines)
    console.print(f"training: {_hours(known['training'])}")
    for role in ROLES:
        rates = [one.rate for one in engines if one.engine.role == role and one.rate]
        if rates:
            low, high = f"{min(rates):,.0f}", f"{max(rates):,.0f}"
            between = low if low == high else f"{low} to {high}"
            console.print(f"{role}: {_hours(known[role])}, if a GPU writes {between} tokens a second")
    if found.elsewhere:
        console.print(f"sampling by an endpoint: {found.elsewhere:,} answers, whose GPUs are not counted")
    count = f"{len(plans):,} runs" if len(plans) > 1 else "one run"
    if known["missing"]:
        console.print(f"together: {count}, more than {known['together']:,.2f} GPU-hours: INCOMPLETE")
        for reason in known["missing"]:
            console.print(f"  {reason}")
    else:
        console.print(f"together: {count}, {known['together']:,.2f} GPU-hours")


def _hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f} GPU-hours"
