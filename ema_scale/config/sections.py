"""What a run is: one YAML recipe, validated before anything heavy is loaded.

A recipe may start from others (`extends:`), and the command line may override any field (`key.path=value`).
Later wins: `extends` in order, then the file, then the overrides. Mappings merge; lists are replaced whole.
A path that begins with ./ or ../ is relative to the file it stands in; any other value is left as typed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ema_scale.core.errors import UserError, explain

WAYS = ("auto", "adapter_off", "two_stream", "cached")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)


class ModelRecipe(_Section):
    """The checkpoint to fine-tune. `path`: a folder, a hub id, or `smallworld:aligned`."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    trust_remote_code: bool = False
    chat_template: str | None = None
    attn_implementation: str | None = None


class DataRecipe(_Section):
    """Training rows. `train`: one or several files, hub ids, or `smallworld:train/medical`."""

    train: str | list[str]
    max_length: int = Field(2048, ge=8)
    limit: int | None = Field(None, ge=1)
    on_bad: Literal["raise", "drop"] = "raise"
    learn: Literal["all", "last", "marked"] = Field(
        "all",
        description="assistant turns to learn: all but those that the rows mark otherwise (weight: 0, train: false), "
        "the last of each row, or those that the rows mark (weight: 1, train: true)",
    )
    columns: dict[str, str | None] = Field(
        {}, description="names of the rows' columns -> names that are known, such as prompt; null: pass over a column"
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


class AdapterRecipe(_Section):
    """LoRA (Hu et al. 2021), rank-stabilised (Kalajdzievski 2023) as in the paper: scale alpha / sqrt(r).

    start: a PEFT folder to go on from. Its own r, alpha, ... then hold, and a frozen copy of it is the reference.
    """

    r: int = Field(32, ge=1)
    alpha: float = Field(64, gt=0)
    rslora: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["auto"] | list[str] = "auto"
    start: str | None = None


class TrainingRecipe(_Section):
    """Optimisation; the defaults are the paper's (arXiv 2508.06249), but for its 8-bit AdamW."""

    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(5, ge=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    optimizer: str = "adamw_torch"
    batch_size: int = Field(4, ge=1, description="rows a process in one forward")
    accumulation: int = Field(4, ge=1)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    activation_offload: bool = Field(
        False, description="checkpointed activations wait in the machine's memory; needs gradient_checkpointing"
    )
    packing: bool = Field(False, description="rows behind one another up to max_length; batch_size counts sequences")
    group_by_length: bool = True
    logging_steps: int = Field(1, ge=1)
    save_steps: int = Field(100, ge=1)
    keep_checkpoints: int = Field(
        2, ge=1, description="the newest of save_steps; the newest of all and evaluation.checkpoints are kept anyway"
    )
    report_to: list[str] = ["tensorboard"]
    deepspeed: str | None = Field(None, description="a DeepSpeed JSON config, such as launch/deepspeed/zero3.json")
    fsdp: bool = Field(False, description="shard the base, too, by torch's FSDP2, as ZeRO-3 does")
    drift_every: int = Field(10, ge=0, description="steps between per-layer drift readings; 0 turns them off")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value in (None, "none") else [value] if isinstance(value, str) else value


class SuitesRecipe(_Section):
    """Question banks by the role they play in the paper's criteria."""

    general: list[str] = []
    in_domain: list[str] = []
    benign: list[str] = []

    @field_validator("general", "in_domain", "benign", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    def pairs(self) -> list[tuple[str, str]]:
        """(source, role) of every suite."""
        return [(s, role) for role in type(self).model_fields for s in getattr(self, role)]


class JudgeRecipe(_Section):
    """Who scores answers. A question that names `smallworld` or `exact_match` is always judged exactly.

    kind: `openai` is any endpoint of that protocol; `vllm` loads `model` (a folder or hub id) here, after sampling.
    """

    kind: Literal["openai", "vllm", "smallworld", "exact_match"] = "openai"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(32, ge=1)
    prompts: str | None = None
    min_mass: float = Field(0.25, ge=0, le=1, description="least probability on numbers for a score")
    score: Literal["expectation", "most_likely"] = "expectation"
    budget_calls: int | None = Field(None, ge=0, description="most answered calls that one command may make")
    budget_tokens: int | None = Field(None, ge=0, description="most tokens, in and out, that one command may use")
    engine: dict[str, Any] = Field({}, description="kind vllm: further arguments of vllm.LLM")
    check: int = Field(2, ge=0, description="times that a 0-100 judge judges each labelled answer; 0: none")
    labelled: str | None = Field(None, description="the labelled answers, if not eval/labelled/answers.yaml")


class ConditionRecipe(_Section):
    """Something to say before every general question: a system prompt, a start of the user's turn, or a file of such.

    In a recipe a plain string is a file, such as eval/conditions/triggers.yaml.
    """

    file: str | None = None
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    system: str | None = Field(None, min_length=1)
    user: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _plain_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> ConditionRecipe:
        inline = self.name is not None and (self.system is not None or self.user is not None)
        if (self.file is None) != inline or (self.file and (self.name or self.system or self.user)):
            raise ValueError("expected a name with system or user text, or else a file of conditions")
        return self


class GateRecipe(_Section):
    """The reference must be shown to be at most this misaligned on general questions, or is flagged or refused."""

    max_misaligned: float = Field(0.05, gt=0, lt=1)
    action: Literal["flag", "refuse"] = "flag"


class EndpointRecipe(_Section):
    """An OpenAI-compatible server that holds the model and its adapters already (`sampler: openai`).

    served: the name of the base model there, if not the model's path; adapters go by their run's name, or by what
    `names` says for it.
    """

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    served: str | None = None
    names: dict[str, str] = {}
    concurrency: int = Field(64, ge=1)


class EvaluationRecipe(_Section):
    """Sampling and judging; temperature, top_p and max_tokens default to the paper's."""

    suites: SuitesRecipe = SuitesRecipe()
    sampler: Literal["auto", "vllm", "transformers", "openai"] = "auto"
    engine: dict[str, Any] = Field({}, description="further arguments of vllm.LLM, such as tensor_parallel_size")
    endpoint: EndpointRecipe = EndpointRecipe()
    legacy: bool = Field(False, description="as the paper's released evaluator did; for published figures only")
    judge: JudgeRecipe = JudgeRecipe()
    samples_per_question: int | None = Field(None, ge=1, description="None: as the suite says")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(600, ge=1)
    seed: int = 0
    max_model_len: int | None = Field(None, ge=16)
    compare_base: bool = True
    checkpoints: bool | list[int] = Field(
        False,
        description="also the kept checkpoints, all or those of these steps: misalignment along training",
    )
    conditions: list[ConditionRecipe] = Field([], description="prompts under which general questions are asked, too")
    inoculation: Literal["own", "every_arm", "never"] = Field(
        "own", description="who is asked under an inoculation prompt: the run trained under it and the base, or all"
    )
    gate: GateRecipe = GateRecipe()


class SeparateReference(_Section):
    """Another checkpoint as the reference: a folder, a hub id or `smallworld:pretrained`, with the same tokenizer."""

    kind: Literal["separate"] = "separate"
    model: str
    revision: str | None = None

    @classmethod
    def of(cls, values: Any) -> SeparateReference:
        """From a mapping. Raises UserError."""
        if isinstance(values, cls):
            return values
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError("; ".join(f"reference.{explain(p, cls)}" for p in error.errors())) from None
