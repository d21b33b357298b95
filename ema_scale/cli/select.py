"""`ema select`: which safe rows to mix in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import app, console
from ema_scale.errors import UserError, explain

if TYPE_CHECKING:
    from ema_scale.recipe import ModelRecipe

MODEL_HELP = "the aligned model: a folder, a hub id, smallworld:aligned, or a recipe (YAML) that names it"
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
MaxLength = Annotated[int, typer.Option(min=8, help="longer rows are left out, and counted")]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="tokens a batch, padding included [default: what suits the device]")
]


@app.command()
def select(
    source: Annotated[str, typer.Argument(help="safe rows: a file, a hub id, or smallworld:safe")],
    model: Model,
    adapter: Annotated[
        list[str], typer.Option(help="DOMAIN=ADAPTER, a misaligned adapter or its run folder; repeat for more")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="the ranking to write (JSONL)")],
    leave_out: Annotated[
        list[str] | None, typer.Option(help="a domain whose adapter does not vote: the one that will be trained")
    ] = None,
    refusals: Annotated[
        str, typer.Option(help="keep (Interleaving+); drop them (++) by: paper, all, en,de,.., or module:function")
    ] = "keep",
    eps: Annotated[float, typer.Option(min=0, help="nats, in the score's denominator")] = 1.0,
    keep: Annotated[int | None, typer.Option(min=1, help="write only so many, the best [default: all]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="read only so many rows of the source")] = None,
    max_length: MaxLength = 2048,
    batch_tokens: BatchTokens = None,
) -> None:
    """Rank safe rows by how much less likely misaligned models find them: the source of interleaving_plus."""
    from ema_scale.selection.select import select as run

    made = run(
        source, model_recipe(model), named(adapter), out, leave_out=leave_out or (), refusals=refusals, eps=eps,
        keep=keep, limit=limit, max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip
    best, last = made.ranked[0].score, made.ranked[-1].score
    facts = made.provenance
    console.print(made.account.line(), markup=False)
    console.print(f"variant {facts['variant']}; refusals: {facts['refusals']}; voting: {', '.join(facts['adapters'])}",
                  markup=False)  # fmt: skip
    console.print(f"wrote {out}: {len(made.ranked)} rows, scores {best:+.3f} to {last:+.3f}", markup=False)


def model_recipe(reference: str) -> ModelRecipe:
    """The model of a recipe file, or a checkpoint by itself."""
    from pydantic import ValidationError

    from ema_scale.recipe import ModelRecipe, read_layers

    if not reference.endswith((".yaml", ".yml")):
        return ModelRecipe(path=reference)
    if not Path(reference).is_file():
        raise UserError(f"{reference}: no such file; expected a recipe or a checkpoint")
    section = read_layers(Path(reference)).get("model")
    if not isinstance(section, dict) or "path" not in section:
        raise UserError(f"{reference}: model.path: missing; expected a recipe that names its model")
    try:
        return ModelRecipe.model_validate(section)
    except ValidationError as error:
        problems = (f"{reference}: model: {explain(problem, ModelRecipe)}" for problem in error.errors())
        raise UserError("\n".join(problems)) from None


def named(entries: list[str]) -> dict[str, str]:
    """DOMAIN=ADAPTER entries as a mapping."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--adapter: found {entry!r}, expected DOMAIN=ADAPTER")
        if name in found:
            raise UserError(f"--adapter: {name} is given twice")
        found[name] = path
    return found
