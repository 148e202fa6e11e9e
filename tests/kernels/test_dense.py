"""What the dense products refuse, and what holds beyond one call: the same bits for any batch, packing or threads."""

import numpy as np
import pytest

from gristmill import _core
from kernels.cases import dense as cases

LEVELS = ("scalar", "avx2", "avx512")
M, N, K = 26, 70, 300


@pytest.fixture
def drawn():
    return cases.draw(np.random.default_rng(3), (M, N, K, 3), "float32")


def scratch_for(m=M, n=N, k=K, threads=1):
    return np.empty(_core.linear_scratch(m, n, k, threads), np.uint8)


def linear(x, weight, bias=None, activation=None, residual=None, threads=1):
    n, k = weight.shape
    out = np.full((len(x), n), np.nan, np.float32)
    program = _core.Program()
    _core.linear(program, x, weight, out, bias, activation, residual, scratch_for(len(x), n, k, threads))
    program.run(threads)
    return out


def grad_input(dy, weight, threads=1):
    n, k = weight.shape
    dx = np.full((len(dy), k), np.nan, np.float32)
    program = _core.Program()
    _core.linear_grad_input(program, dy, weight, dx, scratch_for(len(dy), n, k, threads))
    program.run(threads)
    return dx


def grad_weight(dy, x, weight, shape):
    grad = np.full(shape, np.nan, np.float32)
    program = _core.Program()
    _core.linear_grad_weight(program, dy, x, weight, grad, scratch_for(len(x), *weight.shape))
    program.run()
    return grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", cases.FORMS)
def test_packed_and_in_place_agree_to_the_bit(level, form):
    _core.set_isa(level)
    inputs = cases.draw(np.random.default_rng(1), (M, 72, K, 3, 4, 3), form)
    weight = cases.weight_of(inputs)
    packed = _core.pack_dense(weight, 2)
    assert packed.shape == (72, K)
    assert packed.nbytes >= 4 * 72 * K
    arguments = inputs["bias"], inputs["activation"]
    np.testing.assert_array_equal(linear(inputs["x"], packed, *arguments), linear(inputs["x"], weight, *arguments))


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_does_not_depend_on_its_batch(level, drawn):
    _core.set_isa(level)
    x, bias, weight = drawn["x"], drawn["bias"], cases.weight_of(drawn)
    together = linear(x, _core.pack_dense(weight), bias, "gelu")
    alone = [linear(x[i : i + 1], _core.pack_dense(weight), bias, "gelu")[0] for i in range(M)]
    np.testing.assert_array_equal(together, np.array(alone))
    together = grad_input(drawn["dy"], weight)
    np.testing.assert_array_equal(together, np.array([grad_input(drawn["dy"][i : i + 1], weight)[0] for i in range(M)]))


def linear_bf16(x, weight, bias=None, activation=None, threads=1):
    out = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    program = _core.Program()
    _core.linear_bf16(program, x, weight, out, bias, activation, None, scratch_for(len(x), *weight.shape, threads))
    program.run(threads)
    return out


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_has_the_same_bits_for_any_batch_packing_and_threads(level, drawn):
    _core.set_isa(level)
    x, bias, weight = drawn["x"], drawn["bias"], cases.weight_of(drawn)
    packed = _core.pack_bf16(weight)
    assert packed.nbytes == _core.packed_nbytes(_core.pack_bf16, weight) < 0.6 * _core.packed_nbytes(_core.pack_dense, weight)
    together = linear_bf16(x, packed, bias, "gelu")
    np.testing.assert_array_equal(linear_bf16(x, packed, bias, "gelu", threads=3), together)
    np.testing.assert_array_equal(linear_bf16(x, weight, bias, "gelu"), together)
    alone = [linear_bf16(x[i : i + 1], packed, bias, "gelu")[0] for i in range(M)]
    np.testing.assert_array_equal(together, np.array(alone))


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_values_are_read_in_every_way(level, drawn):
    """A product whose operands are bf16 already is that of fp32 but for the order of its sums."""
    _core.set_isa(level)
    x, values = cases.as_bf16(drawn["x"]), cases.as_bf16(drawn["values"])
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored, wide = _core.Weight(halves, (N, K)), _core.Weight(values, (N, K))
    np.testing.assert_array_equal(linear(x, stored), linear(x, wide))
    np.testing.assert_array_equal(linear(x, _core.pack_dense(stored)), linear(x, wide))
    np.testing.assert_array_equal(grad_input(drawn["dy"], stored), grad_input(drawn["dy"], wide))
    got = linear_bf16(x, _core.pack_bf16(stored))
    np.testing.assert_array_equal(got, linear_bf16(x, wide))
    np.testing.assert_allclose(got, linear(x, wide), rtol=0, atol=1e-4)
    for array in (stored, wide):
        error = TypeError if array is stored else ValueError
        with pytest.raises(error, match=r"bf16|grad"):
            grad_weight(drawn["dy"], x, array, (N, K + 1))
    with pytest.raises(TypeError, match="bf16"):
        linear_bf16(x, stored)


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_rounds_half_to_even_and_keeps_nan_and_infinity(level):
    _core.set_isa(level)
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 3.4e38, np.inf, -np.inf, np.nan], np.float32)
    eye = _core.pack_bf16(_core.Weight(np.ones((1, 1), np.float32), (1, 1)))
    got = linear_bf16(x.reshape(-1, 1), eye)[:, 0]
    np.testing.assert_array_equal(got, np.array([1, 1 + 2**-6, 1 + 2**-7, -1, np.inf, np.inf, -np.inf, np.nan], np.float32))


def test_bf16_is_there_where_its_instruction_is():
    assert _core.has_bf16() == (_core.slots()["gemm_bf16"][0] == "avx512bf16")
    _core.set_isa("avx2")
    assert not _core.has_bf16()


def test_packed_forms_are_not_mixed_up(drawn):
    weight = cases.weight_of(drawn)
    with pytest.raises(TypeError, match="pack_bf16"):
        linear(drawn["x"], _core.pack_bf16(weight))
    with pytest.raises(TypeError, match="pack_bf16"):
        linear_bf16(drawn["x"], _core.pack_dense(weight))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 12, 40])
def test_more_threads_than_scratch_change_nothing(level, m):
    _core.set_isa(level)
    inputs = cases.draw(np.random.default_rng(2), (m, N, K, 0), "float32")
    wanted = linear(inputs["x"], cases.weight_of(inputs))
    out = np.empty_like(wanted)
    program = _core.Program()
    _core.linear(program, inputs["x"], cases.weight_of(inputs), out, None, None, None, scratch_for(m))
    program.run(4)
    np.testing.assert_array_equal(out, wanted)


def test_a_weight_is_read_at_every_run(drawn):
    values = drawn["values"].copy()
    weight = _core.Weight(values, (N, K))
    out = np.empty((M, N), np.float32)
    program = _core.Program()
    _core.linear(program, drawn["x"], weight, out, None, None, None, scratch_for())
    program.run()
    before = out.copy()
    values *= 2
    program.run()
    np.testing.assert_array_equal(out, 2 * before)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_and_infinity_stay_in_their_row_and_column(level, drawn):
    _core.set_isa(level)
    x, values = drawn["x"].copy(), drawn["values"].copy()
    x[7, 100], values[65, 20] = np.nan, np.inf
    out = linear(x, _core.pack_dense(_core.Weight(values, (N, K))), None, "relu")
    assert np.isnan(out[7]).all(), "relu keeps NaN"
    rest = np.delete(np.delete(out, 7, 0), 65, 1)
    assert np.isfinite(rest).all()
    column = np.delete(out[:, 65], 7)
    np.testing.assert_array_equal(column, np.where(np.delete(x[:, 20], 7) > 0, np.inf, 0).astype(np.float32))


@pytest.mark.parametrize("level", LEVELS)
def test_infinity_times_a_pruned_weight_is_nan_as_in_the_dense_matrix(level):
    _core.set_isa(level)
    row_offsets, index = np.array([0, 1], np.int32), np.array([1], np.int32)
    weight = _core.Weight(np.ones((1, 1, 4), np.float32), (1, 8), None, row_offsets, index)
    x = np.ones((2, 8), np.float32)
    x[1, 0] = np.inf
    out = linear(x, weight)
    assert out[0, 0] == 4
    assert np.isnan(out[1, 0])


def test_gradients_agree_with_finite_differences():
    """The loss is linear in the weight, so that central differences in float64 are exact."""
    rng = np.random.default_rng(5)
    inputs = cases.draw(rng, (3, 8, 12, 2, 4, 0), "blocks_float32")
    weight, x, dy = cases.weight_of(inputs), inputs["x"].astype(np.float64), inputs["dy"].astype(np.float64)
    got = grad_weight(inputs["dy"], inputs["x"], weight, inputs["values"].shape)
    for place in np.ndindex(inputs["values"].shape):
        losses = []
        for step in (0.5, -0.5):
            values = inputs["values"].astype(np.float64)
            values[place] += step
            losses.append((dy * (x @ cases.place(inputs, values).T)).sum())
        assert abs(losses[0] - losses[1] - got[place]) < 1e-5


def test_empty_sums_are_zero(drawn):
    weight = cases.weight_of(drawn)
    nothing = np.empty((0, K), np.float32), np.empty((0, N), np.float32)
    assert (grad_weight(nothing[1], nothing[0], weight, (N, K)) == 0).all()
    narrow = _core.Weight(np.empty((N, 0), np.float32), (N, 0))
    out = linear(np.empty((M, 0), np.float32), narrow, drawn["bias"])
    np.testing.assert_array_equal(out, np.broadcast_to(drawn["bias"], (M, N)))


def bad_calls():
    """(what is wrong, changes of the arguments, exception)"""
    f = np.float32
    locked = np.empty((M, N), f)
    locked.flags.writeable = False
    return [
        ("x has another depth", {"x": np.empty((M, K + 1), f)}, ValueError),
        ("x is float64", {"x": np.empty((M, K))}, TypeError),
        ("x is strided", {"x": np.empty((M, 2 * K), f)[:, ::2]}, (ValueError, BufferError)),
        ("out has fewer rows", {"out": np.empty((M - 1, N), f)}, ValueError),
        ("out is read-only", {"out": locked}, (ValueError, BufferError)),
        ("bias is short", {"bias": np.empty(N - 1, f)}, ValueError),
        ("residual is transposed", {"residual": np.empty((N, M), f)}, ValueError),
        ("activation is unknown", {"activation": "swish"}, ValueError),
        ("weight is an array", {"weight": np.empty((N, K), f)}, TypeError),
        ("scratch is short", {"scratch": scratch_for()[:-1]}, ValueError),
        ("scratch is float", {"scratch": np.empty(1 << 20, f)}, TypeError),
    ]


@pytest.mark.parametrize(("changes", "error"), [row[1:] for row in bad_calls()], ids=[row[0] for row in bad_calls()])
def test_linear_refuses(drawn, changes, error):
    out = np.empty((M, N), np.float32)
    good = {"x": drawn["x"], "weight": cases.weight_of(drawn), "out": out, "bias": None}
    good |= {"activation": None, "residual": None, "scratch": scratch_for()}
    program = _core.Program()
    with pytest.raises(error):
        _core.linear(program, *{**good, **changes}.values())
    assert len(program) == 0


def test_linear_refuses_overlapping_arrays(drawn):
    out = np.empty((M, N), np.float32)
    with pytest.raises(ValueError, match="overlap"):
        _core.linear(_core.Program(), drawn["x"], cases.weight_of(drawn), out, None, None, out, scratch_for())
    square = np.empty((N, N), np.float32)
    weight = _core.Weight(square.copy(), (N, N))
    with pytest.raises(ValueError, match="overlap"):
        _core.linear_grad_input(_core.Program(), square, weight, square, scratch_for(N, N, N))


@pytest.mark.parametrize("form", cases.FORMS)
def test_grad_weight_refuses_another_form(form):
    inputs = cases.draw(np.random.default_rng(0), (M, 72, K, 3, 4, 0), form)
    wrong = np.empty((1, *cases.grad_shape(inputs)), np.float32)
    with pytest.raises(ValueError, match="grad"):
        _core.linear_grad_weight(
            _core.Program(), inputs["dy"], inputs["x"], cases.weight_of(inputs), wrong, scratch_for(M, 72, K)
        )


def test_packed_weights_are_refused_under_another_instruction_set(drawn):
    packed = _core.pack_dense(cases.weight_of(drawn))
    _core.set_isa("scalar")
    with pytest.raises(RuntimeError, match="instruction set"):
        linear(drawn["x"], packed)


def test_scratch_is_bounded():
    """It grows with the threads, and for one of them no further than what fits in L2."""
    assert _core.linear_scratch(M, N, K, 4) == 4 * _core.linear_scratch(M, N, K, 1)
    assert _core.linear_scratch(4096, 4096, 4096, 1) < 1 << 20
    with pytest.raises(ValueError, match="negative"):
        _core.linear_scratch(-1, N, K, 1)
    with pytest.raises(TypeError, match="pack_dense"):
        _core.PackedDense()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(26, 70, 301), (1, 1, 1), (5, 33, 2), (700, 64, 35), (0, 3, 4), (3, 0, 4), (4, 3, 0)])
def test_panels_of_the_second_operand_change_no_bit(level, bf16, m, n, k):
    _core.set_isa(level)
    rng = np.random.default_rng(5)
    x, dy, values = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (m, n), (n, k)))
    weight, kind = _core.Weight(values, (n, k)), "_bf16" * bf16

    def products(packed, threads):
        program, scratch = _core.Program(), scratch_for(m, n, k, threads)
        made = [np.full(shape, np.nan, np.float32) for shape in ((m, n), (m, k), (n, k))]
        panels = [
            np.full(_core.panels_nbytes(d, c, bf16), 255, np.uint8) if packed else None for d, c in ((k, n), (n, k), (m, k))
        ]
        getattr(_core, "linear" + kind)(program, x, weight, made[0], None, None, None, scratch, panels[0])
        getattr(_core, "linear_grad_input" + kind)(program, dy, weight, made[1], scratch, panels[1])
        getattr(_core, "linear_grad_weight" + kind)(program, dy, x, weight, made[2], scratch, panels[2])
        program.run(threads)
        return made

    wanted = products(False, 1)
    for threads in (1, 2, 3):
        for got, want in zip(products(True, threads), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_panels_that_do_not_fit(drawn):
    x, dy = drawn["x"], drawn["dy"]
    weight = _core.Weight(np.zeros((N, K), np.float32), (N, K))
    dx, scratch = np.zeros((M, K), np.float32), scratch_for()
    need = _core.panels_nbytes(N, K, False)
    with pytest.raises(ValueError, match=r"panels: .* needed"):
        _core.linear_grad_input(_core.Program(), dy, weight, dx, scratch, np.zeros(need - 1, np.uint8))
    whole = np.zeros(max(need, dx.nbytes), np.uint8)
    inside = whole[: dx.nbytes].view(np.float32).reshape(M, K)
    with pytest.raises(ValueError, match="overlap"):
        _core.linear_grad_input(_core.Program(), dy, weight, inside, scratch, whole)
    out, packed = np.zeros((M, N), np.float32), _core.pack_dense(weight)
    with pytest.raises(TypeError, match="packed already"):
        _core.linear(
            _core.Program(), x, packed, out, None, None, None, scratch, np.zeros(_core.panels_nbytes(K, N, False), np.uint8)
        )
    with pytest.raises(ValueError, match="negative"):
        _core.panels_nbytes(-1, 3, False)
