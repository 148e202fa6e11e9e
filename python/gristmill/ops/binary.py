"""Elementwise functions of two inputs and more, but for sums and products: rows of two tables; and Where."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.activation import sigmoid
from gristmill.ops.arithmetic import broadcast
from gristmill.ops.dtypes import BOOL, narrow, wide
from gristmill.ops.op import Node, Op, TensorType, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def modulo(a: Array, b: Array, fmod: int) -> Array:
    """The remainder; its sign is that of the divisor, or with `fmod` that of the dividend."""
    return np.fmod(a, b) if fmod else np.mod(a, b)


def shift(a: Array, b: Array, direction: str) -> Array:
    """Bits that leave on either side are lost, all of them from the width of the dtype on; on the right the sign comes in."""
    width = a.dtype.itemsize * 8
    count = np.minimum(b, width - 1)
    if direction == "RIGHT":
        return np.where((b < width) | (a < 0), np.right_shift(a, count), 0)
    return np.where(b < width, np.left_shift(a, count), 0)


class Binary(Op):
    """One row of a table: a function of two inputs of one dtype, and whether it gives truth values."""

    arity = (2, 2)
    function: ClassVar[Callable[..., Array]]
    boolean: ClassVar[bool]
    defaults: ClassVar[dict[str, Any]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        result = broadcast(node, *types)
        return [TensorType(BOOL, result.shape) if self.boolean else result]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        keywords = {key: node.attributes.get(key, default) for key, default in self.defaults.items()}
        with np.errstate(all="ignore"):
            made = type(self).function(*map(wide, inputs), **keywords)
        return [narrow(made, BOOL if self.boolean else inputs[0].dtype)]


BINARY: tuple[tuple[str, Callable[..., Array], bool, dict[str, Any]], ...] = (
    ("And", np.logical_and, True, {}),
    ("Or", np.logical_or, True, {}),
    ("Xor", np.logical_xor, True, {}),
    ("Equal", np.equal, True, {}),
    ("Less", np.less, True, {}),
    ("LessOrEqual", np.less_equal, True, {}),
    ("Greater", np.greater, True, {}),
    ("GreaterOrEqual", np.greater_equal, True, {}),
    ("BitwiseAnd", np.bitwise_and, False, {}),
    ("BitwiseOr", np.bitwise_or, False, {}),
    ("BitwiseXor", np.bitwise_xor, False, {}),
    ("BitShift", shift, False, {"direction": "LEFT"}),
    ("Mod", modulo, False, {"fmod": 0}),
    ("PRelu", lambda x, slope: np.where(x < 0, slope * x, x), False, {}),
    ("SwiGLU", lambda a, b, alpha: a * sigmoid(alpha * a) * b, False, {"alpha": 1.0}),
)


def _binary(name: str, function: Callable[..., Array], boolean: bool, defaults: dict[str, Any]) -> type[Binary]:
    attributes = {key: type(default) for key, default in defaults.items()}
    members = {"name": name, "function": staticmethod(function), "boolean": boolean, "defaults": defaults}
    return type(name, (Binary,), members | {"attributes": attributes})


class Variadic(Op):
    """One row of a table: a function of two that is folded over any number of inputs."""

    arity = (1, 2**31)
    function: ClassVar[Callable[[Array, Array], Array]]
    mean: ClassVar[bool]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [broadcast(node, *types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        result = reduce(type(self).function, map(wide, inputs))
        return [narrow(result / len(inputs) if self.mean else result, inputs[0].dtype)]


def _variadic(name: str, function: Callable[[Array, Array], Array], mean: bool) -> type[Variadic]:
    return type(name, (Variadic,), {"name": name, "function": staticmethod(function), "mean": mean})


VARIADIC = (("Max", np.maximum, False), ("Min", np.minimum, False), ("Sum", np.add, False), ("Mean", np.add, True))


class Where(Op):
    """x where a condition holds, else y, with broadcasting."""

    name = "Where"
    arity = (3, 3)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        condition, x, y = types
        assert condition is not None
        assert x is not None
        assert y is not None
        need(condition.dtype == BOOL, node, f"the condition '{node.inputs[0]}' is {condition}, not of truth values")
        return [broadcast(node, TensorType(x.dtype, condition.shape), x, y)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.where(*inputs)]


OPERATORS = (*(_binary(*row) for row in BINARY), *(_variadic(*row) for row in VARIADIC), Where)
