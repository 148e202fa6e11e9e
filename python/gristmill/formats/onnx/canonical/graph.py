"""A model under rewriting: who makes a value, who reads it, what is constant. The vocabulary that all passes share.

A pass walks the nodes in order, looks backwards from each, and puts another node in its place under the same output names. What
nothing reads any more is left out when the graph becomes a model again, so that no pass removes anything itself.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from gristmill.formats.onnx.canonical.dims import size
from gristmill.formats.onnx.canonical.facts import Facts
from gristmill.formats.onnx.canonical.shapes import Shape
from gristmill.model import Model
from gristmill.ops import OWN, Node
from gristmill.tensor import Dense, Tensor
from gristmill.tensor.parts import Array


class Graph:
    """The nodes and tensors of a model, to be changed by one pass.

    Values keep their names. `alias` makes the readers of one value read another.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = dict(model.tensors)
        self._nodes = list(model.nodes)
        self._makers = {name: node for node in model.nodes for name in node.outputs}
        self._added: list[Node] = []
        self._aliases: dict[str, str] = {}
        self._uses = Counter(name for node in model.nodes for name in node.inputs) + Counter(model.outputs)

    @cached_property
    def facts(self) -> Facts:
        """Shapes and shape arithmetic, those of added nodes included."""
        return Facts(self.model)

    def walk(self, *ops: str) -> Iterator[Node]:
        """Yield the nodes of some operators (or all) in order, their inputs as they are after the changes so far."""
        for node in self._nodes:
            wanted = not ops or (node.op in ops and node.domain in ("", OWN))
            if wanted and self._makers.get(node.name) is node:
                yield self._current(node)

    def _current(self, node: Node) -> Node:
        if self._aliases and any(name in self._aliases for name in node.inputs):
            return replace(node, inputs=tuple(map(self.resolve, node.inputs)))
        return node

    def resolve(self, name: str) -> str:
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of these operators (or any)."""
        node = self._makers.get(self.resolve(name))
        if node is None or (ops and node.op not in ops):
            return None
        return self._current(node)

    def once(self, name: str) -> bool:
        """Whether a value is read once, model outputs counted."""
        return self._uses[name] == 1

    def constant(self, name: str) -> Array | None:
        """The array of a value that is a plain tensor of the model."""
        tensor = self.tensors.get(self.resolve(name))
        return tensor.array if isinstance(tensor, Dense) else None

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element."""
        array = self.constant(name)
        return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None

    def split_scalar(self, node: Node | None) -> tuple[str, float] | None:
        """The other input and the constant of a node of two inputs one of which is a constant of one element.

        Only where that constant does not raise the rank of the result.
        """
        if node is None or len(node.inputs) != 2:
            return None
        for at in (1, 0):
            value, other = self.scalar(node.inputs[at]), node.inputs[1 - at]
            if value is not None and self.lower_rank(node.inputs[at], other):
                return other, value
        return None

    def lower_rank(self, name: str, other: str) -> bool:
        """Whether a constant has no more dimensions than another value is known to have."""
        array, shape = self.constant(name), self.shape(other)
        return array is not None and (array.ndim == 0 or (shape is not None and array.ndim <= len(shape)))

    def put(self, *nodes: Node) -> None:
        """Add nodes, in place of those that made their outputs before."""
        for node in nodes:
            old = self._makers.get(node.name)
            if old is not None:
                self._uses.subtract(old.inputs)
            self._uses.update(node.inputs)
            self._added.append(node)
            self._makers |= dict.fromkeys(node.outputs, node)
            if "facts" in self.__dict__:
                self.facts.learn(node)

    def alias(self, name: str, other: str) -> None:
        """Let readers of a value read another, which is equal."""
        other = self.resolve(other)
        if name != other:
            self._uses[other] += self._uses.pop(name, 0)
            self._aliases[name] = other

    def tensor(self, tensor: Tensor | Array, hint: str) -> str:
        """Add a constant and return its name."""
        name = self.fresh(hint)
        self.tensors[name] = tensor if not isinstance(tensor, np.ndarray) else Dense(tensor)
        if "facts" in self.__dict__:
            self.facts.hold(name, self.tensors[name])
        return name

    def fresh(self, hint: str) -> str:
        """Return a name that no value has."""
        name, number = hint, 1
        while name in self._makers or name in self.tensors or name in self.model.inputs:
            name, number = f"{hint}.{number}", number + 1
        return name

    def is_read(self, name: str) -> bool:
        return self._uses[name] > 0

    def shape(self, name: str) -> Shape | None:
        """The shape of a value, in symbols."""
        name = self.resolve(name)
        if name in self.tensors:
            return tuple(map(size, self.tensors[name].shape))
        return self.facts.shapes.get(name)

    def dtype(self, name: str) -> np.dtype[Any] | None:
        name = self.resolve(name)
        return self.tensors[name].dtype if name in self.tensors else self.facts.dtypes.get(name)

    def ints(self, name: str) -> tuple[int, ...] | None:
        """The value of a constant of integers."""
        array = self.constant(name)
        return tuple(int(v) for v in array.reshape(-1)) if array is not None and array.dtype.kind in "iu" else None

    def done(self) -> Model:
        """Return the model, without what its outputs do not need."""
        if not self._added and not self._aliases:
            return self.model
        renamed = self._keep_output_names()
        live: dict[str, Node] = {}
        used: set[str] = set()
        stack = [self.resolve(name) for name in self.model.outputs]
        while stack:
            name = stack.pop()
            node = self._makers.get(name)
            if node is None:
                used.add(name)
            elif node.name not in live:
                live[node.name] = node = self._current(node)
                stack += [value for value in node.inputs if value]
        place = {node.name: number for number, node in enumerate(self._nodes)}
        nodes = sorted(live.values(), key=lambda node: place.get(node.name, -1))
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}
        model = self.model
        return Model(tuple(_rename(node, renamed) for node in nodes), tensors, model.inputs, model.outputs, model.meta)

    def _keep_output_names(self) -> dict[str, str]:
        """Return new names for values that stand in for outputs of the model; an Identity where there can be no such name."""
        renamed: dict[str, str] = {}
        for name in self.model.outputs:
            other = self.resolve(name)
            if other == name:
                continue
            if other in self._makers and other not in renamed and other not in self.model.outputs:
                renamed[other] = name
            else:
                del self._aliases[name]
                self.put(Node("Identity", (other,), (name,)))
        return renamed


def _rename(node: Node, renamed: dict[str, str]) -> Node:
    if not any(name in renamed for name in (*node.inputs, *node.outputs)):
        return node
    inputs, outputs = (tuple(renamed.get(name, name) for name in names) for names in (node.inputs, node.outputs))
    return replace(node, inputs=inputs, outputs=outputs)
