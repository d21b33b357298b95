"""`python -m ema_scale.data.token_worker`: encodes what comes in until there is no more; see `token_workers`."""

from __future__ import annotations

import os
import pickle
import sys

from ema_scale.data.tokens import Encoder


def work() -> None:
    """Read settings and then pieces of conversations from standard input; write what they become to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a template prints is no answer
    tokenizer, date, max_length, template = pickle.load(sys.stdin.buffer)
    encoder = Encoder(tokenizer, date)
    while True:
        try:
            piece = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        found = list(encoder.encode_all(piece, max_length, template=template))
        try:
            pickle.dump(found, answers)
            answers.flush()
        except BrokenPipeError:  # the process that asked is gone
            os._exit(1)


if __name__ == "__main__":
    work()
