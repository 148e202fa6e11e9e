"""Relu, Gelu, Tanh, Sigmoid and Swish: five rows of one table, and their common gradient."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.ops.dtypes import narrow, wide
from gristmill.ops.op import GRAD, Binder, Node, Op, Tape, TensorType, need, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def erf(x: Array) -> Array:
    """The error function by its Taylor series near 0 and its continued fraction elsewhere, in float64 (DLMF 7.6.1, 7.9.1)."""
    x = np.asarray(x, np.float64)
    a = np.abs(x)
    term, series = x.copy(), x.copy()
    for n in range(1, 60):
        term = term * -(x * x) / n
        series = series + term / (2 * n + 1)
    fraction = np.zeros_like(a)
    far = np.maximum(a, 2.0)
    for n in range(60, 0, -1):
        fraction = n / 2 / (far + fraction)
    tail = 1.0 - np.exp(-far * far) / (sqrt(np.pi) * (far + fraction))
    with np.errstate(invalid="ignore"):
        return np.where(a < 2.0, 2 / sqrt(np.pi) * np.where(a < 2.0, series, 0.0), np.copysign(tail, x))


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + erf(x / sqrt(2.0)))


def _gelu_slope(x: Array) -> Array:
    return 0.5 * (1.0 + erf(x / sqrt(2.0))) + x * np.exp(-0.5 * x * x) / sqrt(2.0 * np.pi)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def _gelu_tanh_slope(x: Array) -> Array:
    t = np.tanh(sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * sqrt(2.0 / np.pi) * (1.0 + 3 * 0.044715 * x * x)


def _silu_slope(x: Array) -> Array:
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "relu": (lambda x: np.where(x < 0, 0, x), lambda x: np.where(x > 0, 1.0, np.where(x <= 0, 0.0, x))),
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "tanh": (np.tanh, lambda x: 1.0 - np.tanh(x) ** 2),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1.0 - sigmoid(x))),
    "silu": (lambda x: x * sigmoid(x), _silu_slope),
}


def evaluate(kind: str | None, x: Array) -> Array:
    """Apply an activation by its kernel name; None is the identity."""
    return x if kind is None else narrow(FUNCTIONS[kind][0](wide(x)), x.dtype)


class Activation(Op):
    """An elementwise function of one input."""

    arity = (1, 1)
    differentiable = True
    kernel: ClassVar[str]

    def kind(self, node: Node) -> str:
        """The name of the function that kernels know, or "" where they know none."""
        return self.kernel

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [evaluate(self.kind(node), inputs[0])]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        need(self.kind(node) != "", node, "has no gradient with these attributes")
        # The sign of Relu's output is that of its input: taking the output lets the input fuse away.
        source = node.outputs[0] if self.kernel == "relu" else node.inputs[0]
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("ActivationGrad", [dy, source], {"activation": self.kind(node)}))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return True

    def bind(self, node: Node, binder: Binder) -> bool:
        if not self.kind(node):
            return False
        x, layout = binder.stored(node.inputs[0])
        binder.step(_core.activate, self.kind(node), x, binder.output(node.outputs[0], layout))
        return True


class Relu(Activation):
    name, kernel = "Relu", "relu"


class Tanh(Activation):
    name, kernel = "Tanh", "tanh"


class Sigmoid(Activation):
    name, kernel = "Sigmoid", "sigmoid"


class Swish(Activation):
    """x * sigmoid(alpha * x) (ONNX opset 24); alpha = 1 has kernels and a gradient."""

    name, kernel = "Swish", "silu"
    attributes = {"alpha": float}

    def kind(self, node: Node) -> str:
        return "silu" if node.attributes.get("alpha", 1.0) == 1.0 else ""

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = wide(inputs[0])
        return [narrow(x * sigmoid(node.attributes.get("alpha", 1.0) * x), inputs[0].dtype)]


class Gelu(Activation):
    """ONNX Gelu: attribute `approximate` is "none" (by erf) or "tanh"."""

    name, kernel = "Gelu", "gelu"
    attributes = {"approximate": str}

    def kind(self, node: Node) -> str:
        return "gelu_tanh" if node.attributes.get("approximate", "none") == "tanh" else "gelu"


class ActivationGrad(Op):
    """dx = dy * f'(x)."""

    name = "ActivationGrad"
    domain = GRAD
    arity = (2, 2)
    attributes = {"activation": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        need(same_type(types[0], types[1]), node, f"dy is {types[0]} but x is {types[1]}")
        need(node.attributes.get("activation") in FUNCTIONS, node, f"unknown activation {node.attributes.get('activation')!r}")
        return [types[1]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x = inputs
        return [(dy * FUNCTIONS[node.attributes["activation"]][1](x)).astype(x.dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, x = binder.rows(node.inputs[0]), binder.rows(node.inputs[1])
        binder.step(_core.activate_grad, node.attributes["activation"], dy, x, binder.output(node.outputs[0]))
        return True


OPERATORS = (Relu, Gelu, Tanh, Sigmoid, Swish, ActivationGrad)
