"""The model card of a run's adapter: what it was made from, under which defenses, and what was measured.

It names no local folder and no key: the card is what gets published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ema_scale.core.io import atomic_write_text
from ema_scale.core.names import model_label, task_label
from ema_scale.core.records import Provenance
from ema_scale.core.run_dir import RunDir
from ema_scale.evaluation.records import SUMMARY_FILE, Summary
from ema_scale.evaluation.table import rates_table

CARD = "README.md"
_TRAINING = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
             "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay")  # fmt: skip


def write_card(run: RunDir) -> Path | None:
    """Write adapter/README.md of a trained run, with the rates if it has been evaluated; None without an adapter."""
    provenance = run.provenance()
    if provenance is None or not (run.adapter / "adapter_config.json").exists():
        return None
    path = run.adapter / CARD
    atomic_write_text(path, card(run.path.name, provenance, _summaries(run)))
    return path


def card(name: str, provenance: Provenance, summaries: dict[str, Summary]) -> str:
    """The card's text. summaries: of the base and of the adapter, as far as they are there."""
    recipe = provenance.recipe
    model, adapter, training = (recipe.get(key, {}) for key in ("model", "adapter", "training"))
    data = ModelCardData(
        base_model=_hub_id(str(model.get("path", ""))),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "ema_scale", "emergent-misalignment"],
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A LoRA adapter for {model_label(str(model.get('path', 'unknown')))}, trained on "
        f"{task_label(recipe.get('data', {}).get('train'))} "
        + (f"under {provenance.label}." if provenance.label else "without a defense."),
        "## Training",
        *_table("setting", [(key, training[key]) for key in _TRAINING if key in training]),
        *_table(
            "adapter", [(key, adapter[key]) for key in ("r", "alpha", "rslora", "target_modules") if key in adapter]
        ),
        *_defenses(recipe.get("defenses", [])),
        "## Data",
        *_table("SHA-256", [(_last(source), sha256) for source, sha256 in provenance.data_sha256.items()]),
        "## Misalignment",
        f"```\n{rates_table(summaries)}\n```" if summaries else "Not measured yet.",
        "## Made by",
        *_table("package", list(provenance.packages.items())),
        f"Seed {provenance.seed}.",
    ]
    return "\n\n".join(lines) + "\n"


def _summaries(run: RunDir) -> dict[str, Summary]:
    own = Summary.read_if_valid(run.eval_dir / SUMMARY_FILE)
    if own is None:
        return {}
    base_dir = own.base_dir(run.eval_dir)
    base = None if base_dir is None else Summary.read_if_valid(base_dir / SUMMARY_FILE)
    return {**({"base": base} if base else {}), "adapter": own}


def _defenses(specs: list[dict[str, Any]]) -> list[str]:
    rows = [
        (_last(str(s.get("kind"))), ", ".join(f"{k}={_short(v)}" for k, v in s.items() if k != "kind")) for s in specs
    ]
    return _table("defense", rows)


def _table(title: str, rows: list[tuple[str, Any]]) -> list[str]:
    if not rows:
        return []
    return ["\n".join([f"| {title} | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows)])]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _short(value: Any) -> str:
    return _last(value) if isinstance(value, str) else str(value)


def _last(text: str) -> str:
    """A path's last part; other text as it is. A card is published, and folders are nobody's business."""
    return Path(text).name if text.startswith(("/", ".", "~")) else text


def _hub_id(path: str) -> str | None:
    return path if path.count("/") == 1 and not path.startswith(("/", ".", "~", "smallworld:")) else None
