"""`ema safelora`: SafeLoRA on any PEFT adapter that is trained already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import app, console
from ema_scale.cli.numbers import real, whole
from ema_scale.core.errors import UserError


@app.command()
def safelora(
    adapter: Annotated[str, typer.Argument(help="a PEFT LoRA adapter: a folder or hub id; it is not changed")],
    base: Annotated[str, typer.Option(help="the model before alignment: a folder or hub id")],
    aligned: Annotated[str, typer.Option(help="the aligned model that was fine-tuned: a folder or hub id")],
    base_revision: Annotated[str | None, typer.Option(help="branch, tag or commit of --base on the hub")] = None,
    aligned_revision: Annotated[str | None, typer.Option(help="branch, tag or commit of --aligned on the hub")] = None,
    threshold: Annotated[
        float | None, real(help="project where the cosine is at most this [default: 0.3]", low=-1, high=1)
    ] = None,
    layers: Annotated[
        int | None, whole(help="in place of --threshold: project this many matrices, lowest cosine first")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="a new folder [default: the adapter's, with -safelora]")
    ] = None,
) -> None:
    """Project a trained adapter onto the alignment subspace.

    Source: Hsu et al., arXiv 2405.16833.
    """
    if threshold is not None and layers is not None:
        raise UserError("found --threshold and --layers; expected one of them")
    if threshold is None and layers is None:
        threshold = 0.3
    from ema_scale.core.progress import Progress
    from ema_scale.defenses.safelora import summary
    from ema_scale.defenses.safelora_files import finished
    from ema_scale.defenses.safelora_projection import project_adapter
    from ema_scale.models.weights import folder_of

    source = folder_of(adapter)
    beside = str(source.resolve()) if Path(adapter).is_dir() else adapter.replace("/", "--")
    target = out or Path(f"{beside}-safelora")
    finished(target)
    with Progress("matrices", 0, unit="matrix") as progress:
        results = project_adapter(
            source,
            target,
            folder_of(base, base_revision),
            folder_of(aligned, aligned_revision),
            threshold=threshold,
            layers=layers,
            progress=progress.at,
        )
    width = max(len(result.module) for result in results)
    console.print(f"{'matrix':{width}}  {'update':>13}  rank   cosine  projected")
    for r in results:
        update = f"{r.shape[0]} x {r.shape[1]}"
        console.print(
            f"{r.module:{width}}  {update:>13}  {r.rank:>4}  {r.cosine:>7.4f}  {'yes' if r.replaced else 'no'}",
        )
    console.print(f"{summary(results)}; wrote {target}")
