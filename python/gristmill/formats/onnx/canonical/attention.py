"""Attention: products of queries and keys, softmax, products with values, become MaskedAttention over [batch, length, columns].

What is between the products may come in any order: scaling on either side or of the scores, an additive mask, a Where. The mask
must be proven to come from one [batch, keys] mask (`masks`); a graph whose mask is not proven is left as it is. A row of which
every key is masked has no meaning that exporters agree on: additive masks of -10000 attend as if there were no mask, -inf gives
NaN or 0; MaskedAttention gives what it gives.
"""

from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import Arrangement, Atom, Axis, arrangement, whole
from gristmill.formats.onnx.canonical.dims import ONE, Size
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.masks import CONSTANT, Masks, Table
from gristmill.formats.onnx.canonical.views import reshape
from gristmill.model import Model
from gristmill.ops import OWN, Node

MASKED = -1000.0  # what an additive mask must reach: exp of it and any score is 0
STEPS = 12  # nodes between the products
PLAIN = {"q_num_heads", "kv_num_heads", "scale", "softmax_precision"}  # attributes of Attention: all others must be off
OFF = {"is_causal": 0, "left_window_size": -1, "qk_matmul_output_mode": 0, "right_window_size": -1, "softcap": 0.0}


@dataclass
class Scores:
    """What is known of the scores on the way back from the softmax."""

    masks: Masks
    scale: float = 1.0
    mask: Table | None = None  # by truth: `one` where attended

    def add(self, table: Table | None) -> bool:
        """Take an additive mask; False where it is none."""
        if table is None:
            return False
        if table.source is None:
            return bool(np.isfinite(table.zero))
        masked = [bool(value <= MASKED) for value in (table.zero, table.one)]
        if table.zero.dtype.kind != "f" or not any(value == 0 for value in (table.zero, table.one)) or sum(masked) != 1:
            return False
        return self.allow(replace(table, zero=np.bool_(not masked[0]), one=np.bool_(not masked[1])))

    def allow(self, table: Table | None) -> bool:
        """Take a mask of truth values, true where attended; False where it is none."""
        if table is None or table.zero.dtype != bool:
            return False
        if table.source is None:
            return bool(table.zero)
        if self.mask is not None and self.mask != table:
            return False
        self.mask = table
        return True


def attentions(model: Model) -> Model:
    """Find the products with values, and what ONNX itself calls Attention."""
    graph = Graph(model)
    masks = Masks(graph)
    for node in graph.walk("MatMul", "Attention"):
        if node.op == "Attention":
            _from_operator(graph, masks, node)
        elif (weights := _weights(graph, node.inputs[0])) is not None:
            _from_products(graph, masks, node, weights)
    return graph.done()


def _weights(graph: Graph, name: str) -> Node | None:
    """The softmax that makes the weights. Exporters put zeros where a row of scores is masked whole."""
    node = graph.maker(name, "Softmax", "Where")
    if node is not None and node.op == "Where":
        softmax = graph.maker(node.inputs[2], "Softmax")
        node = softmax if softmax is not None and _masked_whole(graph, node.inputs[0], softmax.name) else None
    shape = graph.shape(node.name) if node is not None else None
    return node if node is not None and shape and node.attributes.get("axis", -1) in (-1, len(shape) - 1) else None


def _masked_whole(graph: Graph, name: str, softmax: str) -> bool:
    """Whether a condition holds at most where a row of scores is masked whole: weights are NaN, or no bias is above -inf."""
    test = graph.maker(name, "IsNaN", "Equal")
    if test is None or test.op == "IsNaN":
        return test is not None and graph.resolve(test.inputs[0]) == softmax
    top = graph.maker(test.inputs[0], "ReduceMax")
    return top is not None and graph.scalar(test.inputs[1]) == -inf and graph.ints(top.input(1)) in ((-1,), (3,))


def _from_products(graph: Graph, masks: Masks, node: Node, softmax: Node) -> None:
    scores = Scores(masks)
    product = _scored(graph, softmax.inputs[0], scores)
    if product is None or len(graph.shape(product.name) or ()) != 4:
        return
    _emit(graph, node, (product.inputs[0], product.inputs[1], node.inputs[1]), scores, True)


def _scored(graph: Graph, name: str, scores: Scores) -> Node | None:
    """Walk from the softmax back to the product of queries and keys."""
    for _ in range(STEPS):
        node = graph.maker(name, "MatMul", "Add", "Sub", "Mul", "Div", "Where", "Identity")
        if node is None or node.op == "MatMul":
            return node
        step = _STEP[node.op](graph, node, scores)
        if step is None or (graph.shape(step) or ())[1:] != (graph.shape(node.name) or ())[1:]:
            return None
        name = step
    return None


def _added(graph: Graph, node: Node, scores: Scores) -> str | None:
    for name, other in (node.inputs, node.inputs[::-1]) if node.op == "Add" else (node.inputs,):
        if len(graph.shape(name) or ()) == 4 and graph.maker(name, "MatMul", "Add", "Mul", "Div", "Where") is not None:
            table = scores.masks.table(other)
            if node.op == "Sub" and table is not None:
                table = replace(table, zero=-table.zero, one=-table.one)
            if table is not None and scores.scale == 1.0 and scores.add(table):
                return name
    return None


def _multiplied(graph: Graph, node: Node, scores: Scores) -> str | None:
    found = graph.split_scalar(node)
    if found is None or (node.op == "Div" and found[0] != node.inputs[0]) or found[1] <= 0:
        return None
    scores.scale = scores.scale * found[1] if node.op == "Mul" else scores.scale / found[1]
    return found[0]


def _chosen(graph: Graph, node: Node, scores: Scores) -> str | None:
    condition, yes, no = node.inputs
    table = scores.masks.table(condition)
    if table is None or table.zero.dtype != bool:
        return None
    if _is_masked(graph, scores, no):
        return yes if scores.allow(table) else None
    if _is_masked(graph, scores, yes):
        return no if scores.allow(replace(table, zero=~table.zero, one=~table.one)) else None
    return None


def _is_masked(graph: Graph, scores: Scores, name: str) -> bool:
    table = scores.masks.table(name)
    return table is not None and table.source is None and table.zero.dtype.kind == "f" and bool(table.zero <= MASKED)


_STEP = {
    "Add": _added,
    "Sub": _added,
    "Mul": _multiplied,
    "Div": _multiplied,
    "Where": _chosen,
    "Identity": lambda graph, node, scores: node.inputs[0],
}


def _from_operator(graph: Graph, masks: Masks, node: Node) -> None:
    """ONNX Attention (opset 23) without a cache, a causal mask or shared heads."""
    q, k, v = (graph.shape(name) for name in node.inputs[:3])
    plain = not any(node.inputs[4:]) and len(node.outputs) == 1
    plain = plain and all(key in PLAIN or value == OFF.get(key) for key, value in node.attributes.items())
    if q is None or k is None or v is None or not plain:
        return
    scores = Scores(masks)
    if node.input(3):
        table = masks.table(node.inputs[3])
        if table is None or not (scores.allow(table) if table.zero.dtype == bool else scores.add(table)):
            return
    heads = node.attributes.get("q_num_heads", 0)
    if len(q) == 4:
        width = q[3]
    elif heads and heads == node.attributes.get("kv_num_heads") and q[2].known and q[2].number % heads == 0:
        width = Size(q[2].number // heads)
    else:
        return
    if not width.known:
        return
    scores.scale = float(node.attributes.get("scale", 1.0 / sqrt(width.number))) if width.number else 1.0
    if not 0 < scores.scale < inf:
        return
    if len(q) == 4:
        _emit(graph, node, node.inputs[:3], scores, False)
    elif k != v or q[2] != k[2] or q[0] != k[0] or not _float32(graph, node.inputs[:3]):
        return
    elif (mask := _mask(graph, scores.mask, q[0], k[1])) is not None:
        attributes = {"heads": heads, "scale": scores.scale}
        graph.put(Node("MaskedAttention", (*node.inputs[:3], *mask), node.outputs, attributes, OWN))


def _emit(graph: Graph, node: Node, operands: tuple[str, ...], scores: Scores, turned: bool) -> None:
    """Put MaskedAttention and a view of what it makes in the place of a [batch, heads, length, width] product.

    Args:
        operands: q and v [batch, heads, length, width], and k the same, or with the last two axes exchanged if `turned`.
    """
    shapes = [graph.shape(name) for name in operands]
    if any(shape is None or len(shape) != 4 for shape in shapes) or not _float32(graph, operands):
        return
    (batch, heads, _, width), keys, v = shapes  # type: ignore[misc]
    if turned:
        keys = (keys[0], keys[1], keys[3], keys[2])  # type: ignore[index]
    if not heads.known or not width.known or keys != v or keys[:2] != (batch, heads) or keys[3] != width:  # type: ignore[index]
        return
    mask = _mask(graph, scores.mask, batch, keys[2])  # type: ignore[index]
    if mask is None:
        return
    scale, sources = scores.scale, []
    for at, name in enumerate(operands):
        source, factor = _joined(graph, name, turned and at == 1, heads.number, at < 2)
        sources.append(source)
        scale *= factor
    if not 0 < scale < inf:
        return
    attributes = {"heads": heads.number, "scale": float(scale)}
    made, cut = graph.fresh(f"{node.name}.attention"), graph.fresh(f"{node.name}.heads")
    graph.put(Node("MaskedAttention", (*sources, *mask), (made,), attributes, OWN))
    graph.put(reshape(graph, made, (0, 0, heads.number, width.number), cut))
    graph.put(Node("Transpose", (cut,), node.outputs, {"perm": (0, 2, 1, 3)}))


def _float32(graph: Graph, names: tuple[str, ...]) -> bool:
    """Whether values have the dtype of the kernels."""
    return all(graph.dtype(name) == np.float32 for name in names)


def _joined(graph: Graph, name: str, turned: bool, heads: int, scaled: bool) -> tuple[str, float]:
    """The [batch, length, heads * width] value that a value of heads is a view of, made if there is none; and its scale."""
    found = arrangement(graph, name, scaled)
    if found is not None and len(found.shape) == 3:
        for order in ((0, 1), (1, 0)):
            if found.axes == _heads(found, heads, turned, order):
                if order == (0, 1):
                    return found.root, found.scale
                across = graph.fresh(f"{name}.across")
                graph.put(Node("Transpose", (found.root,), (across,), {"perm": (1, 0, 2)}))
                return across, found.scale
    shape = graph.shape(name)
    assert shape is not None
    across, joined = graph.fresh(f"{name}.across"), graph.fresh(f"{name}.joined")
    graph.put(Node("Transpose", (name,), (across,), {"perm": (0, 3, 1, 2) if turned else (0, 2, 1, 3)}))
    width = shape[2 if turned else 3].number
    graph.put(reshape(graph, across, (0, 0, heads * width), joined))
    return joined, 1.0


def _heads(found: Arrangement, heads: int, turned: bool, order: tuple[int, int]) -> tuple[Axis, ...] | None:
    """How [batch, heads, length, width] lies in a root whose batch and length are the axes `order`."""
    own, total = whole(found.shape), found.shape[2]
    if not total.known or total.number % heads:
        return None
    width = Size(total.number // heads)
    across: Axis = () if heads == 1 else (Atom(2, width, Size(heads)),)
    within: Axis = () if width == ONE else (Atom(2, ONE, width),)
    batch, length = own[order[0]], own[order[1]]
    return (batch, across, within, length) if turned else (batch, across, length, within)


def _mask(graph: Graph, table: Table | None, batch: Size, keys: Size) -> tuple[str, ...] | None:
    """The mask as an input: nothing where there is none; None where it does not fit."""
    if table is None or table.source is None:
        return ()
    axes = ((),) * (4 - len(table.axes)) + table.axes
    shape = graph.shape(table.source)
    rows, columns = whole((batch, keys))
    varies = any(atom.axis != CONSTANT for axis in axes[1:3] for atom in axis)
    if shape != (batch, keys) or len(axes) != 4 or varies or axes[0] != rows or axes[3] != columns:
        return None
    return (_attended(graph, table),)


def _attended(graph: Graph, table: Table) -> str:
    """A mask in int64 or bool whose zeros are not attended."""
    source: Any = table.source
    dtype, negated = graph.dtype(source), bool(table.zero)
    if negated:
        name = f"{source}.attended"
        if graph.maker(name) is None:
            test = source
            if dtype != np.bool_:
                test = graph.fresh(f"{source}.bool")
                graph.put(Node("Cast", (source,), (test,), {"to": "bool"}))
            graph.put(Node("Not", (test,), (name,)))
        return name
    if dtype in (np.int64, np.bool_):
        return str(source)
    name = f"{source}.int64"
    if graph.maker(name) is None:
        graph.put(Node("Cast", (source,), (name,), {"to": "int64"}))
    return name
