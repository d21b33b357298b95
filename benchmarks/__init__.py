"""Benchmarks: ways of doing the same thing, run in turn and compared as ratios. `python -m benchmarks --help`."""
