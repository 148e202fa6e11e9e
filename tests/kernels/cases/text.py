"""Cases of the text family.

With EPS = 2^-24, a sum of n terms in 16 lanes costs k = n/16 + 6 EPS of the sum of magnitudes, one of n fused steps in order
n EPS; products of factors add their relative errors.
"""

import numpy as np

from gristmill import _core
from kernels.case import Case, Work
from kernels.cases.nn import EMPTY_ROWS, EPS, MATRICES, TINY, runner, wide

# ---- rows by index ----

GATHERS = (
    (1, 0, 3, 0),
    (1, 5, 1, 1),
    (1, 7, 15, 4),
    (2, 3, 16, 5),
    (3, 9, 17, 8),
    (1, 30, 64, 33),
    (1, 200, 384, 70),
    (1, 50, 1000, 3),
)


def gather_inputs(dtype):
    def draw(rng, size):
        outer, places, inner, count = size
        indices = rng.integers(-places, places, count) if places else np.zeros(count, np.int64)
        if count > 3:
            indices[:4] = places, -places - 1, 2**31 - 1, -(2**31)  # outside
        data = rng.standard_normal((outer, places, inner)).astype(np.float32)
        dy = rng.standard_normal((outer, count, inner)).astype(np.float32)
        return {"data": data, "dy": dy, "indices": indices.astype(dtype)}

    return draw


def inside(inputs):
    places = inputs["data"].shape[1]
    indices = inputs["indices"].astype(np.int64)
    return np.where(indices < 0, indices + places, indices), (indices >= -places) & (indices < places)


def gather_oracle(inputs):
    where, fits = inside(inputs)
    out = np.full(inputs["dy"].shape, np.nan)
    out[:, fits] = inputs["data"][:, where[fits]]
    return {"out": out}


def gather_grad_oracle(inputs):
    where, fits = inside(inputs)
    grad = np.zeros(inputs["data"].shape)
    for i in np.nonzero(fits)[0]:
        grad[:, where[i]] += inputs["dy"][:, i]
    return {"grad": grad}


def gather_grad_bound(inputs, wanted):
    magnitudes = gather_grad_oracle({**inputs, "dy": np.abs(inputs["dy"])})["grad"]
    return {"grad": EPS * (len(inputs["indices"]) + 1) * magnitudes}


def gather_case(dtype):
    return Case(
        f"gather-{dtype}",
        ("add_f32",),
        GATHERS,
        gather_inputs(dtype),
        lambda i: {"out": (i["dy"].shape, np.float32)},
        runner(lambda p, i, o: _core.gather(p, i["data"], i["indices"], o["out"])),
        gather_oracle,
        lambda i, w: {"out": 0},
        bench=((1, 30522, 384, 4096),),
        work=lambda size: Work(bytes=8.0 * size[0] * size[2] * size[3]),
    )


GATHER_GRAD = Case(
    "gather_grad",
    ("add_f32",),
    GATHERS,
    gather_inputs("int64"),
    lambda i: {"grad": (i["data"].shape, np.float32)},
    runner(lambda p, i, o: _core.gather_grad(p, i["dy"], i["indices"], o["grad"])),
    gather_grad_oracle,
    gather_grad_bound,
    bench=((1, 30522, 384, 4096),),
    work=lambda size: Work(bytes=4.0 * size[0] * size[2] * (size[1] + 3 * size[3])),
)


def lookup_inputs(rng, size):
    count, n = size
    tables = {f"t{i}": rng.standard_normal((places, n)).astype(np.float32) for i, places in enumerate((90, 30, 2))}
    indices = {f"i{i}": rng.integers(0, places, count) for i, places in enumerate((90, 30, 2))}
    if count > 4:
        indices["i1"][2] = 30
        indices["i0"][3] = -90
    return {**tables, **indices}


def lookup_oracle(inputs):
    rows = [wide(inputs[f"t{i}"])[0][np.clip(inputs[f"i{i}"], -90, len(inputs[f"t{i}"]) - 1)] for i in range(3)]
    rows[1][inputs["i1"] == 30] = np.nan
    return {"out": rows[0] + rows[1] + rows[2]}


LOOKUPS = Case(
    "lookups",
    ("add_f32",),
    MATRICES,
    lookup_inputs,
    lambda i: {"out": ((len(i["i0"]), i["t0"].shape[1]), np.float32)},
    runner(lambda p, i, o: _core.lookups(p, o["out"], i["t0"], i["i0"], i["t1"], i["i1"], i["t2"], i["i2"])),
    lookup_oracle,
    lambda i, w: {"out": 2 * EPS * 18},  # three normal draws stay below 6 each
    bench=((4096, 384),),
    work=lambda size: Work(bytes=8.0 * size[0] * size[1]),
)

# ---- pooling ----

BATCHES = ((0, 3, 4), (1, 1, 1), (2, 0, 5), (3, 4, 15), (2, 7, 16), (5, 9, 17), (4, 12, 33), (7, 64, 100), (3, 20, 384))
ORDERED = {"mean", "sqrt", "weighted"}


def pool_inputs(masked):
    def draw(rng, size):
        batch, length, n = size
        x = rng.standard_normal(size).astype(np.float32)
        mask = (rng.random((batch, length)) < 0.7).astype(np.int64) * 3
        if batch > 2:
            mask[1] = 0
            x[0, 0, 0] = np.nan
            mask[0, 0] = 0
        dy = rng.standard_normal((batch, n)).astype(np.float32)
        if masked:
            return {"x": x, "mask": mask if length % 2 else mask.astype(bool), "dy": dy, "lengths": None}
        lengths = rng.integers(0, length + 1, batch)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = np.nan_to_num(x.reshape(batch * length, n))
        return {"x": rows, "offsets": offsets, "dy": dy}

    return draw


def sequences(inputs):
    """The rows of x that count, and their places in their sequence, for each sequence."""
    x = inputs["x"]
    if "offsets" in inputs:
        offsets = inputs["offsets"]
        return [(np.arange(a, b), np.arange(b - a) + 1) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    places = [np.nonzero(row)[0] for row in inputs["mask"]]
    return [(b * x.shape[1] + at, at + 1) for b, at in enumerate(places)]


def weights(mode, places):
    count = len(places)
    return {
        "mean": np.full(count, 1 / max(count, 1)),
        "sqrt": np.full(count, 1 / np.sqrt(max(count, 1))),
        "weighted": places / max(places.sum(), 1),
        "first": (np.arange(count) == 0).astype(float),
    }[mode]


def pool_oracle(mode):
    def oracle(inputs):
        rows = inputs["x"].reshape(-1, inputs["x"].shape[-1]).astype(np.float64)
        out = np.zeros(inputs["dy"].shape)
        for b, (at, places) in enumerate(sequences(inputs)):
            if len(at):
                out[b] = rows[at].max(0) if mode == "max" else (weights(mode, places)[:, None] * rows[at]).sum(0)
        return {"out": out}

    return oracle


def pool_bound(mode):
    def bound(inputs, wanted):
        if mode not in ORDERED:
            return {"out": 0}
        magnitudes = pool_oracle(mode)({**inputs, "x": np.abs(inputs["x"])})["out"]
        return {"out": EPS * (max([len(at) for at, _ in sequences(inputs)], default=0) + 2) * magnitudes}

    return bound


def pool_grad_oracle(mode):
    def oracle(inputs):
        rows = inputs["x"].reshape(-1, inputs["x"].shape[-1])
        grad = np.zeros(rows.shape)
        for b, (at, places) in enumerate(sequences(inputs)):
            if not len(at):
                continue
            if mode == "max":
                best = rows[at].argmax(0)
                grad[at[best], np.arange(rows.shape[1])] = inputs["dy"][b]
            else:
                grad[at] = weights(mode, places)[:, None] * inputs["dy"][b]
        return {"dx": grad.reshape(inputs["x"].shape)}

    return oracle


def pool_cases(mode, masked):
    by, name = ("mask", "masked") if masked else ("offsets", "packed")
    kernel, kernel_grad = (getattr(_core, f"{name}_pool{end}") for end in ("", "_grad"))
    slots = ("accumulate_f32",) if mode in ORDERED else ("maximum_f32",)
    yield Case(
        f"{name}_pool-{mode}",
        slots,
        BATCHES,
        pool_inputs(masked),
        lambda i: {"out": (i["dy"].shape, np.float32)},
        runner(lambda p, i, o: kernel(p, mode, i["x"], i[by], o["out"])),
        pool_oracle(mode),
        pool_bound(mode),
        bench=((32, 128, 384),),
        work=lambda size: Work(bytes=4.0 * size[0] * size[1] * size[2]),
    )
    yield Case(
        f"{name}_pool_grad-{mode}",
        ("scale_f32",),
        BATCHES,
        pool_inputs(masked),
        lambda i: {"dx": (i["x"].shape, np.float32)},
        runner(lambda p, i, o: kernel_grad(p, mode, i["dy"], i["x"], i[by], o["dx"])),
        pool_grad_oracle(mode),
        lambda i, w: {"dx": 2 * EPS * np.abs(w["dx"])},
        bench=((32, 128, 384),),
        work=lambda size: Work(bytes=4.0 * size[0] * size[1] * size[2]),
    )


# ---- norms and cosines ----


def norm_inputs(rng, size):
    m, n = size
    x, dy = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
    if m > 4:
        x[0], x[1], x[2] = 0, x[1] * np.float32(1e-30), x[2] * np.float32(1e30)
        x[3] *= np.float32(1e-41)
        dy[4] = 0
    if m > 8 and n:
        x[5, n // 2], x[6, n - 1] = np.nan, np.inf
    return {"x": x, "dy": dy, "dloss": np.array([1.5], np.float32)}


class Pair:
    """Dot products of pairs of rows in float64, and how far float32 may be off."""

    def __init__(self, inputs):
        with np.errstate(all="ignore"):
            self.x, self.y = wide(inputs["x"], inputs["dy"])
            self.k = EPS * (self.x.shape[1] / 16 + 6)
            self.xx, self.xy, self.yy = (
                (a * b).sum(1, keepdims=True) for a, b in ((self.x, self.x), (self.x, self.y), (self.y, self.y))
            )
            self.size = np.abs(self.x * self.y).sum(1, keepdims=True)
            self.ix, self.iy = (np.where(square == 0, 0, 1 / np.sqrt(square)) for square in (self.xx, self.yy))


def quiet(function):
    def call(*arguments):
        with np.errstate(all="ignore"):
            return function(*arguments)

    return call


def stored(values):
    """Values as far as float32 reaches: the gradient at a tiny vector may not fit."""
    return np.where(np.abs(values) > np.finfo(np.float32).max, np.copysign(np.inf, values), values)


@quiet
def normalize_grad_oracle(inputs):
    p = Pair(inputs)
    return {"dx": stored(p.y * p.ix - p.x * p.ix * (p.xy * p.ix) * p.ix)}


@quiet
def normalize_grad_bound(inputs, wanted):
    p = Pair(inputs)
    along, across = np.abs(p.y) * p.ix, np.abs(p.x) * p.ix * p.size * p.ix * p.ix
    return {"dx": (p.k * 3 + 6 * EPS) * (along + across) + TINY}


@quiet
def cosine_oracle(inputs):
    p = Pair(inputs)
    return {"loss": (1 - p.xy * p.ix * p.iy).mean() if len(p.x) else np.float64(np.nan)}


@quiet
def cosine_bound(inputs, wanted):
    p = Pair(inputs)
    return {"loss": (p.k * 2 * p.size * p.ix * p.iy).sum() / max(len(p.x), 1) + EPS * np.abs(wanted["loss"])}


@quiet
def cosine_grad_oracle(inputs):
    p = Pair(inputs)
    inner = p.y * p.iy * p.ix - (p.xy * p.ix * p.iy) * p.ix * (p.x * p.ix)
    return {"dx": stored(-1.5 / max(len(p.x), 1) * np.where(p.xx * p.yy == 0, 0, inner))}


@quiet
def cosine_grad_bound(inputs, wanted):
    p = Pair(inputs)
    along, across = np.abs(p.y) * p.iy * p.ix, (p.size * p.ix * p.iy) * p.ix * np.abs(p.x * p.ix)
    return {"dx": 1.5 / max(len(p.x), 1) * (p.k * 3 + 6 * EPS) * (along + across) + TINY}


def same_shape(out):
    return lambda inputs: {out: (inputs["x"].shape, np.float32)}


def streams(count):
    return lambda size: Work(bytes=4.0 * count * size[0] * size[1])


ROWS = [
    Case(
        "normalize", ("dots_f32", "scale_f32"), MATRICES + EMPTY_ROWS, norm_inputs, same_shape("out"),
        runner(lambda p, i, o: _core.normalize(p, i["x"], o["out"])),
        quiet(lambda i: {"out": Pair(i).x * Pair(i).ix}),
        quiet(lambda i, w: {"out": (Pair(i).k + 3 * EPS) * np.abs(w["out"]) + TINY}),
        bench=((4096, 384),), work=streams(2),
    ),
    Case(
        "normalize_grad", ("dots_f32", "combine_f32"), MATRICES + EMPTY_ROWS, norm_inputs, same_shape("dx"),
        runner(lambda p, i, o: _core.normalize_grad(p, i["dy"], i["x"], o["dx"])),
        normalize_grad_oracle, normalize_grad_bound, bench=((4096, 384),), work=streams(3),
    ),
    Case(
        "cosine", ("dots_f32",), MATRICES + EMPTY_ROWS, norm_inputs, lambda i: {"loss": ((), np.float32)},
        runner(lambda p, i, o: _core.cosine(p, i["x"], i["dy"], o["loss"])),
        cosine_oracle, cosine_bound, bench=((4096, 384),), work=streams(2),
    ),
    Case(
        "cosine_grad", ("dots_f32", "combine_f32"), MATRICES + EMPTY_ROWS, norm_inputs, same_shape("dx"),
        runner(lambda p, i, o: _core.cosine_grad(p, i["dloss"].reshape(()), i["x"], i["dy"], o["dx"])),
        cosine_grad_oracle, cosine_grad_bound, bench=((4096, 384),), work=streams(3),
    ),
]  # fmt: skip

CASES = [
    gather_case("int64"),
    gather_case("int32"),
    GATHER_GRAD,
    LOOKUPS,
    *[
        case
        for mode in ("mean", "sqrt", "weighted", "max", "first")
        for masked in (True, False)
        for case in pool_cases(mode, masked)
    ],
    *ROWS,
]
