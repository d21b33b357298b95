"""Rows: files and hub sets -> messages -> tokens with a loss mask -> batches."""
