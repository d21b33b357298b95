"""The types of numbers in recipes, suites, studies, sites and options: each is finite, and has a lowest and a highest
value.

A field takes one of these types and, where it must be narrower, its own bounds:

    max_length: Count = Field(2048, ge=8)

true and false are no numbers here, though Python counts with them. Text that spells a number is one: YAML 1.1 reads
1e-5 as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ema_scale.core.errors import SECRET

MOST = 10**9
MOST_IN_ALL = 10**15  # of tokens and calls of a whole command


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


_NUMBER = BeforeValidator(_no_truth)

Count = Annotated[int, _NUMBER, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, _NUMBER, Field(ge=0, le=MOST)]
Total = Annotated[int, _NUMBER, Field(ge=0, le=MOST_IN_ALL)]
Whole = Annotated[int, _NUMBER, Field(ge=-MOST_IN_ALL, le=MOST_IN_ALL)]
Seed = Annotated[int, _NUMBER, Field(ge=0, le=2**32 - 1)]  # numpy takes no larger one
Steps = Annotated[int, _NUMBER, Field(ge=-1, le=MOST)]
"""-1: as many as needed."""
Positive = Annotated[float, _NUMBER, Field(gt=0, le=MOST, allow_inf_nan=False)]
NotNegative = Annotated[float, _NUMBER, Field(ge=0, le=MOST, allow_inf_nan=False)]
Real = Annotated[float, _NUMBER, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, _NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, _NUMBER, Field(gt=0, le=1, allow_inf_nan=False)]
Cosine = Annotated[float, _NUMBER, Field(ge=-1, le=1, allow_inf_nan=False)]
Limit = Annotated[float, _NUMBER, Field(gt=0, le=math.inf)]
"""A limit that may be .inf: none."""


def _plain(value: Mapping[str, Any]) -> Mapping[str, Any]:
    for path, one in _leaves(value):
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"expected finite numbers, found {one} at {path}")
        name = path.rpartition(".")[2].lower()
        if isinstance(one, str) and one and name.endswith(_SECRETS):
            raise PydanticCustomError(
                SECRET,
                "{path}: looks like a secret, and this file is copied into run folders; put it into the environment",
                {"path": path},
            )
    return value


_SECRETS = (
    "api_key", "apikey", "password", "passwd", "secret", "hf_token", "auth_token", "access_token", "authorization",
)  # fmt: skip


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list):
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


Options = Annotated[dict[str, Any], AfterValidator(_plain)]
"""What another program takes, by its own names: values that JSON can hold, and no secrets."""
