"""The base model and its LoRA adapter: loading, layout, hooks, head, sharding."""
