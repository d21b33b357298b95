"""Persona vectors: extraction and projection."""
