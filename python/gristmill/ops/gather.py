"""Gather: rows of a table by index, the scatter-add that is its gradient, and the sum of rows of several tables."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import GRAD, OWN, Binder, Node, Op, Tape, TensorType, need, same_dim, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

INDICES = (np.dtype(np.int64), np.dtype(np.int32))


def axis_of(node: Node, data: TensorType) -> int:
    axis, rank = node.attributes.get("axis", 0), len(data.shape)
    need(-rank <= axis < rank, node, f"axis {axis} is not one of {data}")
    return int(axis) % rank


def take(node: Node, data: Array, indices: Array, axis: int) -> Array:
    """Return rows by index. Where an index lies outside of the axis, a row of floats is NaN, as in the kernel.

    Raises:
        ModelError: an index lies outside, and the data are no floats.
    """
    length = data.shape[axis]
    places = np.where(indices < 0, indices + length, indices)
    outside = (places < 0) | (places >= length)
    if not outside.any():
        return np.take(data, places, axis=axis)
    need(data.dtype.kind == "f", node, f"'{node.inputs[-1]}' has an index outside of the axis, which has {length} places")
    extended = np.insert(data, length, np.nan, axis=axis)
    return np.take(extended, np.where(outside, length, places), axis=axis)


def as_middle(shape: Sequence[int], axis: int) -> tuple[int, int, int]:
    """Return a shape as what lies before an axis, along it, and behind it."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


class Gather(Op):
    """ONNX Gather: y = data[..., indices, ...] along an axis; negative indices count from the end."""

    name = "Gather"
    arity = (2, 2)
    attributes = {"axis": int}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        data, indices = types
        assert data is not None
        assert indices is not None
        need(indices.dtype in INDICES, node, f"indices must be int64 or int32, got {indices}")
        axis = axis_of(node, data)
        return [TensorType(data.dtype, (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        data, indices = inputs
        axis = node.attributes.get("axis", 0)
        return [take(node, data, np.asarray(indices), axis % data.ndim)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        data, indices = node.inputs
        if tape.wants(data):
            axis = axis_of(node, tape.type(data))
            tape.add(data, tape.emit("GatherGrad", [dy, data, indices], {"axis": axis}))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        assert types[0] is not None
        axis = axis_of(node, types[0])
        return list(split) == ([False, True] if axis == 0 else [True, False])

    def bind(self, node: Node, binder: Binder) -> bool:
        shape = binder.shape(node.inputs[0])
        axis = node.attributes.get("axis", 0) % len(shape)
        if binder.kind(node.inputs[0]) == "int4":
            return axis == 0 and bind_int4(node, binder, shape)
        data, indices, out = binder.rows(node.inputs[0]), binder.rows(node.inputs[1]), binder.output(node.outputs[0])
        outer, places, inner = as_middle(data.shape, axis)
        binder.step(_core.gather, data.reshape(outer, places, inner), indices, out.reshape(outer, prod(indices.shape), inner))
        return True


def bind_int4(node: Node, binder: Binder, shape: Sequence[int]) -> bool:
    """Append the lookup in an int4 table, of which only the rows asked for are expanded."""
    indices, out = binder.rows(node.inputs[1]), binder.output(node.outputs[0])
    out = out.reshape(1, prod(indices.shape), shape[1])
    binder.step(_core.gather, binder.weight(node.inputs[0]), indices, out)
    return True


class GatherGrad(Op):
    """The gradient of Gather in its data: dy added up where its rows came from, in the order of the indices."""

    name = "GatherGrad"
    domain = GRAD
    arity = (3, 3)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        dy, data, indices = types
        assert dy is not None
        assert data is not None
        assert indices is not None
        packed = constants[1] is not None and constants[1].kind == "int4"
        need(not packed, node, f"table '{node.inputs[1]}' is int4, which does not train: leave it out, or quantise it afterwards")
        axis = axis_of(node, data)
        wanted = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
        fits = dy.dtype == data.dtype and len(dy.shape) == len(wanted) and all(map(same_dim, dy.shape, wanted))
        need(fits and indices.dtype in INDICES, node, f"dy is {dy} but data is {data} and indices are {indices}")
        return [data]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, data, indices = inputs
        axis = node.attributes.get("axis", 0)
        grad = np.zeros(data.shape, np.float64)
        length = data.shape[axis]
        places = np.where(indices < 0, indices + length, indices)
        rows = np.moveaxis(dy, range(axis, axis + indices.ndim), range(indices.ndim))
        inside = (places >= 0) & (places < length)
        np.add.at(np.moveaxis(grad, axis, 0), places[inside], rows[inside])
        return [grad.astype(data.dtype)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, indices, grad = binder.rows(node.inputs[0]), binder.rows(node.inputs[2]), binder.output(node.outputs[0])
        outer, places, inner = as_middle(grad.shape, node.attributes.get("axis", 0))
        binder.step(_core.gather_grad, dy.reshape(outer, prod(indices.shape), inner), indices, grad.reshape(outer, places, inner))
        return True


class Lookups(Op):
    """The sum of rows of one to four tables: inputs table, indices, table, indices, ...; what embeddings are fused to.

    Of int4 tables only the rows asked for are expanded.
    """

    name = "Lookups"
    domain = OWN
    arity = (2, 8)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        table, indices = types[0], types[1]
        assert table is not None
        assert indices is not None
        fits = len(types) % 2 == 0 and table.dtype == np.float32
        for t, i in zip(types[::2], types[1::2], strict=False):
            fits = fits and t is not None and i is not None and i.dtype in INDICES and len(t.shape) == 2
            fits = fits and t.dtype == table.dtype and same_dim(t.shape[1], table.shape[1])  # type: ignore[union-attr]
            fits = fits and same_type(TensorType(indices.dtype, i.shape), indices)  # type: ignore[union-attr]
        need(fits, node, f"tables and indices do not fit: {', '.join(map(str, types))}")
        return [TensorType(table.dtype, (*indices.shape, table.shape[1]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        rows = [take(node, table, indices, 0) for table, indices in zip(inputs[::2], inputs[1::2], strict=True)]
        return [np.asarray(sum(rows[1:], rows[0]))]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return all(split[1::2]) and not any(split[::2])

    def bind(self, node: Node, binder: Binder) -> bool:
        pairs = [binder.weight(name) if binder.kind(name) == "int4" else binder.rows(name) for name in node.inputs]
        out = binder.output(node.outputs[0])
        binder.step(_core.lookups, out.reshape(prod(out.shape[:-1]), out.shape[-1]), *pairs)
        return True


OPERATORS = (Gather, GatherGrad, Lookups)
