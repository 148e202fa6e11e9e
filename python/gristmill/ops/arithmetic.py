"""Arithmetic with NumPy broadcasting; Add and Mul of equal shapes run on kernels."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.axes import first
from gristmill.ops.dtypes import is_float, narrow, wide
from gristmill.ops.op import GRAD, Binder, Dim, Node, Op, Tape, TensorType, aligned, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def broadcast(node: Node, *types: TensorType | None) -> TensorType:
    """Return the type of an elementwise result; symbols may turn out to be whatever fits."""
    present = [kind for kind in types if kind is not None]
    result = present[0]
    for index, kind in enumerate(present[1:], 1):
        told = f"'{node.inputs[0]}' is {present[0]} and '{node.inputs[index]}' is {kind}"
        need(result.dtype == kind.dtype, node, f"{told}: the dtypes differ")
        result = TensorType(result.dtype, broadcast_shapes(node, result.shape, kind.shape, told))
    return result


def broadcast_shapes(node: Node, a: tuple[Dim, ...], b: tuple[Dim, ...], told: str) -> tuple[Dim, ...]:
    """Return the common shape of two. `told` says which, should there be none."""
    rank = max(len(a), len(b))
    left: tuple[Dim, ...] = (1,) * (rank - len(a)) + a
    right: tuple[Dim, ...] = (1,) * (rank - len(b)) + b
    fits = all(same_dim(x, y) or x == 1 or y == 1 for x, y in zip(left, right, strict=True))
    need(fits, node, f"{told}: the shapes do not broadcast")
    return tuple(_wider(x, y) for x, y in zip(left, right, strict=True))


def _wider(x: Dim, y: Dim) -> Dim:
    """The dimension of a result: a number other than 1 decides, then a symbol."""
    if x == 1 or (isinstance(x, str) and isinstance(y, int) and y != 1):
        return y
    return x


class Elementwise(Op):
    """A function of two inputs of broadcastable shapes."""

    arity = (2, 2)
    differentiable = True

    def kernel(self) -> Callable[..., None]:
        """The kernel for equal shapes."""
        raise NotImplementedError

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [broadcast(node, *types)]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return aligned(split, types, made[0])

    def bind(self, node: Node, binder: Binder) -> bool:
        a, b = sorted(map(binder.rows, node.inputs), key=lambda buffer: -prod(buffer.shape))  # both operators commute
        core = b.shape
        while core[:1] == (1,):
            core = core[1:]
        out = a.shape == b.shape or (len(b.shape) <= len(a.shape) and a.shape[len(a.shape) - len(core) :] == core)
        if not out or 0 in a.shape:
            return False
        binder.step(self.kernel(), a, b.reshape(*core), binder.output(node.outputs[0]))
        return True


def reduce_to(tape: Tape, gradient: str, like: str, other: str) -> str:
    """Sum a gradient over the dimensions along which a value was broadcast."""
    same = tape.type(like).shape == tape.type(other).shape
    return gradient if same else tape.emit("SumToShape", [gradient, like])


class Add(Elementwise):
    name = "Add"

    def kernel(self) -> Callable[..., None]:
        return _core.add

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(wide(inputs[0]) + wide(inputs[1]), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value in node.inputs:
            if tape.wants(value):
                tape.add(value, reduce_to(tape, dy, value, node.outputs[0]))


class Mul(Elementwise):
    name = "Mul"

    def kernel(self) -> Callable[..., None]:
        return _core.multiply

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(wide(inputs[0]) * wide(inputs[1]), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value, other in (node.inputs, node.inputs[::-1]):
            if tape.wants(value):
                tape.add(value, reduce_to(tape, tape.emit("Mul", [dy, other], domain=""), value, node.outputs[0]))


class Sub(Op):
    """a - b."""

    name = "Sub"
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [broadcast(node, *types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(wide(inputs[0]) - wide(inputs[1]), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        a, b = node.inputs
        if tape.wants(a):
            tape.add(a, reduce_to(tape, dy, a, node.outputs[0]))
        if tape.wants(b):
            tape.add(b, reduce_to(tape, tape.emit("Neg", [dy], domain=""), b, node.outputs[0]))


def divide(a: Array, b: Array) -> Array:
    """a / b; of integers, the quotient truncated towards zero."""
    if is_float(a.dtype):
        return a / b
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0)))


class Div(Op):
    """a / b; of integers, the quotient truncated towards zero."""

    name = "Div"
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [broadcast(node, *types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        with np.errstate(all="ignore"):
            return [narrow(divide(*map(wide, inputs)), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        a, b, y = *node.inputs, node.outputs[0]
        if not tape.wants(a) and not tape.wants(b):
            return
        share = tape.emit("Div", [dy, b], domain="")
        if tape.wants(a):
            tape.add(a, reduce_to(tape, share, a, y))
        if tape.wants(b):
            down = tape.emit("Neg", [tape.emit("Mul", [share, y], domain="")], domain="")
            tape.add(b, reduce_to(tape, down, b, y))


class Pow(Op):
    """x to the power of an exponent, which may have a dtype of its own."""

    name = "Pow"
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, exponent = types
        assert x is not None
        assert exponent is not None
        return [broadcast(node, x, TensorType(x.dtype, exponent.shape))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [narrow(power(*inputs), inputs[0].dtype)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        x, exponent = node.inputs
        need(not tape.wants(exponent), node, "has no gradient in its exponent")
        if tape.wants(x):
            tape.add(x, reduce_to(tape, tape.emit("PowGrad", [dy, x, exponent]), x, node.outputs[0]))


def power(x: Array, exponent: Array) -> Array:
    x, exponent = wide(x), wide(exponent)
    if is_float(x.dtype):
        exponent = exponent.astype(x.dtype) if not is_float(exponent.dtype) else exponent
    elif np.any(exponent < 0):
        x = x.astype(np.float64)  # whose powers truncate to what integers keep of them
    with np.errstate(all="ignore"):
        return np.power(x, exponent)


class PowGrad(Op):
    """dy * exponent * x ** (exponent - 1), in the shape of dy."""

    name = "PowGrad"
    domain = GRAD
    arity = (3, 3)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x, exponent = inputs
        return [narrow(dy * exponent * power(x, np.asarray(exponent - 1)), dy.dtype)]


class Identity(Op):
    """ONNX Identity."""

    name = "Identity"
    arity = (1, 1)
    differentiable = True
    every_dtype = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0]]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], dy)

    def bind(self, node: Node, binder: Binder) -> bool:
        return binder.alias(node.outputs[0], binder.rows(node.inputs[0]))


class SumToShape(Op):
    """Sum x down to the shape of its second input: the gradient of broadcasting."""

    name = "SumToShape"
    domain = GRAD
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, like = types
        assert x is not None
        assert like is not None
        trailing = x.shape[len(x.shape) - len(like.shape) :]
        fits = len(x.shape) >= len(like.shape) and all(
            d == 1 or same_dim(s, d) for s, d in zip(trailing, like.shape, strict=True)
        )
        need(fits and x.dtype == like.dtype, node, f"{x} cannot be summed down to {like}")
        return [like]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, like = inputs
        extra = x.ndim - like.ndim
        axes = (*range(extra), *[extra + i for i, d in enumerate(like.shape) if d == 1 and x.shape[extra + i] != 1])
        return [np.asarray(x.sum(axis=axes, dtype=np.float64).reshape(like.shape), x.dtype)]


OPERATORS = (Add, Sub, Mul, Div, Pow, PowGrad, Identity, SumToShape)
