"""Cases of the quant family: quantisation is exact against NumPy, the product within the rounding of its epilogue."""

import math
from itertools import pairwise

import numpy as np

from gristmill import _core
from kernels.case import Case, Work

EPS = 2.0**-24
TINY = np.float32(2.0**-119)


# ---- oracles: the definitions in NumPy float32, one operation at a time ----


def row_scales(half, most=127.0):
    """Return (scale, most / half or 0) of rows of which `half` comes to `most` codes."""
    half, most = half.astype(np.float32), np.float32(most)
    usable = np.isfinite(half) & (half >= TINY)
    safe = np.where(usable, half, np.float32(1))
    scale = np.where(usable, safe / most, np.where(np.isfinite(half), np.float32(1), np.float32(np.nan)))
    return scale.astype(np.float32), np.where(usable, most / safe, np.float32(0))


def largest_magnitude(x):
    """Return max |x| per row; anything not finite in a row makes it infinite or NaN."""
    return np.abs(x).max(1, initial=0).astype(np.float32)


def quantized_rows(x, layout="tile"):
    """Return (bytes [M, K], scales [M], zero points [M]); a value that has no code is the byte 0."""
    low, high = x.min(1, initial=0), x.max(1, initial=0)
    with np.errstate(invalid="ignore"):
        half = np.float32(0.5) * high - np.float32(0.5) * low if layout == "tile" else largest_magnitude(x)
        scale, inverse = row_scales(half, 127.5 if layout == "tile" else 127.0)
        zeros = np.where(inverse == 0, 128, np.rint(-low * inverse)) if layout == "tile" else np.full(len(x), 128)
        q = np.rint(x * inverse[:, None])
    codes = np.where(np.isnan(q), 0, np.clip(np.nan_to_num(q) + zeros[:, None], 0, 255))
    return codes.astype(np.uint8), scale, zeros.astype(np.int32)


def quantized_weight(w):
    scale, inverse = row_scales(largest_magnitude(w))
    usable = inverse != 0
    q = np.rint(np.where(usable[:, None], w, 0) / np.where(usable, scale, 1)[:, None])
    return q.astype(np.int8), scale


def panel(codes, zeros, layout):
    """Lay bytes [M, K] out as a panel, from its definition."""
    m, k = codes.shape
    k4 = -(-k // 4)
    padded = np.full((-(-m // 16) * 16, k4 * 4), 128, np.uint8)
    padded[:m] = zeros[:, None]
    padded[:m, :k] = codes
    dwords = padded.reshape(len(padded), k4, 4).transpose(1, 0, 2)
    rows, step = (len(padded), 64) if layout == "lanes" else (m, 12)
    groups = [dwords[:, first : min(first + step, rows)].reshape(-1) for first in range(0, rows, step)]
    return np.concatenate(groups) if groups else np.empty(0, np.uint8)


def activated(kind, v):
    erf = np.vectorize(math.erf, otypes=[float])
    with np.errstate(over="ignore"):
        return {
            None: lambda: v,
            "relu": lambda: np.where(v < 0, 0.0, v),
            "gelu": lambda: v / 2 * (1 + erf(v / math.sqrt(2))),
            "gelu_tanh": lambda: v / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
            "tanh": lambda: np.tanh(v),
            "sigmoid": lambda: 1 / (1 + np.exp(-v)),
            "silu": lambda: v / (1 + np.exp(-v)),
        }[kind]()


# ---- quantising ----


def hostile_rows(rng, m, k):
    """Rows over many magnitudes, with zeros, ties, a tiny row, an infinity and a NaN among them."""
    x = (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-30, 30, (m, 1))).astype(np.float32)
    if m and k:
        x[m // 2] = rng.integers(-254, 255, k) / 2
        x[m // 2, 0] = 127
        x[m // 3] = 0
        x[m // 4, k - 1] = np.nan
        x[m - 1, k // 2] = -np.inf
        x[m // 5] = 1e-38 * rng.standard_normal(k)
    if m > 12 and k:  # rows of one sign, a row of extremes
        x[m - 2], x[m - 3] = np.abs(x[m - 2]), -np.abs(x[m - 3])
        x[m - 4] = 3.4e38 * rng.uniform(-1, 1, k)
        x[m - 4, 0], x[m - 4, k - 1] = 3.4e38, -3.4e38
    return x


MATRICES = (
    (0, 0), (0, 5), (3, 0), (1, 1), (1, 4), (2, 3), (3, 5), (4, 31), (5, 32), (7, 33), (11, 63), (12, 64), (13, 65),
    (15, 7), (16, 16), (17, 15), (25, 100), (63, 6), (64, 9), (65, 130), (130, 21), (147, 40),
)  # fmt: skip


def activation_case(name, lanes, layout, bench=()):
    def run(inputs, outputs, threads):
        program = _core.Program()
        _core.quantize_activations(program, inputs["x"], lanes, layout, *map(outputs.get, ("codes", "scales", "zeros")))
        program.run(threads)

    def oracle(inputs):
        codes, scales, zeros = quantized_rows(inputs["x"].T if lanes else inputs["x"], layout)
        answer = {"codes": panel(codes, zeros, layout), "scales": scales}
        return answer | ({"zeros": zeros} if layout == "tile" else {})

    def outputs(inputs):
        m, k = inputs["x"].shape[::-1] if lanes else inputs["x"].shape
        k4 = -(-k // 4) * 4
        nbytes = -(-m // 16) * 16 * k4 if layout == "lanes" else m * k4
        made = {"codes": ((nbytes,), np.uint8), "scales": ((m,), np.float32)}
        return made | ({"zeros": ((m,), np.int32)} if layout == "tile" else {})

    def inputs(rng, size):
        x = hostile_rows(rng, *size)
        return {"x": np.ascontiguousarray(x.T) if lanes else x}

    widest = "range_lanes_f32" if lanes else "range_f32"
    return Case(
        name=name,
        slots=(widest, "quantize_lanes_f32_u8" if lanes else "quantize_rows_f32_u8"),
        sizes=MATRICES,
        inputs=inputs,
        outputs=outputs,
        run=run,
        oracle=oracle,
        bound=lambda inputs, wanted: dict.fromkeys(wanted, 0),
        bench=bench,
        work=lambda size: Work(bytes=size[0] * size[1] * 5, limit="dram"),
    )


STATIC = ((np.float32(0.037), 90), (np.float32(3e-6), 0), (np.float32(1 / 3), 255), (np.float32(2.0), 128))


def static_codes(x, scale, zero_point):
    """ONNX QuantizeLinear to uint8: the quotient rounded to float32, then half to even, then clipped. NaN counts as 0."""
    with np.errstate(all="ignore"):
        return np.clip(np.rint(np.nan_to_num(x / scale, nan=0.0)).astype(np.float64) + zero_point, 0, 255).astype(np.uint8)


def static_case(name, lanes, layout="tile", bench=()):
    def run(inputs, outputs, threads):
        program = _core.Program()
        panels = outputs["codes"], outputs["scales"], outputs["zeros"]
        _core.quantize_activations(program, inputs["x"], lanes, layout, *panels, float(inputs["scale"]), inputs["zero_point"])
        program.run(threads)

    def oracle(inputs):
        codes = static_codes(inputs["x"].T if lanes else inputs["x"], inputs["scale"], inputs["zero_point"])
        zeros = np.full(len(codes), inputs["zero_point"], np.int32)
        return {"codes": panel(codes, zeros, layout), "scales": np.full(len(codes), inputs["scale"], np.float32), "zeros": zeros}

    def outputs(inputs):
        m, k = inputs["x"].shape[::-1] if lanes else inputs["x"].shape
        nbytes = (-(-m // 16) * 16 if layout == "lanes" else m) * (-(-k // 4) * 4)
        return {"codes": ((nbytes,), np.uint8), "scales": ((m,), np.float32), "zeros": ((m,), np.int32)}

    def inputs(rng, size):
        m, k = size
        scale, zero_point = STATIC[(m + k) % len(STATIC)]
        x = (scale * rng.uniform(-150, 300, (m, k))).astype(np.float32)
        if x.size > 8:  # ties, ends and what has no code
            x.reshape(-1)[:8] = np.array([0.5, 1.5, -2.5, 1e30, np.inf, -np.inf, np.nan, 0]) * scale
            x[-1] = (scale * (rng.integers(-100, 200, k) + 0.5)).astype(np.float32)
        return {"x": np.ascontiguousarray(x.T) if lanes else x, "scale": scale, "zero_point": zero_point}

    return Case(
        name=name,
        slots=("quantize_static_lanes_f32_u8" if lanes else "quantize_static_rows_f32_u8",),
        sizes=MATRICES,
        inputs=inputs,
        outputs=outputs,
        run=run,
        oracle=oracle,
        bound=lambda inputs, wanted: dict.fromkeys(wanted, 0),
        bench=bench,
        work=lambda size: Work(bytes=size[0] * size[1] * 5, limit="dram"),
    )


def run_quantize_weight(inputs, outputs, threads):
    _core.quantize_weight(inputs["weight"], outputs["codes"], outputs["scale"], threads)


def weight_oracle(inputs):
    codes, scale = quantized_weight(inputs["weight"])
    return {"codes": codes, "scale": scale}


QUANTIZE_WEIGHT = Case(
    name="quantize_weight",
    slots=("range_f32", "quantize_f32_s8"),
    sizes=(
        (0, 0),
        (0, 3),
        (3, 0),
        (1, 1),
        (2, 7),
        (5, 8),
        (6, 9),
        (7, 15),
        (8, 16),
        (9, 17),
        (10, 63),
        (11, 65),
        (6, 200),
    ),
    inputs=lambda rng, size: {"weight": hostile_rows(rng, *size)},
    outputs=lambda inputs: {
        "codes": (inputs["weight"].shape, np.int8),
        "scale": (inputs["weight"].shape[:1], np.float32),
    },
    run=run_quantize_weight,
    oracle=weight_oracle,
    bound=lambda inputs, wanted: {"codes": 0, "scale": 0},
    bench=((3072, 768),),
    work=lambda size: Work(bytes=size[0] * size[1] * 5, limit="dram"),
)


def block_inputs(rng, size):
    """Sizes are (row groups, most blocks in a group, r, c); one group in four is empty."""
    groups, most, r, c = size
    counts = rng.integers(0, most + 1, groups) * (rng.random(groups) > 0.25)
    row_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    blocks = int(row_offsets[-1])
    values = hostile_rows(rng, max(blocks, 1) * r, c)[: blocks * r].reshape(blocks, r, c)
    return {"values": np.ascontiguousarray(values), "row_offsets": row_offsets}


def run_quantize_blocks(inputs, outputs, threads):
    _core.quantize_blocks(inputs["values"], inputs["row_offsets"], outputs["codes"], outputs["scale"], threads)


def blocks_oracle(inputs):
    values, offsets = inputs["values"], inputs["row_offsets"]
    codes, scales = np.zeros(values.shape, np.int8), []
    for first, last in pairwise(offsets):
        rows = values[first:last].transpose(1, 0, 2)
        q, scale = quantized_weight(rows.reshape(values.shape[1], -1))
        codes[first:last] = q.reshape(rows.shape).transpose(1, 0, 2)
        scales.append(scale)
    return {"codes": codes, "scale": np.concatenate(scales) if scales else np.empty(0, np.float32)}


QUANTIZE_BLOCKS = Case(
    name="quantize_blocks",
    slots=("range_f32", "quantize_f32_s8"),
    sizes=((0, 0, 1, 4), (1, 3, 1, 1), (5, 4, 1, 4), (6, 5, 2, 4), (4, 7, 4, 4), (3, 3, 8, 16), (2, 2, 16, 33)),
    inputs=block_inputs,
    outputs=lambda inputs: {
        "codes": (inputs["values"].shape, np.int8),
        "scale": (((len(inputs["row_offsets"]) - 1) * inputs["values"].shape[1],), np.float32),
    },
    run=run_quantize_blocks,
    oracle=blocks_oracle,
    bound=lambda inputs, wanted: {"codes": 0, "scale": 0},
)


# ---- the product ----

SIZES = (
    (0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 1, 1), (1, 40, 33), (2, 31, 5), (3, 32, 8), (4, 33, 17), (5, 64, 9),
    (6, 15, 64), (7, 16, 66), (8, 17, 31), (9, 65, 12), (10, 8, 100), (11, 95, 23), (12, 32, 16), (13, 96, 40),
    (25, 70, 130), (2, 40, 300), (8, 33, 517), (12, 32, 1030),
)  # fmt: skip


def product_inputs(rng, size, bias, residual):
    m, n, k = size
    weight = rng.integers(-127, 128, (n, k)).astype(np.int8)
    if k:
        weight[: n // 2] = np.where(rng.random((n // 2, k)) < 0.5, 127, -127)
    scale = (rng.random(n) * 0.02 + 1e-3).astype(np.float32)
    scale[::7] *= -1
    drawn = {
        "x": rng.standard_normal((m, k)).astype(np.float32),
        "weight": weight,
        "weight_scale": scale,
        "packed": _core.pack_int8(_core.Weight(weight, (n, k), scale)),
    }
    if m and k:
        drawn["x"][m // 2] = np.where(rng.random(k) < 0.5, 1, -1)  # every code at the end of its range
        drawn["x"][m - 1, 0] = np.nan if m > 3 else 0.5
        drawn["x"][m // 3] = np.abs(drawn["x"][m // 3])
        drawn["x"][m // 4] = -np.abs(drawn["x"][m // 4])
    if bias:
        drawn["bias"] = rng.standard_normal(n).astype(np.float32)
    if residual:
        drawn["residual"] = rng.standard_normal((m, n)).astype(np.float32)
    return drawn


def product_case(name, activation=None, bias=True, residual=False, sizes=SIZES, bench=()):
    def run(inputs, outputs, threads):
        x, packed = inputs["x"], inputs["packed"]
        codes = np.empty(_core.codes_nbytes(*x.shape, "tile"), np.uint8)
        scales, zeros = np.empty(len(x), np.float32), np.empty(len(x), np.int32)
        program = _core.Program()
        _core.quantize_activations(program, x, False, "tile", codes, scales, zeros)
        _core.linear_int8(
            program,
            codes,
            scales,
            zeros,
            len(x),
            packed,
            inputs["weight_scale"],
            outputs["out"],
            inputs.get("bias"),
            activation,
            inputs.get("residual"),
        )
        program.run(threads)

    def before_activation(inputs):
        codes, scales, zeros = quantized_rows(inputs["x"])
        acc = (codes.astype(np.int64) - zeros[:, None]) @ inputs["weight"].astype(np.int64).T
        product = acc * (scales.astype(np.float64)[:, None] * inputs["weight_scale"].astype(np.float64))
        return product, product + inputs.get("bias", 0.0)

    def oracle(inputs):
        return {"out": activated(activation, before_activation(inputs)[1]) + inputs.get("residual", 0.0)}

    def bound(inputs, wanted):
        # Conversion, two products and the bias: one rounding each. Every activation has slope below 1.13, and its own
        # error is below 4e-7 of max(1, |v|). The residual is one more rounding.
        product, v = before_activation(inputs)
        before = EPS * 1.01 * (3 * np.abs(product) + np.abs(v))
        own = 0 if activation in (None, "relu") else 4e-7 * np.maximum(1, np.abs(v))
        return {"out": 1.13 * before + own + EPS * np.abs(wanted["out"]) + 1e-40}

    return Case(
        name=name,
        slots=("range_f32", "quantize_rows_f32_u8", "linear_u8_s8_f32"),
        sizes=sizes,
        inputs=lambda rng, size: product_inputs(rng, size, bias, residual),
        outputs=lambda inputs: {"out": ((len(inputs["x"]), len(inputs["weight"])), np.float32)},
        run=run,
        oracle=oracle,
        bound=bound,
        bench=bench,
        work=lambda size: Work(operations=2.0 * size[0] * size[1] * size[2], limit="vnni"),
    )


FEW = ((1, 40, 33), (13, 70, 40))

CASES: list[Case] = [
    QUANTIZE_WEIGHT,
    QUANTIZE_BLOCKS,
    activation_case("quantize_rows_to_tile", False, "tile", bench=((128, 768), (512, 3072))),
    activation_case("quantize_rows_to_lanes", False, "lanes", bench=((512, 768),)),
    activation_case("quantize_lanes_to_tile", True, "tile"),
    activation_case("quantize_lanes_to_lanes", True, "lanes", bench=((128, 768), (512, 768))),
    static_case("quantize_static_rows", False, bench=((128, 768),)),
    static_case("quantize_static_lanes", True),
    static_case("quantize_static_rows_to_lanes", False, "lanes"),
    static_case("quantize_static_lanes_to_lanes", True, "lanes"),
    product_case(
        "linear_int8",
        bench=((128, 3072, 768), (512, 768, 3072), (128, 1536, 384), (128, 384, 1536), (16, 3072, 768), (1, 3072, 768)),
    ),
    product_case("linear_int8_plain", bias=False, sizes=FEW),
    product_case("linear_int8_residual", residual=True),
    product_case("linear_int8_relu_residual", "relu", residual=True, sizes=FEW),
    product_case("linear_int8_gelu", "gelu", bench=((128, 3072, 768),)),
    product_case("linear_int8_gelu_tanh_residual", "gelu_tanh", residual=True, sizes=FEW),
    product_case("linear_int8_tanh", "tanh", sizes=FEW),
    product_case("linear_int8_sigmoid", "sigmoid", sizes=FEW),
    product_case("linear_int8_silu_residual", "silu", residual=True, sizes=FEW),
]
