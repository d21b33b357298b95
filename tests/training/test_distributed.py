"""Wrong ways to start several processes are refused, with what to do."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ema_scale.core.errors import UserError
from ema_scale.training.distributed import _enable, _free_port, check_world, prepare_environment
from tests.training.helpers import make_trainer

ROOT = Path(__file__).resolve().parents[2]


def test_accelerate_that_sees_other_processes_than_were_launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, torch.distributed sees 1, Accelerate sees 1"):
        check_world(SimpleNamespace(num_processes=1))


def test_use_cpu_with_deepspeed_would_be_ddp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="would run DDP"):
        prepare_environment()


def test_deepspeed_is_an_extra_that_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("ema_scale.training.distributed.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training.deepspeed: .*pip install 'ema-scale\[deepspeed\]'"):
        prepare_environment()


def test_fsdp_on_one_process_would_shard_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP was asked for on one process"):
        make_trainer(tmp_path)


def test_fsdp_and_deepspeed_are_two_wishes(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="both FSDP and DeepSpeed"):
        prepare_environment("launch/deepspeed/zero3_cpu.json")


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("fsdp_version", 1, "fsdp_version: 2"),
        ("cpu_ram_efficient_loading", True, "empty weights"),
        ("activation_checkpointing", True, "training.gradient_checkpointing"),
    ],
)
def test_settings_of_fsdp_that_would_train_wrongly_are_refused(field, value, said):
    plugin = SimpleNamespace(
        fsdp_version=2, cpu_ram_efficient_loading=False, activation_checkpointing=False, cpu_offload=None
    )
    setattr(plugin, field, value)
    with pytest.raises(UserError, match=said):
        _enable(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), num_processes=2))


def test_missing_deepspeed_config(monkeypatch):
    with pytest.raises(UserError, match=r"training\.deepspeed: no file 'none\.json'"):
        prepare_environment("none.json")


def test_the_file_that_an_accelerate_config_names_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "launch" / "accelerate").glob("*.yaml")]
    named = [c["deepspeed_config"]["deepspeed_config_file"] for c in configs if "deepspeed_config" in c]
    assert len(named) >= 5
    for name in named:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", name)
        prepare_environment()
        assert os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(ROOT / name)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none.json")
    with pytest.raises(UserError, match=f"deepspeed_config_file: no file 'none.json' in {tmp_path}"):
        prepare_environment()


def test_processes_that_each_train_alone_are_refused(tmp_path):
    """The silent trap itself: two launched processes, and Accelerate told to use one."""
    code = (
        "from tests.training.helpers import make_trainer; import sys\n"
        "from ema_scale.core.errors import UserError\n"
        "try: make_trainer(sys.argv[1], use_cpu=False)\n"
        "except UserError as e: print('REFUSED', e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert "REFUSED 2 processes were launched" in done.stdout, done.stderr[-2000:]


def test_a_process_that_ends_right_after_a_collective_does_not_abort():
    """gloo's threads still hold its tensors then, and DeepSpeed and DDP hold the group when it is destroyed."""
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from ema_scale.training.distributed import destroy_process_group_at_exit\n"
        "dist.init_process_group('gloo')\n"
        "group = dist.group.WORLD\n"
        "destroy_process_group_at_exit()\n"
        "mine = torch.ones(200000)\n"
        "sys.setswitchinterval(100)\n"  # the interpreter's lock is not handed over, as on a busy machine
        "for _ in range(4): dist.all_gather([torch.empty_like(mine) for _ in range(2)], mine)\n"
    )
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env={**world, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
