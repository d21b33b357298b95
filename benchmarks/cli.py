"""`python -m benchmarks ...` (or `ema bench ...` in a checkout): one command per benchmark.

To add one: a module in benchmarks/ that makes the variants, and here a command of this form:

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
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.numbers import real, whole
from ema_scale.core.errors import UserError
from ema_scale.core.paths import find_file

if TYPE_CHECKING:
    from benchmarks.harness import Measured

bench = typer.Typer(
    help="Measure time, memory and communication; every variant in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Out = Annotated[Path | None, typer.Option("--out", "-o", help="write all figures to this JSON file")]
Repeats = Annotated[int, whole(help="timed runs of every variant")]
Threads = Annotated[int, whole(help="CPU threads per process")]


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
    out: Out = None,
) -> None:
    """Large training sets: processor seconds and peak memory of tokenizing them, once and again."""
    from benchmarks.harness import finish
    from benchmarks.many_rows import bench_many_rows

    measured = []
    for one in bench_many_rows(rows):
        print(one.name, one.row(), flush=True)  # what follows may take long, or be killed
        measured.append(one)
    columns = {
        "cpu": lambda v: f"{v:.1f} s CPU",
        "per_row": lambda v: f"{v:.0f} us per row",
        "million": lambda v: f"{v:.2f} GB at 1M rows",
    }
    finish("rows", measured, {"rows": rows}, out=out, columns=columns)


Model = Annotated[str, typer.Option(help="a shape: small, qwen2.5-0.5b, ... llama-3.1-70b")]
Layers = Annotated[int | None, whole(help="use only the first N layers")]
Length = Annotated[int, whole(help="tokens per row", low=2)]
Checkpointing = Annotated[bool, typer.Option(help="gradient checkpointing")]
Strength = Annotated[float, real(help="the defense's strength; 0: without it")]
Only = Annotated[
    list[str] | None, typer.Option("--variant", help="run plain and this one alone; repeat for more (first words do)")
]
ZERO3_CPU = "launch/deepspeed/zero3_cpu.json"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Direction(StrEnum):
    policy_reference = "policy_reference"
    reference_policy = "reference_policy"
    jensen_shannon = "jensen_shannon"


@bench.command("loss")
def loss_(
    tokens: Annotated[int, whole()] = 2048,
    vocab: Annotated[int, whole(low=2)] = 32_000,
    hidden: Annotated[int, whole()] = 512,
    dtype: Dtype = Dtype.float32,
    direction: Direction = Direction.policy_reference,
    device: Device = Device.cpu,
    full: Annotated[
        bool, typer.Option("--full", help="8,192 tokens of Qwen2.5-7B's head in bfloat16, each variant once, alone")
    ] = False,
    out: Out = None,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """Cross-entropy + KL by full logits, by Liger and fused: time, peak memory, error to float64."""
    from benchmarks.harness import finish, machine
    from benchmarks.loss import FULL, Shape, bench_loss

    machine(threads)
    shape = Shape(tokens, vocab, hidden, dtype.value, direction.value, device.value)
    if full:
        shape = replace(FULL, direction=direction.value, device=device.value)
    measured, targets = bench_loss(shape, repeats=repeats, each_alone=full)
    shown = ["error", *(name for one in measured[:1] for name in one.figures if name.startswith("value"))]
    columns = {"cpu": lambda v: f"{v:.2f} s of CPU", **{name: lambda v: f"{v:.1e}" for name in shown}}
    finish("loss", measured, vars(shape), threads=threads, out=out, columns=columns, targets=targets)


@bench.command("step")
def step_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per step")] = 2,
    length: Length = 128,
    steps: Annotated[int, whole(help="timed steps per repeat")] = 5,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    variant: Only = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="run plain, and this defense alone: a kind, or {kind: kl, strength: 1}; repeat for more"),
    ] = None,
    out: Out = None,
    repeats: Repeats = 3,
    threads: Threads = 1,
) -> None:
    """A LoRA step against plain fine-tuning: time and peak memory. By default with KL + LDIFS, for each kind of
    reference; with --defense, under each defense."""
    from benchmarks.harness import finish, machine, seconds
    from benchmarks.phases import PHASES
    from benchmarks.step import bench_step
    from benchmarks.training_variants import PLAIN, VARIANTS, WITH, Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    variants = (PLAIN,) if defense and not variant else chosen(variant, VARIANTS)
    variants = (*variants, *(WITH + spec for spec in defense or ()))
    measured, targets, floor = bench_step(task, repeats=repeats, variants=variants)
    columns = {
        "cpu": lambda v: f"{v:.2f}x",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
        **dict.fromkeys(PHASES, seconds),
    }
    options = {**task.shown(), "arithmetic floor": f"{floor:.2f}x"}
    finish("step", measured, options, threads=threads, out=out, columns=columns, targets=targets)


@bench.command("reference")
def reference_(
    processes: Annotated[int, whole(low=2)] = 2,
    deepspeed: Annotated[str, typer.Option(help="a ZeRO config; none: DDP")] = ZERO3_CPU,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="FSDP2 in place of ZeRO-3")] = False,
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per step and process")] = 1,
    length: Length = 128,
    steps: Annotated[int, whole(help="timed steps")] = 3,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    checkpointing: Checkpointing = True,
    kl: Strength = 0.1,
    ldifs: Strength = 0.1,
    variant: Only = None,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Bytes gathered and reduced in a step of KL + LDIFS on several processes, for each kind of reference."""
    from benchmarks.harness import finish, machine, mebibytes
    from benchmarks.reference import VARIANTS, bench_reference
    from benchmarks.training_variants import Task, chosen

    machine(threads)
    task = Task(model, layers, rows, length, steps, dtype.value, device.value, checkpointing, kl, ldifs)
    if fsdp:
        task = replace(task, fsdp=True)
    elif deepspeed != "none":
        task = replace(task, deepspeed=str(_config(deepspeed)))
    measured, targets = bench_reference(task, processes=processes, variants=chosen(variant, VARIANTS))
    columns = {
        "gathered": lambda v: f"{mebibytes(v)} gathered",
        "traffic": lambda v: f"{v:.2f}x",
        "calls": lambda v: f"{v:.0f} calls",
        "reduced": lambda v: f"{mebibytes(v)} reduced",
        "memory": lambda v: f"{v:.2f}x",
        "reference": lambda v: f"{v:.0%} of the time",
    }
    finish("reference", measured, {"processes": processes, **task.shown()}, threads=threads, out=out, columns=columns,
           targets=targets)  # fmt: skip


def _config(name: str) -> Path:
    """A DeepSpeed config of the user's or of the checkout. Raises UserError if there is none."""
    path = find_file(name)
    if path.is_file():
        return path
    raise UserError(
        f"--deepspeed: no file {name} in {Path.cwd()} or beside the package; expected a DeepSpeed JSON config, such as "
        "launch/deepspeed/zero3_cpu.json of the repository, or none for DDP"
    )


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


@bench.command("plan")
def plan_(
    model: Model = "small",
    layers: Layers = None,
    rows: Annotated[int, whole(help="rows per micro-batch")] = 4,
    length: Length = 128,
    dtype: Dtype = Dtype.float32,
    device: Device = Device.cpu,
    only: Annotated[str, typer.Option(help="cases whose name contains this")] = "",
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """The memory that `ema plan` predicts, against the peak of torch's allocator in a step, case by case."""
    import tempfile

    from benchmarks.harness import finish, machine, mebibytes
    from benchmarks.plan import bench_plan
    from benchmarks.training_variants import Task

    machine(threads)
    task = Task(model, layers, rows, length, steps=2, dtype=dtype.value, device=device.value)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as cache:
        measured, targets = bench_plan(task, cache, only=only)
    columns = {"planned": lambda v: f"{mebibytes(v)} planned", "off": lambda v: f"{v:+.1%}"}
    finish("plan", measured, task.shown(), threads=threads, out=out, columns=columns, targets=targets)


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
