"""Grids of runs: expansion, the local worker pool, what is left to do."""
