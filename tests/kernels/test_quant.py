"""What the cases of the quant family do not say: refusals, policies, extremes, and what a program may rely on."""

import numpy as np
import pytest

from gristmill import _core

LEVELS = ("scalar", "avx2", "avx512")
MAX_K = 66311


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def weight(codes, scale=None):
    codes = np.ascontiguousarray(codes, np.int8)
    return _core.Weight(codes, codes.shape, np.ones(len(codes), np.float32) if scale is None else scale)


def quantize(x, layout="tile", lanes=False, **how):
    m, k = x.shape[::-1] if lanes else x.shape
    codes, scales = np.empty(_core.codes_nbytes(m, k, layout), np.uint8), np.empty(m, np.float32)
    zeros = np.empty(m, np.int32)
    program = _core.Program()
    _core.quantize_activations(program, x, lanes, layout, codes, scales, zeros, **how)
    program.run()
    return codes, scales, zeros


def linear(x, packed, weight_scale, bias=None, activation=None, residual=None, out=None):
    codes, scales, zeros = quantize(x)
    out = np.empty((len(x), packed.shape[0]), np.float32) if out is None else out
    program = _core.Program()
    _core.linear_int8(program, codes, scales, zeros, len(x), packed, weight_scale, out, bias, activation, residual)
    program.run()
    return out


def test_codes_nbytes():
    assert _core.codes_nbytes(5, 7, "tile") == 5 * 8
    assert _core.codes_nbytes(5, 7, "lanes") == 16 * 8
    assert _core.codes_nbytes(0, 7, "lanes") == _core.codes_nbytes(9, 0, "tile") == 0
    assert _core.codes_nbytes(1, 133143, "lanes") == 16 * 133144
    for bad in (
        (-1, 4, "tile"), (4, -1, "tile"), (1, MAX_K + 1, "tile"), (1, 133144, "lanes"), (2**31, 1, "tile"), (4, 4, "rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"terms|rows|layout"):
            _core.codes_nbytes(*bad)


def test_ties_go_to_even(level):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]], np.float32)
    codes, scales, zeros = quantize(x, "lanes")
    assert (scales[0], zeros[0]) == (1, 128)
    assert (codes.reshape(2, 16, 4)[:, 0].astype(int) - 128).tolist() == [[127, 0, 2, 2], [0, -2, -2, -127]]
    for low, high in ((-127, 128), (-100, 155), (0, 255), (-255, 0)):
        codes, scales, zeros = quantize(np.array([[high, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, low]], np.float32).clip(low, high))
        assert (scales[0], zeros[0]) == (1, -low)
        assert (codes.astype(int) + low).tolist() == np.clip([high, 0, 2, 2, 0, -2, -2, low], low, high).tolist()
    stored, scale = np.empty((1, 8), np.int8), np.empty(1, np.float32)
    _core.quantize_weight(x, stored, scale)
    assert stored.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    assert scale[0] == 1


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 2.0**-120])
def test_rows_too_small_for_a_scale_are_zero(level, largest):
    x = np.array([[largest, 0, -largest / 2]], np.float32)
    codes, scales, zeros = quantize(x)
    assert (codes == 128).all()
    assert (scales[0], zeros[0]) == (1, 128)


@pytest.mark.parametrize("largest", [2.0**-119, 1e-20, 3.4e38])
def test_extreme_rows_keep_their_largest_value(level, largest):
    x = np.array([[largest, -largest, 0]], np.float32)
    codes, scales, zeros = quantize(x, "lanes")
    assert codes[:4].tolist() == [255, 1, 128, 128]
    assert np.isclose(scales[0] * 127, largest, rtol=1e-6)
    codes, scales, zeros = quantize(x)
    assert zeros.tolist() == [128]
    assert codes.tolist() == [255, 0, 128, 128]  # 127.5 goes to 128, and is clipped
    assert np.isclose(scales[0] * 127.5, largest, rtol=1e-6)


def test_zero_is_exact_and_rows_of_one_sign_have_every_code(level):
    x = np.random.default_rng(6).uniform(0.5, 1.0, (14, 40)).astype(np.float32)
    x[:, 7] = 0
    x[1::2] *= -1
    codes, scales, zeros = quantize(x)
    assert zeros.tolist() == [0, 255] * 7
    codes = np.concatenate([group.reshape(10, -1, 4).transpose(1, 0, 2).reshape(-1, 40) for group in np.split(codes, [480])])
    assert (codes[:, 7] == zeros).all()
    back = (codes.astype(int) - zeros[:, None]) * scales[:, None].astype(float)
    assert (np.abs(back - x) <= scales[:, None] * 0.5001).all()
    assert np.allclose(scales * 255, np.abs(x).max(1), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", sorted(_core.ACTIVATIONS, key=str))
def test_a_bad_row_is_nan_and_stays_alone(level, bad, activation):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((14, 37)).astype(np.float32)
    packed = _core.pack_int8(weight(rng.integers(-127, 128, (35, 37))))
    scale = np.full(35, 1e-3, np.float32)
    clean = linear(x, packed, scale, activation=activation)
    x[5, 36] = bad
    out = linear(x, packed, scale, activation=activation)
    assert np.isnan(out[5]).all()
    assert np.array_equal(np.delete(out, 5, 0), np.delete(clean, 5, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_weight_row_has_no_codes(level, bad):
    w = np.ones((3, 9), np.float32)
    w[1, 4] = bad
    codes, scale = np.empty(w.shape, np.int8), np.empty(3, np.float32)
    _core.quantize_weight(w, codes, scale)
    assert np.isnan(scale).tolist() == [False, True, False]
    assert codes[1].tolist() == [0] * 9
    assert (codes[[0, 2]] == 127).all()


def test_the_deepest_sum_is_exact(level):
    x = np.ones((2, MAX_K), np.float32)
    x[1] = -1
    packed = _core.pack_int8(weight(np.full((2, MAX_K), 127)))
    out = linear(x, packed, np.full(2, 255, np.float32))  # the scales multiply to 1
    assert out.tolist() == [[np.float32(127 * 255 * MAX_K)] * 2, [np.float32(-127 * 255 * MAX_K)] * 2]


def test_a_foreign_minus_128_is_exact(level):
    packed = _core.pack_int8(weight(np.full((3, 11), -128)))
    x = np.tile(np.array([[1], [-1]], np.float32), (1, 11))
    assert linear(x, packed, np.full(3, 255, np.float32)).tolist() == [[-255.0 * 128 * 11] * 3, [255.0 * 128 * 11] * 3]


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_residual_may_be_the_output(level, activation):
    rng = np.random.default_rng(4)
    x, residual = rng.standard_normal((15, 20)).astype(np.float32), rng.standard_normal((15, 45)).astype(np.float32)
    packed, scale = _core.pack_int8(weight(rng.integers(-127, 128, (45, 20)))), np.full(45, 1e-3, np.float32)
    apart = linear(x, packed, scale, activation=activation, residual=residual)
    assert np.array_equal(linear(x, packed, scale, activation=activation, residual=residual, out=residual), apart)


def test_a_program_reads_scales_at_every_run(level):
    x = np.ones((1, 8), np.float32)
    packed, weight_scale, out = (
        _core.pack_int8(weight(np.ones((2, 8)))),
        np.ones(2, np.float32),
        np.empty((1, 2), np.float32),
    )
    codes, scales, zeros = np.empty(8, np.uint8), np.empty(1, np.float32), np.empty(1, np.int32)
    program = _core.Program()
    _core.quantize_activations(program, x, False, "tile", codes, scales, zeros)
    _core.linear_int8(program, codes, scales, zeros, 1, packed, weight_scale, out, None, None, None)
    program.run()
    first = out.copy()
    x[:] *= 2
    weight_scale[:] = 3
    program.run()
    assert np.allclose(out, 6 * first, rtol=1e-6)


def test_every_level_reads_the_same_packed_bytes():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((29, 50)).astype(np.float32)
    w, scale = rng.integers(-127, 128, (77, 50)).astype(np.int8), rng.random(77).astype(np.float32)
    packed = _core.pack_int8(weight(w), threads=2)
    answers = []
    for name in LEVELS:
        _core.set_isa(name)
        answers.append(linear(x, packed, scale))
    _core.set_isa(None)
    assert all(np.array_equal(answers[0], other) for other in answers)


@pytest.mark.parametrize("lanes", [False, True])
def test_symmetric_tiles_have_the_codes_of_lanes(level, lanes):
    x = np.random.default_rng(6).standard_normal((11, 21)).astype(np.float32) + 1
    x[3], x[7, 2] = 0, np.nan
    given = np.ascontiguousarray(x.T) if lanes else x
    codes, scales, zeros = quantize(given, "tile", lanes, symmetric=True)
    wanted, wanted_scales, _ = quantize(given, "lanes", lanes)
    np.testing.assert_array_equal(scales, wanted_scales)
    assert (zeros == 128).all()
    np.testing.assert_array_equal(codes.reshape(6, 11, 4), wanted.reshape(6, 16, 4)[:, :11])


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (2, 4), (4, 4), (3, 2)])
def test_blocks_pack_as_what_they_stand_for(level, block):
    rng, (r, c) = np.random.default_rng(7), block
    n, k = 12 * r, 8 * c
    mask = rng.random((12, 8)) < 0.4
    dense = rng.integers(-127, 128, (n, k)).astype(np.int8) * np.kron(mask, np.ones(block, np.int8))
    values = dense.reshape(12, r, 8, c).transpose(0, 2, 1, 3)[mask]
    offsets = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    index, scale = np.nonzero(mask)[1].astype(np.int32), rng.random(n).astype(np.float32)
    blocks = _core.Weight(np.ascontiguousarray(values), (n, k), scale, offsets, index)
    x = rng.standard_normal((14, k)).astype(np.float32)
    packed = _core.pack_int8(blocks, threads=2)
    assert packed.nbytes == _core.packed_nbytes(_core.pack_int8, blocks)
    np.testing.assert_array_equal(linear(x, packed, scale), linear(x, _core.pack_int8(weight(dense, scale)), scale))


def test_pack_refuses_what_it_cannot_pack():
    with pytest.raises(TypeError):
        _core.pack_int8(_core.Weight(np.ones((2, 2), np.float32), (2, 2)))
    offsets, index = np.array([0, 1], np.int32), np.array([0], np.int32)
    blocks = _core.Weight(np.ones((1, 1, 4), np.float32), (1, 4), None, offsets, index)
    with pytest.raises(TypeError):
        _core.pack_int8(blocks)
    with pytest.raises(TypeError):
        _core.pack_int8(None)
    with pytest.raises(ValueError, match="at most 66311 terms"):
        _core.pack_int8(weight(np.zeros((1, MAX_K + 1), np.int8)))


def test_packed_shape_and_size():
    packed = _core.pack_int8(weight(np.zeros((33, 5))))
    assert packed.shape == (33, 5)
    assert packed.nbytes == 64 * 8 + 64 * 4
    empty = _core.PackedInt8()
    assert (empty.shape, empty.nbytes) == ((0, 0), 0)
    out = linear(np.empty((3, 0), np.float32), empty, np.empty(0, np.float32))
    assert out.shape == (3, 0)


def good_linear():
    return {
        "codes": np.full(3 * 8, 128, np.uint8), "scales": np.ones(3, np.float32),
        "zeros": np.full(3, 128, np.int32), "m": 3,
        "weight": _core.pack_int8(weight(np.ones((4, 7)))), "weight_scale": np.ones(4, np.float32),
        "out": np.empty((3, 4), np.float32), "bias": None, "activation": None, "residual": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codes": np.zeros(23, np.uint8)}, ValueError),
        ({"codes": np.zeros(24, np.int8)}, TypeError),
        ({"codes": None}, TypeError),
        ({"scales": np.ones(4, np.float32)}, ValueError),
        ({"scales": np.ones(3)}, TypeError),
        ({"zeros": np.ones(4, np.int32)}, ValueError),
        ({"zeros": np.ones(3, np.float32)}, TypeError),
        ({"zeros": None}, TypeError),
        ({"m": 2}, ValueError),
        ({"m": -1}, ValueError),
        ({"weight": None}, TypeError),
        ({"weight_scale": np.ones(3, np.float32)}, ValueError),
        ({"weight_scale": None}, TypeError),
        ({"out": np.empty((4, 3), np.float32)}, ValueError),
        ({"out": np.empty((4, 3), np.float32).T}, (ValueError, BufferError)),
        ({"out": None}, TypeError),
        ({"bias": np.ones(3, np.float32)}, ValueError),
        ({"residual": np.ones((3, 5), np.float32)}, ValueError),
        ({"activation": "swish"}, ValueError),
    ],
)
def test_linear_refuses(change, error):
    program = _core.Program()
    _core.linear_int8(program, **good_linear())
    with pytest.raises(error):
        _core.linear_int8(program, **good_linear() | change)
    assert len(program) == 1


def test_outputs_must_be_writable():
    frozen = np.empty((3, 4), np.float32)
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.linear_int8(_core.Program(), **good_linear() | {"out": frozen})


@pytest.mark.parametrize(
    ("x", "lanes", "layout", "codes", "scales", "zeros", "error"),
    [
        (np.ones((3, 7)), False, "tile", 24, 3, 3, TypeError),
        (np.ones(21, np.float32), False, "tile", 24, 3, 3, ValueError),
        (np.ones((3, 7), np.float32), True, "tile", 24, 3, 3, ValueError),
        (np.ones((3, 7), np.float32), False, "lanes", 24, 3, 3, ValueError),
        (np.ones((3, 7), np.float32), False, "tile", 24, 4, 3, ValueError),
        (np.ones((3, 7), np.float32), False, "tile", 24, 3, 4, ValueError),
        (np.ones((3, 7), np.float32), False, "tile", 24, 3, None, ValueError),
        (np.ones((3, 7), np.float32), False, "rows", 24, 3, 3, ValueError),
        (None, False, "tile", 24, 3, 3, TypeError),
    ],
)
def test_quantize_activations_refuses(x, lanes, layout, codes, scales, zeros, error):
    panels = np.empty(codes, np.uint8), np.empty(scales, np.float32), None if zeros is None else np.empty(zeros, np.int32)
    with pytest.raises(error):
        _core.quantize_activations(_core.Program(), x, lanes, layout, *panels)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4, 3], []])
def test_quantize_blocks_refuses_offsets(offsets):
    values = np.ones((3, 2, 4), np.float32)
    rows = max(len(offsets) - 1, 0) * 2
    with pytest.raises(ValueError, match="row_offsets"):
        _core.quantize_blocks(values, np.array(offsets, np.int32), np.empty(values.shape, np.int8), np.empty(rows, np.float32))


def test_a_nan_in_any_block_of_a_row_counts(level):
    values = np.ones((3, 2, 4), np.float32)
    values[0, 0, 1] = np.nan
    values[1, 1, 2] = np.inf
    codes, scale = np.empty(values.shape, np.int8), np.empty(2, np.float32)
    _core.quantize_blocks(values, np.array([0, 3], np.int32), codes, scale)
    assert np.isnan(scale).all()
    assert (codes == 0).all()


def static_linear(x, stored, weight_scale, scale, zero_point, threads=1):
    codes, scales = np.empty(_core.codes_nbytes(*x.shape, "tile"), np.uint8), np.empty(len(x), np.float32)
    zeros, out = np.empty(len(x), np.int32), np.empty((len(x), len(stored)), np.float32)
    program = _core.Program()
    _core.quantize_activations(program, x, False, "tile", codes, scales, zeros, scale, zero_point)
    packed = _core.pack_int8(weight(stored, weight_scale))
    _core.linear_int8(program, codes, scales, zeros, len(x), packed, weight_scale, out, None, None, None)
    program.run(threads)
    return out


@pytest.mark.parametrize("zero_point", [0, 1, 90, 128, 255])
def test_a_product_with_a_zero_point_is_exact(level, zero_point):
    """Codes over all of 0 to 255 against extreme weights: nothing saturates on any instruction set."""
    rng = np.random.default_rng(zero_point)
    stored = rng.choice(np.array([-127, 127, 3], np.int8), (37, 517))
    q = rng.choice(np.array([0, 1, 127, 128, 254, 255]), (26, 517))
    q[0], q[1] = 0, 255
    scale = np.float32(2.0**-3)
    x = ((q - zero_point) * scale).astype(np.float32)
    got = static_linear(x, stored, np.ones(37, np.float32), float(scale), zero_point)
    want = (q - zero_point) @ stored.astype(np.int64).T
    np.testing.assert_array_equal(got, want.astype(np.float32) * scale)


def test_static_scales_are_refused_out_of_range():
    x, codes, scales = np.ones((4, 8), np.float32), np.empty(32, np.uint8), np.empty(4, np.float32)
    zeros = np.empty(4, np.int32)
    for bad in ((0.0, 128), (float("nan"), 128), (-1.0, 3), (1e38, 3), (1.0, -1), (1.0, 256)):
        with pytest.raises(ValueError, match="static"):
            _core.quantize_activations(_core.Program(), x, False, "tile", codes, scales, zeros, *bad)
    with pytest.raises(ValueError, match="tile"):
        _core.quantize_activations(_core.Program(), x, False, "lanes", np.empty(128, np.uint8), scales, zeros, 1.0, 3)
