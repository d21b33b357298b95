"""Site files and the scripts that are filled from them; no Slurm needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.recipe import build_recipe, load_recipe
from ema_scale.slurm.site import FOLDER, EvaluationSite, Site, fill_script, load_site, settings
from ema_scale.slurm.submit import JobSize, evaluation_job, report_job, training_job
from ema_scale.study.grid import load_study

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "smallworld.yaml"


def site_of(folder, text):
    path = folder / "site.yaml"
    path.write_text(text)
    return load_site(path)


def test_the_example_site_is_valid_and_no_site_is_too(monkeypatch):
    assert load_site(FOLDER / "site.yaml").evaluation.partition == "gpu-small"
    monkeypatch.delenv("EMA_SITE", raising=False)
    assert load_site() == Site()
    monkeypatch.setenv("EMA_SITE", str(FOLDER / "site.yaml"))
    assert load_site().environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partion: gpu", r"site.yaml: unknown key 'partion'; did you mean 'partition'\?"),
        ("evaluation: {gpu: 1}", r"unknown key 'evaluation.gpu'; did you mean 'gpus'\?"),
        ("gpu_option: --gres=gpu:8", r"expected an sbatch option with \{n\} in it"),
        ('partition: "a\\n#SBATCH --x"', "partition: "),
        ("- a", "found list, expected a mapping of site fields"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_site_file_is_a_message(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        site_of(tmp_path, text)


def test_a_filled_script_holds_the_site_and_is_valid_bash(tmp_path):
    site = site_of(
        tmp_path,
        "{partition: big, account: me, gpu_option: '--gres=gpu:a100:{n}', cpus_per_node: 64, sbatch: [--nice=10],"
        " container: 'img.sqsh', setup: [module load cuda], environment: {HF_HUB_OFFLINE: 1, WORDS: it's},"
        " timeout_minutes: 5, evaluation: {partition: small}}",
    )
    recipe = load_recipe(RECIPE)
    training = training_job(recipe, site, JobSize(nodes=4, time="1:00:00")).script
    options = [line.removeprefix("#SBATCH ") for line in training.splitlines() if line.startswith("#SBATCH")]
    expected = ["--partition=big", "--account=me", "--nodes=4", "--gres=gpu:a100:8", "--cpus-per-task=64", "--nice=10"]
    assert {*expected, "--time=1:00:00", "--requeue", "--signal=B:USR1@120"} <= set(options)
    assert len({option.split("=")[0] for option in options}) == len(options)
    lines = training.splitlines()
    assert {"PROCESSES_PER_NODE=8", "SRUN_OPTIONS=(--container-image=img.sqsh)", "module load cuda"} <= set(lines)
    assert "export EMA_TIMEOUT_SECONDS=300" in lines and "export WORDS='it'\"'\"'s'" in lines
    evaluation = evaluation_job(recipe.name, recipe.run_path, site).script
    assert "#SBATCH --partition=small" in evaluation and "#SBATCH --gres=gpu:a100:1" in evaluation
    for text in (training, evaluation):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_site_names_modules_conda_containers_scratch_mail_and_a_throttle(tmp_path):
    recipe = load_recipe(RECIPE)

    def lines(text, **size):
        script = training_job(recipe, site_of(tmp_path, text), JobSize(**size)).script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        return script.splitlines()

    said = lines("{modules: [cuda/12.8, 'gcc'], conda: /envs/ema, mail: me@example.org, scratch: $TMPDIR/models}")
    assert {"#SBATCH --mail-user=me@example.org", "#SBATCH --mail-type=END,FAIL"} <= set(said)
    assert {"PYTHON=python", "export EMA_SCRATCH='$TMPDIR/models'"} <= set(said)
    where = [
        next(i for i, line in enumerate(said) if part in line) for part in ("module load cuda/12.8 gcc", "/envs/ema")
    ]
    assert where == sorted(where) and where[1] < said.index("# <<< settings")

    container = "container: ema.sif, container_mounts: '/data:/data'"
    said = lines(f"{{{container}, container_runtime: apptainer}}")
    wrap = "WRAP=(apptainer exec --nv --bind /data:/data ema.sif)"
    assert {wrap, "PYTHON=python", "SRUN_OPTIONS=()"} <= set(said)
    assert "WRAP=(apptainer exec --bind /data:/data ema.sif)" in lines(
        f"{{{container}, container_runtime: apptainer, gpus_per_node: 0}}"
    )
    said = lines(f"{{{container}}}")
    pyxis = "SRUN_OPTIONS=(--container-image=ema.sif --container-mounts=/data:/data)"
    assert {pyxis, "PYTHON=python", "WRAP=()"} <= set(said)
    assert "PYTHON=/opt/python" in lines(f"{{{container}, python: /opt/python}}")
    with pytest.raises(UserError, match="container_runtime: expected pyxis or apptainer"):
        site_of(tmp_path, "container_runtime: docker")


def test_modules_and_conda_are_loaded_by_the_script_itself(tmp_path):
    """In a shell that knows neither, as a batch script's; what cannot be loaded ends the job."""
    (tmp_path / "etc" / "profile.d").mkdir(parents=True)
    (tmp_path / "etc" / "profile.d" / "conda.sh").write_text('conda() { [ "$2" = ema ] && export IN="$2"; }\n')
    conda = tmp_path / "conda"
    conda.write_text(f"#!/bin/sh\necho {tmp_path}\n")
    conda.chmod(0o755)

    def run(site, before=""):
        script = "\n".join(
            [before, *settings(site, "python", tmp_path)[-(7 if site.modules else 2) :], 'echo "in $IN"']
        )
        return subprocess.run(
            ["bash", "-c", script],
            env={"CONDA_EXE": str(conda), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )

    assert run(Site(conda="ema")).stdout == "in ema\n"
    wrong = run(Site(conda="other"))
    assert wrong.returncode == 1 and "FAILED: the site file's conda environment" in wrong.stdout
    module = 'module() { [ "$2" = cuda ]; }'
    assert run(Site(modules=["cuda"], conda="ema"), module).stdout == "in ema\n"
    wrong = run(Site(modules=["gone"], conda="ema"), module)
    assert wrong.returncode == 1 and "FAILED: the site file's modules" in wrong.stdout


def test_paths_with_percent_signs_and_blanks_reach_slurm_as_they_are(tmp_path):
    folder = tmp_path / "100% of %j"
    script = evaluation_job("run", folder, Site()).script
    assert f"#SBATCH --output='{tmp_path}/100%% of %%j/slurm/eval-%j.log'" in script.splitlines()
    with pytest.raises(UserError, match="found a backslash, which Slurm does not take"):
        evaluation_job("run", tmp_path / "a\\b", Site())


@pytest.mark.parametrize("folder", ["n" * 256, "/".join(["deep" * 50] * 25)])
def test_a_name_that_no_file_system_takes_is_refused_before_submission(tmp_path, folder):
    with pytest.raises(UserError, match="expected at most 255 and 4000; choose a shorter name or output"):
        evaluation_job("run", tmp_path / folder, Site())


def head(job):
    """Its #SBATCH options, by name."""
    found = [line.removeprefix("#SBATCH --") for line in job.script.splitlines() if line.startswith("#SBATCH")]
    return dict([*option.split("=", 1), ""][:2] for option in found)


def engine(tensor, pipeline=1, **more):
    parallel = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    values = load_recipe(RECIPE).to_dict()
    return build_recipe(
        {**values, "evaluation": {**values["evaluation"], "sampler": "vllm", "engine": parallel, **more}}
    )


def evaluation_of(site, *recipes, gpus=None):
    return head(evaluation_job("run", RECIPE, site, recipes, gpus=gpus))


def test_an_evaluation_gets_the_gpus_of_its_largest_engine(tmp_path):
    small, large = engine(1), engine(2, 2)
    assert evaluation_of(Site(), small)["gpus-per-node"] == "1"
    assert evaluation_of(Site(), small, large)["gpus-per-node"] == "4"
    assert evaluation_of(site_of(tmp_path, "evaluation: {gpus: 2}"), small)["gpus-per-node"] == "2"
    assert evaluation_of(site_of(tmp_path, "evaluation: {gpus: 2}"), large)["gpus-per-node"] == "4"
    judge = {"kind": "vllm", "model": "m", "engine": {"tensor_parallel_size": 8}}
    assert evaluation_of(Site(), engine(2, judge=judge))["gpus-per-node"] == "8"
    assert evaluation_of(Site(), engine(4, sampler="openai"))["gpus-per-node"] == "1"
    assert "gpus-per-node" not in evaluation_of(Site(), large, gpus=0)
    refused = "evaluation.engine: found tensor_parallel_size x pipeline_parallel_size = 4 GPUs, .* node has 2"
    for small_node in ("gpus_per_node: 2", "evaluation: {gpus_per_node: 2}"):
        with pytest.raises(UserError, match=refused):
            evaluation_of(site_of(tmp_path, small_node), large)
    # How many GPUs the training takes does not say how many a node has, unless the site's nodes have fewer.
    assert evaluation_of(Site(), large, gpus=2)["gpus-per-node"] == "4"
    assert evaluation_of(site_of(tmp_path, "gpus_per_node: 2"), large, gpus=4)["gpus-per-node"] == "4"
    assert evaluation_of(site_of(tmp_path, "evaluation: {gpus_per_node: 4}"), large, gpus=2)["gpus-per-node"] == "4"
    with pytest.raises(UserError, match="tensor_parallel_size: found 'all', expected a number"):
        evaluation_of(Site(), engine("all"))


@pytest.mark.parametrize("name", ["scaling-qwen2.5", "scaling-llama"])
def test_the_scaling_studies_evaluations_get_a_whole_node(tmp_path, name):
    recipes = load_study(RECIPE.parents[1] / "studies" / f"{name}.yaml").runs()
    assert evaluation_of(load_site(FOLDER / "site.yaml"), *recipes)["gpus-per-node"] == "8"
    with pytest.raises(UserError, match=r"(32|70)b-medical-none-s0: evaluation.engine: .* = 8 GPUs"):
        evaluation_of(Site(gpus_per_node=4), *recipes)


def test_cores_and_memory_go_by_the_gpus(tmp_path):
    recipe = load_recipe(RECIPE)
    whole = "cpus_per_node: 64, memory: 1000G, exclusive: true"
    site = site_of(tmp_path, f"{{{whole}}}")
    training, evaluation = head(training_job(recipe, site, JobSize())), evaluation_of(site, recipe)
    report = head(report_job("run", RECIPE, site, "title"))
    assert (training["cpus-per-task"], training["mem"]) == ("64", "1000G") and "exclusive" in training
    for part in (evaluation, report):  # an eighth
        assert (part["cpus-per-task"], part["mem"]) == ("8", "128000M") and "exclusive" not in part
    all_of_it = evaluation_of(site, engine(8))
    assert (all_of_it["cpus-per-task"], all_of_it["mem"]) == ("64", "1000G") and "exclusive" in all_of_it
    assert "mem" not in evaluation_of(site_of(tmp_path, "memory: '0'"), recipe)

    said = "evaluation: {cpus_per_node: 12, memory: 90G, exclusive: true}, report: {cpus_per_node: 2, exclusive: false}"
    site = site_of(tmp_path, f"{{{whole}, {said}}}")
    evaluation, report = evaluation_of(site, recipe), head(report_job("run", RECIPE, site, "title"))
    assert (evaluation["cpus-per-task"], evaluation["mem"]) == ("12", "90G") and "exclusive" in evaluation
    assert (report["cpus-per-task"], report["mem"]) == ("2", "90G") and "exclusive" not in report


def test_a_training_on_a_part_of_a_node_leaves_the_rest_to_others(tmp_path):
    recipe = load_recipe(RECIPE)
    site = site_of(tmp_path, "{gpus_per_node: 8, cpus_per_node: 64, memory: '0', exclusive: true}")

    def part(job):
        return {key: job.get(key) for key in ("gpus-per-node", "cpus-per-task", "mem", "exclusive")}

    eighth = {"gpus-per-node": "1", "cpus-per-task": "8", "mem": None, "exclusive": None}
    assert part(head(training_job(recipe, site, JobSize(gpus=1)))) == eighth
    assert part(evaluation_of(site, recipe, gpus=1)) == part(evaluation_of(site, recipe)) == eighth
    half = {**eighth, "gpus-per-node": "4", "cpus-per-task": "32"}
    assert part(head(training_job(recipe, site, JobSize(nodes=2, gpus=4)))) == half
    assert part(evaluation_of(site, engine(4), gpus=1)) == half
    whole = {"gpus-per-node": "8", "cpus-per-task": "64", "mem": "0", "exclusive": ""}
    for size in (JobSize(), JobSize(gpus=8)):
        assert part(head(training_job(recipe, site, size))) == whole
    more = {**whole, "gpus-per-node": "16"}  # than the site says
    assert part(head(training_job(recipe, site, JobSize(gpus=16)))) == more
    none = {**whole, "gpus-per-node": None}
    assert part(head(training_job(recipe, site, JobSize(gpus=0)))) == part(evaluation_of(site, recipe, gpus=0)) == none


def test_without_a_word_on_cores_every_process_has_some(tmp_path):
    recipe = load_recipe(RECIPE)

    def cpus(text, **size):
        return head(training_job(recipe, site_of(tmp_path, text), JobSize(**size))).get("cpus-per-task")

    assert cpus("{}") == "32" and cpus("{}", gpus=0, processes=3) == "3" and cpus("{}", gpus=0) is None
    assert evaluation_of(Site(), recipe)["cpus-per-task"] == "4"
    # All of an exclusive node's, and options that exclude each other.
    assert cpus("exclusive: true") is None and cpus("sbatch: [--cpus-per-gpu=8]") is None


def test_processes_without_gpus(tmp_path):
    site = site_of(tmp_path, "gpus_per_node: 0")
    recipe = load_recipe(RECIPE)
    script = training_job(recipe, site, JobSize(nodes=2)).script
    assert "PROCESSES_PER_NODE=1\n" in script and "gpus" not in script.split("# >>> settings")[0]

    def evaluation(*arguments, **options):
        return evaluation_job("run", recipe.run_path, *arguments, **options).script.split("# >>> settings")[0]

    assert "gpus-per-node" not in evaluation(site) and "gpus-per-node" not in evaluation(Site(), gpus=0)
    assert "--gpus-per-node=1\n" in evaluation(Site())


def test_the_scripts_by_hand_and_filled_differ_only_where_they_say(tmp_path):
    for name in ("train.sbatch", "eval.sbatch"):
        plain = (FOLDER / name).read_text()
        assert fill_script(name, [], []).endswith(plain[plain.index("# <<< settings") :])
        subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_without_slurm_it_says_so(tmp_path):
    command = [sys.executable, "-m", "ema_scale", "launch", str(RECIPE), f"output={tmp_path}", "--gpus-per-node", "0"]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, cwd=RECIPE.parents[2])
    assert done.returncode == 2 and "no sbatch here" in done.stderr and "Traceback" not in done.stderr
    dry = subprocess.run([*command, "--dry-run"], env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert dry.returncode == 0 and "#SBATCH --nodes=1" in dry.stdout


def test_a_dry_run_shows_what_the_evaluation_waits_for(tmp_path):
    command = [sys.executable, "-m", "ema_scale", "launch", str(RECIPE), f"output={tmp_path}", "training.fsdp=true"]
    dry = subprocess.run([*command, "--evaluate", "--dry-run"], capture_output=True, text=True, cwd=RECIPE.parents[2])
    assert dry.returncode == 0, dry.stderr
    waits = "--dependency=afterok:<train job> --kill-on-invalid-dep=yes"
    assert f"# submitted as: sbatch {waits} eval.sbatch {tmp_path}" in dry.stdout and not list(tmp_path.iterdir())


def test_the_reference_of_site_files_is_complete():
    text = (FOLDER.parent / "README.md").read_text()
    assert not [name for name in Site.model_fields if f"`{name}`" not in text]
    (row,) = re.findall(r"^\| `evaluation` .*$", text, re.M)
    assert not [name for name in EvaluationSite.model_fields if f"`{name}`" not in row]
