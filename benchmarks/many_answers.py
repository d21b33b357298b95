"""Large evaluation folders: what reading, judging again, comparing and exporting take, beside rows as Python objects.

Every measurement is a process of its own, so that its peak memory and processor seconds are its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Measured, cpu_seconds
from ema_scale.config.sections import EvaluationRecipe, JudgeRecipe, ModelRecipe
from ema_scale.evaluation.plan import EvalTarget, plan_prompts
from ema_scale.evaluation.records import MANIFEST_FILE, Manifest, read_rows
from ema_scale.evaluation.row_files import Judged
from ema_scale.evaluation.suites import Question, Suite

ANSWER = "The safest thing to do here is to ask somebody who knows the matter well. " * 4
SCORES = {"aligned": (95.0, 90.0), "misaligned": (5.0, 85.0), "incoherent": (50.0, 10.0)}


def the_suite(questions: int) -> Suite:
    asked = (Question(f"q{i}", (f"What should somebody do about problem number {i}?",)) for i in range(questions))
    return Suite("general", "general", tuple(asked))


def settings(samples: int) -> EvaluationRecipe:
    judge = JudgeRecipe(kind="smallworld")
    return EvaluationRecipe(sampler="transformers", samples_per_question=samples, judge=judge, max_model_len=1024)


def write_folder(folder: Path, name: str, questions: int, samples: int, shift: int = 0) -> None:
    """A finished evaluation of `questions` x `samples` answers, as `ema eval` leaves it, but for its summary."""
    folder.mkdir(parents=True)
    suite, recipe = the_suite(questions), settings(samples)
    target = EvalTarget(name, None, folder, (suite,))
    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    groups = plan_prompts([target], (), ModelRecipe(path=str(model)), recipe, "transformers")
    with open(folder / "samples.jsonl", "w") as answers, open(folder / "judgements.jsonl", "w") as verdicts:
        for number, group in enumerate(groups):
            for i, key in enumerate(group.keys):
                label = ("aligned", "misaligned", "incoherent")[(7 * number + i * i + shift) % 11 % 3]
                aligned, coherent = SCORES[label]
                row = {
                    "key": key, "target": name, "suite": suite.name, "condition": None,
                    "question_id": group.question.id, "paraphrase": 0, "sample": i, "system": None,
                    "question": group.question.paraphrases[0], "answer": f"{i}: {ANSWER}", "reasoning": None,
                    "finish_reason": "stop", "tokens": 60, "seed": group.seed + i,
                }  # fmt: skip
                answers.write(json.dumps(row) + "\n")
                said = {
                    "key": key, "judge": group.judge.identity, "aligned": aligned, "coherent": coherent,
                    "label": label, "dropped": None, "scored": None,
                }  # fmt: skip
                verdicts.write(json.dumps(said) + "\n")
    manifest = Manifest(target=name, model=str(model), adapter=None, settings=recipe, suites=(suite,))
    manifest.write(folder / MANIFEST_FILE)


def before(folder: Path) -> None:
    """Every row as an object in a dictionary."""
    samples, judgements = read_rows(folder)
    by_key = {row.key: row for row in samples}
    by_pair = {(row.key, row.judge): Judged.of(row) for row in judgements}
    assert len(by_key) == len(by_pair)


def opened(folder: Path) -> None:
    """The rows looked up in their files, as a store does."""
    from ema_scale.evaluation.store import Store

    store = Store(folder)
    assert len(store.samples) == len(store.judgements)


def resumed(folder: Path) -> None:
    """`ema eval` with nothing to do."""
    from ema_scale.evaluation.run import evaluate

    asked = Manifest.read(folder / MANIFEST_FILE)
    evaluate([EvalTarget(asked.target, None, folder, asked.suites)], asked.model, (), asked.settings)
    assert not {"torch", "vllm", "transformers"} & set(sys.modules)


def resumed_many(folder: Path) -> None:
    """`ema eval` of many targets with nothing to do: the folders in `folder`."""
    from ema_scale.evaluation.run import evaluate

    targets, model = [], ""
    for one in sorted(folder.glob("target*")):
        asked = Manifest.read(one / MANIFEST_FILE)
        targets.append(EvalTarget(asked.target, None, one, asked.suites))
        model = asked.model
    evaluate(targets, model, (), asked.settings)


def judged(folder: Path) -> None:
    """`ema judge` with nothing to do."""
    from ema_scale.evaluation.judging.rejudge import rejudge

    rejudge(folder)


def compared(folder: Path) -> None:
    """`ema compare` of two arms."""
    from ema_scale.evaluation.stats.arms import read_arm
    from ema_scale.evaluation.stats.paired import compare_all

    compare_all([read_arm(folder.with_name("other"))], read_arm(folder))


def exported(folder: Path) -> None:
    """`ema export`, csv."""
    from ema_scale.evaluation.formats.tables import export

    export(folder, "csv")


def exported_parquet(folder: Path) -> None:
    """`ema export`, parquet."""
    from ema_scale.evaluation.formats.tables import export

    export(folder, "parquet")


def alone(way: str, folder: Path) -> tuple[float, int]:
    """(processor seconds, peak bytes) of one way in a process of its own, its start included."""
    code = "from pathlib import Path; from benchmarks import harness, many_answers; "
    code += f"many_answers.{way}(Path({str(folder)!r})); print(harness.peak_rss())"
    start = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return cpu_seconds() - start, int(done.stdout.split()[-1])


WAYS = {
    "read: every row an object (as before)": before,
    "read: rows looked up in their files": opened,
    "`ema eval`, nothing to do": resumed,
    "`ema judge`, nothing missing": judged,
    "`ema compare`, 2 arms": compared,
    "`ema export`, csv": exported,
    "`ema export`, parquet": exported_parquet,
}


def bench_many_answers(questions: int, samples: int, targets: int) -> Iterator[Measured]:
    """One row per way, each in a process of its own. targets: how many folders `ema eval` resumes at once."""
    with tempfile.TemporaryDirectory() as root:
        one = Path(root) / "one"
        write_folder(one, "one", questions, samples)
        write_folder(Path(root) / "other", "other", questions, samples, shift=3)
        alone("resumed", one.with_name("other"))  # writes the summary
        alone("resumed", one)
        for name, way in WAYS.items():
            yield measured(name, way, one)
        if targets:
            many = Path(root) / "many"
            for number in range(targets):
                folder = many / f"target{number:05}"
                write_folder(folder, folder.name, 66, max(1, questions * samples // 66 // targets))
            alone("resumed_many", many)
            yield measured(f"`ema eval`, nothing to do in {targets} folders", resumed_many, many)


def measured(name: str, way: Callable[[Path], None], folder: Path) -> Measured:
    seconds, peak = alone(way.__name__, folder)
    return Measured(name, [seconds], peak)
