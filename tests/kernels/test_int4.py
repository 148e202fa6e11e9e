"""The int4 family beyond its cases: what is refused, the ends of every range, the bytes that are promised."""

import numpy as np
import pytest

from gristmill import _core

LEVELS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


def int4(codes, scale=None, group=32):
    """An Int4Weight of codes [n, k]."""
    n, k = np.shape(codes)
    padded = np.zeros((n, -(-k // 8) * 8), np.int64)
    padded[:, :k] = np.asarray(codes) + 8
    words = (padded.reshape(n, padded.shape[1] // 8, 8) << 4 * np.arange(8)).sum(axis=2).astype(np.uint32).view(np.int32)
    scale = np.ones((n, -(-k // group)), np.float16) if scale is None else scale
    return _core.Int4Weight(words, (n, k), scale, group)


def panels(m, k, group):
    count = m * -(-k // group)
    return np.empty(m * -(-k // 8) * 8, np.int8), np.empty(count, np.float32), np.empty(count, np.int32)


def multiply(x, weight, group):
    out = np.empty((len(x), weight.shape[0]), np.float32)
    made = panels(*x.shape, group)
    program = _core.Program()
    _core.quantize_groups(program, x, group, *made)
    _core.linear_int4(program, *made, len(x), _core.pack_int4(weight), None, out, None, None, None)
    program.run()
    return out


@pytest.mark.parametrize("group", [32, 128, 4096, 131072])
@pytest.mark.parametrize("code", [-8, 7])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_overflow(level, group, code, sign):
    k = min(2 * group, 140000)
    weight = int4(np.full((2, k), code), group=group)
    for rows in (1, 2, 3):
        out = multiply(np.full((rows, k), sign * 127.0, np.float32), weight, group)
        np.testing.assert_allclose(out, float(sign * 127 * code * k), rtol=1e-6)


def test_a_group_that_is_not_finite_makes_its_row_nan(level):
    x = np.ones((4, 70), np.float32)
    x[1, 3], x[2, 69] = np.inf, np.nan
    out = multiply(x, int4(np.full((5, 70), 3)), 32)
    assert np.isnan(out[[1, 2]]).all()
    np.testing.assert_allclose(out[[0, 3]], 210, rtol=1e-6)


@pytest.mark.parametrize("level_of_scales", ["scalar", "avx2", "avx512"])
def test_every_half_is_expanded_exactly(level_of_scales):
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    weight = int4(np.full((len(halves), 8), -7), halves[:, None], 8)
    out = np.empty((1, len(halves), 8), np.float32)
    _core.set_isa(level_of_scales)
    try:
        program = _core.Program()
        _core.gather(program, weight, np.arange(len(halves)), out)
        program.run()
    finally:
        _core.set_isa(None)
    np.testing.assert_array_equal(out[0, :, 3], -7 * halves.astype(np.float32))


def test_a_residual_may_be_the_output(level):
    x, weight = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32), int4(np.full((7, 40), 2))
    made, out = panels(9, 40, 32), np.full((9, 7), 5, np.float32)
    program = _core.Program()
    _core.quantize_groups(program, x, 32, *made)
    _core.linear_int4(program, *made, 9, _core.pack_int4(weight), None, out, None, None, out)
    program.run()
    np.testing.assert_allclose(out, multiply(x, weight, 32) + 5, rtol=1e-6)


def test_packing_takes_the_bytes_it_said():
    for n, k, group in ((1, 1, 8), (33, 70, 32), (64, 256, 128), (0, 8, 8), (5, 0, 8)):
        weight = int4(np.zeros((n, k), int), group=group)
        packed = _core.pack_int4(weight, 2)
        assert packed.nbytes == _core.packed_nbytes(_core.pack_int4, weight)
        assert packed.nbytes == -(-n // 32) * 32 * (-(-k // 8) * 4 + -(-k // group) * 2)
        assert (packed.shape, packed.group) == ((n, k), group)


WORDS, SCALE = np.zeros((3, 5), np.int32), np.ones((3, 2), np.float16)


@pytest.mark.parametrize(
    "arguments",
    [
        (WORDS, (3, 41), SCALE, 32),
        (WORDS, (4, 40), SCALE, 32),
        (WORDS.astype(np.int64), (3, 40), SCALE, 32),
        (WORDS, (3, 40), SCALE[:, :1], 32),
        (WORDS, (3, 40), SCALE.astype(np.float64), 32),
        (WORDS, (3, 40), SCALE, 20),
        (WORDS, (3, 40), SCALE, 0),
        (WORDS, (3, 40), SCALE, -32),
        (WORDS, (3, 40), np.ones((3, 1), np.float16), 1 << 18),
        (None, (3, 40), SCALE, 32),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(arguments):
    with pytest.raises((ValueError, TypeError)):
        _core.Int4Weight(*arguments)


def test_arguments_that_do_not_fit_are_refused():
    weight = _core.Int4Weight(WORDS, (3, 40), SCALE, 32)
    x, out, made = np.zeros((2, 40), np.float32), np.zeros((2, 3), np.float32), panels(2, 40, 32)
    packed, program = _core.pack_int4(weight), _core.Program()
    for bad in (panels(2, 48, 32), panels(1, 40, 32), panels(2, 40, 8)):
        with pytest.raises(ValueError, match="expected shape"):
            _core.quantize_groups(program, x, 32, *bad)
        with pytest.raises(ValueError, match="expected shape"):
            _core.linear_int4(program, *bad, 2, packed, None, out, None, None, None)
    with pytest.raises(ValueError, match="multiple of 8"):
        _core.quantize_groups(program, x, 12, *made)
    with pytest.raises(ValueError, match="gain"):
        _core.linear_int4(program, *made, 2, packed, np.ones(2, np.float32), out, None, None, None)
    with pytest.raises(ValueError, match="rows of 41"):
        _core.lookups(program, np.zeros((2, 41), np.float32), weight, np.zeros(2, np.int64))
    with pytest.raises(TypeError):
        _core.pack_int4(_core.Weight(np.zeros((2, 2), np.float32), (2, 2)))
    assert len(program) == 0
