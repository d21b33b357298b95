"""The fused loss against full logits and against Liger's fused linear losses: time, memory, agreement with float64.

All compute mean_t CE_t + 0.1 mean_t D(policy_t, reference_t) and the gradient by the policy's hidden states, with one
frozen head and all tokens labelled. Agreement is also read of each part alone: in the sum, cross-entropy hides what a
divergence is off by. Liger (optional: `pip install ema-scale[liger]`) also computes the head's gradient, which it
cannot be told to leave out.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.alone import OUT_OF_MEMORY, alone
from benchmarks.harness import Measured, Target, Variant, add_ratios, compare, peak_bytes
from ema_scale.core.errors import UserError
from ema_scale.models.head import Head
from ema_scale.training.loss import LossTerm, fused_loss

STRENGTH = 0.1
BETA = {"reference_policy": 0.0, "jensen_shannon": 0.5, "policy_reference": 1.0}  # Liger's names for directions
NAIVE, CHUNKED, TRITON, OURS = "full logits", "Liger, chunked torch", "Liger, Triton", "ema_scale, fused"
CE = "cross-entropy"
PARTS = (CE, *BETA)
MEMORY_LIMIT, ERROR_LIMIT = 2e9, 1e-6
HELD = (f"gradient, {CE}", *(f"value, {name}" for name in PARTS))
# A divergence's gradient is of the difference of two logits, and float32's products have lost more of that than 1e-6.
OVER, OVER_LIMIT = "error of the divergences' gradients, of float64's on float32's logits", 1.1


@dataclass(frozen=True)
class Shape:
    """A problem's size: N tokens, V vocabulary entries, H hidden units. dtype: of states and head."""

    tokens: int = 2048
    vocab: int = 32_000
    hidden: int = 512
    dtype: str = "float32"
    direction: str = "policy_reference"
    device: str = "cpu"


FULL = Shape(8192, 152_000, 3584, "bfloat16")  # Qwen2.5-7B's head, as the memory target has it


@dataclass(frozen=True)
class Problem:
    """Inputs of the loss.

    Args:
        policy, reference: hidden states [N, H].
        weight: the head, [V, H].
        labels: [N].
        direction: of the divergence, see `Divergence`.
        hard: the weight of cross-entropy.
        soft: the weight of the divergence.
    """

    policy: Tensor
    reference: Tensor
    weight: Tensor
    labels: Tensor
    direction: str
    hard: float = 1.0
    soft: float = STRENGTH

    @classmethod
    def of(cls, shape: Shape) -> Problem:
        """Random states and head (seed 0), logits of standard deviation 2."""
        made = torch.Generator(shape.device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=made, device=shape.device, dtype=getattr(torch, shape.dtype))
        weight = draw(shape.vocab, shape.hidden).mul_(2 / shape.hidden**0.5)
        policy = draw(shape.tokens, shape.hidden)
        reference = policy + 0.1 * draw(shape.tokens, shape.hidden)
        labels = torch.randint(shape.vocab, (shape.tokens,), generator=made, device=shape.device)
        return cls(policy, reference, weight, labels, shape.direction)

    def first(self, tokens: int, dtype: torch.dtype | None = None) -> Problem:
        """The same with fewer tokens, in another dtype."""
        policy, reference = self.policy[:tokens].to(dtype), self.reference[:tokens].to(dtype)
        return replace(
            self, policy=policy, reference=reference, weight=self.weight.to(dtype), labels=self.labels[:tokens]
        )

    def part(self, name: str) -> Problem:
        """Cross-entropy alone, or the divergence of one direction."""
        if name == CE:
            return replace(self, soft=0.0)
        return replace(self, direction=name, hard=0.0, soft=1.0)


def naive(problem: Problem, policy: Tensor) -> Tensor:
    """torch's losses on full logits of both, in float32 (float64 for float64 states)."""
    dtype = torch.promote_types(policy.dtype, torch.float32)
    with torch.no_grad():
        reference = (problem.reference @ problem.weight.T).to(dtype)
    return on_logits(problem, (policy @ problem.weight.T).to(dtype), reference)


def on_logits(problem: Problem, policy: Tensor, reference: Tensor) -> Tensor:
    """The loss by its definition, from logits [N, V]."""
    log_p, log_q = F.log_softmax(policy, -1), F.log_softmax(reference, -1)
    if problem.direction == "policy_reference":
        apart = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    elif problem.direction == "reference_policy":
        apart = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    else:
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        halves = [F.kl_div(log_m, one, reduction="batchmean", log_target=True) for one in (log_p, log_q)]
        apart = (halves[0] + halves[1]) / 2
    return problem.hard * F.nll_loss(log_p, problem.labels) + problem.soft * apart


def liger_chunked(problem: Problem, policy: Tensor) -> Tensor:
    """Liger's torch form, which runs on a CPU, at the chunk of 1,024 tokens it has by default, uncompiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(problem.hard, problem.soft, BETA[problem.direction], compiled=False)
    return loss(policy, problem.weight, problem.reference, problem.weight, problem.labels)


def liger_triton(problem: Problem, policy: Tensor) -> Tensor:
    """Liger's two Triton losses, each with a pass over the head of its own."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    weight, labels = problem.weight, problem.labels
    apart = LigerFusedLinearJSD(jsd_beta=BETA[problem.direction])
    hard = LigerFusedLinearCrossEntropyLoss()(weight, policy, labels)
    return problem.hard * hard + problem.soft * apart(policy, weight, problem.reference, weight, labels)


def ours(problem: Problem, policy: Tensor) -> Tensor:
    """`fused_loss` as the trainer calls it."""
    each = torch.full((len(policy),), 1 / len(policy), device=policy.device, dtype=torch.float64)
    each = each.to(torch.promote_types(policy.dtype, torch.float32))
    every = torch.ones_like(each, dtype=torch.bool)
    terms = [LossTerm(problem.soft * each, every, problem.direction)] if problem.soft else []  # type: ignore[arg-type]
    head, hard = Head(problem.weight), problem.hard * each
    return fused_loss(policy, problem.reference, head, problem.labels, hard, terms).loss


VARIANTS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    NAIVE: naive, CHUNKED: liger_chunked, TRITON: liger_triton, OURS: ours
}  # fmt: skip


def run(variant: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and gradient [N, H]."""
    policy = problem.policy.detach().requires_grad_()
    loss = VARIANTS[variant](problem, policy)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


def measure(variant: str, shape: dict[str, Any], exact_tokens: int = 128) -> dict[str, Any]:
    """Measure one variant, which has this process to itself.

    Returns peak_bytes (beyond states and head), seconds and cpu (elapsed and of the processor), and for the first
    `exact_tokens` tokens `error`, the larger one of value and gradient. In float32 also `parts`: name -> `errors`.
    """
    problem = Problem.of(Shape(**shape))
    run(variant, problem.first(16))
    taken = used = 0.0

    def once() -> None:
        nonlocal taken, used
        began, before = time.perf_counter(), time.process_time()
        run(variant, problem)
        if problem.policy.is_cuda:
            torch.cuda.synchronize()
        taken, used = time.perf_counter() - began, time.process_time() - before

    peak = peak_bytes(once)
    few = problem.first(exact_tokens)
    found: dict[str, Any] = {
        "peak_bytes": peak,
        "seconds": taken,
        "cpu": used,
        "error": max(errors(variant, few)[:2]),
        "parts": {},
    }
    if shape["dtype"] == "float32":
        found["parts"] = {name: errors(variant, few.first(32).part(name)) for name in PARTS}
    return found


def errors(variant: str, problem: Problem) -> tuple[float, float, float]:
    """Relative errors against float64: of the loss, of the gradient (Euclidean norm), and the gradient's floor.

    The floor is the error of a gradient computed in float64 from logits computed in the problem's dtype.
    """
    exact = problem.first(len(problem.labels), torch.float64)
    (loss, gradient), (value, slope) = run(variant, problem), run(NAIVE, exact)
    logits = (problem.policy @ problem.weight.T).double().requires_grad_()
    on_logits(exact, logits, (problem.reference @ problem.weight.T).double()).backward()
    assert logits.grad is not None
    products = logits.grad @ exact.weight
    value_off, off, floor = (loss - value).abs() / value.abs(), gradient - slope, products - slope
    return float(value_off), float(off.norm() / slope.norm()), float(floor.norm() / slope.norm())


def missing(variant: str, shape: Shape) -> str:
    """Why a variant cannot run here; empty if it can."""
    if variant in (CHUNKED, TRITON) and importlib.util.find_spec("liger_kernel") is None:
        return "needs liger-kernel, which is not installed"
    if variant == TRITON and shape.device == "cpu":
        return "needs a GPU: Triton kernels do not run on a CPU"
    return ""


def bench_loss(shape: Shape, *, repeats: int, each_alone: bool = False) -> tuple[list[Measured], list[Target]]:
    """Measure all variants: memory and error of each in its own process, times in turn in this one.

    On a CPU the figure `cpu` is processor seconds. Raises UserError if a variant computes something else.

    Args:
        shape: the problem's size.
        repeats: timed runs of each variant.
        each_alone: time one run in the variant's own process instead, where this one cannot hold them all.
    """
    notes = {variant: missing(variant, shape) for variant in VARIANTS}
    found = {w: alone("benchmarks.loss:measure", variant=w, shape=asdict(shape)) for w in VARIANTS if not notes[w]}
    notes |= {variant: OUT_OF_MEMORY for variant, figures in found.items() if figures is None}
    good = {variant: figures for variant, figures in found.items() if figures is not None}
    for variant, figures in good.items():
        if not figures["error"] < (0.1 if shape.dtype == "bfloat16" else 1e-3):
            raise UserError(f"{variant}: is {figures['error']:.2g} away from float64; it computes something else")
    if each_alone:
        measured = [Measured(w, [good[w]["seconds"]] if w in good else [], note=notes[w]) for w in VARIANTS]
        for one in measured:
            one.figures = {"cpu": good[one.name]["cpu"]} if one.name in good else {}
    else:
        problem = Problem.of(shape)
        runs = [Variant(w, functools.partial(_timed, w, problem) if w in good else None, notes[w]) for w in VARIANTS]
        measured = compare(runs, baseline=OURS, repeats=repeats, memory=False)
    add_ratios(measured, OURS)
    for one in measured:
        if one.name in good:
            one.peak_bytes = good[one.name]["peak_bytes"]
            one.figures |= _errors(good[one.name])
        if shape.device != "cpu":
            one.figures.pop("cpu", None)
    return measured, _targets({one.name: one for one in measured}, shape)


def _errors(found: dict[str, Any]) -> dict[str, float]:
    parts = found["parts"].items()
    figures = {f"{kind}, {name}": each[i] for name, each in parts for i, kind in enumerate(("value", "gradient"))}
    if parts:
        figures[OVER] = max(each[1] / max(each[2], ERROR_LIMIT) for name, each in parts if name != CE)
    return {"error": found["error"], **figures}


def _timed(variant: str, problem: Problem) -> dict[str, float]:
    before = time.process_time()
    run(variant, problem)
    return {"cpu": time.process_time() - before}


def _targets(measured: dict[str, Measured], shape: Shape) -> list[Target]:
    mine, targets = measured[OURS], []
    if shape.dtype == "float32" and "error" in mine.figures:
        targets.append(Target("error to float64", mine.figures["error"], ERROR_LIMIT, "{:.1e}"))
        targets += [Target(name, mine.figures[name], ERROR_LIMIT, "{:.1e}") for name in mine.figures if name in HELD]
        if OVER in mine.figures:
            targets.append(Target(OVER, mine.figures[OVER], OVER_LIMIT))
    large = (shape.tokens, shape.vocab, shape.hidden) == (FULL.tokens, FULL.vocab, FULL.hidden)
    if large and mine.peak_bytes is not None:
        targets.append(Target("peak extra memory, GB", mine.peak_bytes / 1e9, MEMORY_LIMIT / 1e9, "{:.2f}"))
    for other in (measured[CHUNKED], measured[TRITON]):
        if other.median and mine.median:
            # Other work on the machine changes the processor's seconds less than the time that passes.
            cpu = mine.figures["cpu"] / other.figures["cpu"] if "cpu" in mine.figures else None
            targets.append(Target(f"time, of {other.name}", cpu or mine.median / other.median, 1.0))
        if other.peak_bytes and mine.peak_bytes is not None:
            targets.append(Target(f"memory, of {other.name}", mine.peak_bytes / other.peak_bytes, 1.0))
    return targets
