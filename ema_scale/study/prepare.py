"""What a study needs before its runs: commands, each with the file or folder that it makes."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ema_scale.core.errors import UserError

log = logging.getLogger(__name__)


class Preparation(BaseModel):
    """One step.

    Args:
        run: an `ema` command, as a string or a list. Items that begin with ./ or ../ are relative to the study file.
        makes: the file or folder that the command writes, relative to the working directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: list[str] = Field(min_length=2)
    makes: str = Field(min_length=1)

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

    Raises UserError if a command fails, or does not make what it should.
    """
    for step in missing(steps):
        log.info("%s: makes %s first: %s", what, step.makes, step)
        code = subprocess.run([sys.executable, "-m", "ema_scale", *step.run[1:]]).returncode
        if code:
            raise UserError(f"{what}: prepare: exit code {code} of: {step}")
        if not Path(step.makes).exists():
            raise UserError(f"{what}: prepare: found no {step.makes} after: {step}")
