"""Cases of the bitmask family: sums of codes are exact, float32 within the rounding of one chain of any order."""

import numpy as np

from gristmill import _core
from kernels.case import Case, Work
from kernels.cases.quant import activated, panel

EPSILON = 2.0**-24
ACTIVATIONS = (None, None, "relu", "gelu", "silu", "tanh")  # by epilogue number; 0 has no bias and no residual


def draw_mask(rng, n, k, percent):
    """A bool [n, k]: some rows empty, the first full."""
    keep = rng.random((n, k)) < percent / 100
    if n > 2:
        keep[0], keep[1] = True, False
    return keep


def bits_of(keep):
    """Return (bitmask uint8 [n, ceil(k / 8)], row_offsets int64 [n + 1])."""
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1, dtype=np.int64))]).astype(np.int64)
    return np.packbits(keep, axis=1, bitorder="little"), offsets


def nibbles_of(codes):
    """Pack int8 codes in [-8, 7] two to a byte, the lower first."""
    even = np.append(codes, 0)[: len(codes) + len(codes) % 2].astype(np.uint8) & 15
    return even[::2] | even[1::2] << 4


def draw_epilogue(rng, m, n, number):
    extras = number > 0
    return {
        "m": m,
        "bias": rng.standard_normal(n).astype(np.float32) if extras else None,
        "residual": rng.standard_normal((m, n)).astype(np.float32) if extras else None,
        "activation": ACTIVATIONS[number],
    }


def finish(inputs, product, before):
    """Return (answer, bound) where the products are off by at most `before`."""
    v = product + (0.0 if inputs["bias"] is None else inputs["bias"])
    own = 0 if inputs["activation"] in (None, "relu") else 4e-7 * np.maximum(1, np.abs(v))
    answer = activated(inputs["activation"], v) + (0.0 if inputs["residual"] is None else inputs["residual"])
    # every activation has slope below 1.13; the bias and the residual are one rounding each
    return answer, 1.13 * (before + EPSILON * 1.01 * np.abs(v)) + own + EPSILON * 1.01 * np.abs(answer) + 1e-40


def sizes(*more):
    """(m, n, k, percent kept, epilogue number): no rows, no columns, one element, tails of 4, 8, 16, 64, every count of rows."""
    lengths = (3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130)
    return (
        (0, 4, 8, 50, 0), (3, 0, 8, 50, 0), (5, 4, 0, 50, 1), (1, 1, 1, 100, 0), (1, 1, 1, 0, 1), (2, 8, 16, 0, 1),
        (1, 5, 64, 100, 1),
        *((1 + i % 4, 19, k, 45, i % 6) for i, k in enumerate(lengths)),
        *((m, 33, 70, 30, m % 6) for m in range(1, 14)),
        (1, 70, 300, 50, 1), (2, 16, 517, 20, 3), (4, 35, 1030, 70, 2), (25, 17, 140, 50, 1),
        *more,
    )  # fmt: skip


# ---- float32 ----


def f32_inputs(rng, size):
    m, n, k, percent, number = size
    bitmask, offsets = bits_of(draw_mask(rng, n, k, percent))
    values = rng.standard_normal(int(offsets[-1])).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    return {**draw_epilogue(rng, m, n, number), "shape": (n, k), "values": values, "bitmask": bitmask, "offsets": offsets, "x": x}


def f32_bind(inputs, outputs):
    program = _core.Program()
    weight = _core.Weight(inputs["values"], inputs["shape"], None, inputs["offsets"], bitmask=inputs["bitmask"])
    _core.bitmask_linear(program, inputs["x"], weight, outputs["out"], inputs["bias"], inputs["activation"], inputs["residual"])
    return program


def f32_answer(inputs):
    n, k = inputs["shape"]
    dense = np.zeros((n, k))
    dense[np.unpackbits(inputs["bitmask"], axis=1, count=k, bitorder="little").astype(bool)] = inputs["values"]
    x = inputs["x"].astype(np.float64)
    depth = np.count_nonzero(dense, axis=1) + 8  # lanes and sets are added up at the end
    return finish(inputs, x @ dense.T, EPSILON * 1.001 * depth * (np.abs(x) @ np.abs(dense).T))


F32 = Case(
    name="bitmask_linear",
    slots=("multiply_bitmask_f32",),
    sizes=sizes(),
    inputs=f32_inputs,
    outputs=lambda inputs: {"out": ((inputs["m"], inputs["shape"][0]), np.float32)},
    run=lambda inputs, outputs, threads: f32_bind(inputs, outputs).run(threads),
    bind=f32_bind,
    oracle=lambda inputs: {"out": f32_answer(inputs)[0]},
    bound=lambda inputs, wanted: {"out": f32_answer(inputs)[1]},
    compare="bounded",
    bench=((1, 4096, 11008, 20, 0), (1, 768, 768, 20, 0)),
    work=lambda size: Work(bytes=size[1] * size[2] * (1 / 8 + 4 * size[3] / 100)),
)

# ---- codes ----


def draw_codes(rng, m, k):
    """Codes of x with a scale and a zero point for each row; every third row at the ends of the range."""
    codes = rng.integers(0, 256, (m, k)).astype(np.uint8)
    codes[::3] = np.where(rng.random((len(codes[::3]), k)) < 0.5, 0, 255)
    zeros = rng.integers(0, 256, m).astype(np.int32)
    return {
        "x": codes,
        "codes": panel(codes, zeros, "tile"),
        "scales": rng.uniform(1e-3, 1e-2, m).astype(np.float32),
        "zeros": zeros,
    }


def codes_inputs(rng, size, bits):
    m, n, k, percent, number = size[:5]
    group = size[5] if len(size) > 5 else 32
    keep = draw_mask(rng, n, k, percent)
    bitmask, offsets = bits_of(keep)
    most = 127 if bits == 8 else 7
    weight = np.where(keep, rng.integers(-most, most + 1, (n, k)), 0)
    weight[: n // 2] = np.where(weight[: n // 2] > 0, most, -most) * keep[: n // 2]  # where narrow sums would saturate
    if bits == 4 and n:
        weight[-1] = np.where(keep[-1], -8, 0)
    stored = weight[keep].astype(np.int8)
    scale = rng.uniform(1e-3, 1e-2, n if bits == 8 else (n, -(-k // group)))
    scale = (-scale if m % 3 == 0 else scale).astype(np.float16 if bits == 4 and m % 2 else np.float32)
    if bits == 8:
        view = _core.Weight(stored, (n, k), scale, offsets, bitmask=bitmask)
    else:
        view = _core.Weight(nibbles_of(stored), (n, k), None, offsets, bitmask=bitmask, group_scales=scale, group=group)
    return {
        **draw_epilogue(rng, m, n, number),
        **draw_codes(rng, m, k),
        "weight": weight,
        "scale": scale,
        "gain": scale if bits == 8 else rng.uniform(-2, 2, n).astype(np.float32) if number else None,
        "group": group,
        "packed": _core.pack_bitmask(view),
    }


def codes_bind(inputs, outputs):
    program = _core.Program()
    _core.bitmask_linear_int(
        program, inputs["codes"], inputs["scales"], inputs["zeros"], inputs["m"], inputs["packed"], inputs["gain"],
        outputs["out"], inputs["bias"], inputs["activation"], inputs["residual"],
    )  # fmt: skip
    return program


def s8_answer(inputs):
    acc = (inputs["x"].astype(np.int64) - inputs["zeros"][:, None]) @ inputs["weight"].T.astype(np.int64)
    product = acc * (inputs["scales"].astype(np.float64)[:, None] * inputs["scale"].astype(np.float64))
    return finish(inputs, product, EPSILON * 3.001 * np.abs(product))


def s4_answer(inputs):
    k = inputs["weight"].shape[1]
    weight = inputs["weight"] * np.repeat(inputs["scale"].astype(np.float64), inputs["group"], axis=1)[:, :k]
    factor = inputs["scales"].astype(np.float64)[:, None] * (1.0 if inputs["gain"] is None else inputs["gain"].astype(np.float64))
    product = (inputs["x"].astype(np.float64) - inputs["zeros"][:, None]) @ weight.T * factor
    # a chain over the groups, each term a rounded sum of at most 255 |w|, then what the zero point comes to
    groups = inputs["scale"].shape[1]
    most = 255 * np.abs(weight).sum(axis=1)
    return finish(inputs, product, EPSILON * 1.01 * ((2 * groups + 3) * most * np.abs(factor) + 3 * np.abs(product)))


def codes_case(name, bits, answer, more, bench):
    def nbytes(size):
        stored = size[3] / 100 * bits / 8
        return size[1] * size[2] * (1 / 8 + stored + (2 / size[5] if bits == 4 else 0))

    return Case(
        name=name,
        slots=(f"multiply_bitmask_u8_s{bits}",),
        sizes=sizes(*more),
        inputs=lambda rng, size: codes_inputs(rng, size, bits),
        outputs=lambda inputs: {"out": ((inputs["m"], len(inputs["weight"])), np.float32)},
        run=lambda inputs, outputs, threads: codes_bind(inputs, outputs).run(threads),
        bind=codes_bind,
        oracle=lambda inputs: {"out": answer(inputs)[0]},
        bound=lambda inputs, wanted: {"out": answer(inputs)[1]},
        bench=bench,
        work=lambda size: Work(bytes=nbytes(size)),
    )


GROUPS = tuple((m, 18, k, 50, 1, group) for m, k, group in ((1, 256, 128), (3, 200, 128), (1, 12, 4), (2, 50, 20), (12, 77, 64)))

CASES: list[Case] = [
    F32,
    codes_case("bitmask_linear_int8", 8, s8_answer, (), ((1, 4096, 11008, 50, 0), (1, 4096, 11008, 20, 0))),
    codes_case("bitmask_linear_int4", 4, s4_answer, GROUPS, ((1, 4096, 11008, 50, 0, 32), (1, 4096, 11008, 20, 0, 128))),
]
