"""Plans in words and tables, which are also Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from ema_scale.core.terminal import PlainConsole
from ema_scale.core.text import format_bytes, quantity
from ema_scale.core.text import format_hours as hours_text
from ema_scale.core.text import format_seconds as seconds
from ema_scale.planning.arithmetic import LAUNCH_SECONDS, MATMUL_SHARE, flops_a_token, padding
from ema_scale.planning.eval_cost import BANDWIDTH_SHARE, SEQUENCES, STEP_SECONDS, JudgingCost, Served
from ema_scale.planning.memory import GIB, total
from ema_scale.planning.plan import Plan
from ema_scale.planning.speed import Cluster, traffic


def print_plan(plan: Plan) -> None:
    """Memory line by line, a step, the whole run, the verdict."""
    setup = plan.setup
    console = console_()
    console.print(
        f"{plan.name}: {setup.shape.name}, {setup.shape.parameters / 1e9:.2f} billion parameters, adapter "
        f"{setup.adapter / 1e6:.1f} million; {_zero(plan)}; {setup.batch} x {setup.tokens} tokens, "
        f"{setup.accumulation} accumulated; checkpointing {'on' if setup.checkpointing else 'off'}"
    )
    console.print(f"reference: {setup.way or 'none'} ({setup.why})")
    table = table_("memory a GPU, at the highest point", "GiB")
    for line in plan.lines:
        table.add_row(line.name + ("" if line.measured else " *"), f"{line.bytes / GIB:.2f}")
    table.add_row("**together**", f"**{plan.needed / GIB:.2f}**")
    console.print(table)
    console.print("* an allowance, not held against a measurement; the other lines are: ema bench plan")
    gathered, reduced = traffic(setup, plan.cluster.world).into_a_gpu(plan.cluster.world)
    s = plan.speed
    console.print(
        f"a step: {s.tokens:,.0f} tokens, {flops_a_token(setup) / 1e9:.1f} GFLOP each; a GPU takes in "
        f"{gathered / 1e9:.2f} GB of gathered weights and reduces {reduced / 1e9:.2f} GB of gradients"
    )
    if plan.host:
        parts = ", ".join(f"{line.name}: {line.bytes / GIB:.1f}" for line in plan.host)
        console.print(f"the machine's own memory: {total(plan.host) / GIB:.1f} GiB a node ({parts})")
    _print_cache(plan)
    padded = padding(setup, plan.cluster.world) if plan.cluster.mfu is None else 1.0
    console.print(
        f"arithmetic: {s.reached:.0%} of the GPU's peak"
        + (f"; {1 - 1 / padded:.0%} of what is computed is padding or waits for longer rows" if padded > 1 else "")
    )
    console.print(
        f"time: arithmetic {seconds(s.compute)}, communication {seconds(s.communication)} "
        f"({f'{seconds(s.host)} of it from and to the machine, ' if s.host else ''}"
        f"{'hidden behind it' if s.overlapped else 'on top'}): {seconds(s.step)} a step, {s.tokens_per_second:,.0f} "
        f"tokens a second, {s.tokens_per_second_a_gpu:,.0f} a GPU"
    )
    if plan.steps is not None and plan.gpu_hours is not None:
        mixed = f" and {plan.added:,} that defenses mix in" if plan.added else ""
        of = f" of {quantity(plan.rows, 'row')}{mixed}" if plan.rows else ""
        hours = plan.gpu_hours / plan.cluster.world
        console.print(
            f"the run: {quantity(plan.steps, 'step')}{of}, {hours_text(hours)}, {plan.gpu_hours:,.2f} GPU-hours of "
            "training"
        )
    else:
        console.print("the run: the number of its rows is not known here, so its length is unknown; give --rows")
    console.print(plan.verdict)


def _print_cache(plan: Plan) -> None:
    if plan.cache == 0:
        return
    size = "unknown; give --rows" if plan.cache is None else format_bytes(plan.cache)
    states = plan.setup.cached_states
    console_().print(
        f"the reference's cache on disk: {size} ({states} hidden state{'s' if states > 1 else ''} per token); runs on "
        "the same rows share it"
    )


def print_scale(plans: Sequence[Plan]) -> None:
    """The same run on more and more GPUs."""
    table = table_(
        "GPUs",
        "nodes",
        "GiB a GPU",
        "of the peak",
        "arithmetic",
        "communication",
        "step",
        "tokens/s a GPU",
        "break-even tokens",
    )
    for plan in plans:
        s = plan.speed
        table.add_row(
            f"{plan.cluster.world:,}",
            f"{plan.cluster.nodes:,}",
            f"{plan.needed / GIB:.1f}" + ("" if plan.fits else " (too much)"),
            f"{s.reached:.0%}",
            seconds(s.compute),
            seconds(s.communication) + (" (rules)" if s.communication_rules else ""),
            seconds(s.step),
            f"{s.tokens_per_second_a_gpu:,.0f}",
            f"{s.break_even_tokens / plan.setup.accumulation:,.0f}" if s.break_even_tokens else "none",
        )
    console = console_()
    first = plans[0]
    console.print(
        f"{first.name}: {first.setup.shape.name}, {first.setup.way or 'no reference'}, {_zero(first)}, "
        f"{first.setup.mean_in_a_batch:,.0f} tokens a GPU in a micro-batch"
    )
    console.print(table)
    _print_cache(first)
    console.print("break-even tokens: of a GPU's micro-batch, below which communication takes longer than arithmetic")


def print_assumptions(cluster: Cluster) -> None:
    d = cluster.device
    if cluster.mfu is not None:
        reached = f"of which {cluster.mfu:.0%} are reached"
    else:
        reached = (
            f"of which matrix products reach {MATMUL_SHARE:.0%}; the rest moves at {d.bandwidth / 1e12:g} TB/s; a "
            f"layer's pass takes {1000 * LAUNCH_SECONDS:g} ms or more"
        )
        if cluster.pace != 1:
            reached += f"; all of it times {cluster.pace:.3g}, by the step that was measured"
    hidden = {None: "overlaps, but not ZeRO-3's", True: "overlaps", False: "does not overlap"}[cluster.overlap]
    console_().print(
        f"assumed: {d.name}, {d.bf16 / 1e12:,.0f} TFLOP/s bfloat16, {reached}; "
        f"{d.intra / 1e9:g} GB/s to a GPU inside a node, {d.inter / 1e9:g} GB/s a GPU between nodes, "
        f"{d.host / 1e9:g} GB/s to a GPU from its machine's memory; communication "
        f"{hidden}; vLLM writes up to {SEQUENCES} answers at once and "
        f"reads at {BANDWIDTH_SHARE:.0%} of {d.bandwidth / 1e12:g} TB/s, a step taking {1000 * STEP_SECONDS:g} ms or "
        f"more; published throughputs back this (docs/plan.md), "
        "no measurement of this package's own"
    )


def _zero(plan: Plan) -> str:
    where = (
        f"{plan.cluster.nodes} x {plan.cluster.gpus} GPUs"
        if plan.cluster.nodes > 1
        else quantity(plan.cluster.gpus, "GPU")
    )
    setup = plan.setup
    how = f"ZeRO-{setup.zero}" if setup.zero else "FSDP2" if setup.fsdp else "weights on every GPU"
    away = [name for name, waits in (("weights", setup.weights_away), ("optimizer", setup.optimizer_away)) if waits]
    return f"{where}, {how}" + (f" with {' and '.join(away)} in the machine's memory" if away else "")


def table_(*columns: str) -> Table:
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def console_() -> PlainConsole:
    return PlainConsole(width=None if sys.stdout.isatty() else 200)


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


def print_judged(found: JudgingCost, price_in: float, price_out: float) -> None:
    """Answers, judge calls and what they cost."""
    console = console_()
    if found.scored:
        console.print(f"evaluation: {quantity(found.scored, 'written answer')} to score by likelihood")
    if not found.answers:
        return
    console.print(
        f"evaluation: {quantity(found.answers, 'answer')}, {found.answer_tokens / 1e6:,.2f} million tokens to sample"
    )
    if found.uncounted:
        console.print(
            f"  not counted: the checkpoints of {quantity(found.uncounted, 'run')}, which are asked, too; how many "
            "there are, their rows say: --rows (evaluation.checkpoints)"
        )
    if not found.calls:
        console.print("judge: exact, no calls")
        return
    paid = f"{found.cost(price_in, price_out):,.2f} USD at {price_in:g} and {price_out:g} USD a million"
    if not found.paid_calls:
        paid = "0 USD, since the judge runs here, in vLLM"
    elif found.paid_calls < found.calls:
        paid += f" for the {quantity(found.paid_calls, 'call')} of an endpoint; the others run here, in vLLM"
    console.print(
        f"judge: {quantity(found.calls, 'call')} ({found.check_calls:,} of them on labelled answers), "
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


def print_hours(plans: Sequence[Plan], found: JudgingCost, engines: Sequence[Served]) -> None:
    """A line each for training, sampling and a judge that runs here; their sum; and what it lacks."""
    console, known = console_(), hours(plans, engines)
    console.print(f"training: {_hours_of_study(known['training'])}")
    for role in ROLES:
        rates = [one.rate for one in engines if one.engine.role == role and one.rate]
        if rates:
            low, high = f"{min(rates):,.0f}", f"{max(rates):,.0f}"
            between = low if low == high else f"{low} to {high}"
            console.print(f"{role}: {_hours_of_study(known[role])}, if a GPU writes {between} tokens a second")
    if found.elsewhere:
        console.print(f"sampling by an endpoint: {quantity(found.elsewhere, 'answer')}, whose GPUs are not counted")
    count = quantity(len(plans), "run") if len(plans) > 1 else "one run"
    if known["missing"]:
        console.print(f"together: {count}, more than {known['together']:,.2f} GPU-hours: INCOMPLETE")
        for reason in known["missing"]:
            console.print(f"  {reason}")
    else:
        console.print(f"together: {count}, {known['together']:,.2f} GPU-hours")


def _hours_of_study(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.2f} GPU-hours"
