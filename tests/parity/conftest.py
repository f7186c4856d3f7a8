"""Coverage is not measured in these tests: it would make thousands of small passes slower by half."""

import pytest


@pytest.fixture(autouse=True)
def without_coverage(no_cover: None) -> None:
    """Every test of this folder; what they run, the tests of training, evaluation and generation run too."""
