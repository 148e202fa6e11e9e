"""Views: drop chains of reshapes and transpositions that do nothing in sum, shorten others, and move them behind Linear nodes.

A Linear works on the last axis, so that a view which keeps that axis may as well follow it. There it often meets its inverse:
torch's own encoder layers go to [length, batch, width] and back.
"""

from dataclasses import replace

import numpy as np

from gristmill.formats.onnx.canonical.arrangement import (
    VIEWS,
    Arrangement,
    Axis,
    arrangement,
    extents,
    regroup,
    target_of,
    transposed,
    whole,
)
from gristmill.formats.onnx.canonical.dims import ONE
from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.shapes import Shape, permutation
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
    if not before or not after or before[-1] != after[-1] or before[-1] == ONE:
        return False
    if view.op == "Transpose":
        return permutation(view, len(before))[-1] == len(before) - 1
    if view.op == "Flatten" or (view.op == "Reshape" and graph.ints(view.inputs[1]) is None):
        return False
    axes = regroup(whole(before), after)
    return axes is not None and axes[-1] == whole(before)[-1]


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
    """Put fewer views in the place of a chain of them."""
    made = views(graph, found.root, found.shape, found.axes, node.name)
    if made is not None and len(made) < len(found.chain):
        graph.put(*made)


def views(graph: Graph, root: str, shape: Shape, axes: tuple[Axis, ...], name: str) -> list[Node] | None:
    """Return nodes that arrange a value of some shape: cut, turn, join, as far as needed. None where constants cannot say it."""
    if not all(atom.stride.known for axis in axes for atom in axis):
        return None
    order = transposed(axes, shape)
    if order is not None:
        return [Node("Transpose", (root,), (name,), {"perm": order})]
    atoms = sorted({atom for axis in axes for atom in axis}, key=lambda atom: (atom.axis, -atom.stride.number))
    apart = tuple(atom.size for atom in atoms)
    turn = tuple(atoms.index(atom) for axis in axes for atom in axis)
    made: list[Node] = []
    have = shape
    if turn != tuple(range(len(turn))):
        if apart != shape:
            target = target_of(shape, apart)
            if target is None:
                return None
            made.append(reshape(graph, root, target, graph.fresh(f"{name}.cut")))
        source = made[-1].name if made else root
        made.append(Node("Transpose", (source,), (graph.fresh(f"{name}.turned"),), {"perm": turn}))
        have = tuple(apart[at] for at in turn)
    if extents(axes) != have:
        target = target_of(have, extents(axes))
        if target is None:
            return None
        made.append(reshape(graph, made[-1].name if made else root, target, graph.fresh(f"{name}.joined")))
    return [*made[:-1], replace(made[-1], outputs=(name,))] if made else None


def reshape(graph: Graph, source: str, target: tuple[int, ...], name: str) -> Node:
    """Return a Reshape to a constant shape."""
    return Node("Reshape", (source, graph.tensor(np.array(target, np.int64), f"{name}.shape")), (name,))
