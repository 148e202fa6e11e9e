"""What is known of a graph once its inputs have shapes: the type of every value, and the values that follow from shapes alone.

Shape arithmetic (Shape, Gather, Concat ... Reshape) is evaluated here, when a run is planned, and costs nothing when it runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from gristmill.errors import BudgetError
from gristmill.model import Model
from gristmill.ops import Node, TensorType, find, types_made
from gristmill.ops.op import UNKNOWN, Undetermined, need, refusal
from gristmill.runtime.arena import machine_memory
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array

FOLDED = 1 << 16  # elements: larger values are computed by the plan rather than kept with it


@dataclass(frozen=True)
class Shapes:
    """The types of all values, the values that are known, and the nodes whose types depend on unknown values."""

    types: dict[str, TensorType]
    values: dict[str, Array]
    pending: list[Node]


def determine(model: Model, given: Mapping[str, TensorType], trainable: Mapping[str, Array]) -> Shapes:
    """Infer all that inputs of these concrete types determine.

    Raises:
        ModelError: an operator's inputs do not fit.
    """
    types = {name: TensorType(tensor.dtype, tensor.shape) for name, tensor in model.tensors.items()} | dict(given)
    shapes = Shapes(types, {}, [])
    for node in model.nodes:
        kinds = [types[name] if name else None for name in node.inputs]
        if any(kind is not None and not kind.known for kind in kinds):
            made = None
        else:
            made = _infer(node, model, kinds, shapes)
            check_size(node, made or ())
            # Nothing is computed before its size is known. Where that depends on values (NonZero), small inputs bound it.
            if made is None or all(prod(kind.extents) <= FOLDED for kind in made):
                made = _fold(node, model, kinds, shapes, trainable) or made
        if made is None:
            made = [UNKNOWN] * len(node.outputs)
            shapes.pending.append(node)
        types.update(zip(node.outputs, made, strict=True))
    return shapes


def check_size(node: Node, made: Iterable[TensorType]) -> None:
    """Refuse outputs of more than half of the machine's memory before anything is allocated for them: their operator needs room.

    Raises:
        BudgetError: they are larger; the message names the node and its outputs.
    """
    needed = sum(kind.nbytes for kind in made if all(isinstance(dim, int) for dim in kind.shape))
    if needed > machine_memory() // 2:
        kinds = ", ".join(map(str, made))
        raise BudgetError(
            f"{node.op} '{node.name}' would make {kinds}: {needed:,} bytes, this machine has {machine_memory():,}", needed
        )


def _fold(
    node: Node, model: Model, kinds: list[TensorType | None], shapes: Shapes, trainable: Mapping[str, Array]
) -> list[TensorType] | None:
    """Keep the outputs of a node that are known already, and return their types."""
    values = [None if name in trainable else _small(name, model, shapes) for name in node.inputs]
    try:
        made = find(node).known(node, kinds, values)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise refusal(node, error) from error
    if made is None or any(value.size > FOLDED for value in made):
        return None
    need(len(made) == len(node.outputs), node, f"makes {len(made)} outputs, {len(node.outputs)} are named")
    shapes.values.update(zip(node.outputs, made, strict=True))
    return [TensorType(value.dtype, value.shape) for value in made]


def _small(name: str, model: Model, shapes: Shapes) -> Array | None:
    """A value that is known and small enough to compute with while planning."""
    tensor = model.tensors.get(name)
    if tensor is None:
        return shapes.values.get(name)
    return tensor.array if isinstance(tensor, Dense) and tensor.array.size <= FOLDED else None


def _infer(node: Node, model: Model, kinds: list[TensorType | None], shapes: Shapes) -> list[TensorType] | None:
    known = {name: Dense(shapes.values[name]) for name in node.inputs if name in shapes.values}
    constants = [model.tensors.get(name) or known.get(name) for name in node.inputs]
    try:
        made = types_made(node, kinds, constants)
    except Undetermined:
        return None
    concrete = all(isinstance(dim, int) for kind in made for dim in kind.shape)
    return made if concrete else None
