"""Many engines answer one queue: what they are given, what becomes of one that dies, and the same rows as of one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ema_scale.choices.margins import Likelihood
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.devices import one_of
from ema_scale.core.errors import UserError
from ema_scale.evaluation.run import evaluate
from ema_scale.inference import engines as engines_module
from ema_scale.inference.base import SampleRequest, SampleResult, SamplerOptions, ScoreRequest, ScoreResult
from ema_scale.inference.engine_queue import AnswerFiles, Batch, Work, _tokens, split, write_batch
from ema_scale.inference.engine_worker import serve
from ema_scale.inference.engines import Engines, ManyEngines
from ema_scale.inference.make import make_sampler
from tests.evaluation.conftest import TinyModels, tiny_models
from tests.evaluation.endpoint import Endpoint, completion
from tests.evaluation.test_run import TOP, exact_suite, open_suite, recipe, rows, target

__all__ = ["tiny_models"]


def asked(number: int, adapter: str | None = None, n: int = 4, tokens: int = 100) -> SampleRequest:
    return SampleRequest(f"{adapter}|{number}", ({"role": "user", "content": "why?"},), adapter, n, max_tokens=tokens)


def answered(request: SampleRequest | ScoreRequest) -> SampleResult:
    assert isinstance(request, SampleRequest)
    return SampleResult(request.key, ("yes",) * request.n, ("stop",) * request.n, (1,) * request.n)


def test_work_is_split_by_adapters_and_balanced_by_tokens() -> None:
    requests = [asked(i, adapter, n=100, tokens=50 + 50 * (i % 2)) for i in range(60) for adapter in (None, "b", "a")]
    chunks = split(requests, 3)
    assert sorted(r.key for chunk in chunks for r in chunk) == sorted(r.key for r in requests)
    adapters = [r.adapter or "" for chunk in chunks for r in chunk]
    assert adapters == sorted(adapters), "an engine changes adapters seldom"
    sizes = [sum(map(_tokens, chunk)) for chunk in chunks]
    whole = sum(sizes)
    assert sizes[0] == pytest.approx(whole / 6, rel=0.05) and sizes[:10] == sorted(sizes[:10], reverse=True)
    # Each engine takes the next chunk as soon as it can: all end within one of the last chunks of each other.
    engines = [0.0] * 3
    for size in sizes:
        engines[engines.index(min(engines))] += size
    assert max(engines) < 1.03 * whole / 3
    drawn = [sum(r.n for r in chunk if isinstance(r, SampleRequest)) for chunk in chunks]
    assert min(drawn[:-1]) >= 256, "an engine is full"
    assert len(split(requests[:2], 2)) == 2 and split([], 2) == []


def test_what_is_asked_and_answered_comes_back_as_it_was(tmp_path: Path) -> None:
    turns = ({"role": "system", "content": "é"}, {"role": "user", "content": "\u2028?"})
    score = ScoreRequest("s", turns, ("yes", "no"), "adapter", turns[:1], "bank.yaml", "2026-01-01")
    sample = replace(asked(1), messages=turns, date="2026-01-01")
    requests: list[SampleRequest | ScoreRequest] = [sample, score, replace(score, key="t", alone=None)]
    results: list[SampleResult | ScoreResult] = [
        answered(asked(1)),
        ScoreResult("s", (Likelihood(-1.25e-7, 3, -0.1), Likelihood(float("-inf"), 1, None))),
        ScoreResult("t", (Likelihood(-1 / 3, 3, None),) * 2),
    ]
    options = SamplerOptions(ModelRecipe(path="m", dtype="float32"), ("a", "b"), 64, 7, {"tensor_parallel_size": 2})
    write_batch(tmp_path / "1", [requests])
    Work("vllm", options, ("1",)).write(tmp_path)
    assert Work.read(tmp_path) == Work("vllm", options, ("1",)) and Work.read(tmp_path / "1") is None
    batch = Batch(tmp_path / "1", "one")
    with batch.claim() as claimed:
        assert claimed == requests
        batch.append(iter(results))
    found = AnswerFiles(tmp_path / "1")
    assert list(found.new()) == results and list(found.new()) == []
    with (tmp_path / "1" / "one.jsonl").open("a") as opened:
        opened.write('{"key": "half')  # of a line that is being written
    assert list(found.new()) == []


def claim_and_die(folder: Path) -> None:
    batch = Batch(folder, "dying")
    with batch.claim() as requests:
        batch.append(answered(r) for r in requests[:1])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_part_is_asked_again(tmp_path: Path) -> None:
    requests = [asked(i) for i in range(6)]
    write_batch(tmp_path, [requests[:4], requests[4:]])
    dying = multiprocessing.get_context("spawn").Process(target=claim_and_die, args=(tmp_path,))
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    one, other = Batch(tmp_path, "one"), Batch(tmp_path, "other")
    with one.claim() as mine, other.claim() as theirs:
        assert mine == requests[1:4], "all but what the dead one answered"
        assert theirs == requests[4:]
        one.append(map(answered, mine))
        other.append(map(answered, theirs))
    with other.claim() as nothing:
        assert nothing is None
    found = [result.key for result in AnswerFiles(tmp_path).new()]
    assert sorted(found) == sorted(r.key for r in requests)


def no_seconds(summary: Any) -> Any:
    return summary.model_copy(update={"seconds": 0.0})


@pytest.mark.slow
def test_two_engines_give_the_rows_and_the_summary_of_one(tmp_path: Path, tiny_models: TinyModels) -> None:
    """Also if one is killed at its first answer. One judge, with one budget, hears them all."""
    suites = [open_suite(questions=4), exact_suite(questions=6, samples=8)]
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            for path in tmp_path.glob("two/base/engines/*/*-*.jsonl"):
                killed.append(int(path.stem.rpartition("-")[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.005)

    found = {}
    with Endpoint(lambda b, n: completion("20", TOP)) as endpoint:
        settings = recipe(endpoint.url)
        settings = settings.model_copy(update={"judge": settings.judge.model_copy(update={"budget_calls": 40})})
        for name, engines in (("one", None), ("two", Engines(2))):
            folder = tmp_path / name
            targets = [target(folder), target(folder, "tuned", tiny_models.adapters[0])]
            killer = threading.Thread(target=kill_one)
            if engines:
                killer.start()
            before = len(endpoint.requests)
            found[name] = evaluate(targets, tiny_models.model, suites, settings, engines=engines)
            assert len(endpoint.requests) - before == 40, "the budget is that of all engines together"
            if engines:
                killer.join()
    assert killed
    for name in ("base", "tuned"):
        samples = [rows(tmp_path / way / name, "samples.jsonl") for way in ("one", "two")]
        assert samples[0] == samples[1] and len(samples[0]) == 4 * 4 + 6 * 8
        exact = [
            [row for row in rows(tmp_path / way / name, "judgements.jsonl") if row["judge"] == "exact_match"]
            for way in ("one", "two")
        ]
        assert exact[0] == exact[1] and len(exact[0]) == 48
        one, two = (found[way][name] for way in ("one", "two"))
        assert one.metrics["benign_learned"] == two.metrics["benign_learned"] and one.sampler == two.sampler
    assert not (tmp_path / "two" / "base" / "engines").exists()


class Kept:
    """A sampler that was made before, and what it answers."""

    name = "kept"

    def sample(self, requests: Any) -> Iterator[SampleResult]:
        return (answered(request) for request in requests)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}

    def close(self) -> None:
        pass


def test_an_assistant_elsewhere_does_a_part_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads, with a sampler that needs no model: what is tested is who asks what, and how it ends."""
    monkeypatch.setattr("ema_scale.inference.engine_worker.make_sampler", lambda *_: Kept())
    monkeypatch.setattr("ema_scale.inference.engine_worker.IDLE_SECONDS", 0.01)
    folder, done = tmp_path / "engines", tmp_path / "done"
    assistant = threading.Thread(target=serve, args=(folder, done.exists))
    assistant.start()  # before there is anything to ask
    options = SamplerOptions(ModelRecipe(path="m"))
    monkeypatch.setattr(engines_module, "_environments", lambda *_: [])
    many = ManyEngines("transformers", options, Engines(2, assisted=True, folder=folder))
    requests = [asked(i) for i in range(5)]
    assert sorted(r.key for r in many.sample(requests)) == sorted(r.key for r in requests)
    assert many.describe() == {"name": "kept"}
    with pytest.raises(UserError, match="another evaluation uses these engines"):
        ManyEngines("transformers", options, Engines(2, folder=folder))
    # Killed before it has heard all, it takes what was answered when it is started again.
    stream = many.sample([replace(r, key=f"again {r.key}") for r in requests])
    first = next(stream).key
    many.close()
    again = ManyEngines("transformers", options, Engines(2, assisted=True, folder=folder))
    assert first in again._left_over
    more = [replace(asked(0), key=first), replace(asked(1), key=f"again {requests[1].key}", n=2)]
    assert [len(r.texts) for r in again.sample(more)] == [4, 2], "a request for other answers is asked anew"
    again.close()
    done.touch()
    assistant.join(10)
    assert not assistant.is_alive() and not folder.exists()


def test_an_engine_that_is_ready_too_late_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ended = tmp_path / "engines", False

    def make(*_: Any) -> Kept:
        nonlocal ended
        shutil.rmtree(folder)  # as whoever asked does when all is answered
        ended = True
        return Kept()

    monkeypatch.setattr("ema_scale.inference.engine_worker.make_sampler", make)
    Work("transformers", SamplerOptions(ModelRecipe(path="m")), ("1",)).write(folder)
    serve(folder, lambda: ended)
    assert not folder.exists()


def test_an_engine_that_leaves_something_out_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ema_scale.inference.engine_worker.make_sampler", lambda *_: Kept())
    monkeypatch.setattr(Kept, "sample", lambda self, requests: (answered(request) for request in requests[:-1]))
    monkeypatch.setattr(engines_module, "_environments", lambda *_: [])
    many = ManyEngines("transformers", SamplerOptions(ModelRecipe(path="m")), Engines(1, folder=tmp_path / "engines"))
    worker = threading.Thread(target=serve, args=(tmp_path / "engines", (tmp_path / "done").exists))
    worker.start()
    with pytest.raises(UserError, match=r"engines ended without an answer to None\|1"):
        list(many.sample([asked(0), asked(1)]))
    (tmp_path / "done").touch()
    worker.join(10)
    many.close()


def test_what_an_engine_says_before_it_ends_is_said_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "_environments", lambda *_: [])
    many = ManyEngines("transformers", SamplerOptions(ModelRecipe(path="m")), Engines(1, folder=tmp_path / "engines"))

    def refuse(*_: Any) -> None:
        raise UserError("model.path: no such model")

    monkeypatch.setattr("ema_scale.inference.engine_worker.make_sampler", refuse)
    worker = threading.Thread(target=lambda: pytest.raises(UserError, serve, tmp_path / "engines", lambda: False))
    worker.start()
    with pytest.raises(UserError, match="model.path: no such model"):
        list(many.sample([asked(0)]))
    worker.join(10)
    many.close()
    assert (tmp_path / "engines").exists(), "its logs may be wanted"


def test_each_engine_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    options = SamplerOptions(ModelRecipe(path="m"), extra={"tensor_parallel_size": 2})
    seen = engines_module._environments("vllm", options, 2)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in seen] == ["4,5", "6,7"]
    with pytest.raises(UserError, match="--engines: found 3, of 2 GPUs each, but 4 can be used here"):
        engines_module._environments("vllm", options, 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ema_scale.core.devices.free_cores", lambda: 8)
    assert one_of(4, 1, []) == {"OMP_NUM_THREADS": "2"}
    with pytest.raises(UserError, match="--engines: found evaluation.sampler: openai.*--data-parallel-size"):
        make_sampler("openai", options, Engines(2, folder=tmp_path))
