"""Runs `ema` commands in children forked from a warm process: one import of torch for hundreds of commands.

Reads a JSON object per line: argv, cwd, env, seconds, and limits (names of `resource`, each with its value). Answers
with one: code, out, err, cpu (seconds), wall (seconds), megabytes (over those of the warm process), killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from typing import Any

WARM = (
    "torch", "transformers", "peft", "datasets", "pyarrow.parquet", "safetensors.torch", "scipy.stats",
    "matplotlib.pyplot",
    "ema_scale.cli", "ema_scale.audit.audit", "ema_scale.data.check", "ema_scale.evaluation.formats.results",
    "ema_scale.evaluation.judging.rejudge", "ema_scale.evaluation.runs", "ema_scale.inference.openai_sampler",
    "ema_scale.inference.transformers_sampler", "ema_scale.persona.extract", "ema_scale.planning.describe",
    "ema_scale.report.make", "ema_scale.selection.select", "ema_scale.slurm.submit", "ema_scale.study.evaluate",
    "ema_scale.study.gates", "ema_scale.training.run", "ema_scale.training.trainer", "ema_scale.models.merge",
    "ema_scale.report.model_card", "ema_scale.defenses.safelora_projection",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip

_MOST = 1 << 20  # bytes of output that are kept


def main() -> None:
    sys.dont_write_bytecode = True  # under a limit on the size of files Python keeps half a module for the next process
    for name in WARM:
        importlib.import_module(name)
    before = _megabytes("VmRSS")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints here must not look like an answer
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        found = run(json.loads(line))
        found["megabytes"] = round(found["megabytes"] - before)
        print(json.dumps(found), file=answers, flush=True)


def run(case: dict[str, Any]) -> dict[str, Any]:
    # Pipes: a limit on the size of files would also cut what a command says.
    pipes = {name: os.pipe() for name in ("out", "err")}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, pipes["out"][1], pipes["err"][1])
    said = {name: bytearray() for name in pipes}
    for reader, writer in pipes.values():
        os.close(writer)
        os.set_blocking(reader, False)
    killed, done = False, 0
    while not done:
        done, status, used = os.wait4(child, os.WNOHANG)
        if not done and time.monotonic() - began > case["seconds"]:
            killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0 if done else 0.005)
        for name, (reader, _) in pipes.items():
            _drain(reader, said[name])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has left running
    for reader, _ in pipes.values():
        os.close(reader)
    return {
        **{name: text.decode("utf-8", "replace") for name, text in said.items()},
        "code": os.waitstatus_to_exitcode(status), "killed": killed, "wall": time.monotonic() - began,
        "cpu": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024,
    }  # fmt: skip


def _drain(reader: int, into: bytearray) -> None:
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reader, 1 << 16):
            into += data[: max(0, _MOST - len(into))]


def _child(case: dict[str, Any], out: int, err: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(err, 2)
        os.dup2(out, 1)
        if to := case.get("stdout"):
            os.dup2(os.open(to, os.O_WRONLY), 1)
        os.environ.update(case.get("env", {}))
        os.chdir(case["cwd"])
        if case.get("rmdir"):
            shutil.rmtree(case["cwd"])
        for name, value in case.get("limits", {}).items():
            resource.setrlimit(getattr(resource, name), (value, value))
        sys.argv = ["ema", *case["argv"]]
        sys.stdin = open(0)  # noqa: SIM115
        from ema_scale.cli import main as ema

        try:
            ema()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)


def _megabytes(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


if __name__ == "__main__":
    main()
