"""The layers of an encoder, found in its graph: what repeats around each attention, whatever its nodes are called.

A value that every path from the embeddings to the outputs passes is a cut. A layer lies between two cuts: the last one before its
attention and the same one of the next layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import Node, TensorType
from gristmill.ops.op import same_dim

ATTENTION = "MaskedAttention"


@dataclass(frozen=True)
class EncoderLayer:
    """One layer: the nodes from its input value to its output value, and its attention."""

    input: str
    output: str
    nodes: tuple[Node, ...]
    attention: Node


def encoder_layers(model: Model) -> list[EncoderLayer]:
    """Return the layers of an encoder, first to last.

    Raises:
        ModelError: the graph is no stack of layers with one attention each.
    """
    attentions = [node for node in model.nodes if node.op == ATTENTION]
    if not attentions:
        raise ModelError(f"no encoder layers are found: the model has no {ATTENTION} node")
    flow = Flow(model, attentions[0])
    starts = [flow.last_cut_before(node) for node in attentions]
    if None in starts or len(set(starts)) < len(starts):
        node = next(node for node, start in zip(attentions, starts, strict=True) if start is None or starts.count(start) > 1)
        raise ModelError(f"attention '{node.name}' is no layer of a stack: no single value leads from the layer before to it")
    first: list[str] = [start for start in starts if start is not None]
    ends = [*first[1:], flow.end_like(first, attentions)]
    layers = []
    for start, end, node in zip(first, ends, attentions, strict=True):
        within = flow.between(start, end)
        if node not in within or not alike(model.types[start], model.types[end]):
            raise ModelError(
                f"the layer of attention '{node.name}' is not recognised: it leads from '{start}', {model.types[start]}, "
                f"to '{end}', {model.types[end]}"
            )
        layers.append(EncoderLayer(start, end, within, node))
    return layers


def alike(one: TensorType, other: TensorType) -> bool:
    """Whether a value of one type can take the place of one of the other."""
    return one.dtype == other.dtype and len(one.shape) == len(other.shape) and all(map(same_dim, one.shape, other.shape))


class Flow:
    """The float values of a graph that follow from what the first attention follows from. Masks and ids are beside it."""

    def __init__(self, model: Model, attention: Node) -> None:
        self.model = model
        self.sources = {node.name: self._sources(node) for node in model.nodes}
        self.made = {output: node for node in model.nodes for output in node.outputs}
        leading = self._leading_to_node(attention)
        roots = {name for name in self._values() if name in leading and not self._parents(name)}
        into = self._paths_from(roots)
        onward = self._paths_to_end()
        total = sum(onward[name] for name in roots)
        self.cuts = [name for name in into if into[name] * onward[name] == total and total]

    def _is_float(self, name: str) -> bool:
        return bool(name) and name not in self.model.tensors and self.model.types[name].dtype == np.float32

    def _sources(self, node: Node) -> list[str]:
        return [name for name in node.inputs if self._is_float(name)]

    def _parents(self, name: str) -> list[str]:
        return self.sources[self.made[name].name] if name in self.made else []

    def _values(self) -> Iterable[str]:
        yield from (name for name in self.model.inputs if self._is_float(name))
        yield from (name for node in self.model.nodes for name in node.outputs if self._is_float(name))

    def _paths_from(self, roots: set[str]) -> dict[str, int]:
        paths: dict[str, int] = {}
        for name in self._values():
            paths[name] = 1 if name in roots else sum(paths[parent] for parent in self._parents(name))
        return paths

    def _paths_to_end(self) -> dict[str, int]:
        """How many paths lead from each value to an output that nothing float is made of."""
        paths = dict.fromkeys(self._values(), 0)
        for node in reversed(self.model.nodes):
            for name in node.outputs:
                if self._is_float(name) and paths[name] == 0 and name in self.model.outputs:
                    paths[name] = 1
            onward = sum(paths[name] for name in node.outputs if self._is_float(name))
            for name in self.sources[node.name]:
                paths[name] += onward
        return paths

    def _reached(self, start: str) -> set[str]:
        """All float values that a value leads to, itself among them."""
        reached = {start}
        for node in self.model.nodes:
            if any(name in reached for name in self.sources[node.name]):
                reached.update(name for name in node.outputs if self._is_float(name))
        return reached

    def _leading_to(self, end: str) -> set[str]:
        leading = {end}
        for node in reversed(self.model.nodes):
            if any(name in leading for name in node.outputs):
                leading.update(self.sources[node.name])
        return leading

    def _leading_to_node(self, node: Node) -> set[str]:
        return {each for name in self.sources[node.name] for each in self._leading_to(name)}

    def last_cut_before(self, node: Node) -> str | None:
        """The last cut that leads to a node."""
        leading = self._leading_to_node(node)
        before = [name for name in self.cuts if name in leading]
        return before[-1] if before else None

    def between(self, start: str, end: str) -> tuple[Node, ...]:
        """The nodes on paths from one value to another."""
        inside = (self._reached(start) & self._leading_to(end)) - {start}
        return tuple(node for node in self.model.nodes if any(name in inside for name in node.outputs))

    def end_like(self, starts: list[str], attentions: list[Node]) -> str:
        """The cut that ends the last layer: the one up to which it has the operators of the layer before it.

        A single layer ends at the last cut of its input's type that the same operator makes.
        """
        after = self.cuts[self.cuts.index(starts[-1]) + 1 :]
        if len(starts) > 1:
            pattern = sorted(node.op for node in self.between(*starts[-2:]))
            ends = [name for name in after if sorted(node.op for node in self.between(starts[-1], name)) == pattern]
        else:
            kind, maker = self.model.types[starts[0]], self.made.get(starts[0])
            makers = {"Add", "LayerNormalization"} if maker is None else {maker.op}
            ends = [name for name in after if alike(self.model.types[name], kind) and self.made[name].op in makers][-1:]
        if not ends:
            raise ModelError(
                f"the layer of attention '{attentions[-1].name}' is not recognised: it does not end as the others do"
            )
        return ends[0]


def projections(model: Model, layer: EncoderLayer) -> tuple[Node, Node, Node, Node]:
    """Return the Linear nodes that make queries, keys and values of a layer's attention, and the one that reads it.

    Raises:
        ModelError: there are none, or something else reads what they make.
    """
    made = {output: node for node in model.nodes for output in node.outputs}
    readers = readers_of(model)
    node = layer.attention
    found = [made.get(name) for name in node.inputs[:3]]
    found += readers.get(node.outputs[0], [None])[:1]
    for role, each in zip(("queries", "keys", "values", "the output"), found, strict=True):
        if each is None or each.op != "Linear":
            raise ModelError(f"heads of attention '{node.name}' cannot be told apart: no Linear makes {role}")
    values = (*node.inputs[:3], node.outputs[0])
    shared = [name for name in values if len(readers[name]) > 1 or name in model.outputs]
    if shared or len(set(values)) < 4:
        raise ModelError(
            f"heads of attention '{node.name}' cannot be removed: '{(shared or values)[0]}' is read elsewhere as well"
        )
    query, key, value, output = found
    assert query is not None
    assert key is not None
    assert value is not None
    assert output is not None
    return query, key, value, output


def readers_of(model: Model) -> Mapping[str, list[Node]]:
    """Return the nodes that read each value or tensor."""
    readers: dict[str, list[Node]] = {}
    for node in model.nodes:
        for name in dict.fromkeys(node.inputs):
            if name:
                readers.setdefault(name, []).append(node)
    return readers
