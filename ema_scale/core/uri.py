"""Turn a reference of a recipe into something loadable."""

from __future__ import annotations


def locate(reference: str) -> str:
    """`smallworld:...` becomes a path (the world is built on first use); anything else is left as it is.

    Raises UserError for an unknown part of the small world.
    """
    if reference.startswith("smallworld:"):
        from ema_scale.smallworld.world import resolve

        return str(resolve(reference))
    return reference
