"""Shared ground: errors, atomic files, run folders, hashing, paths, collectives. Imports nothing else of ours."""
