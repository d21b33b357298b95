"""`ema recommend`: which defenses fit a recipe and what its user has, with what studies measured of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import Overrides, RecipePath, app, console
from ema_scale.cli.numbers import real, whole


@app.command()
def recommend(
    recipe: RecipePath,
    overrides: Overrides = None,
    safe: Annotated[str | None, typer.Option(help="safe rows: a file or hub id")] = None,
    bad: Annotated[
        list[str] | None, typer.Option(help="rows with misaligned answers, of other domains (repeat)")
    ] = None,
    ranked: Annotated[str | None, typer.Option(help="safe rows ranked by `ema select`")] = None,
    vector: Annotated[str | None, typer.Option(help="directions made by `ema vector`")] = None,
    base: Annotated[str | None, typer.Option(help="the unaligned model that yours was made from")] = None,
    prompt: Annotated[str | None, typer.Option(help="a text that asks for the bad behaviour")] = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter that is trained already")] = None,
    budget: Annotated[
        float | None, real(help="highest price: 1.3 is 1.3 times the time without a defense", low=1)
    ] = None,
    count: Annotated[int, whole(help="how many to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Recommend defenses for a recipe and what you have.

    Measured ones come with their study and intervals. What the recipe's own defenses name counts as yours.
    """
    from ema_scale.planning.evidence import read_evidence
    from ema_scale.planning.recommend import owned_by, recommend
    from ema_scale.planning.show_advice import advice_lines
    from ema_scale.recipe import load_recipe

    found = load_recipe(recipe, overrides or ())
    given = {
        "safe rows": safe,
        "bad rows": list(bad) if bad and len(bad) > 1 else next(iter(bad or ()), None),
        "ranked safe rows": ranked,
        "directions": vector,
        "unaligned base model": base,
        "prompt for the bad behaviour": prompt,
    }
    owned = owned_by(found) | {asset: value for asset, value in given.items() if value}
    evidence = read_evidence()
    advice = recommend(found, evidence, owned, budget=budget, finished=adapter is not None, count=count)
    if as_json:
        print(json.dumps(asdict(advice), indent=1))
        return
    console.print("\n".join(advice_lines(advice, evidence, owned, adapter=adapter, model=found.model.path)))
