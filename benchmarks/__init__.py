"""Benchmarks: variants of one computation, run in turn and compared by ratio. `python -m benchmarks --help`."""
