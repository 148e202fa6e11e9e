"""Conv, ConvTranspose, DeformConv and the integer convolutions."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.activation import FUNCTIONS, evaluate
from gristmill.ops.op import OWN, Binder, Dim, Node, Op, TensorType, fresh_dim, need, same_dim, same_type
from gristmill.ops.quantization import INTEGERS, exact_float, requantize, zero_pointed
from gristmill.ops.window import (
    ATTRIBUTES,
    AUTO_PADS,
    Axis,
    dense_constant,
    only_first,
    out_shape,
    padded,
    per_axis,
    planar,
    reach,
    spatial_input,
    taps,
    window,
)
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

GROUPED = {**ATTRIBUTES, "group": int}


def widened(x: Array) -> Array:
    """Half-precision values in float32, in which NumPy multiplies matrices by BLAS."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def convolve(x: Array, w: Array, axes: Sequence[Axis], group: int) -> Array:
    """Return the convolution of x [N, C, ...] with w [M, C / group, ...], both of one BLAS dtype, by a matrix product per group.

    The columns of one image and group are the only copy. A group of one channel multiplies and adds tap by tap.
    """
    n, c, m = len(x), x.shape[1], len(w)
    out = tuple(axis.out for axis in axes)
    x = padded(x, axes, 0)
    y = np.zeros((n, m, *out), x.dtype)
    if c == group and group > 1:
        for place, cuts in taps(axes):
            weight = w[:, 0][place].reshape(group, m // group, *(1,) * len(axes))
            y += (x[cuts][:, :, None] * weight).reshape(y.shape)
        return y
    share, rows = c // group, m // group
    weights = w.reshape(group, rows, -1)
    columns = np.empty((share, prod(axis.kernel for axis in axes), *out), x.dtype)
    for image in range(n):
        for g in range(group):
            channels = x[image, g * share : (g + 1) * share]
            for number, (_, cuts) in enumerate(taps(axes)):
                columns[:, number] = channels[cuts]
            y[image, g * rows : (g + 1) * rows] = (weights[g] @ columns.reshape(weights.shape[2], -1)).reshape(rows, *out)
    return y


def kernel_of(node: Node, w: Sequence[Dim]) -> tuple[int, ...]:
    """Return the kernel's extents from the weight's shape, which `kernel_shape` may only repeat."""
    need(not any(isinstance(d, str) for d in w[2:]), node, f"the weight's shape {tuple(w)} must be known")
    kernel = tuple(int(d) for d in w[2:])
    said = node.attributes.get("kernel_shape") or kernel
    need(tuple(said) == kernel, node, f"kernel_shape {tuple(said)} but the weight is {tuple(w)}")
    return kernel


def convolved(node: Node, x: TensorType, w: TensorType | None, dtype: Any) -> TensorType:
    """Return the output's type of a convolution after checking channels, groups and the window."""
    assert w is not None
    group = node.attributes.get("group", 1)
    need(len(w.shape) == len(x.shape), node, f"x is {x} but the weight is {w}")
    need(group >= 1, node, f"group must be positive, got {group}")
    if not isinstance(w.shape[1], str):
        need(same_dim(x.shape[1], w.shape[1] * group), node, f"x is {x} but the weight is {w} in {group} groups")
    need(isinstance(w.shape[0], str) or w.shape[0] % group == 0, node, f"{w.shape[0]} outputs in {group} groups")
    return TensorType(np.dtype(dtype), (x.shape[0], w.shape[0], *out_shape(node, x.shape[2:], kernel_of(node, w.shape))))


def check_bias(node: Node, bias: TensorType | None, channels: Dim) -> None:
    fits = bias is None or (len(bias.shape) == 1 and same_dim(bias.shape[0], channels))
    need(fits, node, f"the bias must be [{channels}], got {bias}")


def biased(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape(-1, *(1,) * (y.ndim - 2)).astype(y.dtype)


class Separable(Op):
    """An operator over [N, C, ...] whose images do not meet."""

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return only_first(split)


class Conv(Separable):
    """ONNX Conv (opset 22): cross-correlation over any number of spatial axes, in groups."""

    name = "Conv"
    arity = (2, 3)
    attributes = GROUPED

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, w, bias = (*types, None)[:3]
        x = spatial_input(node, x)
        out = convolved(node, x, w, x.dtype)
        need(w is not None and w.dtype == x.dtype, node, f"x is {x} but the weight is {w}")
        check_bias(node, bias, out.shape[1])
        return [out]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, w, bias = (*inputs, None)[:3]
        axes = window(node, x.shape[2:], w.shape[2:])
        y = convolve(widened(x), widened(w), axes, node.attributes.get("group", 1))
        return [biased(y, bias).astype(x.dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        weight, bias = dense_constant(binder, node.inputs[1]), node.input(2)
        x = binder.rows(node.inputs[0])
        if weight is None or x.dtype != np.float32 or (bias and dense_constant(binder, bias) is None and not binder.trains(bias)):
            return False
        flat, group = planar(window(node, x.shape[2:], weight.shape[2:])), node.attributes.get("group", 1)
        depthwise = group == x.shape[1] > 1
        if flat is None or (binder.in_place and not depthwise):
            return False
        n, m, kernel = x.shape[0], weight.shape[0], flat.geometry[0]
        out = binder.output(node.outputs[0]).reshape(n, m, *flat.out)
        packer = _core.ConvolutionPacker(group, prod(kernel))
        source = weight.dense().reshape(m, 1, *kernel) if depthwise else binder.packed(node.inputs[1], packer)
        addend = binder.rows(node.input(3)).reshape(*out.shape) if node.input(3) else None
        low, high = node.attributes.get("low", -np.inf), node.attributes.get("high", np.inf)
        nbytes = _core.convolution_scratch(flat.image, flat.out, flat.geometry, x.shape[1], group, binder.threads)
        binder.step(
            _core.convolution, x.reshape(n, x.shape[1], *flat.image), source, out, flat.geometry, group,
            binder.array(bias) if bias else None, addend, low, high, node.attributes.get("activation"),
            binder.scratch(nbytes),
        )  # fmt: skip
        return True


class Convolution(Conv):
    """Conv with what follows it: activation(clip(Conv(x, weight, bias) + addend, low, high)), the addend of the output's shape.

    Relu is low = 0; `activation` is the name of a kernel, as in Linear.
    """

    name = "Convolution"
    domain = OWN
    arity = (2, 4)
    attributes = {**GROUPED, "activation": str, "high": float, "low": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        out = super().infer(node, types[:3], constants[:3])[0]
        addend, activation = types[3] if len(types) > 3 else None, node.attributes.get("activation")
        need(addend is None or same_type(addend, out), node, f"the addend {addend} does not fit the output {out}")
        need(activation is None or activation in FUNCTIONS, node, f"unknown activation {activation!r}; known: {list(FUNCTIONS)}")
        return [out]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        y = super().reference(node, *inputs[:3])[0]
        if len(inputs) > 3 and inputs[3] is not None:
            y = y + inputs[3]
        y = np.clip(y, node.attributes.get("low", -np.inf), node.attributes.get("high", np.inf)).astype(y.dtype)
        return [evaluate(node.attributes.get("activation"), y)]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return only_first(split[:3]) and (not node.input(3) or split[3])


class ConvInteger(Separable):
    """ONNX ConvInteger (opset 10): the exact int32 convolution of 8-bit values less their zero points."""

    name = "ConvInteger"
    arity = (2, 4)
    attributes = GROUPED

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [convolved(node, spatial_input(node, types[0]), types[1], np.int32)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, w, x_zero, w_zero = (*inputs, None, None)[:4]
        return [integer_convolution(node, x, w, x_zero, w_zero).astype(np.int32)]


def integer_convolution(node: Node, x: Array, w: Array, x_zero: Array | None, w_zero: Array | None) -> Array:
    """Return the exact convolution of 8-bit values less their zero points, as integers in a float dtype."""
    dtype = exact_float(x.dtype, w.dtype, prod(w.shape[1:]))
    axes = window(node, x.shape[2:], w.shape[2:])
    return convolve(zero_pointed(x, x_zero, dtype), zero_pointed(w, w_zero, dtype, 0), axes, node.attributes.get("group", 1))


class QLinearConv(Separable):
    """ONNX QLinearConv (opset 10): a ConvInteger with an int32 bias whose result is quantised to y's scale and zero point."""

    name = "QLinearConv"
    arity = (8, 9)
    attributes = GROUPED

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, y_zero = spatial_input(node, types[0]), types[7]
        assert y_zero is not None
        need(y_zero.dtype.name in INTEGERS, node, f"cannot quantise to {y_zero.dtype}")
        out = convolved(node, x, types[3], y_zero.dtype)
        check_bias(node, types[8] if len(types) > 8 else None, out.shape[1])
        return [out]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (*inputs, None)[:9]
        acc = biased(integer_convolution(node, x, w, x_zero, w_zero).astype(np.float64), bias)
        scale = x_scale.astype(np.float32) * w_scale.astype(np.float32) / y_scale.astype(np.float32)
        return [requantize(acc, scale.reshape(-1, *(1,) * (x.ndim - 2)), y_zero)]


class ConvTranspose(Separable):
    """ONNX ConvTranspose (opset 22): the gradient of Conv in its input, with padding cut off."""

    name = "ConvTranspose"
    arity = (2, 3)
    attributes = {**GROUPED, "output_padding": tuple, "output_shape": tuple}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, w, bias = (*types, None)[:3]
        x = spatial_input(node, x)
        group = node.attributes.get("group", 1)
        fits = w is not None and w.dtype == x.dtype and len(w.shape) == len(x.shape) and same_dim(w.shape[0], x.shape[1])
        need(fits and group >= 1, node, f"x is {x} but the weight is {w} in {group} groups")
        assert w is not None
        need(not isinstance(w.shape[1], str), node, f"the weight's shape {w.shape} must be known")
        channels = int(w.shape[1]) * group
        need(isinstance(x.shape[1], str) or x.shape[1] % group == 0, node, f"{x.shape[1]} channels in {group} groups")
        check_bias(node, bias, channels)
        axes = transposed(node, [2**20 if isinstance(d, str) else d for d in x.shape[2:]], kernel_of(node, w.shape))
        named = not node.attributes.get("output_shape")
        spatial = tuple(
            fresh_dim(node, i + 2) if isinstance(d, str) and named else axis.extent
            for i, (d, axis) in enumerate(zip(x.shape[2:], axes, strict=True))
        )
        return [TensorType(x.dtype, (x.shape[0], channels, *spatial))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, w, bias = (*inputs, None)[:3]
        axes = transposed(node, x.shape[2:], w.shape[2:])
        group = node.attributes.get("group", 1)
        n, rows = len(x), w.shape[1]
        wide, weights = widened(x), widened(w).reshape(group, len(w) // group, -1)
        whole = [(a.out - 1) * a.stride + reach(a.kernel, a.dilation) + a.before + a.after + a.extent for a in axes]
        y = np.zeros((n, group, rows, *whole), wide.dtype)
        for image in range(n):
            columns = weights.transpose(0, 2, 1) @ wide[image].reshape(group, len(w) // group, -1)
            columns = columns.reshape(group, rows, -1, *x.shape[2:])
            for number, (_, cuts) in enumerate(taps(axes)):
                y[image][cuts] += columns[:, :, number]
        kept: list[Any] = [..., *(slice(a.before, a.before + a.extent) for a in axes)]
        y = y.reshape(n, group * rows, *whole)[tuple(kept)]
        return [biased(y, bias).astype(x.dtype)]


def transposed(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> list[Axis]:
    """Resolve ConvTranspose's attributes: the axes of the convolution whose `out` is this one's input, `extent` its output."""
    rank = len(spatial)
    strides, dilations = per_axis(node, "strides", rank, 1), per_axis(node, "dilations", rank, 1)
    extra = per_axis(node, "output_padding", rank, 0, fewest=0)
    pads = per_axis(node, "pads", 2 * rank, 0, fewest=0)
    auto, wanted = node.attributes.get("auto_pad", "NOTSET"), node.attributes.get("output_shape")
    need(auto in AUTO_PADS, node, f"auto_pad must be one of {AUTO_PADS}, got {auto!r}")
    if wanted:
        wanted = tuple(wanted)[-rank:]
        need(len(wanted) == rank and min(wanted) >= 0, node, f"output_shape {wanted} of {rank} spatial axes")
    elif auto.startswith("SAME"):
        wanted = tuple(extent * stride for extent, stride in zip(spatial, strides, strict=True))
    axes = []
    for i, (extent, size, stride, dilation) in enumerate(zip(spatial, kernel, strides, dilations, strict=True)):
        whole = (extent - 1) * stride + reach(size, dilation) + extra[i]
        before, after = (0, 0) if auto == "VALID" else (pads[i], pads[rank + i])
        out = whole - before - after
        if wanted:
            out = wanted[i]
            total = max(whole - out, 0)
            before = total // 2 if auto == "SAME_UPPER" else total - total // 2
            after = total - before
        need(out >= 0, node, f"padding of {before} and {after} leaves nothing of an axis of {whole}")
        axes.append(Axis(out, size, stride, dilation, before, after, extent))
    return axes


class DeformConv(Op):
    """ONNX DeformConv (opset 22) over two spatial axes: Conv whose taps are moved by offsets and scaled by a mask.

    Dai et al. 2017, Deformable Convolutional Networks; Zhu et al. 2019 for the mask.
    """

    name = "DeformConv"
    arity = (3, 5)
    attributes = {key: kind for key, kind in {**GROUPED, "offset_group": int}.items() if key != "auto_pad"}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = spatial_input(node, types[0])
        need(len(x.shape) == 4, node, f"two spatial axes are needed, got {x}")
        out = convolved(node, x, types[1], x.dtype)
        check_bias(node, types[3] if len(types) > 3 else None, out.shape[1])
        parts, kernel = node.attributes.get("offset_group", 1), kernel_of(node, types[1].shape if types[1] else ())
        need(parts >= 1 and (isinstance(x.shape[1], str) or x.shape[1] % parts == 0), node, f"{x} in {parts} groups of offsets")
        for index, each in ((2, 2), (4, 1)):
            given = types[index] if len(types) > index else None
            wanted = TensorType(x.dtype, (x.shape[0], each * parts * prod(kernel), *out.shape[2:]))
            need(given is None or same_type(given, wanted), node, f"input {index} must be {wanted}, got {given}")
        return [out]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, w, offset, bias, mask = (*inputs, None, None)[:5]
        axes = window(node, x.shape[2:], w.shape[2:])
        n, c, height, width = x.shape
        rows, cols = axes
        parts, group = node.attributes.get("offset_group", 1), node.attributes.get("group", 1)
        shape = (n, parts, rows.kernel, cols.kernel, rows.out, cols.out)
        moves = offset.reshape(n, parts, rows.kernel, cols.kernel, 2, rows.out, cols.out).astype(np.float64)
        weights = np.ones(shape) if mask is None else mask.reshape(shape)
        base_y = np.add.outer(np.arange(rows.kernel) * rows.dilation, np.arange(rows.out) * rows.stride) - rows.before
        base_x = np.add.outer(np.arange(cols.kernel) * cols.dilation, np.arange(cols.out) * cols.stride) - cols.before
        y = base_y[:, None, :, None] + moves[:, :, :, :, 0]
        z = base_x[None, :, None, :] + moves[:, :, :, :, 1]
        images = x.reshape(n, parts, c // parts, height * width).astype(np.float64)
        sampled = np.zeros((n, parts, c // parts, *shape[2:]))
        for row in (0, 1):
            for col in (0, 1):
                at_y, at_x = np.floor(y) + row, np.floor(z) + col
                share = (1 - np.abs(y - at_y)) * (1 - np.abs(z - at_x)) * weights
                share *= (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
                flat = (np.clip(at_y, 0, height - 1) * width + np.clip(at_x, 0, width - 1)).astype(np.int64)
                taken = np.take_along_axis(images, flat.reshape(n, parts, 1, -1), axis=3)
                sampled += taken.reshape(sampled.shape) * share[:, :, None]
        columns = sampled.reshape(n, group, c // group * rows.kernel * cols.kernel, rows.out * cols.out)
        out = w.reshape(group, len(w) // group, -1).astype(np.float64) @ columns
        return [biased(out.reshape(n, len(w), rows.out, cols.out), bias).astype(x.dtype)]


OPERATORS = (Conv, Convolution, ConvInteger, QLinearConv, ConvTranspose, DeformConv)
