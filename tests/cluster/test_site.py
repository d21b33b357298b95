"""Site files and the scripts that are filled from them; no Slurm needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ema_scale.cluster.script import FOLDER, fill
from ema_scale.cluster.site import Site, load_site
from ema_scale.cluster.submit import Size, evaluation_job, training_job
from ema_scale.errors import UserError
from ema_scale.recipe import load_recipe

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
    training = training_job(recipe, site, Size(nodes=4, time="1:00:00")).script
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


def test_processes_without_gpus(tmp_path):
    site = site_of(tmp_path, "gpus_per_node: 0")
    recipe = load_recipe(RECIPE)
    script = training_job(recipe, site, Size(nodes=2)).script
    assert "PROCESSES_PER_NODE=1\n" in script and "gpus" not in script.split("# >>> settings")[0]

    def evaluation(*arguments, **options):
        return evaluation_job("run", recipe.run_path, *arguments, **options).script.split("# >>> settings")[0]

    assert "gpus-per-node" not in evaluation(site) and "gpus-per-node" not in evaluation(Site(), gpus=0)
    assert "--gpus-per-node=1\n" in evaluation(Site())


def test_the_scripts_by_hand_and_filled_differ_only_where_they_say(tmp_path):
    for name in ("train.sbatch", "eval.sbatch"):
        plain = (FOLDER / name).read_text()
        assert fill(name, [], []).endswith(plain[plain.index("# <<< settings") :])
        subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_without_slurm_it_says_so(tmp_path):
    command = [sys.executable, "-m", "ema_scale", "launch", str(RECIPE), f"output={tmp_path}", "--gpus-per-node", "0"]
    done = subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, cwd=RECIPE.parents[2])
    assert done.returncode == 2 and "no sbatch here" in done.stderr and "Traceback" not in done.stderr
    dry = subprocess.run([*command, "--dry-run"], env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert dry.returncode == 0 and "#SBATCH --nodes=1" in dry.stdout


def test_the_reference_of_site_files_is_complete():
    text = (FOLDER.parent / "README.md").read_text()
    assert not [name for name in Site.model_fields if f"`{name}`" not in text]
