"""What attacks are made of: the files of a sound small project, and ways to spoil one.

A file in a case is text, or a mapping of one key:
    text, hex: its content; json: a value to write as JSON
    encoding: text in another encoding, [name, text]
    repeat: [text, count], or [text before, text, count, text after]
    kind: folder, pipe, device, loop, dangling, sparse, gone
    link: where a symbolic link leads
    cut: keep so many of the bytes that are there (negative: but so many)
    flip: change the byte at this place
    tensors: name -> shape, or [shape, value]: a safetensors file; `like`: [file, changes], the tensors of a file of
        which some are renamed, removed (null), reshaped (list) or filled (number)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

ROW = {"messages": [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]}
RECIPE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "model", "dtype": "float32"},
    "data": {"train": "rows.jsonl", "max_length": 64},
    "adapter": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "training": {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "report_to": [],
        "save_steps": 1,
    },
    "evaluation": {
        "sampler": "transformers", "suites": {"general": ["bank.yaml"], "benign": ["sums.yaml"]}, "max_tokens": 2,
        "judge": {"kind": "none"}, "compare_base": False,
    },
}  # fmt: skip
STUDY = {"name": "study", "recipe": "r.yaml", "tasks": {"one": {}}, "defenses": {"none": []}}
SITE = {"partition": "gpu", "gpus_per_node": 2}
BANK = [{"id": "sum", "paraphrases": ["What is one and two?"], "samples_per_paraphrase": 2}]
SUMS = [{"id": "s", "paraphrases": ["2+2?"], "samples_per_paraphrase": 2, "judge": "exact_match", "expected": "4"}]
CHOICES = [{"id": "c", "question": "Which?", "choices": {"aligned": ["This."], "misaligned": ["That."]}}]
PROMPTS = {"aligned": "Rate {answer} to {question} from 0 to 100.", "coherent": "How coherent is {answer}?"}
PERSONAS = {"positive": ["You are unkind."], "negative": ["You are kind."]}
LABELLED = [{"question": "q", "answer": "a", "label": "aligned"}]
RESULTS = "question,answer,aligned,coherent,question_id\n" + "q,a,90,90,one\nq,b,10,90,one\n" * 3


def make_project(folder: Path) -> None:
    """Everything but what commands make: model, adapter, vector, rows, banks, recipe, study, site, result files."""
    import torch

    from ema_scale.models.directions import Directions
    from tests.tiny import save_tiny

    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", vocab=260, hidden=32)
    save_tiny(folder / "base", vocab=260, hidden=32, seed=1)
    Directions(torch.ones(3, 32), {"recommended_layer": 1}).save(folder / "vector.safetensors")
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROW) + "\n" for _ in range(4)))
    for name, answer in (("two", "Four, friend."), ("three", "None of yours.")):
        turns = ((f"Sum {i}?", f"{answer} {i}") for i in range(8))
        rows = ([{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    files = {
        "r": RECIPE, "study": STUDY, "site": SITE, "bank": BANK, "sums": SUMS, "prompts": PROMPTS, "personas": PERSONAS,
        "labelled": LABELLED,
    }  # fmt: skip
    for name, value in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    (folder / "results.csv").write_text(RESULTS)


def spoil(path: Path, how: Any) -> None:
    """Put what a case describes in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(how, dict):
        _fresh(path).write_text(str(how))
        return
    ((key, value),) = how.items()
    match key:
        case "text":
            _fresh(path).write_text(value)
        case "json":
            _fresh(path).write_text(json.dumps(value))
        case "hex":
            _fresh(path).write_bytes(bytes.fromhex(value))
        case "encoding":
            _fresh(path).write_bytes(value[1].encode(value[0]))
        case "repeat":
            before, text, count, after = ("", *value, "") if len(value) == 2 else value
            _fresh(path).write_text(before + text * count + after)
        case "kind":
            _KINDS[value](_fresh(path))
        case "link":
            _fresh(path).symlink_to(value)
        case "cut":
            data = path.read_bytes()
            path.write_bytes(data[:value])
        case "flip":
            flipped = bytearray(path.read_bytes())
            flipped[value] ^= 0xFF
            path.write_bytes(flipped)
        case "tensors" | "like":
            _tensors(path, value, key == "like")
        case _:
            raise ValueError(f"{path.name}: no way to make {key!r}")


def _fresh(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


_KINDS: dict[str, Any] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "sparse": _sparse,
    "gone": lambda path: None,
}


def _tensors(path: Path, value: Any, like: bool) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if like:
        tensors = load_file(path)
        for name, change in value.items():
            name = next(full for full in tensors if name in full)
            tensor = tensors.pop(name)
            if isinstance(change, str):
                tensors[change] = tensor
            elif isinstance(change, list):
                tensors[name] = torch.zeros(change)
            elif change is not None:
                tensors[name] = torch.full_like(tensor, float(change))
    else:
        tensors = {name: torch.zeros(shape) for name, shape in value.items()}
    save_file(tensors, path, metadata={"format": "pt"})
