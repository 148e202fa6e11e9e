"""Cases of the dense family: the forward product and both gradients, over every form of weight.

A size is (m, n, k), then (block rows, block columns) for block weights, then the index of an option in OPTIONS.
"""

import math
from functools import partial

import numpy as np

from gristmill import _core
from kernels.case import Arrays, Case, Size, Work
from kernels.harness import Guarded

UNIT = 2.0**-24  # rounding of one float32 operation, relative
OPTIONS = [  # (activation, bias, residual)
    (None, False, False),
    (None, True, False),
    ("relu", True, True),
    ("gelu", True, False),
    ("gelu_tanh", True, True),
    ("tanh", True, False),
    ("sigmoid", False, True),
    ("silu", False, False),
]
FORMS = ("float32", "int8", "blocks_float32", "blocks_int8")
SUBNORMAL = 2.0**-126  # bf16 products may take what is smaller for 0


# ---- inputs: arrays only, so that the harness may move and lock them ----


def draw_weight(rng: np.random.Generator, form: str, n: int, k: int, block: tuple[int, int] = (1, 1)) -> Arrays:
    drawn: Arrays = {}
    if "blocks" in form:
        rows, cols = block
        kept = rng.random((n // rows, k // cols)) < 0.4
        kept[1::3] = False  # whole row groups may be empty
        kept[:1, :1] = True
        drawn["row_offsets"] = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
        drawn["index"] = np.nonzero(kept)[1].astype(np.int32)
        shape: tuple[int, ...] = (int(kept.sum()), rows, cols)
    else:
        shape = (n, k)
    if "int8" in form:
        drawn["values"] = rng.integers(-127, 128, shape, dtype=np.int8)
        drawn["scale"] = (rng.random(n, dtype=np.float32) + np.float32(0.5)) / 127
    else:
        drawn["values"] = rng.standard_normal(shape, dtype=np.float32)
    return drawn


def draw(rng: np.random.Generator, size: Size, form: str) -> Arrays:
    m, n, k = size[:3]
    activation, bias, residual = OPTIONS[size[-1]]
    return {
        **draw_weight(rng, form, n, k, size[3:5] if "blocks" in form else (1, 1)),
        "x": rng.standard_normal((m, k), dtype=np.float32),
        "dy": rng.standard_normal((m, n), dtype=np.float32) / 4,
        "bias": rng.standard_normal(n, dtype=np.float32) if bias else None,
        "residual": rng.standard_normal((m, n), dtype=np.float32) if residual else None,
        "activation": activation,
    }


def weight_of(inputs: Arrays) -> _core.Weight:
    shape = (inputs["dy"].shape[1], inputs["x"].shape[1])
    return _core.Weight(inputs["values"], shape, inputs.get("scale"), inputs.get("row_offsets"), inputs.get("index"))


# ---- oracle, in float64 ----


def place(inputs: Arrays, values: np.ndarray) -> np.ndarray:
    """Return the dense [n, k] float64 matrix whose stored positions hold `values`."""
    if "index" not in inputs:
        return values.astype(np.float64)
    _, rows, cols = values.shape
    dense = np.zeros((inputs["dy"].shape[1], inputs["x"].shape[1]))
    for group in range(len(inputs["row_offsets"]) - 1):
        for block in range(inputs["row_offsets"][group], inputs["row_offsets"][group + 1]):
            at = inputs["index"][block] * cols
            dense[group * rows : (group + 1) * rows, at : at + cols] = values[block]
    return dense


def gather(inputs: Arrays, dense: np.ndarray) -> np.ndarray:
    """Return the stored positions of a dense [n, k] matrix."""
    if "index" not in inputs:
        return dense
    _, rows, cols = inputs["values"].shape
    groups = np.repeat(np.arange(len(inputs["row_offsets"]) - 1), np.diff(inputs["row_offsets"]))
    blocked = dense.reshape(dense.shape[0] // rows, rows, dense.shape[1] // cols, cols)
    return blocked[groups, :, inputs["index"], :]


def dense_weight(inputs: Arrays) -> np.ndarray:
    dense = place(inputs, inputs["values"])
    return dense * inputs["scale"].astype(np.float64)[:, None] if "scale" in inputs else dense


def activate(kind: str | None, z: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    formulas = {
        None: lambda: z,
        "relu": lambda: np.maximum(z, 0),
        "gelu": lambda: z / 2 * (1 + erf(z / math.sqrt(2))) if z.size else z,
        "gelu_tanh": lambda: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "tanh": lambda: np.tanh(z),
        "sigmoid": lambda: 1 / (1 + np.exp(-z)),
        "silu": lambda: z / (1 + np.exp(-z)),
    }
    return formulas[kind]()


def before_activation(inputs: Arrays) -> np.ndarray:
    z = inputs["x"].astype(np.float64) @ dense_weight(inputs).T
    return z if inputs["bias"] is None else z + inputs["bias"]


def linear_oracle(inputs: Arrays) -> Arrays:
    y = activate(inputs["activation"], before_activation(inputs))
    return {"out": y if inputs["residual"] is None else y + inputs["residual"]}


def linear_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    """k products and sums, scale, bias; an activation steepens errors by 1.13 at most, adds its own; a last sum."""
    magnitude = np.abs(inputs["x"]).astype(np.float64) @ np.abs(dense_weight(inputs)).T
    bound = (inputs["x"].shape[1] + 3) * UNIT * (magnitude + (0 if inputs["bias"] is None else np.abs(inputs["bias"])))
    if inputs["activation"] is not None:
        bound = 1.13 * bound + 8 * UNIT * (1 + np.abs(before_activation(inputs)))
    return {"out": bound + UNIT * np.abs(wanted["out"])}


def grad_input_oracle(inputs: Arrays) -> Arrays:
    return {"dx": inputs["dy"].astype(np.float64) @ dense_weight(inputs)}


def grad_input_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    magnitude = np.abs(inputs["dy"]).astype(np.float64) @ np.abs(dense_weight(inputs))
    return {"dx": (inputs["dy"].shape[1] + 2) * UNIT * magnitude}


def sink(inputs: Arrays, dw: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    return gather(inputs, dw) if codes is None else (dw * codes).sum(1)


def codes_of(inputs: Arrays) -> np.ndarray | None:
    return place(inputs, inputs["values"]) if "scale" in inputs else None


def grad_weight_oracle(inputs: Arrays) -> Arrays:
    return {"grad": sink(inputs, inputs["dy"].astype(np.float64).T @ inputs["x"], codes_of(inputs))}


def grad_weight_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    """m products and sums; for the scales, k more over the codes."""
    magnitude = np.abs(inputs["dy"]).astype(np.float64).T @ np.abs(inputs["x"])
    codes = codes_of(inputs)
    depth = inputs["x"].shape[0] + 1 + (0 if codes is None else inputs["x"].shape[1] + 1)
    return {"grad": depth * UNIT * sink(inputs, magnitude, None if codes is None else np.abs(codes))}


# ---- runs ----


def program_of(build, inputs: Arrays, outputs: Arrays, threads: int) -> tuple[_core.Program, Guarded]:
    """The bound program, and its scratch between guard bytes."""
    program = _core.Program()
    m, n, k = len(inputs["x"]), inputs["dy"].shape[1], inputs["x"].shape[1]
    scratch = Guarded((_core.linear_scratch(m, n, k, threads),), np.uint8)
    build(program, inputs, outputs, scratch.array)
    return program, scratch


def run(build, inputs: Arrays, outputs: Arrays, threads: int) -> None:
    program, scratch = program_of(build, inputs, outputs, threads)
    program.run(threads)
    assert scratch.intact(), "wrote outside the scratch"


def bind(build, inputs: Arrays, outputs: Arrays) -> _core.Program:
    return program_of(build, inputs, outputs, threads=1)[0]


def build_linear(weight, program, inputs, outputs, scratch) -> None:
    epilogue = inputs["bias"], inputs["activation"], inputs["residual"]
    _core.linear(program, inputs["x"], weight, outputs["out"], *epilogue, scratch)


def build_packed(program, inputs, outputs, scratch) -> None:
    build_linear(_core.pack_dense(weight_of(inputs), 2), program, inputs, outputs, scratch)


def build_in_place(program, inputs, outputs, scratch) -> None:
    build_linear(weight_of(inputs), program, inputs, outputs, scratch)


def build_grad_input(program, inputs, outputs, scratch) -> None:
    _core.linear_grad_input(program, inputs["dy"], weight_of(inputs), outputs["dx"], scratch)


def build_grad_weight(program, inputs, outputs, scratch) -> None:
    _core.linear_grad_weight(program, inputs["dy"], inputs["x"], weight_of(inputs), outputs["grad"], scratch)


def grad_shape(inputs: Arrays) -> tuple[int, ...]:
    return inputs["scale"].shape if "scale" in inputs else inputs["values"].shape


# ---- bf16: the same oracles over rounded operands ----


def as_bf16(array: np.ndarray) -> np.ndarray:
    """Round float32 half to even to 8 bits of mantissa, by arithmetic in float64: no bit of it is shared with the library."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype(np.float32)


def rounded(inputs: Arrays, *names: str) -> Arrays:
    """The inputs with some operands rounded; any weight is in dense float32 form."""
    weight = as_bf16(dense_weight(inputs).astype(np.float32)) if "weight" in names else dense_weight(inputs)
    kept = {name: inputs[name] for name in ("bias", "residual", "activation")}
    operands = {name: as_bf16(inputs[name]) if name in names else inputs[name] for name in ("x", "dy")}
    return {**kept, **operands, "values": weight}


def bf16_bound(bound, *names: str):
    """Every product is exact in float32 and every sum rounds: twice the sums of fp32, whose products round with them."""

    def doubled(inputs: Arrays, wanted: Arrays) -> Arrays:
        limits = bound(rounded(inputs, *names), wanted)
        terms = max(inputs["x"].shape[1], inputs["dy"].shape[1], len(inputs["x"])) + 1
        return {name: 2 * limit + 4 * terms * SUBNORMAL for name, limit in limits.items()}

    return doubled


def build_bf16_packed(program, inputs, outputs, scratch) -> None:
    epilogue = inputs["bias"], inputs["activation"], inputs["residual"]
    _core.linear_bf16(program, inputs["x"], _core.pack_bf16(weight_of(inputs), 2), outputs["out"], *epilogue, scratch)


def build_bf16_in_place(program, inputs, outputs, scratch) -> None:
    epilogue = inputs["bias"], inputs["activation"], inputs["residual"]
    _core.linear_bf16(program, inputs["x"], weight_of(inputs), outputs["out"], *epilogue, scratch)


def build_bf16_grad_input(program, inputs, outputs, scratch) -> None:
    _core.linear_grad_input_bf16(program, inputs["dy"], weight_of(inputs), outputs["dx"], scratch)


def build_bf16_grad_weight(program, inputs, outputs, scratch) -> None:
    _core.linear_grad_weight_bf16(program, inputs["dy"], inputs["x"], weight_of(inputs), outputs["grad"], scratch)


def bf16_row(name, form, slots, output, shape, build, oracle, bound, operands) -> Case:
    return Case(
        name=f"{name}_{form}",
        slots=slots,
        sizes=BLOCK_SIZES if "blocks" in form else DENSE_SIZES,
        inputs=partial(draw, form=form),
        outputs=lambda inputs: {output: (shape(inputs), np.float32)},
        run=partial(run, build),
        bind=partial(bind, build),
        oracle=lambda inputs: oracle(rounded(inputs, *operands)),
        bound=bf16_bound(bound, *operands),
        compare="bounded",
        bench=tuple((*size, 1) for size in BENCH) if form == "float32" else (),
        work=lambda size: Work(operations=2.0 * size[0] * size[1] * size[2], limit="fma"),
    )


# ---- rows: tiles of 4 x 8, 6 x 16 and 12 x 32 and their neighbours, depths around 256 and 768, and nothing at all ----

SHAPES = (
    *((0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 1, 1), (1, 65, 33), (1, 129, 40), (2, 16, 15), (3, 17, 16), (5, 31, 17)),
    *((6, 32, 31), (7, 33, 32), (11, 15, 65), (12, 64, 16), (13, 48, 70), (25, 63, 9), (37, 100, 130), (130, 40, 257)),
    *((9, 21, 1601), (26, 1601, 12), (900, 13, 33)),
)
BLOCK_SHAPES = (  # m, row groups, column groups, rows and columns of a block
    *((0, 3, 4, 1, 4), (4, 0, 4, 1, 4), (4, 3, 0, 1, 4), (1, 1, 1, 1, 1), (2, 9, 33, 1, 1), (5, 40, 20, 1, 4)),
    *(
        (13, 70, 11, 1, 4),
        (30, 20, 30, 4, 4),
        (26, 7, 5, 16, 1),
        (17, 13, 9, 3, 5),
        (7, 2, 3, 7, 100),
        (27, 1, 2, 70, 130),
    ),
    *((3, 11, 420, 2, 4), (14, 401, 9, 4, 3)),
)
DENSE_SIZES = tuple((*shape, i % len(OPTIONS)) for i, shape in enumerate(SHAPES))
BLOCK_SIZES = tuple((m, n * r, k * c, r, c, i % len(OPTIONS)) for i, (m, n, k, r, c) in enumerate(BLOCK_SHAPES))
BENCH = ((128, 3072, 768), (512, 768, 3072), (128, 1536, 384), (1, 3072, 768), (16, 512, 64), (64, 512, 512))


def work(size: Size) -> Work:
    m, n, k = size[:3]
    return Work(operations=2.0 * m * n * k, bytes=4.0 * n * k, limit="dram" if m == 1 else "fma")


def rows(name: str, slots: tuple[str, ...], output: str, shape, build, oracle, bound) -> list[Case]:
    """One case for each form of weight."""
    return [
        Case(
            name=f"{name}_{form}",
            slots=(*slots, *(("expand_s8_f32",) if "int8" in form else ())),
            sizes=BLOCK_SIZES if "blocks" in form else DENSE_SIZES,
            inputs=partial(draw, form=form),
            outputs=lambda inputs: {output: (shape(inputs), np.float32)},
            run=partial(run, build),
            bind=partial(bind, build),
            oracle=oracle,
            bound=bound,
            compare="bounded",
            bench=tuple((*size, *((4, 4) if "blocks" in form else ()), 1) for size in BENCH),
            work=work,
        )
        for form in FORMS
    ]


def product_shape(inputs: Arrays) -> tuple[int, ...]:
    return inputs["dy"].shape


def input_shape(inputs: Arrays) -> tuple[int, ...]:
    return inputs["x"].shape


LINEAR = ("gemm_f32", "pack_rows_f32", "epilogue_f32")
GRAD_INPUT = ("gemm_f32", "pack_rows_f32", "pack_columns_f32")
GRAD_WEIGHT = ("gemm_f32", "pack_columns_f32", "dot_f32")
LINEAR_BF16 = ("gemm_bf16", "convert_f32_bf16")
GRAD_BF16 = ("gemm_bf16", "pair_f32_bf16")
BF16 = [
    *(
        bf16_row(
            "linear_bf16", form, LINEAR_BF16, "out", product_shape, build_bf16_packed, linear_oracle, linear_bound, ("x", "weight")
        )
        for form in ("float32", "blocks_int8")
    ),
    bf16_row(
        "linear_bf16_in_place", "float32", LINEAR_BF16, "out", product_shape, build_bf16_in_place, linear_oracle, linear_bound,
        ("x", "weight"),
    ),
    bf16_row(
        "linear_grad_input_bf16", "float32", ("gemm_bf16", "convert_f32_bf16", "pair_f32_bf16"), "dx", input_shape,
        build_bf16_grad_input, grad_input_oracle, grad_input_bound, ("dy", "weight"),
    ),
    bf16_row(
        "linear_grad_weight_bf16", "float32", GRAD_BF16, "grad", grad_shape, build_bf16_grad_weight, grad_weight_oracle,
        grad_weight_bound, ("dy", "x"),
    ),
]  # fmt: skip
CASES: list[Case] = [
    *BF16,
    *rows("linear_packed", LINEAR, "out", product_shape, build_packed, linear_oracle, linear_bound),
    *rows("linear_in_place", LINEAR, "out", product_shape, build_in_place, linear_oracle, linear_bound),
    *rows("linear_grad_input", GRAD_INPUT, "dx", input_shape, build_grad_input, grad_input_oracle, grad_input_bound),
    *rows("linear_grad_weight", GRAD_WEIGHT, "grad", grad_shape, build_grad_weight, grad_weight_oracle, grad_weight_bound),
]
