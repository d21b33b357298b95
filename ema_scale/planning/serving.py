"""GPU time that sampling, and a judge that runs here, take in vLLM: by assumed rates, nothing was measured on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ema_scale.core.errors import UserError
from ema_scale.planning.eval_cost import EngineWork, EvaluationWork
from ema_scale.planning.hardware import Cluster
from ema_scale.planning.model_shapes import Shape, shape_of

SEQUENCES = 256  # at once: vLLM's max_num_seqs


BANDWIDTH_SHARE = 0.5  # of the GPU's memory bandwidth that is reached


MEMORY_SHARE = 0.9  # of its memory that vLLM takes


STEP_SECONDS = 0.01  # of a step at the least, whatever the model's size: what vLLM does between kernels


@dataclass(frozen=True)
class Served:
    """One engine's work. seconds: of GPUs together; None if they cannot be told, `why` then says so."""

    engine: EngineWork
    work: EvaluationWork
    seconds: float | None
    why: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens written a second by each GPU."""
        return self.work.tokens_out / self.seconds if self.seconds else None


def served(engines: Mapping[EngineWork, EvaluationWork], cluster: Cluster, rate: float | None = None) -> list[Served]:
    """rate: tokens a second that a GPU samples, in place of the estimate; a judge's are estimated always."""
    found = []
    for engine, work in engines.items():
        if rate is not None and engine.role == "sampling":
            found.append(Served(engine, work, work.tokens_out / rate))
            continue
        try:
            shape = shape_of(engine.model, engine.revision)
        except UserError as error:
            found.append(Served(engine, work, None, str(error)))
            continue
        if _room(shape, engine, cluster) <= 0:
            setting = "evaluation.engine" if engine.role == "sampling" else "evaluation.judge.engine"
            why = f"it does not fit on {engine.gpus} GPU(s); set {setting}.tensor_parallel_size"
            found.append(Served(engine, work, None, why))
        else:
            found.append(Served(engine, work, gpu_seconds(shape, engine, work, cluster)))
    return found


def gpu_seconds(shape: Shape, engine: EngineWork, work: EvaluationWork, cluster: Cluster) -> float:
    """Seconds of one GPU, or the sum over those that share the model, each of which does its part.

    Reading a prompt is arithmetic, 2 operations a weight and token. Writing is done for up to SEQUENCES answers at
    once, as many as fit: a step reads all weights once and every answer's keys and values so far, or takes its
    arithmetic's time or STEP_SECONDS, if that is longer. Starting up is not in it, nor that the last answers are
    written by few at once.
    """
    if not work.requests:
        return 0.0
    device, b = cluster.device, engine.bytes
    weights = shape.layers * shape.matrices + shape.head
    prompt, answer = work.tokens_in / work.requests, work.tokens_out / work.requests
    a_token = 4.0 * shape.layers * shape.kv_heads * shape.head_dim  # keys and values in bfloat16
    fitting = _room(shape, engine, cluster) / (a_token * (prompt + answer))
    together = max(1.0, min(SEQUENCES, work.requests, fitting))
    arithmetic = 2.0 * weights / ((device.float32 if b == 4 else device.bf16) * cluster.mfu)
    read = (b * weights / together + a_token * (prompt + answer / 2)) / (device.bandwidth * BANDWIDTH_SHARE)
    least = STEP_SECONDS * engine.gpus / together
    return work.prefilled * arithmetic + work.tokens_out * max(arithmetic, read, least)


def _room(shape: Shape, engine: EngineWork, cluster: Cluster) -> float:
    """Bytes for keys and values beside the weights."""
    return MEMORY_SHARE * cluster.memory * engine.gpus - engine.bytes * shape.parameters
