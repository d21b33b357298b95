"""The fused loss, `DefendedTrainer`, checkpoints, and `train(recipe)`."""
