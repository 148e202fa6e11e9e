"""Single elements under a bitmask: what is kept, how it is rounded, what trains, and refusal of parts that lie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gristmill import _core, tensor
from gristmill.errors import FormatError, ModelError
from gristmill.tensor import Bitmask, Int4, Quantized


def draw(n, k, share=0.4, seed=0):
    rng = np.random.default_rng(seed)
    keep = rng.random((n, k)) < share
    if n > 2:
        keep[0], keep[1] = True, False
    return rng.standard_normal((n, k)).astype(np.float32), keep


SHAPES = [(1, 1), (3, 8), (5, 9), (17, 63), (16, 64), (33, 130)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_what_the_mask_keeps(n, k):
    array, keep = draw(n, k)
    each = Bitmask.from_dense(array, keep)
    np.testing.assert_array_equal(each.dense(), np.where(keep, array, 0))
    np.testing.assert_array_equal(each.mask, keep)
    np.testing.assert_array_equal(each.values, array[keep])
    np.testing.assert_array_equal(np.diff(each.row_offsets), keep.sum(axis=1))
    np.testing.assert_array_equal(each.rows_of_values, np.nonzero(keep)[0])
    assert each.count == keep.sum()
    assert each.sparsity == pytest.approx(1 - keep.mean())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes_are_those_of_the_dense_kinds(n, k):
    array, keep = draw(n, k)
    kept = np.where(keep, array, 0)
    for dtype, whole in (("int8", Quantized.from_dense(kept)), ("int4", Int4.from_dense(kept, 16))):
        each = Bitmask.from_dense(array, keep, dtype, 16)
        assert each.precision == dtype
        np.testing.assert_array_equal(each.codes, whole.codes[keep])
        np.testing.assert_array_equal(each.dense(), whole.dense())
        np.testing.assert_array_equal(each.float_values, whole.dense()[keep])
        np.testing.assert_array_equal(Bitmask.from_dense(array, keep).quantized(dtype, 16).values, each.values)


def test_a_file_is_small():
    array, keep = draw(64, 512, 0.3)
    count = int(keep.sum())
    bits, rows, shape = 64 * 512 // 8, 64 * 8, 16
    assert Bitmask.from_dense(array, keep).nbytes == bits + rows + shape + 4 * count
    assert Bitmask.from_dense(array, keep, "int8").nbytes == bits + rows + shape + count + 4 * 64
    assert Bitmask.from_dense(array, keep, "int4", 128).nbytes == bits + rows + shape + -(-count // 2) + 2 * 64 * 4


def test_gains_turn_signs_and_keep_positions():
    array, keep = draw(9, 40)
    gain = np.linspace(-2, 2, 9, dtype=np.float32)
    gain[4] = 1
    for dtype in ("int8", "int4"):
        each = Bitmask.from_dense(array, keep, dtype, 8)
        np.testing.assert_allclose(each.with_trainable(gain).dense(), each.dense() * gain[:, None], rtol=2e-3, atol=1e-7)
    floats = Bitmask.from_dense(array, keep)
    np.testing.assert_array_equal(floats.with_trainable(2 * floats.trainable).dense(), 2 * floats.dense())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), np.ones((3, 2))), "does not fit"),
        ((np.ones(3), np.ones(3)), "does not fit"),
        ((np.ones((2, 3)), np.ones((2, 3)), "int2"), "not 'int2'"),
        ((np.full((2, 3), np.nan), np.ones((2, 3)), "int8"), "finite"),
        ((np.full((2, 3), np.inf), np.ones((2, 3)), "int4"), "finite"),
        ((np.ones((2, 3)), np.ones((2, 3)), "int4", 7), "multiple of 8"),
        ((np.ones((2, 3)), np.ones((2, 3)), "int4", 131072), "at most 65536"),
    ],
)
def test_what_cannot_be_held_is_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        Bitmask.from_dense(*arguments)


def changed(name, change):
    return lambda parts: {**parts, name: change(parts[name])}


BAD = {
    "marks 6 elements, which take 6 values, but part '_compressed' has 5": changed("_compressed", lambda v: v[:-1]),
    "beyond the last column": changed("_bitmask", lambda bits: bits | 0x80),
    "does not count the bits": changed("_row_offsets", lambda rows: rows + 1),
    "marks 7 elements": changed("_bitmask", lambda bits: bits | np.array([[1 << 3], [0]], np.uint8)),
    "scale must be finite": changed("_scale", lambda v: v * np.float32(np.nan)),
    "'_shape' is": changed("_shape", lambda v: v[::-1].copy()),
    "has dtype": changed("_row_offsets", lambda v: v.astype(np.int32)),
    "missing": lambda parts: {name: part for name, part in parts.items() if name != "_bitmask"},
}


@pytest.mark.parametrize("message", BAD)
def test_lying_parts_are_refused(message):
    each = Bitmask.from_dense(np.ones((2, 5)), [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]).quantized()
    with pytest.raises(FormatError, match=message):
        Bitmask.from_parts(each.spec(), BAD[message](each.parts()))


def test_lying_int4_is_refused():
    each = Bitmask.from_dense(np.ones((2, 5)), np.ones((2, 5)), "int4", 8)
    for group in (None, 4, 12, 131072, 8.0):
        with pytest.raises(FormatError, match="a group of int4 codes"):
            Bitmask.from_parts({**each.spec(), "group": group}, each.parts())
    with pytest.raises(FormatError, match="10 elements, which take 5 bytes"):
        Bitmask.from_parts(each.spec(), {**each.parts(), "_compressed": np.zeros(6, np.uint8)})
    with pytest.raises(FormatError, match="finite and not zero"):
        Bitmask.from_parts(each.spec(), {**each.parts(), "_scale": np.zeros((2, 1), np.float16)})
    with pytest.raises(FormatError, match="holds float32, int8, int4"):
        Bitmask.from_parts({**each.spec(), "dtype": "int2"}, each.parts())


@settings(max_examples=60)
@given(st.data())
def test_random_bits_never_reach_a_kernel_unchecked(data):
    n, k = 3, data.draw(st.integers(1, 20))
    bits = data.draw(arrays.arrays(np.uint8, (n, -(-k // 8))))
    offsets = data.draw(arrays.arrays(np.int64, (n + 1,), elements=st.integers(-1, 30)))
    values = np.ones(data.draw(st.integers(0, 30)), np.float32)
    each = np.unpackbits(bits, axis=1, bitorder="little")
    counts = np.concatenate([[0], np.cumsum(each[:, :k].sum(axis=1))])
    valid = not each[:, k:].any() and np.array_equal(counts, offsets) and len(values) == counts[-1]
    try:
        _core.Weight(values, (n, k), None, offsets, bitmask=bits)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == valid
    spec = {"kind": "bitmask", "shape": [n, k], "dtype": "float32"}
    parts = {"_compressed": values, "_bitmask": bits, "_row_offsets": offsets[:-1], "_shape": np.array([n, k])}
    fits = not each[:, k:].any() and np.array_equal(counts[:-1], offsets[:-1]) and len(values) == counts[-1]
    if fits:
        assert tensor.from_parts(spec, parts).dense().shape == (n, k)
    else:
        with pytest.raises(FormatError):
            tensor.from_parts(spec, parts)


def test_blocks_of_one_in_older_files_are_read():
    array, keep = draw(5, 9)
    for dtype in ("float32", "int8"):
        each = Bitmask.from_dense(array, keep, dtype)
        parts = {"_values": each.values, "_bitmask": each.bitmask}
        if dtype == "int8":
            parts["_scale"] = each.scale[:, None]
        spec = {"kind": "sparse", "shape": [5, 9], "block": [1, 1], "dtype": dtype}
        again = tensor.from_parts(spec, parts)
        assert again.kind == "bitmask"
        np.testing.assert_array_equal(again.dense(), each.dense())
        with pytest.raises(FormatError, match="but part '_values' has"):
            tensor.from_parts(spec, {**parts, "_values": each.values[1:]})
        with pytest.raises(FormatError, match="blocks of \\[1, 1\\]"):
            tensor.from_parts({**spec, "dtype": "int4"}, parts)
