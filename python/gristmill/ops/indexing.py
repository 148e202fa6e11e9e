"""Elements picked and placed by indices: gathering, scattering, one-hot rows, and what depends on values (NonZero, Unique)."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from gristmill.ops.axes import axis_of, first, value, with_dim
from gristmill.ops.dtypes import BOOL, INT64, narrow, wide
from gristmill.ops.op import Dim, Node, Op, TensorType, Undetermined, fresh_dim, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def wrapped(indices: Array, dim: int) -> Array:
    """Return indices counted from the front.

    Raises:
        IndexError: one lies outside of the dimension.
    """
    indices = indices.astype(np.int64)
    if indices.size and not (-dim <= indices.min() and indices.max() < dim):
        raise IndexError(f"indices from {indices.min()} to {indices.max()} are out of range for a dimension of {dim}")
    return np.where(indices < 0, indices + dim, indices)


class GatherElements(Op):
    """y[i][j][k] = x[i][index[i][j][k]][k], for axis 1; indices may be smaller than x in the other dimensions."""

    name = "GatherElements"
    arity = (2, 2)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, indices = first(types), types[1]
        assert indices is not None
        axis_of(node, node.attributes.get("axis", 0), len(x.shape))
        need(len(x.shape) == len(indices.shape) and indices.dtype.kind == "i", node, f"x is {x} but the indices are {indices}")
        return [TensorType(x.dtype, indices.shape)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis = inputs[0], node.attributes.get("axis", 0) % inputs[0].ndim
        return [x[places(wrapped(inputs[1], x.shape[axis]), axis)]]


def places(indices: Array, axis: int) -> tuple[Array, ...]:
    """Index arrays for all dimensions: the given one along an axis, each element's own position along the others."""
    grid = np.indices(indices.shape, sparse=True)
    return (*grid[:axis], indices, *grid[axis + 1 :])


class GatherND(Op):
    """Slices of x at the positions that the last dimension of the indices names, after `batch_dims` shared dimensions."""

    name = "GatherND"
    arity = (2, 2)
    attributes = {"batch_dims": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, indices = first(types), types[1]
        assert indices is not None
        batch = node.attributes.get("batch_dims", 0)
        need(0 <= batch < len(indices.shape) and indices.dtype.kind == "i", node, f"the indices are {indices}")
        depth = indices.shape[-1]
        if isinstance(depth, str):
            raise Undetermined
        need(batch + depth <= len(x.shape), node, f"x is {x} but the indices are {indices}")
        return [TensorType(x.dtype, (*indices.shape[:-1], *x.shape[batch + depth :]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, indices = inputs
        batch, depth = node.attributes.get("batch_dims", 0), inputs[1].shape[-1]
        index = [wrapped(indices[..., i], x.shape[batch + i]) for i in range(depth)]
        shape = indices.shape[:-1]
        grid = [np.arange(shape[i]).reshape((-1,) + (1,) * (len(shape) - i - 1)) for i in range(batch)]
        if not grid and not index:
            return [np.broadcast_to(x, (*shape, *x.shape))]
        return [x[(*grid, *index)].reshape(*shape, *x.shape[batch + depth :])]


REDUCERS: dict[str, Callable[..., None]] = {
    "add": np.add.at,
    "mul": np.multiply.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def place(y: Array, index: Any, updates: Array, reduction: str) -> None:
    if reduction == "none":
        y[index] = updates
    else:
        REDUCERS[reduction](y, index, updates)


class Scatters(Op):
    """A copy of x with updates at indices, put or combined: `reduction` none, add, mul, max or min."""

    arity = (3, 3)
    attributes = {"reduction": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, indices, updates = types
        assert x is not None
        assert indices is not None
        assert updates is not None
        need(node.attributes.get("reduction", "none") in ("none", *REDUCERS), node, f"unknown reduction {node.attributes}")
        need(x.dtype == updates.dtype and indices.dtype.kind == "i", node, f"x is {x}, indices {indices}, updates {updates}")
        self._check(node, x, indices, updates)
        return [x]

    def _check(self, node: Node, x: TensorType, indices: TensorType, updates: TensorType) -> None:
        raise NotImplementedError

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, indices, updates = inputs
        y = np.array(wide(x))
        self._place(node, y, indices, wide(updates))
        return [narrow(y, x.dtype)]

    def _place(self, node: Node, y: Array, indices: Array, updates: Array) -> None:
        raise NotImplementedError


class ScatterElements(Scatters):
    name = "ScatterElements"
    attributes = {"reduction": str, "axis": int}

    def _check(self, node: Node, x: TensorType, indices: TensorType, updates: TensorType) -> None:
        axis_of(node, node.attributes.get("axis", 0), len(x.shape))
        fits = len(indices.shape) == len(x.shape) == len(updates.shape)
        fits = fits and all(map(same_dim, indices.shape, updates.shape))
        need(fits, node, f"x is {x}, indices {indices}, updates {updates}")

    def _place(self, node: Node, y: Array, indices: Array, updates: Array) -> None:
        axis = node.attributes.get("axis", 0) % y.ndim
        index = places(wrapped(indices, y.shape[axis]), axis)
        place(y, tuple(np.broadcast_arrays(*index)), updates, node.attributes.get("reduction", "none"))


class ScatterND(Scatters):
    name = "ScatterND"

    def _check(self, node: Node, x: TensorType, indices: TensorType, updates: TensorType) -> None:
        need(len(indices.shape) >= 1, node, f"the indices are {indices}")
        depth = indices.shape[-1]
        if isinstance(depth, int):
            told = f"x is {x}, indices {indices}, updates {updates}"
            need(depth <= len(x.shape), node, told)
            wanted = (*indices.shape[:-1], *x.shape[depth:])
            need(len(wanted) == len(updates.shape) and all(map(same_dim, wanted, updates.shape)), node, told)

    def _place(self, node: Node, y: Array, indices: Array, updates: Array) -> None:
        index = tuple(wrapped(indices[..., i], y.shape[i]) for i in range(indices.shape[-1]))
        place(y, index or ..., updates, node.attributes.get("reduction", "none"))


class TensorScatter(Op):
    """A cache with an update written along an axis from each batch entry's index on; "circular" goes round its end."""

    name = "TensorScatter"
    arity = (2, 3)
    attributes = {"axis": int, "mode": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        cache, update = first(types), types[1]
        assert update is not None
        fits = cache.dtype == update.dtype and len(cache.shape) == len(update.shape) >= 2
        need(fits, node, f"the cache is {cache} but the update {update}")
        axis = axis_of(node, node.attributes.get("axis", -2), len(cache.shape))
        need(axis > 0, node, "axis 0 is that of the batch")
        fits = all(i == axis or same_dim(a, b) for i, (a, b) in enumerate(zip(cache.shape, update.shape, strict=True)))
        need(fits, node, f"the cache is {cache} but the update {update}")
        mode = node.attributes.get("mode", "linear")
        need(mode in ("linear", "circular"), node, f"unknown mode {mode!r}")
        return [cache]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        cache, update, starts = (*inputs, None)[:3]
        axis, y = node.attributes.get("axis", -2) % inputs[0].ndim, np.array(inputs[0])
        steps = np.arange(update.shape[axis])
        for batch in range(len(y)):
            position = steps + (0 if starts is None else int(starts[batch]))
            if node.attributes.get("mode", "linear") == "circular":
                position = position % cache.shape[axis]
            np.moveaxis(y[batch], axis - 1, 0)[wrapped(position, cache.shape[axis])] = np.moveaxis(update[batch], axis - 1, 0)
        return [y]


class OneHot(Op):
    """A new dimension of extent `depth` that holds the second of `values` at each index and the first elsewhere."""

    name = "OneHot"
    arity = (3, 3)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        indices, values = first(types), types[2]
        assert values is not None
        need(values.shape in ((2,), ("",)) or isinstance(values.shape[:1], tuple), node, f"values must be a pair, got {values}")
        axis = axis_of(node, node.attributes.get("axis", -1), len(indices.shape) + 1)
        try:
            depth: Dim = int((value(1, types, constants)).reshape(-1)[0])  # type: ignore[union-attr]
        except Undetermined:
            depth = fresh_dim(node, axis)
        return [TensorType(values.dtype, (*indices.shape[:axis], depth, *indices.shape[axis:]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        indices, depth, (off, on) = inputs[0], int(inputs[1].reshape(-1)[0]), inputs[2]
        axis = axis_of(node, node.attributes.get("axis", -1), indices.ndim + 1)
        whole = indices.astype(np.int64)
        inside = (whole >= -depth) & (whole < depth)
        rows = np.where(inside, whole % max(depth, 1), -1)
        at_depth = np.arange(depth).reshape((-1,) + (1,) * (indices.ndim - axis))
        return [np.where(np.expand_dims(rows, axis) == at_depth, on, off).astype(inputs[2].dtype)]


class NonZero(Op):
    """The indices of the elements that are not zero, one column for each."""

    name = "NonZero"
    arity = (1, 1)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [TensorType(INT64, (len(first(types).shape), fresh_dim(node, 1)))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = wide(inputs[0])
        found = np.array(np.nonzero(np.atleast_1d(x)), INT64)
        return [found if x.ndim else found[:0].reshape(0, found.shape[1])]


class Compress(Op):
    """The slices along an axis, or the elements in order, where a vector of conditions holds."""

    name = "Compress"
    arity = (2, 2)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, condition = first(types), types[1]
        assert condition is not None
        need(condition.dtype == BOOL and len(condition.shape) == 1, node, f"the condition is {condition}")
        if "axis" not in node.attributes:
            return [TensorType(x.dtype, (fresh_dim(node, 0),))]
        axis = axis_of(node, node.attributes["axis"], len(x.shape))
        return [TensorType(x.dtype, with_dim(x.shape, axis, fresh_dim(node, axis)))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.compress(inputs[1], inputs[0], axis=node.attributes.get("axis"))]


class Unique(Op):
    """The different elements, or slices along an axis; where each is first, which one each element is, and how many there are."""

    name = "Unique"
    arity = (1, 1)
    attributes = {"axis": int, "sorted": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, count = first(types), fresh_dim(node, 0)
        if "axis" in node.attributes:
            axis = axis_of(node, node.attributes["axis"], len(x.shape))
            shape, length = with_dim(x.shape, axis, count), x.shape[axis]
        else:
            fixed = all(isinstance(dim, int) for dim in x.shape)
            shape, length = (count,), prod(map(int, x.shape)) if fixed else fresh_dim(node, 1)
        vector = TensorType(INT64, (count,))
        return [TensorType(x.dtype, shape), vector, TensorType(INT64, (length,)), vector][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        axis = node.attributes.get("axis")
        x = wide(inputs[0])
        values, index, inverse, counts = np.unique(x, True, True, True, axis=axis)
        inverse = inverse.reshape(-1)
        if not node.attributes.get("sorted", 1):
            order = np.argsort(index)
            values, index, counts = np.take(values, order, 0 if axis is None else axis), index[order], counts[order]
            inverse = np.argsort(order)[inverse]
        made = [narrow(values, inputs[0].dtype), *(part.astype(INT64) for part in (index, inverse, counts))]
        return made[: len(node.outputs)]


class ReverseSequence(Op):
    """The first `sequence_lens` steps of each batch entry in reverse order."""

    name = "ReverseSequence"
    arity = (2, 2)
    attributes = {"batch_axis": int, "time_axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axes = [axis_of(node, node.attributes.get(key, default), len(x.shape)) for key, default in AXES]
        need(sorted(axes) == [0, 1], node, f"the axes of batch and time must be the first two, got {axes}")
        return [x]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        batch, time = (node.attributes.get(key, default) for key, default in AXES)
        y = np.array(inputs[0])
        by_entry = np.moveaxis(y, (batch, time), (0, 1))
        for entry, length in enumerate(inputs[1]):
            by_entry[entry, :length] = by_entry[entry, :length][::-1].copy()
        return [y]


AXES = (("batch_axis", 1), ("time_axis", 0))


OPERATORS = (
    *(GatherElements, GatherND, ScatterElements, ScatterND, TensorScatter),
    *(OneHot, NonZero, Compress, Unique, ReverseSequence),
)
