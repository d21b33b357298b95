"""How files that others wrote are read: regular files only, UTF-8, of a stated size; YAML and JSON without surprises.

Every problem is a UserError that names the file, within a second and in bounded memory: pipes and devices, loops of
symlinks, other encodings, files that are something else than their name says, duplicate keys, deep nesting, aliases
that multiply.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from ema_scale.core.errors import UserError

YAML_BYTES, JSON_BYTES = 8 << 20, 256 << 20  # a larger one is no recipe, question bank or record
_DEPTH, _NODES = 100, 1_000_000
_LINE_LIMIT = 1 << 26  # bytes; a longer line is no row
# How files begin that are not what their name says, and what to do.
_STARTS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the data; run `git lfs pull` in its repository",
    ),
    (b"\xff\xfe", "not UTF-8 text but UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "not UTF-8 text but UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"PK\x03\x04", "a zip or spreadsheet file; unpack it, or export it as CSV"),
    (b"<!DOCTYPE html", "an HTML page, not data; download the file itself"),
    (b"<html", "an HTML page, not data; download the file itself"),
)


class MissingFile(UserError):
    """There is no such file."""


def open_file(path: Path | str, what: str = "it") -> io.BufferedReader:
    """A regular file, open to read. Raises UserError for a pipe, a device, a folder, and what cannot be read.

    what: what it is to a person, such as `the recipe`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "a loop of symlinks" if error.errno == errno.ELOOP else error.strerror
        kind = MissingFile if error.errno in (errno.ENOENT, errno.ENOTDIR) else UserError
        raise kind(f"{path}: cannot read {what} ({reason})") from None
    except ValueError as error:  # a NUL in the name
        raise MissingFile(f"{str(path)!r}: cannot read {what} ({error})") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: cannot read {what} (Is a directory); expected a file")
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        found = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
        raise UserError(f"{path}: cannot read {what} ({found}); expected a regular file")
    return os.fdopen(handle, "rb")


def what_it_is(start: bytes) -> str:
    """What a file with this beginning really is and what to do with it; "" if it may be what its name says."""
    return next((what for magic, what in _STARTS if start.lower().startswith(magic.lower())), "")


def read_text(path: Path | str, what: str = "it", limit: int = YAML_BYTES) -> str:
    """A file's text without a byte-order mark. Raises UserError as `open_file` does, and for a file that is over
    `limit` bytes or not UTF-8."""
    with open_file(path, what) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot read {what} ({error.strerror})") from None
    if len(data) > limit:
        raise UserError(f"{path}: over {limit >> 20} MiB; expected {what if what != 'it' else 'a smaller file'}")
    if known := what_it_is(data[:200]):
        raise UserError(f"{path}: {known}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def text_lines(path: Path | str, file: IO[bytes]) -> Iterator[str]:
    """The lines of an open file, with their ends, without a byte-order mark. Raises UserError for a line of over
    64 MiB, and UnicodeDecodeError for one that is not UTF-8."""
    number = 0
    while data := file.readline(_LINE_LIMIT):
        number += 1
        if len(data) == _LINE_LIMIT:
            raise UserError(f"{path}:{number}: a line of over {_LINE_LIMIT >> 20} MiB; expected one row per line")
        yield data.decode("utf-8").removeprefix("\ufeff")


def read_yaml(path: Path | str, what: str = "it") -> Any:
    """The value of a YAML file. Raises UserError as `read_text` and `parse_yaml` do."""
    return parse_yaml(read_text(path, what), str(path))


def read_json(path: Path | str, what: str = "it") -> Any:
    """The value of a JSON file. Raises UserError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, what, JSON_BYTES), str(path))


def parse_json(text: str | bytes, where: str, *, allow_nan: bool = False) -> Any:
    """The value of JSON text. Raises UserError for a key that stands twice, for nesting that is too deep and, unless
    `allow_nan`, for NaN and infinity."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=None if allow_nan else _no_number)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json's object_pairs_hook. Raises ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text.

    Numbers of base 60 are text (`time: 24:00:00`). Raises UserError for what is not YAML, for a key that stands twice
    in a mapping, for nesting that is too deep, and for aliases that make more than a million values.
    """
    return parse_yaml_nodes(text, where)[1]


def parse_yaml_nodes(text: str, where: str, *, yes_is_text: bool = False) -> tuple[yaml.Node | None, Any]:
    """`parse_yaml` with the node, which knows the lines of its parts.

    yes_is_text: yes, no, on and off are text, as in YAML 1.2.
    """
    try:
        _check_size(text)
        loader = (_WordLoader if yes_is_text else _Loader)(text)
        try:
            node = loader.get_single_node()
            _refuse_twice(node)
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None
    # Such as a 31st of February, or a number of a million digits.
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: not YAML that can be read: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not YAML that can be read: nested too deeply") from None


def _check_size(text: str) -> None:
    """Raises YAMLError for nesting or aliases beyond all use, before any value is made."""
    sizes: dict[str, int] = {}  # anchor -> values behind it
    opened: list[tuple[str | None, int]] = []  # of each collection around: its anchor, and the values before it
    total = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in opened):
                raise yaml.YAMLError(f"the alias *{event.anchor} stands within itself (line {_line(event)})")
            total += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            total += 1
            opened.append((event.anchor, total))
            if len(opened) > _DEPTH:
                raise yaml.YAMLError(f"nested deeper than {_DEPTH} (line {_line(event)})")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = total - before + 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if total > _NODES:
            raise yaml.YAMLError(f"more than {_NODES:,} values, aliases counted (line {_line(event)})")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """SafeLoader in which `1:30` is text."""


class _WordLoader(_Loader):
    """_Loader in which yes, no, on and off are text."""


def _refuse_twice(root: yaml.Node | None) -> None:
    """Raises YAMLError for a key that stands twice in one mapping; YAML would silently keep the last value."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        lines: dict[tuple[str, Any], int] = {}
        for key, value in node.value:
            waiting += [key, value]
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    raise yaml.YAMLError(f"the key {key.value!r} stands twice in one mapping (lines {first}, {line})")
                lines[key.tag, key.value] = line


def _without_base_60() -> Iterator[tuple[str, Any]]:
    digits = list("-+0123456789")
    integer = r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"
    real = (
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    yield "tag:yaml.org,2002:float", (re.compile(real), [*digits, "."])
    yield "tag:yaml.org,2002:int", (re.compile(integer), digits)


def _resolvers_of(base: Any, without: tuple[str, ...]) -> dict[Any, list[tuple[str, Any]]]:
    return {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in without]
        for first, forms in base.yaml_implicit_resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _resolvers_of(_Base, ("int", "float"))
for _tag, (_form, _firsts) in _without_base_60():
    _Loader.add_implicit_resolver(_tag, _form, _firsts)
_WordLoader.yaml_implicit_resolvers = _resolvers_of(_Loader, ("bool",))
_WordLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
