"""Views: drop chains of reshapes and transpositions that do nothing in sum, shorten others, and move them behind Linear nodes.

A Linear works on the last axis, so that a view which keeps that axis may as well follow it. There it often meets its inverse: torch's own
encoder layers go to [length, batch, width] and back.
"""

from dataclasses import replace

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import VIEWS, Arrangement, arrangement, is_reshape, target_of, transposed
from gristmill.formats.onnx.canonical.dims import Size
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.shapes import permutation
from gristmill.model import Model
from gristmill.ops import Node


def lift_views(model: Model) -> Model:
    """Let Linear nodes read what their inputs are views of, and view what they make instead."""
    graph = Graph(model)
    for node in graph.walk("Linear"):
        if node.input(3):
            continue
        views: list[Node] = []
        source = node.inputs[0]
        while (view := graph.maker(source, *VIEWS)) is not None and _keeps_last(graph, view):
            views.append(view)
            source = view.inputs[0]
        if not views:
            continue
        names = [node.name, *(graph.fresh(f"{node.name}.{view.op.lower()}{at}") for at, view in enumerate(views))]
        graph.put(replace(node, inputs=(source, *node.inputs[1:]), outputs=(names[-1],)))
        n = graph.tensors[node.inputs[1]].shape[0]
        for at in reversed(range(len(views))):
            graph.put(_again(graph, views[at], names[at + 1], names[at], n))
    return graph.done()


def _keeps_last(graph: Graph, view: Node) -> bool:
    """Whether a view leaves the last axis as it is, and can be made again with a last axis of another extent."""
    before, after = graph.shape(view.inputs[0]), graph.shape(view.name)
    if not before or not after or before[-1] != after[-1]:
        return False
    if view.op == "Transpose":
        return permutation(view, len(before))[-1] == len(before) - 1
    found = arrangement(graph, view.name)
    if view.op == "Reshape" and graph.ints(view.inputs[1]) is None:
        return False
    root = graph.resolve(view.inputs[0])
    one = arrangement(graph, view.name) if found is not None and found.root == root else _single(graph, view)
    return one is not None and bool(one.axes[-1]) and one.axes[-1] == ((_last(one)),)


def _single(graph: Graph, view: Node) -> Arrangement | None:
    from gristmill.formats.onnx.canonical.arrangement import regroup, whole

    before, after = graph.shape(view.inputs[0]), graph.shape(view.name)
    if before is None or after is None:
        return None
    axes = regroup(whole(before), after)
    return None if axes is None else Arrangement(view.inputs[0], before, axes)


def _last(found: Arrangement):  # type: ignore[no-untyped-def]
    from gristmill.formats.onnx.canonical.arrangement import whole

    axis = whole(found.shape)[-1]
    return axis[0] if axis else None


def _again(graph: Graph, view: Node, source: str, name: str, n: int) -> Node:
    if view.op == "Reshape":
        target = (graph.ints(view.inputs[1]) or ())[:-1]
        constant = graph.tensor(np.array([*target, n], np.int64), f"{name}.shape")
        return replace(view, inputs=(source, constant), outputs=(name,))
    return replace(view, inputs=(source, *view.inputs[1:]), outputs=(name,))


def cancel_views(model: Model) -> Model:
    """Replace each view of a view by one view, or by nothing."""
    graph = Graph(model)
    for node in graph.walk(*VIEWS):
        found = arrangement(graph, node.name)
        if found is None:
            continue
        if found.is_root and len(found.shape) == len(found.axes):
            graph.alias(node.name, found.root)
        elif len(found.chain) > 1:
            _shorten(graph, node, found)
    return graph.done()


def _shorten(graph: Graph, node: Node, found: Arrangement) -> None:
    order = transposed(found.axes, found.shape)
    if order is not None:
        graph.put(Node("Transpose", (found.root,), node.outputs, {"perm": order}))
        return
    wanted = graph.shape(node.name)
    target = target_of(found.shape, wanted) if wanted is not None and is_reshape(found.axes, found.shape) else None
    if target is not None:
        graph.put(reshape(graph, found.root, target, node.name))


def reshape(graph: Graph, source: str, target: tuple[int, ...], name: str) -> Node:
    """Return a Reshape to a constant shape."""
    return Node("Reshape", (source, graph.tensor(np.array(target, np.int64), f"{name}.shape")), (name,))
