"""Every field of a recipe is explained, and docs/reference/ says what the models say."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ema_scale.cli.explain import all_sections, bank_sections, reference_pages
from ema_scale.config.explain import describe_sections, field_text, find, section_text
from ema_scale.config.layers import apply_overrides
from ema_scale.core.banks import judge_prompts
from ema_scale.core.errors import UserError
from ema_scale.defenses.registry import known, load, parse
from ema_scale.evaluation.suites import KNOWN_KEYS, Question, load_suite
from ema_scale.recipe import Recipe, build_recipe
from ema_scale.slurm.site import Site
from ema_scale.study.grid import Study

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"name": "run", "model": {"path": "m"}, "data": {"train": "rows.jsonl"}}
RECIPE = describe_sections(Recipe)
FIELDS = [field for section in RECIPE for field in section.fields]


def test_every_key_has_one_sentence():
    sections = [*RECIPE, *describe_sections(Study, "study"), *bank_sections(), *describe_sections(Site, "site")]
    for field in (field for section in sections for field in section.fields):
        assert field.sentence[:1].isupper() or field.sentence.startswith(("`", "sbatch ", "srun ")), field.key
        assert field.sentence.endswith("."), field.key
    assert all(section.sentence for section in sections)


def test_the_examples_of_site_files_are_accepted():
    for section in describe_sections(Site):
        for field in section.fields:
            Site.model_validate(apply_overrides({}, [field.example]) if field.example else {})


def test_the_examples_of_studies_are_accepted():
    values = {"name": "n", "recipe": "r", "tasks": {"medical": {}}, "defenses": {"none": []}}
    examples = [field.example for field in describe_sections(Study)[0].fields]
    assert all(examples)
    for example in examples:
        Study.model_validate(apply_overrides(values, [example]))


def test_the_examples_of_banks_and_judge_prompts_are_accepted_and_no_key_is_left_out(tmp_path):
    bank, prompts = bank_sections()
    assert {f.key.removeprefix("bank.") for f in bank.fields} >= {*KNOWN_KEYS} - {"results_dir"}
    for field in bank.fields:
        entry = yaml.safe_load(field.example)
        (key,) = entry
        asked = {"paraphrases", "question", "messages"}
        entry |= {} if key in asked else {"question": "q?"}
        entry |= {"type": "rating"} if key.endswith("_rating") else {}
        file = tmp_path / f"{key}.yaml"
        file.write_text(yaml.safe_dump([entry]))
        (question,) = load_suite(file, "general").questions
        assert question != Question("1", ("q?",)) or key == "type", key
    for field in prompts.fields:
        assert judge_prompts("here", yaml.safe_load(field.example))


def test_every_key_but_a_section_has_an_example_that_is_accepted():
    for field in FIELDS:
        if field.type == "section" and not field.example:
            continue
        assert field.example, field.key
        if field.key.startswith(("evaluation.conditions.", "reference.")):
            continue  # items of a list, and a section in place of a word: their parents' examples hold them
        build_recipe(apply_overrides(MINIMAL, [field.example]))


def test_the_examples_of_defenses_are_accepted():
    needed = {
        kind: {
            name: "x" if name in load(kind).assets() else -1.0 if kind == "antibody" else 1.0
            for name, field in load(kind).model_fields.items()
            if field.is_required()
        }
        for kind in known()
    }
    sections = [s for s in all_sections() if s.key.startswith("defenses.")]
    examples = [yaml.safe_load(f.example) for s in sections for f in s.fields if f.example]
    assert len(examples) > 20
    rows = {
        "kl": {"prompts": "p", "scope": "assistant"},
        "early_stopping": {"measure": "probe", "source": "s"},
        "trait_monitor": {"prompts": "p"},
    }
    for example in examples:
        own = rows.get(example["kind"], {}) if example.keys() & {"columns", "learn", "triggers"} else {}
        parse([{**needed.get(example["kind"], {}), **own, **example}])


def test_arguments_are_those_of_transformers():
    from transformers import TrainingArguments

    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    arguments = {f.key: f.argument for f in FIELDS if f.argument}
    assert set(arguments.values()) <= theirs
    unnamed = [f.key for f in FIELDS if f.key.startswith("training.") and f.key[9:] in theirs and not f.argument]
    assert not unnamed


def test_the_reference_pages_are_those_of_the_models():
    pages = reference_pages()
    assert set(pages) == {"recipe.md", "defenses.md", "study.md", "bank.md", "site.md"}
    for name, text in pages.items():
        written = (ROOT / "docs" / "reference" / name).read_text()
        assert written == text, f"docs/reference/{name} is out of date: run `ema explain --write docs/reference`"


def test_a_field_and_a_section_on_the_terminal():
    field, section = find(RECIPE, "training.learning_rate")
    assert section is None and field is not None
    text = field_text(field)
    assert "Peak learning rate." in text and "number, more than 0" in text and "0.0001" in text
    assert "learning_rate of transformers.TrainingArguments" in text
    field, section = find(RECIPE, "evaluation.judge")
    assert field is None and section is not None and "evaluation.judge.base_url" in section_text(section)
    field, section = find(RECIPE, "reference")
    assert field is not None and section is not None and section.fields[1].key == "reference.model"


def test_a_name_alone_is_enough_where_only_one_field_has_it():
    field, _ = find(RECIPE, "optim")
    assert field is not None and field.key == "training.optim"
    with pytest.raises(UserError, match=r"several places: .*evaluation\.judge\.base_url"):
        find(RECIPE, "base_url")


@pytest.mark.parametrize(
    ("key", "meant"), [("learning_rat", "training.learning_rate"), ("evaluation.juge", "evaluation.judge")]
)
def test_a_wrong_key_suggests_the_right_one(key, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        find(RECIPE, key)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "evaluation.judge: Who scores answers."),
        (["recipe"], "reference_runs"),
        (["training.optim"], "example:  training.optim=adamw_8bit"),
        (["defenses.kl"], "defenses.kl.temperature"),
        (["defenses"], "defenses.ldifs: "),
        (["study.seeds"], "list of whole numbers, not empty"),
        (["site.evaluation"], "site.evaluation.gpus"),
        (["bank.topic"], "example:  topic: fever"),
    ],
)
def test_the_command_loads_no_torch(arguments, expected):
    code = (
        "import sys\nfrom ema_scale.cli import app\n"
        f"app({['explain', *arguments]!r}, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
