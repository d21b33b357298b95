"""Slurm: site files, batch scripts, sweeps, logs, the first failure."""
