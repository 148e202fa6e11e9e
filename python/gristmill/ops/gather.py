"""Gather: rows of a table by index, and the scatter-add that is its gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.op import GRAD, Node, Op, Tape, TensorType, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

INDICES = (np.dtype(np.int64), np.dtype(np.int32))


def axis_of(node: Node, data: TensorType) -> int:
    axis, rank = node.attributes.get("axis", 0), len(data.shape)
    need(-rank <= axis < rank, node, f"axis {axis} is not one of {data}")
    return int(axis) % rank


def in_range(node: Node, indices: Array, length: int) -> Array:
    """Return indices counted from the start.

    Raises:
        ModelError: one lies outside the axis.
    """
    fits = not indices.size or (int(indices.min()) >= -length and int(indices.max()) < length)
    need(fits, node, f"'{node.inputs[-1]}' has an index outside of the axis, which has {length} places")
    return np.where(indices < 0, indices + length, indices)


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
        return [np.take(data, in_range(node, np.asarray(indices), data.shape[axis]), axis=axis)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        data, indices = node.inputs
        if tape.wants(data):
            axis = axis_of(node, tape.type(data))
            tape.add(data, tape.emit("GatherGrad", [dy, data, indices], {"axis": axis}))


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
        axis = axis_of(node, data)
        wanted = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
        fits = dy.dtype == data.dtype and len(dy.shape) == len(wanted) and all(map(same_dim, dy.shape, wanted))
        need(fits and indices.dtype in INDICES, node, f"dy is {dy} but data is {data} and indices are {indices}")
        return [data]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, data, indices = inputs
        axis = node.attributes.get("axis", 0)
        grad = np.zeros(data.shape, np.float64)
        places = in_range(node, np.asarray(indices), data.shape[axis])
        ahead = range(axis, axis + indices.ndim)
        np.add.at(np.moveaxis(grad, axis, 0), places, np.moveaxis(dy, ahead, range(indices.ndim)))
        return [grad.astype(data.dtype)]


OPERATORS = (Gather, GatherGrad)
