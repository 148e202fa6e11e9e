"""Cases of the attention family.

Sizes are (batch, queries, keys, heads, width, masking). Bounds are first-order error analyses with EPS = 2^-24: a score of depth
W is off by (W + 2) EPS of the sum of its products' magnitudes; exp turns that, and EPS of the score's distance to the row's
largest, into a relative error of the weight; a weighted mean is off by the weights' errors, and by EPS for each addition.
"""

import numpy as np

from gristmill import _core
from kernels.case import Arrays, Case, Work

EPS = 2.0**-24
TINY = 2.0**-126
PREFIX, SCATTERED, NONE, NO_MASK = range(4)

SIZES = (
    (0, 3, 4, 2, 8, NO_MASK),
    (2, 0, 4, 2, 8, NO_MASK),
    (2, 3, 0, 2, 8, NO_MASK),
    (2, 3, 4, 2, 0, NO_MASK),
    (1, 1, 1, 1, 1, NO_MASK),
    (2, 16, 16, 3, 32, NO_MASK),
    (3, 17, 33, 2, 32, PREFIX),
    (2, 15, 31, 2, 33, SCATTERED),
    (2, 7, 9, 1, 20, NONE),
    (1, 100, 129, 2, 64, SCATTERED),
    (1, 50, 700, 1, 15, PREFIX),
    (2, 13, 48, 5, 7, PREFIX),
    (1, 1, 200, 2, 17, NO_MASK),
)
# all-MiniLM-L6-v2 has 12 heads of width 32, BERT 12 of width 64.
BENCH = (
    (32, 128, 128, 12, 32, NO_MASK),
    (32, 16, 16, 12, 32, NO_MASK),
    (1, 128, 128, 12, 32, NO_MASK),
    (8, 128, 128, 12, 64, NO_MASK),
)


def scale_of(width: int) -> float:
    return float(np.float32(max(width, 1) ** -0.5))


def make_mask(rng, batch, keys, masking):
    if masking == PREFIX:
        return (np.arange(keys) < rng.integers(1, keys + 1, (batch, 1))).astype(np.int64) * 5
    if masking == SCATTERED:
        return rng.random((batch, keys)) < 0.5
    return np.zeros((batch, keys), np.int64)


def masked_inputs(rng, size):
    batch, queries, keys, heads, width, masking = size
    shapes = {"q": queries, "k": keys, "v": keys, "dout": queries}
    arrays: Arrays = {name: rng.standard_normal((batch, rows, heads * width)).astype(np.float32) for name, rows in shapes.items()}
    arrays["q"] *= np.float32(3)  # sharp in places
    if masking != NO_MASK:
        arrays["mask"] = make_mask(rng, batch, keys, masking)
    return {**arrays, "heads": heads, "scale": scale_of(width)}


def packed_inputs(rng, size):
    batch, queries, keys, heads, width, _ = size
    lengths = rng.integers(0, max(queries, keys) + 1, batch)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = int(offsets[-1]) + 3
    arrays: Arrays = {name: rng.standard_normal((rows, heads * width)).astype(np.float32) for name in ("q", "k", "v", "dout")}
    return {**arrays, "offsets": offsets, "heads": heads, "scale": scale_of(width)}


class Head:
    """One head of one text in float64, with the errors that float32 makes of it."""

    def __init__(self, q, k, v, scale, dout):
        q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
        self.q, self.k, self.v, self.dout, self.scale = q, k, v, dout, scale
        keys, width = k.shape
        scores = scale * (q @ k.T)
        distance = scores.max(-1, keepdims=True) - scores
        self.p = np.exp(-distance)
        self.p /= self.p.sum(-1, keepdims=True)
        error = EPS * (scale * (width + 2) * (np.abs(q) @ np.abs(k).T) + 3 * distance + 4)
        error += ((self.p * error).sum(-1, keepdims=True)) + EPS * (keys / 16 + 8)
        self.p_error = self.p * error + TINY
        self.keys, self.rows, self.width = keys, len(q), width

    def out(self):
        return self.p @ self.v

    def out_bound(self):
        return self.p_error @ np.abs(self.v) + EPS * (self.keys + 2) * (self.p @ np.abs(self.v))

    def slopes(self):
        """The gradient of the scores, and its error."""
        dp = self.dout @ self.v.T
        dp_error = EPS * (self.width + 1) * (np.abs(self.dout) @ np.abs(self.v).T)
        mean = (self.p * dp).sum(-1, keepdims=True)
        mean_error = (self.p_error * np.abs(dp) + self.p * dp_error).sum(-1, keepdims=True)
        mean_error += EPS * (self.keys / 16 + 8) * (self.p * np.abs(dp)).sum(-1, keepdims=True)
        error = self.p_error * np.abs(dp - mean) + self.p * (dp_error + mean_error)
        error += 4 * EPS * self.p * (np.abs(dp) + np.abs(mean))
        return self.scale * self.p * (dp - mean), self.scale * error + TINY

    def grads(self):
        ds, _ = self.slopes()
        return ds @ self.k, ds.T @ self.q, self.p.T @ self.dout

    def grad_bounds(self):
        ds, error = self.slopes()
        sizes = [np.abs(x) for x in (ds, self.k, self.q, self.dout)]
        return (
            error @ sizes[1] + EPS * (self.keys + 2) * (sizes[0] @ sizes[1]),
            error.T @ sizes[2] + EPS * (self.rows + 2) * (sizes[0].T @ sizes[2]),
            self.p_error.T @ sizes[3] + EPS * (self.rows + 2) * (self.p.T @ sizes[3]),
        )


def texts(inputs):
    """Yield (index of q's rows, index of k's rows) of every text, and whether its keys are all masked."""
    if "offsets" in inputs:
        for begin, end in zip(inputs["offsets"][:-1], inputs["offsets"][1:], strict=True):
            yield (slice(begin, end),), (slice(begin, end),), False
        return
    for i in range(len(inputs["q"])):
        chosen = np.arange(inputs["k"].shape[1])
        mask = inputs.get("mask")
        if mask is not None and mask[i].any():
            chosen = np.flatnonzero(mask[i])
        yield (i,), (i, chosen), mask is not None and not mask[i].any()


def by_head(inputs, results, figures):
    """Fill the results, zeros at first, with the figures of every head of every text."""
    width = inputs["q"].shape[-1] // inputs["heads"]
    for rows, keys, is_flat in texts(inputs):
        for h in range(inputs["heads"]):
            columns = slice(h * width, (h + 1) * width)
            q, k, v, dout = (inputs[x][at][..., columns] for x, at in (("q", rows), ("k", keys), ("v", keys), ("dout", rows)))
            if not (q.size and k.size):
                continue
            made = figures(Head(q, k, v, 0.0 if is_flat else inputs["scale"], dout))
            for result, at, value in zip(results, (rows, keys, keys), made, strict=False):
                if len(at) == 1:
                    result[at[0]][:, columns] = value
                else:
                    result[at[0]][at[1], columns] = value


def zeros(inputs, *names):
    return [np.zeros(inputs[name].shape) for name in names]


def forward(figures):
    def compute(inputs, wanted=None):
        (out,) = results = zeros(inputs, "q")
        by_head(inputs, results, lambda head: [figures(head)])
        return {"out": out}

    return compute


def backward(figures):
    def compute(inputs, wanted=None):
        results = zeros(inputs, "q", "k", "v")
        by_head(inputs, results, figures)
        return dict(zip(("dq", "dk", "dv"), results, strict=True))

    return compute


def program(inputs, outputs, threads):
    """Append the step that the outputs ask for."""
    made, is_grad = _core.Program(), "out" not in outputs
    keys, width = inputs["k"].shape[-2], inputs["q"].shape[-1] // inputs["heads"]
    scratch = np.empty(_core.attention_scratch(keys, width, threads, is_grad), np.uint8)
    masked = (_core.masked_attention, _core.masked_attention_grad)[is_grad]
    packed = (_core.packed_attention, _core.packed_attention_grad)[is_grad]
    step, guide = (packed, inputs["offsets"]) if "offsets" in inputs else (masked, inputs.get("mask"))
    first = (inputs["dout"],) if is_grad else ()
    arrays = (inputs["q"], inputs["k"], inputs["v"], guide)
    step(made, *first, *arrays, inputs["heads"], inputs["scale"], *outputs.values(), scratch)
    return made


def case(name, draw, sizes, is_grad, bench=()):
    slots = ("attention_product_f32", "attention_panels_f32", "attention_softmax_f32")
    products = 5 if is_grad else 2
    sources = {"dq": "q", "dk": "k", "dv": "v"} if is_grad else {"out": "q"}
    return Case(
        name,
        (*slots, "attention_softmax_grad_f32") if is_grad else slots,
        sizes,
        draw,
        lambda inputs: {out: (inputs[source].shape, np.float32) for out, source in sources.items()},
        lambda inputs, outputs, threads: program(inputs, outputs, threads).run(threads),
        backward(Head.grads) if is_grad else forward(Head.out),
        backward(Head.grad_bounds) if is_grad else forward(Head.out_bound),
        compare="bounded",
        bind=lambda inputs, outputs: program(inputs, outputs, 1),
        bench=bench,
        work=lambda s: Work(operations=2.0 * products * s[0] * s[1] * s[2] * s[3] * s[4], limit="fma"),
    )


CASES = [
    case("masked_attention", masked_inputs, SIZES, False, BENCH),
    case("packed_attention", packed_inputs, SIZES, False),
    case("masked_attention_grad", masked_inputs, SIZES, True, BENCH[:1]),
    case("packed_attention_grad", packed_inputs, SIZES, True),
]
