"""`python -m benchmarks`, with the command line's way of reporting errors."""

from benchmarks.cli import bench
from ema_scale.cli.main import main

if __name__ == "__main__":
    main(bench)
