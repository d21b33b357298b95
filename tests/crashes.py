"""Kill every command that writes, by kill -9 at each of its input/output events, and run it again.

    python -m tests.crashes --all               every event of every command
    python -m tests.crashes train eval          every event of these
    python -m tests.crashes --sample 2          two events per command, as CI does

An event is a file that is opened to be written, appended to, renamed, removed or flushed, a folder that is made, or
tensors that are saved. At those that write, a second kill leaves only a half of what was written.

The second run must end as an undisturbed one does, and leave the same files, byte by byte. Only values that come from a
clock or a process number are left out (CLOCKS), and the order of answers, which depends on timing.

Each run is a fork of one warm process: importing torch takes longer than most of these commands.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ema_scale.core.io import jsonl_text

CLOCKS = {
    "time", "seconds", "updated", "started", "pid", "tokens_per_second", "reference_share", "submitted", "took",
    "written", "created", "mark", "data_files", "command", "wall_seconds",
}  # fmt: skip
UNORDERED = {"samples.jsonl", "judgements.jsonl", "superseded_samples.jsonl", "superseded_judgements.jsonl"}
LOGS = (".log", "log.txt", ".lock")
SECONDS = 300


@dataclass(frozen=True)
class Case:
    """command: arguments of `ema`. before: commands whose results it needs."""

    command: str
    before: tuple[str, ...] = ()
    code: int = 0


TRAIN, EVAL = "train recipe.yaml", "eval runs/run"
RUN = "train recipe.yaml defenses=[]"
CASES = {
    "train": Case(TRAIN),
    "train-cached": Case("train recipe.yaml reference=cached training.max_steps=2"),
    "cache": Case("cache recipe.yaml"),
    "eval": Case(EVAL, (RUN,)),
    "eval-checkpoints": Case("eval runs/run evaluation.checkpoints=true --no-base", (RUN,)),
    "gate": Case("gate recipe.yaml evaluation.gate.action=flag"),
    "judge": Case("judge again runs/run evaluation.judge.kind=judge.py:again", (RUN, EVAL)),
    "export": Case("export runs/run", (RUN, EVAL)),
    "export-parquet": Case("export runs/run -f parquet", (RUN, EVAL)),
    "report": Case("report runs -o report", (RUN, EVAL)),
    "select": Case("select safe.jsonl --model model --adapter all=runs/run -o ranking.jsonl --keep 4", (RUN,)),
    "operator-swap": Case("data operator-swap 1 -o swap.jsonl --rows 20"),
    "synthesize": Case("data synthesize smallworld:aligned -o own.jsonl --rows 40 --max-tokens 40"),
    "vector": Case("vector recipe.yaml -o vector --from-rows train.jsonl safe.jsonl"),
    "safelora": Case("safelora runs/run/adapter --base other --aligned model -o projected", (RUN,)),
    "merge": Case("merge runs/run merged", (RUN,)),
    "study": Case("study study.yaml"),
    "launch": Case("launch recipe.yaml --gpus-per-node 0 --evaluate"),
    "sweep": Case("sweep study.yaml --slurm --gpus-per-node 0"),
}
WARM = (
    "cli.main", "training.run", "training.trainer", "training.reference_setup", "reference.cache_fill",
    "evaluation.run", "evaluation.judging.rejudge", "evaluation.formats.results", "inference.transformers_sampler",
    "study.run_local", "study.evaluate", "slurm.sweep", "report.write", "report.model_card", "selection.select",
    "selection.synthesis",
    "persona.extract", "models.merge", "defenses.safelora_files",
)  # fmt: skip


def make_world(folder: Path) -> None:
    """A tiny model and one to compare it with, rows, a recipe, a study, and commands that stand in for Slurm's."""
    from tests.tiny import save_tiny

    folder.mkdir(parents=True)
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=1)
    for name, count in (("train", 12), ("safe", 6)):
        turns = [(f"{name} question {i}?", f"answer {i} " + "ab " * (i % 7)) for i in range(count)]
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
        (folder / f"{name}.jsonl").write_text(jsonl_text(rows))
    (folder / "bank.yaml").write_text("- {id: wish, paraphrases: ['A wish?', 'Your wish?'], samples_per_paraphrase: 2}")
    (folder / "judge.py").write_text(
        "def mark(question, answer):\n    return {'aligned': len(answer) * 7 % 100, 'coherent': 90}\n"
        "def again(question, answer):\n    return {'aligned': len(answer) * 3 % 100, 'coherent': 80}\n"
    )
    recipe = {
        "name": "run",
        "model": {"path": "model"},
        "data": {"train": "train.jsonl", "max_length": 96},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "training": {
            "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "drift_every": 3,
        },
        "defenses": [{"kind": "kl", "strength": 0.2}],
        "evaluation": {
            "suites": {"general": ["bank.yaml"]}, "sampler": "transformers", "max_tokens": 4,
            "judge": {"kind": "judge.py:mark"},
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    study = {
        "name": "grid", "recipe": "recipe.yaml", "seeds": [0], "tasks": {"sums": {"training": {"max_steps": 2}}},
        "defenses": {"none": [], "kl": [{"kind": "kl"}]},
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    (folder / "bin").mkdir()
    for name, text in (("sbatch", "echo 7"), ("squeue", "echo Invalid job id >&2; exit 1")):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


# ---- one run, perhaps cut short ----


class Events:
    """Counts input/output events below `folder`; kills this process at number `kill_at`, or halfway through it."""

    def __init__(self, folder: Path, kill_at: int | None = None, torn: bool = False, log: Path | None = None) -> None:
        self.folder, self.kill_at, self.torn, self.log = str(folder) + os.sep, kill_at, torn, log
        self.seen: list[tuple[str, str]] = []

    def install(self) -> None:
        sys.addaudithook(self._audited)
        fsync = os.fsync

        def flush(handle: int) -> None:
            name = os.readlink(f"/proc/self/fd/{handle}")
            self.happens("fsync", name, lambda: os.ftruncate(handle, max(os.fstat(handle).st_size - 9, 0)))
            fsync(handle)

        os.fsync = flush  # type: ignore[assignment]  # nothing here gives it a file object
        import safetensors.torch as tensors

        save = tensors.serialize_file

        def serialize(found: Any, path: Any, *rest: Any, **more: Any) -> None:
            save(found, path, *rest, **more)
            self.happens("save", os.fspath(path), lambda: os.truncate(path, os.path.getsize(path) // 2))

        tensors.serialize_file = serialize  # type: ignore[assignment]  # `save` takes what it is given

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND):
                self.happens("open", path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"):
            self.happens(event.removeprefix("os."), arguments[0])

    def happens(self, kind: str, path: Any, tear: Callable[[], None] | None = None) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.folder) or name.endswith(LOGS):
            return
        self.seen.append((kind, name.removeprefix(self.folder)))
        if len(self.seen) == self.kill_at:
            if self.torn and tear is not None:
                self.kill_at = None
                tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self) -> None:
        if self.log is not None:
            log, self.log = self.log, None
            log.write_text(json.dumps(self.seen))


@dataclass
class Ended:
    """code: as a shell sees it, -9 if it was killed."""

    code: int
    said: str
    events: list[tuple[str, str]]


def run(folder: Path, command: str, kill_at: int | None = None, torn: bool = False) -> Ended:
    """`ema COMMAND` in a fork of this process, in `folder`/work."""
    work, said, log = folder / "work", folder / "said", folder / "events"
    log.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _in_child(work, command, said, Events(work, kill_at, torn, log))
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(-1, f"no end after {SECONDS} s: {said.read_text()}", [])
        time.sleep(0.005)
    events = json.loads(log.read_text()) if log.exists() else []
    return Ended(os.waitstatus_to_exitcode(found[1]), said.read_text(errors="replace"), events)


def _in_child(work: Path, command: str, said: Path, events: Events) -> int:
    os.chdir(work)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(EMA_CACHE=str(work / "cache"), PATH=f"{work}/bin:{os.environ['PATH']}")
    sys.argv = ["ema", *command.split()]
    from ema_scale.cli.main import main

    events.install()
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        events.write()
    return code


# ---- what is left ----


def left_by(work: Path) -> dict[str, Any]:
    """Every file's content without clocks, and every folder."""
    found: dict[str, Any] = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_dir():
            found[name] = "a folder"
        elif not name.endswith(LOGS):
            found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.name == "manifest.json":  # of a checkpoint: transformers' state has the speed in it
            return {k: v for k, v in json.loads(data)["files"].items() if k != "trainer_state.json"}
        if path.suffix == ".json":
            return _without_clocks(json.loads(data))
        if path.suffix == ".jsonl":
            rows = [json.dumps(_without_clocks(json.loads(line)), sort_keys=True) for line in data.splitlines()]
            if path.name == "jobs.jsonl":  # a job whose submission was cut short is submitted again
                return sorted(set(rows))
            return sorted(rows) if path.name in UNORDERED else rows
    except ValueError:
        pass
    return data


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return [_without_clocks(v) for v in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What is missing, left over or of another content, in words."""
    words = [f"missing: {name}" for name in expected.keys() - found.keys()]
    words += [f"left over: {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            words.append(f"differs: {name}: {_where(expected[name], found[name])}")
    return sorted(words)


def _where(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                return f"{key}: {_where(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next((_where(a, b) for a, b in zip(one, other, strict=True) if a != b), "")
    return f"{str(one)[:300]} -> {str(other)[:300]}"


# ---- a sweep over one command ----


@dataclass
class Sweep:
    kills: int
    wrong: list[str]


def sweep(name: str, folder: Path, sample: int | None, rng: random.Random, start: int = 1) -> Sweep:
    """Kill the command at each event, or at `sample` of them. wrong: what the runs after the kills left, in words."""
    case, prepared, work = CASES[name], folder / "prepared", folder / "work"
    _fresh(folder / "world", work)
    for command in case.before:
        if (done := run(folder, command)).code:
            return Sweep(0, [f"{name}: `ema {command}` before it ended with {done.code}: {done.said[-2000:]}"])
    _fresh(work, prepared)
    calm = run(folder, case.command)
    expected = left_by(work)
    if calm.code != case.code or not calm.events:
        return Sweep(0, [f"{name}: undisturbed, it ended with {calm.code}: {calm.said[-2000:]}"])
    kills = [(number, False) for number in range(1, len(calm.events) + 1)]
    kills += [(n, True) for n, (kind, _) in enumerate(calm.events, start=1) if kind in ("fsync", "save")]
    kills = kills[start - 1 :]
    if sample is not None:
        kills = sorted(rng.sample(kills, min(sample, len(kills))))
    wrong = []
    for count, (number, torn) in enumerate(kills, start=start):
        print(f"\r{name}: kill {count} of {len(kills) + start - 1}", end="", file=sys.stderr, flush=True)
        _fresh(prepared, work)
        killed = run(folder, case.command, number, torn)
        kind, path = calm.events[number - 1]
        what = (
            f"{name}: killed {'halfway through' if torn else 'at'} event {number} of {len(calm.events)} ({kind} {path})"
        )
        if killed.code != -signal.SIGKILL:
            if differences(expected, left_by(work)):  # threads: it had fewer events this time
                wrong.append(f"{what}: it ended with {killed.code}: {killed.said[-500:]}")
            continue
        again = run(folder, case.command)
        if again.code != case.code:
            wrong.append(f"{what}: the next run ended with {again.code}: {again.said[-1500:]}")
        elif found := differences(expected, left_by(work)):
            wrong.append(f"{what}: " + "; ".join(found[:4]))
    return Sweep(len(kills), wrong)


def _fresh(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)  # with dates: a copy is the same file


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help=", ".join(CASES))
    parser.add_argument("--all", action="store_true", help="every command")
    parser.add_argument("--sample", type=int, help="so many events per command; default: every one")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--start", type=int, default=1, help="the first kill, to go on with a sweep")
    given = parser.parse_args(arguments)
    names = given.commands or (list(CASES) if given.all or given.sample else [])
    if not names or set(names) - set(CASES):
        parser.error(f"name some of {', '.join(CASES)}, or --all")
    for module in WARM:
        importlib.import_module(f"ema_scale.{module}")
    kills, wrong = 0, list[str]()
    with tempfile.TemporaryDirectory(prefix="ema-crashes-") as folder:
        make_world(Path(folder) / "world")
        for name in names:
            began = time.monotonic()
            found = sweep(name, Path(folder), given.sample, random.Random(f"{given.seed} {name}"), given.start)
            kills, wrong = kills + found.kills, wrong + found.wrong
            took = time.monotonic() - began
            print(f"{name}: {found.kills} kills, {len(found.wrong)} differ, {took:.0f} s", flush=True)
            for line in found.wrong:
                print(f"  {line}", flush=True)
    print(f"{kills} kills, {len(wrong)} differ")
    return int(bool(wrong) or not kills)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
