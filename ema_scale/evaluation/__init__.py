"""Suites of questions, samplers, judges, and rates with honest intervals.

Nothing heavy is imported here: vLLM imports this package to find its CPU LoRA plugin (`vllm_cpu_lora`).
"""
