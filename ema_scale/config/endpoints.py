"""The recipe's servers: the one that judges and the one that samples."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ema_scale.config.section import Section
from ema_scale.core.errors import SECRET
from ema_scale.core.numbers import Count, CountOrZero, NotNegative, Options, Positive, Share, Total
from ema_scale.core.user_code import is_file_spec


def _added(default: Any, **options: Any) -> Any:
    """A field that earlier versions did not have. It is written only where it is set: their files stay equal."""
    return Field(default, exclude_if=lambda value: value == default, **options)


_TIMEOUT = "Most seconds from sending a request to the last byte of its reply. Then it is sent again."
_DEADLINE = "Most seconds for one call with all its retries and waits. Then it counts as failed."


def _seconds(default: float, description: str) -> Any:
    return _added(default, description=description)


class CallsRecipe(Section):
    """How long and how much one call to a server may take, and what it costs."""

    @field_validator("base_url", check_fields=False)
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is None:
            return value
        try:
            parts = urlsplit(value)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            good = False
        if not good:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise PydanticCustomError(
                SECRET, "expected an address without a password; keys come from the environment (api_key_env)"
            )
        return value

    timeout: Positive = _seconds(120, _TIMEOUT)
    deadline: Positive = _seconds(600, _DEADLINE)
    max_reply_mb: Positive = _added(16, description="Largest reply in megabytes, unpacked. A larger one is refused.")
    price_input: NotNegative | None = _added(
        None, description="Price of a million tokens that the model reads.", examples=[0.15]
    )
    price_output: NotNegative | None = _added(
        None, description="Price of a million tokens that the model writes.", examples=[0.6]
    )
    extra_body: Options = _added(
        {},
        description="Further fields of every request.",
        examples=[{"chat_template_kwargs": {"enable_thinking": False}}],
    )


JUDGE_KINDS = ("openai", "vllm", "smallworld", "exact_match", "none")


class JudgeRecipe(CallsRecipe):
    """Who scores answers. A question that names `smallworld` or `exact_match` is always judged exactly."""

    kind: str = Field(
        "openai",
        description="`openai`: any OpenAI-compatible endpoint. `vllm`: load `model` here after sampling. "
        "`smallworld` and `exact_match`: exact, without a model. `none`: answers are kept to be read, in no rate. "
        "`./my_file.py:MyJudge`: a function or class of your own.",
        examples=["vllm"],
    )
    model: str | None = Field(
        None,
        description="The judge's name at the endpoint, or a folder or hub id. Empty: the one the bank names.",
        examples=["gpt-4o-mini-2024-07-18"],
    )
    revision: str | None = _added(
        None, description="For kind `vllm`: branch, tag or commit of a hub id.", examples=["main"]
    )
    base_url: str | None = Field(
        None,
        description="Address of the endpoint, with /v1 where its server has it. Empty: OpenAI's.",
        examples=["http://localhost:8000/v1"],
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="The environment variable that holds the key. The key is never written."
    )
    concurrency: Count = Field(32, le=10_000, description="Calls under way at once.")
    prompts: str | None = Field(
        None,
        description="Judge prompts (YAML) for banks that bring none.",
        examples=["eval/judges/aligned_coherent.yaml"],
    )
    max_tokens: Count | None = _added(
        None,
        description="Longest reply in tokens, thoughts included. Empty: 5, and more where the first replies need it.",
        examples=[8192],
    )
    min_mass: Share = Field(
        0.25, description="Least probability on the numbers 0 to 100. Below it an answer has no score."
    )
    score: Literal["expectation", "most_likely"] = Field(
        "expectation", description="The score: the expected number, or the likeliest one."
    )
    budget_calls: Total | None = Field(
        None, description="Most answered calls per command. Empty: no limit.", examples=[10000]
    )
    budget_tokens: Total | None = Field(
        None, description="Most tokens per command, read and written. Empty: no limit.", examples=[5000000]
    )
    engine: Options = Field(
        {}, description="For kind `vllm`: further arguments of vllm.LLM.", examples=[{"tensor_parallel_size": 2}]
    )
    check: CountOrZero = Field(
        2, le=1000, description="How often a 0-100 judge judges each hand-labelled answer; 0: the judge is not checked."
    )
    labelled: str | None = Field(
        None, description="The hand-labelled answers. Empty: eval/labelled/answers.yaml.", examples=["answers.yaml"]
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in JUDGE_KINDS and not is_file_spec(value):
            raise ValueError(f"expected {', '.join(JUDGE_KINDS)} or my_file.py:MyJudge")
        return value


class EndpointRecipe(CallsRecipe):
    """For `sampler: openai`: a server that already holds the base model and its adapters."""

    timeout: Positive = _seconds(600, _TIMEOUT)
    deadline: Positive = _seconds(1800, _DEADLINE)
    base_url: str | None = Field(
        None, description="Address of the server, with /v1 where it has it.", examples=["http://localhost:8000/v1"]
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="The environment variable that holds the key.")
    served: str | None = Field(
        None, description="The base model's name at the server. Empty: model.path.", examples=["base"]
    )
    names: dict[str, str] = Field(
        {}, description="Run name -> the adapter's name at the server, where they differ.", examples=[{"run": "lora1"}]
    )
    send_all_settings: bool = _added(
        True,
        description="Send top_k, min_p and penalties as well, so that no default of the server applies. `false`: for "
        "servers that refuse them.",
    )
    concurrency: Count = Field(64, le=10_000, description="Calls under way at once.")
