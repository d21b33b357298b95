"""A cluster's settings, from a small YAML file named by --site or EMA_SITE, and batch scripts filled in from them."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ema_scale.core.errors import UserError, explain
from ema_scale.core.files import read_yaml
from ema_scale.core.numbers import Count, CountOrZero, Positive
from ema_scale.core.paths import find_file, shipped_root
from ema_scale.core.text import one_line

_LINE = r"^[^\n]*$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _OtherJobs(_Section):
    """Where other jobs differ from training."""

    partition: str | None = Field(None, pattern=_LINE, description="sbatch --partition.", examples=["gpu-small"])
    qos: str | None = Field(None, pattern=_LINE, description="sbatch --qos.", examples=["short"])
    constraint: str | None = Field(None, pattern=_LINE, description="sbatch --constraint.", examples=["a100"])
    time: str = Field("12:00:00", pattern=_LINE, description="Time limit, as Slurm writes it.")
    gpus: CountOrZero = Field(1, description="GPUs, at least. A recipe's engine may take more.")
    gpus_per_node: CountOrZero | None = Field(None, description="GPUs that such a node has.", examples=[4])
    cpus_per_node: Count | None = Field(None, description="CPU cores per node.", examples=[32])
    memory: str | None = Field(None, pattern=_LINE, description="Memory per node, as sbatch --mem.", examples=["200G"])
    exclusive: bool | None = Field(None, description="Take whole nodes.", examples=[True])


class EvaluationSite(_OtherJobs):
    """Where evaluation jobs differ from training. What is left out is as for training, by their share of GPUs."""

    engines: Count = Field(
        1,
        description="Engines that evaluate a study together: as many tasks of an array, each with `gpus` GPUs. They "
        "share one queue of questions, and one of them asks the judge.",
        examples=[4],
    )


class ReportSite(_OtherJobs):
    """Where a study's report job differs from its evaluation. What is left out is as for evaluation."""

    time: str = Field("01:00:00", pattern=_LINE, description="Time limit, as Slurm writes it.")
    gpus: CountOrZero = Field(0, description="GPUs. A report needs none, but some partitions give nothing else.")


class Site(_Section):
    """What is peculiar to one Slurm cluster. Every key may be left out."""

    partition: str | None = Field(None, pattern=_LINE, description="sbatch --partition.", examples=["gpu"])
    account: str | None = Field(None, pattern=_LINE, description="sbatch --account.", examples=["my-project"])
    qos: str | None = Field(None, pattern=_LINE, description="sbatch --qos.", examples=["normal"])
    constraint: str | None = Field(None, pattern=_LINE, description="sbatch --constraint.", examples=["h100"])
    reservation: str | None = Field(None, pattern=_LINE, description="sbatch --reservation.", examples=["course"])
    time: str = Field("24:00:00", pattern=_LINE, description="Time limit of a training job, as Slurm writes it.")
    gpus_per_node: CountOrZero = Field(8, description="GPUs per node; 0: nodes without GPUs.")
    gpu_option: str = Field(
        "--gpus-per-node={n}",
        pattern=_LINE,
        description="The sbatch option that requests {n} GPUs per node.",
        examples=["--gres=gpu:{n}"],
    )
    cpus_per_node: Count | None = Field(
        None, description="CPU cores per node. Empty: 4 per GPU, or 1 per process.", examples=[64]
    )
    memory: str | None = Field(
        None, pattern=_LINE, description="Memory per node, as sbatch --mem. Empty: Slurm's default.", examples=["0"]
    )
    exclusive: bool = Field(False, description="Take whole nodes.")
    sbatch: list[str] = Field([], description="Further sbatch options.", examples=[["--nice=100"]])
    srun: list[str] = Field([], description="Further srun options.", examples=[["--cpu-bind=cores"]])
    mail: str | None = Field(None, pattern=_LINE, description="sbatch --mail-user.", examples=["me@example.org"])
    mail_type: str = Field("END,FAIL", pattern=_LINE, description="sbatch --mail-type, if `mail` is set.")
    max_parallel: Count | None = Field(
        None, description="Runs of a sweep that train at once. Empty: no limit.", examples=[4]
    )
    container: str | None = Field(None, description="Image that Python runs in.", examples=["ema.sqsh"])
    container_runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="What starts the container.")
    container_mounts: str | None = Field(
        None, description="What the container sees, as from:to, with commas between.", examples=["/shared:/shared"]
    )
    wrap: list[str] = Field([], description="A command that Python runs in.", examples=[["numactl", "--localalloc"]])
    python: str | None = Field(
        None,
        description="A Python that has ema_scale. Empty: that of the container or conda environment, else the one that "
        "submits.",
        examples=["python"],
    )
    modules: list[str] = Field([], description="What `module load` loads first.", examples=[["cuda/12.8"]])
    conda: str | None = Field(None, description="A conda environment, by name or path.", examples=["ema"])
    setup: list[str] = Field(
        [], description="Shell lines that run first on the first node.", examples=[["module load cuda/12.8"]]
    )
    environment: dict[str, str] = Field(
        {}, description="Variables for every process.", examples=[{"HF_HUB_OFFLINE": "1"}]
    )
    scratch: str | None = Field(
        None,
        pattern=_LINE,
        description="A folder on each node's own disk. Base models are copied there once and loaded from there.",
        examples=["$TMPDIR"],
    )
    warning_seconds: Count = Field(
        120, description="Seconds before the time limit at which a checkpoint is saved and the job requeues."
    )
    timeout_minutes: Positive = Field(
        30, description="A process that waits this many minutes for another one ends the job."
    )
    max_requeues: CountOrZero = Field(50, description="After so many requeues a preempted job ends.")
    evaluation: EvaluationSite = Field(EvaluationSite(), description="Where evaluation jobs differ.")
    report: ReportSite = Field(ReportSite(), description="Where a study's report job differs.")

    @field_validator("gpu_option")
    @classmethod
    def _counts(cls, value: str) -> str:
        if "{n}" not in value:
            raise ValueError("expected an sbatch option with {n} in it, such as --gres=gpu:{n}")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"expected names of variables, found {name!r}")
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        # HF_HUB_OFFLINE: 1 is a number in YAML.
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    def srun_options(self) -> list[str]:
        """Options of every srun: the site's own and pyxis' for the container."""
        options = list(self.srun)
        if self.container and self.container_runtime == "pyxis":
            options.append(f"--container-image={self.container}")
            if self.container_mounts:
                options.append(f"--container-mounts={self.container_mounts}")
        return options

    def python_wrap(self) -> list[str]:
        """The command that Python runs in: the site's own, in it apptainer's."""
        if not self.container or self.container_runtime == "pyxis":
            return self.wrap
        mounts = ["--bind", self.container_mounts] if self.container_mounts else []
        gpus = ["--nv"] if self.gpus_per_node else []
        return [*self.wrap, "apptainer", "exec", *gpus, *mounts, self.container]

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


def _given(section: _OtherJobs) -> dict[str, Any]:
    return section.model_dump(exclude={"gpus", "engines"}, exclude_none=True)


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
    values = read_yaml(find_file(named), "the site file")
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
_NAME_BYTES, _PATH_BYTES = 255, 4000  # of file systems; a path leaves room for a log's name


def fill_script(name: str, options: Sequence[str], settings: Sequence[str]) -> str:
    """launch/slurm/<name> with these #SBATCH options and these shell lines as its settings.

    Raises UserError if the script is not there, and for an option that is more than one line.
    """
    for option in options:
        try:
            one_line(option)
        except ValueError as error:
            raise UserError(f"#SBATCH {option!r:.200}: {error}; it would become a line of the job script") from None
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
    """What #SBATCH lines say for one job.

    Args:
        log: its name takes Slurm's %-patterns, such as %j for the job's id; its folder is taken as it is.
        gpus: of a node.
        processes: of a node.

    Raises UserError for a log that Slurm or a file system cannot name.
    """
    _check_log(log)
    given = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "reservation": site.reservation,
        "cpus-per-task": _cpus(site, gpus, processes),
        "mem": site.memory,
        "mail-user": site.mail,
        "mail-type": site.mail_type if site.mail else None,
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
        f"--output={shlex.quote(str(log.parent).replace('%', '%%') + '/' + log.name)}",
        *site.sbatch,
    ]


def _check_log(log: Path) -> None:
    """Raises UserError if no job can write there: every limit is met here and not on a node, hours later."""
    if "\\" in str(log.parent):
        raise UserError(f"{log.parent}: found a backslash, which Slurm does not take in a path; rename the folder")
    whole = os.fsencode(log.absolute())
    longest = max(whole.split(b"/"), key=len)
    if len(longest) > _NAME_BYTES or len(whole) > _PATH_BYTES:
        name = f"{os.fsdecode(longest)[:40]}..."
        raise UserError(
            f"{name}: found a name of {len(longest)} bytes in a path of {len(whole)}, expected at most {_NAME_BYTES} "
            f"and {_PATH_BYTES}; choose a shorter name or output"
        )


def _cpus(site: Site, gpus: int, processes: int) -> int | None:
    """CPUs of a node's one task; None: as many as Slurm gives, which is all of an exclusive node's."""
    said = any(o.startswith(("--cpus-per-", "-c", "--exclusive")) for o in [*site.sbatch, *site.gpu_option.split()])
    if site.cpus_per_node or site.exclusive or said:
        return site.cpus_per_node
    return max(_CPUS_A_GPU * gpus, processes) if gpus or processes > 1 else None


def settings(site: Site, python: str, logs: Path, more: Mapping[str, object] | None = None) -> list[str]:
    """Shell lines for the settings block. python: the one that submits."""
    here = "python" if site.container or site.conda else python
    values = {"PYTHON": site.python or here, **(more or {}), "LOGS": logs, "MAX_REQUEUES": site.max_requeues}
    exported = {**site.environment, "EMA_TIMEOUT_SECONDS": round(site.timeout_minutes * 60)}
    if site.scratch:
        exported["EMA_SCRATCH"] = site.scratch  # each node puts in its own variables
    return [
        *(f"{key}={shlex.quote(str(value))}" for key, value in values.items()),
        f"SRUN_OPTIONS=({shlex.join(site.srun_options())})",
        f"WRAP=({shlex.join(site.python_wrap())})",
        *(f"export {key}={shlex.quote(str(value))}" for key, value in exported.items()),
        *_modules(site.modules),
        *_conda(site.conda),
        *site.setup,
    ]


def _modules(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    what = shlex.join(names)
    return [  # a batch script is no login shell, which would know `module`
        "for init in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do",
        '  type module &>/dev/null || { [ -r "$init" ] && . "$init"; }',
        "done",
        f'module load {what} || {{ echo "FAILED: the site file\'s modules cannot be loaded"; exit 1; }}',
    ]


def _conda(name: str | None) -> list[str]:
    if name is None:
        return []
    return [
        f'. "$("${{CONDA_EXE:-conda}}" info --base)/etc/profile.d/conda.sh" && conda activate {shlex.quote(name)} ||',
        '  { echo "FAILED: the site file\'s conda environment cannot be activated"; exit 1; }',
    ]
