"""What the vision family's border refuses, and what its kernels promise beyond the cases."""

import numpy as np
import pytest

from gristmill import _core
from kernels.harness import same_bits

ONE = ((1, 1), (1, 1), (1, 1), (0, 0))
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))


def scratch(image=(5, 5), out=(5, 5), geometry=THREE, channels=4, group=1, threads=1):
    return np.empty(_core.convolution_scratch(image, out, geometry, channels, group, threads), np.uint8)


def packed(filters=6, depth=36, group=1, taps=9):
    values = np.ones((filters, depth), np.float32)
    return _core.ConvolutionPacker(group, taps)(_core.Weight(values, values.shape))


def arguments(**changes):
    given = {
        "x": np.zeros((2, 4, 5, 5), np.float32),
        "weight": packed(),
        "out": np.zeros((2, 6, 5, 5), np.float32),
        "geometry": THREE,
        "group": 1,
        "bias": None,
        "addend": None,
        "low": 0.0,
        "high": 1.0,
        "activation": None,
        "scratch": scratch(),
    }
    return tuple(value() if callable(value) else value for value in (given | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.zeros((2, 4, 5, 5), np.float64)},
        {"x": np.zeros((4, 5, 5), np.float32)},
        {"x": np.zeros((2, 4, 5, 5), np.float32)[:, :, :, ::-1]},
        {"x": np.zeros((2, 3, 5, 5), np.float32)},
        {"out": np.zeros((1, 6, 5, 5), np.float32)},
        {"out": np.zeros((2, 7, 5, 5), np.float32)},
        {"weight": lambda: packed(taps=4)},
        {"weight": lambda: packed(group=2)},
        {"weight": np.zeros((6, 4, 3, 3), np.float32)},
        {"weight": np.zeros((6, 1, 2, 3), np.float32), "group": 4},
        {"group": 0},
        {"group": 3},
        {"bias": np.zeros(5, np.float32)},
        {"addend": np.zeros((2, 6, 5, 4), np.float32)},
        {"activation": "sine"},
        {"scratch": np.empty(16, np.uint8)},
        {"geometry": ((3, 3), (0, 1), (1, 1), (1, 1))},
        {"geometry": ((3, 3), (1, 1), (1, 0), (1, 1))},
        {"geometry": ((3, 3), (1, 1), (1, 1), (-1, 1))},
        {"geometry": ((3, 3), (1, 1), (1, 5000), (1, 1))},
        {"geometry": ((1, 1), (1, 1), (1, 1), (1, 70000))},
    ],
)
def test_convolution_refuses(changes):
    with pytest.raises((TypeError, ValueError, BufferError)):
        _core.convolution(_core.Program(), *arguments(**changes))


def test_convolution_refuses_read_only_and_overlapping_outputs():
    out = np.zeros((2, 6, 5, 5), np.float32)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _core.convolution(_core.Program(), *arguments(out=out))
    both = np.zeros(2 * 6 * 25, np.float32)
    x, out = both[: 2 * 4 * 25].reshape(2, 4, 5, 5), both.reshape(2, 6, 5, 5)
    with pytest.raises(ValueError, match="overlap"):
        _core.convolution(_core.Program(), *arguments(x=x, out=out))


def test_packed_weights_are_stale_after_a_change_of_instruction_set():
    weight = packed()
    try:
        _core.set_isa("scalar")
        with pytest.raises(RuntimeError, match="instruction set"):
            _core.convolution(_core.Program(), *arguments(weight=weight))
    finally:
        _core.set_isa(None)


def test_packers_are_equal_where_they_pack_alike():
    assert _core.ConvolutionPacker(2, 9) == _core.ConvolutionPacker(2, 9)
    assert len({_core.ConvolutionPacker(2, 9), _core.ConvolutionPacker(2, 9), _core.ConvolutionPacker(9, 2)}) == 2
    for group, taps in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            _core.ConvolutionPacker(group, taps)
    weight = _core.Weight(np.zeros((6, 10), np.float32), (6, 10))
    for packer in (_core.ConvolutionPacker(4, 1), _core.ConvolutionPacker(1, 3)):
        with pytest.raises(ValueError, match="groups"):
            packer(weight)
    assert _core.packed_nbytes(_core.ConvolutionPacker(2, 5), weight) == 240


def test_pool_and_planes_refuse():
    x, out, program = np.zeros((1, 2, 5, 5), np.float32), np.zeros((1, 2, 5, 5), np.float32), _core.Program()
    with pytest.raises(ValueError, match="overlap"):
        _core.pool(program, x, x, THREE, False, False, (1, 1), scratch(channels=0))
    with pytest.raises(ValueError, match="shape"):
        _core.pool(program, x, np.zeros((1, 3, 5, 5), np.float32), THREE, False, False, (1, 1), scratch(channels=0))
    with pytest.raises(ValueError, match="scratch"):
        _core.pool(program, x, out, THREE, False, False, (1, 1), np.empty(8, np.uint8))
    with pytest.raises(ValueError, match="shape"):
        _core.plane_means(program, x.reshape(2, 25), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="shape"):
        _core.scale_channels(
            program, x.reshape(1, 2, 25), np.zeros(3, np.float32), np.zeros(2, np.float32), out.reshape(1, 2, 25)
        )
    assert len(program) == 0


def test_windows_that_meet_only_padding():
    x = np.ones((1, 1, 2, 2), np.float32)
    geometry, out = ((2, 2), (3, 3), (1, 1), (3, 3)), np.empty((1, 1, 3, 3), np.float32)
    memory = scratch((2, 2), (3, 3), geometry, 0)
    expected = {False: -np.inf, True: 0.0}
    for average, outside in expected.items():
        program = _core.Program()
        _core.pool(program, x, out, geometry, average, False, (3, 3), memory)
        program.run()
        assert out[0, 0, 1, 1] == 1
        assert out[0, 0, 0, 0] == outside


def test_nan_passes_the_clip_and_means_may_work_in_place():
    x = np.array([[np.nan, 1, -1, 9]], np.float32).reshape(1, 1, 1, 4)
    out = np.empty_like(x)
    weight = packed(1, 1, 1, 1)
    program = _core.Program()
    memory = scratch((1, 4), (1, 4), ONE, 1)
    _core.convolution(program, x, weight, out, ONE, 1, None, None, 0.0, 6.0, None, memory)
    flat = x.reshape(1, 1, 4)
    _core.scale_channels(program, flat, np.array([2], np.float32), np.array([1], np.float32), flat)
    program.run()
    np.testing.assert_array_equal(out.reshape(-1), np.array([np.nan, 1, 0, 6], np.float32))
    np.testing.assert_array_equal(flat.reshape(-1), np.array([np.nan, 3, -1, 19], np.float32))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_less_scratch_means_fewer_threads_and_the_same_bits(threads):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 9, 8), dtype=np.float32), rng.standard_normal((70, 45), dtype=np.float32)
    results = []
    for room in (1, threads):
        out = np.empty((2, 70, 9, 8), np.float32)
        program = _core.Program()
        source = _core.ConvolutionPacker(1, 9)(_core.Weight(weight, weight.shape))
        memory = scratch((9, 8), (9, 8), THREE, 5, 1, room)
        _core.convolution(program, x, source, out, THREE, 1, None, None, -np.inf, np.inf, None, memory)
        program.run(threads)
        results.append(out)
    assert same_bits(*results)
