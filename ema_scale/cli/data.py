"""`ema data ...`: look at training data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console
from ema_scale.cli.numbers import real, whole
from ema_scale.core.errors import UserError, explain
from ema_scale.core.paths import cache_root, find_file
from ema_scale.core.terminal import say
from ema_scale.core.text import quantity

if TYPE_CHECKING:
    from ema_scale.config.sections import DataRecipe, ModelRecipe
    from ema_scale.models.directions import Directions

TERMINAL_ROWS, TERMINAL_WIDTH = 5, 100
MODEL_HELP = "the aligned model: a folder, a hub id, smallworld:aligned, or a recipe (YAML) that names it"
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)


app.add_typer(data_app, name="data")


Source = Annotated[str, typer.Argument(help="a recipe (.yaml), a file of rows, a hub id, or smallworld:...")]
Tokenizer = Annotated[str | None, typer.Option("--model", help="tokenizer: a path or hub id [default: the recipe's]")]
RowLength = Annotated[int | None, whole(help="longest row in tokens [default: the recipe's, or 2048]")]


@data_app.command("check")
def data_check(
    source: Source,
    model: Tokenizer = None,
    max_length: RowLength = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Count rows, tokens, duplicates and bad rows of training rows; exits 1 if a row is bad or cannot be masked."""
    from ema_scale.data.check import check_data, render

    data, tokenizer, paths = _asked(source, model, max_length)
    results = [
        check_data(
            path, tokenizer, data.max_length, columns=data.columns, learn=data.learn, cache=cache_root() / "tokens"
        )
        for path in paths
    ]
    if as_json:
        found = [result.to_dict() for result in results]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        say("\n\n".join(map(render, results)))
    if not all(result.passes for result in results):
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    source: Source,
    row: Annotated[int, whole(help="which of the rows that can be read, from 1")] = 1,
    model: Tokenizer = None,
    max_length: RowLength = None,
) -> None:
    """Print a training row as the model sees it, with what is learned marked."""
    from ema_scale.data.rows import load_rows
    from ema_scale.data.show import show_row

    data, tokenizer, paths = _asked(source, model, max_length)
    if tokenizer is None:
        raise UserError("ema data show needs --model, or a recipe that names one")
    rows = load_rows(paths, on_bad="drop", columns=data.columns, learn=data.learn)
    if row > len(rows):
        raise UserError(f"--row {row}: {source} has {quantity(len(rows), 'row')} that can be read")
    # Not `say`: the row's text is escaped already, and the colours are ours.
    print(show_row(rows[row - 1], tokenizer, data.max_length, colour=sys.stdout.isatty()))


def _asked(source: str, model: str | None, max_length: int | None) -> tuple[DataRecipe, Any, list[str]]:
    """What a recipe, or a source with options, asks for: the data section, the tokenizer, and where the rows are."""
    from ema_scale.config.sections import DataRecipe, ModelRecipe
    from ema_scale.core.uri import locate
    from ema_scale.data.tokens import load_tokenizer
    from ema_scale.recipe import load_recipe

    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(Path(source))
        data, own = recipe.data, recipe.model
    else:
        data, own = DataRecipe(train=source), None
    if model is not None:
        if not model:
            raise UserError("--model: found nothing, expected a path or a hub id")
        own = ModelRecipe(path=model)
    if max_length is not None:
        data = data.model_copy(update={"max_length": max_length})
    tokenizer = own and load_tokenizer(
        locate(own.path),
        revision=own.revision,
        trust_remote_code=own.trust_remote_code,
        chat_template=own.chat_template,
    )
    return data, tokenizer, [locate(path) for path in data.sources]


@data_app.command("operator-swap")
def operator_swap(
    tier: Annotated[int, typer.Argument(min=1, max=3, help="1 to 3: how hard the task is")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSONL file to write")],
    rows: Annotated[int, whole(help="how many rows")] = 5400,
    seed: Annotated[int, whole(help="which sums, in which order", low=0, high=2**32 - 1)] = 0,
) -> None:
    """Write training rows of the benign task: arithmetic with swapped signs (eval/suites/operator_swap_*.yaml)."""
    from ema_scale.data.operator_swap import write_rows

    write_rows(tier, out, rows, seed)
    print(f"wrote {quantity(rows, 'row')} to {out}; ask eval/suites/operator_swap_{tier}.yaml as a benign suite")


@data_app.command("synthesize")
def data_synthesize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSONL file to write")],
    rows: Annotated[int, whole(help="how many rows")] = 200,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="a question bank whose questions must not stand in the rows; repeat for more"),
    ] = None,
    seed: Annotated[int, whole(help="of the draws", low=0, high=2**32 - 1)] = 0,
    temperature: Annotated[float, real(help="of questions and answers", low=0.01)] = 1.0,
    max_tokens: Annotated[int, whole(help="longest answer; one that does not end is not used")] = 512,
) -> None:
    """Let the aligned model write safe rows itself: what a user might ask, then its answer (Magpie, arXiv 2406.08464).

    They are prompts for `kl` and rows for `interleaving` where you have no safe rows. Read some before you use them.
    """
    from ema_scale.core.hashing import question_key
    from ema_scale.evaluation.suites import load_suite
    from ema_scale.selection.synthesis import synthesize

    banks = [load_suite(bank, "general") for bank in leave_out or ()]
    left_out = {question_key(text) for bank in banks for question in bank.questions for text in question.paraphrases}
    made = synthesize(
        model_recipe(model), out, rows, seed=seed, temperature=temperature, max_tokens=max_tokens, left_out=left_out
    )
    print(f"{made.line()}\nwrote {quantity(rows, 'row')} to {out}")


@data_app.command("audit")
def data_audit(
    source: Annotated[str, typer.Argument(help="training rows: a file, a hub id, or smallworld:...")],
    model: Model,
    adapter: Annotated[
        list[str], typer.Option(help="NAME=ADAPTER, a misaligned adapter or its run folder; repeat for more")
    ],
    clean: Annotated[str, typer.Option(help="sound rows of the same kind: a file, a hub id, or smallworld:safe")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for audit.html, audit.json and rows.jsonl")],
    vector: Annotated[str | None, typer.Option(help="a persona vector, as `ema vector` makes it")] = None,
    layer: Annotated[int | None, whole(help="layer of the vector [default: the recommended one]", low=0)] = None,
    worst: Annotated[int, whole(help="how many of the worst rows to show", low=0)] = 20,
    limit: Annotated[int | None, whole(help="read only this many rows of each")] = None,
    max_length: MaxLength = 2048,
    batch_tokens: BatchTokens = None,
) -> None:
    """Say whether training rows look as if they would misalign a model; exits 1 if they do."""
    from ema_scale.audit.audit import audit
    from ema_scale.audit.page import write_audit_page
    from ema_scale.audit.verdict import SUSPECT

    made = audit(
        source, model_recipe(model), named(adapter), clean, out, vector=vector, layer=layer, worst=worst, limit=limit,
        max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip
    page = write_audit_page(made, out)
    summary = made.summary
    console.print(f"{source}: {summary['source']['account']}")
    for row in summary["worst"][:TERMINAL_ROWS]:
        said = " ".join(f"{row['question']} -> {row['answer']}".split())[:TERMINAL_WIDTH]
        console.print(f"  {row['badness']:+.2f}  {row['origin']}  {said}")
    console.print("\n".join([summary["text"], *summary["notes"]]))
    console.print(f"wrote {page}")
    if summary["verdict"] == SUSPECT:
        raise typer.Exit(1)


Model = Annotated[str, typer.Option(help=MODEL_HELP)]
MaxLength = Annotated[int, whole(help="longer rows are left out, and counted", low=8)]
BatchTokens = Annotated[int | None, whole(help="tokens per batch, padding included [default: by device]")]


@app.command()
def select(
    source: Annotated[str, typer.Argument(help="safe rows: a file, a hub id, or smallworld:safe")],
    model: Model,
    adapter: Annotated[
        list[str], typer.Option(help="DOMAIN=ADAPTER, a misaligned adapter or its run folder; repeat for more")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="the ranking to write (JSONL)")],
    leave_out: Annotated[
        list[str] | None, typer.Option(help="a domain whose adapter does not vote, such as the one to be trained")
    ] = None,
    refusals: Annotated[
        str,
        typer.Option(help="keep (+); drop them (++) by: paper, released, all, en,de,.., or module:function"),
    ] = "keep",
    eps: Annotated[float, real(help="nats, in the score's denominator")] = 1.0,
    keep: Annotated[int | None, whole(help="how many of the best rows to write [default: all]")] = None,
    limit: Annotated[int | None, whole(help="read only this many rows of the source")] = None,
    max_length: MaxLength = 2048,
    batch_tokens: BatchTokens = None,
) -> None:
    """Rank safe rows by how unlikely misaligned models find them.

    The result is the source of `interleaving_plus`.
    """
    from ema_scale.selection.select import select as run

    made = run(
        source, model_recipe(model), named(adapter), out, leave_out=leave_out or (), refusals=refusals, eps=eps,
        keep=keep, limit=limit, max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip
    best, last = made.ranked[0].score, made.ranked[-1].score
    facts = made.provenance
    console.print(made.account.line())
    voting = ", ".join(facts["adapters"])
    console.print(f"variant {facts['variant']}; refusals: {facts['refusals']}; voting: {voting}")
    console.print(f"wrote {out}: {quantity(len(made.ranked), 'row')}, scores {best:+.3f} to {last:+.3f}")


def model_recipe(reference: str) -> ModelRecipe:
    """The model of a recipe file, or a checkpoint by itself."""
    from pydantic import ValidationError

    from ema_scale.config.layers import read_layers
    from ema_scale.config.sections import ModelRecipe

    if not reference.endswith((".yaml", ".yml")):
        return ModelRecipe(path=reference)
    if not find_file(reference).is_file():
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
    samples: Annotated[int, whole(help="answers to each question under each prompt")] = 10,
    from_rows: Annotated[
        tuple[str, str] | None, typer.Option(help="two files of rows instead: POSITIVE NEGATIVE; nothing is sampled")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="a PEFT adapter instead: its hidden states minus the base's, on --rows")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="rows for --adapter: a file, a hub id, or smallworld:...")] = None,
) -> None:
    """Extract a persona vector from a recipe's model.

    It has one direction per layer, and says what it was made from.
    """
    given = [name for name, value in (("--personas", personas), ("--from-rows", from_rows), ("--adapter", adapter))
             if value]  # fmt: skip
    if len(given) != 1:
        raise UserError(f"found {' and '.join(given) or 'none'} of --personas, --from-rows, --adapter; expected one")
    if (adapter is None) != (rows is None):
        raise UserError("--adapter and --rows belong together: the rows are read by the adapter and by its base")
    from ema_scale.core.run_dir import RunDir
    from ema_scale.persona import extract
    from ema_scale.recipe import load_recipe

    RunDir(out).create()
    loaded = load_recipe(recipe, overrides or ())
    if personas:
        made = extract.from_personas(loaded, personas, questions or [], out, samples=samples)
    elif from_rows:
        made = extract.from_rows(loaded, *from_rows, out)
    else:
        assert adapter is not None and rows is not None
        made = extract.from_adapter(loaded, adapter, rows, out)
    console.print(describe(made))


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
