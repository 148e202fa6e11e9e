"""Cases of the prune family."""

import numpy as np

from gristmill import _core
from kernels.case import Case, Work

EPSILON = 2.0**-24  # half an ulp of float32, relative

# ---- magnitudes ----


def draw_vector(rng, size):
    """Normal values with ties, zeros of both signs, denormals and infinities among them."""
    (n,) = size
    x = rng.standard_normal(n).astype(np.float32)
    specials = np.array([0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 0.5, -0.5, np.finfo(np.float32).max], np.float32)
    where = rng.random(n) < 0.2
    x[where] = rng.choice(specials, int(where.sum()))
    return x


def kth_inputs(rng, size):
    x = draw_vector(rng, size)
    return {
        "x": x,
        "ranks": sorted({1, max(1, x.size // 5), max(1, x.size * 4 // 5), max(1, x.size)}) if x.size else [],
    }


def kth_run(inputs, outputs, threads):
    for i, k in enumerate(inputs["ranks"]):
        outputs["kth"][i] = _core.kth_magnitude(inputs["x"], k, threads)


def mask_inputs(rng, size):
    return {"x": draw_vector(rng, size), "drop": int(size[0] * 0.45)}


def mask_oracle(inputs):
    order = np.argsort(np.abs(inputs["x"]), kind="stable")
    mask = np.ones(inputs["x"].size, np.uint8)
    mask[order[: inputs["drop"]]] = 0
    return {"mask": mask}


def no_difference(inputs, wanted):
    return dict.fromkeys(wanted, 0)


KTH = Case(
    name="kth_magnitude",
    slots=("count_magnitudes_f32",),
    sizes=((0,), (1,), (2,), (7,), (8,), (9,), (15,), (16,), (17,), (1023,), (1041,), (40000,), (300001,)),
    inputs=kth_inputs,
    outputs=lambda inputs: {"kth": ((len(inputs["ranks"]),), np.float32)},
    run=kth_run,
    oracle=lambda inputs: {"kth": np.sort(np.abs(inputs["x"]))[np.array(inputs["ranks"], np.int64) - 1]},
    bound=no_difference,
)

# One rank of a long vector: one pass over memory.
KTH_LARGE = Case(
    name="kth_magnitude_large",
    slots=("collect_magnitudes_f32", "count_magnitudes_f32"),
    sizes=((1 << 19,), ((1 << 18) + 77,)),
    inputs=lambda rng, size: {"x": rng.standard_normal(size[0], np.float32), "ranks": [size[0] * 4 // 5]},
    outputs=KTH.outputs,
    run=kth_run,
    oracle=KTH.oracle,
    bound=no_difference,
    bench=((1 << 26,),),
    work=lambda size: Work(bytes=4.0 * size[0]),
)

MASK = Case(
    name="magnitude_mask",
    slots=("mask_magnitudes_f32", "count_magnitudes_f32", "collect_magnitudes_f32"),
    sizes=((0,), (1,), (2,), (7,), (31,), (32,), (33,), (63,), (64,), (65,), (127,), (1023,), (70001,), (300001,)),
    inputs=mask_inputs,
    outputs=lambda inputs: {"mask": (inputs["x"].shape, np.uint8)},
    run=lambda inputs, outputs, threads: _core.magnitude_mask(inputs["x"], inputs["drop"], outputs["mask"], threads),
    oracle=mask_oracle,
    bound=no_difference,
    bench=((1 << 26,),),
    work=lambda size: Work(bytes=9.0 * size[0]),  # one pass to select, one to write a byte each
)


# A list of vectors, some of them empty, as one.
PARTS = Case(
    name="magnitude_mask_of_parts",
    slots=("mask_magnitudes_f32", "count_magnitudes_f32", "collect_magnitudes_f32"),
    sizes=((0,), (3,), (70,), (40001,), (300001,)),
    inputs=mask_inputs,
    outputs=lambda inputs: {"mask": (inputs["x"].shape, np.uint8)},
    run=lambda inputs, outputs, threads: _core.magnitude_mask(cut(inputs["x"]), inputs["drop"], cut(outputs["mask"]), threads),
    oracle=mask_oracle,
    bound=no_difference,
)


def cut(x):
    n = len(x)
    return np.split(x, [0, n // 7, n // 7, n // 2, n // 2 + min(1, n - n // 2), n])


def rows_oracle(inputs):
    x, drop = inputs["x"], inputs["drop"]
    order = np.argsort(np.abs(x), axis=1, kind="stable")
    mask = np.ones(x.shape, np.uint8)
    np.put_along_axis(mask, order[:, :drop], 0, axis=1)
    return {"mask": mask}


def rows_inputs(rng, size):
    n, k = size
    return {"x": draw_vector(rng, (n * k,)).reshape(n, k), "drop": int(k * 0.55)}


ROWS = Case(
    name="magnitude_mask_rows",
    slots=("mask_magnitudes_f32", "count_magnitudes_f32"),
    sizes=((0, 3), (3, 0), (1, 1), (5, 2), (4, 63), (7, 384), (3, 9001), (70, 257)),
    inputs=rows_inputs,
    outputs=lambda inputs: {"mask": (inputs["x"].shape, np.uint8)},
    run=lambda inputs, outputs, threads: _core.magnitude_mask_rows(inputs["x"], inputs["drop"], outputs["mask"], threads),
    oracle=rows_oracle,
    bound=no_difference,
    bench=((4096, 4096), (3072, 768)),
    work=lambda size: Work(bytes=5.0 * size[0] * size[1]),
)


def groups_inputs(rng, size):
    n, k, keep, of = size
    return {"x": draw_vector(rng, (n * k,)).reshape(n, k), "keep": keep, "of": of}


def groups_oracle(inputs):
    x, keep, of = inputs["x"], inputs["keep"], inputs["of"]
    groups = np.abs(x).reshape(-1, of)
    mask = np.ones(groups.shape, np.uint8)
    np.put_along_axis(mask, np.argsort(groups, axis=1, kind="stable")[:, : of - keep], 0, axis=1)
    return {"mask": mask.reshape(x.shape)}


GROUPS = Case(
    name="n_of_m_mask",
    slots=("mask_n_of_m_f32",),
    sizes=(
        (0, 4, 2, 4),
        (3, 0, 2, 4),
        (1, 4, 2, 4),
        (5, 20, 1, 4),
        (3, 64, 2, 4),
        (9, 68, 3, 4),
        (7, 40, 4, 8),
        (6, 136, 1, 8),
        (5, 26, 1, 2),
        (3, 80, 5, 16),
        (4, 36, 2, 3),
        (2, 64, 9, 32),
        (3, 128, 0, 4),
        (3, 128, 8, 8),
        (99, 1028, 2, 4),
    ),
    inputs=groups_inputs,
    outputs=lambda inputs: {"mask": (inputs["x"].shape, np.uint8)},
    run=lambda inputs, outputs, threads: _core.n_of_m_mask(inputs["x"], inputs["keep"], inputs["of"], outputs["mask"], threads),
    oracle=groups_oracle,
    bound=no_difference,
    bench=((8192, 8192, 2, 4), (8192, 8192, 4, 8)),
    work=lambda size: Work(bytes=5.0 * size[0] * size[1]),
)

# ---- scores ----


def squares_run(inputs, outputs, threads):
    _core.block_magnitudes(inputs["weight"], inputs["block"], outputs["sums"], threads, inputs["norms"])


def squares_oracle(inputs):
    (n, k), (r, c) = inputs["weight"].shape, inputs["block"]
    scaled = inputs["weight"].astype(np.float64) * (1.0 if inputs["norms"] is None else inputs["norms"].astype(np.float64))
    return {"sums": (scaled.reshape(n // r, r, k // c, c) ** 2).sum(axis=(1, 3))}


def squares_inputs(rng, size):
    n, k, r, c, scaled = size
    weight = rng.standard_normal((n, k)).astype(np.float32)
    return {"weight": weight, "block": (r, c), "norms": rng.uniform(0, 9, k).astype(np.float32) if scaled else None}


SHAPES = (
    (0, 4, 1, 4),
    (3, 0, 1, 4),
    (1, 1, 1, 1),
    (5, 17, 1, 1),
    (3, 64, 1, 4),
    (2, 68, 1, 4),
    (6, 60, 2, 4),
    (8, 132, 4, 4),
    (4, 33, 4, 1),
    (9, 35, 3, 5),
)

SQUARES = Case(
    name="block_magnitudes",
    slots=("sum_block_squares_f32",),
    sizes=(*((*shape, 0) for shape in SHAPES), *((*shape, 1) for shape in SHAPES)),
    inputs=squares_inputs,
    outputs=lambda inputs: {"sums": (grid_of(inputs), np.float32)},
    run=squares_run,
    oracle=squares_oracle,
    # each of the r c squares has up to two rounded products and passes through at most r c additions; a norm rounds once more
    bound=lambda inputs, wanted: {"sums": EPSILON * (np.prod(inputs["block"]) + 3) * wanted["sums"] * 1.001},
    bench=((4096, 4096, 1, 4, 0), (4096, 4096, 4, 4, 0), (4096, 4096, 4, 4, 1)),
    work=lambda size: Work(bytes=4.0 * size[0] * size[1] * (1 + 1 / (size[2] * size[3]))),
)


def grid_of(inputs):
    return tuple(have // by for have, by in zip(inputs["weight"].shape, inputs["block"], strict=True))


CHANNELS = Case(
    name="channel_magnitudes",
    slots=("scale_magnitudes_f32",),
    sizes=((0, 4), (3, 0), (1, 1), (5, 17), (3, 64), (7, 129)),
    inputs=lambda rng, size: squares_inputs(rng, (*size, 1, 1, 1)),
    outputs=lambda inputs: {"out": (inputs["weight"].shape, np.float32)},
    run=lambda inputs, outputs, threads: _core.channel_magnitudes(inputs["weight"], inputs["norms"], outputs["out"], threads),
    oracle=lambda inputs: {"out": np.abs(inputs["weight"].astype(np.float64) * inputs["norms"].astype(np.float64))},
    bound=lambda inputs, wanted: {"out": EPSILON * wanted["out"]},
    bench=((4096, 4096),),
    work=lambda size: Work(bytes=8.0 * size[0] * size[1]),
)

# ---- masks applied ----


def apply_inputs(rng, size):
    n, k, r, c = size
    weight = draw_vector(rng, (n * k,)).reshape(n, k)
    return {"weight": weight, "block": (r, c), "mask": (rng.random((n // r, k // c)) < 0.5).astype(np.uint8) * 255}


def apply_run(inputs, outputs, threads):
    outputs["weight"][...] = inputs["weight"]
    _core.apply_mask(outputs["weight"], inputs["mask"], inputs["block"], threads)


def apply_oracle(inputs):
    r, c = inputs["block"]
    keep = np.repeat(np.repeat(inputs["mask"], r, axis=0), c, axis=1) != 0
    return {"weight": np.where(keep, inputs["weight"], 0)}


APPLY = Case(
    name="apply_mask",
    slots=("apply_mask_f32",),
    sizes=SHAPES,
    inputs=apply_inputs,
    outputs=lambda inputs: {"weight": (inputs["weight"].shape, np.float32)},
    run=apply_run,
    oracle=apply_oracle,
    bound=lambda inputs, wanted: {"weight": 0},
    bench=((4096, 4096, 1, 1), (4096, 4096, 4, 4)),
    work=lambda size: Work(bytes=8.0 * size[0] * size[1]),
)

CASES: list[Case] = [KTH, KTH_LARGE, MASK, PARTS, ROWS, GROUPS, SQUARES, CHANNELS, APPLY]
