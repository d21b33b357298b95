"""Garbage is collected again after the imports, whatever happens in between."""

import gc

import pytest

from ema_scale.core.imports import without_garbage_collection


def test_it_is_off_for_the_imports_and_then_as_before():
    assert gc.isenabled()
    with pytest.raises(ImportError), without_garbage_collection():
        assert not gc.isenabled()
        import no_such_module  # noqa: F401
    assert gc.isenabled()
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
