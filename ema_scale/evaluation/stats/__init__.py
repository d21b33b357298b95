"""Rates, intervals, power and paired comparisons."""
