"""A cluster's settings, from a small YAML file named by --site or EMA_SITE, and batch scripts filled in from them."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ema_scale.core.errors import UserError, explain
from ema_scale.core.paths import shipped_root

_LINE = r"^[^\n]*$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EvaluationSite(_Section):
    """Where evaluation differs from training. None: as for training; cores and memory: the share of its GPUs."""

    partition: str | None = Field(None, pattern=_LINE)
    qos: str | None = Field(None, pattern=_LINE)
    constraint: str | None = Field(None, pattern=_LINE)
    time: str = Field("12:00:00", pattern=_LINE)
    gpus: int = Field(1, ge=0, description="GPUs, at least: more where a recipe's engine takes more")
    gpus_per_node: int | None = Field(None, ge=0, description="of an evaluation node")
    cpus_per_node: int | None = Field(None, ge=1)
    memory: str | None = Field(None, pattern=_LINE)
    exclusive: bool | None = None


class ReportSite(EvaluationSite):
    """Where a study's report differs from its evaluation. None: as evaluation says; else one GPU's share."""

    time: str = Field("01:00:00", pattern=_LINE)
    gpus: int = Field(0, ge=0, description="GPUs; a report needs none, but some partitions give nothing else")


class Site(_Section):
    """A cluster's own settings; see launch/README.md. Everything may be left out."""

    partition: str | None = Field(None, pattern=_LINE)
    account: str | None = Field(None, pattern=_LINE)
    qos: str | None = Field(None, pattern=_LINE)
    constraint: str | None = Field(None, pattern=_LINE)
    reservation: str | None = Field(None, pattern=_LINE)
    time: str = Field("24:00:00", pattern=_LINE, description="time limit of a training job, as Slurm writes it")
    gpus_per_node: int = Field(8, ge=0, description="0: nodes without GPUs")
    gpu_option: str = Field("--gpus-per-node={n}", pattern=_LINE, description="{n} is the number of GPUs of a node")
    cpus_per_node: int | None = Field(None, ge=1)
    memory: str | None = Field(None, pattern=_LINE, description="of a node, as sbatch --mem writes it")
    exclusive: bool = False
    sbatch: list[str] = Field([], description="further sbatch options, such as --nice=100")
    srun: list[str] = Field([], description="further srun options")
    container: str | None = Field(None, description="image for srun --container-image (pyxis)")
    container_mounts: str | None = Field(None, description="srun --container-mounts")
    wrap: list[str] = Field([], description="a command to run Python in, such as [apptainer, exec, --nv, image.sif]")
    python: str | None = Field(None, description="Python that has ema_scale; None: the one that submits")
    setup: list[str] = Field([], description="shell lines that run first on the first node")
    environment: dict[str, str] = Field({}, description="variables for every process")
    warning_seconds: int = Field(120, ge=1, description="before the time limit: a checkpoint is saved")
    timeout_minutes: float = Field(30, gt=0, description="a process that waits so long for another one ends the job")
    max_requeues: int = Field(50, ge=0)
    evaluation: EvaluationSite = EvaluationSite()
    report: ReportSite = ReportSite()

    @field_validator("gpu_option")
    @classmethod
    def _counts(cls, value: str) -> str:
        if "{n}" not in value:
            raise ValueError("expected an sbatch option with {n} in it, such as --gres=gpu:{n}")
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        # HF_HUB_OFFLINE: 1 is a number in YAML.
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    def srun_options(self) -> list[str]:
        """Options of every srun: the site's own and the container's."""
        options = list(self.srun)
        if self.container:
            options.append(f"--container-image={self.container}")
        if self.container_mounts:
            options.append(f"--container-mounts={self.container_mounts}")
        return options

    def where_training_takes(self, gpus: int | None) -> Site:
        """This site for jobs of a run that trains on `gpus` GPUs of a node (None: all that the site says). What a node
        has remains the site's word, but for 0, nodes without GPUs, and for more than it says."""
        if gpus is None:
            return self
        return self.model_copy(update={"gpus_per_node": gpus and max(gpus, self.gpus_per_node)})

    def for_training(self, gpus: int | None) -> Site:
        """This site as a training job on `gpus` GPUs of each node sees it."""
        here = self.where_training_takes(gpus)
        return here._part(here.gpus_per_node if gpus is None else gpus, {})

    def evaluation_node(self) -> int:
        """GPUs of a node that evaluates."""
        given = self.evaluation.gpus_per_node
        return self.gpus_per_node if given is None else given

    def for_evaluation(self, gpus: int) -> Site:
        """This site as an evaluation job on `gpus` GPUs sees it."""
        return self._part(gpus, _given(self.evaluation))

    def for_report(self) -> Site:
        """This site as a study's report job sees it."""
        return self._part(self.report.gpus, {**_given(self.evaluation), **_given(self.report)})

    def _part(self, gpus: int, given: dict[str, Any]) -> Site:
        # A job on a part of a node leaves the rest of it to others: cores and memory by its GPUs, at least by one.
        node = given.get("gpus_per_node", self.gpus_per_node)
        share = max(gpus, 1) / node if node else 1.0
        rest: dict[str, Any] = {}
        if share < 1:
            cpus = self.cpus_per_node
            rest = {
                "exclusive": False,
                "cpus_per_node": cpus and max(1, math.floor(cpus * share)),
                "memory": self.memory and _memory(self.memory, share),
            }
        return self.model_copy(update={**rest, **given})


def _given(section: EvaluationSite) -> dict[str, Any]:
    return section.model_dump(exclude={"gpus"}, exclude_none=True)


def _memory(whole: str, share: float) -> str | None:
    """A share of what sbatch --mem says, in MiB; None, Slurm's own default, for "0", which is all of a node's."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", whole.upper())
    if found is None:
        return whole
    size = int(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found[2]]
    return f"{math.ceil(size * share)}M" if size else None


def load_site(path: Path | None = None) -> Site:
    """The site file `path`, else the one EMA_SITE names, else Slurm's own defaults.

    Raises UserError naming file and field for what cannot be read, an unknown key or a bad value.
    """
    named = path or (Path(os.environ["EMA_SITE"]) if os.environ.get("EMA_SITE") else None)
    if named is None:
        return Site()
    try:
        values = yaml.safe_load(named.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{named}: cannot read the site file ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{named}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{named}: found {type(values).__name__}, expected a mapping of site fields")
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{named}: {explain(p, Site)}" for p in error.errors())) from None


log = logging.getLogger(__name__)
FOLDER = shipped_root() / "launch" / "slurm"
_CPUS_A_GPU = 4  # where the site does not say; one of Slurm's own for a node's eight processes would starve them


_BEGIN, _END = "# >>> settings", "# <<< settings"


def fill_script(name: str, options: Sequence[str], settings: Sequence[str]) -> str:
    """launch/slurm/<name> with these #SBATCH options and these shell lines as its settings.

    Raises UserError if the script is not there.
    """
    path = FOLDER / name
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the script ({error.strerror}); install ema_scale again") from None
    begin, end = lines.index(_BEGIN), lines.index(_END)
    body = [*lines[1 : begin + 1], *settings, *lines[end:]]
    kept = [line for line in body if not line.startswith("#SBATCH")]
    return "\n".join([lines[0], *(f"#SBATCH {option}" for option in options), *kept]) + "\n"


def sbatch_options(
    site: Site, name: str, log: Path, *, nodes: int = 1, gpus: int = 0, processes: int = 1, time: str | None = None
) -> list[str]:
    """What #SBATCH lines say for one job; `log` takes Slurm's %-patterns, such as %j for the job's id. gpus, processes:
    of a node."""
    given = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "cpus-per-task": _cpus(site, gpus, processes),
        "mem": site.memory,
    }
    return [
        f"--job-name={name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([site.gpu_option.replace("{n}", str(gpus))] if gpus else []),
        *(["--exclusive"] if site.exclusive else []),
        *(f"--{key}={shlex.quote(str(value))}" for key, value in given.items() if value is not None),
        f"--time={time or site.time}",
        f"--signal=B:USR1@{site.warning_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(str(log))}",
        *site.sbatch,
    ]


def _cpus(site: Site, gpus: int, processes: int) -> int | None:
    """CPUs of a node's one task; None: as many as Slurm gives, which is all of an exclusive node's."""
    said = any(o.startswith(("--cpus-per-", "-c", "--exclusive")) for o in [*site.sbatch, *site.gpu_option.split()])
    if site.cpus_per_node or site.exclusive or said:
        return site.cpus_per_node
    return max(_CPUS_A_GPU * gpus, processes) if gpus or processes > 1 else None


def settings(site: Site, python: str, logs: Path, more: Mapping[str, object] | None = None) -> list[str]:
    """Shell lines for the settings block."""
    values = {"PYTHON": site.python or python, **(more or {}), "LOGS": logs, "MAX_REQUEUES": site.max_requeues}
    exported = {**site.environment, "EMA_TIMEOUT_SECONDS": round(site.timeout_minutes * 60)}
    return [
        *(f"{key}={shlex.quote(str(value))}" for key, value in values.items()),
        f"SRUN_OPTIONS=({shlex.join(site.srun_options())})",
        f"WRAP=({shlex.join(site.wrap)})",
        *(f"export {key}={shlex.quote(str(value))}" for key, value in exported.items()),
        *site.setup,
    ]
