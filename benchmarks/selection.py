"""How fast `ema select` reads rows, against the released procedure: one row and one adapter at a time, all logits.

A ranking for one of D domains uses the adapters of the others. The released procedure (arXiv 2508.06249) reads each
row D times per ranking, so D * D times. `ema select` keeps every likelihood and reads a row D + 1 times. Both are
measured, and also the released loop with each likelihood read once.

All variants read the same rows with the same weights in one process, and must agree before anything is timed. The
adapters are random: their weights do not change the time. Two more say what could be won: every row once per adapter in
one batch, by PEFT's mixed batches, which leaves the likelihoods out; and the matrix products of all readings alone.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Measured, Target, Variant, compare
from ema_scale.config.sections import AdapterRecipe, ModelRecipe
from ema_scale.core.batching import batch_by_length
from ema_scale.core.errors import UserError
from ema_scale.core.uri import locate
from ema_scale.data.rows import load_rows
from ema_scale.models.layout import ModelLayout
from ema_scale.models.load import load_base
from ema_scale.models.lora import lora_config
from ema_scale.selection.scoring_models import (
    ALIGNED,
    BATCH_TOKENS,
    SCORES,
    EncodedRow,
    ScoringModels,
    read_items,
    score,
)

ANEW = "one row, one adapter, all logits; for each domain anew"
NAIVE, UNBATCHED, OURS = "the same, each likelihood once", "ema select, one row a batch", "ema select"
MIXED, PRODUCTS = "PEFT's mixed batches, without likelihoods", "the matrix products of `ema select` alone"
TOLERANCE = 1e-3  # nats a token: the same sums in another order, in float32
LIMIT = 1 / 8


def bench_selection(
    model: str, source: str, *, rows: int, domains: int, repeats: int, batch_tokens: int | None = None
) -> tuple[list[Measured], list[Target]]:
    """Time four variants of reading the first `rows` rows of `source` to rank them for each of `domains` domains.

    `ema select` writes its scores to a file, as the command does. Figures: `readings` per row; `cpu_ms`, processor
    milliseconds per row, which other load disturbs less than elapsed time. Raises UserError if variants disagree.
    """
    recipe = ModelRecipe(path=model, dtype="float32")
    with tempfile.TemporaryDirectory(prefix="ema-bench-") as made:
        readers = ScoringModels(recipe, random_adapters(recipe, domains, Path(made)))
        items, _ = read_items(load_rows(locate(source), limit=rows, on_bad="drop"), readers.encoder, readers.max_length)
        names = list(readers.identities)

        def anew() -> None:
            for left_out in names[1:]:
                naive(readers, items, [name for name in names if name != left_out])

        def ours(tokens: int | None) -> dict[str, list[float]]:
            with tempfile.TemporaryDirectory(dir=made) as folder:
                return score(readers, items, Path(folder) / SCORES, batch_tokens=tokens)

        def timed(read: Callable[[], object], readings: int) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                start = time.process_time()
                read()
                return {"readings": readings, "cpu_ms": 1000 * (time.process_time() - start) / len(items)}

            return run

        _check(ours(batch_tokens), naive(readers, items[:20], names))
        variants = [
            Variant(ANEW, timed(anew, domains * domains)),
            Variant(NAIVE, timed(lambda: naive(readers, items, names), domains + 1)),
            Variant(UNBATCHED, timed(lambda: ours(1), domains + 1)),
            Variant(OURS, timed(lambda: ours(batch_tokens), domains + 1)),
            Variant(MIXED, timed(lambda: mixed(readers, items, batch_tokens), domains + 1)),
            Variant(PRODUCTS, timed(lambda: products(readers, items, batch_tokens), domains + 1)),
        ]
        measured = compare(variants, baseline=ANEW, repeats=repeats)
    took = {one.name: one.median for one in measured}
    mine = took[OURS]
    targets = [
        Target(f"time, of: {variant}", mine / theirs if mine and theirs else None, LIMIT, "{:.3f}x")
        for variant, theirs in list(took.items())[:2]
    ]
    return measured, targets


@torch.no_grad()
def naive(readers: ScoringModels, items: Sequence[EncodedRow], names: Sequence[str]) -> dict[str, list[float]]:
    """Model -> mean negative log-likelihood of each item, by a loop over transformers' own loss."""
    found: dict[str, list[float]] = {}
    for name in names:
        with _reading(readers.model, name):
            found[name] = []
            for item in items:
                labels = [token if said else -100 for token, said in zip(item.ids, item.answered, strict=True)]
                ids, wanted = (torch.tensor([part], device=readers.device) for part in (item.ids, labels))
                found[name].append(float(readers.model(input_ids=ids, labels=wanted).loss))
    return found


@torch.inference_mode()
def mixed(readers: ScoringModels, items: Sequence[EncodedRow], batch_tokens: int | None) -> None:
    """Every row once per reader in one forward pass."""
    names = ["__base__" if name == ALIGNED else name for name in readers.identities]
    limit = (batch_tokens or BATCH_TOKENS[readers.device.type]) // len(names)
    for batch in batch_by_length(items, lambda item: len(item.ids), limit):
        width = max(len(item.ids) for item in batch)
        ids = torch.tensor([item.ids + [0] * (width - len(item.ids)) for item in batch], device=readers.device)
        readers.model(
            input_ids=ids.repeat(len(names), 1),
            adapter_names=[name for name in names for _ in batch],
            use_cache=False,
            logits_to_keep=1,
        )


@torch.inference_mode()
def products(readers: ScoringModels, items: Sequence[EncodedRow], batch_tokens: int | None) -> None:
    """The products of all readings with the layers' and the head's matrices, of the tokens without padding."""
    layout = ModelLayout.of(readers.model, adapters=False)
    modules: list[Any] = [module for layer in layout.layers for module in layer.modules()]
    matrices: list[torch.Tensor] = [module.base_layer.weight for module in modules if hasattr(module, "base_layer")]
    head = layout.head().weight
    read, answered = sum(len(item.ids) for item in items), sum(sum(item.answered) for item in items)
    for _ in readers.identities:
        for tokens, weights in ((read, matrices), (answered, [head])):
            for part in torch.zeros(tokens, 0).split(batch_tokens or BATCH_TOKENS[readers.device.type]):
                for weight in weights:
                    torch.mm(weight.new_ones(len(part), weight.shape[1]), weight.t())


@contextlib.contextmanager
def _reading(model: Any, name: str) -> Iterator[None]:
    # PEFT's own switches, as in the released procedure.
    if name == ALIGNED:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def random_adapters(recipe: ModelRecipe, number: int, folder: Path) -> dict[str, str]:
    """Name -> folder of LoRA adapters of the default shape, with random weights."""
    from peft import get_peft_model

    base = load_base(recipe)
    torch.manual_seed(0)
    found = {}
    for name in (f"adapter{n}" for n in range(number)):
        wrapped = get_peft_model(base, lora_config(base, AdapterRecipe()))
        for key, weight in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.02)
        wrapped.save_pretrained(str(folder / name))
        found[name] = str(folder / name)
        base = wrapped.unload()
    return found


def _check(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    apart = max(abs(a - b) for name, values in theirs.items() for a, b in zip(values, ours[name], strict=False))
    if not apart < TOLERANCE:
        raise UserError(f"the variants differ by {apart:.2g} nats a token; expected less than {TOLERANCE}")
