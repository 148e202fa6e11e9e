"""The tensor kinds: round trips through their parts, and refusal of parts that lie."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill import tensor
from gristmill.errors import FormatError, ModelError
from gristmill.tensor import BFloat16, Bitmask, Dense, Int4, Quantized, Sparse


def matrix(n, k, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def mask(n, k, share=0.4, seed=1):
    return (np.random.default_rng(seed).random((n, k)) < share).astype(np.uint8)


def examples():
    dense = matrix(12, 32)
    blocks = Sparse.from_dense(dense, mask(12, 8), (1, 4))
    elements = Bitmask.from_dense(matrix(9, 21), mask(9, 21))
    return [
        Dense(dense), BFloat16.from_dense(dense), Quantized.from_dense(dense), blocks, blocks.quantized(),
        elements, elements.quantized(), elements.quantized("int4", 8),
        Sparse.from_dense(dense, mask(6, 8), (2, 4)), Int4.from_dense(dense),
    ]  # fmt: skip


@pytest.mark.parametrize("each", examples(), ids=lambda each: each.kind)
def test_parts_rebuild_the_tensor(each):
    again = tensor.from_parts(each.spec(), each.parts())
    np.testing.assert_array_equal(again.dense(), each.dense())
    assert again.nbytes == each.nbytes == sum(part.nbytes for part in each.parts().values())
    assert (again.shape, again.dtype, again.kind) == (each.shape, each.dtype, each.kind)


@pytest.mark.parametrize("each", examples(), ids=lambda each: each.kind)
def test_trainable_parts_can_be_replaced(each):
    doubled = each.with_trainable(each.trainable * 2)
    np.testing.assert_allclose(doubled.dense(), each.dense() * 2, rtol=1e-6)


def test_bf16_rounds_half_to_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 2**-133, -0.0, 3.4e38, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    rounded = BFloat16.from_dense(values).dense()
    np.testing.assert_array_equal(rounded, np.array([1, 1 + 2**-6, 2**-133, 0, np.inf, np.inf, -np.inf, np.nan, np.nan]))
    assert np.signbit(rounded[3])
    assert BFloat16.from_dense(np.float32(0.1)).shape == ()
    with pytest.raises(FormatError, match="uint16"):
        BFloat16.from_parts({}, {"": np.zeros(3, np.float32)})


def test_sparse_keeps_what_the_mask_keeps():
    dense, chosen = matrix(8, 16), mask(8, 4)
    want = dense * np.repeat(chosen, 4, axis=1)
    sparse = Sparse.from_dense(dense, chosen, (1, 4))
    np.testing.assert_array_equal(sparse.dense(), want)
    assert sparse.sparsity == pytest.approx(1 - chosen.mean())


def test_quantisation_error_is_half_a_step():
    dense = matrix(20, 30)
    quantized = Quantized.from_dense(dense)
    assert (np.abs(quantized.dense() - dense) <= quantized.scale[:, None] * 0.5001).all()
    assert np.abs(quantized.codes).max() == 127


def test_a_foreign_minus_128_is_held_where_its_sums_fit():
    codes = np.array([[-128, 127, 0], [1, -128, -127]], np.int8)
    each = Quantized(codes, np.array([0.5, 2], np.float32))
    again = tensor.from_parts(each.spec(), each.parts())
    np.testing.assert_array_equal(again.dense(), codes * np.array([[0.5], [2]], np.float32))
    turned = each.with_trainable(np.array([-1, 1], np.float32))
    assert turned.codes.tolist() == [[127, -127, 0], [1, -128, -127]]  # 128 is no int8
    wide = Quantized(np.full((1, 65794), -128, np.int8), np.ones(1, np.float32))
    with pytest.raises(FormatError, match="do not fit 32 bits"):
        tensor.from_parts(wide.spec(), wide.parts())


def test_an_all_zero_row_is_fine():
    dense = matrix(3, 8)
    dense[1] = 0
    assert not Quantized.from_dense(dense).dense()[1].any()
    assert not Sparse.from_dense(dense, np.ones((3, 2), np.uint8), (1, 4)).quantized().dense()[1].any()


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ModelError, match="finite"):
        Quantized.from_dense(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ModelError, match="do not tile"):
        Sparse.from_dense(matrix(3, 6), np.ones((3, 1), np.uint8), (1, 4))


BAD = {
    "scale must be finite": lambda parts: {**parts, "_scale": parts["_scale"] * np.float32(np.nan)},
    "expected uint8": lambda parts: {**parts, "_block_index": parts["_block_index"].astype(np.int64)},
    "sparse index": lambda parts: {**parts, "_block_index": parts["_block_index"] + np.uint8(200)},
    "missing": lambda parts: {k: v for k, v in parts.items() if k != "_row_offsets"},
    "has shape": lambda parts: {**parts, "_row_offsets": parts["_row_offsets"][:-1]},
}


@pytest.mark.parametrize("message", BAD)
def test_lying_parts_are_refused(message):
    each = Sparse.from_dense(matrix(12, 32), mask(12, 8), (1, 4)).quantized()
    with pytest.raises(FormatError, match=message):
        Sparse.from_parts(each.spec(), BAD[message](each.parts()))


@given(st.data())
def test_random_offsets_and_indices_never_reach_a_kernel(data):
    n, k = 4, 16
    offsets = np.array(data.draw(st.lists(st.integers(-3, 9), min_size=n + 1, max_size=n + 1)), np.int32)
    index = np.array(data.draw(st.lists(st.integers(0, 5), min_size=6, max_size=6)), np.uint8)
    spec = {"kind": "sparse", "shape": [n, k], "block": [1, 4], "dtype": "float32"}
    parts = {"_values": np.ones((6, 1, 4), np.float32), "_row_offsets": offsets, "_block_index": index}
    rises = offsets[0] == 0 and offsets[-1] == 6 and (np.diff(offsets) >= 0).all() and (index < 4).all()
    valid = rises and all((np.diff(index[a:b].astype(int)) > 0).all() for a, b in pairwise(offsets))
    if valid:
        assert Sparse.from_parts(spec, parts).dense().shape == (n, k)
    else:
        with pytest.raises(FormatError):
            Sparse.from_parts(spec, parts)


@pytest.mark.parametrize(
    "spec", [{}, {"kind": "ternary"}, {"kind": "sparse", "shape": [0, 4]}, {"kind": "quantized", "shape": "no"}]
)
def test_bad_specs_are_refused(spec):
    with pytest.raises(FormatError):
        tensor.from_parts(spec, {})
