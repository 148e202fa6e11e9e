"""LayerNormalization, Softmax and LpNormalization over the last dimension, and their gradients."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import GRAD, Binder, Node, Op, Tape, TensorType, as_rows, need, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

EPSILON = 1e-5  # what ONNX takes where a node does not say


def last_axis(node: Node, x: TensorType, default: int) -> None:
    axis = node.attributes.get("axis", default)
    need(len(x.shape) >= 1, node, f"{x} has no last axis")
    need(axis in (-1, len(x.shape) - 1), node, f"axis {axis} of {x}: only the last axis is supported")


def centred(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the normalised x and 1 / standard deviation, in float64."""
    wide = x.astype(np.float64)
    mean = wide.mean(axis=-1, keepdims=True)
    inverse = 1.0 / np.sqrt(((wide - mean) ** 2).mean(axis=-1, keepdims=True) + epsilon)
    return (wide - mean) * inverse, inverse


class LayerNormalization(Op):
    """y = (x - mean) / sqrt(variance + epsilon) * scale + bias over the last dimension (ONNX opset 17, axis -1)."""

    name = "LayerNormalization"
    arity = (2, 3)
    attributes = {"axis": int, "epsilon": float}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = types[0]
        assert x is not None
        last_axis(node, x, -1)
        wanted = TensorType(x.dtype, x.shape[-1:])
        for value in types[1:]:
            need(value is None or value == wanted, node, f"scale and bias must be {wanted}, got {value}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, gamma, beta = (*inputs, None)[:3]
        y = centred(x, node.attributes.get("epsilon", EPSILON))[0] * gamma
        return [np.asarray(y if beta is None else y + beta, x.dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        x, gamma, beta = node.input(0), node.input(1), node.input(2)
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
        return list(split) == [True] + [False] * (len(split) - 1) and len(made[0].shape) > 1

    def bind(self, node: Node, binder: Binder) -> bool:
        x, out = binder.rows(node.inputs[0]), binder.output(node.outputs[0])
        shape = as_rows(x.shape)
        beta = binder.array(node.input(2)) if node.input(2) else None
        epsilon = node.attributes.get("epsilon", EPSILON)
        binder.step(_core.layer_norm, x.reshape(*shape), binder.array(node.inputs[1]), beta, epsilon, out.reshape(*shape))
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


def softmax(x: Array) -> Array:
    """The softmax over the last dimension, in float64."""
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        e = np.exp(wide - wide.max(axis=-1, keepdims=True, initial=-np.inf))
        return e / e.sum(axis=-1, keepdims=True)


class Softmax(Op):
    """ONNX Softmax over the last dimension."""

    name = "Softmax"
    arity = (1, 1)
    attributes = {"axis": int}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        last_axis(node, types[0], -1)
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [softmax(inputs[0]).astype(inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("SoftmaxGrad", [dy, node.outputs[0]]))

    def bind(self, node: Node, binder: Binder) -> bool:
        x, out = binder.rows(node.inputs[0]), binder.output(node.outputs[0])
        shape = as_rows(x.shape)
        binder.step(_core.softmax, x.reshape(*shape), out.reshape(*shape))
        return True


class SoftmaxGrad(Op):
    """dx = y * (dy - sum(dy * y)), from softmax's output y."""

    name = "SoftmaxGrad"
    domain = GRAD
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        need(len(types[1].shape) >= 1 and same_type(types[0], types[1]), node, f"dy is {types[0]} but y is {types[1]}")
        return [types[1]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, y = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
        return [(y * (dy - (dy * y).sum(axis=-1, keepdims=True))).astype(inputs[1].dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, y, dx = binder.rows(node.inputs[0]), binder.rows(node.inputs[1]), binder.output(node.outputs[0])
        shape = as_rows(y.shape)
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
    LpNormalization,
    LpNormalizationGrad,
)
