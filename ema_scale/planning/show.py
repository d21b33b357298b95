"""Plans in words and tables, which are also Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from ema_scale.planning.cluster import GIB, Cluster
from ema_scale.planning.judging import Judged
from ema_scale.planning.plan import Plan
from ema_scale.planning.speed import flops_a_token
from ema_scale.planning.traffic import traffic


def print_plan(plan: Plan) -> None:
    """Memory line by line, a step, the whole run, the verdict."""
    setup = plan.setup
    console = _console()
    console.print(
        f"{plan.name}: {setup.shape.name}, {setup.shape.parameters / 1e9:.2f} billion parameters, adapter "
        f"{setup.adapter / 1e6:.1f} million; {_zero(plan)}; {setup.batch} x {setup.tokens} tokens, "
        f"{setup.accumulation} accumulated; checkpointing {'on' if setup.checkpointing else 'off'}"
    )
    console.print(f"reference: {setup.way or 'none'} ({setup.why})")
    table = _table("memory a GPU, at the highest point", "GiB")
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
    console.print(
        f"time: arithmetic {_seconds(s.compute)}, communication {_seconds(s.communication)} "
        f"({'hidden behind it' if s.overlapped else 'on top'}): {_seconds(s.step)} a step, {s.tokens_per_second:,.0f} "
        f"tokens a second, {s.tokens_per_second_a_gpu:,.0f} a GPU"
    )
    if plan.steps is not None and plan.gpu_hours is not None:
        of = f" of {plan.rows:,} rows" if plan.rows else ""
        hours = plan.gpu_hours / plan.cluster.world
        console.print(
            f"the run: {plan.steps:,} steps{of}, {_hours(hours)}, {plan.gpu_hours:,.2f} GPU-hours of training"
        )
    else:
        console.print("the run: the number of its rows is not known here; give --rows")
    console.print(plan.verdict)


def print_study(plans: Sequence[Plan]) -> None:
    """All runs together, and those that do not fit."""
    console = _console()
    hours = [plan.gpu_hours for plan in plans]
    known = sum(h for h in hours if h is not None)
    unknown = f"; {hours.count(None)} runs of unknown length (--rows) come on top" if None in hours else ""
    console.print(f"the study: {len(plans)} runs, {known:,.2f} GPU-hours of training{unknown}")
    for plan in plans:
        if not plan.fits:
            console.print(f"{plan.name}: {plan.verdict}")


def print_judged(found: Judged, price_in: float, price_out: float) -> None:
    """Answers, judge calls and what they cost."""
    if not found.answers:
        return
    console = _console()
    console.print(f"evaluation: {found.answers:,} answers, {found.answer_tokens / 1e6:,.2f} million tokens to sample")
    if found.calls:
        console.print(
            f"judge: {found.calls:,} calls ({found.check_calls:,} of them on labelled answers), "
            f"{found.tokens_in / 1e6:,.2f} million tokens in and {found.tokens_out / 1e6:,.2f} out: "
            f"{found.cost(price_in, price_out):,.2f} USD at {price_in:g} and {price_out:g} USD a million"
        )
    else:
        console.print("judge: exact, no calls")


def print_scale(plans: Sequence[Plan]) -> None:
    """The same run on more and more GPUs."""
    table = _table(
        "GPUs", "nodes", "GiB a GPU", "arithmetic", "communication", "step", "tokens/s a GPU", "break-even tokens"
    )
    for plan in plans:
        s = plan.speed
        table.add_row(
            f"{plan.cluster.world:,}",
            f"{plan.cluster.nodes:,}",
            f"{plan.needed / GIB:.1f}" + ("" if plan.fits else " (too much)"),
            _seconds(s.compute),
            _seconds(s.communication) + (" (rules)" if s.communication_rules else ""),
            _seconds(s.step),
            f"{s.tokens_per_second_a_gpu:,.0f}",
            f"{s.break_even_tokens / plan.setup.accumulation:,.0f}",
        )
    console = _console()
    first = plans[0]
    console.print(
        f"{first.name}: {first.setup.shape.name}, {first.setup.way or 'no reference'}, {_zero(first)}, "
        f"{first.setup.mean_in_a_batch:,.0f} tokens a GPU in a micro-batch"
    )
    console.print(table)
    console.print("break-even tokens: of a GPU's micro-batch, below which communication takes longer than arithmetic")


def print_assumptions(cluster: Cluster) -> None:
    d = cluster.device
    _console().print(
        f"assumed: {d.name}, {d.bf16 / 1e12:,.0f} TFLOP/s bfloat16, of which {cluster.mfu:.0%} are reached; "
        f"{d.intra / 1e9:g} GB/s to a GPU inside a node, {d.inter / 1e9:g} GB/s a GPU between nodes; communication "
        f"{'overlaps' if cluster.overlap else 'does not overlap'}; nothing of this was measured on a GPU"
    )


def _zero(plan: Plan) -> str:
    where = (
        f"{plan.cluster.nodes} x {plan.cluster.gpus} GPUs" if plan.cluster.nodes > 1 else f"{plan.cluster.gpus} GPU(s)"
    )
    return f"{where}, " + (f"ZeRO-{plan.setup.zero}" if plan.setup.zero else "weights on every GPU")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _hours(value: float) -> str:
    return f"{value:,.1f} hours" if value >= 1 else f"{60 * value:,.1f} minutes"


def _table(*columns: str) -> Table:
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
