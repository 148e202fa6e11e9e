"""Reductions, cumulative sums, and what picks the largest along an axis."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from gristmill.ops.axes import at, axes_of, axis_of, first, integer, ints, value, with_dim
from gristmill.ops.dtypes import INT64, is_float, narrow, wide
from gristmill.ops.op import GRAD, Dim, Node, Op, Tape, TensorType, Undetermined, fresh_dim, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

Axes = tuple[int, ...]


def total(x: Array, axes: Axes) -> Array:
    """The sum in float64, or in the dtype itself where that is exact up to wrapping."""
    return x.sum(axis=axes, keepdims=True, dtype=np.float64 if is_float(x.dtype) else x.dtype)


def _mean(x: Array, axes: Axes) -> Array:
    count = int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64))
    if is_float(x.dtype):
        with np.errstate(invalid="ignore"):
            return np.asarray(total(x, axes) / np.float64(count))
    return np.trunc(total(x, axes) / max(count, 1))


def _log_sum_exp(x: Array, axes: Axes) -> Array:
    x = x.astype(np.float64)
    peak = x.max(axis=axes, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    return np.log(np.exp(x - peak).sum(axis=axes, keepdims=True)) + peak


def _extreme(largest: bool) -> Callable[[Array, Axes], Array]:
    def pick(x: Array, axes: Axes) -> Array:
        if x.dtype.kind == "b":
            return np.asarray((x.any if largest else x.all)(axis=axes, keepdims=True))
        if is_float(x.dtype):
            lowest, highest = -np.inf, np.inf
        else:
            lowest, highest = np.iinfo(x.dtype).min, np.iinfo(x.dtype).max
        if largest:
            return x.max(axis=axes, keepdims=True, initial=lowest)
        return x.min(axis=axes, keepdims=True, initial=highest)

    return pick


REDUCTIONS: dict[str, Callable[[Array, Axes], Array]] = {
    "ReduceL1": lambda x, axes: total(np.abs(x), axes),
    "ReduceL2": lambda x, axes: np.sqrt(total(x.astype(np.float64) ** 2, axes)),
    "ReduceLogSum": lambda x, axes: np.log(total(x, axes)),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extreme(True),
    "ReduceMean": _mean,
    "ReduceMin": _extreme(False),
    "ReduceProd": lambda x, axes: x.prod(axis=axes, keepdims=True, dtype=np.float64 if is_float(x.dtype) else x.dtype),
    "ReduceSum": total,
    "ReduceSumSquare": lambda x, axes: total(x * x, axes),
}


def reduced_axes(node: Node, axes: Sequence[int] | None, rank: int) -> Axes:
    """The axes that go: all of them where none are named, unless the node says that none means none."""
    if not axes:
        return () if node.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axes_of(node, axes, rank)))


class Reduction(Op):
    """One row of the table: inputs x and, optional, the axes; with `keepdims` 1 (default) they stay as ones."""

    arity = (1, 2)
    attributes = {"keepdims": int, "noop_with_empty_axes": int}
    function: ClassVar[Callable[[Array, Axes], Array]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, rank, keep = first(types), len(first(types).shape), node.attributes.get("keepdims", 1)
        try:
            axes = reduced_axes(node, ints(value(1, types, constants)), rank)
        except Undetermined:
            if not keep:
                raise
            return [TensorType(x.dtype, tuple(fresh_dim(node, axis) for axis in range(rank)))]
        kept: list[Dim] = [1 if axis in axes else dim for axis, dim in enumerate(x.shape) if keep or axis not in axes]
        return [TensorType(x.dtype, tuple(kept))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x = wide(inputs[0])
        axes = reduced_axes(node, ints(at(inputs, 1)), x.ndim)
        with np.errstate(all="ignore"):
            y = type(self).function(x, axes) if axes or x.ndim == 0 else self._untouched(x)
        return [narrow(y if node.attributes.get("keepdims", 1) else np.squeeze(y, axes), inputs[0].dtype)]

    def _untouched(self, x: Array) -> Array:
        """What no axes leave: each element reduced on its own."""
        return type(self).function(x[..., None], (x.ndim,))[..., 0]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            attributes = {**node.attributes, "mean": int(self.name == "ReduceMean")}
            tape.add(node.inputs[0], tape.emit("ReductionGrad", [dy, *node.inputs], attributes))


class ReductionGrad(Op):
    """dy spread over the axes that a sum or, with `mean` 1, a mean took away: inputs dy, x and, optional, the axes."""

    name = "ReductionGrad"
    domain = GRAD
    arity = (2, 3)
    attributes = {"keepdims": int, "noop_with_empty_axes": int, "mean": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[1] is not None
        return [types[1]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x = inputs[:2]
        axes = reduced_axes(node, ints(at(inputs, 2)), x.ndim)
        shape = tuple(1 if axis in axes else dim for axis, dim in enumerate(x.shape))
        count = np.prod([x.shape[axis] for axis in axes], dtype=np.int64) if node.attributes.get("mean", 0) else 1
        return [narrow(np.broadcast_to(dy.reshape(shape) / max(count, 1), x.shape), x.dtype)]


def _reduction(name: str, function: Callable[[Array, Axes], Array]) -> type[Reduction]:
    differentiable = name in ("ReduceSum", "ReduceMean")
    return type(name, (Reduction,), {"name": name, "function": staticmethod(function), "differentiable": differentiable})


class Arg(Op):
    """The index of the largest or smallest element along an axis: the first of equals, or the last of them."""

    arity = (1, 1)
    attributes = {"axis": int, "keepdims": int, "select_last_index": int}
    pick: ClassVar[Callable[..., Any]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        shape = first(types).shape
        axis = axis_of(node, node.attributes.get("axis", 0), len(shape))
        keep: tuple[Dim, ...] = (1,) if node.attributes.get("keepdims", 1) else ()
        return [TensorType(INT64, (*shape[:axis], *keep, *shape[axis + 1 :]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis, pick = wide(inputs[0]), node.attributes.get("axis", 0), type(self).pick
        keep = bool(node.attributes.get("keepdims", 1))
        if node.attributes.get("select_last_index", 0):
            found = x.shape[axis] - 1 - pick(np.flip(x, axis), axis=axis, keepdims=keep)
        else:
            found = pick(x, axis=axis, keepdims=keep)
        return [np.asarray(found, INT64)]


class ArgMax(Arg):
    name, pick = "ArgMax", staticmethod(np.argmax)


class ArgMin(Arg):
    name, pick = "ArgMin", staticmethod(np.argmin)


class Cumulative(Op):
    """The running sum or product along an axis, given as the second input; `exclusive` leaves each element itself out."""

    arity = (2, 2)
    attributes = {"exclusive": int, "reverse": int}
    function: ClassVar[Callable[..., Array]]
    neutral: ClassVar[int]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis = wide(inputs[0]), axis_of(node, integer(inputs[1]) or 0, inputs[0].ndim)
        x = np.flip(x, axis) if node.attributes.get("reverse", 0) else x
        y = type(self).function(x, axis=axis, dtype=np.float64 if is_float(x.dtype) else x.dtype)
        if node.attributes.get("exclusive", 0):
            start = np.full_like(y[(slice(None),) * axis + (slice(0, 1),)], self.neutral)
            y = np.concatenate([start, y], axis)[(slice(None),) * axis + (slice(0, x.shape[axis]),)]
        return [narrow(np.flip(y, axis) if node.attributes.get("reverse", 0) else y, inputs[0].dtype)]


class CumSum(Cumulative):
    name, function, neutral = "CumSum", staticmethod(np.cumsum), 0


class CumProd(Cumulative):
    name, function, neutral = "CumProd", staticmethod(np.cumprod), 1


class TopK(Op):
    """The k largest (or smallest) elements along an axis and their indices, in order; the lower index first among equals."""

    name = "TopK"
    arity = (2, 2)
    attributes = {"axis": int, "largest": int, "sorted": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x = first(types)
        axis = axis_of(node, node.attributes.get("axis", -1), len(x.shape))
        try:
            k, dim = integer(value(1, types, constants)) or 0, x.shape[axis]
            need(k >= 0 and (isinstance(dim, str) or k <= dim), node, f"cannot take {k} elements of dimension {axis} of {x}")
            shape = with_dim(x.shape, axis, k)
        except Undetermined:
            shape = with_dim(x.shape, axis, fresh_dim(node, axis))
        return [TensorType(x.dtype, shape), TensorType(INT64, shape)][: len(node.outputs)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis, k = inputs[0], node.attributes.get("axis", -1), integer(inputs[1]) or 0
        need(0 <= k <= x.shape[axis], node, f"cannot take {k} elements of dimension {axis} of {x.shape}")
        order = ranking(wide(x), axis, bool(node.attributes.get("largest", 1)))
        index = np.take(order, np.arange(k), axis=axis)
        return [np.take_along_axis(x, index, axis), index.astype(INT64)][: len(node.outputs)]


def ranking(x: Array, axis: int, largest: bool) -> Array:
    """The indices that sort along an axis, the lower index first among equals; NaN counts as the largest."""
    if not largest:
        return np.argsort(x, axis=axis, kind="stable")
    backwards = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return np.flip(x.shape[axis] - 1 - backwards, axis)


class Hardmax(Op):
    """1 at the first largest element along an axis, 0 elsewhere."""

    name = "Hardmax"
    arity = (1, 1)
    attributes = {"axis": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        axis_of(node, node.attributes.get("axis", -1), len(first(types).shape))
        return [first(types)]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, axis = inputs[0], node.attributes.get("axis", -1)
        y = np.zeros_like(x)
        np.put_along_axis(y, wide(x).argmax(axis=axis, keepdims=True), 1, axis)
        return [y]


OPERATORS = (
    *(_reduction(name, function) for name, function in REDUCTIONS.items()),
    *(ReductionGrad, ArgMax, ArgMin, CumSum, CumProd, TopK, Hardmax),
)
