"""Python processes that start at once: each is forked from one that has made the imports of torch and its kin.

    done = warm.run(["-m", "ema_scale", "status", folder], cwd=folder)
    process = warm.start(["-m", "ema_scale", "train", recipe], output=file)

A cold `ema` spends most of its time on those imports. A warm one is a process as well, with arguments, folder,
environment, standard streams, signals and an exit code of its own, and it imports ema_scale itself. What a cold start
alone can show (which imports are made, the console script, the wheel) is tested by cold ones.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "transformers.trainer",
    "peft",
    "datasets",
    "accelerate",
    "scipy.stats",
    "matplotlib.figure",
    "openai",
    "jinja2",
    "typer",
)
VLLM = ("vllm", "vllm.entrypoints.llm", "vllm.engine.arg_utils", "vllm.v1.worker.cpu_worker")
# What libraries read when they are imported, or the interpreter when it starts.
READ_ONCE = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "CUDA_", "LD_", "MALLOC_", "PYTHONHASHSEED")
# Of these, what importing vLLM sets in a process that has started.
SET_BY_IMPORTS = ("LD_LIBRARY_PATH", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")


class Process:
    """A forked Python process. Its parent is a process of the warm one's, which sees how it ends."""

    def __init__(self, pid: int, ends: int) -> None:
        self.pid, self._ends = pid, ends
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ends], [], [], 0)[0]:
            self.returncode = int(os.read(self._ends, 64))
            os.close(self._ends)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._ends], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[object], *, cwd: object = ROOT, env: Mapping[str, str] | None = None,
    output: IO[Any] | int = subprocess.DEVNULL, errors: IO[Any] | int | None = None, vllm: bool = False,
) -> Process:  # fmt: skip
    """Start what `python *command` starts: `-m module`, `-c code` or a script.

    Args:
        command: arguments of Python.
        cwd: its folder; default: the repository's.
        env: its environment; default: this process's.
        output: where standard output goes.
        errors: where standard error goes; None: to the same place.
        vllm: it will use vLLM, whose imports are then made, too.
    """
    given = dict(os.environ if env is None else env)
    server = _server(vllm)
    for name in SET_BY_IMPORTS:
        if given.get(name) == os.environ.get(name):  # inherited, not asked for
            given.pop(name, None)
            given |= {name: server.environment[name]} if name in server.environment else {}
    for name in sorted({*given, *os.environ}):
        if name.startswith(READ_ONCE) and given.get(name, "") != server.environment.get(name, ""):
            raise ValueError(f"{name} is read at the start of a process: a warm one cannot have another; start it cold")
    request = {"command": [str(part) for part in command], "cwd": str(cwd), "env": given}
    with open(os.devnull, "r+b") as null:
        streams = [null if where == subprocess.DEVNULL else where for where in (null, output, errors or output)]
        return server.fork(request, [one if isinstance(one, int) else one.fileno() for one in streams])


def run(
    command: Sequence[object], *, cwd: object = ROOT, env: Mapping[str, str] | None = None, timeout: float = 400,
    vllm: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`subprocess.run([sys.executable, *command], capture_output=True, text=True)`, warm."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start(command, cwd=cwd, env=env, output=output, errors=errors, vllm=vllm)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([sys.executable, *map(str, command)], code, *texts)


class _Server:
    """The process that has made the imports, as its clients see it."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = dict(os.environ)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        atexit.register(self.close)

    def fork(self, request: Mapping[str, Any], streams: Sequence[int]) -> Process:
        ends, write = os.pipe()
        message = json.dumps(request).encode()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(message) + 4096)
        socket.send_fds(self._socket, [message], [*streams, write])
        os.close(write)
        return Process(int(os.read(ends, 20)), ends)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@cache
def _server(vllm: bool) -> _Server:
    return _Server([*LIBRARIES, *(VLLM if vllm else ())])


# ---- in the warm process ----


def _requests(connection: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request: returns the request in it, and None in the warm process when no more come."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 2**22, 4)
        while _reap():
            pass
        if not message:
            return None
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    connection.close()
    *streams, ends = descriptors
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        os.write(ends, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.write(ends, f"{os.getpid():<20}".encode())
    os.close(ends)
    found: dict[str, Any] = json.loads(message)
    return found


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _become(request: Mapping[str, Any], libraries: Sequence[str]) -> None:
    """Run the command as Python would in a new process."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    first, *rest = request["command"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first == "-m":
        module, *arguments = rest
        sys.path[:] = [os.getcwd(), *paths, *libraries]
        sys.argv[:] = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[:] = ["", *paths, *libraries]
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.path[:] = [str(Path(first).parent), *paths, *libraries]
        sys.argv[:] = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _code(request: Mapping[str, Any], libraries: Sequence[str]) -> int:
    """The command's exit code."""
    try:
        _become(request, libraries)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but for taking thousands of modules apart, which takes seconds and shows nothing."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _main(descriptor: str, *modules: str) -> None:
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    libraries = [path for path in sys.path[1:] if path not in known]
    if "vllm" in modules:
        from ema_scale.inference.vllm_engine import prepare_environment

        prepare_environment()
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    for name in [name for name in sys.modules if name.split(".")[0] in ("ema_scale", "tests")]:
        del sys.modules[name]
    assert threading.active_count() == 1, f"a thread does not survive a fork: {threading.enumerate()}"
    gc.collect()
    gc.freeze()
    gc.enable()
    request = _requests(socket.socket(fileno=int(descriptor)))
    if request is not None:
        importlib.import_module("numpy").random.seed()
        _end(_code(request, libraries))


if __name__ == "__main__":
    _main(*sys.argv[1:])
