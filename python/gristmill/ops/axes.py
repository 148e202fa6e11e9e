"""Axes, optional inputs and values known at planning time: what shape rules share."""

from collections.abc import Sequence
from typing import Any, TypeVar

from gristmill.ops.op import Dim, Node, TensorType, Undetermined, fresh_dim, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

T = TypeVar("T")


def at(values: Sequence[T | None], index: int) -> T | None:
    """An optional input, or None where it is absent."""
    return values[index] if index < len(values) else None


def first(types: Sequence[TensorType | None]) -> TensorType:
    """The type of the first input, which is always there."""
    assert types[0] is not None
    return types[0]


def value(index: int, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> Array | None:
    """The value of an optional input, None where it is absent.

    Raises:
        Undetermined: it is there but not known yet.
    """
    tensor = constants[index] if index < len(constants) else None
    if tensor is not None:
        return tensor.dense()
    if at(types, index) is not None:
        raise Undetermined
    return None


def ints(array: Array | None) -> list[int] | None:
    """The items of a vector of shapes, axes or the like.

    Raises:
        TypeError: it is not of integers.
    """
    if array is None:
        return None
    if array.dtype.kind not in "iu":
        raise TypeError(f"a vector of integers is needed, got {array.dtype}")
    return [int(item) for item in array.reshape(-1)]


def integer(array: Array | None) -> int | None:
    """The one integer of a scalar.

    Raises:
        TypeError: it is something else.
    """
    items = ints(array)
    if items is not None and len(items) != 1:
        raise TypeError(f"one integer is needed, got {len(items)}")
    return None if items is None else items[0]


def axis_of(node: Node, axis: int, rank: int, extra: int = 0) -> int:
    """Return an axis counted from the front. `extra` is 1 where an axis may be just past the last."""
    bound = rank + extra
    need(-bound <= axis < bound, node, f"axis {axis} is out of range for {rank} dimensions")
    return axis % bound if bound else 0


def axes_of(node: Node, axes: Sequence[int], rank: int) -> list[int]:
    """Return axes counted from the front, each of them once."""
    found = [axis_of(node, axis, rank) for axis in axes]
    need(len(set(found)) == len(found), node, f"axes {list(axes)} name a dimension twice")
    return found


def with_dim(shape: tuple[Dim, ...], axis: int, dim: Dim) -> tuple[Dim, ...]:
    return (*shape[:axis], dim, *shape[axis + 1 :])


def attribute(node: Node, key: str, default: Any) -> Any:
    return node.attributes.get(key, default)


def fresh_shape(node: Node, vector: TensorType) -> tuple[Dim, ...]:
    """Symbols for a shape that is a value of the graph, as many as that has elements."""
    if len(vector.shape) != 1 or isinstance(vector.shape[0], str):
        raise Undetermined
    return tuple(fresh_dim(node, axis) for axis in range(vector.shape[0]))
