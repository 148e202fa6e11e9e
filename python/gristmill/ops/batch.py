"""Normalisation over batches, channels and groups of channels: what vision networks have in place of LayerNormalization."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import Binder, Node, Op, TensorType, need, same_dim
from gristmill.ops.window import dense_constant, only_first
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

EPSILON = 1e-5  # what ONNX takes where a node does not say


def per_channel(value: Array, rank: int) -> Array:
    """Return a vector of channels so that it broadcasts over [N, C, ...], in float64."""
    return value.astype(np.float64).reshape(-1, *(1,) * (rank - 2))


def standard(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Return (x - mean) / sqrt(variance + epsilon) over some axes, in float64."""
    wide = x.astype(np.float64)
    wide = wide - wide.mean(axes, keepdims=True)
    return wide / np.sqrt((wide * wide).mean(axes, keepdims=True) + epsilon)


def check_channels(node: Node, x: TensorType | None, vectors: Sequence[TensorType | None]) -> TensorType:
    """Return the type of an input [N, C, ...] after checking that the vectors have C elements."""
    assert x is not None
    need(len(x.shape) >= 2, node, f"an input [N, C, ...] is needed, got {x}")
    for vector in vectors:
        fits = vector is not None and len(vector.shape) == 1 and same_dim(vector.shape[0], x.shape[1])
        need(fits, node, f"x is {x} but a vector of its channels is {vector}")
    return x


class BatchNormalization(Op):
    """ONNX BatchNormalization (opset 15): scale and shift by running statistics or, in training mode, by those of the batch.

    In training mode the second and third outputs are the new running statistics: momentum * old + (1 - momentum) * batch's.
    """

    name = "BatchNormalization"
    arity = (5, 5)
    attributes = {"epsilon": float, "momentum": float, "training_mode": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = check_channels(node, types[0], types[1:])
        mean, variance = types[3], types[4]
        assert mean is not None
        assert variance is not None
        need(len(node.outputs) == 1 or self.trains(node), node, "running statistics are outputs in training mode only")
        return [x, mean, variance][: len(node.outputs)]

    def trains(self, node: Node) -> bool:
        return bool(node.attributes.get("training_mode", 0))

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale, shift, mean, variance = inputs
        made: list[Array] = []
        if self.trains(node):
            others = (0, *range(2, x.ndim))
            batch, keep = x.astype(np.float64), node.attributes.get("momentum", 0.9)
            old, (mean, variance) = (mean, variance), (batch.mean(others), batch.var(others))
            pairs = zip(old, (mean, variance), strict=True)
            made = [(a.astype(np.float64) * keep + b * (1 - keep)).astype(a.dtype) for a, b in pairs]
        factor, offset = scale_and_shift(scale, shift, mean, variance, node.attributes.get("epsilon", EPSILON))
        y = x * per_channel(factor, x.ndim) + per_channel(offset, x.ndim)
        return [y.astype(x.dtype), *made][: len(node.outputs)]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return only_first(split) and not self.trains(node)

    def bind(self, node: Node, binder: Binder) -> bool:
        vectors = [dense_constant(binder, name) for name in node.inputs[1:]]
        if self.trains(node) or any(vector is None for vector in vectors):
            return False
        scale, shift, mean, variance = (vector.dense() for vector in vectors if vector is not None)
        pair = scale_and_shift(scale, shift, mean, variance, node.attributes.get("epsilon", EPSILON))
        factor, offset = (np.ascontiguousarray(value, np.float32) for value in pair)
        x, out = binder.rows(node.inputs[0]), binder.output(node.outputs[0])
        shape = (*x.shape[:2], prod(x.shape[2:]))
        binder.step(_core.scale_channels, x.reshape(*shape), factor, offset, out.reshape(*shape))
        return True


def scale_and_shift(scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float) -> tuple[Array, Array]:
    """Return (factor, offset), float64, such that inference is x * factor + offset per channel."""
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    return factor, shift - mean * factor


class InstanceNormalization(Op):
    """ONNX InstanceNormalization (opset 22): every channel of every image by its own mean and variance (Ulyanov et al. 2016)."""

    name = "InstanceNormalization"
    arity = (3, 3)
    attributes = {"epsilon": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [check_channels(node, types[0], types[1:])]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale, shift = inputs
        y = standard(x, tuple(range(2, x.ndim)), node.attributes.get("epsilon", EPSILON))
        return [(y * per_channel(scale, x.ndim) + per_channel(shift, x.ndim)).astype(x.dtype)]


class GroupNormalization(Op):
    """ONNX GroupNormalization (opset 21): groups of channels by their mean and variance (Wu and He 2018)."""

    name = "GroupNormalization"
    arity = (3, 3)
    attributes = {"epsilon": float, "num_groups": int, "stash_type": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = check_channels(node, types[0], types[1:])
        groups, channels = node.attributes.get("num_groups", 0), x.shape[1]
        fits = groups >= 1 and (isinstance(channels, str) or channels % groups == 0)
        need(fits, node, f"{channels} channels in {groups} groups")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale, shift = inputs
        groups = node.attributes["num_groups"]
        grouped = x.reshape(len(x), groups, x.shape[1] // groups, *x.shape[2:])
        y = standard(grouped, tuple(range(2, grouped.ndim)), node.attributes.get("epsilon", EPSILON)).reshape(x.shape)
        return [(y * per_channel(scale, x.ndim) + per_channel(shift, x.ndim)).astype(x.dtype)]


class Shaped(Op):
    """An operator whose output is of its first input's type."""

    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        self.check(node, types[0])
        return [types[0]]

    def check(self, node: Node, x: TensorType) -> None:
        """Refuse attributes that do not fit the input."""


def check_axes(node: Node, axes: Sequence[int], x: TensorType) -> None:
    rank = len(x.shape)
    need(all(-rank <= axis < rank for axis in axes) and len({a % rank for a in axes}) == len(axes), node, f"axes {axes} of {x}")


class LRN(Shaped):
    """ONNX LRN (opset 13): x / (bias + alpha / size * the squares' sum over `size` channels around) ** beta (AlexNet, 2012)."""

    name = "LRN"
    attributes = {"alpha": float, "beta": float, "bias": float, "size": int}

    def check(self, node: Node, x: TensorType) -> None:
        check_channels(node, x, ())
        need(node.attributes.get("size", 0) >= 1, node, f"a positive size is needed, got {node.attributes.get('size')}")

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, size = inputs[0], node.attributes["size"]
        below, channels = (size - 1) // 2, inputs[0].shape[1]
        sums = np.zeros((len(x), channels + 1, *x.shape[2:]))
        np.cumsum(x.astype(np.float64) ** 2, axis=1, out=sums[:, 1:])
        at = np.arange(channels)
        first, end = np.maximum(at - below, 0), np.minimum(at + size - below, channels)
        squares = sums[:, end] - sums[:, first]
        alpha, beta = node.attributes.get("alpha", 1e-4), node.attributes.get("beta", 0.75)
        return [(x / (node.attributes.get("bias", 1.0) + alpha / size * squares) ** beta).astype(x.dtype)]


class MeanVarianceNormalization(Shaped):
    """ONNX MeanVarianceNormalization (opset 13): zero mean and unit variance over axes, 1e-9 added to the deviation."""

    name = "MeanVarianceNormalization"
    attributes = {"axes": tuple}

    def check(self, node: Node, x: TensorType) -> None:
        check_axes(node, node.attributes.get("axes", (0, 2, 3)), x)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axes = inputs[0], tuple(node.attributes.get("axes", (0, 2, 3)))
        wide = x.astype(np.float64) - x.mean(axes, np.float64, keepdims=True)
        return [(wide / (np.sqrt((wide * wide).mean(axes, keepdims=True)) + 1e-9)).astype(x.dtype)]


class RMSNormalization(Op):
    """ONNX RMSNormalization (opset 23): x / sqrt(mean of squares + epsilon) * scale over the axes from `axis` on."""

    name = "RMSNormalization"
    arity = (2, 2)
    attributes = {"axis": int, "epsilon": float, "stash_type": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, scale = types
        assert x is not None
        assert scale is not None
        axis = node.attributes.get("axis", -1)
        need(-len(x.shape) <= axis < len(x.shape), node, f"axis {axis} of {x}")
        tail = x.shape[len(x.shape) - len(scale.shape) :]
        fits = len(scale.shape) <= len(x.shape) and all(d == 1 or same_dim(d, e) for d, e in zip(scale.shape, tail, strict=True))
        need(fits, node, f"the scale {scale} does not broadcast to {x}")
        return [TensorType(scale.dtype, x.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, scale = inputs
        axes = tuple(range(node.attributes.get("axis", -1) % x.ndim, x.ndim))
        wide = x.astype(np.float64)
        y = wide / np.sqrt((wide * wide).mean(axes, keepdims=True) + node.attributes.get("epsilon", EPSILON))
        return [(y.astype(x.dtype) * scale).astype(scale.dtype)]


OPERATORS = (
    BatchNormalization, InstanceNormalization, GroupNormalization, LRN, MeanVarianceNormalization,
    RMSNormalization,
)  # fmt: skip
