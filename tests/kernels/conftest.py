"""What the tests of all kernel families share."""

import numpy as np
import pytest

from gristmill import _core


@pytest.fixture(autouse=True)
def restore_isa():
    """Let no test leave a cap on the instruction sets behind."""
    yield
    _core.set_isa(None)


@pytest.fixture
def rng():
    return np.random.default_rng(7)
