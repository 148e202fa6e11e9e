"""LayerNormalization, Softmax, LogSoftmax and LpNormalization, and the gradients of those over the last dimension."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.axes import axis_of, first
from gristmill.ops.dtypes import dtype_of, narrow, wide
from gristmill.ops.op import GRAD, Binder, Dim, Node, Op, Tape, TensorType, as_rows, need, same_dim, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

EPSILON = 1e-5  # what ONNX takes where a node does not say


def last(axis: int, rank: int) -> bool:
    return axis in (-1, rank - 1)


def centred(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the normalised x and 1 / standard deviation, in float64."""
    wider = x.astype(np.float64)
    mean = wider.mean(axis=-1, keepdims=True)
    inverse = 1.0 / np.sqrt(((wider - mean) ** 2).mean(axis=-1, keepdims=True) + epsilon)
    return (wider - mean) * inverse, inverse


def normalized_axes(node: Node, x: TensorType, *factors: TensorType | None) -> int:
    """Return the first of the dimensions that are normalised, after checking that scale and bias broadcast to these."""
    axis = axis_of(node, node.attributes.get("axis", -1), len(x.shape))
    for factor in factors:
        fits = factor is None or (factor.dtype == x.dtype and _broadcasts(factor.shape, x.shape))
        wanted = TensorType(x.dtype, x.shape[axis:])
        need(fits, node, f"scale and bias must be {wanted}, got {factor}")
    return axis


def _broadcasts(shape: tuple[Dim, ...], whole: tuple[Dim, ...]) -> bool:
    trailing = whole[len(whole) - len(shape) :]
    return len(shape) <= len(whole) and all(dim == 1 or same_dim(dim, full) for dim, full in zip(shape, trailing, strict=True))


class LayerNormalization(Op):
    """y = (x - mean) / sqrt(variance + epsilon) * scale + bias over the dimensions from `axis` on (ONNX opset 17).

    Optional outputs are the mean and 1 / standard deviation. The last dimension alone has a gradient.
    """

    name = "LayerNormalization"
    arity = (2, 3)
    attributes = {"axis": int, "epsilon": float, "stash_type": str}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axis = normalized_axes(node, x, *types[1:])
        ones: tuple[Dim, ...] = (1,) * (len(x.shape) - axis)
        moment = TensorType(dtype_of(node.attributes.get("stash_type", "float32")), (*x.shape[:axis], *ones))
        return [x, moment, moment][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, gamma, beta = (*inputs, None)[:3]
        axes = tuple(range(axis_of(node, node.attributes.get("axis", -1), x.ndim), x.ndim))
        wider = x.astype(np.float64)
        mean = wider.mean(axis=axes, keepdims=True)
        variance = ((wider - mean) ** 2).mean(axis=axes, keepdims=True)
        inverse = 1.0 / np.sqrt(variance + node.attributes.get("epsilon", EPSILON))
        y = (wider - mean) * inverse * wide(gamma)
        stash = dtype_of(node.attributes.get("stash_type", "float32"))
        made = [narrow(y if beta is None else y + wide(beta), x.dtype), narrow(mean, stash), narrow(inverse, stash)]
        return made[: len(node.outputs)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        x, gamma, beta = node.input(0), node.input(1), node.input(2)
        kind = tape.type(x)
        plain = last(node.attributes.get("axis", -1), len(kind.shape)) and same_type(
            tape.type(gamma), TensorType(kind.dtype, kind.shape[-1:])
        )
        need(plain, node, f"has a gradient over the last dimension of {kind} alone, with a scale for each of its elements")
        if tape.wants(x) or tape.wants(gamma):
            attributes = {"epsilon": node.attributes.get("epsilon", EPSILON)}
            made = tape.emit_all("LayerNormalizationGrad", [dy, x, gamma], attributes, outputs=2 if tape.wants(gamma) else 1)
            for value, gradient in zip((x, gamma), made, strict=False):
                if tape.wants(value):
                    tape.add(value, gradient)
        if beta and tape.wants(beta):
            tape.add(beta, tape.emit("SumRows", [dy]))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        rank = len(made[0].shape)
        alone = list(split) == [True] + [False] * (len(split) - 1)
        return alone and rank > 1 and axis_of(node, node.attributes.get("axis", -1), rank) > 0

    def reads(self, node: Node, index: int, binder: Binder) -> str:
        along_rows = index == 0 and last(node.attributes.get("axis", -1), len(binder.shape(node.inputs[0])))
        return "lanes" if along_rows else "rows"

    def bind(self, node: Node, binder: Binder) -> bool:
        shape = binder.shape(node.inputs[0])
        axis = axis_of(node, node.attributes.get("axis", -1), len(shape))
        factors = [binder.array(name) if name else None for name in (node.input(1), node.input(2))]
        whole = all(factor is None or factor.shape == shape[axis:] for factor in factors)
        if not whole or len(node.outputs) > 1:
            return False
        rows, columns = prod(shape[:axis]), prod(shape[axis:])
        gamma, beta = (None if factor is None else factor.reshape(columns) for factor in factors)
        lanes = self.reads(node, 0, binder) == "lanes"
        x, layout = binder.stored(node.inputs[0]) if lanes else (binder.rows(node.inputs[0]), "rows")
        out = binder.output(node.outputs[0], layout)
        if layout == "rows":
            x, out = x.reshape(rows, columns), out.reshape(rows, columns)
        epsilon = node.attributes.get("epsilon", EPSILON)
        binder.step(_core.layer_norm, x, gamma, beta, epsilon, out, layout == "lanes")
        return True


class LayerNormalizationGrad(Op):
    """The gradients of LayerNormalization in x and, as a second output, in its scale."""

    name = "LayerNormalizationGrad"
    domain = GRAD
    arity = (3, 3)
    attributes = {"epsilon": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, x, gamma = types
        assert x is not None
        assert gamma is not None
        fits = len(x.shape) >= 1 and same_type(dy, x) and gamma == TensorType(x.dtype, x.shape[-1:])
        need(fits, node, f"dy is {dy} and x is {x} but scale is {gamma}")
        return [x, gamma][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x, gamma = inputs
        y, inverse = centred(x, node.attributes.get("epsilon", EPSILON))
        g = dy * gamma
        dx = inverse * (g - g.mean(axis=-1, keepdims=True) - y * (g * y).mean(axis=-1, keepdims=True))
        dgamma = (dy * y).reshape(as_rows(x.shape)).sum(axis=0)
        return [dx.astype(x.dtype), dgamma.astype(x.dtype)][: len(node.outputs)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, x, dx = binder.rows(node.inputs[0]), binder.rows(node.inputs[1]), binder.output(node.outputs[0])
        dgamma = binder.output(node.outputs[1]) if len(node.outputs) > 1 else None
        shape = as_rows(x.shape)
        gamma, epsilon = binder.array(node.inputs[2]), node.attributes.get("epsilon", EPSILON)
        binder.step(
            _core.layer_norm_grad, dy.reshape(*shape), x.reshape(*shape), gamma, epsilon, dx.reshape(*shape), dgamma, None
        )
        return True


def softmax(x: Array, axis: int = -1) -> Array:
    """The softmax along a dimension, in float64; in float16 every step rounds, as in the standard's definition."""
    wider = x if x.dtype == np.float16 else x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        e = np.exp(wider - wider.max(axis=axis, keepdims=True, initial=-np.inf))
        return e / e.sum(axis=axis, keepdims=True)


def log_softmax(x: Array, axis: int = -1) -> Array:
    """The logarithm of the softmax along a dimension, in float64."""
    wider = x.astype(np.float64)
    shifted = wider - wider.max(axis=axis, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


class Softmax(Op):
    """ONNX Softmax along a dimension; the last has kernels."""

    name = "Softmax"
    arity = (1, 1)
    attributes = {"axis": int}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        axis_of(node, node.attributes.get("axis", -1), len(first(types).shape))
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(softmax(inputs[0], node.attributes.get("axis", -1)), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("SoftmaxGrad", [dy, node.outputs[0]], node.attributes))

    def bind(self, node: Node, binder: Binder) -> bool:
        x = binder.rows(node.inputs[0])
        if not last(node.attributes.get("axis", -1), len(x.shape)):
            return False
        shape = as_rows(x.shape)
        binder.step(_core.softmax, x.reshape(*shape), binder.output(node.outputs[0]).reshape(*shape))
        return True


class LogSoftmax(Op):
    """The logarithm of the softmax along a dimension."""

    name = "LogSoftmax"
    arity = (1, 1)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        axis_of(node, node.attributes.get("axis", -1), len(first(types).shape))
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(log_softmax(inputs[0], node.attributes.get("axis", -1)), inputs[0].dtype)]


class SoftmaxGrad(Op):
    """dx = y * (dy - sum(dy * y)), from softmax's output y."""

    name = "SoftmaxGrad"
    domain = GRAD
    arity = (2, 2)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        axis_of(node, node.attributes.get("axis", -1), len(types[1].shape))
        need(same_type(types[0], types[1]), node, f"dy is {types[0]} but y is {types[1]}")
        return [types[1]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, y = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
        axis = node.attributes.get("axis", -1)
        return [narrow(y * (dy - (dy * y).sum(axis=axis, keepdims=True)), inputs[1].dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, y = binder.rows(node.inputs[0]), binder.rows(node.inputs[1])
        if not last(node.attributes.get("axis", -1), len(y.shape)):
            return False
        shape, dx = as_rows(y.shape), binder.output(node.outputs[0])
        binder.step(_core.softmax_grad, dy.reshape(*shape), y.reshape(*shape), dx.reshape(*shape))
        return True


class LpNormalization(Op):
    """ONNX LpNormalization: x over its norm along an axis, of order p = 1 or 2; zeros stay zeros."""

    name = "LpNormalization"
    arity = (1, 1)
    attributes = {"axis": int, "p": int}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, axis, p = types[0], node.attributes.get("axis", -1), node.attributes.get("p", 2)
        assert x is not None
        need(x.dtype.kind == "f" and -len(x.shape) <= axis < len(x.shape), node, f"axis {axis} is not one of a float {x}")
        need(p in (1, 2), node, f"p must be 1 or 2, got {p}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        wide = inputs[0].astype(np.float64)
        order, axis = node.attributes.get("p", 2), node.attributes.get("axis", -1)
        norm = np.linalg.norm(np.moveaxis(wide, axis, -1), order, axis=-1)
        norm = np.expand_dims(norm, axis)
        return [np.divide(wide, norm, out=np.zeros_like(wide), where=norm != 0).astype(inputs[0].dtype)]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return node.attributes.get("axis", -1) % len(made[0].shape) != 0

    def bind(self, node: Node, binder: Binder) -> bool:
        x, out = binder.rows(node.inputs[0]), binder.output(node.outputs[0])
        shape = as_rows(x.shape)
        if node.attributes.get("axis", -1) not in (-1, len(x.shape) - 1) or node.attributes.get("p", 2) != 2:
            return False
        binder.step(_core.normalize, x.reshape(*shape), out.reshape(*shape))
        return True

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        x = node.inputs[0]
        last = node.attributes.get("axis", -1) in (-1, len(tape.type(x).shape) - 1)
        need(last and node.attributes.get("p", 2) == 2, node, "only the gradient of p = 2 over the last axis is known")
        if tape.wants(x):
            tape.add(x, tape.emit("LpNormalizationGrad", [dy, x]))


class LpNormalizationGrad(Op):
    """dx = (dy - y * sum(dy * y)) / norm(x) with y = x / norm(x), for p = 2 over the last axis; 0 where the norm is 0."""

    name = "LpNormalizationGrad"
    domain = GRAD
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, x = types
        assert x is not None
        need(len(x.shape) >= 1 and same_type(dy, x), node, f"dy is {dy} but x is {x}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
        norm = np.sqrt((x * x).sum(axis=-1, keepdims=True))
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
        y = x * inverse
        return [((dy - y * (dy * y).sum(axis=-1, keepdims=True)) * inverse).astype(inputs[1].dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, x, dx = binder.rows(node.inputs[0]), binder.rows(node.inputs[1]), binder.output(node.outputs[0])
        shape = as_rows(x.shape)
        binder.step(_core.normalize_grad, dy.reshape(*shape), x.reshape(*shape), dx.reshape(*shape))
        return True


OPERATORS = (
    LayerNormalization,
    LayerNormalizationGrad,
    Softmax,
    SoftmaxGrad,
    LogSoftmax,
    LpNormalization,
    LpNormalizationGrad,
)
