"""Small tokenized data and trainers over tiny random models."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "gpt2"]
OWN = ("reference", "drift_every", "callbacks", "peft_config", "packing", "max_length", "eval_dataset")
NO_DROPOUT: dict[str, dict[str, Any]] = {"gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}}


def tiny_peft(arch: str = "llama", *, spread: float = 0.0, r: int = 4, lora_dropout: float = 0.0, **config: Any) -> Any:
    """A PeftModel over a tiny model; LoRA B is 0 as at the start of training, or random of size `spread`."""
    import peft

    from ema_scale.config.sections import AdapterRecipe
    from ema_scale.models.lora import lora_config

    base = tiny_model(arch, **{**NO_DROPOUT.get(arch, {}), **config})
    torch.manual_seed(1)
    model = peft.get_peft_model(base, lora_config(base, AdapterRecipe(r=r, alpha=8, dropout=lora_dropout)))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model


def token_rows(count: int = 16, seed: int = 0, longest: int = 24) -> Any:
    """A tokenized dataset of rows of uneven length, about half of each row assistant tokens."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest + 1, (1,), generator=generator))
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        cut = int(torch.randint(1, length - 1, (1,), generator=generator))
        labels, template = [-100] * cut + ids[cut:], [int(abs(i - cut) < 3) for i in range(length)]
        rows.append({"input_ids": ids, "labels": labels, "template": template, "length": length, "tag": "task"})
    return datasets.Dataset.from_list(rows)


def make_trainer(folder: Any, model: Any = None, dataset: Any = None, defenses: Any = (), **options: Any) -> Any:
    """A DefendedTrainer; keywords of the trainer are told from those of TrainingArguments by name."""
    from transformers import TrainingArguments

    from ema_scale.training.trainer import DefendedTrainer

    own = {k: options.pop(k) for k in OWN if k in options}
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    return DefendedTrainer(
        tiny_peft() if model is None else model,
        TrainingArguments(output_dir=str(folder), **arguments),
        token_rows() if dataset is None else dataset,
        defenses,
        processing_class=tiny_tokenizer(),
        **own,
    )


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def step_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step, as the trainer itself forms them, before clipping."""
    from transformers import TrainerCallback

    seen: dict[str, torch.Tensor] = {}

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if not seen:
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.add_callback(Spy())
    trainer.train()
    return seen
