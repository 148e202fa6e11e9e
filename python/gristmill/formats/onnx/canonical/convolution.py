"""Convolutions: batch normalisation becomes part of their weights, padding with zeros part of their attributes."""

from dataclasses import replace

import numpy as np

from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.model import Model
from gristmill.ops import Node
from gristmill.tensor.parts import Array

PADDED = ("Conv", "AveragePool", "MaxPool")


def normalized_convolutions(model: Model) -> Model:
    """Multiply the scale of a BatchNormalization into the weight of the Conv before it, and its shift into the bias."""
    graph = Graph(model)
    for node in graph.walk("BatchNormalization"):
        conv = graph.maker(node.inputs[0], "Conv")
        if conv is None or not graph.once(node.inputs[0]) or len(node.outputs) > 1 or node.attributes.get("training_mode", 0):
            continue
        names = [conv.inputs[1], *node.inputs[1:], *([conv.inputs[2]] if conv.input(2) else [])]
        values = [graph.constant(name) for name in names]
        if any(value is None or value.dtype != np.float32 for value in values):
            continue
        weight, bias = _scaled([value for value in values if value is not None], node.attributes.get("epsilon", 1e-5))
        inputs = (conv.inputs[0], graph.tensor(weight, f"{names[0]}.scaled"), graph.tensor(bias, f"{node.inputs[2]}.shifted"))
        graph.put(replace(conv, inputs=inputs, outputs=node.outputs))
    return graph.done()


def _scaled(values: list[Array], epsilon: float) -> tuple[Array, Array]:
    """Return weight and bias, computed in float64 and rounded once."""
    weight, gamma, beta, mean, variance, *bias = [value.astype(np.float64) for value in values]
    factor = gamma / np.sqrt(variance + epsilon)
    shift = beta + ((bias[0] if bias else 0.0) - mean) * factor
    return (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32), shift.astype(np.float32)


def padded_windows(model: Model) -> Model:
    """Let a Conv or a pooling pad by itself what a Pad pads with a constant that it would take."""
    graph = Graph(model)
    for node in graph.walk(*PADDED):
        pad = graph.maker(node.inputs[0], "Pad")
        if pad is None or pad.attributes.get("mode", "constant") != "constant" or not _takes(graph, node, pad):
            continue
        shape = graph.shape(pad.inputs[0])
        added = _spatial(graph, pad, len(shape)) if shape is not None else None
        explicit = node.attributes.get("auto_pad", "NOTSET") == "NOTSET"
        if added is None or not explicit:
            continue
        own = node.attributes.get("pads", (0,) * len(added))
        pads = tuple(a + b for a, b in zip(own, added, strict=True))
        graph.put(replace(node, inputs=(pad.inputs[0], *node.inputs[1:]), attributes={**node.attributes, "pads": pads}))
    return graph.done()


def _takes(graph: Graph, node: Node, pad: Node) -> bool:
    """Whether a window takes padding for the value that a Pad fills in."""
    value = graph.scalar(pad.inputs[2]) if pad.input(2) else 0.0
    if node.op == "Conv":
        return value == 0
    if node.op == "MaxPool":
        return value == -np.inf and len(node.outputs) == 1 and not node.attributes.get("ceil_mode", 0)
    own = any(node.attributes.get("pads", ()))
    counted = node.attributes.get("count_include_pad", 0) == 1
    return value == 0 and counted and not own and not node.attributes.get("ceil_mode", 0)


def _spatial(graph: Graph, pad: Node, rank: int) -> tuple[int, ...] | None:
    """What is added before and after each spatial dimension; None where others are padded or anything is cut."""
    pads = graph.ints(pad.inputs[1])
    axes = graph.ints(pad.inputs[3]) if pad.input(3) else tuple(range(rank))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    before, after = [0] * rank, [0] * rank
    for axis, first, last in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before[axis % rank], after[axis % rank] = first, last
    if any(before[:2] + after[:2]) or min(before + after) < 0:
        return None
    return (*before[2:], *after[2:])
