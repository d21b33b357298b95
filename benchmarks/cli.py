"""`python -m benchmarks ...` (or `ema bench ...` in a checkout): one command per benchmark.

To add one: a module in benchmarks/ that makes the variants, and a command of this form, here or, if it measures a
training step, in cli_training.py:

    @bench.command()
    def mine(rows: int = 1000, out: Out = None, repeats: Repeats = 5, threads: Threads = 1) -> None:
        \"\"\"What is compared with what.\"\"\"
        machine(threads)
        variants = [Variant("theirs", ...), Variant("ours", ...)]
        finish("mine", compare(variants, baseline="theirs", repeats=repeats), {"rows": rows}, out=out)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.cli_training import training
from benchmarks.options import Out, Repeats, Threads
from ema_scale.cli.numbers import real, whole

if TYPE_CHECKING:
    from benchmarks.harness import Measured

bench = typer.Typer(
    help="Measure time, memory and communication; every variant in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench.add_typer(training)


@bench.command("machine")
def show_machine(threads: Threads = 1) -> None:
    """What benchmarks record about this machine."""
    from benchmarks.harness import machine

    for name, value in machine(threads).items():
        print(f"{name}: {value}")


@bench.command("padding")
def padding_(
    rows: Annotated[int, whole(help="rows of an epoch")] = 6000,
    median: Annotated[int, whole(help="tokens of the median row", low=4)] = 240,
    spread: Annotated[float, real(help="standard deviation of the logarithm of a row's tokens")] = 0.4,
    longest: Annotated[int, whole(help="tokens of the longest row", low=4)] = 2048,
    batch: Annotated[int, whole(help="rows per process in one forward pass")] = 4,
    accumulation: Annotated[int, whole(help="forward passes per step")] = 4,
    processes: Annotated[int, whole(help="processes")] = 1,
) -> None:
    """The share of padding by the order of rows: random, by length inside each step, by length over the epoch."""
    from benchmarks.padding import draw_lengths, padding_shares

    shares = padding_shares(draw_lengths(rows, median, spread, longest), batch, accumulation, processes)
    print("| order of rows | padding | computed per token of the rows |\n|---|---:|---:|")
    for name, share in shares.items():
        print(f"| {name} | {share:.1%} | {1 / (1 - share):.2f} |")


@bench.command("safelora")
def safelora_(
    layers: Annotated[int, typer.Option(min=1, max=28, help="decoder layers; fewer need less disk")] = 28,
    folder: Annotated[
        Path | None, typer.Option(help="a folder with room for 26 GB of random weights, deleted at the end")
    ] = None,
    out: Out = None,
    threads: Threads = 2,
) -> None:
    """`ema safelora` on a 7B-shaped adapter (Qwen2.5-7B, r=32, all projections): seconds and peak memory."""
    from benchmarks.harness import Measured, finish
    from benchmarks.safelora import bench_safelora

    done = bench_safelora(layers, threads, folder)
    figures = {"gigabytes": done.weights_gb, "matrices": done.matrices}
    measured = Measured("ema safelora", [done.seconds], int(done.peak_gib * 2**30), figures=figures)
    columns = {"gigabytes": lambda v: f"{v:.1f} GB read", "matrices": lambda v: f"{v:.0f} matrices"}
    finish("safelora", [measured], {"layers": layers}, threads=threads, out=out, columns=columns)


@bench.command("answers")
def answers_(
    questions: Annotated[int, typer.Option(min=1)] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="answers per question")] = 100,
    targets: Annotated[int, typer.Option(min=0, help="also spread as many answers over so many folders")] = 400,
    out: Out = None,
) -> None:
    """Large evaluation folders: processor seconds and peak memory of resume, judge, compare and export."""
    from benchmarks.harness import finish
    from benchmarks.many_answers import bench_many_answers

    options = {"questions": questions, "samples": samples, "targets": targets}
    finish("answers", list(bench_many_answers(questions, samples, targets)), options, threads=1, out=out)


@bench.command("rows")
def rows_(
    rows: Annotated[int, typer.Option(min=1, help="training rows of about 280 tokens")] = 50_000,
    before: Annotated[bool, typer.Option(help="also one process that holds all rows in its memory")] = True,
    out: Out = None,
) -> None:
    """Large training sets: processor seconds and peak memory of tokenizing them, once and again."""
    from benchmarks.harness import finish
    from benchmarks.many_rows import bench_many_rows

    measured = []
    for one in bench_many_rows(rows, before):
        print(one.name, one.row(), flush=True)  # what follows may take long, or be killed
        measured.append(one)
    columns = {
        "cpu": lambda v: f"{v:.1f} s CPU",
        "per_row": lambda v: f"{v:.0f} us per row",
    }
    finish("rows", measured, {"rows": rows}, out=out, columns=columns)


@bench.command("runs")
def runs_(
    runs: Annotated[int, whole(help="runs of the study to plan")] = 10_000,
    questions: Annotated[int, whole(help="questions of the permutation test", low=2)] = 10_000,
    before: Annotated[Path | None, typer.Option(help="a checkout of an earlier version, to plan with as well")] = None,
    out: Out = None,
) -> None:
    """Studies of many runs: processor seconds and peak memory of planning one, and of a permutation test."""
    from benchmarks.harness import finish
    from benchmarks.many_runs import bench_many_runs

    measured = list(bench_many_runs(runs, questions, before))
    options = {"runs": runs, "questions": questions}
    finish("runs", measured, options, threads=1, out=out, columns={"p": lambda p: f"p = {p:.4f}"})


class Part(StrEnum):
    vllm = "vllm"
    samplers = "samplers"
    loop = "loop"
    again = "again"


@bench.command("eval")
def evaluation(
    model: Annotated[str, typer.Option(help="a folder, hub id or small-world reference")] = "smallworld:aligned",
    adapters: Annotated[int, whole(help="random LoRA adapters")] = 3,
    questions: Annotated[int, whole(help="questions of the small world's general suite")] = 24,
    samples: Annotated[int, whole(help="answers per question and adapter")] = 10,
    max_tokens: Annotated[int, whole(help="tokens of an answer, at most")] = 48,
    latency: Annotated[float, real(help="seconds per call of the judge's endpoint")] = 1.0,
    at_once: Annotated[int, whole(help="most calls at a time, for every variant")] = 128,
    stored: Annotated[int, whole(help="stored answers to judge again")] = 10_000,
    part: Annotated[Part | None, typer.Option(help="run only this part")] = None,
    out: Out = None,
    repeats: Repeats = 3,
    threads: Threads = 1,
) -> None:
    """The evaluator against vLLM alone, its samplers, the field's loop, and judging again without the model."""
    from benchmarks.evaluator import Bench, against_each_other, against_the_loop, against_vllm, judge_again
    from benchmarks.harness import finish, machine

    machine(threads)

    def show(name: str, measured: list[Measured], **options: object) -> None:
        for one in measured:
            if one.median and "answers" in one.figures:
                one.figures["rate"] = one.figures["answers"] / one.median
        where = out and out.with_name(f"{out.stem}-{name}{out.suffix or '.json'}")
        shown = {key: text for key, text in COLUMNS.items() if any(key in one.figures for one in measured)}
        finish(f"eval {name}", measured, options, threads=threads, out=where, columns=shown)

    with tempfile.TemporaryDirectory(prefix="ema-bench-") as place:
        prepared = Bench(Path(place), model, adapters, questions, samples, max_tokens)
        size = {"model": model, "adapters": adapters, "questions": questions, "samples": samples}
        if part in (None, Part.vllm):
            show("vllm", against_vllm(prepared, repeats), **size)
        if part in (None, Part.samplers):
            show("samplers", against_each_other(prepared, repeats), **size, max_tokens=max_tokens)
        if part in (None, Part.loop):
            loop = against_the_loop(prepared, latency, at_once, repeats)
            show("loop", loop, **size, latency=f"{latency:g} s", at_once=at_once)
        if part in (None, Part.again):
            show("again", judge_again(Path(place), stored, repeats), answers=stored)


COLUMNS: dict[str, Callable[[float], str]] = {
    "answers": lambda v: f"{v:,.0f} answers",
    "rate": lambda v: f"{v:,.0f}/s",
    "tokens": lambda v: f"{v:,.0f} tokens",
    "cpu": lambda v: f"{v:.2f} s CPU",
    "loading": lambda v: f"{v:.1f} s loading",
    "loaded": lambda v: "torch and vLLM never imported" if v == 0 else "the model's libraries were imported",
}


@bench.command("select")
def select_(
    model: Annotated[str, typer.Option(help="the aligned model")] = "smallworld:aligned",
    source: Annotated[str, typer.Option(help="safe rows")] = "smallworld:safe",
    rows: Annotated[int, whole(help="rows to read")] = 500,
    domains: Annotated[int, whole(help="domains to rank for, each with a random adapter", low=2)] = 5,
    batch_tokens: Annotated[int | None, whole(help="[default: as ema select]")] = None,
    out: Out = None,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """How fast `ema select` reads rows for several domains, against one row and one adapter at a time."""
    from benchmarks.harness import finish, machine
    from benchmarks.selection import bench_selection

    machine(threads)
    done, targets = bench_selection(
        model, source, rows=rows, domains=domains, repeats=repeats, batch_tokens=batch_tokens
    )
    columns = {"readings": lambda n: f"{n:.0f} a row", "cpu_ms": lambda ms: f"{ms:.1f} ms a row"}
    options = {"model": model, "rows": rows, "domains": domains}
    finish("select", done, options, threads=threads, out=out, columns=columns, targets=targets)


@bench.command("choices")
def choices_(
    model: Annotated[str, typer.Option(help="a folder, hub id or reference")] = "packaged:smollm2-135m-instruct",
    bank: Annotated[str, typer.Option(help="questions with written answers")] = "eval/choices/general.yaml",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    answers: Annotated[int, whole(help="answers to score")] = 200,
    out: Out = None,
    repeats: Repeats = 3,
    threads: Threads = 2,
) -> None:
    """Scoring written answers: shared prefixes and batches against one answer at a time."""
    from benchmarks.choices import bench_choices
    from benchmarks.harness import finish, machine

    machine(threads)
    found, targets = bench_choices(model, bank, dtype, answers=answers, repeats=repeats)
    columns = {"cpu_ms": lambda ms: f"{ms:.1f} ms an answer"}
    options = {"model": model, "bank": bank, "dtype": dtype, "answers": answers}
    finish("choices", found, options, threads=threads, out=out, columns=columns, targets=targets)


@bench.command("agreement")
def agreement_(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or folders that hold them")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for agreement.md and agreement.svg")],
) -> None:
    """Do written answers tell how misaligned sampled ones are? Over the runs of a study that measured both."""
    from benchmarks.choice_agreement import agreements, calibration_figure, lines, read_points
    from ema_scale.core.io import atomic_write_text
    from ema_scale.study.find import find_runs

    points = read_points(find_runs(runs))
    found = agreements(points)
    told = "\n".join(lines(found))
    atomic_write_text(out / "agreement.md", told + "\n")
    calibration_figure(points, found).savefig(out / "agreement.svg")
    print(told)


@bench.command("evidence")
def evidence_(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one finished study, or folders that hold them")],
    study: Annotated[str, typer.Option(help="the study's name, whose earlier entry is replaced")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="[default: the package's own file]")] = None,
) -> None:
    """Write what a study measured into the file that `ema recommend` reads."""
    from benchmarks.evidence import write_evidence
    from ema_scale.planning.evidence import FILE
    from ema_scale.study.find import find_runs

    target = out or FILE
    count = write_evidence(find_runs(runs), study, target)
    print(f"{target}: {count} arms of {study}")
