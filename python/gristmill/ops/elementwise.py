"""Elementwise functions of one input: rows of one table, by ONNX name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.activation import erf, sigmoid
from gristmill.ops.axes import at, first
from gristmill.ops.dtypes import BOOL, narrow, wide
from gristmill.ops.op import GRAD, Node, Op, Tape, TensorType, need, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


@dataclass(frozen=True)
class Function:
    """A function of x and of attributes, given as keywords; its slope, where it has one; the attributes' defaults."""

    apply: Callable[..., Array]
    slope: Callable[..., Array] | None = None
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    boolean: bool = False  # the result is a truth value


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _celu(x: Array, alpha: float) -> Array:
    return np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def _hard_sigmoid(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


def _hard_swish(x: Array) -> Array:
    return x * np.clip(x / 6 + 0.5, 0, 1)


def _is_inf(x: Array, detect_negative: int, detect_positive: int) -> Array:
    return np.isinf(x) & np.where(x > 0, bool(detect_positive), bool(detect_negative))


def _selu(x: Array, alpha: float, gamma: float) -> Array:
    return gamma * _elu(x, alpha)


def _shrink(x: Array, bias: float, lambd: float) -> Array:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))


SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}
FUNCTIONS: dict[str, Function] = {
    "Abs": Function(np.abs, np.sign),
    "Acos": Function(np.arccos),
    "Acosh": Function(np.arccosh),
    "Asin": Function(np.arcsin),
    "Asinh": Function(np.arcsinh),
    "Atan": Function(np.arctan),
    "Atanh": Function(np.arctanh),
    "BitwiseNot": Function(np.invert),
    "Ceil": Function(np.ceil),
    "Celu": Function(_celu, None, {"alpha": 1.0}),
    "Cos": Function(np.cos, lambda x: -np.sin(x)),
    "Cosh": Function(np.cosh),
    "Elu": Function(_elu, lambda x, alpha: np.where(x < 0, alpha * np.exp(np.minimum(x, 0)), 1.0), {"alpha": 1.0}),
    "Erf": Function(erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x)),
    "Exp": Function(np.exp, np.exp),
    "Floor": Function(np.floor),
    "HardSigmoid": Function(_hard_sigmoid, None, {"alpha": float(np.float32(0.2)), "beta": 0.5}),
    "HardSwish": Function(_hard_swish),
    "IsInf": Function(_is_inf, None, {"detect_negative": 1, "detect_positive": 1}, boolean=True),
    "IsNaN": Function(np.isnan, boolean=True),
    "LeakyRelu": Function(
        lambda x, alpha: np.where(x < 0, alpha * x, x), lambda x, alpha: np.where(x < 0, alpha, 1.0), {"alpha": 0.01}
    ),
    "Log": Function(np.log, lambda x: 1.0 / x),
    "Mish": Function(lambda x: x * np.tanh(softplus(x))),
    "Neg": Function(np.negative, lambda x: np.full_like(x, -1.0)),
    "Not": Function(np.logical_not, boolean=True),
    "Reciprocal": Function(lambda x: 1 / x, lambda x: -1.0 / (x * x)),
    "Round": Function(np.rint),
    "Selu": Function(_selu, None, SELU),
    "Shrink": Function(_shrink, None, {"bias": 0.0, "lambd": 0.5}),
    "Sign": Function(np.sign),
    "Sin": Function(np.sin, np.cos),
    "Sinh": Function(np.sinh),
    "Softplus": Function(softplus, sigmoid),
    "Softsign": Function(lambda x: x / (1 + np.abs(x))),
    "Sqrt": Function(np.sqrt, lambda x: 0.5 / np.sqrt(x)),
    "Tan": Function(np.tan),
    "ThresholdedRelu": Function(lambda x, alpha: np.where(x > alpha, x, 0), None, {"alpha": 1.0}),
}


def keywords(function: Function, node: Node) -> dict[str, Any]:
    return {key: node.attributes.get(key, default) for key, default in function.defaults.items()}


class Unary(Op):
    """One row of the table as an operator."""

    arity = (1, 1)
    function: ClassVar[Function]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        return [TensorType(BOOL, x.shape) if self.function.boolean else x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        with np.errstate(all="ignore"):
            y = self.function.apply(wide(inputs[0]), **keywords(self.function, node))
        return [narrow(y, BOOL if self.function.boolean else inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("UnaryGrad", [dy, node.inputs[0]], {"function": self.name, **node.attributes}))


def _operator(name: str, function: Function) -> type[Unary]:
    attributes = {key: type(default) for key, default in function.defaults.items()}
    members = {"name": name, "function": function, "attributes": attributes, "differentiable": function.slope is not None}
    return type(name, (Unary,), members)


class UnaryGrad(Op):
    """dx = dy * f'(x) for a row of the table that has a slope."""

    name = "UnaryGrad"
    domain = GRAD
    arity = (2, 2)
    attributes = {"function": str, "alpha": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, x = types
        assert x is not None
        need(same_type(dy, x), node, f"dy is {dy} but x is {x}")
        function = FUNCTIONS.get(node.attributes.get("function", ""))
        need(function is not None and function.slope is not None, node, f"{node.attributes.get('function')!r} has no slope")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x = map(wide, inputs)
        function = FUNCTIONS[node.attributes["function"]]
        assert function.slope is not None
        with np.errstate(all="ignore"):
            return [narrow(dy * function.slope(x, **keywords(function, node)), inputs[1].dtype)]


class Clip(Op):
    """ONNX Clip: min and max are optional scalars; where min exceeds max the result is max."""

    name = "Clip"
    arity = (1, 3)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        for bound in types[1:]:
            fits = bound is None or (bound.dtype == x.dtype and bound.shape in ((), (1,)))
            need(fits, node, f"x is {x} but a bound is {bound}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = y = wide(inputs[0])
        low, high = at(inputs, 1), at(inputs, 2)
        if low is not None:
            y = np.maximum(y, wide(low).reshape(()))
        if high is not None:
            y = np.minimum(y, wide(high).reshape(()))
        return [narrow(y, inputs[0].dtype).reshape(x.shape)]


OPERATORS = (*(_operator(name, function) for name, function in FUNCTIONS.items()), UnaryGrad, Clip)
