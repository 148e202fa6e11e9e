"""Graphs in which the type of some values depends on what is computed: planned in stages.

What can be planned runs as a plan; the nodes whose outputs have no type yet run their NumPy reference; what follows is a graph of
its own, planned for the shapes that came out. Each stage keeps its plans, so that shapes met before cost no planning.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gristmill.model import Model
from gristmill.ops import Node, TensorType, find, types_made
from gristmill.ops.op import Undetermined, need, refusal
from gristmill.runtime.shapes import Shapes, check_size
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
STAGES = 16  # graphs kept for what follows; the oldest goes first


class Stage:
    """One run of a graph up to the nodes whose types are not determined, these nodes, and what follows."""

    def __init__(self, model: Model, shapes: Shapes, over: Callable[[Model], Run]) -> None:
        pending = {node.name for node in shapes.pending}
        self.model = model
        self._over = over  # a graph of concrete inputs to its run
        self._now = [n for n in shapes.pending if all(not name or shapes.types[name].known for name in n.inputs)]
        self._later = [node for node in shapes.pending if node not in self._now]
        head = [node for node in model.nodes if node.name not in pending]
        wanted = {name for node in shapes.pending for name in node.inputs} | set(model.outputs)
        self._made = [name for node in head for name in node.outputs if name in wanted]
        if self._made:
            part = _cut(model, head, {name: shapes.types[name] for name in model.inputs}, self._made)
            self._head, self._read = over(part), tuple(part.inputs)
        self._wanted = [name for node in self._later for name in node.outputs if name in model.outputs]
        self._rest: dict[tuple[object, ...], Run] = {}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = dict(inputs)
        if self._made:
            values |= self._head({name: inputs[name] for name in self._read})
        for node in self._now:
            values |= zip(node.outputs, self._evaluate(node, values), strict=True)
        if self._wanted:
            values |= self._follow(values)
        return {name: self._value(name, values) for name in self.model.outputs}

    def _value(self, name: str, values: Mapping[str, Array]) -> Array:
        return values[name] if name in values else self.model.tensors[name].dense()

    def _evaluate(self, node: Node, values: Mapping[str, Array]) -> list[Array]:
        op = find(node)
        args = [
            None if not name else self.model.tensors[name] if index in op.tensor_inputs else self._value(name, values)
            for index, name in enumerate(node.inputs)
        ]
        check_size(node, self._foreseen(node, args))
        try:
            made = [np.asarray(value) for value in op.reference(node, *args)]
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise refusal(node, error) from error
        need(len(made) == len(node.outputs), node, f"makes {len(made)} outputs, {len(node.outputs)} are named")
        return made

    def _foreseen(self, node: Node, args: list[Any]) -> list[TensorType]:
        """Return the types of the outputs where they follow from values that are known now, or nothing."""
        tensors = [Dense(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        kinds = [None if tensor is None else TensorType(tensor.dtype, tensor.shape) for tensor in tensors]
        try:
            return types_made(node, kinds, tensors)
        except Undetermined:
            return []

    def _follow(self, values: Mapping[str, Array]) -> dict[str, Array]:
        read = {name for node in self._later for name in node.inputs if name and name not in self.model.tensors}
        live = {name: values[name] for name in sorted(read & values.keys())}
        key = tuple((array.shape, array.dtype) for array in live.values())
        if key not in self._rest:
            kinds = {name: TensorType(array.dtype, array.shape) for name, array in live.items()}
            if len(self._rest) == STAGES:
                del self._rest[next(iter(self._rest))]
            self._rest[key] = self._over(_cut(self.model, self._later, kinds, self._wanted))
        return self._rest[key](live)


def _cut(model: Model, nodes: list[Node], inputs: Mapping[str, TensorType], outputs: list[str]) -> Model:
    """Return a part of a graph as a graph."""
    read = {name for node in nodes for name in node.inputs}
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in read}
    return Model(tuple(nodes), tensors, {name: kind for name, kind in inputs.items() if name in read}, tuple(outputs))
