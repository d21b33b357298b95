"""`ema bench select`: reading rows under several models."""

from __future__ import annotations

from typing import Annotated

import typer

from ema_scale.cli.bench import Out, Repeats, Threads, bench


@bench.command("select")
def select_(
    model: Annotated[str, typer.Option(help="the aligned model")] = "smallworld:aligned",
    source: Annotated[str, typer.Option(help="safe rows")] = "smallworld:safe",
    rows: Annotated[int, typer.Option(min=1, help="read so many of them")] = 500,
    domains: Annotated[int, typer.Option(min=2, help="rank for so many, each with an adapter (random weights)")] = 5,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="[default: as ema select]")] = None,
    out: Out = None,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """`ema select`'s reading of rows, to rank them for several domains, against one row and one adapter at a time."""
    from ema_scale.bench.harness import finish, machine
    from ema_scale.bench.selection import bench_selection

    machine(threads)
    done, bars = bench_selection(model, source, rows=rows, domains=domains, repeats=repeats, batch_tokens=batch_tokens)
    columns = {"readings": lambda n: f"{n:.0f} a row", "cpu_ms": lambda ms: f"{ms:.1f} ms a row"}
    options = {"model": model, "rows": rows, "domains": domains}
    finish("select", done, options, threads=threads, out=out, columns=columns, bars=bars)
