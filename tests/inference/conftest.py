"""The tiny models of the evaluation's tests."""

from tests.evaluation.conftest import tiny_models  # noqa: F401
