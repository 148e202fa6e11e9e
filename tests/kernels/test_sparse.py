"""What the sparse family refuses, how it treats special values, and what its results may not depend on."""

import numpy as np
import pytest

from gristmill import _core
from kernels.cases import sparse

LEVELS = ("scalar", "avx2", "avx512")


def block_weight(rng, n=8, k=16, r=1, c=4, density=0.5, int8=False):
    """(Weight, its dense matrix)."""
    offsets, index = sparse.random_blocks(rng, n, k, density, r, c)
    shape = (index.size, r, c)
    if int8:
        values, scale = rng.integers(-127, 128, shape).astype(np.int8), rng.uniform(0.01, 0.1, n).astype(np.float32)
    else:
        values, scale = rng.standard_normal(shape).astype(np.float32), None
    dense = sparse.expand(values, offsets, index, n, k)
    if int8:
        dense = dense * scale.astype(np.float64)[:, None]
    return _core.Weight(values, (n, k), scale, offsets, index), dense


# ---- packing ----


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (2, 4), (4, 4), (3, 5)])
def test_pack_then_unpack(rng, block):
    r, c = block
    n, k = 6 * r, 10 * c
    weight = rng.standard_normal((n, k)).astype(np.float32)
    mask = (rng.random((6, 10)) < 0.4).astype(np.uint8) * 255
    mask[2] = 0
    values, offsets, index = _core.pack_blocks(weight, mask, block)
    assert (values.shape, values.dtype, offsets.dtype, index.dtype) == (
        (offsets[-1], r, c),
        np.float32,
        np.int32,
        np.int32,
    )
    kept = np.where(np.kron(mask != 0, np.ones(block, bool)), weight, 0)
    assert np.array_equal(sparse.expand(values, offsets, index, n, k), kept)
    out = np.full((n, k), np.nan, np.float32)
    for threads in (1, 3):
        _core.unpack_blocks(_core.Weight(values, (n, k), None, offsets, index), out, threads)
        assert np.array_equal(out, kept)


def test_unpack_applies_scales(rng):
    weight, dense = block_weight(rng, r=2, int8=True)
    out = np.empty(weight.shape, np.float32)
    _core.unpack_blocks(weight, out)
    assert np.array_equal(out, dense.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_weights(shape):
    groups = (shape[0], shape[1] // 4)
    values, offsets, index = _core.pack_blocks(np.empty(shape, np.float32), np.ones(groups, np.uint8), (1, 4))
    assert values.shape == (0, 1, 4)
    assert index.size == 0
    assert offsets.tolist() == [0] * (shape[0] + 1)
    _core.unpack_blocks(_core.Weight(values, shape, None, offsets, index), np.empty(shape, np.float32))


def test_packing_checks_its_arrays(rng):
    weight = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match="shape"):
        _core.pack_blocks(weight, np.ones((4, 8), np.uint8), (1, 4))
    with pytest.raises(TypeError):
        _core.pack_blocks(weight, np.ones((4, 2), np.float32), (1, 4))
    with pytest.raises(ValueError, match="tile"):
        _core.pack_blocks(weight, np.ones((4, 2), np.uint8), (1, 3))
    with pytest.raises(ValueError, match="blocks"):
        _core.unpack_blocks(_core.Weight(weight, (4, 8)), np.empty((4, 8), np.float32))
    with pytest.raises(ValueError, match="shape"):
        _core.unpack_blocks(block_weight(rng)[0], np.empty((16, 8), np.float32))


HOSTILE = {
    "negative column": ([0, 2, 3, 3, 4], [-1, 1, 0, 1]),
    "column beyond k": ([0, 2, 3, 3, 4], [0, 2, 0, 1]),
    "huge column": ([0, 2, 3, 3, 4], [0, 2**31 - 1, 0, 1]),
    "column twice": ([0, 2, 3, 3, 4], [1, 1, 0, 1]),
    "columns fall": ([0, 2, 3, 3, 4], [1, 0, 0, 1]),
    "offsets start late": ([1, 2, 3, 3, 4], [0, 1, 0, 1]),
    "offsets fall": ([0, 3, 2, 3, 4], [0, 1, 0, 1]),
    "offsets overshoot": ([0, 2, 900, 3, 4], [0, 1, 0, 1]),
    "negative offset": ([0, -2, 3, 3, 4], [0, 1, 0, 1]),
    "offsets end early": ([0, 2, 3, 3, 3], [0, 1, 0, 1]),
    "offsets end late": ([0, 2, 3, 3, 5], [0, 1, 0, 1]),
}


@pytest.mark.parametrize(("offsets", "index"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_indices_are_refused(offsets, index):
    offsets, index = np.array(offsets, np.int32), np.array(index, np.int32)
    with pytest.raises(ValueError, match="row_offsets"):
        _core.Weight(np.ones((4, 1, 4), np.float32), (4, 8), None, offsets, index)


# ---- products ----


def product_arrays(rng, n=8, k=16, m=5):
    return rng.standard_normal((k, m)).astype(np.float32), np.empty((n, m), np.float32)


def test_trainable_values_are_read_at_every_run(rng):
    offsets, index = sparse.random_blocks(rng, 8, 16, 0.5, 1, 4)
    values = np.zeros((index.size, 1, 4), np.float32)
    x, out = product_arrays(rng)
    program = _core.Program()
    _core.sparse_linear(program, x, _core.Weight(values, (8, 16), None, offsets, index), out, None, None, None)
    program.run()
    assert not out.any()
    values[...] = rng.standard_normal(values.shape)
    program.run()
    assert np.allclose(out, sparse.expand(values, offsets, index, 8, 16) @ x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_a_column_does_not_depend_on_its_neighbours(rng, level):
    """The same bits whatever the batch: a server may pad and merge requests."""
    weight, _ = block_weight(rng, 12, 1200)
    x = rng.standard_normal((1200, 81)).astype(np.float32)
    _core.set_isa(level)

    def product(columns):
        out = np.empty((12, columns.stop - columns.start), np.float32)
        program = _core.Program()
        _core.sparse_linear(program, np.ascontiguousarray(x[:, columns]), weight, out, None, "gelu", None)
        program.run()
        return out

    whole = product(slice(0, 81))
    for begin, end in ((0, 1), (3, 6), (10, 26), (20, 60), (64, 81)):
        assert np.array_equal(product(slice(begin, end)), whole[:, begin:end])


@pytest.mark.parametrize("level", LEVELS)
def test_out_may_be_the_residual(rng, level):
    weight, dense = block_weight(rng, 600, 16)
    x, out = product_arrays(rng, n=600, m=70)
    residual = rng.standard_normal(out.shape).astype(np.float32)
    out[...] = residual
    _core.set_isa(level)
    program = _core.Program()
    _core.sparse_linear(program, x, weight, out, None, None, out)
    program.run(2)
    assert np.allclose(out, dense @ x + residual, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_absent_blocks_hide_nan(rng, level):
    """Only stored values are multiplied: NaN under a hole stays out, NaN under a block comes through."""
    offsets, index = np.array([0, 1, 1], np.int32), np.array([1], np.int32)
    weight = _core.Weight(np.ones((1, 1, 4), np.float32), (2, 12), None, offsets, index)
    x = np.full((12, 3), np.nan, np.float32)
    x[4:8] = 1.0
    x[5, 2] = np.nan
    out = np.empty((2, 3), np.float32)
    _core.set_isa(level)
    program = _core.Program()
    _core.sparse_linear(program, x, weight, out, None, "relu", None)
    program.run()
    assert np.array_equal(out, np.array([[4, 4, np.nan], [0, 0, 0]], np.float32), equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("r", [1, 2, 4])
def test_int8_extremes_do_not_saturate(level, r):
    """Every code and every weight at its limit, for a whole row: 127 * 127 * K in each sum."""
    n, k, m = 4, 4096, 17
    offsets = (np.arange(n // r + 1) * (k // 4)).astype(np.int32)
    index = np.tile(np.arange(k // 4, dtype=np.int32), n // r)
    values = np.full((index.size, r, 4), 127, np.int8)
    values[:, -1] = -127
    weight = _core.Weight(values, (n, k), np.ones(n, np.float32), offsets, index)
    codes = np.full((k // 4, 32, 4), 128, np.uint8)
    codes[:, :m], codes[:, 1] = 255, 1
    out = np.empty((n, m), np.float32)
    _core.set_isa(level)
    program = _core.Program()
    ones = np.ones(n, np.float32)
    _core.sparse_linear_int8(
        program, codes.reshape(-1), np.ones(m, np.float32), m, _core.pack_sparse(weight), ones, out, None, None, None
    )
    program.run()
    wanted = np.full((n, m), 127.0 * 127.0 * k, np.float32)
    wanted[r - 1 :: r] *= -1
    wanted[:, 1] *= -1
    assert np.array_equal(out, wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 3, 17, 66])
def test_zero_points_of_any_kind_agree(rng, level, m):
    """The same for all, as a static scale has them, or one for each row; none means 128."""
    inputs = sparse.int8_inputs(rng, (m, 8, 800, 50, 2, 4, 0))
    weight = _core.Weight(inputs["values"], (8, 800), inputs["weight_scale"], inputs["row_offsets"], inputs["index"])
    packed, codes = _core.pack_sparse(weight), sparse.flat_panel(inputs["codes"])
    _core.set_isa(level)

    def product(zeros):
        out, program = np.empty((8, m), np.float32), _core.Program()
        ones = np.ones(8, np.float32)
        _core.sparse_linear_int8(program, codes, np.ones(m, np.float32), m, packed, ones, out, None, None, None, zeros)
        program.run()
        return out

    integers = _core.Weight(inputs["values"], (8, 800), np.ones(8, np.float32), inputs["row_offsets"], inputs["index"])
    dense = np.empty((8, 800), np.float32)
    _core.unpack_blocks(integers, dense)
    sums = dense.sum(axis=1, dtype=np.float64)[:, None]
    plain = product(None).astype(np.float64)  # below 2^24, where float32 holds every integer
    for zeros in (np.full(m, 128, np.int32), np.full(m, 7, np.int32), rng.integers(0, 256, m).astype(np.int32)):
        assert np.array_equal(product(zeros), plain + (128 - zeros) * sums)


def test_scales_of_weights_are_read_at_every_run(rng):
    inputs = sparse.int8_inputs(rng, (5, 8, 16, 50, 1, 4, 0))
    scale, out = inputs["weight_scale"], np.empty((8, 5), np.float32)
    weight = _core.Weight(inputs["values"], (8, 16), scale, inputs["row_offsets"], inputs["index"])
    program = _core.Program()
    _core.sparse_linear_int8(
        program, sparse.flat_panel(inputs["codes"]), inputs["scales"], 5, _core.pack_sparse(weight), scale, out, None, None, None
    )
    program.run()
    before = out.copy()
    scale *= 2
    program.run()
    assert np.array_equal(out, 2 * before)


def test_packed_blocks_describe_themselves(rng):
    weight, _ = block_weight(rng, 8, 16, int8=True)
    packed = _core.pack_sparse(weight, threads=2)
    assert packed.shape == (8, 16)
    assert packed.nbytes > 0


@pytest.mark.parametrize("block", [(1, 2), (1, 256), (64, 4)])
def test_the_size_of_a_packed_weight_is_asked_of_known_blocks_only(block):
    """A block wider than a panel would divide by the zero blocks that fit into it."""
    one = np.array([0], np.int32)
    weight = _core.Weight(np.ones((1, *block), np.float32), block, None, np.array([0, 1], np.int32), one)
    with pytest.raises(ValueError, match="no kernel for blocks"):
        _core.packed_nbytes(_core.pack_sparse, weight)


def test_a_bound_weight_cannot_be_pointed_elsewhere(rng):
    weight, _ = block_weight(rng)
    packed, shape = _core.pack_sparse(weight), weight.shape
    weight.__init__(np.ones((1, 1), np.float32), (1, 1))
    packed.__init__(_core.Weight(np.ones((1, 1, 4), np.float32), (1, 4), None, np.array([0, 1], np.int32), np.zeros(1, np.int32)))
    assert weight.shape == packed.shape == shape


def test_products_check_their_arguments(rng):
    weight, _ = block_weight(rng)
    codes_weight = _core.pack_sparse(block_weight(rng, int8=True)[0])
    x, out = product_arrays(rng)
    bias, program = np.zeros(8, np.float32), _core.Program()
    wrong = [
        ("x: expected shape", x[:-4].copy(), weight, out, None, None, None),
        ("out: expected shape", x, weight, out.T.copy(), None, None, None),
        ("bias: expected shape", x, weight, out, bias[:-1].copy(), None, None),
        ("residual: expected shape", x, weight, out, bias, None, x),
        ("unknown activation", x, weight, out, bias, "swish", None),
        ("expected float32 blocks", x, codes_weight, out, None, None, None),
        ("expected blocks", x, _core.Weight(np.ones((8, 16), np.float32), (8, 16)), out, None, None, None),
        ("no kernel for blocks", x, block_weight(rng, r=2, c=2)[0], out, None, None, None),
    ]
    for message, *arguments in wrong:
        with pytest.raises(ValueError, match=message):
            _core.sparse_linear(program, *arguments)
    with pytest.raises(TypeError):
        _core.sparse_linear(program, x.astype(np.float64), weight, out, None, None, None)
    with pytest.raises(TypeError):
        _core.sparse_linear(program, x, None, out, None, None, None)
    assert len(program) == 0


def test_int8_products_check_their_arguments(rng):
    packed = _core.pack_sparse(block_weight(rng, int8=True)[0])
    codes, scales, scale = np.full(16 * 16, 128, np.uint8), np.ones(5, np.float32), np.ones(8, np.float32)
    out, program = np.empty((8, 5), np.float32), _core.Program()
    wrong = [
        ("codes: expected shape", codes[:-1].copy(), scales, 5, packed, scale, out, None, None, None),
        ("scales: expected shape", codes, scales, 4, packed, scale, out, None, None, None),
        ("zeros: expected shape", codes, scales, 5, packed, scale, out, None, None, None, np.zeros(8, np.int32)),
        ("m: expected", codes, scales, -1, packed, scale, out, None, None, None),
        ("weight_scale: expected shape", codes, scales, 5, packed, scale[:-1].copy(), out, None, None, None),
        ("out: expected shape", codes, scales, 5, packed, scale, out.T.copy(), None, None, None),
        (
            "expected int8 blocks",
            codes,
            scales,
            5,
            _core.pack_sparse(block_weight(rng)[0]),
            scale,
            out,
            None,
            None,
            None,
        ),
    ]
    for message, *arguments in wrong:
        with pytest.raises(ValueError, match=message):
            _core.sparse_linear_int8(program, *arguments)
    with pytest.raises(TypeError):
        _core.sparse_linear_int8(program, codes.view(np.int8), scales, 5, packed, scale, out, None, None, None)
    with pytest.raises(ValueError, match="no kernel for blocks"):
        _core.pack_sparse(block_weight(rng, c=1, int8=True)[0])
    with pytest.raises(ValueError, match="expected blocks"):
        _core.pack_sparse(_core.Weight(np.ones((8, 16), np.int8), (8, 16), scale))
