"""The mean of the vectors of attended tokens, as sentence encoders take it: MaskedPool."""

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import whole
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.masks import CONSTANT, Masks, Table
from gristmill.model import Model
from gristmill.ops import OWN, Node


def means(model: Model) -> Model:
    """Find sum(x * mask) / max(sum(mask), small) over the axis of tokens."""
    graph = Graph(model)
    masks = Masks(graph)
    for node in graph.walk("Div"):
        made = _mean(graph, masks, node)
        if made is not None:
            graph.put(made)
    return graph.done()


def _mean(graph: Graph, masks: Masks, node: Node) -> Node | None:
    total, count = graph.maker(node.inputs[0], "ReduceSum"), _counted(graph, node.inputs[1])
    weighted = graph.maker(total.inputs[0], "Mul") if total is not None and _over_tokens(graph, total) else None
    if total is None or weighted is None or count is None or not _over_tokens(graph, count):
        return None
    if total.attributes.get("keepdims", 1) or not _drops_tokens(graph, node):
        return None
    counted = masks.table(count.inputs[0])
    for x, other in (weighted.inputs, weighted.inputs[::-1]):
        shape, dtype = graph.shape(x), graph.dtype(x)
        if shape is None or len(shape) != 3 or dtype != np.float32:
            continue
        table = masks.table(other)
        source = _source(graph, table, shape)
        if table is not None and source is not None and counted is not None and _same_mask(table, counted):
            return Node("MaskedPool", (x, source), node.outputs, {"mode": "mean"}, OWN)
    return None


def _counted(graph: Graph, name: str) -> Node | None:
    """The sum of a mask that a small bound keeps from 0."""
    node = graph.maker(name, "Clip", "Max", "Expand")
    if node is not None and node.op == "Expand":
        node = graph.maker(node.inputs[0], "Clip", "Max")
    if node is None or len(node.inputs) < 2 or (node.op == "Clip" and node.input(2)):
        return None
    low = graph.scalar(node.inputs[1])
    return graph.maker(node.inputs[0], "ReduceSum") if low is not None and 0 < low <= 1 else None


def _over_tokens(graph: Graph, node: Node) -> bool:
    return bool(node.input(1)) and graph.ints(node.inputs[1]) in ((1,), (-2,)) and len(graph.shape(node.inputs[0]) or ()) == 3


def _drops_tokens(graph: Graph, node: Node) -> bool:
    return len(graph.shape(node.name) or ()) == 2


def _source(graph: Graph, table: Table | None, shape: tuple[object, ...]) -> str | None:
    """The mask of a table that is 1 for attended tokens and 0 for others, [batch, length, any]."""
    if table is None or table.source is None or (table.zero, table.one) != (0, 1):
        return None
    own = graph.shape(table.source)
    dtype = graph.dtype(table.source)
    if own != shape[:2] or dtype not in (np.int64, np.bool_) or len(table.axes) != 3:
        return None
    constant = all(atom.axis == CONSTANT for atom in table.axes[2])
    return table.source if constant and table.axes[:2] == whole(own) else None


def _same_mask(a: Table, b: Table) -> bool:
    return (a.source, a.zero, a.one, a.axes[:2]) == (b.source, b.zero, b.one, b.axes[:2]) and len(b.axes) == 3
