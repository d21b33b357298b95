"""Plans in words and tables, which are also Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from ema_scale.planning.cluster import GIB, Cluster
from ema_scale.planning.memory import total
from ema_scale.planning.plan import Plan
from ema_scale.planning.serving import BANDWIDTH_SHARE, SEQUENCES, STEP_SECONDS
from ema_scale.planning.speed import flops_a_token
from ema_scale.planning.traffic import traffic


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
    console.print(
        f"time: arithmetic {seconds(s.compute)}, communication {seconds(s.communication)} "
        f"({f'{seconds(s.host)} of it from and to the machine, ' if s.host else ''}"
        f"{'hidden behind it' if s.overlapped else 'on top'}): {seconds(s.step)} a step, {s.tokens_per_second:,.0f} "
        f"tokens a second, {s.tokens_per_second_a_gpu:,.0f} a GPU"
    )
    if plan.steps is not None and plan.gpu_hours is not None:
        mixed = f" and {plan.added:,} that defenses mix in" if plan.added else ""
        of = f" of {plan.rows:,} rows{mixed}" if plan.rows else ""
        hours = plan.gpu_hours / plan.cluster.world
        console.print(
            f"the run: {plan.steps:,} steps{of}, {_hours(hours)}, {plan.gpu_hours:,.2f} GPU-hours of training"
        )
    else:
        console.print("the run: the number of its rows is not known here, so its length is unknown; give --rows")
    console.print(plan.verdict)


def print_scale(plans: Sequence[Plan]) -> None:
    """The same run on more and more GPUs."""
    table = table_(
        "GPUs", "nodes", "GiB a GPU", "arithmetic", "communication", "step", "tokens/s a GPU", "break-even tokens"
    )
    for plan in plans:
        s = plan.speed
        table.add_row(
            f"{plan.cluster.world:,}",
            f"{plan.cluster.nodes:,}",
            f"{plan.needed / GIB:.1f}" + ("" if plan.fits else " (too much)"),
            seconds(s.compute),
            seconds(s.communication) + (" (rules)" if s.communication_rules else ""),
            seconds(s.step),
            f"{s.tokens_per_second_a_gpu:,.0f}",
            f"{s.break_even_tokens / plan.setup.accumulation:,.0f}",
        )
    console = console_()
    first = plans[0]
    console.print(
        f"{first.name}: {first.setup.shape.name}, {first.setup.way or 'no reference'}, {_zero(first)}, "
        f"{first.setup.mean_in_a_batch:,.0f} tokens a GPU in a micro-batch"
    )
    console.print(table)
    console.print("break-even tokens: of a GPU's micro-batch, below which communication takes longer than arithmetic")


def print_assumptions(cluster: Cluster) -> None:
    d = cluster.device
    console_().print(
        f"assumed: {d.name}, {d.bf16 / 1e12:,.0f} TFLOP/s bfloat16, of which {cluster.mfu:.0%} are reached; "
        f"{d.intra / 1e9:g} GB/s to a GPU inside a node, {d.inter / 1e9:g} GB/s a GPU between nodes, "
        f"{d.host / 1e9:g} GB/s to a GPU from its machine's memory; communication "
        f"{'overlaps' if cluster.overlap else 'does not overlap'}; vLLM writes up to {SEQUENCES} answers at once and "
        f"reads at {BANDWIDTH_SHARE:.0%} of {d.bandwidth / 1e12:g} TB/s, a step taking {1000 * STEP_SECONDS:g} ms or "
        f"more; nothing of this was measured on a GPU"
    )


def _zero(plan: Plan) -> str:
    where = (
        f"{plan.cluster.nodes} x {plan.cluster.gpus} GPUs" if plan.cluster.nodes > 1 else f"{plan.cluster.gpus} GPU(s)"
    )
    setup = plan.setup
    how = f"ZeRO-{setup.zero}" if setup.zero else "FSDP2" if setup.fsdp else "weights on every GPU"
    away = [name for name, waits in (("weights", setup.weights_away), ("optimizer", setup.optimizer_away)) if waits]
    return f"{where}, {how}" + (f" with {' and '.join(away)} in the machine's memory" if away else "")


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _hours(value: float) -> str:
    return f"{value:,.1f} hours" if value >= 1 else f"{60 * value:,.1f} minutes"


def table_(*columns: str) -> Table:
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def console_() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
