"""Judging answers: the pool of judges at work, their calibration and agreement, and judging stored answers again."""
