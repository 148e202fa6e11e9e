"""One product for queries, keys and values, cut up afterwards: becomes a product for each part, with its rows of the weight."""

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import Arrangement, Axis, arrangement, merged, whole
from gristmill.formats.onnx.canonical.dims import Size, over, times
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.linear import rows_of
from gristmill.formats.onnx.canonical.views import views
from gristmill.model import Model
from gristmill.ops import Node


def split_products(model: Model) -> Model:
    """Cut Linear nodes whose outputs are cut by Split, Slice or Gather along the last axis, perhaps in a view."""
    graph = Graph(model)
    for node in graph.walk("Split", "Slice", "Gather"):
        found = arrangement(graph, node.inputs[0])
        linear = graph.maker(found.root, "Linear") if found is not None else None
        if found is None or linear is None or linear.input(3) or (linear.input(2) and graph.constant(linear.inputs[2]) is None):
            continue
        if node.op == "Gather":
            _gather(graph, node, linear, found)
        elif found.is_root:
            _cut(graph, node, linear, len(found.shape))
    return graph.done()


def _cut(graph: Graph, node: Node, linear: Node, rank: int) -> None:
    n = graph.tensors[linear.inputs[1]].shape[0]
    if node.op == "Split":
        shapes = [graph.facts.shapes.get(name) for name in node.outputs]
        sizes = [shape[-1].number for shape in shapes if shape is not None and shape[-1].known]
        if node.attributes.get("axis", 0) % rank != rank - 1 or sum(sizes) != n or len(sizes) != len(node.outputs):
            return
        ends = np.cumsum(sizes)
        for name, end, width in zip(node.outputs, ends, sizes, strict=True):
            graph.put(rows_of(graph, linear, np.arange(end - width, end), name))
        return
    starts, ends_, axes = (graph.ints(node.input(at)) for at in (1, 2, 3))
    steps = graph.ints(node.input(4)) if node.input(4) else (1,)
    if starts is None or ends_ is None or axes is None or steps is None or len(starts) != 1 or axes[0] % rank != rank - 1:
        return
    rows = np.arange(n)[starts[0] : ends_[0] : steps[0]]
    if len(rows):
        graph.put(rows_of(graph, linear, rows, node.name))


def _gather(graph: Graph, node: Node, linear: Node, found: Arrangement) -> None:
    """Cut out one index of an axis that is a part of the last axis of a Linear."""
    last, index = len(found.shape) - 1, graph.scalar(node.inputs[1])
    array = graph.constant(node.inputs[1])
    if index is None or array is None or array.ndim > 0:
        return
    at = node.attributes.get("axis", 0) % len(found.axes)
    axis = found.axes[at]
    if len(axis) != 1 or axis[0].axis != last or not axis[0].size.known or not axis[0].stride.known:
        return
    stride, count, n = axis[0].stride, axis[0].size, graph.tensors[linear.inputs[1]].shape[0]
    place = int(index) % count.number
    rows = np.arange(n).reshape(-1, count.number, stride.number)[:, place].reshape(-1)
    rest = tuple(_closer(group, last, stride, count) for where, group in enumerate(found.axes) if where != at)
    shape = (*found.shape[:-1], Size(len(rows)))
    if rest == whole(shape):
        graph.put(rows_of(graph, linear, rows, node.name))
        return
    root = graph.fresh(f"{node.name}.root")
    made = views(graph, root, shape, rest, node.name)
    if made is not None:
        graph.put(rows_of(graph, linear, rows, root), *made)


def _closer(axis: Axis, last: int, stride: Size, count: Size) -> Axis:
    """Atoms of the last axis once an atom of it is gone: those outside lie closer."""
    moved = []
    for atom in axis:
        inner = over(atom.stride, times(stride, count)) if atom.axis == last else None
        moved.append(atom if inner is None else type(atom)(atom.axis, times(inner, stride), atom.size))
    return merged(moved)
