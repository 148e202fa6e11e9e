"""Cases of the vision family: convolution (tiles, depthwise), pooling, means of planes, scaling of channels.

A size is (images, channels, height, width, filters, kernel, stride, dilation, pad, group, option); kernel, stride, dilation and
pad hold along x, one less where that is possible along y, so that no axis can be taken for the other. Options count from 1.
"""

from functools import partial

import numpy as np

from gristmill import _core
from kernels.case import Arrays, Case, Size, Work

UNIT = 2.0**-24  # rounding of one float32 operation, relative
OPTIONS = [  # (bias, addend, low, high, activation)
    (False, False, -np.inf, np.inf, None),
    (True, False, -np.inf, np.inf, None),
    (True, False, 0.0, np.inf, None),
    (True, True, 0.0, 6.0, None),
    (True, False, -np.inf, np.inf, "silu"),
    (False, True, -0.5, 0.75, None),
]


def uneven(value: int, least: int) -> tuple[int, int]:
    return max(least, value - 1), value


def geometry_of(size: Size) -> tuple[tuple[int, int], ...]:
    kernel, stride, dilation, pad = size[5:9]
    return uneven(kernel, 1), uneven(stride, 1), uneven(dilation, 1), uneven(pad, 0)


def extents_of(size: Size) -> tuple[int, int]:
    """The output's height and width, with one column of padding behind more than before."""
    kernel, stride, dilation, pad = geometry_of(size)
    image = size[2:4]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    room = [n + 2 * p + (p > 0) - r for n, p, r in zip(image, pad, reach, strict=True)]
    return max(0, room[0] // stride[0] + 1), max(0, room[1] // stride[1] + 1)


def windows(x: np.ndarray, size: Size, fill: float) -> np.ndarray:
    """Return [N, C, OH, OW, kh, kw] of a padded image, element by element."""
    kernel, stride, dilation, pad = geometry_of(size)
    height, width = extents_of(size)
    out = np.full((*x.shape[:2], height, width, *kernel), fill)
    for i in range(height):
        for j in range(width):
            for a in range(kernel[0]):
                for b in range(kernel[1]):
                    y, z = i * stride[0] + a * dilation[0] - pad[0], j * stride[1] + b * dilation[1] - pad[1]
                    if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                        out[:, :, i, j, a, b] = x[:, :, y, z]
    return out


# ---- convolution ----


def draw(rng: np.random.Generator, size: Size) -> Arrays:
    n, c, h, w, m = size[:5]
    group, option = size[9:]
    bias, addend, low, high, activation = OPTIONS[option - 1]
    kernel = geometry_of(size)[0]
    shape = (n, m, *extents_of(size))
    return {
        "x": rng.standard_normal((n, c, h, w), dtype=np.float32),
        "weight": rng.standard_normal((m, c // group, *kernel), dtype=np.float32),
        "bias": rng.standard_normal(m, dtype=np.float32) if bias else None,
        "addend": rng.standard_normal(shape, dtype=np.float32) if addend else None,
        "low": low,
        "high": high,
        "activation": activation,
        "size": size,
        "shape": shape,
    }


def bind_convolution(inputs: Arrays, outputs: Arrays, threads: int = 1) -> _core.Program:
    size, weight, x = inputs["size"], inputs["weight"], inputs["x"]
    geometry, group = geometry_of(size), size[9]
    if group == 1 or group != x.shape[1]:
        m, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
        flat = weight.reshape(m, taps * weight.shape[1])
        weight = _core.ConvolutionPacker(group, taps)(_core.Weight(flat, flat.shape), threads)
    nbytes = _core.convolution_scratch(x.shape[2:], inputs["shape"][2:], geometry, x.shape[1], group, threads)
    program = _core.Program()
    _core.convolution(
        program, x, weight, outputs["out"], geometry, group, inputs["bias"], inputs["addend"], inputs["low"], inputs["high"],
        inputs["activation"], np.empty(nbytes, np.uint8),
    )  # fmt: skip
    return program


def run_convolution(inputs: Arrays, outputs: Arrays, threads: int) -> None:
    bind_convolution(inputs, outputs, threads).run(threads)


def product(x: np.ndarray, weight: np.ndarray, size: Size) -> np.ndarray:
    group = size[9]
    cut = windows(x.astype(np.float64), size, 0.0)
    n, c = cut.shape[:2]
    cut = cut.reshape(n, group, c // group, *cut.shape[2:])
    grouped = weight.astype(np.float64).reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return np.einsum("ngcyxab,gmcab->ngmyx", cut, grouped).reshape(n, weight.shape[0], *cut.shape[3:5])


def before_activation(inputs: Arrays) -> np.ndarray:
    y = product(inputs["x"], inputs["weight"], inputs["size"])
    if inputs["bias"] is not None:
        y = y + inputs["bias"].astype(np.float64)[:, None, None]
    if inputs["addend"] is not None:
        y = y + inputs["addend"]
    return np.clip(y, inputs["low"], inputs["high"])


def convolution_oracle(inputs: Arrays) -> Arrays:
    y = before_activation(inputs)
    return {"out": y if inputs["activation"] is None else y / (1 + np.exp(-y))}


def convolution_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    """As many products and sums as the depth, bias and addend; silu steepens errors by 1.1 at most and adds its own."""
    magnitude = product(np.abs(inputs["x"]), np.abs(inputs["weight"]), inputs["size"])
    if inputs["bias"] is not None:
        magnitude = magnitude + np.abs(inputs["bias"])[:, None, None]
    if inputs["addend"] is not None:
        magnitude = magnitude + np.abs(inputs["addend"])
    bound = (inputs["weight"][0].size + 3 if inputs["weight"].size else 3) * UNIT * magnitude
    if inputs["activation"] is not None:
        bound = 1.1 * bound + 8 * UNIT * (1 + np.abs(before_activation(inputs)))
    return {"out": bound}


def convolution_work(size: Size) -> Work:
    n, c, _, _, m = size[:5]
    kernel = geometry_of(size)[0]
    return Work(operations=2.0 * n * m * np.prod(extents_of(size)) * (c // size[9]) * np.prod(kernel), limit="fma")


# (images, channels, height, width, filters, kernel, stride, dilation, pad, group, option)
CONVOLUTIONS = (
    (0, 3, 4, 4, 2, 2, 1, 1, 0, 1, 1),
    (1, 0, 3, 3, 2, 2, 1, 1, 0, 1, 2),
    (1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1),
    (1, 2, 1, 37, 4, 5, 1, 1, 2, 1, 2),
    (2, 3, 5, 7, 13, 3, 1, 1, 1, 1, 3),
    (1, 4, 6, 5, 3, 1, 1, 1, 0, 1, 4),
    (1, 70, 4, 8, 25, 1, 1, 1, 0, 1, 5),
    (1, 300, 3, 3, 7, 2, 1, 1, 1, 1, 6),
    (1, 3, 11, 19, 14, 3, 2, 1, 1, 1, 3),
    (2, 4, 9, 9, 6, 3, 3, 1, 2, 2, 4),
    (1, 2, 12, 13, 5, 3, 2, 2, 3, 1, 2),
    (1, 6, 4, 65, 6, 2, 1, 1, 1, 3, 5),
    (1, 5, 2, 2, 3, 5, 4, 1, 6, 1, 1),
)
DEPTHWISE = (
    (0, 2, 4, 4, 2, 2, 1, 1, 0, 2, 1),
    (1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 2),
    (2, 3, 6, 7, 3, 3, 1, 1, 1, 3, 3),
    (1, 4, 5, 66, 8, 3, 1, 1, 2, 4, 4),
    (1, 2, 13, 15, 4, 3, 2, 1, 1, 2, 6),
    (1, 2, 9, 17, 2, 4, 3, 2, 3, 2, 5),
    (1, 2, 120, 90, 2, 3, 1, 1, 1, 2, 3),
)


# ---- pooling ----


def draw_image(rng: np.random.Generator, size: Size) -> Arrays:
    x = rng.standard_normal(size[:4], dtype=np.float32)
    if size[10] == 2 and x.size > 3:
        x.reshape(-1)[rng.choice(x.size, 3, replace=False)] = [np.nan, np.inf, -np.inf]
    return {"x": x, "size": size, "shape": (*size[:2], *extents_of(size))}


def run_pool(average: bool, include_pad: bool, inputs: Arrays, outputs: Arrays, threads: int) -> None:
    bind_pool(average, include_pad, inputs, outputs, threads).run(threads)


def bind_pool(average: bool, include_pad: bool, inputs: Arrays, outputs: Arrays, threads: int = 1) -> _core.Program:
    x, geometry = inputs["x"], geometry_of(inputs["size"])
    behind = tuple(p + (p > 0) for p in geometry[3])
    nbytes = _core.convolution_scratch(x.shape[2:], inputs["shape"][2:], geometry, 0, 1, threads)
    program = _core.Program()
    _core.pool(program, x, outputs["out"], geometry, average, include_pad, behind, np.empty(nbytes, np.uint8))
    return program


def max_oracle(inputs: Arrays) -> Arrays:
    return {"out": windows(inputs["x"], inputs["size"], -np.inf).max((4, 5))}


def counts(inputs: Arrays, include_pad: bool) -> np.ndarray:
    x, pad = inputs["x"], geometry_of(inputs["size"])[3]
    inside = np.ones((1, 1, *x.shape[2:]))
    if not include_pad:
        return np.maximum(windows(inside, inputs["size"], 0.0).sum((4, 5)), 1)
    whole = np.ones((1, 1, *(n + 2 * p + (p > 0) for n, p in zip(x.shape[2:], pad, strict=True))))
    size = inputs["size"]
    kernel, stride, dilation, _ = geometry_of(size)
    total = np.zeros((1, 1, *inputs["shape"][2:]))
    for i in range(total.shape[2]):
        for j in range(total.shape[3]):
            rows = slice(i * stride[0], i * stride[0] + kernel[0] * dilation[0], dilation[0])
            cols = slice(j * stride[1], j * stride[1] + kernel[1] * dilation[1], dilation[1])
            total[0, 0, i, j] = whole[0, 0, rows, cols].sum()
    return np.maximum(total, 1)


def average_oracle(include_pad: bool, inputs: Arrays) -> Arrays:
    with np.errstate(invalid="ignore"):
        total = windows(inputs["x"].astype(np.float64), inputs["size"], 0.0).sum((4, 5))
    return {"out": total / counts(inputs, include_pad)}


def average_bound(include_pad: bool, inputs: Arrays, wanted: Arrays) -> Arrays:
    total = windows(np.abs(inputs["x"]).astype(np.float64), inputs["size"], 0.0)
    return {"out": (total.shape[4] * total.shape[5] + 1) * UNIT * total.sum((4, 5)) / counts(inputs, include_pad)}


def no_difference(inputs: Arrays, wanted: Arrays) -> Arrays:
    return {"out": np.zeros(wanted["out"].shape)}


# The last number: 2 puts NaN and infinities among the values.
POOLS = (
    (0, 2, 4, 4, 1, 2, 1, 1, 0, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1),
    (2, 2, 5, 7, 1, 2, 2, 1, 0, 1, 2),
    (1, 3, 7, 65, 1, 3, 2, 1, 1, 1, 2),
    (1, 1, 9, 200, 1, 3, 1, 2, 2, 1, 1),
    (1, 2, 6, 31, 1, 5, 3, 1, 4, 1, 2),
    (1, 1, 150, 70, 1, 3, 1, 1, 1, 1, 1),
)
FINITE = tuple((*size[:10], 1) for size in POOLS)


# ---- whole planes; a size is (images, channels, n) ----


def draw_planes(rng: np.random.Generator, size: Size) -> Arrays:
    return {
        "x": rng.standard_normal(size, dtype=np.float32),
        "factor": rng.standard_normal(size[1], dtype=np.float32),
        "offset": rng.standard_normal(size[1], dtype=np.float32),
    }


def run_means(inputs: Arrays, outputs: Arrays, threads: int) -> None:
    program, x = _core.Program(), inputs["x"]
    _core.plane_means(program, x.reshape(x.shape[0] * x.shape[1], x.shape[2]), outputs["out"])
    program.run(threads)


def means_oracle(inputs: Arrays) -> Arrays:
    return {"out": inputs["x"].astype(np.float64).mean(2).reshape(-1)}


def means_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    x = inputs["x"]
    return {"out": (x.shape[2] + 1) * UNIT * np.abs(x).astype(np.float64).mean(2).reshape(-1)}


def run_scale(inputs: Arrays, outputs: Arrays, threads: int) -> None:
    program = _core.Program()
    _core.scale_channels(program, inputs["x"], inputs["factor"], inputs["offset"], outputs["out"])
    program.run(threads)


def scale_oracle(inputs: Arrays) -> Arrays:
    wide = inputs["x"].astype(np.float64) * inputs["factor"].astype(np.float64)[:, None]
    return {"out": wide + inputs["offset"].astype(np.float64)[:, None]}


def scale_bound(inputs: Arrays, wanted: Arrays) -> Arrays:
    return {"out": UNIT * (1 + 2.0**-20) * np.abs(wanted["out"]) + 2.0**-149}


PLANES = ((0, 2, 3), (1, 1, 1), (2, 3, 15), (1, 2, 16), (1, 3, 17), (2, 2, 63), (1, 2, 64), (1, 17, 65), (1, 2, 333))


def shape_of(inputs: Arrays) -> dict[str, tuple[tuple[int, ...], type]]:
    return {"out": (inputs["shape"], np.float32)}


def pool_case(name: str, average: bool, include_pad: bool) -> Case:
    return Case(
        name=name,
        slots=("tap_sum_f32",) if average else ("tap_max_f32",),
        sizes=FINITE if average else POOLS,
        inputs=draw_image,
        outputs=shape_of,
        run=partial(run_pool, average, include_pad),
        bind=partial(bind_pool, average, include_pad),
        oracle=partial(average_oracle, include_pad) if average else max_oracle,
        bound=partial(average_bound, include_pad) if average else no_difference,
        bench=((1, 64, 112, 112, 1, 3, 2, 1, 1, 1, 1),),
        work=lambda size: Work(bytes=4.0 * size[0] * size[1] * (size[2] * size[3] + np.prod(extents_of(size)))),
    )


CASES = [
    Case(
        name="convolution",
        slots=("pack_window_f32", "bias_clip_f32"),
        sizes=CONVOLUTIONS,
        inputs=draw,
        outputs=shape_of,
        run=run_convolution,
        bind=bind_convolution,
        oracle=convolution_oracle,
        bound=convolution_bound,
        compare="bounded",
        bench=((1, 64, 56, 56, 64, 3, 1, 1, 1, 1, 3), (1, 256, 14, 14, 1024, 1, 1, 1, 0, 1, 3)),
        work=convolution_work,
    ),
    Case(
        name="depthwise",
        slots=("tap_sum_f32", "bias_clip_f32"),
        sizes=DEPTHWISE,
        inputs=draw,
        outputs=shape_of,
        run=run_convolution,
        bind=bind_convolution,
        oracle=convolution_oracle,
        bound=convolution_bound,
        compare="bounded",
        bench=((1, 96, 112, 112, 96, 3, 1, 1, 1, 96, 3),),
        work=convolution_work,
    ),
    pool_case("max_pool", average=False, include_pad=False),
    pool_case("average_pool", average=True, include_pad=False),
    pool_case("average_pool_with_padding", average=True, include_pad=True),
    Case(
        name="plane_means",
        slots=("sum_f32",),
        sizes=PLANES,
        inputs=draw_planes,
        outputs=lambda inputs: {"out": ((inputs["x"].shape[0] * inputs["x"].shape[1],), np.float32)},
        run=run_means,
        oracle=means_oracle,
        bound=means_bound,
        compare="bounded",
    ),
    Case(
        name="scale_channels",
        slots=("tap_sum_f32",),
        sizes=PLANES,
        inputs=draw_planes,
        outputs=lambda inputs: {"out": (inputs["x"].shape, np.float32)},
        run=run_scale,
        oracle=scale_oracle,
        bound=scale_bound,
    ),
]
