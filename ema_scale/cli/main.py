"""The entry point: UserError and a full disk end in one message, never in a traceback."""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from ema_scale.cli.app import app
from ema_scale.core.errors import UserError


def main(command: typer.Typer = app) -> None:
    """Entry point: UserError and a full disk end in one message and exit code 2; Ctrl-C in 130."""
    if not sys.stderr.isatty():  # a bar in a file is noise; transformers reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=os.environ.get("EMA_LOG", "INFO"), format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "datasets", "vllm", "transformers", "deepspeed", "filelock", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns wherever there is no GPU
    try:
        command()
    except UserError as error:
        print(f"ema: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"ema: the disk is full ({error.filename or 'while writing'}); what was finished is kept: free space "
              "and run the same command again", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("ema: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
