"""Launched trainings on a real Slurm: they equal one process, and lose nothing when they are disturbed."""

import time

import pytest

from ema_scale.core.io import read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.defenses.registry import parse
from ema_scale.recipe import build_recipe
from ema_scale.slurm.site import Site, fill_script, sbatch_options, settings
from ema_scale.slurm.submit import jobs_of
from ema_scale.training.run import train
from tests.slurm.helpers import ROOT, ema, environment, everything, launch, step_of_run, wait_for_step, write_plugin
from tests.training.test_run import assert_same_weights, recipe_of, weights, world

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
__all__ = ["world"]

STEPS = 8
# No dropout: its masks are drawn by each process.
SHARED = {"max_steps": STEPS, "save_steps": 3, "dropout": 0.0}
TROUBLE = {"kind": "trouble", "pause": 0.0}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    write_plugin(folder)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory):
    """One process, undisturbed."""
    recipe = recipe_of(
        world, tmp_path_factory.mktemp("calm"), per_device_train_batch_size=2, gradient_accumulation_steps=2, **SHARED
    )
    return train(recipe, RunDir(recipe.run_path))


def two_nodes(world, out, name, trouble=None, **training):
    recipe = recipe_of(
        world, out, name, per_device_train_batch_size=1, gradient_accumulation_steps=2, **{**SHARED, **training}
    )
    return recipe.model_copy(update={"defenses": [*recipe.defenses, *parse([trouble] if trouble else [])]})


def assert_same_run(calm, run):
    rows, found = read_jsonl(calm.metrics_path), read_jsonl(run.metrics_path)
    assert [row["step"] for row in found] == [row["step"] for row in rows], everything(run)
    for ours, theirs in zip(rows, found, strict=True):
        for name in ("loss", "ce", "kl"):
            assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=1e-6), (ours["step"], name)
    assert_same_weights(weights(calm), weights(run), 2e-5)


def test_zero3_on_two_nodes_equals_one_process_and_is_evaluated(slurm, world, calm, tmp_path):
    """With KL, through `ema launch`; `ema status` and `ema logs` follow it."""
    env = environment(slurm)
    recipe = two_nodes(world, tmp_path, "zero3", deepspeed=str(ROOT / "launch" / "deepspeed" / "zero3_cpu.json"))
    (tmp_path / "sums.yaml").write_text(
        "- {id: sum, paraphrases: ['2 + 2?'], samples_per_paraphrase: 2, expected: '4'}"
    )
    asked = {"suites": {"benign": [str(tmp_path / "sums.yaml")]}, "sampler": "transformers", "max_tokens": 4}
    recipe = build_recipe({**recipe.to_dict(), "evaluation": {**asked, "judge": {"kind": "exact_match"}}})
    run = RunDir(recipe.run_path)
    launch(recipe, tmp_path, "--nodes", 2, "--evaluate", env=env)
    job, evaluation = (row["job"] for row in jobs_of(run))
    told = ema("status", run.path, env=env)
    assert f"train {job}" in told and f"eval {evaluation} PENDING" in told, told
    said = ema("logs", run.path, "-f", env=env)  # from before the training has begun to the evaluation's end
    assert slurm.wait(job)["JobState"] == "COMPLETED", everything(run)
    assert run.status().state == "finished" and run.status().processes == 2
    assert_same_run(calm, run)
    trained, evaluated = said.split(f"--- eval job {evaluation}\n")
    assert "attempt 0 on node[1-2]" in trained and f"step {STEPS}/{STEPS}" in trained and f"job {job}: done" in trained
    assert f"job {evaluation}: done" in evaluated
    assert slurm.wait(evaluation)["JobState"] == "COMPLETED", everything(run)
    assert (run.eval_dir / "summary.json").exists()
    assert f"finished  step {STEPS}" in ema("status", tmp_path, env=env)


def checkpointed(run):
    """The step that a run stopped after, which it saved, so that no step is done twice."""
    reached = step_of_run(run)
    assert run.status().state == "stopped" and 2 <= reached < STEPS, everything(run)
    assert (run.checkpoints / f"checkpoint-{reached}" / "manifest.json").exists(), everything(run)
    return reached


def test_preempted_it_goes_on_and_loses_nothing(slurm, world, calm, plugin, tmp_path):
    """By a partition that gives a grace time: the steps are told (TERM), the batch script is not."""
    env = environment(slurm, plugin)
    recipe = two_nodes(world, tmp_path, "preempted", {**TROUBLE, "pause": 0.4}, save_steps=100)
    run = RunDir(recipe.run_path)
    job = launch(recipe, tmp_path, "--nodes", 2, env=env)
    wait_for_step(run, 2)
    urgent = slurm.sbatch("-purgent", "-N3", "--exclusive", "-o/dev/null", "--wrap=sleep 1", cwd="/tmp")
    slurm.wait(job, ("PENDING",))
    reached = checkpointed(run)
    assert "stopped before the end, with a checkpoint" in everything(run), everything(run)
    done = slurm.wait(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), everything(run) + slurm.logs()
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
    assert f"going on from step {reached}" in everything(run)
    assert_same_run(calm, run)


def test_warned_and_not_requeued_it_goes_on_on_another_number_of_nodes(slurm, world, calm, plugin, tmp_path):
    env = environment(slurm, plugin)
    site = tmp_path / "site.yaml"  # the training is not the job's first step
    site.write_text("sbatch: [--no-requeue]\nsetup: [srun true, 'sleep() { command sleep 0.1; }']\n")
    recipe = two_nodes(world, tmp_path, "warned", {**TROUBLE, "pause": 0.4}, save_steps=100)
    run = RunDir(recipe.run_path)
    job = launch(recipe, tmp_path, "--nodes", 2, "--site", site, env=env)
    wait_for_step(run, 2)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    assert slurm.wait(job)["JobState"] == "FAILED", everything(run)
    reached = checkpointed(run)
    assert "warned: saving a checkpoint" in everything(run)
    assert f"job {job}: FAILED: Slurm did not requeue it" in everything(run)

    training = recipe.training.model_copy(update={"gradient_accumulation_steps": 4})  # the same rows a step
    job = launch(recipe.model_copy(update={"training": training}), tmp_path, "--nodes", 1, env=env)
    assert slurm.wait(job)["JobState"] == "COMPLETED", everything(run)
    assert f"going on from step {reached}" in everything(run) and run.status().processes == 1
    assert_same_run(calm, run)


def test_a_preempted_evaluation_goes_on_and_a_cancelled_one_does_not(slurm, tmp_path):
    """What is evaluated is of no account here: the work waits, and at its second start is done."""
    begun = tmp_path / "begun"
    evaluation(tmp_path, f"[ -e {begun} ] && exit 0\ntouch {begun}\nexec sleep 300")

    def disturbed(*command):
        begun.unlink(missing_ok=True)
        job = slurm.sbatch("eval.sbatch", cwd=tmp_path)
        end = time.monotonic() + 60
        while not begun.exists():
            assert time.monotonic() < end, slurm.logs()
            time.sleep(0.1)
        slurm.run(*command, *([job] if command[0] == "scancel" else []), cwd="/tmp")
        ended = slurm.wait(job)
        return ended["JobState"], ended["Restarts"]

    urgent = ("sbatch", "--wait", "-purgent", "-N3", "--exclusive", "-o/dev/null", "--wrap=sleep 1")
    assert disturbed(*urgent) == ("COMPLETED", "1"), (tmp_path / "log").read_text()
    assert disturbed("scancel") == ("CANCELLED", "0"), (tmp_path / "log").read_text()


def test_cancelled_while_it_asks_whether_it_is_it_does_not_come_back(slurm, tmp_path):
    """The work is told to end, as by preemption. The job is cancelled right after Slurm has said that it runs."""
    cancels = 'squeue() { command squeue "$@"; scancel "$SLURM_JOB_ID"; sleep 1; }'
    evaluation(tmp_path, "kill -TERM $$", cancels)
    ended = slurm.wait(slurm.sbatch("eval.sbatch", cwd=tmp_path))
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), (tmp_path / "log").read_text()


def evaluation(folder, work, *settings):
    """Write eval.sbatch, which runs `work`, lines of shell."""
    program = folder / "work"
    program.write_text(f"#!/bin/sh\n{work}\n")
    program.chmod(0o755)
    options = ["--time=10:00", "--requeue", "--open-mode=append", f"--output={folder}/log"]
    values = [f"PYTHON={program}", "WHAT=eval", "ENGINES=1", f"LOGS={folder}", "MAX_REQUEUES=5"]
    values += ["SRUN_OPTIONS=()", "WRAP=()", *settings]
    (folder / "eval.sbatch").write_text(fill_script("eval.sbatch", options, values))


def test_a_retry_avoids_the_broken_node_in_a_folder_with_odd_characters(slurm, tmp_path):
    """The work fails on the node that it starts on, which is found to be broken."""
    folder = tmp_path / "100% of %j"
    folder.mkdir()
    begun, work = folder / "begun", folder / "work"
    work.write_text(
        f"#!/bin/sh\ncase $2 in *torchrun) [ -e '{begun}' ] && exit 0; touch '{begun}'; exit 1 ;;\n"
        '*failure) echo "$SLURMD_NODENAME" >>"$3" ;; esac\n'
    )
    work.chmod(0o755)
    options = sbatch_options(Site(gpus_per_node=0, time="10:00"), "retried", folder / "train-%j.log")
    values = settings(Site(python=str(work)), "python", folder, {"PROCESSES_PER_NODE": 1, "RETRIES": 1})
    (folder / "train.sbatch").write_text(fill_script("train.sbatch", options, values))
    job = slurm.sbatch("train.sbatch", "recipe.yaml", cwd=folder)
    ended = slurm.wait(job)
    said = (folder / f"train-{job}.log").read_text()
    assert (ended["JobState"], ended["Restarts"], ended["ExcNodeList"]) == ("COMPLETED", "1", "node1"), said
    assert (
        ended["NodeList"] != "node1" and "not on node1 again" in said and (folder / f"train-{job}.ranks.log").exists()
    )


@pytest.mark.parametrize("node", [1, 2])
def test_a_node_dies_and_the_run_goes_on_on_another(slurm, world, calm, plugin, tmp_path, node):
    """The first one has the batch script, rank 0, the rendezvous and the lock of the run folder."""
    env = environment(slurm, plugin)
    recipe = two_nodes(world, tmp_path, "orphaned", {**TROUBLE, "pause": 0.4})
    run = RunDir(recipe.run_path)
    job = launch(recipe, tmp_path, "--nodes", 2, env=env)
    wait_for_step(run, 4)
    slurm.kill_node(node)
    try:
        done = slurm.wait(job)
        left = {1: "node[2-3]", 2: "node[1,3]"}[node]
        assert (done["JobState"], done["NodeList"]) == ("COMPLETED", left), everything(run)
    finally:
        slurm.start_node(node)
    assert "going on from step 3" in everything(run)
    assert_same_run(calm, run)


@pytest.mark.parametrize(
    ("way", "reason", "minutes"),
    [
        ("raise", "rank 1 on node2: ValueError: the disk of this rank is on fire", 30),
        ("SIGKILL", "rank 1 on node2: killed by SIGKILL: out of memory?", 30),
        ("SIGSTOP", "rank 1 of 2 said nothing: stopped, killed or cut off", 0.5),
    ],
)
def test_one_rank_fails_and_its_error_is_on_top(slurm, world, plugin, tmp_path, way, reason, minutes):
    env = environment(slurm, plugin)
    site = tmp_path / "site.yaml"
    site.write_text(f"timeout_minutes: {minutes}\n")
    recipe = two_nodes(world, tmp_path, way, {**TROUBLE, "rank": 1, "at": 1, "way": way})
    run = RunDir(recipe.run_path)
    launch(recipe, tmp_path, "--nodes", 2, "--site", site, "--evaluate", env=env)
    job = jobs_of(run)[0]["job"]
    assert slurm.wait(job)["JobState"] == "FAILED", everything(run)
    began, top = (run.path / "slurm" / f"train-{job}.log").read_text().splitlines()[:2]
    assert "attempt 0" in began and top.startswith("FAILED: ") and reason in top, everything(run)
    assert run.status().state == "failed" and reason in run.status().reason
    told = ema("logs", run.path, env=env)  # and not of the evaluation, which was queued behind it
    assert reason in told.splitlines()[0] and began in told
    assert reason in ema("status", run.path, env=env)
