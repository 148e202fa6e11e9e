"""Fold what follows a Linear or a Conv into its epilogue: bias, activation, residual.

A Linear is activation(x W^T + bias) + residual, a Convolution activation(clip(conv + bias + addend)).
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from gristmill.model import Model
from gristmill.ops import OWN, Node, find
from gristmill.ops.activation import Activation
from gristmill.ops.gather import Lookups
from gristmill.tensor import Dense
from gristmill.tensor.parts import Array


def fuse(model: Model) -> Model:
    """Return an equivalent model with fewer nodes.

    A node is folded only where nothing else reads the value in between.
    """
    graph = _Graph(model)
    for node in model.nodes:
        if isinstance(find(node), Activation):
            graph.fold(node, _with_activation(graph, node))
        elif node.op == "Clip" and not node.domain:
            graph.fold(node, _with_bounds(graph, node))
        elif node.op == "Add" and not node.domain:
            folded = _with_bias(graph, node) or _with_residual(graph, node) or _with_addend(graph, node)
            graph.fold(node, folded)
            if folded is None:
                _with_lookups(graph, node)
    return model.replace(nodes=tuple(graph.nodes.values()))


class _Graph:
    """The nodes so far, by name, and how often each value of the model is read."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.nodes}
        self.uses = Counter(name for node in model.nodes for name in node.inputs) + Counter(model.outputs)

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of these operators and nothing but one input reads the value."""
        node = self.nodes.get(name)
        return node if node is not None and node.op in ops and self.uses[name] == 1 else None

    def fold(self, node: Node, folded: tuple[str, Node] | None) -> None:
        """Let one node stand for two."""
        if folded is not None:
            made_from, merged = folded
            del self.nodes[made_from], self.nodes[node.name]
            self.nodes[merged.name] = merged

    def constant(self, name: str) -> Array | None:
        tensor = self.model.tensors.get(name)
        return tensor.array if isinstance(tensor, Dense) else None


def _with_activation(graph: _Graph, node: Node) -> tuple[str, Node] | None:
    op = find(node)
    assert isinstance(op, Activation)
    before = graph.maker(node.inputs[0], "Linear", "Conv", "Convolution")
    if before is None or "activation" in before.attributes or not op.kind(node):
        return None
    if before.op == "Linear":
        if before.input(3):
            return None
        return before.name, replace(before, outputs=node.outputs, attributes={**before.attributes, "activation": op.kind(node)})
    if node.op == "Relu":
        return _bounded(before, node, 0.0, np.inf)
    return _convolution(before, node, before.inputs, activation=op.kind(node))


def _with_bounds(graph: _Graph, node: Node) -> tuple[str, Node] | None:
    before = graph.maker(node.inputs[0], "Conv", "Convolution")
    bounds = [graph.constant(node.input(at)) if node.input(at) else None for at in (1, 2)]
    constant = all(bound is not None or not node.input(at) for at, bound in zip((1, 2), bounds, strict=True))
    if before is None or "activation" in before.attributes or not constant:
        return None
    low, high = (default if bound is None else float(bound) for default, bound in zip((-np.inf, np.inf), bounds, strict=True))
    return _bounded(before, node, low, high)


def _bounded(before: Node, node: Node, low: float, high: float) -> tuple[str, Node] | None:
    """Clip once more what may be clipped already; bounds that are infinite are left out."""
    old_low, old_high = before.attributes.get("low", -np.inf), before.attributes.get("high", np.inf)
    low, high = min(max(old_low, low), high), min(max(old_high, low), high)
    bounds = {key: value for key, value in (("low", low), ("high", high)) if np.isfinite(value)}
    return _convolution(before, node, before.inputs, **bounds)


def _convolution(before: Node, node: Node, inputs: tuple[str, ...], **attributes: Any) -> tuple[str, Node]:
    merged = {**before.attributes, **attributes}
    return before.name, Node("Convolution", inputs, node.outputs, merged, OWN)


def _with_bias(graph: _Graph, add: Node) -> tuple[str, Node] | None:
    for own, other in (add.inputs, add.inputs[::-1]):
        linear, tensor = graph.maker(own, "Linear"), graph.model.tensors.get(other)
        plain = linear is not None and len(linear.inputs) == 2 and "activation" not in linear.attributes
        if plain and linear is not None and tensor is not None and tensor.kind == "dense":
            n, known = graph.model.types[linear.inputs[1]].shape[0], graph.model.types[own].known
            if tensor.shape == (n,) and known and tensor.dtype == graph.model.types[own].dtype:
                return own, replace(linear, outputs=add.outputs, inputs=(*linear.inputs, other))
    return None


def _with_residual(graph: _Graph, add: Node) -> tuple[str, Node] | None:
    for own, other in (add.inputs, add.inputs[::-1]):
        linear = graph.maker(own, "Linear")
        if linear is not None and not linear.input(3) and _same(graph, own, other):
            return own, replace(linear, outputs=add.outputs, inputs=(*linear.inputs[:2], linear.input(2), other))
    return None


def _with_addend(graph: _Graph, add: Node) -> tuple[str, Node] | None:
    for own, other in (add.inputs, add.inputs[::-1]):
        conv = graph.maker(own, "Conv")
        if conv is not None and _same(graph, own, other):
            return _convolution(conv, add, (*conv.inputs[:2], conv.input(2), other))
    return None


def _with_lookups(graph: _Graph, add: Node) -> None:
    """Add rows of several tables in one pass: what an encoder's embeddings are."""
    parts = [graph.nodes.get(name) for name in add.inputs]
    if any(part is None or graph.uses[part.name] != 1 or not _looks_up(graph, part) for part in parts):
        return
    pairs = tuple(name for part in parts if part is not None for name in part.inputs)
    if len(pairs) <= Lookups.arity[1] and _same(graph, *add.inputs):
        for part in parts:
            assert part is not None
            del graph.nodes[part.name]
        graph.nodes[add.name] = Node("Lookups", pairs, add.outputs, domain=OWN)


def _looks_up(graph: _Graph, node: Node) -> bool:
    if node.op == "Lookups":
        return True
    table = graph.model.tensors.get(node.inputs[0])
    rows = node.op == "Gather" and node.attributes.get("axis", 0) == 0
    return rows and table is not None and len(table.shape) == 2 and table.dtype == np.float32


def _same(graph: _Graph, own: str, other: str) -> bool:
    """Whether two values are of one known type."""
    types = graph.model.types
    return own != other and types[own].known and types[own] == types[other]
