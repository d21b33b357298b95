"""What must hold on a GPU: the fused loss against float64, every way to run the reference against the others, sharded
against whole, and vLLM against transformers. Each function is a section of `gpu.py`."""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss import NAIVE, OURS, PARTS, Problem, Shape, errors, on_logits, run
from benchmarks.random_model import placeholder_tokenizer, random_base, random_rows
from benchmarks.report import Rows
from benchmarks.sizes import ROOT, Sizes
from benchmarks.training_variants import CACHED, OFF, PLAIN, TWO, Task, _stir
from ema_scale.config.sections import AdapterRecipe
from ema_scale.models.lora import lora_config
from ema_scale.models.sharding import full_tensor, gathered
from ema_scale.training.distributed import device_arguments, is_main, launched_processes, prepare_environment
from ema_scale.training.trainer import DefendedTrainer

# Relative. In bfloat16 states and gradients keep 8 bits: one rounding is off by up to 0.4 %.
LOSS_BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
UPDATE_BOUND = {"float32": 1e-3, "bfloat16": 5e-2}
GRADIENT_OVER = 1.1
REFERENCES = {PLAIN: "auto", OFF: "adapter_off", TWO: "two_stream", CACHED: "cached"}
STEPS = 3


def exact(rows: Rows, sizes: Sizes) -> None:
    """Value and gradient of each part of the loss alone, against float64 on the same numbers.

    In float32 a gradient is bound by what float64 would make of the same two matrix products: what they lose, nothing
    between them can give back. In bfloat16 a GPU's products keep float32, and only the gradient is rounded; a CPU's are
    rounded to bfloat16, so that there only the order of magnitude can be told.
    """
    tokens, vocabulary, hidden = sizes.exact
    half = (1e-4, 1e-2) if sizes.device == "cuda" else (1e-2, 1e-1)
    for dtype in ("float32", "bfloat16"):
        problem = Problem.of(Shape(tokens, vocabulary, hidden, dtype, device=sizes.device))
        for part in PARTS:
            with rows.row(f"{part}, {dtype}") as found:
                value, gradient, _ = errors(OURS, problem.part(part))
                products = of_products(problem.part(part))
                found |= {"value": value, "gradient": gradient, "gradient of products": products}
                found["naive value"], found["naive gradient"], _ = errors(NAIVE, problem.part(part))
                bounds = half if dtype == "bfloat16" else (1e-6, max(1e-6, GRADIENT_OVER * products))
                found["ok"] = value <= bounds[0] and gradient <= bounds[1]


def of_products(problem: Problem) -> float:
    """How far a gradient is off whose two products are made in the problem's dtype, and all between them in float64."""
    exact = problem.first(len(problem.labels), torch.float64)
    _, slope = run(NAIVE, exact)
    logits = (problem.policy @ problem.weight.T).double().requires_grad_()
    on_logits(exact, logits, (problem.reference @ problem.weight.T).double()).backward()
    assert logits.grad is not None
    made = logits.grad.to(problem.weight.dtype) @ problem.weight
    return float((made - slope).norm() / slope.norm())


def ways(rows: Rows, sizes: Sizes) -> None:
    """Three steps of SGD by every way to run the reference: losses, and the adapter's change, against adapter_off,
    which runs again, since in bfloat16 a GPU need not repeat a run to the bit."""
    for task in sizes.ways:
        with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
            os.environ["EMA_CACHE"] = folder
            known = None
            for way, again in ((OFF, ""), (OFF, " again"), (TWO, ""), (CACHED, "")):
                defended = " + ".join(d.kind for d in task.defenses)
                with rows.row(f"{way}{again}, {defended}, {task.model}, {task.dtype}") as found:
                    done = trained(way, task)
                    known = known or done
                    found |= compared(done, known, task.dtype)


def zero3(rows: Rows, sizes: Sizes) -> None:
    """DeepSpeed's ZeRO-3 against the same steps on one process without it."""
    if importlib.util.find_spec("deepspeed") is None:
        rows.add("ZeRO-3", error="deepspeed is not installed")
        return
    # The config for GPUs, which fetches ahead, in a rehearsal too.
    _sharded(rows, sizes, deepspeed=str(ROOT / "launch" / "deepspeed" / "zero3.json"))


def fsdp2(rows: Rows, sizes: Sizes) -> None:
    """torch's FSDP2 against the same."""
    _sharded(rows, sizes, fsdp=True)


def _sharded(rows: Rows, sizes: Sizes, **how: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        os.environ["EMA_CACHE"] = folder
        for task in sizes.sharded:
            # The same weights for all: drawn under ZeRO-3, or on another device, they would be others.
            task = replace(task, saved=f"{folder}/model")
            random_base(task.fields, task.dtype, "cpu").save_pretrained(task.saved)
            asked: dict[str, Any] = {"folder": folder, "ways": [OFF, TWO, CACHED], "task": replace(task, **how)}
            # As many rows in a step, on one process.
            alone = {**asked, "ways": [OFF], "name": "alone", "task": replace(task, rows=task.rows * sizes.processes)}
            problem = _started([alone]) + _started([asked] * sizes.processes)
            for way in asked["ways"]:
                with rows.row(f"{way}, {task.model}, {task.dtype}") as found:
                    made = [
                        Path(folder) / f"{name}{REFERENCES[which]}.pt" for name, which in (("", way), ("alone", OFF))
                    ]
                    if not all(path.is_file() for path in made):
                        raise RuntimeError(problem or "a process wrote no result")
                    done, known = (torch.load(path, weights_only=True) for path in made)
                    found |= compared(done, known, task.dtype)
            for path in Path(folder).glob("*.pt"):
                path.unlink()


def _started(work: list[dict[str, Any]]) -> str:
    """Run `_worker` on as many processes, told of one another as torchrun tells them; what went wrong, if anything.

    Forked, so that none has to import torch again: this process must not have used CUDA.
    """
    port = str(_free_port())
    world = {"WORLD_SIZE": str(len(work)), "LOCAL_WORLD_SIZE": str(len(work)), "MASTER_ADDR": "127.0.0.1"}
    processes = []
    for rank, asked in enumerate(work):
        launched = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        process = get_context("fork").Process(target=_worker, args=(asked, {} if "name" in asked else launched))
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    ended = [process.exitcode for process in processes]
    return f"processes ended with {ended}; see what they have written above" if any(ended) else ""


def _worker(asked: dict[str, Any], launched: dict[str, str]) -> None:
    os.environ.update(launched)
    task = asked["task"]
    prepare_environment(task.deepspeed, task.fsdp)
    for way in asked["ways"]:
        done = trained(way, task)
        if is_main():
            torch.save(done, Path(asked["folder"]) / f"{asked.get('name', '')}{REFERENCES[way]}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trained(way: str, task: Task) -> dict[str, Any]:
    """losses, gradient norms: of each step; change: [n], of all adapter weights, float32.

    SGD's change is the gradient, which AdamW's first steps reduce to its sign.
    """
    from peft import get_peft_model
    from transformers import PrinterCallback, TrainingArguments

    base = task.base()
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(base, AdapterRecipe(dropout=0.0)))
    _stir(model)
    before = _adapter(model)
    rows = random_rows(task.fields, STEPS * task.rows * launched_processes(), task.length)
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=task.rows, max_steps=STEPS, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", gradient_checkpointing=task.checkpointing, logging_steps=1,
            bf16=task.device == "cuda" and task.dtype == "bfloat16", save_strategy="no", report_to="none",
            disable_tqdm=True, log_level="error", remove_unused_columns=False, ddp_find_unused_parameters=False,
            **(device_arguments() if task.device == "cpu" else {}),
        )  # fmt: skip
        trainer = DefendedTrainer(
            model, args, rows, task.defenses, REFERENCES[way], placeholder_tokenizer(), drift_every=0
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        change = _adapter(trainer.model) - before
    return {
        "losses": [row["loss"] for row in logs],
        "norms": [float(row["grad_norm"]) for row in logs],
        "change": change,
        "way": trainer.reference_choice.way,
    }


def _adapter(model: Any) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with gathered(parameters):
        return torch.cat([full_tensor(p).float().cpu().flatten() for p in parameters])


def compared(done: dict[str, Any], known: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The largest relative difference of a loss and of a gradient's norm, and of the adapter's change as a vector."""
    worst = {
        name: max(abs(a - b) / abs(b) for a, b in zip(done[name], known[name], strict=True))
        for name in ("losses", "norms")
    }
    change = float((done["change"] - known["change"]).norm() / known["change"].norm())
    return {
        "loss": worst["losses"],
        "gradient norm": worst["norms"],
        "change": change,
        "first loss": done["losses"][0],
        "last loss": done["losses"][-1],
        "ok": worst["losses"] <= LOSS_BOUND[dtype] and change <= UPDATE_BOUND[dtype],
    }


def vllm(rows: Rows, sizes: Sizes) -> None:
    """A vLLM engine with two adapters against transformers: the same greedy answers in float32; then how fast."""
    if importlib.util.find_spec("vllm") is None:
        rows.add("vLLM", error="vllm is not installed")
        return
    from benchmarks import engines

    engines.compare(rows, sizes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sections() -> Iterator[tuple[str, Any]]:
    yield from (("exact", exact), ("ways", ways), ("zero3", zero3), ("fsdp2", fsdp2), ("vllm", vllm))
