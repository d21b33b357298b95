"""What there is: `ema defenses`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ema_scale.cli.app import app, console


@app.command()
def defenses(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the defenses with source and parameters."""
    from ema_scale.defenses.registry import catalogue

    entries = catalogue()
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    for entry in entries:
        console.print(f"{entry['kind']}: {entry['summary']}\n  source: {entry['source']}", markup=False)
        for field in entry["parameters"]:
            console.print(
                f"  {field['name']} = {field['default']}  ({field['type']})  {field['description']}", markup=False
            )
