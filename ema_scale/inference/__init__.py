"""Sampling: vLLM, transformers and OpenAI-compatible servers behind one interface."""
