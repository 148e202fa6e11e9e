"""Fold what follows a Linear into its epilogue: the activation, then the residual."""

from collections import Counter
from dataclasses import replace

from gristmill.model import Model
from gristmill.ops import OPS, Node
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
    return model.replace(nodes=tuple(nodes.values()))


def _with_activation(linear: Node, node: Node) -> tuple[str, Node] | None:
    if "activation" in linear.attributes or linear.input(3):
        return None
    op = OPS[node.domain, node.op]
    assert isinstance(op, Activation)
    if not op.kind(node):
        return None
    return linear.name, replace(linear, outputs=node.outputs, attributes={**linear.attributes, "activation": op.kind(node)})


def _with_residual(model: Model, nodes: dict[str, Node], uses: Counter[str], add: Node) -> tuple[str, Node] | None:
    for own, other in (add.inputs, add.inputs[::-1]):
        linear = nodes.get(own)
        fits = linear is not None and linear.op == "Linear" and not linear.input(3) and uses[own] == 1 and own != other
        if fits and linear is not None and model.types[own] == model.types[other]:
            return own, replace(linear, outputs=add.outputs, inputs=(*linear.inputs[:2], linear.input(2), other))
    return None
