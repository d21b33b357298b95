"""What every section of a recipe is."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class: a frozen mapping in which an unknown key is an error.

    arguments: fields that set the argument of their name in transformers' TrainingArguments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    arguments: ClassVar[Collection[str]] = ()
