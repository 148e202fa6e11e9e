"""Cases of the int4 family: what is quantised or expanded is exact against NumPy, the product within the rounding of its sums."""

import numpy as np

from gristmill import _core
from kernels.case import Case, Work
from kernels.cases.quant import TINY, activated

EPS = 2.0**-24


def draw_weight(rng, n, k, group, wide):
    """Canonical words and scales; among the scales are negative, subnormal and large ones."""
    words = rng.integers(-(2**31), 2**31, (n, -(-k // 8)), dtype=np.int64).astype(np.int32)
    scale = rng.uniform(0.01, 0.1, (n, -(-k // group))) * rng.choice([-1, 1], (n, -(-k // group)))
    scale = scale.astype(np.float32 if wide else np.float16)
    scale.reshape(-1)[: scale.size // 9] = np.resize(np.float16([6e-8, -3e-6, 1.5, 2.0**-14, -0.25]), scale.size // 9)
    return {"words": words, "scale": scale, "shape": (n, k), "group": group}


def codes_of(inputs):
    """Codes int64 [n, k] from their definition."""
    n, k = inputs["shape"]
    words = inputs["words"].view(np.uint32).astype(np.int64)
    return ((words[:, :, None] >> (4 * np.arange(8)) & 15) - 8).reshape(n, 8 * words.shape[1])[:, :k]


def wide_scales(scale, group, k):
    return np.repeat(scale.astype(np.float64), group, axis=-1)[..., :k]


def weight_view(inputs):
    return _core.Int4Weight(inputs["words"], inputs["shape"], inputs["scale"], inputs["group"])


# ---- activations ----


def quantized_groups(x, group):
    """Return (int8 codes [M, K], scales [M, G]): the definition in NumPy float32, one operation at a time."""
    m, k = x.shape
    groups = -(-k // group)
    padded = np.zeros((m, groups * group), np.float32)
    padded[:, :k] = x
    padded = padded.reshape(m, groups, group)
    most = np.abs(padded).max(axis=2, initial=0)
    usable = np.isfinite(most) & (most >= TINY)
    safe = np.where(usable, most, np.float32(1))
    scale = np.where(usable, safe / np.float32(127), np.where(np.isfinite(most), np.float32(1), np.float32(np.nan)))
    codes = np.rint(np.where(usable[..., None], padded, 0) * (np.float32(127) / safe)[..., None])
    return codes.reshape(m, groups * group)[:, :k].astype(np.int8), scale.astype(np.float32)


def in_tiles(array):
    """Rows [M, ...] in groups of six: the second axis first, six rows side by side."""
    groups = [np.swapaxes(array[first : first + 6], 0, 1).reshape(-1) for first in range(0, len(array), 6)]
    return np.concatenate(groups) if groups else array.reshape(-1)


def group_inputs(rng, size):
    m, k, group = size
    x = (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-30, 30, (m, 1))).astype(np.float32)
    if m > 3 and k:
        x[0] = rng.integers(-254, 255, k) / 2
        x[1, 0] = np.nan
        x[2, -1] = -np.inf
        x[3] = 1e-38 * rng.standard_normal(k)
    return {"x": x, "group": group}


def group_oracle(inputs):
    x, group = inputs["x"], inputs["group"]
    m, k = x.shape
    codes, scales = quantized_groups(x, group)
    padded = np.zeros((m, -(-k // 8) * 8), np.int8)
    padded[:, :k] = codes
    sums = np.add.reduceat(codes.astype(np.int64), np.arange(0, k, group), axis=1) if k else np.zeros((m, 0), np.int64)
    dwords = padded.reshape(m, padded.shape[1] // 4, 4)
    return {"codes": in_tiles(dwords), "scales": in_tiles(scales), "offsets": in_tiles((-8 * sums).astype(np.int32))}


def group_outputs(inputs):
    m, k = inputs["x"].shape
    count = m * -(-k // inputs["group"])
    return {"codes": ((m * -(-k // 8) * 8,), np.int8), "scales": ((count,), np.float32), "offsets": ((count,), np.int32)}


def run_groups(inputs, outputs, threads):
    program = _core.Program()
    _core.quantize_groups(program, inputs["x"], inputs["group"], *map(outputs.get, ("codes", "scales", "offsets")))
    program.run(threads)


QUANTIZE_GROUPS = Case(
    name="quantize_groups",
    slots=("quantize_groups_f32_s8",),
    sizes=(
        (0, 5, 8), (3, 0, 32), (1, 1, 8), (1, 8, 8), (4, 9, 8), (5, 31, 32), (6, 32, 32), (7, 33, 32), (13, 130, 32),
        (4, 200, 128), (8, 300, 256), (2, 1000, 8192),
    ),
    inputs=group_inputs,
    outputs=group_outputs,
    run=run_groups,
    oracle=group_oracle,
    bound=lambda inputs, wanted: dict.fromkeys(wanted, 0),
    bench=((1, 4096, 32), (128, 4096, 32)),
    work=lambda size: Work(bytes=size[0] * size[1] * 5, limit="dram"),
)  # fmt: skip


# ---- the product: sizes are (m, n, k, group) ----

SIZES = (
    (0, 5, 7, 8), (5, 0, 7, 8), (5, 7, 0, 8), (1, 1, 1, 8), (1, 33, 40, 32), (2, 31, 5, 32), (3, 32, 8, 8), (4, 33, 17, 16),
    (5, 64, 9, 32), (6, 15, 64, 64), (7, 16, 66, 32), (8, 17, 31, 24), (11, 95, 136, 128), (12, 40, 300, 128), (13, 70, 96, 32),
    (1, 40, 300, 32), (2, 65, 517, 128), (1, 32, 1030, 1032), (4, 32, 700, 40),
)  # fmt: skip


def product_inputs(rng, size, wide, bias, gain, residual):
    m, n, k, group = size
    drawn = draw_weight(rng, n, k, group, wide)
    drawn["x"] = rng.standard_normal((m, k)).astype(np.float32)
    if k and n:
        drawn["words"][0] = 0  # every code at the end of its range
        drawn["words"][n // 2] = -1
    if m > 1 and k:
        drawn["x"][m - 1] = 1
        drawn["x"][0, k // 2] = np.nan if m > 4 else 0.5
    drawn["packed"] = _core.pack_int4(weight_view(drawn))
    if bias:
        drawn["bias"] = rng.standard_normal(n).astype(np.float32)
    if gain:
        drawn["gain"] = rng.uniform(-2, 2, n).astype(np.float32)
    if residual:
        drawn["residual"] = rng.standard_normal((m, n)).astype(np.float32)
    return drawn


def product_steps(program, inputs, out):
    x, group = inputs["x"], inputs["group"]
    m, k = x.shape
    count = m * -(-k // group)
    panels = np.empty(m * -(-k // 8) * 8, np.int8), np.empty(count, np.float32), np.empty(count, np.int32)
    _core.quantize_groups(program, x, group, *panels)
    last = inputs.get("bias"), inputs.get("activation"), inputs.get("residual")
    _core.linear_int4(program, *panels, m, inputs["packed"], inputs.get("gain"), out, *last)
    return program


def product_case(name, activation=None, wide=False, bias=True, gain=False, residual=False, sizes=SIZES, bench=()):
    def run(inputs, outputs, threads):
        product_steps(_core.Program(), {**inputs, "activation": activation}, outputs["out"]).run(threads)

    def operands(inputs):
        codes, scales = quantized_groups(inputs["x"], inputs["group"])
        k, group = inputs["shape"][1], inputs["group"]
        return codes * wide_scales(scales, group, k), codes_of(inputs) * wide_scales(inputs["scale"], group, k)

    def before_activation(inputs):
        x, w = operands(inputs)
        product = (x @ w.T) * inputs.get("gain", np.float32(1)).astype(np.float64)
        return product, product + inputs.get("bias", 0.0)

    def oracle(inputs):
        return {"out": activated(activation, before_activation(inputs)[1]) + inputs.get("residual", 0.0)}

    def bound(inputs, wanted):
        # Three roundings for each group (conversion, scales, sum) of at most the sum of magnitudes, one for the gain and the bias.
        x, w = operands(inputs)
        groups = -(-x.shape[1] // inputs["group"])
        total = (np.abs(x) @ np.abs(w).T) * np.abs(inputs.get("gain", np.float32(1))).astype(np.float64)
        before = EPS * 1.01 * ((groups + 3) * total + np.abs(before_activation(inputs)[1]))
        own = 0 if activation in (None, "relu") else 4e-7 * np.maximum(1, np.abs(before_activation(inputs)[1]))
        return {"out": 1.13 * before + own + EPS * np.abs(wanted["out"]) + 1e-40}

    return Case(
        name=name,
        slots=("quantize_groups_f32_s8", "linear_u4_s8_f32"),
        sizes=sizes,
        inputs=lambda rng, size: product_inputs(rng, size, wide, bias, gain, residual),
        outputs=lambda inputs: {"out": ((len(inputs["x"]), inputs["shape"][0]), np.float32)},
        run=run,
        oracle=oracle,
        bound=bound,
        bind=lambda inputs, outputs: product_steps(_core.Program(), {**inputs, "activation": activation}, outputs["out"]),
        bench=bench,
        work=lambda size: Work(operations=2.0 * size[0] * size[1] * size[2], limit="vnni"),
    )


# ---- rows of tables: sizes are (places, n, group, count) ----

TABLES = (
    (3, 0, 8, 2), (1, 1, 8, 1), (5, 7, 8, 9), (6, 8, 8, 4), (7, 9, 8, 6), (4, 15, 16, 5), (9, 16, 16, 5), (9, 17, 32, 5), (30, 33, 32, 40),
    (20, 384, 32, 300), (20, 200, 128, 30), (8, 300, 304, 70), (5, 47, 24, 0),
)  # fmt: skip


def table_inputs(wide):
    def draw(rng, size):
        places, n, group, count = size
        drawn = draw_weight(rng, places, n, group, wide)
        drawn["plain"] = rng.standard_normal((9, n)).astype(np.float32)
        drawn["indices"], drawn["plain_indices"] = rng.integers(-places, places, count), rng.integers(0, 9, count)
        if count > 3:
            drawn["indices"][1], drawn["plain_indices"][2] = places, -10
        return drawn

    return draw


def table_rows(inputs):
    places, n = inputs["shape"]
    table = codes_of(inputs) * wide_scales(inputs["scale"], inputs["group"], n)
    rows = table[np.clip(inputs["indices"], -places, places - 1)]
    rows[inputs["indices"] == places] = np.nan
    return rows


def lookup_oracle(inputs):
    plain = inputs["plain"].astype(np.float64)[np.clip(inputs["plain_indices"], -9, 8)]
    plain[inputs["plain_indices"] == -10] = np.nan
    rows = table_rows(inputs)
    return {"out": rows + plain + rows}


def lookup_bound(inputs, wanted):
    return {"out": 3 * EPS * (2 * np.abs(table_rows(inputs)) + np.abs(wanted["out"]) + 6)}


def run_gather(inputs, outputs, threads):
    program = _core.Program()
    _core.gather(program, weight_view(inputs), inputs["indices"], outputs["out"])
    program.run(threads)


def run_lookups(inputs, outputs, threads):
    program, first = _core.Program(), (weight_view(inputs), inputs["indices"])
    _core.lookups(program, outputs["out"], *first, inputs["plain"], inputs["plain_indices"], *first)
    program.run(threads)


def table_case(name, wide, run, oracle, bound, shape, bench=()):
    return Case(
        name=name,
        slots=("expand_u4_f32",),
        sizes=TABLES,
        inputs=table_inputs(wide),
        outputs=lambda i: {"out": (shape(len(i["indices"]), i["shape"][1]), np.float32)},
        run=run,
        oracle=oracle,
        bound=bound,
        bench=bench,
        work=lambda size: Work(bytes=4.6 * size[1] * size[3]),
    )


def exact(inputs, wanted):
    return {"out": 0}


def one_rounding(inputs, wanted):
    return {"out": EPS * np.abs(wanted["out"])}


FEW = ((1, 40, 33, 32), (13, 70, 40, 8))

CASES: list[Case] = [
    QUANTIZE_GROUPS,
    product_case(
        "linear_int4",
        bench=((128, 3072, 768, 32), (128, 3072, 768, 128), (128, 768, 3072, 32), (16, 3072, 768, 32), (1, 3072, 768, 32)),
    ),
    product_case("linear_int4_wide", wide=True, gain=True),
    product_case("linear_int4_plain", bias=False, sizes=FEW),
    product_case("linear_int4_residual", residual=True, gain=True, sizes=FEW),
    product_case("linear_int4_relu_residual", "relu", residual=True, sizes=FEW),
    product_case("linear_int4_gelu", "gelu", sizes=FEW),
    product_case("linear_int4_silu_residual", "silu", wide=True, residual=True, sizes=FEW),
    table_case(
        "gather_int4",
        False,
        run_gather,
        lambda i: {"out": table_rows(i)[None]},
        exact,
        lambda count, n: (1, count, n),
        bench=((30522, 384, 32, 4096),),
    ),
    table_case(
        "gather_int4_wide", True, run_gather, lambda i: {"out": table_rows(i)[None]}, one_rounding, lambda count, n: (1, count, n)
    ),
    table_case("lookups_int4", False, run_lookups, lookup_oracle, lookup_bound, lambda count, n: (count, n)),
]
