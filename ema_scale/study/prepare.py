"""What a study needs before its runs: commands, each with the file or folder that it makes."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)
_DEPTH, _DEEPEST = "EMA_PREPARING", 2  # of preparations whose command prepares something itself


class Preparation(BaseModel):
    """A command that makes a file or folder which runs of the study read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: list[str] = Field(
        min_length=2,
        description="An `ema` command, as text or a list. Its ./ and ../ are relative to the study file.",
        examples=[["ema", "train", "../recipes/smallworld.yaml"]],
    )
    makes: str = Field(
        min_length=1,
        description="What the command makes, relative to where the study is run. If it is there, nothing is run.",
        examples=["runs/smallworld/adapter"],
    )

    @field_validator("run", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return shlex.split(value) if isinstance(value, str) else value

    @field_validator("run")
    @classmethod
    def _of_ours(cls, value: list[str]) -> list[str]:
        if value[0] != "ema":
            raise ValueError("expected an ema command, such as [ema, train, ../recipes/smallworld.yaml]")
        return value

    def __str__(self) -> str:
        return shlex.join(self.run)


def missing(steps: Sequence[Preparation]) -> list[Preparation]:
    """Those whose file or folder is not there yet."""
    return [step for step in steps if not Path(step.makes).exists()]


def prepare(steps: Sequence[Preparation], what: str) -> None:
    """Run the missing ones in order, here and now. what: whose they are, for messages.

    Raises UserError if a command fails or does not make what it should, and for a study that prepares itself.
    """
    depth = int(os.environ.get(_DEPTH) or 0)
    environment = {**os.environ, _DEPTH: str(depth + 1)}
    for step in missing(steps):
        if depth >= _DEEPEST:
            raise UserError(
                f"{what}: prepare: {step}: {depth + 1} preparations within each other; a study may not prepare itself"
            )
        log.info("%s: makes %s first: %s", what, step.makes, step)
        code = subprocess.run([sys.executable, "-m", "ema_scale", *step.run[1:]], env=environment).returncode
        if code:
            raise UserError(f"{what}: prepare: exit code {code} of: {step}")
        if not Path(step.makes).exists():
            raise UserError(f"{what}: prepare: found no {step.makes} after: {step}")
