"""Gradients of single elements: those of the same elements as blocks of 1 x 1, which are held against torch's."""

import numpy as np
import pytest

from gristmill import autodiff
from gristmill.tensor import Bitmask, Dense
from ops.graphs import linear, sparse
from ops.test_gradients import FIXTURE, run


def as_bitmask(tensor):
    return Bitmask.of(Dense(tensor.dense()), tensor.dense() != 0)


@pytest.mark.parametrize("reference", [True, False])
def test_gradients_agree_with_torch(reference):
    _, _, got = run(linear("bitmask", as_bitmask(sparse(9, 21, (1, 1)))), reference)
    with np.load(FIXTURE) as stored:
        np.testing.assert_allclose(got["loss"], stored["linear-sparse-1x1/loss"], rtol=2e-5)
        for name in ("x", "w", "b"):
            want = stored[f"linear-sparse-1x1/{name}"]
            found = got[autodiff.gradient_name(name)].reshape(want.shape)
            np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * float(np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 130), (70, 129, 70), (5, 40, 1030), (37, 1, 9)])
def test_kernels_agree_with_reference(m, n, k):
    graph = linear("bitmask", as_bitmask(sparse(n, k, (1, 1))), m)
    (_, _, want), (_, _, got) = run(graph, True), run(graph, False)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5 * max(float(np.abs(value).max()), 1e-6), err_msg=name)
