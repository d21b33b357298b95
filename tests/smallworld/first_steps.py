"""One of two processes, started as under torchrun: begins the small world's build, prints its steps' gradient norms."""

import itertools
import json
import sys

import torch

from ema_scale.smallworld import build


def main(steps: int) -> None:
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(*args):
        norms.append(clip(*args))
        return norms[-1]

    def reported(*_):
        if torch.distributed.get_rank() == 0:
            print(json.dumps([norm.item() for norm in norms]))
        sys.exit()

    torch.nn.utils.clip_grad_norm_ = recorded
    build.progress = lambda all_steps, *_: itertools.islice(all_steps, steps)
    build._save = reported
    build.main("", "base", 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
