"""One optimizer step of a tiny model under some defenses, split in every way that must not change it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.training.helpers import make_trainer, step_gradients, tiny_peft, token_rows

# How a step over eight rows is split: rows per batch, batches, and whether rows are packed.
SPLITS = ((8, 1, False), (1, 8, False), (2, 4, False), (8, 1, True), (2, 2, True))


def rows_with(tags: Any, seed: int = 0) -> Any:
    return token_rows(len(tags), seed).remove_columns("tag").add_column("tag", list(tags))


def one_step(folder: Path, rows: Any, defenses: Any, model: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """(gradients before clipping, first log, trainer) of a step over all rows, in float64."""
    model = tiny_peft(spread=0.3).double() if model is None else model
    arguments = {
        "per_device_train_batch_size": len(rows), "max_steps": 1, "max_grad_norm": 0, "drift_every": 0,
        "max_length": 96, **options,
    }  # fmt: skip
    trainer = make_trainer(folder, model, rows, defenses, **arguments)
    return step_gradients(trainer), trainer.state.log_history[0], trainer


def assert_no_split_changes_it(folder: Path, rows: Any, defenses: Any, names: Any) -> None:
    """Gradients and the named readings are the same however the step is split, padded or packed."""
    found = []
    for batch, accumulation, packing in SPLITS:
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        found.append(one_step(folder, rows, defenses, packing=packing, **options)[:2])
    (first, log), *others = found
    for gradients, other in others:
        for name in names:
            assert math.isclose(other[name], log[name], rel_tol=1e-5), name
        for name, gradient in first.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-11)
    assert any(gradient.abs().max() > 1e-4 for gradient in first.values())


class Plain:
    """What a plain formula needs of a fresh model: full logits of policy and reference, and masks [B, T]."""

    def __init__(self, trainer: Any) -> None:
        dataset = trainer.train_dataset
        self.batch = batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
        self.model = tiny_peft(spread=0.3).double()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        out = self.model(**inputs, output_hidden_states=True)
        with torch.no_grad(), self.model.disable_adapter():
            ref = self.model(**inputs, output_hidden_states=True)
        self.log_p, self.log_q = out.logits.log_softmax(-1), ref.logits.log_softmax(-1)
        self.reference_states = ref.hidden_states
        self.real = batch["attention_mask"].bool()
        target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        self.spoken = target != -100
        self.log_label, self.ref_label = (
            x.gather(-1, target.clamp_min(0)[..., None])[..., 0] for x in (self.log_p, self.log_q)
        )
        self.tags = list(dataset["tag"])

    def of(self, *tags: str) -> Any:
        """bool [B, 1]: the rows of these tags."""
        return torch.tensor([tag in tags for tag in self.tags])[:, None]

    def kl(self) -> Any:
        """KL(policy || reference) per token [B, T]."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)

    def gradients(self, loss: Any) -> dict[str, Any]:
        loss.backward()
        return {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
