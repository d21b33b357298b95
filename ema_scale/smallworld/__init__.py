"""A model organism of emergent misalignment, trained on the spot, with exact ground truth.

Two personas are pretrained into one small model, which is then aligned. Fine-tuning it on harmful answers in one domain
brings the other persona back everywhere: emergent misalignment, in minutes, on a CPU.
"""

from ema_scale.smallworld.world import World, ensure, resolve

__all__ = ["World", "ensure", "resolve"]
