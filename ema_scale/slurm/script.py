"""The scripts of launch/slurm, with their #SBATCH lines and settings written for one job."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ema_scale.core.errors import UserError
from ema_scale.core.paths import shipped_root
from ema_scale.slurm.site import Site

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
