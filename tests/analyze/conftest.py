"""What analyses register for themselves is gone after each test, whatever test comes next in the process."""

import pytest

from hybridvlm.reduction.methods import METHODS


@pytest.fixture(autouse=True)
def registry_as_it_was():
    """The registry of methods after a test is that before it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
