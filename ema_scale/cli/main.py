"""The entry point: bad input, and what a disk refuses, end in one message and never in a traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback

import typer

from ema_scale.cli.app import app
from ema_scale.core.disk import disk_message
from ema_scale.core.errors import UserError
from ema_scale.core.terminal import complain, start_logging


def main(command: typer.Typer = app) -> None:
    """Entry point: UserError and what a disk refuses end in one message and exit code 2; Ctrl-C in 130."""
    if not sys.stderr.isatty():  # a bar in a file is noise; libraries read these when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        start_logging()
        try:
            command()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _end(str(error))
    except KeyboardInterrupt:
        print("ema: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        _close_stdout()
        sys.exit(1)
    except MemoryError:
        _end("out of memory; what was finished is kept: use smaller batches or another machine")
    except Exception as error:
        message = disk_message(error)
        if message is None:
            raise
        _end(message)


def _end(message: str) -> None:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    complain(message)
    _close_stdout()
    sys.exit(2)


def _close_stdout() -> None:
    """Python flushes once more when it ends, and would complain where nobody reads or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
