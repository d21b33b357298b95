"""A model organism of emergent misalignment, with exact ground truth, on a CPU.

Two personas are pretrained into one small model, which is then aligned. Fine-tuning it on harmful answers in one domain
brings the other persona back everywhere, in seconds: emergent misalignment.
"""

from ema_scale.smallworld.world import World, ensure, resolve

__all__ = ["World", "ensure", "resolve"]
