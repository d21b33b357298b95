"""What a run reports: means over whole optimizer steps, rows of metrics.jsonl, progress lines, utilisation."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.core.io import append_jsonl, atomic_write_text, read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.data.packing import lengths_of
from ema_scale.models.flops import flops, peak_flops

log = logging.getLogger(__name__)

CHOICES = "choices/"  # what the readings of choice suites begin with
SAMPLED_ROWS = 1000  # of a dataset, for the length of rows and the share of learned tokens


class Monitor:
    """Sums each micro-batch's share of a mean; `flush` sums over processes and averages over steps.

    utilisation: of the GPUs, at one token per second; None if it is not known.
    reference: this process's stopwatch of the reference.
    by_step: also keep each step's sums, for `reading`.
    """

    def __init__(
        self, utilisation: float | None = None, reference: Stopwatch | None = None, *, by_step: bool = False
    ) -> None:
        self._utilisation, self._reference = utilisation, reference
        if reference is not None:
            reference.take()
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, set[int]] = {}
        self._tokens = 0
        self._since = time.perf_counter()
        self._step_sums: dict[str, Tensor] | None = {} if by_step else None
        self._broken_losses: Tensor | None = None
        self._noted: dict[str, float] = {}

    def note(self, values: dict[str, float]) -> None:
        """Values that are the same on every process, for the next step's `reading`."""
        self._noted.update(values)

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        """metrics: name -> this micro-batch's share of the step's mean (detached scalars)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._steps.setdefault(name, set()).add(step)
            if self._step_sums is not None:
                self._step_sums[name] = self._step_sums.get(name, 0) + value
        if "loss" in metrics:
            broken = (~torch.isfinite(metrics["loss"].detach())).long()
            self._broken_losses = broken if self._broken_losses is None else self._broken_losses + broken

    def take_broken(self, device: torch.device) -> Tensor:
        """int64 scalar: micro-batches since the last call, on this process, whose loss was not a finite number.

        Nothing is read back from the device.
        """
        broken, self._broken_losses = self._broken_losses, None
        return torch.zeros((), dtype=torch.long, device=device) if broken is None else broken.to(device)

    def reading(self, accelerator: Any) -> dict[str, float]:
        """Means of the step that has just ended. A collective."""
        assert self._step_sums is not None
        names = sorted(self._step_sums)
        total = accelerator.reduce(torch.stack([self._step_sums[n] for n in names]), "sum").tolist() if names else []
        self._step_sums = {}
        noted, self._noted = self._noted, {}
        return dict(zip(names, total, strict=True)) | noted

    def add_tokens(self, tokens: int) -> None:
        """tokens: non-padding ones of one optimizer step on all processes."""
        self._tokens += tokens

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Means since the last flush, each over the steps on which it was read. A collective.

        Also tokens_per_second of all processes; mfu, the model-FLOP utilisation, if it is known; reference_share, the
        reference's share of the time, if it took any.
        """
        names = sorted(self._sums, key=lambda name: ("/" in name, name))  # many of a kind, such as drift/..., come last
        if not names:
            return {}
        total = accelerator.reduce(torch.stack([self._sums[n] for n in names]), "sum").tolist()
        values = {n: v / len(self._steps[n]) for n, v in zip(names, total, strict=True)}
        now = time.perf_counter()
        passed = max(now - self._since, 1e-9)
        values["tokens_per_second"] = self._tokens / passed
        if self._utilisation is not None:
            values["mfu"] = self._utilisation * values["tokens_per_second"]
        spent = self._reference.take() if self._reference is not None else 0.0
        if spent:
            values["reference_share"] = spent / passed
        self._sums, self._steps, self._tokens, self._since = {}, {}, 0, now
        return values


class MetricsWriter(TrainerCallback):
    """Appends a row to metrics.jsonl for every training log and every scoring of choice suites, and writes the number
    of steps into the status."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.run_dir.set_status("running", keep=True, max_steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs and not any(name.startswith(CHOICES) for name in logs):
            return
        row = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        append_jsonl(self.run_dir.metrics_path, [{"step": state.global_step, **row, "time": time.time()}])


class BarProgress(ProgressCallback):
    """Progress on a terminal: one bar that ends in the losses. Every reading is in metrics.jsonl.

    terms: as in `PlainProgress`.
    """

    def __init__(self, terms: Sequence[str] = ()) -> None:
        super().__init__()
        self.shown = ("loss", "ce", *terms)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(_losses(logs, self.shown))


def _losses(logs: Mapping[str, float], names: Sequence[str]) -> str:
    return " ".join(f"{name} {logs[name]:.4f}" for name in names if name in logs)


class PlainProgress(TrainerCallback):
    """Progress without a terminal: one line per log, at most one every `seconds`, and the last.

    terms: names of the loss terms to show beside the loss and the cross-entropy.
    """

    def __init__(self, terms: Sequence[str] = (), seconds: float = 10.0) -> None:
        self.shown, self.seconds = ("loss", "ce", *terms), seconds
        self._last = 0.0
        self._started = (0.0, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._started = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        now = time.monotonic()
        if now - self._last < self.seconds and state.global_step < state.max_steps:
            return
        self._last = now
        began, first = self._started
        left = (now - began) / max(state.global_step - first, 1) * (state.max_steps - state.global_step)
        shown = _losses(logs, self.shown)
        speed = logs.get("tokens_per_second", 0.0)
        shares = {"reference_share": "reference", "mfu": "MFU"}
        shown += "".join(f"  {word} {logs[name]:.0%}" for name, word in shares.items() if name in logs)
        log.info("step %d/%d  %s  %.0f tokens/s  %.0f s left", state.global_step, state.max_steps, shown, speed, left)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`, and a torn last line: a resumed run repeats those steps."""
    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    if path.exists():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def device_peak() -> float | None:
    """bfloat16 operations per second of this process's GPU; None without a GPU, or for an unknown one."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def utilisation_per_token(model: Any, dataset: Any, processes: int) -> float | None:
    """Utilisation at one token per second on all processes; times tokens_per_second it is that of the run.

    None if the device's peak or the rows are not known.

    dataset: tokenized rows. The first 1,000 say how long rows are, and how many tokens are learned.
    """
    peak = device_peak()
    rows = list(islice(dataset or (), SAMPLED_ROWS))
    if peak is None or not rows:
        return None
    lengths = [n for row in rows for n in lengths_of(row)]
    tokens = sum(lengths)
    learned = sum(label != -100 for row in rows for label in row["labels"])
    context = sum(n * n for n in lengths) / tokens / 2
    return flops(model, context, labelled=learned / tokens).training / (peak * processes)
