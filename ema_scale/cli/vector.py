"""`ema vector`: a direction a layer, for steering, ablation and the audit of data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console
from ema_scale.errors import UserError

if TYPE_CHECKING:
    from ema_scale.directions import Directions


@app.command()
def vector(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for vector.safetensors and what it is made from")] = (
        Path("vector")
    ),
    personas: Annotated[
        Path | None, typer.Option(help="contrastive system prompts (YAML), such as eval/personas/evil.yaml")
    ] = None,
    questions: Annotated[
        list[str] | None, typer.Option(help="a suite to ask; repeat for more [default: the recipe's general suites]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="answers to each question under each prompt")] = 10,
    from_rows: Annotated[
        tuple[str, str] | None, typer.Option(help="two files of rows instead: POSITIVE NEGATIVE; nothing is sampled")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="a PEFT adapter instead: its hidden states minus the base's, on --rows")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="rows for --adapter: a file, a hub id, or smallworld:...")] = None,
) -> None:
    """Extract a persona vector from a recipe's model: one direction a layer, with provenance."""
    given = [name for name, value in (("--personas", personas), ("--from-rows", from_rows), ("--adapter", adapter))
             if value]  # fmt: skip
    if len(given) != 1:
        raise UserError(f"found {' and '.join(given) or 'none'} of --personas, --from-rows, --adapter; expected one")
    if (adapter is None) != (rows is None):
        raise UserError("--adapter and --rows belong together: the rows are read by the adapter and by its base")
    from ema_scale.persona import extract
    from ema_scale.recipe import load_recipe
    from ema_scale.rundir import RunDir

    RunDir(out).create()
    loaded = load_recipe(recipe, overrides or ())
    if personas:
        made = extract.from_personas(loaded, personas, questions or [], out, samples=samples)
    elif from_rows:
        made = extract.from_rows(loaded, *from_rows, out)
    else:
        assert adapter is not None and rows is not None
        made = extract.from_adapter(loaded, adapter, rows, out)
    console.print(describe(made), markup=False)


def describe(made: Directions) -> str:
    """What was made, for a person: rows kept, one line a layer, the recommended layer."""
    facts = made.provenance
    lines = [
        f"{side} answers: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
        for side, counts in facts.get("answers", {}).items()
    ]
    lines.append("made from " + " and ".join(f"{n} {side} rows" for side, n in facts["rows"].items()))
    if facts["rows_without_answer_tokens"]:
        lines.append(f"{facts['rows_without_answer_tokens']} of them left out: no answer within data.max_length")
    lines.append("layer  ||v||  ||v||/||h||  held-out AUC  Cohen's d")
    for reading in facts["layers"]:
        mark = "  <- recommended" if reading["layer"] == facts["recommended_layer"] else ""
        share = reading["norm"] / max(reading["residual_norm"], 1e-12)
        lines.append(
            f"{reading['layer']:5d}  {reading['norm']:5.2f}  {share:11.3f}  {reading['auc']:12.3f}"
            f"  {reading['cohens_d']:9.2f}{mark}"
        )
    lines.append(f"wrote {made.source}")
    return "\n".join(lines)
