"""Values joined, cut, repeated and broadcast: Concat, Split, Slice, Expand, Tile and Trilu."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.arithmetic import broadcast_shapes
from gristmill.ops.axes import at, axes_of, axis_of, first, fresh_shape, integer, ints, value, with_dim
from gristmill.ops.op import GRAD, Dim, Node, Op, Tape, TensorType, Undetermined, fresh_dim, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


class Concat(Op):
    """Inputs joined along an axis."""

    name = "Concat"
    arity = (1, 2**31)
    attributes = {"axis": int}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axis = axis_of(node, node.attributes["axis"], len(x.shape))
        shape = list(x.shape)
        for name, kind in zip(node.inputs[1:], types[1:], strict=True):
            assert kind is not None
            fits = kind.dtype == x.dtype and len(kind.shape) == len(shape)
            fits = fits and all(i == axis or same_dim(a, b) for i, (a, b) in enumerate(zip(shape, kind.shape, strict=True)))
            need(fits, node, f"'{node.inputs[0]}' is {x} but '{name}' is {kind}")
            shape = [b if isinstance(a, str) and isinstance(b, int) else a for a, b in zip(shape, kind.shape, strict=True)]
        parts = [kind.shape[axis] for kind in types if kind is not None]
        symbolic = any(isinstance(part, str) for part in parts)
        shape[axis] = (parts[0] if len(parts) == 1 else fresh_dim(node, axis)) if symbolic else sum(map(int, parts))
        return [TensorType(x.dtype, tuple(shape))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.concatenate(inputs, axis=node.attributes["axis"])]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if any(map(tape.wants, node.inputs)):
            parts = tape.emit_all("ConcatGrad", [dy, *node.inputs], node.attributes, outputs=len(node.inputs))
            for name, part in zip(node.inputs, parts, strict=True):
                if tape.wants(name):
                    tape.add(name, part)


class ConcatGrad(Op):
    """dy cut into parts of the shapes of the inputs that follow it."""

    name = "ConcatGrad"
    domain = GRAD
    arity = (2, 2**31)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        need("axis" in node.attributes, node, "attribute axis is missing")
        return [kind for kind in types[1:] if kind is not None]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        axis = node.attributes["axis"]
        return np.split(inputs[0], np.cumsum([x.shape[axis] for x in inputs[1:-1]]), axis)


class Split(Op):
    """A value cut along an axis into parts of the given extents, or into equal ones of which the last may be smaller."""

    name = "Split"
    arity = (1, 2)
    attributes = {"axis": int, "num_outputs": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, count = first(types), len(node.outputs)
        axis = axis_of(node, node.attributes.get("axis", 0), len(x.shape))
        dim = x.shape[axis]
        parts: Sequence[Dim]
        try:
            given = ints(value(1, types, constants))
            if given is None and isinstance(dim, str):
                raise Undetermined
            parts = given if given is not None else even_parts(int(dim), count)
            told = f"cannot split dimension {axis} of {x} into {parts}"
            need(len(parts) == count and (isinstance(dim, str) or sum(map(int, parts)) == dim), node, told)
        except Undetermined:
            parts = [f"{name}.{axis}" for name in node.outputs]
        return [TensorType(x.dtype, with_dim(x.shape, axis, part)) for part in parts]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis = inputs[0], node.attributes.get("axis", 0)
        given = ints(at(inputs, 1))
        parts = even_parts(x.shape[axis], len(node.outputs)) if given is None else given
        need(sum(parts) == x.shape[axis], node, f"cannot split dimension {axis} of {x.shape} into {parts}")
        return np.split(x, np.cumsum(parts[:-1]), axis)


def even_parts(dim: int, count: int) -> list[int]:
    part = -(-dim // count)
    return [max(0, min(part, dim - part * index)) for index in range(count)]


Slices = tuple[slice, ...]


def slices(node: Node, shape: Sequence[Dim], starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> Slices:
    """What NumPy calls the cuts: bounds beyond an end are clipped to it, negative ones count from it."""
    cuts = [slice(None)] * len(shape)
    for axis, start, end, step in zip(axes_of(node, axes, len(shape)), starts, ends, steps, strict=True):
        need(step != 0, node, "a step is 0")
        dim = shape[axis]
        assert isinstance(dim, int)
        low, high = (0, dim) if step > 0 else (-1, dim - 1)
        start = min(max(start + dim if start < 0 else start, 0), high)
        end = min(max(end + dim if end < 0 else end, low), high)
        cuts[axis] = slice(start, None if end < 0 else end, step) if not (start < 0) else slice(0, 0)
    return tuple(cuts)


class Slice(Op):
    """Inputs x, starts, ends and, optional, axes and steps."""

    name = "Slice"
    arity = (3, 5)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, shape = first(types), list(first(types).shape)
        try:
            axes = ints(value(3, types, constants))
        except Undetermined:
            return [TensorType(x.dtype, tuple(fresh_dim(node, axis) for axis in range(len(shape))))]
        if axes is None:
            kind = types[1]
            assert kind is not None
            if isinstance(kind.shape[0], str):
                raise Undetermined
            axes = list(range(kind.shape[0]))
        axes = axes_of(node, axes, len(shape))
        try:
            starts, ends, steps = (ints(value(index, types, constants)) for index in (1, 2, 4))
        except Undetermined:
            return [TensorType(x.dtype, tuple(fresh_dim(node, i) if i in axes else dim for i, dim in enumerate(shape)))]
        for axis, start, end, step in zip(axes, starts or [], ends or [], steps or [1] * len(axes), strict=True):
            dim = shape[axis]
            if isinstance(dim, int):
                cut = slices(node, [dim], [start], [end], [0], [step])[0]
                shape[axis] = len(range(dim)[cut])
            elif (start, step) != (0, 1) or end < 2**31 - 1:
                shape[axis] = fresh_dim(node, axis)
        return [TensorType(x.dtype, tuple(shape))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [inputs[0][cuts_of(node, *inputs)]]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("SliceGrad", [dy, *node.inputs]))


def cuts_of(node: Node, *inputs: Any) -> Slices:
    starts = ints(inputs[1]) or []
    axes, steps = ints(at(inputs, 3)), ints(at(inputs, 4))
    axes = list(range(len(starts))) if axes is None else axes
    return slices(node, inputs[0].shape, starts, ints(inputs[2]) or [], axes, steps or [1] * len(starts))


class SliceGrad(Op):
    """dy where the slice lies, 0 elsewhere: inputs are dy and those of the Slice."""

    name = "SliceGrad"
    domain = GRAD
    arity = (4, 6)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        return [types[1]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dx = np.zeros_like(inputs[1])
        dx[cuts_of(node, *inputs[1:])] = inputs[0]
        return [dx]


class Expand(Op):
    """A value broadcast with a shape, the second input."""

    name = "Expand"
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, kind = first(types), types[1]
        assert kind is not None
        try:
            shape: tuple[Dim, ...] = tuple(ints(value(1, types, constants)) or ())
        except Undetermined:
            shape = fresh_shape(node, kind)
        need(all(isinstance(dim, str) or dim >= 0 for dim in shape), node, f"the shape {list(shape)} has a negative extent")
        return [TensorType(x.dtype, broadcast_shapes(node, x.shape, shape, f"x is {x}, the shape {list(shape)}"))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        shape = np.broadcast_shapes(inputs[0].shape, tuple(ints(inputs[1]) or ()))
        return [np.broadcast_to(inputs[0], shape)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("SumToShape", [dy, node.inputs[0]]))


class Tile(Op):
    """A value repeated along each axis."""

    name = "Tile"
    arity = (2, 2)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        try:
            repeats = ints(value(1, types, constants)) or []
        except Undetermined:
            return [TensorType(x.dtype, tuple(fresh_dim(node, axis) for axis in range(len(x.shape))))]
        need(len(repeats) == len(x.shape), node, f"x is {x} but there are {len(repeats)} repeats")
        need(all(count >= 0 for count in repeats), node, f"repeats {repeats} must not be negative")
        shape = (
            dim if count == 1 else fresh_dim(node, axis) if isinstance(dim, str) else dim * count
            for axis, (dim, count) in enumerate(zip(x.shape, repeats, strict=True))
        )  # fmt: skip
        return [TensorType(x.dtype, tuple(shape))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.tile(inputs[0], ints(inputs[1]) or ())]


class Trilu(Op):
    """The upper (default) or lower triangle of matrices, from diagonal k; 0 elsewhere."""

    name = "Trilu"
    arity = (1, 2)
    attributes = {"upper": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        need(len(first(types).shape) >= 2, node, f"takes matrices, got {first(types)}")
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        k = at(inputs, 1)
        k = integer(k) or 0
        rows, columns = inputs[0].shape[-2:]
        distance = np.arange(columns) - np.arange(rows)[:, None]
        kept = distance >= k if node.attributes.get("upper", 1) else distance <= k
        return [np.where(kept, inputs[0], np.zeros((), inputs[0].dtype))]


OPERATORS = (Concat, ConcatGrad, Split, Slice, SliceGrad, Expand, Tile, Trilu)
