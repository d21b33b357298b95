"""Weights are what they claim to be: every file of tensors is read here, and every loaded model is held to its file.

Refused: pickles, files that are no safetensors or cut off, tensors that are missing, left over, of another shape, or
not finite. Values are read once more for that, at the speed of memory.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_json, what_it_is
from ema_scale.core.model_config import check_config_file
from ema_scale.core.uri import locate

if TYPE_CHECKING:
    import torch

    from ema_scale.config.sections import ModelRecipe

log = logging.getLogger(__name__)
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOADED = ["*.safetensors", "*.json"]
_SHOWN = 3
_LONGEST_PATTERN = 2000


def folder_of(reference: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The folder of a path, `smallworld:...` or hub id (its snapshot; None: in the hub's usual cache).

    Raises UserError for what is neither a folder nor on the hub.
    """
    path = Path(locate(reference)).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reference):
        raise UserError(f"{reference}: no such folder; expected a folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(reference, revision=revision, cache_dir=cache, allow_patterns=_DOWNLOADED)
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{reference}: no such folder, and the hub did not give it: {reason}") from None
    return Path(found)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """safetensors' handle of a file. Raises UserError for a file that is missing, cut off or something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected tensors in safetensors")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{path}: {_instead(path, error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _instead(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(200)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "a pickle (torch.save), which may run code; expected tensors in safetensors"
    if known := what_it_is(start):
        return f"{known}; expected tensors in safetensors"
    return f"not a safetensors file, or not a whole one ({error}); copy or download it again"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU. Raises UserError as `open_tensors` and `check_finite` do."""
    with open_tensors(path) as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    check_finite(tensors.items(), str(path))
    return tensors


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raises UserError, naming `where`, for a tensor that holds NaN or infinity. Of sharded ones, this rank's part."""
    import torch

    for name, tensor in tensors:
        values = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3 keeps its part there
        values = values.to_local() if hasattr(values, "to_local") else values
        if values.is_meta or not values.is_floating_point() or values.dtype.itemsize < 2:
            continue
        # A sum needs no memory, and is not finite if a number is not; a sum may overflow, so both are asked.
        with torch.no_grad():
            if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
                raise UserError(
                    f"{where}: {name} holds numbers that are not finite (NaN or infinity); the file is damaged, or "
                    "its training diverged"
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's folder, as its index names them.

    Raises UserError if there are none, a shard is missing, or an index leads out of the folder.
    """
    index, whole = folder / _INDEX, folder / _WEIGHTS
    if index.is_file():
        found = read_json(index)
        names = found.get("weight_map") if isinstance(found, Mapping) else None
        if not isinstance(names, Mapping) or not names or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index}: found no weight_map; expected tensor names, each with its file")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise UserError(f"{file}: no such file; {index.name} asks for it: copy or download it again")
        return files
    if whole.is_file():
        return [whole]
    raise UserError(f"{folder}: no {_WEIGHTS} in there{_pickles_in(folder)}")


def _pickles_in(folder: Path) -> str:
    found = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not found:
        return "; expected weights in safetensors"
    return (
        f", only {found[0]}: pickles may run code and are not loaded; save the weights as safetensors "
        "(model.save_pretrained)"
    )


def check_headers(folder: Path) -> None:
    """Raises UserError unless a checkpoint's files are there and whole, and its config has sizes that a model has."""
    try:
        check_config_file(folder)
        for file in weight_files(folder):
            with open_tensors(file):
                pass  # safetensors compares the header with the file's size
    except UserError as error:
        raise UserError(f"model.path: {error}") from None


def refuse_unfit(
    where: str,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    misshapen: Collection[tuple[str, Any, Any]] = (),
) -> None:
    """Raises UserError if the tensors of a file are not those of the model. misshapen: (name, in the file, in the
    model)."""
    problems = [
        f"{_some(missing)} missing" if missing else "",
        f"{_some(unexpected)} of no use in this model" if unexpected else "",
        *(f"{name} has the shape {_shape(found)}, expected {_shape(wanted)}" for name, found, wanted in misshapen),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{where}: not the weights of this model: {'; '.join(problems[:_SHOWN])}{more}. Copy or download it again, "
            "or name the checkpoint that it belongs to"
        )


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more} {'is' if len(names) == 1 else 'are'}"


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "()"


def refuse_info(where: str, info: Mapping[str, Any]) -> None:
    """Raises UserError for what transformers' loading_info says does not fit."""
    refuse_unfit(where, info["missing_keys"], info["unexpected_keys"], [tuple(m) for m in info["mismatched_keys"]])


def check_checkpoint(model: ModelRecipe, cache: str | None = None) -> None:
    """Hold a checkpoint's files to its config, for engines that load it themselves. The model is not built.

    cache: where checkpoints of the hub lie; None: in the hub's usual cache.

    Raises UserError for weights that are not what they claim to be.
    """
    folder = folder_of(model.path, model.revision, cache)
    _check_checkpoint(folder, model.trust_remote_code, _mark(folder))


def _mark(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


@lru_cache(maxsize=16)
def _check_checkpoint(folder: Path, trust_remote_code: bool, mark: object) -> None:
    check_config_file(folder)
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with open_tensors(file) as handle:
            tensors = [(name, handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118 - mapped, not read
            check_finite(tensors, str(file))
            stored |= {name: tensor.to("meta") for name, tensor in tensors}
    if not _hold_to_config(folder, stored, trust_remote_code):
        log.info("%s: names and shapes of its tensors are left to vLLM", folder)


def check_names(model: ModelRecipe) -> None:
    """Hold names and shapes of a checkpoint's tensors to its config; only the files' headers are read.

    For ZeRO-3: there transformers does not say which tensors it had no use for. Raises UserError as `check_checkpoint`.
    """
    import torch

    folder = folder_of(model.path, model.revision)
    stored = {}
    for file in weight_files(folder):
        with open_tensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                stored[name] = torch.empty(handle.get_slice(name).get_shape(), device="meta")
    with _without_zero3():
        _hold_to_config(folder, stored, model.trust_remote_code)


def _hold_to_config(folder: Path, stored: Mapping[str, torch.Tensor], trust_remote_code: bool) -> bool:
    """Raises UserError unless these tensors are those of the model that the config describes; False for a model that
    only its own engine can build."""
    skeleton = skeleton_of(str(folder), trust_remote_code=trust_remote_code)
    if skeleton is None or getattr(skeleton.config, "quantization_config", None) is not None:
        return False
    _, info = type(skeleton).from_pretrained(
        None, config=skeleton.config, state_dict=dict(stored), device_map="meta", output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    refuse_info(str(folder), info)
    return True


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """A model that is made meanwhile is not sharded."""
    from transformers.integrations import deepspeed

    active = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = active


def skeleton_of(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The causal LM of a checkpoint's config without weights (on the meta device); None for one that transformers does
    not know."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError):
        return None


def adapter_files(reference: str) -> Path:
    """An adapter's folder with its config and weights. Raises UserError if they are not there, or are a pickle."""
    folder = folder_of(reference)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: not a PEFT adapter: found no {' and no '.join(missing)}{_pickles_in(folder)}")
    return folder


def is_quick(pattern: str) -> bool:
    """Whether a regular expression takes no exponential time: no repetition stands within an unbounded one, and no
    choice."""
    parser: Any = re._parser  # type: ignore[attr-defined]

    def nested(items: Any, inside: bool) -> bool:
        for kind, value in items:
            name = str(kind)
            repeats = name in ("MAX_REPEAT", "MIN_REPEAT")
            if inside and (name == "BRANCH" or (repeats and value[0] != value[1])):
                return True
            if repeats and nested(value[2], inside or value[1] is parser.MAXREPEAT):
                return True
            if name == "BRANCH" and any(nested(one, inside) for one in value[1]):
                return True
            if name == "SUBPATTERN" and nested(value[3], inside):
                return True
        return False

    try:
        return len(pattern) <= _LONGEST_PATTERN and not nested(parser.parse(pattern), False)
    except (re.error, RecursionError, OverflowError):
        return False


def check_adapter(reference: str, base: Any) -> Path:
    """Hold an adapter's file to its config and to the model that it is for; returns its folder.

    base: the causal LM, or its skeleton. None: only the file itself is looked at.

    Raises UserError for weights that are not what they claim to be, and for an adapter of another model.
    """
    import peft
    import torch

    folder = adapter_files(reference)
    file = folder / ADAPTER_WEIGHTS
    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(file).items()}
    config_file = folder / ADAPTER_CONFIG
    values = read_json(config_file)
    if not isinstance(values, Mapping):
        raise UserError(f"{config_file}: expected a PEFT config, a JSON object")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(values.get(name), str) and not is_quick(values[name]):
            raise UserError(f"{config_file}: {name}: found {values[name]!r:.80}, a pattern that may take for ever")
    if base is None:
        return folder
    with torch.device("meta"):
        skeleton = type(base)(base.config)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if hasattr(config, "init_lora_weights"):  # some ways to begin read the base's weights, and there are none here
            config.init_lora_weights = True
        with warnings.catch_warnings(action="ignore"):  # about names that are given to this copy of the config
            adapted: Any = peft.get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"adapter {folder}: not an adapter of this model; {reason}") from None
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    both = sorted(wanted.keys() & found.keys())
    misshapen = [(name, found[name], wanted[name]) for name in both if found[name] != wanted[name]]
    refuse_unfit(str(file), wanted.keys() - found.keys(), found.keys() - wanted.keys(), misshapen)
    return folder
