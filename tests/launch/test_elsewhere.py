"""Without Slurm: one script for every machine, and what starts it on Kubernetes and SkyPilot."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm.finished import UNFINISHED
from tests.slurm.helpers import write_plugin
from tests.training.test_run import ROOT, recipe_of, world

__all__ = ["world"]
LAUNCH = ROOT / "launch"
JOBSET, TASK = LAUNCH / "kubernetes" / "jobset.yaml", LAUNCH / "skypilot" / "task.yaml"
SCHEMAS = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())


@pytest.mark.parametrize(("path", "schema"), [(JOBSET, "jobset"), (TASK, "skypilot")])
def test_it_fits_the_published_schema(path, schema):
    checker = jsonschema.Draft202012Validator(SCHEMAS[schema])
    given = yaml.safe_load(path.read_text())
    assert not [f"{error.json_path}: {error.message}" for error in checker.iter_errors(given)]
    assert list(checker.iter_errors({**given, "replicas": 1})), "a key that there is not is found"


def test_a_jobset_resumes_after_a_preemption_and_its_parts_fit_each_other():
    spec = yaml.safe_load(JOBSET.read_text())
    name, (train, evaluate) = spec["metadata"]["name"], spec["spec"]["replicatedJobs"]
    job = train["template"]["spec"]
    pod, (container,) = job["template"]["spec"], job["template"]["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(env["NODES"]) == job["parallelism"] == job["completions"]
    assert int(env["PROCESSES_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["ADDRESS"] == f"{name}-{train['name']}-0-0.{name}"  # JobSet's name for the first pod
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    codes = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert UNFINISHED in codes[0]
    (rule,) = spec["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert evaluate["dependsOn"] == [{"name": train["name"], "status": "Complete"}]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_both_and_the_image_run_the_same_script():
    pods = [
        job["template"]["spec"]["template"]["spec"]
        for job in yaml.safe_load(JOBSET.read_text())["spec"]["replicatedJobs"]
    ]
    commands = [pod["containers"][0]["command"] for pod in pods]
    assert commands == [["ema-train", "/shared/recipe.yaml"], ["ema", "eval", "/shared/runs/run"]]
    run = yaml.safe_load(TASK.read_text())["run"]
    assert "exec ema-train /shared/recipe.yaml" in run
    subprocess.run(["bash", "-n"], input=run, text=True, check=True)
    script = (LAUNCH / "train.sh").read_text()
    variables = set(re.findall(r"\$\{(\w+):-", script))
    given = set(re.findall(r"(\w+)=\"\$", run)) | {entry["name"] for entry in pods[0]["containers"][0]["env"]}
    assert given <= variables, "what both set is what the script reads"
    image = (LAUNCH / "container" / "Containerfile").read_text()
    assert "COPY --chmod=755 launch/train.sh /usr/local/bin/ema-train" in image
    for source in re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", image, re.M):
        assert all(name.startswith("dist/ema_scale-") or (ROOT / name).is_file() for name in source.split()), source
    (version,) = re.findall(r"uv==([\d.]+)", image)
    assert f"UV_VERSION := {version}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_term_to_the_script_saves_a_checkpoint_and_the_same_command_goes_on(world, tmp_path):
    write_plugin(tmp_path)
    recipe = recipe_of(world, tmp_path, max_steps=12, save_steps=100)
    run, values = RunDir(recipe.run_path), recipe.to_dict()
    values["defenses"] = [{"kind": "trouble", "pause": 0.5}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "PORT": "29617"}
    environment["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    command = ["bash", str(LAUNCH / "train.sh"), str(tmp_path / "recipe.yaml"), "training.logging_steps=1"]
    said = open(tmp_path / "said", "w+")  # noqa: SIM115

    def start(*more):
        return subprocess.Popen([*command, *more], env=environment, stdout=said, stderr=said)

    first = start()
    try:
        end = time.monotonic() + 300
        while len(read_jsonl(run.metrics_path)) < 2:
            assert time.monotonic() < end and first.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert first.wait(200) == UNFINISHED, (tmp_path / "said").read_text()
    finally:
        first.kill()
    assert run.status().state == "stopped"
    second = start()
    assert second.wait(300) == 0, (tmp_path / "said").read_text()
    assert [row["step"] for row in read_jsonl(run.metrics_path)] == list(range(1, 13))
    assert "going on from step" in (tmp_path / "said").read_text()
