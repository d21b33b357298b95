"""What is asked of Slurm's commands, and how their answers are taken; the commands are stand-ins here."""

import os
import subprocess
import threading

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir
from ema_scale.slurm import client
from ema_scale.slurm.site import FOLDER, Site, fill_script, settings
from ema_scale.slurm.submit import Job, JobSize, jobs_of, submit, submitting, training_job
from ema_scale.slurm.sweep import plan_sweep, submit_sweep
from ema_scale.study.grid import load_study, write_study
from tests.slurm.test_sweep import study_file
from tests.training.test_run import recipe_of, world

__all__ = ["world"]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder first on PATH; put(name, shell) makes a command there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
        return folder

    put("sacct", "exit 1")
    return put


@pytest.mark.parametrize(
    ("said", "code", "state"),
    [
        ("slurm_load_jobs error: Invalid job id specified", 1, client.UNKNOWN),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1, None),
        ("", 1, None),
        ("", 0, client.UNKNOWN),
    ],
)
def test_no_answer_is_not_no_job(commands, said, code, state):
    commands("squeue", f"echo '{said}' >&2; exit {code}")
    if state:
        assert client.job_states(["7"])["7"].state == state
    else:
        with pytest.raises(UserError, match=f"squeue does not say how jobs 7 are doing: {said[:20] or 'exit code 1'}"):
            client.job_states(["7"])


def test_a_preempted_job_in_the_queue_is_pending_and_outside_of_it_has_ended(commands):
    commands("squeue", "echo '7|PREEMPTED|None|'")
    assert client.job_states(["7"])["7"].active
    commands("squeue", "echo Invalid job id >&2; exit 1")
    commands("sacct", "echo '7|PREEMPTED'")
    assert not client.job_states(["7"])["7"].active


def test_an_outer_jobs_settings_reach_no_command_of_slurm(commands, tmp_path, monkeypatch, caplog):
    commands("sbatch", f"env >{tmp_path}/env; echo 7")
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "SQUEUE_STATES"):
        monkeypatch.setenv(name, "of another job")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with caplog.at_level("INFO"):
        assert client.submit(tmp_path / "x.sbatch") == "7"
    seen = (tmp_path / "env").read_text()
    assert "of another job" not in seen and "SLURM_CONF=/etc/slurm.conf" in seen and "\nPATH=" in seen
    assert caplog.messages == ["SBATCH_PARTITION: ignored; name such options in the site file"]


def test_of_two_commands_at_once_one_submits(commands, world, tmp_path):
    recipe = recipe_of(world, tmp_path)
    queue = tmp_path / "queue"
    commands("squeue", f"[ -e {queue} ] && echo '7|PENDING||' || {{ echo Invalid job id >&2; exit 1; }}")
    commands("sbatch", f"sleep 0.5; echo 7 | tee {queue}")
    outcomes = []

    def one():
        try:
            outcomes.append(submit(recipe, training_job(recipe, Site(), JobSize())))
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs_of(RunDir(recipe.run_path))) == 1, outcomes
    assert sorted(outcome == "7" for outcome in outcomes) == [False, True]
    assert any("job 7 (PENDING) is on it already" in outcome for outcome in outcomes), outcomes


def test_a_run_of_a_study_and_its_sweep_do_not_submit_at_once(world, tmp_path, monkeypatch):
    study = load_study(study_file(world, tmp_path, [0]))
    write_study(study, study.path / "study.yaml")
    monkeypatch.setattr("ema_scale.slurm.submit._PATIENCE", 0.1)
    with submitting(study.path), pytest.raises(UserError, match="another command is submitting jobs for it"):
        submit(study.runs()[0], Job("train", "", ()))


def test_an_array_that_is_queued_is_named_when_slurm_refuses_the_rest(commands, world, tmp_path):
    study = load_study(study_file(world, tmp_path, [0]))
    commands("squeue", "echo Invalid job id >&2; exit 1")
    commands("sbatch", 'case "$*" in *train.sbatch*) echo 41 ;; *) echo no such partition >&2; exit 1 ;; esac')
    with pytest.raises(
        UserError, match="sbatch refused .*no such partition\n.*queued already: train array 41; .*scancel 41"
    ):
        submit_sweep(plan_sweep(study, Site(), JobSize(gpus=0)))
    assert [row["job"] for row in jobs_of(RunDir(study.runs()[1].run_path))] == ["41_1"]


def test_rows_that_are_not_there_are_found_before_anything_is_submitted(commands, world, tmp_path):
    commands("sbatch", f"touch {tmp_path}/submitted; echo 1")
    (tmp_path / "gone").mkdir()
    tasks = {"sums": {}, "gone": {"data": {"train": ["smallworld:train/medical", "some/hub-id", "/no/rows.jsonl"]}}}
    defenses = {"none": [], "kl": [{"kind": "kl", "prompts": "safe.jsonl"}]}
    study = load_study(study_file(world, tmp_path, [0], tasks=tasks, defenses=defenses))
    with pytest.raises(UserError) as refused:
        submit_sweep(plan_sweep(study, Site(), JobSize(gpus=0)))
    assert str(refused.value).splitlines() == [
        f"{study.path}/sums-kl-s0: defenses.0.prompts: safe.jsonl: no such file or folder",
        f"{study.path}/gone-none-s0: data.train.2: /no/rows.jsonl: no such file or folder",
        f"{study.path}/gone-kl-s0: data.train.2: /no/rows.jsonl: no such file or folder",
        f"{study.path}/gone-kl-s0: defenses.0.prompts: safe.jsonl: no such file or folder",
    ]
    assert not (tmp_path / "submitted").exists() and not study.path.exists()


STEP = 'case "$*" in *--overlap*) exit {check} ;; *) {work} ;; esac'


def batch(commands, tmp_path, name, script=None, **given):
    """A batch script as Slurm's node would run it; (exit code, what it says, what was asked of scontrol)."""
    commands("sleep", "exec /bin/sleep 0.01")
    commands("scontrol", f'[ "$1" = show ] && echo node1 && exit; echo "$@" >>{tmp_path}/asked; {given["scontrol"]}')
    commands("squeue", f"echo {given['state']}")
    commands("srun", given["srun"])
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_JOB_PARTITION": "p"}
    done = subprocess.run(
        ["bash", str(script or FOLDER / name), "recipe.yaml"], env={**os.environ, **variables, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    asked = tmp_path / "asked"
    return done.returncode, done.stdout + done.stderr, asked.read_text().split("\n")[:-1] if asked.exists() else []


@pytest.mark.parametrize(
    ("name", "srun"),
    [("train.sbatch", STEP.format(check=3, work="exit 0")), ("eval.sbatch", "exit 143"), ("eval.sbatch", "exit 138")],
)
def test_work_that_was_stopped_is_requeued_or_said_to_have_failed(commands, tmp_path, name, srun):
    code, said, asked = batch(commands, tmp_path, name, srun=srun, state="RUNNING", scontrol="exit 0")
    assert (code, asked) == (0, ["requeue 7"]) and "requeued; it goes on" in said, said
    refusal = "echo disabled >&2; exit 1"
    code, said, asked = batch(commands, tmp_path, name, srun=srun, state="RUNNING", scontrol=refusal)
    assert (code, asked) == (1, ["requeue 7"] * 6) and "FAILED: Slurm did not requeue it" in said, said
    code, said, asked = batch(commands, tmp_path, name, srun=srun, state="COMPLETING", scontrol="exit 0")
    assert code != 0 and len(asked) == 6 and "ended by Slurm" in said, "scancel's victim stays cancelled"


def lend_engine(commands, tmp_path, squeue):
    """Task 1 of an evaluation's array, whose engine waits for the word of task 0, but not for ever; what it says."""
    script = tmp_path / "eval.sbatch"
    values = {"WHAT": "eval", "ENGINES": 2}
    script.write_text(fill_script("eval.sbatch", [], settings(Site(), "python", tmp_path, values)))
    commands("sleep", "exec /bin/sleep 0.01")
    commands("squeue", squeue)
    commands("srun", f"for i in {{1..100}}; do [ -e {tmp_path}/eval-6.done ] && exit; /bin/sleep 0.02; done; exit 9")
    variables = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        ["bash", str(script), "runs/a"], env={**os.environ, **variables, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert (done.returncode == 0) is (tmp_path / "eval-6.done").exists(), done.stderr
    return done.stdout


ANSWERS = """answers=({answers}); n=$(cat {file} 2>/dev/null || echo 0)
echo $((n + 1)) >{file}; echo ${{answers[n]:-{last}}}"""


def test_an_engine_is_not_lent_to_an_evaluation_that_was_cancelled(commands, tmp_path):
    asked = tmp_path / "asked"
    said = lend_engine(
        commands, tmp_path, ANSWERS.format(answers="RUNNING CANCELLED PENDING", file=asked, last="CANCELLED")
    )
    assert "task 0 has ended (CANCELLED) and left no word" in said
    assert int(asked.read_text()) == 5, "what is requeued may be in no state for a moment"
    (tmp_path / "eval-6.done").unlink()
    said = lend_engine(commands, tmp_path, "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert "task 0 has ended (Slurm no longer knows it)" in said


@pytest.mark.parametrize("squeue", ["echo PREEMPTED", "echo Unable to contact slurm controller >&2; exit 1"])
def test_an_engine_waits_while_its_evaluation_may_come_back(commands, tmp_path, squeue):
    assert "task 0 has ended" not in lend_engine(commands, tmp_path, squeue)


def test_a_training_of_which_nobody_can_say_whether_it_has_finished_is_not_done(commands, tmp_path):
    srun = STEP.format(check=1, work="exit 0")
    code, said, asked = batch(commands, tmp_path, "train.sbatch", srun=srun, state="RUNNING", scontrol="exit 0")
    assert (code, asked) == (1, []) and "FAILED: cannot tell whether it has finished" in said
    srun = STEP.format(check=0, work="exit 0")
    code, said, asked = batch(commands, tmp_path, "train.sbatch", srun=srun, state="RUNNING", scontrol="exit 0")
    assert (code, asked) == (0, []) and "done" in said


@pytest.mark.parametrize(("nodes", "asked_for"), [(3, "update JobId=7 ExcNodeList=node1"), (1, None)])
def test_a_retry_does_not_go_to_a_node_that_broke_unless_no_other_is_left(commands, tmp_path, nodes, asked_for):
    commands("sinfo", f"echo {nodes}")
    script = tmp_path / "train.sbatch"
    script.write_text(fill_script("train.sbatch", [], settings(Site(), "python", tmp_path, {"RETRIES": 1})))
    # The work fails, the nodes answer, and the failure names one.
    srun = 'case "$*" in *slurm.failure*) echo node1 >>"${@: -2:1}" ;; *--overlap*) ;; *) exit 1 ;; esac'
    code, said, asked = batch(commands, tmp_path, "train.sbatch", script, srun=srun, state="RUNNING", scontrol="exit 0")
    assert code == 0 and "retry 1 of 1" in said, said
    assert asked == ["requeue 7", *([asked_for] if asked_for else [])], said
    assert ("not on node1 again" if asked_for else "without it too few nodes are left") in said


def test_an_arrays_task_takes_its_recipe_whatever_the_folder_is_called(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    text = (FOLDER / "train.sbatch").read_text()
    start, end = text.index("# A task of an array"), text.index("say() {")
    for given, expected in (("100%a/%a.yaml", "100%a/3.yaml"), ("%a.yaml", "3.yaml"), ("x%a/r.yaml", "x%a/r.yaml")):
        command = ["bash", "-c", f'{text[start:end]}\necho "$job $1 $2"', "x", given, "a=b"]
        assert subprocess.run(command, capture_output=True, text=True).stdout == f"6_3 {expected} a=b\n"


def test_the_nodes_meet_at_the_address_that_slurm_knows(commands, tmp_path):
    commands("scontrol", "")
    srun = f'echo "$*" >>{tmp_path}/run; exit 0'
    scontrol = 'case "$2" in node) echo " NodeAddr=10.1.2.3 NodeHostName=other" ;; esac; exit 0'
    commands("scontrol", f'[ "$1 $2" = "show hostnames" ] && echo node1 && exit; {scontrol}')
    commands("squeue", "echo RUNNING")
    commands("srun", srun)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "TMPDIR": str(tmp_path)}
    command = ["bash", str(FOLDER / "train.sbatch"), "recipe.yaml"]
    subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, check=True, capture_output=True)
    assert "--master-addr=10.1.2.3 --master-port=20007" in (tmp_path / "run").read_text()
