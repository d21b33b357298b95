"""Build the model that comes with the package anew, and compare or replace it.

python -m ema_scale.smallworld.ship            # compare (minutes)
python -m ema_scale.smallworld.ship --write    # replace; needed when the vocabulary, the corpus or a size changes
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ema_scale.core.io import atomic_write_json
from ema_scale.core.records import package_versions
from ema_scale.smallworld.build import build_models
from ema_scale.smallworld.world import WEIGHTS, World, shipped, weights_hash


def main(write: bool) -> str:
    """What came of it, in a sentence."""
    world = World()
    with TemporaryDirectory() as temporary:
        built = Path(temporary)
        build_models(built, world.size, world.seed)
        ours = shipped(world)
        if ours and weights_hash(ours) == weights_hash(built / "aligned"):
            return f"{ours}: the same, bit for bit, as built here"
        if not write:
            return _difference(ours, built / "aligned") if ours else f"{WEIGHTS}: holds no model of today's code"
        shutil.rmtree(WEIGHTS, ignore_errors=True)
        ours = WEIGHTS / world.models.name / "aligned"
        shutil.copytree(built / "aligned", ours)
        ours.joinpath("model.safetensors").chmod(0o644)
        atomic_write_json(ours.parent / "world.json", {"packages": package_versions()})
        return f"{ours}: replaced"


def _difference(ours: Path, built: Path) -> str:
    from safetensors.torch import load_file

    weights, theirs = (load_file(folder / "model.safetensors") for folder in (ours, built))
    apart = max((weights[name] - theirs[name]).abs().max().item() for name in weights)
    return f"{ours}: weights differ from those built here by up to {apart:.3g} (another processor or library version?)"


if __name__ == "__main__":
    print(main("--write" in sys.argv[1:]))
