"""int4 in groups: what is stored, what is lost, and what is refused."""

import numpy as np
import pytest

from gristmill import tensor
from gristmill.errors import FormatError, ModelError
from gristmill.tensor import Int4
from gristmill.tensor.int4 import HALF_LEAST

RATIOS = np.linspace(1, 0.5, 16)


def matrix(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def example():
    return Int4.from_dense(matrix(6, 44), 32)


@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 8), (3, 31, 8), (5, 32, 32), (4, 70, 32), (9, 300, 128), (2, 40, 64)])
def test_it_is_rebuilt_from_its_parts_and_means_codes_times_scales(n, k, group):
    each = Int4.from_dense(matrix(n, k), group)
    again = tensor.from_parts(each.spec(), each.parts())
    scale = np.repeat(each.scale.astype(np.float32), group, axis=1)[:, :k]
    np.testing.assert_array_equal(each.dense(), each.codes * scale)
    np.testing.assert_array_equal(again.dense(), each.dense())
    assert (again.shape, again.dtype, again.kind) == ((n, k), each.dtype, "int4")
    assert again.nbytes == each.nbytes == n * -(-k // 8) * 4 + n * -(-k // group) * 2 + 16
    assert each.sparsity == pytest.approx((each.codes == 0).mean())


def test_words_hold_eight_codes_low_bits_first():
    each = Int4((1, 10), 8, np.array([[0x76543210, 0x98]], np.int32), np.array([[1, 2]], np.float16))
    assert each.codes.tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1]]
    assert each.dense().tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1, 0, 2]]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_larger_end_of_a_group_takes_the_longer_end_of_the_codes(sign):
    values = sign * np.array([[-8, -7.4, -3, 0, 1, 2, 6.6, 7]], np.float32)
    each = Int4.from_dense(values, 8)
    assert each.codes.tolist() == [[-8, -7, -3, 0, 1, 2, 7, 7]]
    assert each.scale.tolist() == [[sign]]


def test_the_error_is_half_a_step_but_at_the_short_end():
    dense = matrix(40, 64)
    each = Int4.from_dense(dense, 32)
    step = np.repeat(np.abs(each.scale.astype(np.float32)), 32, axis=1)
    assert (np.abs(each.dense() - dense) <= 1.001 * step).all()
    assert (np.abs(each.dense() - dense) > 0.501 * step).mean() < 0.02


@pytest.mark.parametrize("group", [32, 128])
def test_clipping_lowers_the_error_of_every_group(group):
    dense = matrix(50, 256)
    plain, clipped = (Int4.from_dense(dense, group, ratios) for ratios in ((1.0,), RATIOS))
    before, after = (((each.dense() - dense) ** 2).reshape(-1, group).sum(axis=1) for each in (plain, clipped))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def test_importance_moves_the_error_to_where_it_matters_least():
    rng = np.random.default_rng(3)
    dense, x = matrix(64, 96), rng.standard_normal((500, 96)).astype(np.float32) * 10.0 ** rng.uniform(-1.5, 0.5, 96)
    plain = Int4.from_dense(dense, 32, RATIOS)
    weighed = Int4.from_dense(dense, 32, RATIOS, np.mean(np.square(x), axis=0))
    before, after = (np.linalg.norm(x @ (each.dense() - dense).T) for each in (plain, weighed))
    assert after < before


@pytest.mark.parametrize("size", [2.0**-140, 1e-30, 1e-5, 1.0, 1e5, 1e30, 3e38])
def test_scales_take_the_range_they_need(size):
    dense = (np.clip(matrix(7, 40), -1, 1) * size).astype(np.float32)
    each = Int4.from_dense(dense, 32, RATIOS)
    assert each.scale.dtype == (np.float16 if 1e-3 < size < 1e6 else np.float32)
    assert np.isfinite(each.dense()).all()
    if size > 1e-37:
        assert np.linalg.norm((each.dense() - dense) / size) < 0.1 * np.linalg.norm(dense / size)


def test_tiny_groups_beside_large_ones_round_to_the_least_half():
    dense = matrix(2, 64)
    dense[0, :32] = 0
    dense[1, 32:] *= 1e-9
    each = Int4.from_dense(dense, 32, RATIOS)
    assert each.scale.dtype == np.float16
    assert not each.dense()[0, :32].any()
    assert np.abs(each.dense()[1, 32:] - dense[1, 32:]).max() <= HALF_LEAST


def test_gains_change_scales_and_signs():
    each = example()
    gain = np.array([2, -1, 0.5, 1, 0, 1], np.float32)
    changed = each.with_trainable(each.trainable * gain)
    np.testing.assert_allclose(changed.dense(), each.dense() * gain[:, None], atol=1e-6)
    assert tensor.from_parts(changed.spec(), changed.parts()).shape == each.shape
    assert each.with_trainable(each.trainable * np.float32(1e9)).scale.dtype == np.float32


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.full((2, 2), np.nan, np.float32), {}, "finite"),
        (matrix(2, 3)[0], {}, "finite matrices"),
        (matrix(2, 8), {"group": 12}, "multiple of 8"),
        (matrix(2, 8), {"group": 0}, "multiple of 8"),
        (matrix(2, 8), {"group": 1 << 20}, "at most"),
        (matrix(2, 8), {"ratios": ()}, "ratios"),
        (matrix(2, 8), {"ratios": (1, 0)}, "ratios"),
        (matrix(2, 8), {"importance": np.ones(7)}, "importance"),
        (matrix(2, 8), {"importance": -np.ones(8)}, "importance"),
    ],
)
def test_what_cannot_be_made_is_refused(array, settings, message):
    with pytest.raises(ModelError, match=message):
        Int4.from_dense(array, **settings)


BAD_PARTS = {
    "missing": lambda parts: {k: v for k, v in parts.items() if k != "_shape"},
    "expected int32": lambda parts: {**parts, "_packed": parts["_packed"].astype(np.int64)},
    "'_packed' has shape": lambda parts: {**parts, "_packed": parts["_packed"][:, :-1]},
    "'_scale' has shape": lambda parts: {**parts, "_scale": parts["_scale"][:-1]},
    "expected float32": lambda parts: {**parts, "_scale": parts["_scale"].astype(np.float64)},
    "finite and not zero": lambda parts: {**parts, "_scale": parts["_scale"] * np.float16(0)},
    "every scale": lambda parts: {**parts, "_scale": np.full_like(parts["_scale"], np.inf)},
    "the matrix is": lambda parts: {**parts, "_shape": np.array([44, 6])},
}


@pytest.mark.parametrize("message", BAD_PARTS)
def test_lying_parts_are_refused(message):
    each = example()
    with pytest.raises(FormatError, match=message):
        tensor.from_parts(each.spec(), BAD_PARTS[message](each.parts()))


@pytest.mark.parametrize(
    "change", [{"group": 12}, {"group": "32"}, {"group": 1 << 40}, {"group": True}, {"shape": [6, 0]}, {"shape": 6}]
)
def test_lying_specs_are_refused(change):
    each = example()
    with pytest.raises(FormatError):
        tensor.from_parts({**each.spec(), **change}, each.parts())
