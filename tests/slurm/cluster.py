"""A real Slurm cluster on this machine, for one test session: up in a second, gone without a trace.

    with SlurmCluster(nodes=3) as cluster:
        job = cluster.sbatch("-N2", "job.sbatch")
        assert cluster.wait(job)["JobState"] == "COMPLETED"

Every node has its own network, host name and process tree (Linux namespaces), so jobs see what they would see on a
cluster: other machines, with names that Slurm does not use, that can die. No systemd, no accounting database.
`cluster.bin` holds sbatch, squeue, ... that work from outside; put it first on PATH for code under test.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIG = """\
ClusterName=test
SlurmctldHost=head(10.77.0.254)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
FirstJobId={first_job}
ReturnToService=2
SlurmdTimeout=8
KillWait=3
InactiveLimit=0
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=DEFAULT Port=6818 CPUs={cpus} RealMemory=8000 State=UNKNOWN
NodeName=node[1-{nodes}] NodeHostname=machine[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}]
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What of Slurm is not installed here, in words; empty if nothing."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    packages = "slurmctld slurmd slurm-client munge iproute2"
    return f"{', '.join(gone)} not found; Debian: apt-get install {packages}" if gone else ""


class SlurmCluster:
    """`nodes` nodes, node1 to nodeN, of `cpus` cores each by Slurm's count (not by the machine's).

    Jobs of partition `urgent` take nodes from those of `debug`, which are told (TERM) and have `grace` seconds.
    """

    def __init__(self, nodes: int = 3, cpus: int = 4, grace: int = 120) -> None:
        self.nodes, self.cpus, self.grace = nodes, cpus, grace

    # ---- life ----

    def __enter__(self) -> SlurmCluster:
        self._write_files()
        environment = {**_outside_of_slurm(os.environ), "ROOT": str(self.root), "NODES": str(self.nodes)}
        environment["PATH"] = SEARCH
        as_root = os.geteuid() == 0
        spaces = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--net", "--uts"]
        if not as_root:  # stays a non-root user in there: slurmstepd then skips setgroups, which is refused
            spaces += ["--map-current-user", "--keep-caps"]
        self._complaints = open(self.root / "log" / "up.log", "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", str(self.root / "up.sh")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, env=environment, text=True,
            cwd="/", start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "up\n":
            message = f"the cluster did not start: {self.logs()}"
            self.__exit__()
            raise RuntimeError(message)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.first_process = int(children[0])
        user = [] if as_root else ["-U", "--preserve-credentials"]
        self._enter = ["nsenter", "-t", str(self.first_process), *user, "-n", "-u", "-m", "-p", "--"]
        self._write_commands()
        self.wait_for_nodes()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # up.sh ends, and with it every process in its namespace
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process.stdout.close()
        self._complaints.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Until every node is idle. Raises RuntimeError with the daemons' logs."""
        end = time.monotonic() + seconds
        while self.output("sinfo", "-h", "-o", "%D %t") != f"{self.nodes} idle":
            if time.monotonic() > end:
                raise RuntimeError(f"nodes are not idle: {self.output('sinfo')}\n{self.logs()}")
            time.sleep(0.05)

    # ---- jobs ----

    def run(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None, **options: Any) -> Any:
        """A command on the cluster's head node: the current folder, environment `env` (default: ours)."""
        inside = {**_outside_of_slurm(os.environ if env is None else env), "SLURM_CONF": str(self.root / "slurm.conf")}
        step = [*self._enter, "sh", "-c", 'cd "$0" && exec "$@"', str(options.pop("cwd", os.getcwd()))]
        return subprocess.run([*step, *command], env=inside, check=check, capture_output=True, text=True, **options)

    def output(self, *command: str) -> str:
        return str(self.run(*command).stdout).strip()

    def sbatch(self, *arguments: str, **options: Any) -> str:
        """Submit; the job's id."""
        return str(self.run("sbatch", "--parsable", *arguments, **options).stdout).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "show", "job", "-o", job, check=False).stdout
        return dict(part.split("=", 1) for part in text.split("\n")[0].split() if "=" in part)

    def wait(self, job: str, states: Sequence[str] = ENDED, seconds: float = 600) -> dict[str, str]:
        """Until the job is in one of `states`. A requeued job is held for two minutes; here for three seconds.

        Sooner, its nodes could still refuse the job id that they have just been told to end.
        """
        end, hastened = time.monotonic() + seconds, "0"
        while (now := self.job(job)).get("JobState") not in states:
            if now.get("Reason") == "BeginTime" and now["Restarts"] != hastened:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)
                hastened = now["Restarts"]
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} after {seconds} s: {now}\n{self.logs()}")
            time.sleep(0.2)
        return now

    # ---- nodes ----

    def kill_node(self, node: int) -> None:
        """Pull node N's plug: its daemon and all its processes die at once, and it stays away until `start_node`."""
        self.run("kill", "-KILL", (self.root / f"node{node}.pid").read_text().strip())

    def start_node(self, node: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{node}\n")
        self._process.stdin.flush()

    # ---- files ----

    def _write_files(self) -> None:
        # Not pytest's tmp_path: munged wants o+x up to its socket, and a socket's path is at most 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.root.chmod(0o755)
        self.bin = self.root / "bin"
        spools = [f"spool/node{i}" for i in range(1, self.nodes + 1)]
        for folder in ("munge", "state", "log", "bin", *spools):
            (self.root / folder).mkdir(parents=True, mode=0o755)
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        hosts = ["127.0.0.1 localhost", "10.77.0.254 head"]
        hosts += [f"10.77.0.{i} machine{i}" for i in range(1, self.nodes + 1)]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        # No DNS in there: without this each of torch's reverse look-ups waits 10 s.
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        # slurmd starts a cgroup plugin even where nothing uses cgroups; v1 is the one that touches nothing.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.root / "slurm.conf").write_text(
            CONFIG.format(
                user=pwd.getpwuid(os.geteuid()).pw_name, root=self.root, nodes=self.nodes, cpus=self.cpus,
                grace=self.grace,
                first_job=1000 + os.getpid() * 100 % 900000,  # a run folder never sees one id twice
            )
        )  # fmt: skip
        for name in ("up.sh", "node.sh"):
            shutil.copy(HERE / name, self.root / name)

    def _write_commands(self) -> None:
        for name in COMMANDS:
            real = shutil.which(name, path=SEARCH)
            path = self.bin / name
            path.write_text(
                f"#!/bin/sh\nexport SLURM_CONF={self.root}/slurm.conf\n"
                f'[ -e /run/{self.root.name} ] && exec {real} "$@"  # in the cluster already\n'
                f'exec {" ".join(self._enter)} sh -c \'cd "$0" && exec {real} "$@"\' "$PWD" "$@"\n'
            )
            path.chmod(0o755)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test's message."""
        files = sorted((self.root / "log").iterdir())
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in files)


def _outside_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
