"""Cases of the sparse family."""

from math import erf

import numpy as np

from gristmill import _core
from kernels.case import Case, Work

EPSILON = 2.0**-24  # half an ulp of float32, relative

# ---- products ----


def random_blocks(rng, n, k, density, r, c):
    """Draw where the blocks are: (row_offsets, index), some rows empty and the first full."""
    keep = rng.random((n // r, k // c)) < density
    if len(keep) > 2:
        keep[0], keep[1] = True, False
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    return offsets, np.nonzero(keep)[1].astype(np.int32)


def expand(values, offsets, index, n, k):
    """The dense [n, k] matrix in float64."""
    _, r, c = values.shape
    dense = np.zeros((n // r, r, k // c, c))
    groups = np.repeat(np.arange(n // r), np.diff(offsets))
    dense[groups, :, index, :] = values
    return dense.reshape(n, k)


def reference_activation(kind, x):
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "gelu":
        return 0.5 * x * (1.0 + np.vectorize(erf, otypes=[float])(x / np.sqrt(2.0)))
    if kind == "silu":
        with np.errstate(over="ignore"):
            return x / (1.0 + np.exp(-x))
    if kind == "tanh":
        return np.tanh(x)
    return x


def draw_product(rng, size):
    """What both products share; size is (m, n, k, percent of blocks kept, r, c, epilogue number)."""
    m, n, k, percent, r, c, number = size
    offsets, index = random_blocks(rng, n, k, percent / 100, r, c)
    extras = number > 0
    return {
        "m": m,
        "shape": (n, k),
        "row_offsets": offsets,
        "index": index,
        "bias": rng.standard_normal(n).astype(np.float32) if extras else None,
        "to_rows": (to_rows := bool(m // 2 % 2)),
        "residual": rng.standard_normal((m, n) if to_rows else (n, m)).astype(np.float32) if extras else None,
        "activation": (None, "relu", "gelu", "silu", "tanh")[number],
    }


def product_outputs(inputs):
    shape = (inputs["shape"][0], inputs["m"])
    return {"out": (shape[::-1] if inputs["to_rows"] else shape, np.float32)}


def finish(inputs, total, error):
    """Apply the epilogue in float64; `error` bounds what `total` may be off by. Return (result, bound)."""
    if inputs["bias"] is not None:
        total = total + inputs["bias"][:, None]
        error = error + EPSILON * (np.abs(total) + error)
    result = reference_activation(inputs["activation"], total)
    # The slope of every activation is below 1.13, and each is held to 4e-7 of its argument by its own tests.
    error = 1.13 * error + (4e-7 * (np.abs(total) + error) + 1e-30 if inputs["activation"] not in (None, "relu") else 0.0)
    if inputs["to_rows"]:
        result, error = result.T, error.T
    if inputs["residual"] is not None:
        result = result + inputs["residual"]
        error = error + EPSILON * (np.abs(result) + error)
    return result, error


def f32_inputs(rng, size):
    m, k, r, c = size[0], size[2], size[4], size[5]
    drawn = draw_product(rng, size)
    values = rng.standard_normal((drawn["index"].size, r, c)).astype(np.float32)
    return {**drawn, "values": values, "x": rng.standard_normal((k, m)).astype(np.float32)}


def f32_weight(inputs):
    return _core.Weight(inputs["values"], inputs["shape"], None, inputs["row_offsets"], inputs["index"])


def f32_bind(inputs, outputs):
    program = _core.Program()
    weight = f32_weight(inputs)
    packed = weight if inputs["m"] % 2 else _core.pack_sparse(weight)
    extras = (inputs["bias"], inputs["activation"], inputs["residual"], inputs["to_rows"])
    _core.sparse_linear(program, inputs["x"], packed, outputs["out"], *extras)
    return program


def f32_answer(inputs):
    weight = expand(inputs["values"], inputs["row_offsets"], inputs["index"], *inputs["shape"])
    x = inputs["x"].astype(np.float64)
    depth = np.count_nonzero(weight, axis=1)[:, None]
    return finish(inputs, weight @ x, EPSILON * depth * 1.001 * (np.abs(weight) @ np.abs(x)))


def product_work(size, limit):
    m, n, k, percent = size[:4]
    return Work(operations=2.0 * m * n * k * percent / 100, limit=limit)


BLOCKS = ((1, 1), (1, 4), (2, 4), (4, 4))
WIDTHS = (1, 2, 4, 5, 15, 16, 17, 31, 33, 48, 63, 64, 65, 130)

F32 = Case(
    name="sparse_linear",
    slots=("multiply_blocks_f32", "finish_lanes_f32"),
    sizes=(
        (0, 4, 8, 50, 1, 4, 0),
        (3, 0, 8, 50, 1, 4, 0),
        (5, 4, 0, 50, 1, 4, 1),
        (1, 1, 1, 100, 1, 1, 0),
        (3, 8, 16, 0, 2, 4, 1),
        *((m, 20, 36, 40, r, c, i % 5) for i, (m, (r, c)) in enumerate((m, block) for block in BLOCKS for m in WIDTHS)),
        (70, 520, 40, 30, 1, 1, 1),
        (7, 1036, 260, 5, 4, 4, 0),
        (66, 28, 1044, 20, 1, 4, 2),
        (20, 12, 1000, 50, 1, 1, 3),
        (65, 1032, 520, 90, 1, 1, 0),
    ),
    inputs=f32_inputs,
    outputs=product_outputs,
    run=lambda inputs, outputs, threads: f32_bind(inputs, outputs).run(threads),
    bind=f32_bind,
    oracle=lambda inputs: {"out": f32_answer(inputs)[0]},
    bound=lambda inputs, wanted: {"out": f32_answer(inputs)[1]},
    bench=(
        (128, 3072, 768, 10, 1, 1, 0),
        (128, 768, 3072, 10, 1, 1, 0),
        (128, 768, 3072, 20, 1, 1, 0),
        *((128, n, k, 20, r, 4, 0) for r in (1, 2, 4) for n, k in ((3072, 768), (768, 3072))),
        (512, 768, 768, 20, 1, 4, 0),
        (16, 768, 768, 20, 1, 4, 0),
        (1, 768, 768, 20, 1, 1, 0),
        (1, 768, 768, 20, 1, 4, 0),
        (1, 768, 3072, 20, 1, 4, 0),
    ),
    work=lambda size: product_work(size, "fma"),
)


def lanes_panel(x):
    """Quantise float32 x[K, M] per column: (codes q + 128 as [K / 4][M to 16][4], scales[M])."""
    k, m = x.shape
    scales = np.abs(x).max(axis=0, initial=0.0) / np.float32(127)
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    panel = np.full((-(-k // 4), -(-m // 16) * 16, 4), 128, np.uint8)
    codes = np.rint(np.clip(x / scales, -127, 127)).astype(np.int64) + 128
    for row in range(k):
        panel[row // 4, :m, row % 4] = codes[row]
    return panel, scales


def flat_panel(panel, offset=0):
    """Lay codes [K / 4][M to 16][4] out in tiles of 64 columns, as the kernels read them, `offset` bytes off a cache line."""
    raw = np.empty(panel.size + 128, np.uint8)
    begin = -raw.ctypes.data % 64 + offset
    flat = raw[begin : begin + panel.size]
    flat[...] = np.concatenate([panel[:0].reshape(-1), *(panel[:, m : m + 64].reshape(-1) for m in range(0, panel.shape[1], 64))])
    return flat


def int8_inputs(rng, size):
    m, n, k, _, r, c, _ = size
    drawn = draw_product(rng, size)
    values = rng.integers(-127, 128, (drawn["index"].size, r, c)).astype(np.int8)
    values[rng.random(values.shape) < 0.2] = 127  # extremes, where 16-bit products would saturate
    x = rng.standard_normal((k, m)).astype(np.float32)
    x[:, ::3] = np.sign(x[:, ::3])
    codes, scales = lanes_panel(x)
    zeros = None
    if size[6] % 2:  # asymmetric: every code has a meaning
        codes, zeros = rng.integers(0, 256, codes.shape).astype(np.uint8), rng.integers(0, 256, m).astype(np.int32)
        codes[:, ::5], zeros[1::2] = 255, 0
    weight_scale = rng.uniform(1e-3, 1e-2, n).astype(np.float32)
    return {**drawn, "values": values, "codes": codes, "scales": scales, "zeros": zeros, "weight_scale": weight_scale}


def int8_bind(inputs, outputs):
    program = _core.Program()
    scale = inputs["weight_scale"]
    weight = _core.Weight(inputs["values"], inputs["shape"], scale, inputs["row_offsets"], inputs["index"])
    _core.sparse_linear_int8(
        program,
        flat_panel(inputs["codes"], inputs["m"] % 2),
        inputs["scales"],
        inputs["m"],
        _core.pack_sparse(weight),
        scale,
        outputs["out"],
        inputs["bias"],
        inputs["activation"],
        inputs["residual"],
        inputs["zeros"],
        inputs["to_rows"],
    )
    return program


def int8_answer(inputs):
    m, (n, k) = inputs["m"], inputs["shape"]
    weight = expand(inputs["values"], inputs["row_offsets"], inputs["index"], n, k)
    q = inputs["codes"][:, :m].transpose(0, 2, 1).reshape(k, m).astype(np.float64)
    q -= 128 if inputs["zeros"] is None else inputs["zeros"]
    total = (weight @ q) * (inputs["scales"].astype(np.float64) * inputs["weight_scale"].astype(np.float64)[:, None])
    # three roundings: of the int32 sum, of the product of the scales, and of their product
    return finish(inputs, total, 3.001 * EPSILON * np.abs(total))


INT8 = Case(
    name="sparse_linear_int8",
    slots=("multiply_blocks_u8_s8", "finish_lanes_s32"),
    sizes=(
        (0, 4, 8, 50, 1, 4, 0),
        (3, 0, 8, 50, 1, 4, 0),
        (5, 4, 0, 50, 1, 4, 1),
        (1, 1, 4, 100, 1, 4, 0),
        (3, 8, 16, 0, 2, 4, 1),
        *((m, 20, 36, 40, r, 4, i % 5) for i, (m, r) in enumerate((m, r) for r in (1, 2, 4) for m in WIDTHS)),
        (70, 520, 40, 30, 1, 4, 1),
        (7, 1036, 260, 5, 4, 4, 0),
        (66, 28, 1044, 20, 1, 4, 2),
        (20, 12, 2000, 50, 2, 4, 3),
        # more K than a panel holds, by width of the tile
        *((1, 8, 50000, 3, r, 4, r % 2) for r in (1, 2, 4)),
        (3, 8, 13000, 5, 2, 4, 1),
        (16, 8, 4000, 10, 1, 4, 0),
        (64, 8, 4400, 10, 4, 4, 1),
        # more weights than L2 holds
        (65, 2048, 1000, 60, 1, 4, 1),
    ),
    inputs=int8_inputs,
    outputs=product_outputs,
    run=lambda inputs, outputs, threads: int8_bind(inputs, outputs).run(threads),
    bind=int8_bind,
    oracle=lambda inputs: {"out": int8_answer(inputs)[0]},
    bound=lambda inputs, wanted: {"out": int8_answer(inputs)[1]},
    bench=(
        *(
            (128, n, k, 20, r, 4, 0)
            for r in (1, 2, 4)
            for n, k in ((3072, 768), (768, 3072), (384, 384), (1536, 384), (384, 1536))
        ),
        *((128, 3072, 768, kept, r, 4, 0) for kept in (50, 10) for r in (1, 2, 4)),
        *((m, 3072, 768, 20, r, 4, 0) for m in (16, 32, 64, 512) for r in (1, 2, 4)),
        *((1, n, k, 20, r, 4, 0) for r in (1, 2, 4) for n, k in ((3072, 768), (768, 3072))),
    ),
    work=lambda size: product_work(size, "vnni"),
)


def no_difference(inputs, wanted):
    return dict.fromkeys(wanted, 0)


def coded_inputs(rng, size):
    drawn = int8_inputs(rng, size)
    if drawn["zeros"] is None:
        drawn["zeros"] = np.full(drawn["m"], 128, np.int32)
    static = {"static": (0.5 + size[0] / 100, 90 + size[6])} if size[1] % 8 else {"static": ()}
    return {**drawn, "residual": None, "to_rows": False, **static}


def coded_outputs(inputs):
    m, n = inputs["m"], inputs["shape"][0]
    nbytes = _core.codes_nbytes(m, n, "lanes")
    return {"codes": ((nbytes,), np.uint8), "scales": ((m,), np.float32), "zeros": ((m,), np.int32)}


def coded_run(inputs, outputs, threads):
    program, scale, n = _core.Program(), inputs["weight_scale"], inputs["shape"][0]
    weight = _core.Weight(inputs["values"], inputs["shape"], scale, inputs["row_offsets"], inputs["index"])
    given = flat_panel(inputs["codes"]), inputs["scales"], inputs["zeros"], inputs["m"]
    made = outputs["codes"], outputs["scales"], outputs["zeros"]
    scratch = np.empty(2 * 256 * n, np.uint8)  # a third thread has nothing to do
    bias, activation = inputs["bias"], inputs["activation"]
    packed = _core.pack_sparse(weight)
    _core.sparse_linear_to_codes(program, *given, packed, scale, bias, activation, *made, scratch, *inputs["static"])
    program.run(threads)


def coded_oracle(inputs):
    """The float32 result in lanes, quantised by itself: the same bits, and so tested where both are tested."""
    m, n = inputs["m"], inputs["shape"][0]
    out = np.empty((n, m), np.float32)
    int8_bind(inputs, {"out": out}).run()
    made = {name: np.empty(shape, dtype) for name, (shape, dtype) in coded_outputs(inputs).items()}
    program = _core.Program()
    _core.quantize_activations(program, out, True, "lanes", *made.values(), *inputs["static"])
    program.run()
    return made


CODED = Case(
    name="sparse_linear_to_codes",
    slots=("multiply_blocks_u8_s8", "finish_lanes_s32", "quantize_lanes_f32_u8", "quantize_static_lanes_f32_u8"),
    sizes=(
        (0, 4, 8, 50, 1, 4, 0),
        (5, 4, 0, 50, 1, 4, 1),
        *((m, 16 + 4 * (i % 4), 36, 40, r, 4, i % 5) for i, (m, r) in enumerate((m, r) for r in (1, 2, 4) for m in WIDTHS)),
        (9, 21, 36, 40, 1, 4, 2),
        (70, 520, 40, 30, 1, 4, 2),
        (130, 516, 64, 30, 4, 4, 2),
    ),
    inputs=coded_inputs,
    outputs=coded_outputs,
    run=coded_run,
    oracle=coded_oracle,
    bound=no_difference,
    bench=((128, 1536, 384, 20, 4, 4, 2),),
    work=lambda size: product_work(size, "vnni"),
)

CASES: list[Case] = [F32, INT8, CODED]
