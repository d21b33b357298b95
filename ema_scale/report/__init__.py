"""Runs side by side in one self-contained HTML file."""
