"""Normalisations from what exporters spell out: LayerNormalization and RMSNormalization over the last axis."""

from dataclasses import replace

import numpy as np

from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.model import Model
from gristmill.ops import OPS, Node


def normalizations(model: Model) -> Model:
    """Put LayerNormalization and RMSNormalization in the place of means, squares and roots."""
    graph = Graph(model)
    bare: set[str] = set()  # normalised values whose scale is all ones
    for node in graph.walk("Div", "Mul"):
        made = _normalized(graph, node)
        if made is not None:
            bare.add(made.name)
        elif node.op == "Mul":
            made = _scaled(graph, node, bare)
        if made is not None:
            graph.put(made)
    return graph.done()


def shifts(model: Model) -> Model:
    """Take constant vectors added to a LayerNormalization without bias as its bias."""
    graph = Graph(model)
    for node in graph.walk("Add"):
        for made, other in (node.inputs, node.inputs[::-1]):
            norm, array = graph.maker(made, "LayerNormalization"), graph.constant(other)
            if norm is None or array is None or not graph.once(made) or norm.input(2):
                continue
            scale = graph.constant(norm.inputs[1])
            if scale is not None and array.shape == scale.shape and array.dtype == scale.dtype:
                graph.put(replace(norm, inputs=(*norm.inputs[:2], other), outputs=node.outputs))
                break
    return graph.done()


def _scaled(graph: Graph, node: Node, bare: set[str]) -> Node | None:
    for made, other in (node.inputs, node.inputs[::-1]):
        norm, array = graph.maker(made), graph.constant(other)
        if norm is None or norm.name not in bare or array is None:
            continue
        scale = graph.constant(norm.inputs[1])
        if scale is not None and array.shape == scale.shape and array.dtype == scale.dtype:
            return replace(norm, inputs=(norm.inputs[0], other), outputs=node.outputs)
    return None


def _normal_of(graph: Graph, node: Node) -> tuple[str, str] | None:
    """The numerator and the value under the root, where a node divides by a root."""
    if node.op == "Div":
        root = graph.maker(node.inputs[1], "Sqrt")
        return (node.inputs[0], root.inputs[0]) if root is not None else None
    for top, other in (node.inputs, node.inputs[::-1]):
        inverse = graph.maker(other, "Reciprocal", "Pow", "Div")
        if inverse is None:
            continue
        if inverse.op == "Pow":
            if graph.scalar(inverse.inputs[1]) == -0.5:
                return top, inverse.inputs[0]
            continue
        root = graph.maker(inverse.inputs[-1], "Sqrt")
        if root is not None and (inverse.op == "Reciprocal" or graph.scalar(inverse.inputs[0]) == 1):
            return top, root.inputs[0]
    return None


def _normalized(graph: Graph, node: Node) -> Node | None:
    parts = _normal_of(graph, node)
    under = graph.split_scalar(graph.maker(parts[1], "Add")) if parts is not None else None
    if parts is None or under is None:
        return None
    mean = graph.maker(under[0], "ReduceMean")
    squared = _square(graph, mean.inputs[0]) if mean is not None and _last_axis(graph, mean) else None
    shape, dtype = graph.shape(parts[0]), graph.dtype(parts[0])
    if squared is None or not shape or not shape[-1].known or dtype != np.float32 or squared != parts[0]:
        return None
    x = _centred(graph, squared)
    op = "RMSNormalization" if x is None else "LayerNormalization"
    if ("", op) not in OPS:
        return None
    ones = graph.tensor(np.ones(shape[-1].number, np.float32), f"{node.name}.scale")
    return Node(op, (x or squared, ones), node.outputs, {"axis": -1, "epsilon": float(under[1])})


def _square(graph: Graph, name: str) -> str | None:
    """The value whose square a value is."""
    node = graph.maker(name, "Pow", "Mul")
    if node is None:
        return None
    squares = graph.scalar(node.inputs[1]) == 2 if node.op == "Pow" else node.inputs[0] == node.inputs[1]
    return node.inputs[0] if squares else None


def _centred(graph: Graph, name: str) -> str | None:
    """The value from which a value is made by subtracting its own mean."""
    node = graph.maker(name, "Sub")
    mean = graph.maker(node.inputs[1], "ReduceMean") if node is not None else None
    if node is None or mean is None or mean.inputs[0] != node.inputs[0] or not _last_axis(graph, mean):
        return None
    return node.inputs[0]


def _last_axis(graph: Graph, node: Node) -> bool:
    shape = graph.shape(node.inputs[0])
    axes = graph.ints(node.input(1)) if node.input(1) else None
    return shape is not None and axes in ((-1,), (len(shape) - 1,)) and node.attributes.get("keepdims", 1) == 1
