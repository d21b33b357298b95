"""What tests of the real chat model share."""

import os

import pytest

from ema_scale.core.errors import UserError
from ema_scale.core.uri import locate


@pytest.fixture(scope="session")
def model() -> str:
    """The fetched checkpoint. In CI a missing package index is a failure."""
    try:
        return locate("packaged:smollm2-135m-instruct")
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
