"""Fold what follows a Linear into its epilogue: the activation, then the residual."""

from collections import Counter
from dataclasses import replace

import numpy as np

from gristmill.model import Model
from gristmill.ops import OPS, OWN, Node
from gristmill.ops.activation import Activation


def fuse(model: Model) -> Model:
    """Return an equivalent model with fewer nodes.

    A node is folded only where nothing else reads the value in between.
    """
    uses = Counter(name for node in model.nodes for name in node.inputs) + Counter(model.outputs)
    nodes = {node.name: node for node in model.nodes}
    for node in model.nodes:
        linear = nodes.get(node.inputs[0]) if node.inputs else None
        if linear is None or linear.op != "Linear" or uses[linear.name] != 1:
            linear = None
        folded = None
        if linear is not None and isinstance(OPS[node.domain, node.op], Activation):
            folded = _with_activation(linear, node)
        elif node.op == "Add":
            folded = _with_residual(model, nodes, uses, node)
        if folded is not None:
            made_from, merged = folded
            del nodes[made_from], nodes[node.name]
            nodes[merged.name] = merged
        elif node.op == "Add":
            _with_lookups(model, nodes, uses, node)
    return model.replace(nodes=tuple(nodes.values()))


def _with_activation(linear: Node, node: Node) -> tuple[str, Node] | None:
    if "activation" in linear.attributes or linear.input(3):
        return None
    op = OPS[node.domain, node.op]
    assert isinstance(op, Activation)
    return linear.name, replace(linear, outputs=node.outputs, attributes={**linear.attributes, "activation": op.kind(node)})


def _with_residual(model: Model, nodes: dict[str, Node], uses: Counter[str], add: Node) -> tuple[str, Node] | None:
    for own, other in (add.inputs, add.inputs[::-1]):
        linear = nodes.get(own)
        fits = linear is not None and linear.op == "Linear" and not linear.input(3) and uses[own] == 1 and own != other
        if fits and linear is not None and model.types[own] == model.types[other]:
            return own, replace(linear, outputs=add.outputs, inputs=(*linear.inputs[:2], linear.input(2), other))
    return None


def _with_lookups(model: Model, nodes: dict[str, Node], uses: Counter[str], add: Node) -> None:
    """Add rows of several tables in one pass: what an encoder's embeddings are."""
    parts = [nodes.get(name) for name in add.inputs]
    if any(part is None or uses[part.name] != 1 or not _looks_up(model, part) for part in parts):
        return
    pairs = tuple(name for part in parts if part is not None for name in part.inputs)
    if len(pairs) <= OPS[OWN, "Lookups"].arity[1] and model.types[add.inputs[0]] == model.types[add.inputs[1]]:
        for part in parts:
            assert part is not None
            del nodes[part.name]
        nodes[add.name] = Node("Lookups", pairs, add.outputs, domain=OWN)


def _looks_up(model: Model, node: Node) -> bool:
    if node.op == "Lookups":
        return True
    table = model.tensors.get(node.inputs[0])
    rows = node.op == "Gather" and node.attributes.get("axis", 0) == 0
    return rows and table is not None and len(table.shape) == 2 and table.dtype == np.float32
