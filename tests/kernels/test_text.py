"""The text family beyond its cases: what is refused, hostile offsets, in-place calls."""

import numpy as np
import pytest

from gristmill import _core


def run(function, *arguments, threads=1):
    program = _core.Program()
    function(program, *arguments)
    program.run(threads)


def f32(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


IDS = np.zeros(4, np.int64)
REFUSED = {
    "gather of a matrix": (_core.gather, f32(3, 4), IDS, f32(1, 4, 4)),
    "gather to another shape": (_core.gather, f32(1, 3, 4), IDS, f32(1, 5, 4)),
    "gather by floats": (_core.gather, f32(1, 3, 4), f32(4), f32(1, 4, 4)),
    "gather by int16": (_core.gather, f32(1, 3, 4), IDS.astype(np.int16), f32(1, 4, 4)),
    "gather by uint64": (_core.gather, f32(1, 3, 4), IDS.astype(np.uint64), f32(1, 4, 4)),
    "gather of float64": (_core.gather, f32(1, 3, 4).astype(np.float64), IDS, f32(1, 4, 4)),
    "scatter of another shape": (_core.gather_grad, f32(1, 5, 4), IDS, f32(1, 3, 4)),
    "lookups without a table": (_core.lookups, f32(4, 4)),
    "lookups of half a pair": (_core.lookups, f32(4, 4), f32(3, 4)),
    "lookups of five": (_core.lookups, f32(4, 4), *(f32(3, 4), IDS) * 5),
    "lookups of other widths": (_core.lookups, f32(4, 4), f32(3, 4), IDS, f32(3, 5), IDS),
    "lookups of other counts": (_core.lookups, f32(4, 4), f32(3, 4), IDS[:3]),
    "unknown mode": (_core.masked_pool, "median", f32(2, 3, 4), np.ones((2, 3), np.int64), f32(2, 4)),
    "mask of floats": (_core.masked_pool, "mean", f32(2, 3, 4), f32(2, 3), f32(2, 4)),
    "mask of another shape": (_core.masked_pool, "mean", f32(2, 3, 4), np.ones((2, 2), np.int64), f32(2, 4)),
    "no offsets": (_core.packed_pool, "mean", f32(6, 4), IDS[:0], f32(0, 4)),
    "int32 offsets": (_core.packed_pool, "mean", f32(6, 4), IDS.astype(np.int32), f32(3, 4)),
    "packed to another shape": (_core.packed_pool, "mean", f32(6, 4), IDS, f32(4, 4)),
    "pool gradient of another shape": (_core.packed_pool_grad, "mean", f32(2, 4), f32(6, 4), IDS, f32(6, 4)),
    "normalise to another shape": (_core.normalize, f32(2, 4), f32(2, 5)),
    "cosine of other shapes": (_core.cosine, f32(2, 4), f32(2, 5), f32()),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_arguments_that_do_not_fit_are_refused(fault):
    function, *arguments = REFUSED[fault]
    with pytest.raises((ValueError, TypeError)):
        run(function, *arguments)


@pytest.mark.parametrize("offsets", [[0, 9, 3], [-5, 2, 6], [4, 1, 6], [0, 2**62, -(2**62)], [7, 8, 9]])
@pytest.mark.parametrize("mode", ["mean", "max", "first"])
def test_offsets_are_cut_to_the_rows_there_are(offsets, mode):
    x, offsets = f32(6, 20), np.array(offsets, np.int64)
    out, dx = np.full((2, 20), np.nan, np.float32), np.full((6, 20), np.nan, np.float32)
    run(_core.packed_pool, mode, x, offsets, out)
    run(_core.packed_pool_grad, mode, f32(2, 20), x, offsets, dx)
    assert np.isfinite(out).all()
    assert np.isfinite(dx).all()


def test_in_place():
    x, dy = f32(5, 33), f32(5, 33)[::-1].copy()
    want, grad = np.empty_like(x), np.empty_like(x)
    run(_core.normalize, x, want)
    run(_core.normalize_grad, dy, x, grad)
    for target in ("x", "dy"):
        a, b = x.copy(), dy.copy()
        run(_core.normalize_grad, b, a, a if target == "x" else b)
        np.testing.assert_array_equal(a if target == "x" else b, grad)
    run(_core.normalize, x, x)
    np.testing.assert_array_equal(x, want)


def test_nan_of_masked_tokens_stays_out():
    x, mask, out = f32(2, 3, 8), np.array([[1, 0, 1], [0, 1, 0]], np.int64), np.empty((2, 8), np.float32)
    x[0, 1] = x[1, 0] = np.nan
    for mode in ("mean", "sqrt", "weighted", "max", "first"):
        run(_core.masked_pool, mode, x, mask, out)
        assert np.isfinite(out).all(), mode


def test_nan_is_the_largest():
    x, out = f32(3, 8), np.empty((1, 8), np.float32)
    x[1, 3] = np.nan
    run(_core.packed_pool, "max", x, np.array([0, 3], np.int64), out)
    assert np.isnan(out[0, 3])
    assert np.isfinite(np.delete(out[0], 3)).all()
