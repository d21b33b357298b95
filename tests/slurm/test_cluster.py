"""The test bed itself: nodes with names of their own, commands that work from outside."""

import os
import subprocess

import pytest

pytestmark = pytest.mark.slurm


def test_a_job_on_two_nodes(slurm):
    assert slurm.output("sinfo", "-h", "-o", "%D %t") == "3 idle"
    assert sorted(slurm.output("srun", "-N2", "-l", "hostname").splitlines()) == ["0: machine1", "1: machine2"]
    command = [slurm.bin / "sinfo", "-h", "-N", "-p", "debug", "-o", "%N"]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert listed.stdout.split() == ["node1", "node2", "node3"], listed.stderr
    inside = slurm.output("env", f"PATH={slurm.bin}:{os.environ['PATH']}", "srun", "squeue", "-h", "-o", "%T")
    assert inside == "RUNNING"
