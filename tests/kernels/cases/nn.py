"""Cases of the nn family.

Bounds are first-order error analyses with EPS = 2^-24, the largest relative error of one float32 operation: a sum of n
terms in 16 lanes costs (n/16 + 6) EPS of the sum of magnitudes, exp(z) costs (2 + |error of z| / EPS) EPS, and results
that pass through exp lose what is below the smallest normal number (TINY).
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np

from gristmill import _core
from kernels.case import Arrays, Case, Work

EPS = 2.0**-24
TINY = 2.0**-126
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 90.0, -90.0, 88.8, -87.4, 3e37, -3e37, 1e-20], np.float32)

VECTORS = tuple((n,) for n in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1023, 9001))
MATRICES = ((0, 5), (1, 1), (5, 7), (3, 15), (4, 16), (9, 17), (8, 31), (33, 64), (17, 100), (130, 384), (70, 1000))
EMPTY_ROWS = ((3, 0),)
LONG, LARGE = (4096 * 1024,), (4096, 1024)


def run_step(inputs: Arrays, outputs: Arrays, threads: int, append) -> None:
    program = _core.Program()
    append(program, inputs, outputs)
    program.run(threads)


def runner(append):
    return partial(run_step, append=append)


def like(**outputs: str):
    """Outputs shaped as inputs: output name -> input name."""
    return lambda inputs: {out: (inputs[source].shape, np.float32) for out, source in outputs.items()}


def streams(count: int):
    """Work of `count` float32 streams of the size."""
    return lambda size: Work(bytes=4.0 * count * math.prod(size), limit="dram")


def wide(*arrays):
    return tuple(None if array is None else np.asarray(array, np.float64) for array in arrays)


# ---- elementwise ----


def normal_cdf(x):
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[np.float64])(x)


def normal_density(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_argument(x):
    return 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def gelu_tanh_derivative(x):
    x = np.clip(x, -12, 12)
    u = gelu_argument(x)
    return sigmoid(u) * (1 + x * sigmoid(-u) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x))


def silu_derivative(x):
    x = np.clip(x, -300, 300)
    return sigmoid(x) * (1 + x * sigmoid(-x))


def relu_derivative(x):
    return np.where(np.isnan(x), x, x > 0)


# kind -> value, derivative, and the errors of both in EPS: relative; absolute for derivatives, whose terms may cancel.
ACTIVATIONS = {
    "relu": (lambda x: np.where(x < 0, 0, x), relu_derivative, lambda x: 0, lambda x: 2),
    "gelu": (
        lambda x: x * normal_cdf(x),
        lambda x: normal_cdf(x) + x * normal_density(x),
        lambda x: 2,
        lambda x: 8 + (16 + x * x) * (normal_cdf(x) + np.abs(x) * normal_density(x)),
    ),
    "gelu_tanh": (
        lambda x: x * sigmoid(gelu_argument(x)),
        gelu_tanh_derivative,
        lambda x: 8 + 8 * np.abs(gelu_argument(x)),
        lambda x: 32,
    ),
    "tanh": (np.tanh, lambda x: 4 * sigmoid(2 * np.abs(x)) * sigmoid(-2 * np.abs(x)), lambda x: 4, lambda x: 8),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x), lambda x: 5, lambda x: 8),
    "silu": (lambda x: x * sigmoid(x), silu_derivative, lambda x: 6, lambda x: 16),
    None: (lambda x: x, np.ones_like, lambda x: 0, lambda x: 0),
}


ABSOLUTE = {"gelu": lambda x: 2.5e-7 * np.maximum(1, np.abs(x))}  # errors of values that relative ones do not bound


def activation_inputs(rng, size):
    x = (4 * rng.standard_normal(size)).astype(np.float32)
    if x.size >= 2 * SPECIAL.size:
        x[-SPECIAL.size :] = SPECIAL
        x[: SPECIAL.size] *= np.float32(1e-3)
    return {"x": x, "dy": rng.standard_normal(size).astype(np.float32)}


def activate_case(kind):
    value, _, error, _ = ACTIVATIONS[kind]

    def oracle(inputs):
        with np.errstate(all="ignore"):
            return {"out": value(*wide(inputs["x"]))}

    def bound(inputs, wanted):
        with np.errstate(all="ignore"):
            x = inputs["x"].astype(np.float64)
            absolute = ABSOLUTE.get(kind, np.zeros_like)(x)
            return {"out": np.abs(wanted["out"]) * EPS * error(x) + (np.abs(x) + 1) * 2 * TINY + absolute}

    return Case(
        f"activate-{kind}",
        ("activate_f32",),
        VECTORS,
        activation_inputs,
        like(out="x"),
        runner(lambda p, i, o: _core.activate(p, kind, i["x"], o["out"])),
        oracle,
        bound,
        bench=(LONG,),
        work=streams(2),
    )


def activate_grad_case(kind):
    derivative, derivative_error = ACTIVATIONS[kind][1], ACTIVATIONS[kind][3]

    def oracle(inputs):
        with np.errstate(all="ignore"):
            dy, x = wide(inputs["dy"], inputs["x"])
            return {"dx": dy * derivative(x)}

    def bound(inputs, wanted):
        with np.errstate(all="ignore"):
            dy, x = wide(inputs["dy"], inputs["x"])
            absolute = EPS * derivative_error(x) * np.maximum(1, np.abs(derivative(x)))
            return {"dx": np.abs(dy) * (absolute + 1e-34)}

    return Case(
        f"activate_grad-{kind}",
        ("activate_grad_f32",),
        VECTORS,
        activation_inputs,
        like(dx="x"),
        runner(lambda p, i, o: _core.activate_grad(p, kind, i["dy"], i["x"], o["dx"])),
        oracle,
        bound,
        bench=(LONG,),
        work=streams(3),
    )


def pair_inputs(rng, size):
    a, b = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    if a.ndim == 1 and a.size >= SPECIAL.size:
        b[-SPECIAL.size :] = SPECIAL
    return {"a": a, "b": b}


def rounded(inputs, wanted):
    with np.errstate(invalid="ignore"):
        return {name: EPS * np.abs(value) + 2.0**-149 for name, value in wanted.items()}


def elementwise(name, slot, append, oracle, count):
    def quiet(inputs):
        with np.errstate(invalid="ignore"):
            return {"out": oracle(*wide(inputs["a"], inputs["b"]))}

    return Case(
        name,
        (slot,),
        VECTORS,
        pair_inputs,
        like(out="a"),
        runner(append),
        quiet,
        rounded,
        bench=(LONG,),
        work=streams(count),
    )


FACTOR = float(np.float32(0.37))

ELEMENTWISE = [
    elementwise("add", "add_f32", lambda p, i, o: _core.add(p, i["a"], i["b"], o["out"]), lambda a, b: a + b, 3),
    elementwise("multiply", "multiply_f32", lambda p, i, o: _core.multiply(p, i["a"], i["b"], o["out"]), lambda a, b: a * b, 3),
    elementwise("scale", "scale_f32", lambda p, i, o: _core.scale(p, i["b"], FACTOR, o["out"]), lambda a, b: FACTOR * b, 2),
]

# ---- rows ----


def matrix_inputs(rng, size):
    m, n = size
    x = rng.standard_normal(size).astype(np.float32)
    x[m // 2 :] += np.float32(30)  # rows whose mean dwarfs their spread
    dy = rng.standard_normal(size).astype(np.float32)
    gamma, beta = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    return {"x": x, "dy": dy, "gamma": gamma, "beta": beta}


def column_sum_bound(x):
    return EPS * (x.shape[0] / 8 + 8) * np.abs(x).sum(0)


COLUMN_SUM = Case(
    "column_sum",
    ("column_sum_f32",),
    MATRICES + EMPTY_ROWS,
    matrix_inputs,
    lambda i: {"out": (i["x"].shape[1:], np.float32)},
    runner(lambda p, i, o: _core.column_sum(p, i["x"], o["out"])),
    lambda i: {"out": i["x"].astype(np.float64).sum(0)},
    lambda i, w: {"out": column_sum_bound(i["x"].astype(np.float64))},
    bench=(LARGE,),
    work=streams(1),
)

EPSILON = float(np.float32(1e-5))


class Normalised:
    """Layer normalisation in float64 and the errors that float32 makes of it."""

    def __init__(self, x):
        (x,) = wide(x)
        n = max(x.shape[1], 1)
        self.depth = n / 16 + 6
        mean = x.sum(1, keepdims=True) / n
        variance = ((x - mean) ** 2).sum(1, keepdims=True) / n + EPSILON
        self.inverse = 1 / np.sqrt(variance)
        self.h = (x - mean) * self.inverse
        mean_error = EPS * (self.depth + 1) * np.abs(x).sum(1, keepdims=True) / n
        self.inverse_error = 0.5 * ((self.depth + 6) * EPS + mean_error**2 / variance) + 2 * EPS
        self.h_error = self.inverse * (mean_error + EPS * np.abs(x - mean)) + np.abs(self.h) * (self.inverse_error + 2 * EPS)


def lanes_of(case):
    """The same rows side by side."""

    def append(program, i, o):
        _core.layer_norm(program, np.ascontiguousarray(i["x"].T), i["gamma"], i["beta"], EPSILON, o["out"], True)

    return replace(
        case,
        name="layer_norm-lanes",
        slots=("layer_norm_lanes_f32",),
        outputs=lambda i: {"out": (i["x"].shape[::-1], np.float32)},
        run=runner(append),
        oracle=lambda i: {"out": case.oracle(i)["out"].T},
        bound=lambda i, wanted: {"out": case.bound(i, {"out": wanted["out"].T})["out"].T},
    )


def layer_norm_case(affine):
    def parts(inputs):
        return wide(inputs["gamma"], inputs["beta"]) if affine else (1.0, 0.0)

    def oracle(inputs):
        gamma, beta = parts(inputs)
        return {"out": Normalised(inputs["x"]).h * gamma + beta}

    def bound(inputs, wanted):
        gamma, _ = parts(inputs)
        return {"out": np.abs(gamma) * Normalised(inputs["x"]).h_error + EPS * np.abs(wanted["out"])}

    def append(program, i, o):
        gamma, beta = (i["gamma"], i["beta"]) if affine else (None, None)
        _core.layer_norm(program, i["x"], gamma, beta, EPSILON, o["out"])

    return Case(
        "layer_norm" if affine else "layer_norm-plain",
        ("layer_norm_f32",),
        MATRICES + EMPTY_ROWS,
        matrix_inputs,
        like(out="x"),
        runner(append),
        oracle,
        bound,
        bench=(LARGE,),
        work=streams(2),
    )


def layer_norm_grad_oracle(inputs):
    norm = Normalised(inputs["x"])
    dy, gamma = wide(inputs["dy"], inputs["gamma"])
    n = max(dy.shape[1], 1)
    g = dy * gamma
    mean_g, mean_dot = (v.sum(1, keepdims=True) / n for v in (g, g * norm.h))
    dx = norm.inverse * (g - mean_g - norm.h * mean_dot)
    return {"dx": dx, "dgamma": (dy * norm.h).sum(0), "dbeta": dy.sum(0)}


def layer_norm_grad_bound(inputs, wanted):
    norm = Normalised(inputs["x"])
    dy, gamma = wide(inputs["dy"], inputs["gamma"])
    m, n = dy.shape
    n = max(n, 1)
    g, h = np.abs(dy * gamma), np.abs(norm.h)
    mean_g, mean_dot = (v.sum(1, keepdims=True) / n for v in (g, g * h))
    mean_g_error = EPS * (norm.depth + 2) * mean_g
    mean_dot_error = EPS * (norm.depth + 3) * mean_dot + (g * norm.h_error).sum(1, keepdims=True) / n
    inner = 4 * EPS * (g + mean_g + h * mean_dot) + mean_g_error + h * mean_dot_error + mean_dot * norm.h_error
    dx = norm.inverse * inner + np.abs(wanted["dx"]) * (norm.inverse_error + 2 * EPS)
    dgamma = EPS * (m / 2 + 6) * np.abs(dy * norm.h).sum(0) + (np.abs(dy) * norm.h_error).sum(0)
    return {"dx": dx, "dgamma": dgamma, "dbeta": column_sum_bound(dy)}


LAYER_NORM_GRAD = Case(
    "layer_norm_grad",
    ("layer_norm_grad_f32", "layer_norm_gamma_f32", "column_sum_f32"),
    MATRICES + EMPTY_ROWS,
    matrix_inputs,
    lambda i: {
        "dx": (i["x"].shape, np.float32),
        "dgamma": (i["gamma"].shape, np.float32),
        "dbeta": (i["gamma"].shape, np.float32),
    },
    runner(lambda p, i, o: _core.layer_norm_grad(p, i["dy"], i["x"], i["gamma"], EPSILON, o["dx"], o["dgamma"], o["dbeta"])),
    layer_norm_grad_oracle,
    layer_norm_grad_bound,
    bench=(LARGE,),
    work=streams(3),
)

# ---- softmax and losses ----


class Softmax:
    """softmax(factor * x) in float64 and the relative errors that float32 makes of its terms and of their sum."""

    def __init__(self, x, factor=1.0):
        (x,) = wide(x)
        with np.errstate(invalid="ignore"):
            self.z = factor * (x - x.max(1, keepdims=True))
            terms = np.exp(self.z)
            self.sum = terms.sum(1, keepdims=True)
            self.p = terms / self.sum
            self.term_error = EPS * (2 + 3 * np.where(terms == 0, 0, np.abs(self.z)))
            self.sum_error = (self.p * self.term_error).sum(1, keepdims=True) + EPS * (x.shape[1] / 16 + 6) + x.shape[1] * TINY
            self.error = self.p * (self.term_error + self.sum_error + 3 * EPS) + TINY


def logit_inputs(rng, size):
    m, n = size
    x, teacher = ((5 * rng.standard_normal(size)).astype(np.float32) for _ in range(2))
    x[0:1] += np.float32(1000)
    labels = rng.integers(0, n, m) if n else np.zeros(m, np.int64)
    if n > 1 and m > 3:
        x[1, 0] = -np.inf
        labels[1] = n - 1
        teacher[1, 0] = teacher[2, n - 1] = -np.inf
    return {"x": x, "teacher": teacher, "labels": labels.astype(np.int64), "dloss": np.array([1.5], np.float32)}


def softmax_inputs(rng, size):
    inputs = logit_inputs(rng, size)
    if size[0] > 8:
        inputs["x"][4] = -np.inf
        inputs["x"][5, size[1] // 2] = np.nan
        inputs["x"][6, size[1] - 1] = np.inf
        inputs["x"][7] = -200 * np.arange(size[1], dtype=np.float32)
    return inputs


SOFTMAX = Case(
    "softmax",
    ("softmax_f32",),
    MATRICES,
    softmax_inputs,
    like(out="x"),
    runner(lambda p, i, o: _core.softmax(p, i["x"], o["out"])),
    lambda i: {"out": Softmax(i["x"]).p},
    lambda i, w: {"out": Softmax(i["x"]).error},
    bench=(LARGE,),
    work=streams(2),
)


def softmax_grad_inputs(rng, size):
    y = Softmax(rng.standard_normal(size)).p if size[0] else np.zeros(size)
    return {"y": y.astype(np.float32), "dy": rng.standard_normal(size).astype(np.float32)}


def softmax_grad_oracle(inputs):
    dy, y = wide(inputs["dy"], inputs["y"])
    return {"dx": y * (dy - (dy * y).sum(1, keepdims=True))}


def softmax_grad_bound(inputs, wanted):
    dy, y = np.abs(inputs["dy"].astype(np.float64)), inputs["y"].astype(np.float64)
    total = (dy * y).sum(1, keepdims=True)
    return {"dx": y * (EPS * (y.shape[1] / 16 + 8) * total + 2 * EPS * (dy + total))}


SOFTMAX_GRAD = Case(
    "softmax_grad",
    ("softmax_grad_f32",),
    MATRICES,
    softmax_grad_inputs,
    like(dx="y"),
    runner(lambda p, i, o: _core.softmax_grad(p, i["dy"], i["y"], o["dx"])),
    softmax_grad_oracle,
    softmax_grad_bound,
    bench=(LARGE,),
    work=streams(3),
)


def mean(rows):
    return np.float64(np.nan) if len(rows) == 0 else rows.mean()


def one_hot(labels, shape):
    return np.equal(labels[:, None], np.arange(shape[1])).astype(np.float64)


def cross_entropy_rows(inputs):
    soft, m = Softmax(inputs["x"]), len(inputs["labels"])
    return (np.log(soft.sum[:, 0]) - soft.z[np.arange(m), inputs["labels"]]), soft.sum_error[:, 0]


def cross_entropy_bound(inputs, wanted):
    return {"loss": mean(cross_entropy_rows(inputs)[1]) + EPS * np.abs(wanted["loss"])}


CROSS_ENTROPY = Case(
    "cross_entropy",
    ("exp_sum_f32",),
    MATRICES,
    logit_inputs,
    lambda i: {"loss": ((), np.float32)},
    runner(lambda p, i, o: _core.cross_entropy(p, i["x"], i["labels"], o["loss"])),
    lambda i: {"loss": mean(cross_entropy_rows(i)[0])},
    cross_entropy_bound,
    bench=(LARGE,),
    work=streams(1),
)


def cross_entropy_grad_oracle(inputs):
    x = inputs["x"]
    return {"dx": float(inputs["dloss"][0]) / max(len(x), 1) * (Softmax(x).p - one_hot(inputs["labels"], x.shape))}


def cross_entropy_grad_bound(inputs, wanted):
    gain = abs(float(inputs["dloss"][0])) / max(len(inputs["x"]), 1)
    return {
        "dx": gain * (Softmax(inputs["x"]).error + EPS * one_hot(inputs["labels"], inputs["x"].shape))
        + 3 * EPS * np.abs(wanted["dx"])
    }


CROSS_ENTROPY_GRAD = Case(
    "cross_entropy_grad",
    ("softmax_f32",),
    MATRICES,
    logit_inputs,
    like(dx="x"),
    runner(lambda p, i, o: _core.cross_entropy_grad(p, i["dloss"].reshape(()), i["x"], i["labels"], o["dx"])),
    cross_entropy_grad_oracle,
    cross_entropy_grad_bound,
    bench=(LARGE,),
    work=streams(2),
)


def squared_inputs(rng, size):
    a, b = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    return {"a": a, "b": b, "dloss": np.array([0.75], np.float32)}


SQUARED_ERROR = Case(
    "mean_squared_error",
    ("squared_error_f32",),
    VECTORS,
    squared_inputs,
    lambda i: {"loss": ((), np.float32)},
    runner(lambda p, i, o: _core.mean_squared_error(p, i["a"], i["b"], o["loss"])),
    lambda i: {"loss": mean(np.subtract(*wide(i["a"], i["b"])) ** 2)},
    lambda i, w: {"loss": EPS * (min(i["a"].size, 4096) / 16 + 12) * w["loss"]},
    bench=(LONG,),
    work=streams(2),
)

SQUARED_ERROR_GRAD = Case(
    "mean_squared_error_grad",
    ("scaled_difference_f32",),
    VECTORS,
    squared_inputs,
    like(dx="a"),
    runner(lambda p, i, o: _core.mean_squared_error_grad(p, i["dloss"].reshape(()), i["a"], i["b"], o["dx"])),
    lambda i: {"dx": 2 * float(i["dloss"][0]) / max(i["a"].size, 1) * np.subtract(*wide(i["a"], i["b"]))},
    lambda i, w: {"dx": 4 * EPS * np.abs(w["dx"])},
    bench=(LONG,),
    work=streams(3),
)

TEMPERATURE, ALPHA = 3.0, 0.7


def divergence_rows(inputs):
    """KL(teacher || student) at TEMPERATURE by row, and its error; a class that the teacher excludes counts as 0."""
    student, teacher = (Softmax(inputs[name], 1 / TEMPERATURE) for name in ("x", "teacher"))
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.where(teacher.p == 0, 0, teacher.z - student.z)
        spread = np.where(teacher.p == 0, 0, np.abs(teacher.z) + np.abs(student.z))
        rows = (teacher.p * gap).sum(1) + np.log(student.sum / teacher.sum)[:, 0]
        terms = teacher.p * (np.abs(gap) * (teacher.term_error + 2 * EPS) + 4 * EPS * spread)
        total = np.abs(teacher.p * gap).sum(1) * (EPS * (gap.shape[1] / 16 + 6) + teacher.sum_error[:, 0])
        return rows, terms.sum(1) + total + student.sum_error[:, 0] + teacher.sum_error[:, 0]


def finite_student(rng, size):
    """Where the student excludes what the teacher expects, the loss is infinite: that is for a test of its own."""
    inputs = logit_inputs(rng, size)
    inputs["x"][np.isinf(inputs["x"])] = -50
    return inputs


def distillation_oracle(inputs):
    soft, hard = divergence_rows(inputs)[0], cross_entropy_rows(inputs)[0]
    return {"loss": mean(ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard)}


def distillation_bound(inputs, wanted):
    soft, hard = divergence_rows(inputs)[1], cross_entropy_rows(inputs)[1]
    return {"loss": mean(ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard) + EPS * np.abs(wanted["loss"])}


DISTILLATION = Case(
    "distillation",
    ("distillation_f32", "exp_sum_f32"),
    MATRICES,
    finite_student,
    lambda i: {"loss": ((), np.float32)},
    runner(lambda p, i, o: _core.distillation(p, i["x"], i["teacher"], i["labels"], TEMPERATURE, ALPHA, o["loss"])),
    distillation_oracle,
    distillation_bound,
    bench=(LARGE,),
    work=streams(2),
)


def distillation_grad_parts(inputs):
    gain = float(inputs["dloss"][0]) / max(len(inputs["x"]), 1)
    softs = (Softmax(inputs["x"], 1 / TEMPERATURE), Softmax(inputs["teacher"], 1 / TEMPERATURE), Softmax(inputs["x"]))
    return gain * ALPHA * TEMPERATURE, gain * (1 - ALPHA), *softs


def distillation_grad_oracle(inputs):
    soft, hard, student, teacher, plain = distillation_grad_parts(inputs)
    return {"dx": soft * (student.p - teacher.p) + hard * (plain.p - one_hot(inputs["labels"], inputs["x"].shape))}


def distillation_grad_bound(inputs, wanted):
    soft, hard, student, teacher, plain = distillation_grad_parts(inputs)
    hot = one_hot(inputs["labels"], inputs["x"].shape)
    rounding = 3 * EPS * (soft * (student.p + teacher.p) + hard * (plain.p + hot))
    return {"dx": soft * (student.error + teacher.error) + hard * plain.error + rounding + TINY}


DISTILLATION_GRAD = Case(
    "distillation_grad",
    ("distillation_grad_f32",),
    MATRICES,
    finite_student,
    like(dx="x"),
    runner(
        lambda p, i, o: _core.distillation_grad(
            p, i["dloss"].reshape(()), i["x"], i["teacher"], i["labels"], TEMPERATURE, ALPHA, o["dx"]
        )
    ),
    distillation_grad_oracle,
    distillation_grad_bound,
    bench=(LARGE,),
    work=streams(3),
)

TRANSPOSE = Case(
    "transpose",
    ("transpose_f32",),
    MATRICES + EMPTY_ROWS + ((16, 16), (1, 70), (200, 1), (131, 67)),
    matrix_inputs,
    lambda i: {"out": (i["x"].shape[::-1], np.float32)},
    runner(lambda p, i, o: _core.transpose(p, i["x"], o["out"])),
    lambda i: {"out": i["x"].T},
    lambda i, w: {"out": 0.0},
    bench=(LARGE, (512, 384)),
    work=streams(2),
)

CASES: list[Case] = [
    *[activate_case(kind) for kind in ACTIVATIONS],
    *[activate_grad_case(kind) for kind in ACTIVATIONS],
    *ELEMENTWISE,
    COLUMN_SUM,
    layer_norm_case(True),
    layer_norm_case(False),
    lanes_of(layer_norm_case(True)),
    LAYER_NORM_GRAD,
    SOFTMAX,
    SOFTMAX_GRAD,
    CROSS_ENTROPY,
    CROSS_ENTROPY_GRAD,
    SQUARED_ERROR,
    SQUARED_ERROR_GRAD,
    DISTILLATION,
    DISTILLATION_GRAD,
    TRANSPOSE,
]
