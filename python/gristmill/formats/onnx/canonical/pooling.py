"""What sentence encoders end with: the mean of the vectors of attended tokens, and division by the L2 norm."""

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import whole
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.masks import CONSTANT, Masks, Table
from gristmill.model import Model
from gristmill.ops import OWN, Node

SHORT = 1e-9  # a bound from below that keeps a norm from 0


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


def unit_vectors(model: Model) -> Model:
    """Find x / max(norm of x over an axis, tiny): LpNormalization, but for vectors shorter than that bound."""
    graph = Graph(model)
    for node in graph.walk("Div"):
        norm, axis = _norm(graph, node.inputs[1])
        if norm is not None and norm == node.inputs[0]:
            graph.put(Node("LpNormalization", (norm,), node.outputs, {"axis": axis, "p": 2}))
    return graph.done()


def _norm(graph: Graph, name: str) -> tuple[str | None, int]:
    """The value whose L2 norm over one axis a value is, and the axis."""
    node = graph.maker(name, "Clip", "Max", "Expand", "ReduceL2", "Sqrt")
    if node is not None and node.op == "Expand":
        node = graph.maker(node.inputs[0], "Clip", "Max", "ReduceL2", "Sqrt")
    if node is not None and node.op in ("Clip", "Max"):
        low = graph.scalar(node.inputs[1]) if len(node.inputs) > 1 and not node.input(2) else None
        node = graph.maker(node.inputs[0], "ReduceL2", "Sqrt") if low is not None and 0 < low <= SHORT else None
    if node is not None and node.op == "Sqrt":
        total = graph.maker(node.inputs[0], "ReduceSum")
        square = graph.maker(total.inputs[0], "Mul", "Pow") if total is not None else None
        squares = square is not None and (
            square.inputs[0] == square.inputs[1] if square.op == "Mul" else graph.scalar(square.inputs[1]) == 2
        )
        return (square.inputs[0], _axis(graph, total)) if squares and square and total and _axis(graph, total) else (None, 0)
    if node is None or not _axis(graph, node):
        return None, 0
    return node.inputs[0], _axis(graph, node)


def _axis(graph: Graph, node: Node) -> int:
    """The one axis, counted from behind, that a reduction keeps with extent 1; 0 where there is no such."""
    axes, shape = graph.ints(node.input(1)) if node.input(1) else None, graph.shape(node.inputs[0])
    if axes is None or len(axes) != 1 or shape is None or not node.attributes.get("keepdims", 1):
        return 0
    return axes[0] % len(shape) - len(shape)
