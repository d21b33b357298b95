"""Training under defenses: the fused loss, the trainer, checkpoints, and the recipe path."""
