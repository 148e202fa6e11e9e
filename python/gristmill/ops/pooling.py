"""Pooling: over windows, over whole images, over regions of interest, and MaxPool undone."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import numpy as np

from gristmill import _core
from gristmill.ops.convolution import Separable, widened
from gristmill.ops.op import Binder, Dim, Node, Op, TensorType, Undetermined, fresh_dim, need, same_dim, same_type
from gristmill.ops.window import ATTRIBUTES, Axis, out_shape, padded, per_axis, planar, spatial_input, taps, window
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

POOLED = {**ATTRIBUTES, "ceil_mode": int}


def kernel_shape(node: Node) -> tuple[int, ...]:
    value: tuple[Any, ...] = node.attributes.get("kernel_shape", ())
    need(bool(value) and all(isinstance(k, int) and k >= 1 for k in value), node, f"kernel_shape is needed, got {value}")
    return tuple(value)


class Pool(Separable):
    """A pool over windows."""

    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = spatial_input(node, types[0])
        return [TensorType(x.dtype, (*x.shape[:2], *out_shape(node, x.shape[2:], kernel_shape(node))))]

    def axes(self, node: Node, shape: Sequence[int]) -> list[Axis]:
        return window(node, shape[2:], kernel_shape(node))

    def bind_windows(self, node: Node, binder: Binder, average: bool) -> bool:
        x = binder.rows(node.inputs[0])
        flat = planar(self.axes(node, x.shape))
        if flat is None or x.dtype != np.float32 or len(node.outputs) > 1:
            return False
        n, c, out = x.shape[0], x.shape[1], binder.output(node.outputs[0])
        scratch = binder.scratch(_core.convolution_scratch(flat.image, flat.out, flat.geometry, 0, 1, binder.threads))
        include_pad = bool(node.attributes.get("count_include_pad", 0))
        x, out = x.reshape(n, c, *flat.image), out.reshape(n, c, *flat.out)
        binder.step(_core.pool, x, out, flat.geometry, average, include_pad, flat.behind, scratch)
        return True


class MaxPool(Pool):
    """ONNX MaxPool (opset 22). The second output holds the places of the maxima in the flattened input; NaN is passed on.

    A window of padding alone gives the least value of the dtype and the index -1.
    """

    name = "MaxPool"
    attributes = {**POOLED, "storage_order": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        y = super().infer(node, types, constants)[0]
        return [y, TensorType(np.dtype(np.int64), y.shape)][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        axes = self.axes(node, x.shape)
        least = np.iinfo(x.dtype).min if x.dtype.kind in "iu" else -np.inf
        image = padded(x, axes, least)
        y = np.full((*x.shape[:2], *(axis.out for axis in axes)), least, x.dtype)
        if len(node.outputs) < 2:
            for _, cuts in taps(axes):
                np.maximum(y, image[cuts], out=y)
            return [y]
        order: Literal["F", "C"] = "F" if node.attributes.get("storage_order", 0) else "C"
        plane = np.reshape(np.arange(prod(x.shape[2:])), x.shape[2:], order=order)
        places = padded(plane[None, None], axes, -1)
        best = np.full(y.shape, -1, np.int64)
        for _, cuts in taps(axes):
            here, place = image[cuts], places[cuts]
            better = ((here > y) | (best < 0) | (np.isnan(here) & ~np.isnan(y))) & (place >= 0)
            y, best = np.where(better, here, y), np.where(better, place, best)
        planes = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1,) * len(axes)) * plane.size
        return [y, np.where(best < 0, best, best + planes)]

    def bind(self, node: Node, binder: Binder) -> bool:
        return self.bind_windows(node, binder, average=False)


class AveragePool(Pool):
    """ONNX AveragePool (opset 22); with `count_include_pad` elements of padding count, those beyond it never do."""

    name = "AveragePool"
    attributes = {**POOLED, "count_include_pad": int}

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        axes = self.axes(node, x.shape)
        image = padded(widened(x), axes, 0)
        y = np.zeros((*x.shape[:2], *(axis.out for axis in axes)), image.dtype)
        for _, cuts in taps(axes):
            y += image[cuts]
        return [(y / counts(axes, bool(node.attributes.get("count_include_pad", 0)))).astype(x.dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        return self.bind_windows(node, binder, average=True)


def counts(axes: Sequence[Axis], include_pad: bool) -> Array:
    """The number of elements that an average divides by, for each position of the window; 1 where there are none."""
    total = np.ones((), np.float32)
    for axis in axes:
        at = np.add.outer(np.arange(axis.out) * axis.stride, np.arange(axis.kernel) * axis.dilation)
        first, end = (0, axis.before + axis.extent + axis.after) if include_pad else (axis.before, axis.before + axis.extent)
        total = np.multiply.outer(total, ((at >= first) & (at < end)).sum(1).astype(np.float32))
    return np.maximum(total, 1)


def power_sum(x: Array, node: Node) -> Array:
    p = node.attributes.get("p", 2)
    need(p >= 1, node, f"p must be positive, got {p}")
    return np.abs(widened(x)) ** p


def root(total: Array, node: Node) -> Array:
    return total ** (1.0 / node.attributes.get("p", 2))


class LpPool(Pool):
    """ONNX LpPool (opset 22): the p-norm over windows."""

    name = "LpPool"
    attributes = {**POOLED, "p": int}

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        axes = self.axes(node, x.shape)
        image = padded(power_sum(x, node), axes, 0)
        y = np.zeros((*x.shape[:2], *(axis.out for axis in axes)), image.dtype)
        for _, cuts in taps(axes):
            y += image[cuts]
        return [root(y, node).astype(x.dtype)]


class GlobalPool(Separable):
    """A pool over all spatial axes, which stay as 1."""

    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = spatial_input(node, types[0])
        return [TensorType(x.dtype, (*x.shape[:2], *(1,) * (len(x.shape) - 2)))]


def spatial_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


class GlobalAveragePool(GlobalPool):
    name = "GlobalAveragePool"

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        return [widened(x).mean(spatial_axes(x), keepdims=True).astype(x.dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        x = binder.rows(node.inputs[0])
        if x.dtype != np.float32:
            return False
        planes = x.shape[0] * x.shape[1]
        binder.step(_core.plane_means, x.reshape(planes, prod(x.shape[2:])), binder.output(node.outputs[0]).reshape(planes))
        return True


class GlobalMaxPool(GlobalPool):
    name = "GlobalMaxPool"

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].max(spatial_axes(inputs[0]), keepdims=True)]


class GlobalLpPool(GlobalPool):
    name = "GlobalLpPool"
    attributes = {"p": int}

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = inputs[0]
        return [root(power_sum(x, node).sum(spatial_axes(x), keepdims=True), node).astype(x.dtype)]


class MaxUnpool(Op):
    """ONNX MaxUnpool (opset 22): maxima back at the places that MaxPool gave, zeros elsewhere.

    Places count in the image that the attributes give; `output_shape` may be larger, and zeros fill it.
    """

    name = "MaxUnpool"
    arity = (2, 3)
    attributes = {"kernel_shape": tuple, "pads": tuple, "strides": tuple}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = spatial_input(node, types[0])
        places = types[1]
        fits = places is not None and same_type(TensorType(x.dtype, places.shape), x)
        need(fits, node, f"x is {x} but the places are {places}")
        shape: tuple[Dim, ...] = (*x.shape[:2], *self.extents(node, x.shape[2:]))
        if node.input(2):
            given = constants[2]
            if given is None:
                raise Undetermined
            need(given.shape == (len(x.shape),), node, f"output_shape must have {len(x.shape)} extents, got {given.shape}")
            shape = tuple(int(d) for d in given.dense())
        return [TensorType(x.dtype, shape)]

    def extents(self, node: Node, spatial: Sequence[Dim]) -> tuple[Dim, ...]:
        """The extents of the image whose windows the input's elements are."""
        kernel, rank = kernel_shape(node), len(spatial)
        need(len(kernel) == rank, node, f"kernel_shape {kernel} of {rank} spatial axes")
        strides, pads = per_axis(node, "strides", rank, 1), per_axis(node, "pads", 2 * rank, 0, fewest=0)
        return tuple(
            fresh_dim(node, i + 2) if isinstance(d, str) else (d - 1) * strides[i] + kernel[i] - pads[i] - pads[rank + i]
            for i, d in enumerate(spatial)
        )

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, places, wanted = (*inputs, None)[:3]
        shape = (*x.shape[:2], *(int(d) for d in self.extents(node, x.shape[2:])))
        y = np.zeros(prod(shape), x.dtype)
        need(not places.size or (places.min() >= 0 and places.max() < y.size), node, f"a place lies outside {shape}")
        y[places.reshape(-1)] = x.reshape(-1)
        y = y.reshape(shape)
        if wanted is None or tuple(wanted) == shape:
            return [y]
        out = np.zeros([int(d) for d in wanted], x.dtype)
        common = tuple(slice(min(a, b)) for a, b in zip(out.shape, shape, strict=True))
        out[common] = y[common]
        return [out]


class MaxRoiPool(Op):
    """ONNX MaxRoiPool (opset 22): the maxima over a grid of cells of each region [image, x1, y1, x2, y2] (Girshick 2015)."""

    name = "MaxRoiPool"
    arity = (2, 2)
    attributes = {"pooled_shape": tuple, "spatial_scale": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, regions = types
        assert x is not None
        assert regions is not None
        fits = len(x.shape) == 4 and len(regions.shape) == 2 and same_dim(regions.shape[1], 5)
        need(fits, node, f"x is {x} and the regions are {regions}, [N, C, H, W] and [regions, 5] are needed")
        pooled = per_axis(node, "pooled_shape", 2, 1)
        return [TensorType(x.dtype, (regions.shape[0], x.shape[1], *pooled))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, regions = inputs
        pooled = per_axis(node, "pooled_shape", 2, 1)
        scale = node.attributes.get("spatial_scale", 1.0)
        y = np.zeros((len(regions), x.shape[1], *pooled), x.dtype)
        for number, (image, *corners) in enumerate(regions):
            need(0 <= int(image) < len(x), node, f"region {number} is of image {int(image)} of {len(x)}")
            left, top, right, bottom = (int(np.floor(c * scale + 0.5)) for c in corners)
            for row, (first, last) in enumerate(cells(top, bottom, pooled[0], x.shape[2])):
                for col, (start, end) in enumerate(cells(left, right, pooled[1], x.shape[3])):
                    if last > first and end > start:
                        y[number, :, row, col] = x[int(image), :, first:last, start:end].max((1, 2))
        return [y]


def cells(first: int, last: int, count: int, extent: int) -> list[tuple[int, int]]:
    """Cut the elements first..last into `count` overlapping cells, clipped to the image."""
    size = max(last - first + 1, 1) / count
    edges = ((first + int(np.floor(i * size)), first + int(np.ceil((i + 1) * size))) for i in range(count))
    return [(min(max(a, 0), extent), min(max(b, 0), extent)) for a, b in edges]


class RoiAlign(Op):
    """ONNX RoiAlign (opset 22): bilinear samples in the cells of each region [x1, y1, x2, y2] (He et al. 2017), averaged; mode
    "max" takes the largest weighted corner, as ONNX defines it."""

    name = "RoiAlign"
    arity = (3, 3)
    attributes = {
        "coordinate_transformation_mode": str, "mode": str, "output_height": int, "output_width": int, "sampling_ratio": int,
        "spatial_scale": float,
    }  # fmt: skip

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, regions, _ = types
        assert x is not None
        assert regions is not None
        fits = len(x.shape) == 4 and len(regions.shape) == 2 and same_dim(regions.shape[1], 4)
        need(fits, node, f"x is {x} and the regions are {regions}, [N, C, H, W] and [regions, 4] are needed")
        need(node.attributes.get("mode", "avg") in ("avg", "max"), node, f"unknown mode {node.attributes.get('mode')!r}")
        return [TensorType(x.dtype, (regions.shape[0], x.shape[1], *self.cells(node)))]

    def cells(self, node: Node) -> tuple[int, int]:
        return node.attributes.get("output_height", 1), node.attributes.get("output_width", 1)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, regions, images = inputs
        height, width = self.cells(node)
        scale, ratio = node.attributes.get("spatial_scale", 1.0), node.attributes.get("sampling_ratio", 0)
        half = node.attributes.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
        largest = node.attributes.get("mode", "avg") == "max"
        y = np.zeros((len(regions), x.shape[1], height, width), np.float64)
        for number, region in enumerate(regions):
            left, top, right, bottom = (float(c) * scale - 0.5 * half for c in region)
            tall, wide = bottom - top, right - left
            if not half:
                tall, wide = max(tall, 1.0), max(wide, 1.0)
            rows, down = samples(top, tall, height, ratio, x.shape[2])
            cols, across = samples(left, wide, width, ratio, x.shape[3])
            if not down or not across:
                continue
            corners = [
                x[int(images[number])][:, row[0][:, None], col[0][None, :]] * (row[1][:, None] * col[1][None, :])
                for row in rows
                for col in cols
            ]
            values = np.max(corners, axis=0) if largest else np.sum(corners, axis=0)
            values = values.reshape(-1, height, down, width, across)
            y[number] = values.max((2, 4)) if largest else values.mean((2, 4))
        return [y.astype(x.dtype)]


def samples(first: float, length: float, count: int, ratio: int, extent: int) -> tuple[list[tuple[Array, Array]], int]:
    """Return (index, weight) of both neighbours of every sample along one axis, and the number of samples per cell.

    Samples more than one element outside weigh nothing; nearer ones take the edge.
    """
    each = ratio if ratio > 0 else max(int(np.ceil(length / count)), 0)
    if each == 0:
        return [], 0
    at = first + length / count * (np.arange(count)[:, None] + (np.arange(each) + 0.5) / each).reshape(-1)
    inside = (at >= -1) & (at <= extent)
    at = np.clip(at, 0, extent - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, extent - 1)
    return [(low, (1 - (at - low)) * inside), (high, (at - low) * inside)], each


OPERATORS = (
    MaxPool, AveragePool, LpPool, GlobalAveragePool, GlobalMaxPool, GlobalLpPool, MaxUnpool, MaxRoiPool, RoiAlign,
)  # fmt: skip
