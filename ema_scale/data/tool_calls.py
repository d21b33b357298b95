"""Tools and tool calls, in the field's spellings, turned into OpenAI's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ema_scale.data.values import BadRow, parsed, short, text_of


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Function schemas of a row: a list of them, of {"type": "function", "function": ...}, or either as JSON."""
    value = parsed(value)
    if value in (None, "", []):
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"tools: found {short(value)}, expected a list of functions")
    return tuple(_tool(tool, f"tools.{index}") for index, tool in enumerate(value))


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    tool = parsed(tool)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where}: found {short(tool)}, expected a function with a name")
    schema = checked(without_nulls(function), where)
    return {"type": "function", "function": {"description": "", "parameters": {}, **schema}}


def read_calls(turn: Mapping[str, Any], role: str, content: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn: OpenAI's `tool_calls` and `function_call`, ShareGPT's role `function_call`."""
    if role == "function_call":
        found = parsed(content)
        calls = found if isinstance(found, list) else [found]
    else:
        calls = parsed(turn.get("tool_calls")) or ([turn["function_call"]] if turn.get("function_call") else [])
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise BadRow(f"{where}.tool_calls: found {short(calls)}, expected a list")
    return [_call(call, f"{where}.tool_calls.{index}") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = parsed(call)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{where}: found {short(call)}, expected a function's name and arguments")
    given = function.get("arguments", function.get("parameters"))
    arguments = parsed(given) if given not in (None, "") else {}
    if not isinstance(arguments, Mapping):
        raise BadRow(f"{where}.arguments: found {short(given)}, expected an object")
    made = {
        "type": "function",
        "function": checked({"name": function["name"], "arguments": without_nulls(arguments)}, where),
    }
    return {**made, "id": call["id"]} if isinstance(call.get("id"), str) else made


def without_nulls(value: Any) -> Any:
    """Arrow fills the fields that other rows have with null; a schema or call that never had them does without."""
    if isinstance(value, Mapping):
        return {str(k): without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def checked(value: Any, where: str) -> Any:
    return map_text(value, lambda text: text_of(text, where))


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed; keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k) if isinstance(k, str) else k: map_text(v, change) for k, v in value.items()}
    return [map_text(v, change) for v in value] if isinstance(value, list | tuple) else value
