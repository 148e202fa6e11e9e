"""Add and Mul with NumPy broadcasting; equal shapes run on kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import GRAD, Binder, Dim, Node, Op, Tape, TensorType, aligned, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def broadcast(node: Node, a: TensorType, b: TensorType) -> TensorType:
    """Return the type of an elementwise result; symbols may turn out to be whatever fits."""
    rank = max(len(a.shape), len(b.shape))
    left: tuple[Dim, ...] = (1,) * (rank - len(a.shape)) + a.shape
    right: tuple[Dim, ...] = (1,) * (rank - len(b.shape)) + b.shape
    need(
        all(same_dim(x, y) or x == 1 or y == 1 for x, y in zip(left, right, strict=True)),
        node,
        f"'{node.inputs[0]}' is {a} and '{node.inputs[1]}' is {b}: the shapes do not broadcast",
    )
    need(a.dtype == b.dtype, node, f"'{node.inputs[0]}' is {a} and '{node.inputs[1]}' is {b}: the dtypes differ")
    return TensorType(a.dtype, tuple(_wider(x, y) for x, y in zip(left, right, strict=True)))


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
        a, b = types
        assert a is not None
        assert b is not None
        return [broadcast(node, a, b)]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return aligned(split, types, made[0])

    def bind(self, node: Node, binder: Binder) -> bool:
        a, b = binder.rows(node.inputs[0]), binder.rows(node.inputs[1])
        if a.shape != b.shape:
            return False
        binder.step(self.kernel(), a, b, binder.output(node.outputs[0]))
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
        return [inputs[0] + inputs[1]]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value in node.inputs:
            if tape.wants(value):
                tape.add(value, reduce_to(tape, dy, value, node.outputs[0]))


class Mul(Elementwise):
    name = "Mul"

    def kernel(self) -> Callable[..., None]:
        return _core.multiply

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0] * inputs[1]]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value, other in (node.inputs, node.inputs[::-1]):
            if tape.wants(value):
                tape.add(value, reduce_to(tape, tape.emit("Mul", [dy, other], domain=""), value, node.outputs[0]))


class Identity(Op):
    """ONNX Identity."""

    name = "Identity"
    arity = (1, 1)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0]]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], dy)

    def bind(self, node: Node, binder: Binder) -> bool:
        x = binder.rows(node.inputs[0])
        if x.dtype != np.float32:
            return False
        binder.step(_core.scale, x, 1.0, binder.output(node.outputs[0]))
        return True


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


OPERATORS = (Add, Mul, Identity, SumToShape)
