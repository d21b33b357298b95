"""What a run reports: means over whole optimizer steps, one metrics.jsonl row a log, plain progress lines."""

from __future__ import annotations

import logging
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.core.io import append_jsonl, atomic_write_text, read_jsonl
from ema_scale.core.run_dir import RunDir
from ema_scale.data.packing import lengths_of
from ema_scale.models.flops import flops, peak_flops

log = logging.getLogger(__name__)


class Monitor:
    """Sums of shares of a mean, over micro-batches; `flush` sums over processes and averages over steps.

    utilisation: of the GPUs, at one token a second; None if that is not known. reference: the stopwatch of the
    reference, of which this process's own is read. by_step: keep each step's sums for `reading`, too.
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
        self._now: dict[str, Tensor] | None = {} if by_step else None
        self._broken: Tensor | None = None

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        """metrics: name -> this micro-batch's share of the step's mean (detached scalars)."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._steps.setdefault(name, set()).add(step)
            if self._now is not None:
                self._now[name] = self._now.get(name, 0) + value
        if "loss" in metrics:
            broken = (~torch.isfinite(metrics["loss"].detach())).long()
            self._broken = broken if self._broken is None else self._broken + broken

    def take_broken(self, device: torch.device) -> Tensor:
        """int64 scalar: micro-batches on this process since the last call whose loss was not a finite number. Nothing
        is read back from the device."""
        broken, self._broken = self._broken, None
        return torch.zeros((), dtype=torch.long, device=device) if broken is None else broken.to(device)

    def reading(self, accelerator: Any) -> dict[str, float]:
        """Means of the step that has just ended; a collective."""
        assert self._now is not None
        names = sorted(self._now)
        total = accelerator.reduce(torch.stack([self._now[n] for n in names]), "sum").tolist() if names else []
        self._now = {}
        return dict(zip(names, total, strict=True))

    def add_tokens(self, tokens: int) -> None:
        """Non-padding tokens of one optimizer step, all processes together."""
        self._tokens += tokens

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Means since the last flush; a collective. Metrics average over the steps they were read on.

        Besides: tokens_per_second, of all processes; mfu, model-FLOP utilisation, if it is known; reference_share, of
        the time, if the reference took any.
        """
        names = sorted(self._sums)
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
    """Appends a row to metrics.jsonl for every training log, and says in the status how many steps there will be."""

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
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        append_jsonl(self.run_dir.metrics_path, [{"step": state.global_step, **row, "time": time.time()}])


class PlainProgress(TrainerCallback):
    """Where there is no terminal: one line a log, at most one every `seconds`, and the last."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
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
        shown = " ".join(f"{name} {logs[name]:.4f}" for name in ("loss", "ce", "kl") if name in logs)
        speed = logs.get("tokens_per_second", 0.0)
        shares = {"reference_share": "reference", "mfu": "MFU"}
        shown += "".join(f"  {word} {logs[name]:.0%}" for name, word in shares.items() if name in logs)
        log.info(
            "step %d/%d  %s  %.0f tokens/s  %.0f s left",
            state.global_step,
            state.max_steps,
            shown,
            speed,
            left,
        )


def truncate_metrics(path: Path, step: int) -> None:
    """Drop rows after `step` (and a torn last line): a resumed run does those steps again."""
    import json

    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    if path.exists():
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


ROWS = 1000  # looked at


def device_peak() -> float | None:
    """bfloat16 operations a second of this process's GPU; None without one, or for one that is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def utilisation_per_token(model: Any, dataset: Any, processes: int) -> float | None:
    """Utilisation at one token a second, all processes together; times tokens a second it is that of the run.

    dataset: tokenized rows, of which the first 1,000 tell how long rows are and how many tokens are learned. None where
    the device's peak is not known, or rows are not.
    """
    peak = device_peak()
    rows = list(islice(dataset or (), ROWS))
    if peak is None or not rows:
        return None
    lengths = [n for row in rows for n in lengths_of(row)]
    tokens = sum(lengths)
    learned = sum(label != -100 for row in rows for label in row["labels"])
    context = sum(n * n for n in lengths) / tokens / 2
    return flops(model, context, labelled=learned / tokens).training / (peak * processes)
