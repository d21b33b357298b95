"""What disks say while something is written, as one message: the path, the reason, what was kept and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ema_scale.core.errors import UserError

_FREE = "free space"
_ELSEWHERE = "make it writable, or choose another folder"
# errno -> what it means to a person, and what to do.
_REASONS = {
    errno.ENOSPC: ("the disk is full (No space left, or no inodes)", _FREE),
    errno.EDQUOT: ("the quota is used up", _FREE),
    errno.EFBIG: ("over the largest size of a file (ulimit -f)", "raise the limit"),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EACCES: ("no permission", _ELSEWHERE),
    errno.EPERM: ("no permission", _ELSEWHERE),
    errno.EMFILE: ("too many open files (ulimit -n)", "raise the limit"),
    errno.ENFILE: ("too many open files on this machine", "close some"),
    errno.ENOENT: ("no such file or folder, or it has vanished", "make its folder"),
    errno.ENOTDIR: ("a file is in the way, expected a folder", "choose another folder"),
    errno.EISDIR: ("a folder is in its place, expected a file", "choose another name"),
    errno.ENOTEMPTY: ("a folder with files is in its place", "choose another name"),
    errno.EEXIST: ("something is in its place", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("a symbolic link, or a loop of them", "name a regular file"),
    errno.ESTALE: ("the folder has vanished from its server", "mount it again"),
    errno.EIO: ("the disk does not answer", "look after the disk"),
}


class CannotWrite(UserError, OSError):
    """A file or folder cannot be written: the disk, its rights, or what is in its place."""


def disk_problem(error: BaseException) -> tuple[str, str] | None:
    """(reason, what to do) of an error that a disk or its rights caused; None for any other error.

    safetensors and pyarrow keep the system's number in their message only.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        found = re.search(r"(?:os error |\[?[Ee]rrno )(\d{1,3})\b", str(error))
        number = int(found[1]) if found else None
    return None if number is None else _REASONS.get(number)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what the disk says while `path` is written into CannotWrite, which names it."""
    try:
        yield
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        raise CannotWrite(_message(error, Path(path), *problem)) from error


def disk_message(error: Exception) -> str | None:
    """What a person needs to know of an error that no `writing` stands around; None if no disk caused it."""
    problem = disk_problem(error)
    if problem is not None:
        return _message(error, None, *problem)
    # Others, such as the hub's client, also raise OSError, with a text for people.
    return str(error) or type(error).__name__ if isinstance(error, OSError) else None


def _message(error: BaseException, path: Path | None, reason: str, todo: str) -> str:
    named = getattr(error, "filename", None)
    if path is None or (isinstance(named, str) and not Path(named).is_relative_to(path.parent)):
        where, deed = named or ("a file" if _is_there() else "the working folder"), "cannot be read or written"
    else:
        where, deed = path, "cannot be written"
    return f"{where}: {deed}: {reason}. What was finished before is kept: {todo} and run the same command again"


def _is_there() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def refuse_special(path: Path) -> None:
    """Raises CannotWrite if something is at `path` that is neither a regular file nor a folder.

    Renaming over a device, a pipe or a symbolic link would replace it, and writing through a link would write
    elsewhere. Folders on the way may be links: on clusters they often lead to scratch disks.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = ((stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        found = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
        raise CannotWrite(f"{path}: {found} is in its place; expected a regular file, or nothing there")


def make_folder(path: Path) -> Path:
    """Make a folder with those around it, if it is not there. Raises CannotWrite, also if a file is in its place."""
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CannotWrite(f"{path}: a file is in the way, expected a folder to write to") from None
    return path


def copy_regular(source: Path, target: Path) -> None:
    """Copy a file's bytes. Raises UserError if `source` is a symbolic link that leads out of its folder: what it names
    would be handed on."""
    refuse_link_outside(source)
    with writing(target):
        target.write_bytes(source.read_bytes())


def refuse_link_outside(file: Path) -> None:
    """Raises UserError for a symbolic link that leads out of the file's folder. Snapshots of the hub's cache are links
    into the cache, and may."""
    if not file.is_symlink():
        return
    folder, real = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    of_the_hub = folder.parent.name == "snapshots" and real.is_relative_to(folder.parent.parent / "blobs")
    if not real.is_relative_to(folder) and not of_the_hub:
        raise UserError(
            f"{file}: a symbolic link that leads out of its folder; it is not followed: put the file itself there, "
            "or remove the link"
        )
