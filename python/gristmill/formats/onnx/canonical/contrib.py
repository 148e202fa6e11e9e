"""What ONNX Runtime's own optimiser writes: operators of the domain com.microsoft, as the reader takes them apart.

Each rule emits standard operators, or ours, into the graph that the reader builds and returns the names of the outputs.
Semantics: docs/ContribOperators.md of the onnxruntime project.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np

from gristmill.formats.onnx.builder import Builder
from gristmill.formats.onnx.foreign import Foreign, Unsupported
from gristmill.ops import OWN

DOMAIN = "com.microsoft"
Rule = Callable[[Foreign, Builder], list[str]]


def _gelu(node: Foreign, graph: Builder, approximate: str) -> list[str]:
    x = node.inputs[0]
    if node.input(1):
        (x,) = graph.emit("Add", (x, node.inputs[1]))
    return graph.emit("Gelu", (x,), {"approximate": approximate}, node.outputs)


def _quick_gelu(node: Foreign, graph: Builder) -> list[str]:
    alpha = graph.constant(np.float32(node.get("alpha", 1.702)))
    (inner,) = graph.emit("Mul", (node.inputs[0], alpha))
    (gate,) = graph.emit("Sigmoid", (inner,))
    return graph.emit("Mul", (node.inputs[0], gate), None, node.outputs)


def _unused(node: Foreign, first: int, last: int) -> None:
    """Refuse a node that makes outputs which are not made here."""
    if any(node.outputs[first:last]):
        raise Unsupported(f"output {first}")


def _skip_layer_normalization(node: Foreign, graph: Builder) -> list[str]:
    """LayerNormalization of the sum of an input, a skipped one and a bias; the sum is the fourth output."""
    _unused(node, 1, 3)
    x, skip, gamma = node.inputs[:3]
    if node.input(4):
        (x,) = graph.emit("Add", (x, node.inputs[4]))
    (total,) = graph.emit("Add", (x, skip))
    attributes = {"axis": -1, "epsilon": float(node.get("epsilon", 1e-12))}
    made = graph.emit("LayerNormalization", (total, gamma, node.input(3)), attributes, node.outputs[:1])
    return [made[0], "", "", total]


def _embed_layer_normalization(node: Foreign, graph: Builder) -> list[str]:
    """LayerNormalization of the sum of word, place and segment vectors; the second output counts the mask."""
    ids, segments, words, places, kinds, gamma, beta = (node.input(at) for at in range(7))
    (total,) = graph.emit("Gather", (words, ids))
    if node.input(8):
        (place,) = graph.emit("Gather", (places, node.inputs[8]))
    else:
        (length,) = graph.emit("Shape", (ids,), {"start": 1, "end": 2})
        zero = graph.constant(np.zeros(1, np.int64))
        (place,) = graph.emit("Slice", (places, zero, length, zero))
    (total,) = graph.emit("Add", (total, place))
    if segments:
        (kind,) = graph.emit("Gather", (kinds, segments))
        (total,) = graph.emit("Add", (total, kind))
    attributes = {"axis": -1, "epsilon": float(node.get("epsilon", 1e-12))}
    made = graph.emit("LayerNormalization", (total, gamma, beta), attributes, node.outputs[:1])
    count = ""
    if len(node.outputs) > 1 and node.outputs[1]:
        if not node.input(7):
            raise Unsupported("a mask index without a mask")
        axes = graph.constant(np.array([1], np.int64))
        (count,) = graph.emit("ReduceSum", (node.inputs[7], axes), {"keepdims": 0}, (node.outputs[1],))
    return [made[0], count, total]


def _attended(graph: Builder, mask: str, like: str) -> tuple[str, ...]:
    """A mask [batch, keys] from one of that shape, or from the number of keys of each sequence."""
    if not mask:
        return ()
    rank = graph.rank(mask)
    if rank == 2:
        return tuple(graph.emit("Cast", (mask,), {"to": "bool"}))
    if rank != 1:
        raise Unsupported("a mask that is neither [batch, keys] nor [batch]")
    zero, one = graph.constant(np.int64(0)), graph.constant(np.int64(1))
    at, axis = graph.constant(np.int64(1)), graph.constant(np.array([1], np.int64))
    (shape,) = graph.emit("Shape", (like,))
    (length,) = graph.emit("Gather", (shape, at))
    (places,) = graph.emit("Range", (zero, length, one))
    (counts,) = graph.emit("Cast", (mask,), {"to": "int64"})
    (counts,) = graph.emit("Unsqueeze", (counts, axis))
    return tuple(graph.emit("Less", (places, counts)))


def _scale(node: Foreign, columns: Any, heads: int) -> float:
    scale = node.get("scale", 0.0)
    if scale:
        return float(scale)
    if not isinstance(columns, int) or not heads or columns % heads:
        raise Unsupported(f"{columns} columns in {heads} heads")
    return 1.0 / sqrt(columns // heads)


def _plain(node: Foreign, *inputs: int) -> None:
    """Refuse what attention may have besides: a cache, a bias of the scores, rotation, a causal mask."""
    for at in inputs:
        if node.input(at):
            raise Unsupported(f"input {at}")
    for key in ("unidirectional", "do_rotary", "past_present_share_buffer"):
        if node.get(key, 0):
            raise Unsupported(f"attribute '{key}'")
    _unused(node, 1, len(node.outputs))


def _attention(node: Foreign, graph: Builder) -> list[str]:
    """Queries, keys and values by one product, then attention."""
    _plain(node, 4, 5, 6)
    x, weight, bias = (node.input(at) for at in range(3))
    sizes, heads = node.get("qkv_hidden_sizes"), int(node.get("num_heads", 0))
    columns = graph.types[weight].shape[-1] if graph.types[weight].known else None
    if sizes or not isinstance(columns, int) or columns % 3:
        raise Unsupported("parts of different sizes")
    (made,) = graph.emit("MatMul", (x, weight))
    if bias:
        (made,) = graph.emit("Add", (made, bias))
    split = graph.constant(np.full(3, columns // 3, np.int64))
    parts = graph.emit("Split", (made, split), {"axis": -1}, ("", "", ""))
    attributes = {"heads": heads, "scale": _scale(node, columns // 3, heads)}
    mask = _attended(graph, node.input(3), x)
    return graph.emit("MaskedAttention", (*parts, *mask), attributes, node.outputs[:1], OWN)


def _multi_head_attention(node: Foreign, graph: Builder) -> list[str]:
    _plain(node, 5, 6, 7)
    parts, heads = list(node.inputs[:3]), int(node.get("num_heads", 0))
    if len(parts) < 3 or not all(parts) or any(graph.rank(name) != 3 for name in parts):
        raise Unsupported("packed keys and values")
    columns = graph.types[parts[0]].shape[-1]
    if node.input(3):
        bias = graph.value(node.inputs[3])
        if bias is None or not isinstance(columns, int) or bias.shape != (3 * columns,):
            raise Unsupported("a bias of another size")
        pieces = [graph.constant(piece) for piece in np.split(bias, 3)]
        parts = [graph.emit("Add", pair)[0] for pair in zip(parts, pieces, strict=True)]
    attributes = {"heads": heads, "scale": _scale(node, columns, heads)}
    mask = _attended(graph, node.input(4), parts[1])
    return graph.emit("MaskedAttention", (*parts, *mask), attributes, node.outputs[:1], OWN)


CONTRIB: dict[str, Rule] = {
    "Attention": _attention,
    "BiasGelu": lambda node, graph: _gelu(node, graph, "none"),
    "EmbedLayerNormalization": _embed_layer_normalization,
    "FastGelu": lambda node, graph: _gelu(node, graph, "tanh"),
    "Gelu": lambda node, graph: _gelu(node, graph, "none"),
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_normalization,
}
