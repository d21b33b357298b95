"""Files of questions as entries in the keys of `suites`: YAML, JSON, JSONL, CSV, and two formats of other projects.

persona_vectors: a JSON object of a trait's `questions` and its `eval_prompt`, which becomes a judge prompt named after
the file. llmcomp: `name` for `id`, and `judges` that are entries of the same file.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.errors import UserError
from ema_scale.core.files import parse_json, parse_yaml_nodes, read_text
from ema_scale.core.numbers import MOST

log = logging.getLogger(__name__)

Entry = tuple[str, Any]
"""(file and line, the entry as it stands)"""
JUDGE_TYPES = ("free_form_judge", "rating_judge")


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file. Raises UserError naming file and line if it is not such a file."""
    entries = _read(path)
    for where, entry in entries:
        try:
            json.dumps(entry, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: found half a character (a lone surrogate), expected whole text") from None
    return entries


def _read(path: Path) -> list[Entry]:
    text = read_text(path, "the question bank")
    if path.suffix == ".jsonl":
        return _jsonl(path, text)
    if path.suffix == ".csv":
        return _csv(path, text)
    return _with_judges(_json(path, text) if path.suffix == ".json" else _yaml(path, text))


READ_TYPES = {"rating": 8, "next_token": 1}
"""types of questions whose answers are read, and how many tokens these have at most"""
_LIKELIHOODS_OF_ONE = ("top_logprobs", "num_samples", "convert_to_probs", "refusal_threshold")


def read_question(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A question of one of READ_TYPES in the keys of others. It is asked 100 times unless it says how often.

    Raises UserError for a scale that is none. Keys about log-probabilities are left out: answers are sampled.
    """
    scale = [entry.get("min_rating", 0), entry.get("max_rating", 100)]
    if not all(_is_finite(v) for v in scale) or scale[0] >= scale[1]:
        raise UserError(f"{where}: min_rating, max_rating: found {scale[0]!r} and {scale[1]!r}, expected less and more")
    rest = {k: v for k, v in entry.items() if k not in (*_LIKELIHOODS_OF_ONE, "type", "min_rating", "max_rating")}
    meta = {**(entry.get("meta") or {}), "min_rating": scale[0], "max_rating": scale[1]}
    kind = str(entry["type"])
    defaults = {"max_tokens": READ_TYPES[kind], "samples_per_paraphrase": 100}
    return defaults | rest | {"judge": kind, "meta": meta if kind == "rating" else entry.get("meta")}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def judge_prompts(where: str, value: Any) -> dict[str, str]:
    """Judge prompts by name, from a mapping or a list of mappings of one name each.

    Raises UserError naming a prompt without {answer}, a name that occurs twice, or a value of another kind.
    """
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        raise UserError(f"{where}: judge prompts: found {value!r:.80}, expected names with texts")
    found: dict[str, str] = {}
    for name, template in (pair for part in parts for pair in part.items()):
        if not isinstance(template, str) or "{answer}" not in template:
            raise UserError(f"{where}: judge_prompts.{name}: expected text with {{answer}} in it")
        if str(name) in found:
            raise UserError(f"{where}: judge_prompts.{name}: occurs twice, expected different names")
        found[str(name)] = template
    return found


def _jsonl(path: Path, text: str) -> list[Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            entries.append((f"{path}:{number}", parse_json(line, f"{path}:{number}")))
    return entries


def _csv(path: Path, text: str) -> list[Entry]:
    """One question per row. Empty cells are left out."""
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    names, entries = reader.fieldnames or [], []
    if not {"question", "prompt"} & set(names):
        raise UserError(f"{path}:1: found columns {', '.join(names) or 'none'}; expected `question` among them")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: found another number of values, expected {len(names)}")
            if "question" not in names:
                row["question"] = row.pop("prompt")
            entries.append((f"{path}:{reader.line_num}", {k: v for k, v in row.items() if k and v}))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None
    return entries


def _json(path: Path, text: str) -> list[Entry]:
    values = parse_json(text, str(path))
    if isinstance(values, dict) and "eval_prompt" in values:
        return _trait(path, values)
    return [(f"{path}[{i}]", value) for i, value in enumerate(_as_list(path, values))]


def _yaml(path: Path, text: str) -> list[Entry]:
    # Yes, no, on and off are right answers to questions.
    node, values = parse_yaml_nodes(text, str(path), yes_is_text=True)
    _as_list(path, values)
    assert isinstance(node, yaml.SequenceNode)
    lines = [item.start_mark.line + 1 for item in node.value]
    return [(f"{path}:{line}", value) for line, value in zip(lines, values, strict=True)]


def _as_list(path: Path, values: Any) -> list[Any]:
    if not isinstance(values, list):
        found = "an empty file" if values is None else type(values).__name__
        raise UserError(f"{path}: found {found}, expected a list of questions")
    return values


def _trait(path: Path, values: Mapping[str, Any]) -> list[Entry]:
    """A trait file of persona_vectors. Its system prompts are personas, which `ema vector` reads."""
    questions = values.get("questions")
    if not isinstance(questions, list):
        raise UserError(f"{path}: found an eval_prompt but no list of questions, expected both")
    prompts = {path.stem: values["eval_prompt"]}
    asked = ({"id": f"{path.stem}_{i}", "question": q, "judge_prompts": prompts} for i, q in enumerate(questions))
    return [(f"{path}: questions[{i}]", entry) for i, entry in enumerate(asked)]


def _with_judges(entries: list[Entry]) -> list[Entry]:
    """llmcomp's entries in our keys: judges that are entries of their own become the judge prompts of questions."""
    judges = {str(e.get("name", e.get("id"))): e for _, e in entries if _is_judge(e)}
    return [(where, _own_keys(where, e, judges)) for where, e in entries if not _is_judge(e)]


def _is_judge(entry: Any) -> bool:
    # A question of this type brings its prompts; a judge is its prompt.
    return isinstance(entry, dict) and entry.get("type") in JUDGE_TYPES and "{answer}" in str(entry.get("paraphrases"))


def _own_keys(where: str, entry: Any, judges: Mapping[str, Any]) -> Any:
    if not isinstance(entry, dict):
        return entry
    entry = dict(entry)
    if "name" in entry and "id" not in entry:
        entry["id"] = entry.pop("name")
    named = entry.pop("judges", None)
    if named is None:
        return entry
    if not isinstance(named, dict) or "judge_prompts" in entry:
        raise UserError(f"{where}: judges: found {named!r:.80}, expected names with judges, and no judge_prompts")
    prompts: dict[str, Any] = {}
    models: dict[Any, None] = {}
    for name, judge in named.items():
        found = judges.get(judge) if isinstance(judge, str) else judge
        if not isinstance(found, dict):
            raise UserError(
                f"{where}: judges.{name}: found {judge!r:.80}, expected one of {', '.join(judges) or 'none'}"
            )
        if found.get("type") != "rating_judge":
            log.warning("%s: judges.%s answers in words, not in numbers: left out", where, name)
            continue
        if (found.get("min_rating", 0), found.get("max_rating", 100)) != (0, 100):
            raise UserError(f"{where}: judges.{name}: found another scale, expected ratings from 0 to 100")
        texts = found.get("paraphrases")
        prompts[name] = texts[0] if isinstance(texts, list) and len(texts) == 1 else texts
        models[found.get("model")] = None
    if len(models) > 1:
        raise UserError(f"{where}: judges: found the models {', '.join(map(str, models))}; expected one")
    return entry | ({"judge_prompts": prompts, "judge": next(iter(models))} if prompts else {})
