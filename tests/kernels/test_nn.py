"""The nn family beyond its cases: against torch's figures, special values, in-place calls, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from gristmill import _core

LEVELS = ("scalar", "avx2", "avx512")
NAN, INF = np.nan, np.inf


@pytest.fixture(params=LEVELS)
def level(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parents[1] / "fixtures" / "nn.npz"))


def f32(values):
    return np.array(values, np.float32)


def run(function, *arguments, threads=1):
    program = _core.Program()
    function(program, *arguments)
    program.run(threads)


def result(function, *arguments, shape=(), threads=1):
    """Run a function whose last argument is its output."""
    out = np.full(shape, 7, np.float32)
    run(function, *arguments, out, threads=threads)
    return out


# ---- torch ----

CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # sums of 37 terms of size 3: 40 EPS of their magnitudes


@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu"])
def test_activations_match_torch(level, golden, kind):
    x, dy = golden["x"], golden["dy"]
    np.testing.assert_allclose(result(_core.activate, kind, x, shape=x.shape), golden[kind], **CLOSE)
    np.testing.assert_allclose(result(_core.activate_grad, kind, dy, x, shape=x.shape), golden[f"{kind}.grad.x"], **CLOSE)


def test_layer_norm_matches_torch(level, golden):
    x, dy, gamma, beta = (golden[name] for name in ("x", "dy", "gamma", "beta"))
    np.testing.assert_allclose(result(_core.layer_norm, x, gamma, beta, 1e-5, shape=x.shape), golden["layer_norm"], **CLOSE)
    dx, dgamma, dbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(beta)
    run(_core.layer_norm_grad, dy, x, gamma, 1e-5, dx, dgamma, dbeta)
    for name, value in {"x": dx, "gamma": dgamma, "beta": dbeta}.items():
        np.testing.assert_allclose(value, golden[f"layer_norm.grad.{name}"], **CLOSE)


def test_softmax_matches_torch(level, golden):
    x, dy = golden["x"], golden["dy"]
    y = result(_core.softmax, x, shape=x.shape)
    np.testing.assert_allclose(y, golden["softmax"], **CLOSE)
    np.testing.assert_allclose(result(_core.softmax_grad, dy, y, shape=x.shape), golden["softmax.grad.x"], **CLOSE)


def test_losses_match_torch(level, golden):
    x, target, labels, dloss = (golden[name] for name in ("x", "target", "labels", "dloss"))
    calls = {
        "cross_entropy": (_core.cross_entropy, _core.cross_entropy_grad, (x, labels)),
        "mean_squared_error": (_core.mean_squared_error, _core.mean_squared_error_grad, (x, target)),
        "distillation": (_core.distillation, _core.distillation_grad, (x, target, labels, 2.5, 0.6)),
    }
    for name, (loss, grad, arguments) in calls.items():
        np.testing.assert_allclose(result(loss, *arguments), golden[name], **CLOSE)
        np.testing.assert_allclose(result(grad, dloss, *arguments, shape=x.shape), golden[f"{name}.grad.x"], **CLOSE)


# ---- special values ----


def test_labels_outside_give_nan(level):
    logits = f32(np.random.default_rng(0).standard_normal((5, 3)))
    for wrong in (-1, 3, 2**62, -(2**63)):
        labels = np.array([0, 1, wrong, 2, 0])
        assert np.isnan(result(_core.cross_entropy, logits, labels))
        assert np.isnan(result(_core.distillation, logits, logits, labels, 2.0, 0.5))
        for grad in (
            result(_core.cross_entropy_grad, f32(1), logits, labels, shape=(5, 3)),
            result(_core.distillation_grad, f32(1), logits, logits, labels, 2.0, 0.5, shape=(5, 3)),
            result(_core.distillation_grad, f32(1), logits, logits, labels, 2.0, 0.0, shape=(5, 3)),
        ):
            assert np.array_equal(np.isnan(grad).any(1), [False, False, True, False, False])
            assert np.isnan(grad[2]).all()


def test_distillation_weights_of_zero_are_not_evaluated(level):
    rng = np.random.default_rng(1)
    logits, teacher = f32(rng.standard_normal((2, 9, 20)))
    labels, none = rng.integers(0, 20, 9), np.full(9, -1)
    assert np.isfinite(result(_core.distillation, logits, teacher, none, 2.0, 1.0))
    assert np.isfinite(result(_core.distillation_grad, f32(1), logits, teacher, none, 2.0, 1.0, shape=(9, 20))).all()
    plain = result(_core.cross_entropy, logits, labels)
    assert result(_core.distillation, logits, np.full_like(teacher, NAN), labels, 2.0, 0.0) == plain
    grad = result(_core.distillation_grad, f32(1), logits, np.full_like(teacher, NAN), labels, 2.0, 0.0, shape=(9, 20))
    assert np.array_equal(grad, result(_core.cross_entropy_grad, f32(1), logits, labels, shape=(9, 20)))


def test_excluded_classes(level):
    labels = np.array([1])
    student, teacher = f32([[1, 2, 3]]), f32([[1, 2, -INF]])
    assert np.isfinite(result(_core.distillation, student, teacher, labels, 2.0, 1.0))
    assert result(_core.distillation, teacher, student, labels, 2.0, 1.0) == INF
    assert result(_core.distillation, teacher, teacher, labels, 2.0, 1.0) == 0
    assert result(_core.cross_entropy, teacher, np.array([2])) == INF
    assert np.isfinite(result(_core.cross_entropy_grad, f32(1), teacher, np.array([2]), shape=(1, 3))).all()


def test_softmax_of_special_rows(level):
    x = f32([[-INF, 0, -INF], [-INF, -INF, -INF], [NAN, 0, 0], [INF, 0, 0], [3e38, -3e38, 3e38]])
    y = result(_core.softmax, x, shape=x.shape)
    assert y[0].tolist() == [0, 1, 0]
    assert np.isnan(y[1:4]).all()
    assert y[4].tolist() == [0.5, 0, 0.5]


def test_derivatives_at_the_ends(level):
    x = f32([-INF, -1e30, -200, 200, 1e30, INF, NAN])
    dy = np.ones_like(x)
    for kind in ("gelu", "gelu_tanh", "silu"):
        dx = result(_core.activate_grad, kind, dy, x, shape=x.shape)
        np.testing.assert_allclose(dx[1:5], [0, 0, 1, 1], atol=1e-30)
        assert np.isnan(dx[6])
    for kind in ("tanh", "sigmoid"):
        assert result(_core.activate_grad, kind, dy, x, shape=x.shape)[:6].tolist() == [0] * 6
    relu = result(_core.activate_grad, "relu", f32([1, 1, 1, 1]), f32([-1, 0, 2, NAN]), shape=(4,))
    assert relu[:3].tolist() == [0, 0, 1]
    assert np.isnan(relu[3])


def test_gelu_is_as_close_as_it_says(level):
    from math import erfc, sqrt

    x = np.concatenate([np.linspace(-9, 9, 20001), np.linspace(5.249, 5.251, 2001), np.geomspace(1e-30, 1, 2001)]).astype(
        np.float32
    )
    x = np.concatenate([x, -x])
    exact = np.array([float(v) * 0.5 * erfc(-float(v) / sqrt(2)) for v in x])
    made = result(_core.activate, "gelu", x, shape=x.shape)
    assert np.max(np.abs(made - exact) / np.maximum(1, np.abs(x))) <= 2.5e-7
    assert not made[x <= -5.25].any()
    small = (x > 0) & (x < 1e-3)
    np.testing.assert_allclose(made[small], exact[small], rtol=3e-7)


def test_empty_means_are_nan(level):
    none, labels = np.empty((0, 4), np.float32), np.empty(0, np.int64)
    assert np.isnan(result(_core.cross_entropy, none, labels))
    assert np.isnan(result(_core.mean_squared_error, none, none))
    classless = np.empty((2, 0), np.float32)
    assert np.isnan(result(_core.cross_entropy, classless, np.zeros(2, np.int64)))
    run(_core.cross_entropy_grad, f32(1), classless, np.zeros(2, np.int64), classless)


# ---- in place, threads, run-time scalars ----


def test_in_place(level):
    rng = np.random.default_rng(2)
    x, y = f32(rng.standard_normal((2, 6, 71)))
    calls = [
        (_core.activate, ("gelu",), 1),
        (_core.activate_grad, ("gelu",), 2),
        (_core.add, (), 2),
        (_core.multiply, (), 2),
        (_core.softmax, (), 1),
        (_core.softmax_grad, (), 2),
    ]
    for function, options, count in calls:
        wanted = result(function, *options, *(x, y)[:count], shape=x.shape)
        for target in range(count):
            arrays = [x.copy(), y.copy()][:count]
            run(function, *options, *arrays, arrays[target])
            assert np.array_equal(arrays[target], wanted)
    wanted, out = result(_core.layer_norm, x, None, None, 1e-5, shape=x.shape), x.copy()
    run(_core.layer_norm, out, None, None, 1e-5, out)
    assert np.array_equal(out, wanted)


def test_bits_do_not_depend_on_threads(level):
    rng = np.random.default_rng(3)
    x, target = f32(rng.standard_normal((2, 333, 210)))
    labels, dloss = rng.integers(0, 210, 333), f32(0.5)
    calls = [
        (_core.cross_entropy, (x, labels), ()),
        (_core.distillation, (x, target, labels, 2.0, 0.5), ()),
        (_core.mean_squared_error, (x, target), ()),
        (_core.column_sum, (x,), (210,)),
        (_core.softmax, (x,), x.shape),
        (_core.transpose, (x,), (210, 333)),
        (_core.distillation_grad, (dloss, x, target, labels, 2.0, 0.5), x.shape),
    ]
    for function, arguments, shape in calls:
        alone = result(function, *arguments, shape=shape)
        for threads in (2, 3, 5, 8):
            assert np.array_equal(result(function, *arguments, shape=shape, threads=threads), alone)


def test_large_transpose(level):
    x = np.arange(1100 * 530, dtype=np.float32).reshape(1100, 530)
    assert np.array_equal(result(_core.transpose, x, shape=(530, 1100), threads=2), x.T)


def test_dloss_is_read_at_every_run():
    x, target, dloss, dx = f32([3, 5]), f32([1, 1]), f32(1), np.empty(2, np.float32)
    program = _core.Program()
    _core.mean_squared_error_grad(program, dloss, x, target, dx)
    program.run()
    assert dx.tolist() == [2, 4]
    dloss[...] = 10
    program.run()
    assert dx.tolist() == [20, 40]


def test_a_program_keeps_its_scratch():
    x, labels = f32(np.random.default_rng(4).standard_normal((1000, 10))), np.zeros(1000, np.int64)
    loss, program = np.empty((), np.float32), _core.Program()
    _core.cross_entropy(program, x, labels, loss)
    program.run()
    first = float(loss)
    blocks = [np.full(1000, NAN) for _ in range(100)]  # would land where freed scratch was
    program.run()
    assert float(loss) == first
    assert len(blocks) == 100


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (5,), (37, 5), (41, 37, 5), (0,)])
def test_sums_and_products_repeat_the_last_dimensions(level, shape, threads):
    rng = np.random.default_rng(3)
    a = rng.standard_normal((41, 37, 5) if shape != (0,) else (3, 0)).astype(np.float32)
    b = rng.standard_normal(shape).astype(np.float32)
    for kernel, wanted in ((_core.add, a + b), (_core.multiply, a * b)):
        program, out = _core.Program(), np.empty_like(a)
        kernel(program, a, b, out)
        program.run(threads)
        np.testing.assert_array_equal(out, wanted)


# ---- refusals ----

X, Y, V = np.zeros((3, 4), np.float32), np.zeros((4, 3), np.float32), np.zeros(4, np.float32)
L, S = np.zeros(3, np.int64), np.zeros((), np.float32)
READ_ONLY = np.zeros((3, 4), np.float32)
READ_ONLY.flags.writeable = False

REFUSED = [
    (ValueError, _core.activate, ("softplus", X, X)),
    (ValueError, _core.activate, ("relu", X, Y)),
    (TypeError, _core.activate, ("relu", X.astype(np.float64), X)),
    ((BufferError, ValueError), _core.activate, ("relu", Y.T, X)),
    ((BufferError, ValueError), _core.activate, ("relu", X, READ_ONLY)),
    (TypeError, _core.add, (X, None, X)),
    (TypeError, _core.activate, ("relu", X, None)),
    (ValueError, _core.add, (X, np.zeros(3, np.float32), X)),
    (ValueError, _core.add, (V, X, V)),
    (ValueError, _core.column_sum, (X, np.zeros(3, np.float32))),
    (ValueError, _core.column_sum, (V, V)),
    (ValueError, _core.layer_norm, (X, np.zeros(3, np.float32), V, 1e-5, X)),
    (ValueError, _core.layer_norm_grad, (X, X, V, 1e-5, X, V.copy(), None)),
    (ValueError, _core.softmax, (X, Y)),
    (ValueError, _core.transpose, (X, X)),
    (TypeError, _core.cross_entropy, (X, L.astype(np.int32), S)),
    (ValueError, _core.cross_entropy, (X, np.zeros(4, np.int64), S)),
    (ValueError, _core.cross_entropy, (X, L, np.zeros(1, np.float32))),
    (ValueError, _core.cross_entropy_grad, (np.zeros(1, np.float32), X, L, X)),
    (ValueError, _core.distillation, (X, Y, L, 2.0, 0.5, S)),
    (ValueError, _core.distillation, (X, X, L, 0.0, 0.5, S)),
    (ValueError, _core.distillation, (X, X, L, float("nan"), 0.5, S)),
    (ValueError, _core.distillation, (X, X, L, 2.0, 1.5, S)),
]


@pytest.mark.parametrize(("error", "function", "arguments"), REFUSED)
def test_refused(error, function, arguments):
    program = _core.Program()
    with pytest.raises(error):
        function(program, *arguments)
    assert len(program) == 0
