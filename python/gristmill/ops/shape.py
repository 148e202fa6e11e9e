"""What changes the shape of a value, not its elements: Reshape and other views, Transpose; Shape and Size."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.axes import at, axes_of, axis_of, first, fresh_shape, ints, value
from gristmill.ops.dtypes import INT64
from gristmill.ops.op import GRAD, Binder, Dim, Node, Op, Tape, TensorType, Undetermined, fresh_dim, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


class Shape(Op):
    """The extents from `start` to `end`. They follow from the type, so that planning evaluates them."""

    name = "Shape"
    arity = (1, 1)
    attributes = {"start": int, "end": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [TensorType(INT64, (len(self._part(node, first(types).shape)),))]

    def known(self, node: Node, types: Sequence[TensorType | None], values: Sequence[Array | None]) -> list[Array] | None:
        return [np.array(self._part(node, first(types).extents), INT64)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.array(self._part(node, inputs[0].shape), INT64)]

    def _part(self, node: Node, shape: Sequence[Dim]) -> Sequence[Dim]:
        return shape[node.attributes.get("start", 0) : node.attributes.get("end", len(shape))]


class Size(Op):
    """The number of elements."""

    name = "Size"
    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [TensorType(INT64, ())]

    def known(self, node: Node, types: Sequence[TensorType | None], values: Sequence[Array | None]) -> list[Array] | None:
        return [np.array(prod(first(types).extents), INT64)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.array(inputs[0].size, INT64)]


class View(Op):
    """The same elements in the same order under another shape: an alias of the buffer."""

    differentiable = True
    every_dtype = True

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return split[0] and not any(split[1:]) and types[0] is not None and types[0].shape[0] == made[0].shape[0]

    def bind(self, node: Node, binder: Binder) -> bool:
        return binder.alias(node.outputs[0], binder.rows(node.inputs[0]))

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("ReshapeLike", [dy, node.inputs[0]]))


class ReshapeLike(View):
    """dy in the shape of the second input: the gradient of every view."""

    name = "ReshapeLike"
    domain = GRAD
    arity = (2, 2)
    differentiable = False

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, like = types
        assert dy is not None
        assert like is not None
        fixed = all(isinstance(dim, int) for dim in (*dy.shape, *like.shape))
        need(not fixed or prod(dy.extents) == prod(like.extents), node, f"dy is {dy}, which cannot be reshaped to {like}")
        return [TensorType(dy.dtype, like.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].reshape(inputs[1].shape)]


def reshaped(node: Node, shape: tuple[Dim, ...], target: Sequence[int]) -> tuple[Dim, ...]:
    """The shape that Reshape gives: 0 keeps a dimension, -1 takes what is left."""
    keep = not node.attributes.get("allowzero", 0)
    told = f"cannot reshape {list(shape)} to {list(target)}"
    need(list(target).count(-1) <= 1 and all(dim >= -1 for dim in target), node, told)
    need(not keep or all(dim != 0 or axis < len(shape) for axis, dim in enumerate(target)), node, told)
    made: list[Dim] = [shape[axis] if dim == 0 and keep else dim for axis, dim in enumerate(target)]
    left, right = [dim for dim in shape if dim != 1], [dim for dim in made if dim not in (-1, 1)]
    for dim in list(right):  # symbols that stay
        if isinstance(dim, str) and dim in left:
            left.remove(dim)
            right.remove(dim)
    have = prod(dim for dim in left if isinstance(dim, int))
    want = prod(dim for dim in right if isinstance(dim, int))
    symbols = [dim for dim in left if isinstance(dim, str)]
    if any(isinstance(dim, str) for dim in right):
        return tuple(fresh_dim(node, axis) if dim == -1 else dim for axis, dim in enumerate(made))
    if -1 not in made:
        need(bool(symbols) or have == want, node, told)
        return tuple(made)
    axis = made.index(-1)
    if not symbols:
        need(want != 0 and have % want == 0, node, told)
        made[axis] = have // want
    else:
        made[axis] = symbols[0] if len(symbols) == 1 and have == want else fresh_dim(node, axis)
    return tuple(made)


class Reshape(View):
    """ONNX Reshape; the shape is the second input."""

    name = "Reshape"
    arity = (2, 2)
    attributes = {"allowzero": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, kind = first(types), types[1]
        assert kind is not None
        need(len(kind.shape) == 1 and kind.dtype == INT64, node, f"the shape must be an int64 vector, got {kind}")
        try:
            target = [] if kind.shape == (0,) else ints(value(1, types, constants)) or []
        except Undetermined:
            return [TensorType(x.dtype, fresh_shape(node, kind))]
        return [TensorType(x.dtype, reshaped(node, x.shape, target))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].reshape(reshaped(node, inputs[0].shape, ints(inputs[1]) or []))]


class Flatten(View):
    """A matrix: the dimensions before `axis` are rows, the others columns."""

    name = "Flatten"
    arity = (1, 1)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axis = self._axis(node, len(x.shape))
        return [TensorType(x.dtype, (self._product(node, x.shape[:axis], 0), self._product(node, x.shape[axis:], 1)))]

    def _axis(self, node: Node, rank: int) -> int:
        axis = node.attributes.get("axis", 1)
        return rank if axis == rank else axis_of(node, axis, rank)

    def _product(self, node: Node, dims: tuple[Dim, ...], axis: int) -> Dim:
        others = [dim for dim in dims if dim != 1]
        if len(others) == 1:
            return others[0]
        return fresh_dim(node, axis) if any(isinstance(dim, str) for dim in dims) else prod(map(int, dims))

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        shape = inputs[0].shape
        axis = self._axis(node, len(shape))
        return [inputs[0].reshape(prod(shape[:axis]), prod(shape[axis:]))]


class Squeeze(View):
    """Without the dimensions of extent 1 that the second input names, all of them by default."""

    name = "Squeeze"
    arity = (1, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axes = ints(value(1, types, constants))
        if axes is None and any(isinstance(dim, str) for dim in x.shape):
            raise Undetermined
        return [TensorType(x.dtype, self._without(node, x.shape, axes))]

    def _without(self, node: Node, shape: tuple[Dim, ...], axes: list[int] | None) -> tuple[Dim, ...]:
        if axes is None:
            return tuple(dim for dim in shape if dim != 1)
        gone = axes_of(node, axes, len(shape))
        need(all(same_dim(shape[axis], 1) for axis in gone), node, f"cannot squeeze dimensions {axes} of {list(shape)}")
        return tuple(dim for axis, dim in enumerate(shape) if axis not in gone)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].reshape(self._without(node, inputs[0].shape, ints(at(inputs, 1))))]


class Unsqueeze(View):
    """With dimensions of extent 1 where the second input wants them in the result."""

    name = "Unsqueeze"
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, kind = first(types), types[1]
        assert kind is not None
        axes = ints(value(1, types, constants)) or []
        return [TensorType(x.dtype, self._with(node, x.shape, axes))]

    def _with(self, node: Node, shape: tuple[Dim, ...], axes: list[int]) -> tuple[Dim, ...]:
        rank = len(shape) + len(axes)
        ones, dims = axes_of(node, axes, rank), iter(shape)
        return tuple(1 if axis in ones else next(dims) for axis in range(rank))

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].reshape(self._with(node, inputs[0].shape, ints(inputs[1]) or []))]


class Transpose(Op):
    """The dimensions in the order `perm`, reversed by default."""

    name = "Transpose"
    arity = (1, 1)
    attributes = {"perm": tuple}
    differentiable = True
    every_dtype = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        perm = self._perm(node, len(x.shape))
        need(sorted(perm) == list(range(len(x.shape))), node, f"perm {perm} is no order of the dimensions of {x}")
        return [TensorType(x.dtype, tuple(x.shape[axis] for axis in perm))]

    def _perm(self, node: Node, rank: int) -> tuple[int, ...]:
        return tuple(node.attributes.get("perm", range(rank)[::-1]))

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0].transpose(self._perm(node, inputs[0].ndim))]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            perm = self._perm(node, len(tape.type(node.inputs[0]).shape))
            inverse = tuple(int(axis) for axis in np.argsort(perm))
            tape.add(node.inputs[0], tape.emit("Transpose", [dy], {"perm": inverse}, domain=""))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return node.attributes.get("perm", (1,))[0] == 0

    def bind(self, node: Node, binder: Binder) -> bool:
        x = binder.rows(node.inputs[0])
        perm = self._perm(node, len(x.shape))
        if [axis for axis in perm if x.shape[axis] != 1] == [axis for axis in range(len(perm)) if x.shape[axis] != 1]:
            return binder.alias(node.outputs[0], x)  # only ones move
        split = next((split for split in range(1, len(perm)) if perm == (*range(split, len(perm)), *range(split))), None)
        if split is None or x.dtype != np.float32:
            return False
        rows, columns = prod(x.shape[:split]), prod(x.shape[split:])
        binder.step(_core.transpose, x.reshape(rows, columns), binder.output(node.outputs[0]).reshape(columns, rows))
        return True


OPERATORS = (Shape, Size, Reshape, ReshapeLike, Flatten, Squeeze, Unsqueeze, Transpose)
