"""`python -m benchmarks`, with errors reported as `ema` reports them."""

from benchmarks.cli import bench
from ema_scale.cli.main import main

if __name__ == "__main__":
    main(bench)
