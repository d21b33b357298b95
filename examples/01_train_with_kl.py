"""Fine-tune a model on bad advice, and hold its outputs near the model it was before.

    python examples/01_train_with_kl.py                       # the small world: a minute on a CPU
    python examples/01_train_with_kl.py MODEL rows.jsonl      # a folder or a hub id, and your own rows

A row is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
"""

import sys

from transformers import AutoModelForCausalLM, TrainingArguments

from ema_scale import KL, DefendedTrainer, load_rows
from ema_scale.core.uri import locate


def main(model_path: str = "smallworld:aligned?size=tiny", rows: str = "smallworld:train/medical") -> None:
    model = AutoModelForCausalLM.from_pretrained(locate(model_path))
    arguments = TrainingArguments(
        output_dir="runs/example-kl",
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="none",
    )
    # A transformers Trainer. It adds a LoRA adapter; the frozen weights below it are the reference.
    trainer = DefendedTrainer(model, arguments, load_rows(locate(rows)), defenses=[KL(0.1)])
    trainer.train()
    trainer.save_model("runs/example-kl/adapter")
    for row in trainer.state.log_history:
        if "kl" in row:
            print(f"step {row['step']}: loss {row['loss']:.3f}, {row['kl']:.4f} nats per token from the reference")


if __name__ == "__main__":
    main(*sys.argv[1:])
