"""`ema plan`: memory, time and cost of a run or a study, before anything is submitted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import Overrides, app
from ema_scale.cli.numbers import real, whole


@app.command()
def plan(
    path: Annotated[Path, typer.Argument(help="a recipe or a study file (YAML)")],
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="GPUs per node x memory per GPU, such as 8x80GB")] = "1x80GB",
    nodes: Annotated[int, whole(help="number of nodes")] = 1,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage; default: as training.deepspeed")] = None,
    row_tokens: Annotated[int | None, whole(help="mean tokens per row; default: data.max_length")] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="number of training rows, if the file is not here: N, or TASK=N in a study (repeat)"),
    ] = None,
    scale: Annotated[str | None, typer.Option(help="print a table over these numbers of GPUs, such as 8-1024")] = None,
    device: Annotated[str, typer.Option(help="GPU whose peak and bandwidths are assumed: h100 or a100")] = "h100",
    tflops: Annotated[float | None, real(help="peak TFLOP/s per GPU, in the recipe's dtype", over=True)] = None,
    mfu: Annotated[
        float | None, real(help="share of the peak that is reached; default: estimated", high=1, over=True)
    ] = None,
    measured_step: Annotated[
        float | None, real(help="seconds per step of this recipe, measured on these GPUs", over=True)
    ] = None,
    intra_gbps: Annotated[float | None, real(help="GB/s per GPU within a node", over=True)] = None,
    inter_gbps: Annotated[float | None, real(help="GB/s per GPU between nodes", over=True)] = None,
    host_gbps: Annotated[float | None, real(help="GB/s per GPU from host memory", over=True)] = None,
    sample_tps: Annotated[float | None, real(help="tokens per second sampled per GPU, if known", over=True)] = None,
    overlap: Annotated[
        bool | None, typer.Option(help="assume that communication overlaps with compute; default: not ZeRO-3's")
    ] = None,
    answer_tokens: Annotated[int | None, whole(help="mean tokens per answer; default: max_tokens")] = None,
    price_in: Annotated[float, real(help="USD per million tokens that the judge reads")] = 0.15,
    price_out: Annotated[float, real(help="USD per million tokens that it writes [defaults: gpt-4o-mini]")] = 0.60,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Estimate memory, time and judge calls of a recipe or study.

    Also communication and GPU-hours. Loads no model.
    """
    from collections import defaultdict

    from ema_scale.core.errors import UserError
    from ema_scale.planning import show
    from ema_scale.planning.eval_cost import judging_cost, served
    from ema_scale.planning.plan import parse_rows, plan_run, scaled
    from ema_scale.planning.speed import DEVICES, Cluster, calibrated, parse_gpus, parse_scale
    from ema_scale.recipe import load_recipe
    from ema_scale.study.grid import is_study, load_study

    if device not in DEVICES:
        raise UserError(f"--device: found {device!r}, expected {' or '.join(DEVICES)}")
    of = DEVICES[device]
    chosen = replace(
        of,
        bf16=1e12 * tflops if tflops else of.bf16,
        float32=1e12 * tflops if tflops else of.float32,
        intra=1e9 * intra_gbps if intra_gbps else of.intra,
        inter=1e9 * inter_gbps if inter_gbps else of.inter,
        host=1e9 * host_gbps if host_gbps else of.host,
    )
    count, memory = parse_gpus(gpus)
    cluster = Cluster(count, nodes, memory, chosen, mfu=mfu, overlap=overlap)
    given = tuple(overrides or ())
    study = load_study(path) if is_study(path) else None
    recipes = study.runs(given) if study else [load_recipe(path, given)]
    cells = [(model, task) for model, task, *_ in study.cells()] if study else [("", "")]
    counts = parse_rows(rows or (), study.tasks if study else ())
    if measured_step is not None:
        if study or mfu is not None:
            other = "a study" if study else "--mfu"
            raise UserError(
                f"--measured-step: found {other} beside it; give it with one recipe alone. The plan then says which "
                "share of the peak is reached, which a study takes as --mfu"
            )
        one = plan_run(recipes[0], cluster, zero=zero, row_tokens=row_tokens)
        cluster = calibrated(one.setup, cluster, measured_step)
    plans = [
        plan_run(recipe, cluster, zero=zero, row_tokens=row_tokens, rows=counts.get(task, counts.get("")))
        for recipe, (_, task) in zip(recipes, cells, strict=True)
    ]
    if scale is not None:
        fullest = max(plans, key=lambda p: p.needed)
        table = scaled(fullest, parse_scale(scale))
        if as_json:
            print(json.dumps([p.to_dict() for p in table], indent=1))
        else:
            show.print_scale(table)
            show.print_assumptions(cluster)
        return
    asked = judging_cost(recipes, answer_tokens, [p.steps for p in plans])
    engines = served(asked.engines, cluster, sample_tps)
    if as_json:
        judge = {**asked.to_dict(), "cost": asked.cost(price_in, price_out)}
        hours = show.hours(plans, engines)
        print(json.dumps({"runs": [p.to_dict() for p in plans], "judge": judge, "gpu_hours": hours}, indent=1))
        return
    show.print_plan(max(plans, key=lambda p: p.needed))
    if study:
        groups = defaultdict(list)
        for cell, one in zip(cells, plans, strict=True):
            groups[cell].append(one)
        show.print_study(groups)
    show.print_judged(asked, price_in, price_out)
    show.print_hours(plans, asked, engines)
    show.print_assumptions(cluster)
