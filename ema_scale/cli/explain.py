"""`ema explain`: what a key of a recipe, a study, a question bank or a site file means; and docs/reference/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import app
from ema_scale.config.bank import BankQuestion, JudgePrompts
from ema_scale.config.explain import (
    SectionDoc,
    describe_sections,
    field_text,
    find,
    page,
    section_text,
)
from ema_scale.core.io import atomic_write_text


@app.command()
def explain(
    key: Annotated[str | None, typer.Argument(help="training.optim, defenses.kl, study.seeds, bank.topic ...")] = None,
    write: Annotated[
        Path | None, typer.Option(help="write the reference pages into this folder instead", hidden=True)
    ] = None,
) -> None:
    """Say what a key of a recipe, study, bank or site file means.

    Gives type, default, range and an example. Without KEY: all sections.
    """
    if write is not None:
        for name, text in reference_pages().items():
            atomic_write_text(write / name, text)
        return
    sections = all_sections()
    if key is None:
        for section in sections:
            print(f"{section.key or 'recipe'}: {section.sentence}")
        print("`ema explain SECTION` lists its keys")
        return
    if key == "recipe":
        print(section_text(sections[0]))
        return
    field, found = find(sections, key)
    if field is not None:
        print(field_text(field))
    if found is not None:
        print(section_text(found))
    if key == "defenses":
        print("\n".join(f"  {s.key}: {s.sentence}" for s in sections if s.key.startswith("defenses.")))


def all_sections() -> list[SectionDoc]:
    """Those of a recipe, of every defense (`defenses.KIND`), of a study (`study`), of a question bank (`bank`), of
    judge prompts (`judge_prompts`) and of a site file (`site`)."""
    from ema_scale.recipe import Recipe
    from ema_scale.slurm.site import Site
    from ema_scale.study.grid import Study

    return [
        *describe_sections(Recipe),
        *defense_sections(),
        *describe_sections(Study, "study"),
        *bank_sections(),
        *describe_sections(Site, "site"),
    ]


def bank_sections() -> Iterator[SectionDoc]:
    for key, model in (("bank", BankQuestion), ("judge_prompts", JudgePrompts)):
        (section,) = describe_sections(model, key)
        yield replace(section, fields=tuple(replace(f, example=_as_yaml(f.example, f"{key}.")) for f in section.fields))


def _as_yaml(example: str, prefix: str) -> str:
    """An override as a line of the file."""
    return example.removeprefix(prefix).replace("=", ": ", 1)


def defense_sections() -> Iterator[SectionDoc]:
    from ema_scale.defenses.registry import known, load

    for kind in sorted(known()):
        cls = load(kind)
        (section,) = describe_sections(cls, f"defenses.{kind}")
        # An override names a defense by its place in the list, which nobody knows here: the example is YAML.
        fields = (
            replace(f, example=f"{{kind: {kind}, {_as_yaml(f.example, f'defenses.{kind}.')}}}") if f.example else f
            for f in section.fields
        )
        summary = cls.summary[:1].upper() + cls.summary[1:]
        yield replace(section, sentence=f"{summary}. Source: {cls.citation}.", fields=tuple(fields))


def reference_pages() -> dict[str, str]:
    """File name -> text of the pages in docs/reference/. Keys that are not a recipe's stand without their prefix."""
    from ema_scale.recipe import Recipe
    from ema_scale.slurm.site import Site
    from ema_scale.study.grid import Study

    note = "Generated from the models by `ema explain --write docs/reference`. `ema explain KEY` shows one key. "
    note += "Numbers are finite and at most 1,000,000,000, unless their line says otherwise."
    return {
        "recipe.md": page(
            "Recipe",
            f"{note}\n\nAny key can be set on the command line: `ema train RECIPE training.learning_rate=1e-5`.",
            describe_sections(Recipe),
        ),
        "defenses.md": page(
            "Defenses",
            f"{note}\n\nEach entry of a recipe's `defenses` has a `kind` and the fields below it: "
            "`defenses: [{kind: kl, strength: 0.3}]`.",
            (_without_prefix(section) for section in defense_sections()),
        ),
        "study.md": page(
            "Study",
            f"{note}\n\n`ema study FILE` runs it here, `ema sweep FILE --slurm` on a cluster.",
            describe_sections(Study),
        ),
        "bank.md": page(
            "Question banks and judge prompts",
            f"{note}\n\nA bank is a YAML or JSON list of questions, a JSONL file of one per line, or a CSV file with "
            "these columns. A recipe names it under `evaluation.suites`. The banks that are here: "
            "[eval/README.md](../../eval/README.md).",
            map(_without_prefix, bank_sections()),
        ),
        "site.md": page(
            "Site file",
            f"{note}\n\nNamed by `--site FILE`, or by the environment variable `EMA_SITE`.",
            describe_sections(Site),
        ),
    }


def _without_prefix(section: SectionDoc) -> SectionDoc:
    prefix = f"{section.key}."
    fields = tuple(replace(f, key=f.key.removeprefix(prefix)) for f in section.fields)
    return replace(section, key=section.key.removeprefix("defenses."), fields=fields)
