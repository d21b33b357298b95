"""What SafeLoRA reads and writes: adapter folders, and single matrices of safetensors checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.disk import copy_regular
from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json
from ema_scale.core.hashing import sampled_sha256
from ema_scale.core.io import atomic_path, atomic_write_json, made_before
from ema_scale.models.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_files,
    check_finite,
    folder_of,
    open_tensors,
    read_tensors,
    weight_files,
)

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG, REPORT = ADAPTER_WEIGHTS, ADAPTER_CONFIG, "safelora.json"
PREFIX = "base_model.model."
_TIED = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Files that are copied with an adapter. Its folder may also hold a trainer's optimizer states and pickles.
_CARRIED = {".json", ".jinja", ".txt", ".model", ".md"}


def identity(folder: Path) -> str:
    """Identifies a checkpoint's weights: the commit of a hub snapshot, else a digest of the weight files."""
    if folder.parent.name == "snapshots":
        return folder.name
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(json.dumps([[f.name, sampled_sha256(f)] for f in files]).encode()).hexdigest()


def same_models(base: object, aligned: object, kind: str = "safelora") -> str:
    """The message for two models between which there is no subspace."""
    return (
        f"{kind}: {base} and {aligned} have the same weights in every adapted matrix, so there is nothing to project "
        "on; expected the model before alignment and the aligned one"
    )


class Adapter:
    """A PEFT LoRA adapter folder.

    config: adapter_config.json.
    tensors: name -> tensor as stored. What has no A and B (biases, modules_to_save, trained tokens) stays as it is.
    pairs: module -> names of its A and B.

    Raises UserError for what SafeLoRA's formula does not describe: DoRA, adapted embeddings or experts, replicated
    layers, and initialisations that also change the base's weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = adapter_files(str(folder))
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self._check_kind()
        self.tensors: dict[str, torch.Tensor] = read_tensors(folder / WEIGHTS)
        self.pairs = dict(sorted(self._find_pairs(), key=lambda pair: _natural(pair[0])))
        if not self.pairs:
            raise UserError(f"{folder / WEIGHTS}: found no lora_A and lora_B")

    def _check_kind(self) -> None:
        found = self.config.get("peft_type")
        if found != "LORA":
            raise UserError(f"{self.folder / CONFIG}: peft_type: found {found}, expected LORA")
        for name in ("use_dora", "layer_replication", "target_parameters", "use_qalora", "use_bdlora"):
            if self.config.get(name):
                raise UserError(f"{self.folder / CONFIG}: found {name}, expected a plain LoRA adapter")
        start = str(self.config.get("init_lora_weights")).lower()
        if start.startswith(_RESIDUAL):
            raise UserError(
                f"{self.folder / CONFIG}: init_lora_weights: found {start}, which also changes the base's weights; "
                "save the adapter with PEFT's path_initial_model_for_weight_conversion first"
            )

    def _find_pairs(self) -> Iterator[tuple[str, tuple[str, str]]]:
        for name, tensor in self.tensors.items():
            if ".lora_" not in name or name.endswith(".lora_B.bias"):
                continue
            other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
            if not name.endswith((".lora_A.weight", ".lora_B.weight")) or tensor.ndim != 2:
                raise UserError(f"{self.folder / WEIGHTS}: {name} {tuple(tensor.shape)} is not part of a plain LoRA")
            if other not in self.tensors:
                raise UserError(f"{self.folder / WEIGHTS}: {name} without {other}")
            if ".lora_B." in name:
                yield name.removeprefix(PREFIX).partition(".lora_")[0], (other, name)

    def write(self, out: Path | None, report: dict[str, Any]) -> None:
        """Write weights and report into a new folder `out`, or into this one. Complete or not at all."""
        if out is None:
            with atomic_path(self.folder / WEIGHTS) as temporary:
                self._save(temporary)
            atomic_write_json(self.folder / REPORT, report)
            return
        with atomic_path(out) as temporary:
            temporary.mkdir()
            for file in self.folder.iterdir():
                if file.is_file() and file.suffix in _CARRIED:
                    copy_regular(file, temporary / file.name)
            self._save(temporary / WEIGHTS)
            atomic_write_json(temporary / REPORT, report)

    def _save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.tensors, path, metadata={"format": "pt"})
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())


def finished(out: Path, made_from: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The report of a projection in `out`; None if there is no such folder, or an empty one.

    Raises UserError if it holds anything else, or a projection that was not made from `made_from`, where that is given.
    """
    taken = UserError(f"{out}: exists already, with other contents; expected a new folder to write to")
    return made_before(out, REPORT, made_from, taken)


class Checkpoint:
    """Reads single matrices of a safetensors checkpoint, sharded or not, by module name."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with open_tensors(file) as handle:
                self._files |= dict.fromkeys(handle.keys(), file)
        self._folder = folder

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape of a module's `.weight`, without reading it. Raises UserError as `weight` does."""
        name = self._stored_name(module)
        with open_tensors(self._files[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def weight(self, module: str) -> torch.Tensor:
        """The `.weight` of a module, as stored.

        Raises UserError if there is no such weight, it is quantised, or it is not finite.
        """
        name = self._stored_name(module)
        with open_tensors(self._files[name]) as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UserError(f"{self._folder}: {name} is {tensor.dtype}; expected weights that are not quantised")
        check_finite([(name, tensor)], str(self._files[name]))
        return tensor

    def _stored_name(self, module: str) -> str:
        """The name under which a checkpoint stores a module's weight.

        Checkpoints may leave out the backbone's prefix (GPT-2), have one more, or tie the head to the embeddings.
        """
        tail = module.partition(".")[2]
        for name in (f"{module}.weight", f"{tail}.weight"):
            if name in self._files:
                return name
        longer = [name for name in self._files if tail and name.endswith(f".{tail}.weight")]
        if "." not in module:
            longer = [name for name in self._files if f".{name}".endswith(tuple(f".{tied}" for tied in _TIED))]
        if len(longer) == 1:
            return longer[0]
        raise UserError(f"{self._folder}: no weight for the adapted module {module}")


def aligned_pair(kind: str, model: Any, base: str, revision: str | None) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoints of the unaligned base and of the model that is fine-tuned.

    Raises UserError, in the name of the defense `kind`, for a base that is missing, of another model, or the aligned
    one.
    """
    before = Checkpoint(folder_of(base, revision))
    name = model.get_base_model().config._name_or_path
    if not name:
        raise UserError(f"{kind}: the model was not loaded from a checkpoint, whose weights it reads")
    aligned = Checkpoint(folder_of(name, model.active_peft_config.revision))
    adapted = [n.removeprefix(PREFIX) for n, module in model.named_modules() if getattr(module, "lora_A", None)]
    for module in adapted:
        found, expected = (one.shape(module) for one in (before, aligned))
        if found != expected:
            raise UserError(
                f"{kind}: base {base}: {module} has the shape {found}, and {expected} in {name}; expected the model "
                "that it was made from"
            )
    # The first pair nearly always differs, so little is read.
    if all(bool((before.weight(module) == aligned.weight(module)).all()) for module in adapted):
        raise UserError(same_models(base, name, kind))
    return before, aligned


def _natural(name: str) -> list[tuple[int, str]]:
    # layers.2 before layers.10; also the order in which a checkpoint's shards are laid out.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
