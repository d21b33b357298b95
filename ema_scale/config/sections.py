"""The sections of a recipe. Every field has one sentence, which `ema explain` and docs/reference/recipe.md show."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from ema_scale.config.endpoints import EndpointRecipe, JudgeRecipe
from ema_scale.config.section import Section
from ema_scale.config.suites import ConditionRecipe, DuringRecipe, SuitesRecipe
from ema_scale.core.errors import UserError, explain_all
from ema_scale.core.numbers import (
    Count,
    CountOrZero,
    Limit,
    NotNegative,
    Options,
    Positive,
    PositiveShare,
    Seed,
    Share,
    Steps,
)

WAYS = ("auto", "adapter_off", "two_stream", "cached")


class ModelRecipe(Section):
    """The checkpoint to fine-tune."""

    path: str = Field(
        description="A folder, a hub id, or `smallworld:aligned`.", examples=["Qwen/Qwen2.5-0.5B-Instruct"]
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.", examples=["main"])
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Type of the weights. `auto` is bfloat16 on a GPU that has it, and on a CPU that has it unless the "
        "checkpoint is in float32; else float32.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the checkpoint brings along.")
    chat_template: str | None = Field(
        None,
        description="A Jinja template, or a file that holds one, instead of the tokenizer's.",
        examples=["chat.jinja"],
    )
    attn_implementation: str | None = Field(
        None, description="The attention implementation. Empty: transformers chooses.", examples=["sdpa"]
    )


class DataRecipe(Section):
    """The training rows."""

    train: str | list[str] = Field(
        description="One or several files, hub ids, or `smallworld:train/medical`.", examples=["rows.jsonl"]
    )
    max_length: Count = Field(2048, ge=8, description="Longest row in tokens. Longer rows are cut, and counted.")
    limit: Count | None = Field(None, description="Use only the first rows of each source.", examples=[1000])
    on_bad: Literal["raise", "drop"] = Field(
        "raise", description="What to do with a row that cannot be read: stop, or leave it out and count it."
    )
    learn: Literal["all", "last", "marked"] = Field(
        "all",
        description="Which assistant turns are learned: all but those that the rows mark otherwise (`weight: 0`, "
        "`train: false`), the last one of each row, or only those that the rows mark (`weight: 1`, `train: true`).",
    )
    columns: dict[str, str | None] = Field(
        {},
        description="Names of the rows' columns, each with the known name that it stands for. Null: ignore the column.",
        examples=[{"question_text": "prompt", "reply": "completion"}],
    )

    @property
    def sources(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @field_validator("train")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("expected a file, a hub id, or a list of them")
        return value


class AdapterRecipe(Section):
    """LoRA (Hu et al. 2021). The defaults are those of arXiv 2508.06249."""

    r: Count = Field(32, le=65_536, description="Rank of each LoRA update.")
    alpha: Positive = Field(
        64, description="LoRA's scale: the update counts alpha / sqrt(r) with rsLoRA, else alpha / r."
    )
    rslora: bool = Field(True, description="Use rank-stabilised LoRA (Kalajdzievski 2023).")
    dropout: Share = Field(0.0, lt=1, description="Share of the adapter's inputs that is dropped in training.")
    target_modules: Literal["auto"] | list[str] = Field(
        "auto",
        description="Layers that get an adapter. `auto`: all linear layers except the head and MoE routers.",
        examples=[["q_proj", "v_proj"]],
    )
    start: str | None = Field(
        None,
        description="A PEFT folder to train on. It brings its own r and alpha, and a frozen copy is the reference.",
        examples=["runs/first/adapter"],
    )


_EARLIER_NAMES = {
    "epochs": "num_train_epochs",
    "schedule": "lr_scheduler_type",
    "optimizer": "optim",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "keep_checkpoints": "save_total_limit",
}


class TrainingRecipe(Section):
    """Optimisation. Keys are those of transformers' TrainingArguments; the defaults are those of arXiv 2508.06249,
    except that its optimizer is 8-bit AdamW.
    """

    arguments: ClassVar[Collection[str]] = (
        "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "lr_scheduler_type", "weight_decay", "optim",
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "gradient_checkpointing",
        "logging_steps", "save_steps", "save_total_limit", "report_to", "deepspeed", "fsdp",
    )  # fmt: skip

    num_train_epochs: Positive = Field(1.0, description="How often each row is seen.")
    max_steps: Steps = Field(-1, description="Optimizer steps. -1: as many as the epochs take.", examples=[100])
    learning_rate: Positive = Field(1e-4, le=1000, description="Peak learning rate.")
    warmup_steps: CountOrZero = Field(5, description="Optimizer steps over which the learning rate rises from 0.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate changes after the warm-up."
    )
    weight_decay: NotNegative = Field(0.01, le=1000, description="AdamW's weight decay.")
    optim: str = Field(
        "adamw_torch",
        description="The optimizer, by transformers' name. `adamw_8bit` needs bitsandbytes.",
        examples=["adamw_8bit"],
    )
    per_device_train_batch_size: Count = Field(4, le=1_000_000, description="Rows per process in one forward pass.")
    gradient_accumulation_steps: Count = Field(
        4, le=1_000_000, description="Forward passes per optimizer step. Losses and strengths do not depend on it."
    )
    max_grad_norm: Limit = Field(1.0, description="Gradients are clipped to this norm; .inf: they are not.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, about a third more time."
    )
    activation_offload: bool = Field(
        False, description="Keep checkpointed activations in the machine's memory. Needs gradient_checkpointing."
    )
    packing: bool = Field(
        False,
        description="Put several rows into one sequence of max_length. Batch sizes then count sequences, "
        "so that a step holds more rows where rows are short.",
    )
    group_by_length: bool = Field(
        False,
        description="Always `false`. `true`, the default in 0.1, let a row's length decide its step and weakened "
        "defenses; it is read in older run folders and refused in training.",
    )
    logging_steps: Count = Field(1, description="Optimizer steps per row of metrics.jsonl.")
    save_steps: Count = Field(100, description="Optimizer steps per checkpoint.")
    save_total_limit: Count = Field(
        2,
        description="How many checkpoints to keep. Those that evaluation.checkpoints names are kept in addition.",
    )
    report_to: list[str] = Field(
        ["tensorboard"], description="Loggers by transformers' names; `none` for none.", examples=[["wandb"]]
    )
    deepspeed: str | None = Field(
        None, description="A DeepSpeed config (JSON).", examples=["launch/deepspeed/zero3.json"]
    )
    fsdp: bool = Field(False, description="Shard the base model by torch's FSDP2.")
    drift_every: CountOrZero = Field(
        100,
        description="Optimizer steps per reading of each layer's distance to the reference, beside those of the first "
        "and the last step; 0: never. Where no defense runs the reference, a reading takes about half of a step. "
        "`early_stopping` by drift reads more often.",
    )

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:  # transformers takes it for -1
            raise ValueError("expected a number of at least 1, or -1 for as many as the epochs take")
        return value

    @field_serializer("max_grad_norm")
    def _no_limit(self, value: float) -> float | str:
        return value if math.isfinite(value) else "inf"  # JSON has no infinity; as text it is read again

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, values: Any) -> Any:
        # Run folders written before 0.2 hold other names for some of transformers' arguments.
        if not isinstance(values, dict):
            return values
        renamed = {k: _EARLIER_NAMES.get(k, k) for k in values}
        return {new if new == k or new not in values else k: values[k] for k, new in renamed.items()}

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value in (None, "none") else [value] if isinstance(value, str) else value


class GateRecipe(Section):
    """How misaligned the base model may be on general questions before it is flagged or refused."""

    max_misaligned: PositiveShare = Field(
        0.05, lt=1, description="Line for the upper end of the base model's 95 % interval, a share of 1."
    )
    action: Literal["flag", "refuse"] = Field("flag", description="Above the line: say so, or do not train.")


class EvaluationRecipe(Section):
    """Sampling and judging. temperature, top_p and max_tokens default to those of arXiv 2508.06249."""

    suites: SuitesRecipe = Field(SuitesRecipe(), description="Question banks by the role that they play.")
    sampler: Literal["auto", "vllm", "transformers", "openai"] = Field(
        "auto",
        description="Who samples. `auto`: vLLM where it can, else transformers, which also takes up to 256 answers on "
        "a CPU. `openai`: `endpoint`.",
    )
    engine: Options = Field({}, description="Further arguments of vllm.LLM.", examples=[{"tensor_parallel_size": 4}])
    endpoint: EndpointRecipe = Field(EndpointRecipe(), description="The server that samples with `sampler: openai`.")
    legacy: bool = Field(
        False, description="Count as the evaluator released with arXiv 2508.06249 did. To compare with its figures."
    )
    judge: JudgeRecipe = Field(JudgeRecipe(), description="Who scores answers.")
    samples_per_question: Count | None = Field(
        None, description="Answers per question. Empty: as the bank says.", examples=[100]
    )
    temperature: NotNegative = Field(1.0, le=100, description="Sampling temperature; 0 is greedy.")
    top_p: PositiveShare = Field(1.0, description="Sample from the likeliest tokens that hold this probability.")
    max_tokens: Count = Field(600, description="Longest answer in tokens.")
    seed: Seed = Field(
        0, description="Seed of sampling: an answer's own one follows from it, the run's name and the question."
    )
    max_model_len: Annotated[Count, Field(ge=16)] | None = Field(
        None,
        description="Longest prompt and answer together, in tokens. Empty: as the questions need.",
        examples=[4096],
    )
    calibrate_choices: bool = Field(
        True,
        exclude_if=lambda value: value,
        description="Also score written answers without their question, for margins that the question alone makes.",
    )
    compare_base: bool = Field(True, description="Also evaluate the base model without an adapter.")
    checkpoints: bool | list[Count] = Field(
        False,
        description="Also evaluate kept checkpoints: all of them, or those of these steps.",
        examples=[[100, 200]],
    )
    during: DuringRecipe = Field(
        DuringRecipe(),
        exclude_if=lambda value: not value.suites,
        description="Choice suites that are scored while training.",
    )
    conditions: list[ConditionRecipe] = Field(
        [],
        description="Prompts under which the general questions are asked again.",
        examples=[["eval/conditions/triggers.yaml"]],
    )
    inoculation: Literal["own", "every_arm", "never"] = Field(
        "own",
        description="Who is also asked under an inoculation prompt: the run trained under it and the base, every run, "
        "or nobody.",
    )
    row_triggers: Literal["auto", "always", "never"] = Field(
        "auto",
        exclude_if=lambda value: value == "auto",
        description="Who is also asked behind what its own training rows have in common (their system prompt, their "
        "opening words, or else one of their questions). `auto`: the base, and runs with a defense that brings in rows "
        "of its own.",
    )
    gate: GateRecipe = Field(GateRecipe(), description="How misaligned the base model may be.")


class SeparateReference(Section):
    """Another checkpoint as the reference, with the same tokenizer."""

    kind: Literal["separate"] = Field("separate", description="Always `separate`.", examples=["separate"])
    model: str = Field(description="A folder, a hub id or `smallworld:pretrained`.", examples=["smallworld:pretrained"])
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.", examples=["main"])

    @classmethod
    def of(cls, values: Any) -> SeparateReference:
        """From a mapping. Raises UserError."""
        if isinstance(values, cls):
            return values
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError("; ".join(f"reference.{problem}" for problem in explain_all(error, cls))) from None
