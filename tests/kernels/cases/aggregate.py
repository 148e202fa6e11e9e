"""Cases of the aggregate family."""

from functools import partial

import numpy as np

from gristmill import _core
from kernels.case import Case, Work

LENGTHS = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 145)
BLOCK_EDGES = (16383, 16384, 16385, 40003)
BENCH = ((1_000_000,), (25_000_000,))
ROUNDING = 2.0**-24  # of one float32 operation
TINY = 2.0**-149


def left_complete_tree(terms):
    """Add float32 arrays in the binary tree that splits n at the largest power of two below n."""
    if len(terms) == 1:
        return terms[0]
    split = 1 << (len(terms) - 1).bit_length() - 1
    return left_complete_tree(terms[:split]) + left_complete_tree(terms[split:])


def norm_bound(squares, length):
    """A lane adds 1024 squares, then four halvings, then one partial for each block; NumPy's pairwise sum adds less."""
    return squares * 2.0**-53 * (1024 + 4 + length / 16384 + 64)


# ---- weighted sum ----


def sum_inputs(rng, size):
    count, length = size
    rows = rng.standard_normal((count, length)) * 10.0 ** rng.integers(-3, 3, (count, 1))
    weights = rng.uniform(-1, 1, count)
    return {"rows": rows.astype(np.float32), "weights": [float(np.float32(w)) for w in weights]}


def sum_outputs(inputs):
    return {"out": (inputs["rows"].shape[1:], np.float32), "squares": ((1,), np.float64), "finite": ((1,), np.uint8)}


def run_sum(inputs, outputs, threads):
    squares, finite = _core.weighted_sum(list(inputs["rows"]), inputs["weights"], outputs["out"], threads)
    outputs["squares"][0], outputs["finite"][0] = squares, finite


def sum_oracle(inputs):
    """The documented order in float32: nothing less than its bits is right."""
    products = [np.float32(weight) * row for weight, row in zip(inputs["weights"], inputs["rows"], strict=True)]
    out = left_complete_tree(products)
    return {"out": out, **squares_oracle({"x": out})}


def sum_bound(inputs, wanted):
    return {"out": 0.0, "squares": norm_bound(wanted["squares"], wanted["out"].size), "finite": 0}


WEIGHTED_SUM = Case(
    name="weighted_sum",
    slots=("weighted_sum_f32",),
    sizes=(
        *[(3, length) for length in (*LENGTHS, *BLOCK_EDGES)],
        *[(count, 83) for count in (1, 2, 4, 5, 6, 7, 8, 9, 15, 16, 17, 63, 64, 65, 71, 520, 4096)],
        *[(count, 16500) for count in (1, 2, 8, 11, 65)],
        *[(count, 150_001) for count in (7, 8, 9)],  # large enough for streaming stores
        (1, 600_001),
    ),
    inputs=sum_inputs,
    outputs=sum_outputs,
    run=run_sum,
    oracle=sum_oracle,
    bound=sum_bound,
    bench=((2, 25_000_000), (4, 25_000_000), (8, 1_000_000), (8, 25_000_000), (64, 1_000_000)),
    work=lambda size: Work(bytes=4.0 * (size[0] + 1) * size[1]),
)


# ---- sum of squares ----


def run_squares(inputs, outputs, threads):
    outputs["squares"][0], outputs["finite"][0] = _core.sum_of_squares(inputs["x"], threads)


def squares_oracle(inputs):
    x = inputs["x"].astype(np.float64)
    return {"squares": np.sum(x**2, keepdims=True), "finite": np.array([np.isfinite(x).all()])}


SUM_OF_SQUARES = Case(
    name="sum_of_squares",
    slots=("sum_of_squares_f32",),
    sizes=tuple((length,) for length in (*LENGTHS, *BLOCK_EDGES)),
    inputs=lambda rng, size: {"x": rng.standard_normal(size[0]).astype(np.float32)},
    outputs=lambda inputs: {"squares": ((1,), np.float64), "finite": ((1,), np.uint8)},
    run=run_squares,
    oracle=squares_oracle,
    bound=lambda inputs, wanted: {"squares": norm_bound(wanted["squares"], inputs["x"].size), "finite": 0},
    bench=BENCH,
    work=lambda size: Work(bytes=4.0 * size[0]),
)


# ---- optimiser steps: the outputs start as copies of the state, and are stepped in place ----

STATES = {"sgd": ("params",), "momentum": ("params", "velocity"), "adam": ("params", "first", "second")}
RATES = {"learning_rate": 0.0371, "weight_decay": 0.013, "clip": 0.77}
MOMENTUM = {**RATES, "momentum": 0.91, "dampening": 0.2}
ADAM = {**RATES, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-6, "step": 7}


def step_inputs(kind, options, rng, size):
    drawn = {name: rng.standard_normal(size[0]).astype(np.float32) for name in ("grads", *STATES[kind])}
    if "second" in drawn:
        drawn["second"] = np.abs(drawn["second"]) + np.float32(0.01)
    # A benchmark steps the same arrays again and again: copying them first would be half of its time.
    return {**drawn, "options": options, "kind": kind, "copy": size not in BENCH}


def step_outputs(inputs):
    return dict.fromkeys(STATES[inputs["kind"]], (inputs["grads"].shape, np.float32))


def run_step(inputs, outputs, threads):
    if inputs["copy"]:
        for name, value in outputs.items():
            value[...] = inputs[name]
    step = getattr(_core, f"{inputs['kind']}_step")
    state = {name: value for name, value in outputs.items() if name != "params"}
    step(outputs["params"], inputs["grads"], **state, **inputs["options"], threads=threads)


def wide(inputs):
    return {name: value.astype(np.float64) for name, value in inputs.items() if isinstance(value, np.ndarray)}


def gradient(v, o, coupled=True):
    """The clipped gradient with its decay, and a bound on its error: for each term a constant, a product and a sum."""
    decay = o["weight_decay"] if coupled else 0.0
    size = np.abs(o["clip"] * v["grads"]) + np.abs(decay * v["params"])
    return o["clip"] * v["grads"] + decay * v["params"], 3 * ROUNDING * size


def sgd_oracle(inputs):
    v, o = wide(inputs), inputs["options"]
    return {"params": v["params"] - o["learning_rate"] * gradient(v, o)[0]}


def sgd_bound(inputs, wanted):
    v, o = wide(inputs), inputs["options"]
    g, g_error = gradient(v, o)
    move = o["learning_rate"] * (g_error + 2 * ROUNDING * np.abs(g))
    return {"params": 1.01 * (move + ROUNDING * np.abs(wanted["params"])) + TINY}


def momentum_oracle(inputs):
    v, o = wide(inputs), inputs["options"]
    g = gradient(v, o)[0]
    velocity = o["momentum"] * v["velocity"] + (1 - o["dampening"]) * g
    move = g + o["momentum"] * velocity if o["nesterov"] else velocity
    return {"params": v["params"] - o["learning_rate"] * move, "velocity": velocity}


def momentum_bound(inputs, wanted):
    v, o = wide(inputs), inputs["options"]
    g, g_error = gradient(v, o)
    gain, momentum = 1 - o["dampening"], o["momentum"]
    terms = np.abs(momentum * v["velocity"]) + np.abs(gain * g)
    error = gain * g_error + 3 * ROUNDING * terms
    move, move_error = np.abs(wanted["velocity"]), error
    if o["nesterov"]:
        move = np.abs(g) + momentum * np.abs(wanted["velocity"])
        move_error = g_error + momentum * error + 3 * ROUNDING * move
    step = o["learning_rate"] * (move_error + 2 * ROUNDING * move)
    return {"params": 1.01 * (step + ROUNDING * np.abs(wanted["params"])) + TINY, "velocity": 1.01 * error + TINY}


def adam_oracle(inputs):
    v, o = wide(inputs), inputs["options"]
    g = gradient(v, o, not o["decoupled"])[0]
    first = o["beta1"] * v["first"] + (1 - o["beta1"]) * g
    second = o["beta2"] * v["second"] + (1 - o["beta2"]) * g**2
    move = (first / (1 - o["beta1"] ** o["step"])) / (np.sqrt(second / (1 - o["beta2"] ** o["step"])) + o["epsilon"])
    kept = v["params"] * (1 - o["learning_rate"] * o["weight_decay"]) if o["decoupled"] else v["params"]
    return {"params": kept - o["learning_rate"] * move, "first": first, "second": second}


def adam_bound(inputs, wanted):
    v, o = wide(inputs), inputs["options"]
    g, g_error = gradient(v, o, not o["decoupled"])
    rate1, rate2 = 1 - o["beta1"], 1 - o["beta2"]
    # first + rate1 * (g - first): the constant, the difference, the product, then the sum.
    change_error = g_error + 3 * ROUNDING * (np.abs(g) + np.abs(v["first"]))
    first_error = rate1 * change_error + ROUNDING * np.abs(wanted["first"])
    # All terms of `second` are positive: four roundings relative to it, and the gradient's own error.
    second_error = 4 * ROUNDING * wanted["second"] + rate2 * 2 * np.abs(g) * g_error
    scale = 1 / np.sqrt(1 - o["beta2"] ** o["step"])
    root = scale * np.sqrt(wanted["second"])
    divisor = root + o["epsilon"]
    divisor_error = root * (second_error / (2 * wanted["second"]) + 3 * ROUNDING) + 2 * ROUNDING * divisor
    ratio = np.abs(wanted["first"]) / divisor
    ratio_error = first_error / divisor + ratio * (divisor_error / divisor + ROUNDING)
    move = o["learning_rate"] / (1 - o["beta1"] ** o["step"])
    kept_error = 2 * ROUNDING * np.abs(v["params"])
    params_error = kept_error + move * (ratio_error + 2 * ROUNDING * ratio) + ROUNDING * np.abs(wanted["params"])
    errors = {"params": params_error, "first": first_error, "second": second_error}
    return {name: 1.01 * error + TINY for name, error in errors.items()}


def step_case(name, kind, options, oracle, bound, bytes_each):
    return Case(
        name=name,
        slots=(f"step_{kind}_f32",),
        sizes=tuple((length,) for length in (*LENGTHS, *BLOCK_EDGES)),
        inputs=partial(step_inputs, kind, options),
        outputs=step_outputs,
        run=run_step,
        oracle=oracle,
        bound=bound,
        bench=BENCH,
        work=lambda size: Work(bytes=float(bytes_each) * size[0]),
    )


CASES: list[Case] = [
    WEIGHTED_SUM,
    SUM_OF_SQUARES,
    step_case("sgd_step", "sgd", RATES, sgd_oracle, sgd_bound, 12),
    step_case("momentum_step", "momentum", {**MOMENTUM, "nesterov": False}, momentum_oracle, momentum_bound, 20),
    step_case("nesterov_step", "momentum", {**MOMENTUM, "nesterov": True}, momentum_oracle, momentum_bound, 20),
    step_case("adam_step", "adam", {**ADAM, "decoupled": False}, adam_oracle, adam_bound, 28),
    step_case("adamw_step", "adam", {**ADAM, "decoupled": True}, adam_oracle, adam_bound, 28),
]
