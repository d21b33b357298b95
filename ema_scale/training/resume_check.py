"""Whether a run folder holds the training that a recipe describes: the same weights, data and rows per step.

It reads files alone, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_scale.core.errors import UserError
from ema_scale.core.files import read_text
from ema_scale.core.hashing import digest, file_sha256, folder_identity
from ema_scale.core.io import atomic_write_text
from ema_scale.core.records import Provenance
from ema_scale.core.run_dir import RunDir
from ema_scale.core.uri import locate
from ema_scale.training.distributed import launched_processes

if TYPE_CHECKING:
    from ema_scale.recipe import Recipe

# What can change in a recipe, and in its section `training`, without making it another training.
_NOT_TRAINING = ("name", "output", "evaluation", "reference", "reference_runs")
_NOT_TRAJECTORY = (
    "logging_steps", "save_steps", "save_total_limit", "report_to", "drift_every", "deepspeed", "fsdp",
    "gradient_checkpointing", "activation_offload",
    "per_device_train_batch_size", "gradient_accumulation_steps",  # these two count as rows per step
)  # fmt: skip
_SHOWN = 10  # runs or fields that a message lists


class ExistingRun:
    """What a run folder holds, compared with the recipe to be trained into it."""

    def __init__(self, recipe: Recipe, run_dir: RunDir) -> None:
        self.recipe, self.run_dir = recipe, run_dir

    @cached_property
    def differences(self) -> list[str]:
        """Fields and files in which the folder's training differs from the recipe, in words.

        [] if nothing differs, or nothing has been trained there. Files and checkpoints are compared by the hashes in
        the run's provenance, and are read only if their size or date has changed. What comes from the hub is left to
        the loader.
        """
        if not _is_begun(self.run_dir):
            return []
        stored = _stored_recipe(self.run_dir) or {"training": {}}
        provenance = _provenance(self.run_dir)
        fields = [
            f"{name} was {_short(old)}, is {_short(new)}"
            for name, old, new in _changed(_training_part(stored), _training_part(self.recipe.to_dict()))
            if not _is_moved(provenance, old, new)
        ]
        return [*fields, *_changed_files(provenance)]

    @cached_property
    def finished(self) -> bool:
        """Whether the folder holds a finished run of the same training on the same data.

        Raises UserError if its adapter is missing or of another size than when it finished.
        """
        if not _has_ended(self.run_dir) or self.differences:
            return False
        self.run_dir.check_adapter(whole=False)
        same_rows = rows_per_step(self.recipe.to_dict(), launched_processes()) == _stored_rows_per_step(self.run_dir)
        # The same text means the same run, on whatever number of processes it is looked at.
        stored = _stored_recipe(self.run_dir) or {}
        return same_rows or stored.get("training") == self.recipe.to_dict()["training"]

    def check_same_training(self, processes: int) -> None:
        """Raises UserError if the folder holds another training, or one of other data or another global batch size.

        processes: how many would resume it.
        """
        path = self.run_dir.path
        if self.differences:
            raise UserError(
                f"{path}: holds a run of another recipe or other data ({_first_of(self.differences)}); choose another "
                "name or output, delete the folder, or pass --no-resume to start over"
            )
        rows = rows_per_step(self.recipe.to_dict(), processes)
        if _is_begun(self.run_dir) and rows != _stored_rows_per_step(self.run_dir):
            raise UserError(
                f"{path}: this run takes {_stored_rows_per_step(self.run_dir)} rows per step, and "
                f"per_device_train_batch_size x gradient_accumulation_steps x processes is now {rows}; make it the "
                "same, or pass --no-resume to start over"
            )


def is_finished(recipe: Recipe, run_dir: RunDir) -> bool:
    """Whether the folder holds a finished run of the same training on the same data."""
    return ExistingRun(recipe, run_dir).finished


def check_same_training_of_runs(recipes: Sequence[Recipe], processes: int, what: str) -> None:
    """`ExistingRun.check_same_training` for runs that are compared with one another, before any of them is changed.

    processes: of each run that is still to be trained. The rows per step of finished runs matter only if there is one.
    what: the runs together, such as `study demo`.

    Raises UserError naming the runs and what differs.
    """
    runs = [(recipe, RunDir(recipe.run_path)) for recipe in recipes]
    existing = {recipe.name: ExistingRun(recipe, run) for recipe, run in runs}
    changed = {name: _first_of(run.differences) for name, run in existing.items() if run.differences}
    if changed:
        raise UserError(
            f"{what}: {len(changed)} of its {len(runs)} runs exist already, with another recipe or other data:\n"
            f"{_lines(changed)}\nNothing was done. Choose another name or output, undo the change, or delete these "
            f"folders to train them again (they are below {runs[0][1].path.parent})"
        )
    if all(_has_ended(run) for _, run in runs):
        return
    rows = {
        recipe.name: f"{_stored_rows_per_step(run)} rows per step, now {now}"
        for recipe, run in runs
        if _is_begun(run) and (now := rows_per_step(recipe.to_dict(), processes)) != _stored_rows_per_step(run)
    }
    if rows:
        raise UserError(
            f"{what}: {len(rows)} of its {len(runs)} runs used a different global batch size "
            f"(training.per_device_train_batch_size x gradient_accumulation_steps x processes):\n{_lines(rows)}\n"
            "Nothing was done. Use as many processes as before (--nodes, --gpus-per-node, --processes-per-node), or "
            "change training.gradient_accumulation_steps or training.per_device_train_batch_size to match"
        )


def weights_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Local checkpoints that a run starts from or is compared with: source -> identity, and a mark of sizes and dates.

    While the mark stays the same, so does the identity.
    """
    sources = [recipe.model.path, recipe.adapter.start]
    if not isinstance(recipe.reference, str):
        sources.append(recipe.reference.model)
    marks = {s: (path, _folder_mark(path)) for s in sources if s and (path := Path(locate(s))).is_dir()}
    return {s: {"identity": _folder_identity(path, mark), "mark": mark} for s, (path, mark) in marks.items()}


def check_same_data(hashes: Mapping[str, str], run_dir: RunDir) -> None:
    """Raises UserError if rows or files (source -> sha256) have changed since the folder's run began."""
    stored = _provenance(run_dir).data_sha256
    for source, sha256 in hashes.items():
        if stored.get(source, sha256) != sha256:
            raise UserError(
                f"{run_dir.path}: {source} has changed since this run began; restore it, choose another name or "
                "output, or pass --no-resume to start over"
            )


def file_marks(sources: Iterable[str]) -> dict[str, list[int]]:
    """Size and date (ns) of those sources that are files. While they stay the same, so does the hash."""
    return {s: _mark(path) for s in sources if (path := _file(s)) is not None}


def renew_recipe(recipe: Recipe, run_dir: RunDir) -> None:
    """Write how a finished run is to be evaluated now into its folder."""
    if read_text(run_dir.recipe_path) != recipe.to_yaml():
        atomic_write_text(run_dir.recipe_path, recipe.to_yaml())


def rows_per_step(recipe: Mapping[str, Any], processes: int) -> int:
    """Rows of one optimizer step over all processes."""
    training = recipe["training"]
    return int(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * processes)


def _stored_rows_per_step(run_dir: RunDir) -> int:
    return rows_per_step(_stored_recipe(run_dir) or {}, run_dir.status().processes or 1)


def _has_ended(run_dir: RunDir) -> bool:
    files = (run_dir.adapter / "adapter_config.json", run_dir.recipe_path)
    return run_dir.status().state == "finished" and all(path.exists() for path in files)


def _is_begun(run_dir: RunDir) -> bool:
    trained = run_dir.adapter.is_dir() or next(run_dir.checkpoints.glob("checkpoint-*"), None) is not None
    return trained and run_dir.recipe_path.exists()


def _training_part(recipe: Mapping[str, Any]) -> dict[str, Any]:
    part = {k: v for k, v in recipe.items() if k not in _NOT_TRAINING}
    if isinstance(recipe.get("reference"), dict):  # another model, not only another way to run the same one
        part["reference"] = recipe["reference"]
    part["training"] = {k: v for k, v in recipe["training"].items() if k not in _NOT_TRAJECTORY}
    return part


def _stored_recipe(run_dir: RunDir) -> dict[str, Any] | None:
    path = run_dir.recipe_path
    return _read_recipe(path, *_mark(path)) if path.exists() else None


@lru_cache(maxsize=4096)
def _read_recipe(path: Path, size: int, date: int) -> dict[str, Any]:
    from ema_scale.recipe import load_recipe

    return load_recipe(path).to_dict()


def _changed(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old, new) of each field that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("kind") == new.get("kind"):
        for key in dict.fromkeys([*old, *new]):
            yield from _changed(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _changed(*pair, f"{name}.{i}")
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_moved(provenance: Provenance, old: Any, new: Any) -> bool:
    """Whether `new` is the path of a file or checkpoint whose content is that of `old` when the run began."""
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    path = Path(new)
    if old in provenance.weights and path.is_dir():
        return _folder_identity(path, _folder_mark(path)) == provenance.weights[old].get("identity")
    sha256 = provenance.data_sha256.get(old)
    return sha256 is not None and path.is_file() and _sha256(path, *_mark(path)) == sha256


def _changed_files(provenance: Provenance) -> Iterator[str]:
    for source, stored in provenance.weights.items():
        folder = Path(locate(source))
        if folder.is_dir() and (mark := _folder_mark(folder)) != stored["mark"]:
            if _folder_identity(folder, mark) != stored["identity"]:
                yield f"the checkpoint {source} has changed"
    marks = provenance.data_files
    for source, sha256 in provenance.data_sha256.items():
        path = _file(source)
        # A missing file is an error of the loader; a finished run does not need it any more.
        if path is None or _mark(path) == marks.get(source):
            continue
        if _sha256(path, *_mark(path)) != sha256:
            yield f"{source} has changed"


def _provenance(run_dir: RunDir) -> Provenance:
    try:
        return run_dir.provenance() or Provenance()
    except UserError:
        return Provenance()


def _file(source: str) -> Path | None:
    path = Path(locate(source))
    return path if path.is_file() else None


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _folder_mark(folder: Path) -> str:
    return digest([(file.name, *_mark(file)) for file in sorted(folder.iterdir()) if file.is_file()])


@lru_cache(maxsize=256)
def _folder_identity(folder: Path, mark: str) -> str:
    return folder_identity(str(folder))


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, date: int) -> str:
    return file_sha256(path)  # many runs of a study read the same file


def _first_of(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return ", ".join([*texts[:_SHOWN], *more])


def _lines(texts: Mapping[str, str]) -> str:
    lines = [f"  {name}: {text}" for name, text in texts.items()]
    return "\n".join(lines[:_SHOWN] + ([f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))
