"""Write a defense of your own, and train with it.

    python examples/02_add_a_defense.py      # the small world: a minute on a CPU

A defense is a class with fields and some of the methods of `Defense`. This one has a penalty on hidden states: their
length may not move away from the reference's, while their direction is free.
"""

from typing import ClassVar

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, TrainingArguments

from ema_scale import DefendedTrainer, Defense, load_rows
from ema_scale.core.uri import locate
from ema_scale.defenses import PenaltyInputs


class KeepLength(Defense):
    """loss = CE + strength * mean over tokens of (|h| / |h_reference| - 1)^2, after the last layer."""

    kind: ClassVar[str] = "keep_length"
    citation: ClassVar[str] = "this example"
    summary: ClassVar[str] = "keep the length of the last hidden states near the reference's"

    strength: float = Field(1.0, ge=0, description="weight of the squared relative difference")

    def penalty_layers(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers,)

    def penalty(self, inputs: PenaltyInputs) -> torch.Tensor:
        (layer,) = inputs.policy
        policy, reference = inputs.states(layer)  # [batch, tokens, hidden]
        ratio = policy.norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-6)
        return self.strength * inputs.mean((ratio - 1).square())


def train(strength: float) -> float:
    """Train for 20 steps; returns the squared relative difference at the end."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(locate("smallworld:aligned?size=tiny"))
    arguments = TrainingArguments(
        output_dir="runs/example-defense",
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
    )
    rows = load_rows(locate("smallworld:train/medical"))
    trainer = DefendedTrainer(model, arguments, rows, defenses=[KeepLength(strength)])
    trainer.train()
    penalties = [row["keep_length"] for row in trainer.state.log_history if "keep_length" in row]
    return penalties[-1] / strength


if __name__ == "__main__":
    # A recipe names it as `defenses: [{kind: path/to/02_add_a_defense.py:KeepLength, strength: 10}]`.
    for strength in (0.001, 100.0):
        print(f"strength {strength:g}: lengths end {train(strength):.6f} apart (squared, relative)")
