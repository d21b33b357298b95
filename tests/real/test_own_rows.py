"""examples/own_rows as a reader follows it, on the real model of the package index: that model also judges."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_scale.cli import main
from ema_scale.core.devices import has_bfloat16
from ema_scale.evaluation.records import Summary
from tests import warm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_rows"
TEXT = (EXAMPLE / "README.md").read_text()
COMMANDS = [line for body in re.findall(r"^```bash\n(.*?)^```", TEXT, re.S | re.M) for line in body.splitlines()]
# Fewer, not other: two steps on two rows, three of the example's own questions, one short answer to each.
QUESTIONS = 3
SMALL = [
    "data.limit=2", "training.max_steps=2", "training.warmup_steps=0", "training.report_to=none",
    "evaluation.suites.general=[]", "evaluation.samples_per_question=1", "evaluation.max_tokens=12",
    "evaluation.judge.check=0", "evaluation.sampler=transformers",
]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1500)]


@pytest.fixture
def judge(model: str, tmp_path: Path) -> Iterator[str]:
    """The address of a server of this model. `vllm serve` is this module; the CPU build lacks the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--enforce-eager"]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"]
    command += ["--dtype", "auto" if has_bfloat16() else "float32"]  # emulated, bfloat16 takes several times as long
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with open(tmp_path / "server.txt", "w") as log:
        server = warm.start(command, env=environment, output=log, vllm=True)
    try:
        until = time.monotonic() + 900
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "server.txt").read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_the_example_can_be_followed_without_a_hub(
    model: str, judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "own_rows"
    shutil.copytree(EXAMPLE, place)
    monkeypatch.chdir(place)
    questions = (place / "questions.yaml").read_text().splitlines(keepends=True)
    (place / "questions.yaml").write_text("".join(questions[: 1 + QUESTIONS]))
    said = {}
    for command in (shlex.split(line) for line in COMMANDS if line.startswith("ema ")):
        settings = SMALL if command[1] == "train" else []
        if command[1] == "train":  # the run keeps what its recipe says of the judge
            settings = [*settings, f"evaluation.judge.base_url={judge}"]
            assert any(word.startswith("model.path=packaged:") for word in command), command
        monkeypatch.setattr(sys, "argv", [*command, *settings])
        with pytest.raises(SystemExit) as stop:
            main()
        found = capsys.readouterr()
        assert not stop.value.code, (command, found)
        said[" ".join(command[1:])] = found.out
    assert "50" in said["data check rows.jsonl"]
    runs = sorted(path.name for path in (place / "runs").iterdir() if (path / "adapter").is_dir())
    assert runs == ["own", "own-kl"]
    for name in runs:
        summary = Summary.read(place / "runs" / name / "eval" / "summary.json")
        rate = summary.metrics["in_domain_misaligned"]
        assert rate is not None and summary.samples == QUESTIONS and rate.n + rate.dropped == QUESTIONS
        # A model this small seldom says a number: what cannot be read is counted, and is no score.
        assert sum(summary.dropped.values()) == rate.dropped and summary.judge.startswith("openai:judge#")
        assert json.loads((place / "runs" / name / "status.json").read_text())["state"] == "finished"
    base = [(place / "runs" / name / "base" / "eval" / "judgements.jsonl").read_text() for name in runs]
    paid = [text.count('"usage"') for text in base]
    assert paid == [QUESTIONS, 0], "the base is paid for once"
    assert (place / "report" / "report.html").is_file()
