"""What a running server says of the models that it serves: whether a name is the model that it is taken for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import folder_identity
from ema_scale.inference.chat_client import CallError, ChatClient

log = logging.getLogger(__name__)

_STARTED = re.compile(r"^process_start_time_seconds(?:\{[^}]*\})? ([0-9.e+]+)$", re.M)


async def check_served(client: ChatClient, base: str, model: str, adapters: Mapping[str, str]) -> dict[str, Any]:
    """What the server says of these models, {name: {"root", "parent"}}; {} if it says nothing.

    vLLM and SGLang name the folder (`root`) that a model was loaded from, and the base (`parent`) of an adapter.

    Raises UserError if the server does not serve a name, serves the base model or another folder's weights in place of
    an adapter, or another model in place of the base. Warns where the server does not say which weights it serves, and
    where an adapter was written after the server started.

    Args:
        client: of the server.
        base: the base model's name there.
        model: the base model's folder or hub id here.
        adapters: folder here -> name there.
    """
    try:
        entries = {entry["id"]: entry for entry in await client.models()}
    except CallError as error:
        log.warning("evaluation.endpoint: the server does not list its models (%s): their names are trusted", error)
        return {}
    wanted = [base, *adapters.values()]
    if missing := [name for name in wanted if name not in entries]:
        there = ", ".join(map(repr, sorted(entries))) or "nothing"
        raise UserError(f"evaluation.endpoint: the server does not serve {missing[0]!r}; it serves {there}")
    known = {name: {k: entries[name].get(k) for k in ("root", "parent")} for name in wanted}
    root = known[base]["root"]
    if isinstance(root, str) and root != model and _differ(root, model):
        raise UserError(f"evaluation.endpoint: {base!r} is {root} at the server; expected {model}")
    unknown = []
    for folder, name in adapters.items():
        root, parent = known[name]["root"], known[name]["parent"]
        if root is not None and root == known[base]["root"] and parent is None:
            raise UserError(f"evaluation.endpoint: {name!r} is the base model at the server, not an adapter")
        if not isinstance(root, str):
            unknown.append(name)
        elif _differ(root, folder):
            raise UserError(
                f"evaluation.endpoint: {name!r} was loaded from {root}, whose weights differ from those in {folder}"
            )
    if unknown:
        log.warning(
            "evaluation.endpoint: the server does not say which weights it serves as %s: the names are trusted",
            ", ".join(unknown),
        )
    await _warn_of_newer(client, adapters)
    return known


def _differ(root: str, folder: str) -> bool:
    """Whether both are folders here, and hold different files. What lies elsewhere cannot be compared."""
    if not (Path(root).is_dir() and Path(folder).is_dir()):
        return False
    return Path(root).resolve() != Path(folder).resolve() and folder_identity(root) != folder_identity(folder)


async def _warn_of_newer(client: ChatClient, adapters: Mapping[str, str]) -> None:
    """Weights written after the server started may not be those that it loaded under that name."""
    started = _STARTED.search(await client.metrics()) if adapters else None
    for folder, name in adapters.items():
        weights = Path(folder) / "adapter_model.safetensors"
        if started and weights.is_file() and weights.stat().st_mtime > float(started[1]):
            log.warning(
                "evaluation.endpoint: %s was written after the server started; unless the server has loaded %r since "
                "then, it serves older weights",
                weights,
                name,
            )
