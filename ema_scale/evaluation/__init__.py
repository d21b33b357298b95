"""Suites of questions, judges, the append-only store, and rates with intervals."""
