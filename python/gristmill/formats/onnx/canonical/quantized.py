"""Int8 forms of Linear: weights that are dequantised, inputs that are rounded to codes on the way, integer products.

A weight whose codes are symmetric, unsigned ones taken less 128, becomes a `Quantized` tensor; any other becomes float32. The rounding
of an input by QuantizeLinear and DequantizeLinear becomes the attributes `input_scale` and `input_zero_point`. What
DynamicQuantizeLinear rounds with one scale for the whole input, Linear rounds with a scale for each row when it runs: the result
differs from the file's, by less than the file's differs from that of the network before it was quantised.
"""

from typing import Any

import numpy as np

from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.formats.onnx.canonical.linear import row_vector
from gristmill.model import Model
from gristmill.ops import OPS, OWN, Node, find
from gristmill.tensor import Dense, Quantized, Tensor
from gristmill.tensor.parts import Array

CODES = (np.dtype(np.int8), np.dtype(np.uint8))


def drop_repeats(model: Model) -> Model:
    """Drop a rounding to codes of what already is rounded to the same codes."""
    graph = Graph(model)
    for node in graph.walk("DequantizeLinear"):
        pair = _rounding(graph, node.name)
        if pair is not None and _on_grid(graph, pair[0], node.inputs[1:]):
            graph.alias(node.name, pair[0])
    return graph.done()


def _rounding(graph: Graph, name: str) -> tuple[str, Node] | None:
    """The value that is rounded to codes and back, and the node that makes codes of it."""
    back = graph.maker(name, "DequantizeLinear")
    codes = graph.maker(back.inputs[0], "QuantizeLinear") if back is not None else None
    if back is None or codes is None or codes.inputs[1:] != back.inputs[1:] or graph.constant(back.inputs[1]) is None:
        return None
    return codes.inputs[0], codes


def _on_grid(graph: Graph, name: str, constants: tuple[str, ...]) -> bool:
    """Whether a value is a view of what was dequantised with these constants, of which there is one for all elements."""
    node = graph.maker(name, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear")
    while node is not None and node.op != "DequantizeLinear":
        node = graph.maker(node.inputs[0], "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear")
    if node is None or len(node.inputs) != len(constants) + 1 or any(graph.scalar(value) is None for value in constants):
        return False
    return all(graph.scalar(a) == graph.scalar(b) for a, b in zip(node.inputs[1:], constants, strict=True))


def quantized_products(model: Model) -> Model:
    """Turn products with dequantised matrices, and integer products, into Linear."""
    graph = Graph(model)
    weights: dict[tuple[Any, ...], str] = {}
    for node in graph.walk("MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"):
        made = {
            "MatMul": _dequantized,
            "Gemm": _dequantized,
            "MatMulInteger": lambda *_: None,
            "QLinearMatMul": _requantized,
        }[node.op](graph, node, weights)
        if made is not None:
            graph.put(*made)
    for node in graph.walk("Mul"):
        found = _dynamic(graph, node, weights)
        if found is not None:
            graph.put(found)
    return graph.done()


def dequantize_constants(model: Model) -> Model:
    """Compute what is left of constants that the file keeps as codes."""
    graph = Graph(model)
    for node in graph.walk("DequantizeLinear"):
        value = _constant(graph, node.name)
        if value is not None:
            graph.alias(node.name, graph.tensor(value, f"{node.name}.value"))
    return graph.done()


def _constant(graph: Graph, name: str) -> Array | None:
    """The value of a constant or of a dequantised constant."""
    value = graph.constant(name)
    node = graph.maker(name, "DequantizeLinear")
    if value is not None or node is None:
        return value
    values = [graph.constant(each) if each else None for each in node.inputs]
    if any(value is None for each, value in zip(node.inputs, values, strict=True) if each):
        return None
    return np.asarray(find(node).reference(node, *values)[0])


def _weight(codes: Array, scale: Array, zero: Array | None) -> Tensor | None:
    """A matrix [n, k] of codes times scales (one, or one for each of n), less zero points; None where it is not such."""
    n = codes.shape[0]
    zero = np.zeros(1, codes.dtype) if zero is None else zero
    if codes.dtype not in CODES or scale.dtype != np.float32 or scale.size not in (1, n) or zero.size not in (1, n):
        return None
    offset = 128 if codes.dtype == np.uint8 else 0
    signed = codes.astype(np.int16) - offset
    rows = np.ascontiguousarray(np.broadcast_to(scale.reshape(-1), (n,)))
    positive = bool(np.isfinite(rows).all() and (rows > 0).all())
    if positive and (zero.astype(np.int16) == offset).all() and signed.min(initial=0) >= -127:
        return Quantized(signed.astype(np.int8), rows)
    wide = codes.astype(np.float32) - zero.reshape(-1, 1).astype(np.float32)
    return Dense(wide * rows[:, None])


def _matrix(
    graph: Graph, weights: dict[tuple[Any, ...], str], names: tuple[str, ...], turned: bool, axis: int | None
) -> str | None:
    """Add the weight that codes, scale and zero point make, once; `axis` is that of the scales, where there are several."""
    codes, scale = graph.constant(names[0]), graph.constant(names[1])
    zero = graph.constant(names[2]) if len(names) > 2 and names[2] else None
    if codes is None or scale is None or codes.ndim != 2 or (len(names) > 2 and names[2] and zero is None):
        return None
    rows = 1 if turned else 0
    if scale.size > 1 and (scale.ndim > 1 or axis is None or axis % 2 != rows):
        return None
    key = (*names, turned)
    if key not in weights:
        tensor = _weight(np.ascontiguousarray(codes.T) if turned else codes, scale, zero)
        if tensor is None:
            return None
        weights[key] = graph.tensor(tensor, names[0])
    return weights[key]


def _dequantized(graph: Graph, node: Node, weights: dict[tuple[Any, ...], str]) -> list[Node] | None:
    """MatMul and Gemm by a matrix that DequantizeLinear makes of constants."""
    source = graph.maker(node.inputs[1], "DequantizeLinear")
    plain = node.attributes.get("alpha", 1.0) == 1.0 and node.attributes.get("beta", 1.0) == 1.0
    if source is None or source.attributes.get("block_size", 0) or not plain or node.attributes.get("transA"):
        return None
    if graph.dtype(source.inputs[1]) != np.float32 or not graph.shape(node.inputs[0]):
        return None
    turned = not node.attributes.get("transB")
    weight = _matrix(graph, weights, source.inputs, turned, source.attributes.get("axis", 1))
    if weight is None:
        return None
    inputs: tuple[str, ...] = (node.inputs[0], weight)
    if node.input(2):
        bias = _constant(graph, node.inputs[2])
        vector = None if bias is None else row_vector(bias, graph.tensors[weight].shape[0])
        if vector is None:
            return None
        inputs += (graph.tensor(vector, f"{node.inputs[2]}.bias"),)
    return [_linear(graph, inputs, node.outputs)]


def _linear(graph: Graph, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Node:
    """A Linear that rounds its input itself, where its input is rounded to codes and its weight is int8."""
    pair = _rounding(graph, inputs[0])
    attributes = None
    if pair is not None and isinstance(graph.tensors[inputs[1]], Quantized):
        attributes = _input_codes(graph, pair[1].inputs[1], pair[1].input(2))
    if pair is None or attributes is None:
        return Node("Linear", inputs, outputs, {}, OWN)
    return Node("Linear", (pair[0], *inputs[1:]), outputs, attributes, OWN)


def _input_codes(graph: Graph, scale: str, zero: str) -> dict[str, Any] | None:
    """The attributes that say how an input is rounded; None where Linear does not round so."""
    step, array = graph.scalar(scale), graph.constant(zero) if zero else np.zeros(1, np.uint8)
    if step is None or array is None or array.size != 1 or array.dtype not in CODES or not 2.0**-100 <= step <= 2.0**100:
        return None
    if "input_scale" not in OPS[OWN, "Linear"].attributes:
        return None
    offset = 128 if array.dtype == np.int8 else 0
    return {"input_scale": float(step), "input_zero_point": int(array.reshape(-1)[0]) + offset}


def _requantized(graph: Graph, node: Node, weights: dict[tuple[Any, ...], str]) -> list[Node] | None:
    """QLinearMatMul by a constant matrix: a Linear between what makes its input and what makes codes of its output."""
    a, scale, zero, *rest = node.inputs
    weight = _matrix(graph, weights, tuple(rest[:3]), True, 1)
    if weight is None or graph.scalar(scale) is None or not graph.shape(a):
        return None
    codes = graph.maker(a, "QuantizeLinear")
    attributes = None
    if codes is not None and codes.inputs[1:] == (scale, zero) and isinstance(graph.tensors[weight], Quantized):
        attributes = _input_codes(graph, scale, zero)
    made, name = [], graph.fresh(f"{node.name}.product")
    source = codes.inputs[0] if codes is not None and attributes is not None else graph.fresh(f"{a}.value")
    if attributes is None:
        made.append(Node("DequantizeLinear", (a, scale, zero), (source,)))
    made.append(Node("Linear", (source, weight), (name,), attributes or {}, OWN))
    made.append(Node("QuantizeLinear", (name, *rest[3:5]), node.outputs))
    return made


def _dynamic(graph: Graph, node: Node, weights: dict[tuple[Any, ...], str]) -> Node | None:
    """Cast(MatMulInteger(codes of x, weight)) * (scale of x * scale of the weight)."""
    for made, scales in (node.inputs, node.inputs[::-1]):
        cast, factors = graph.maker(made, "Cast"), graph.maker(scales, "Mul")
        product = graph.maker(cast.inputs[0], "MatMulInteger") if cast is not None else None
        if product is None or factors is None or cast is None or cast.attributes["to"] != "float32":
            continue
        codes = graph.maker(product.inputs[0], "DynamicQuantizeLinear")
        if codes is None or product.inputs[:1] + product.inputs[2:3] != (codes.outputs[0], codes.outputs[2]):
            continue
        for own, other in (factors.inputs, factors.inputs[::-1]):
            if own != codes.outputs[1]:
                continue
            names = (product.inputs[1], other, *product.inputs[3:4])
            weight = _matrix(graph, weights, names, True, 1)
            if weight is not None and graph.shape(codes.inputs[0]):
                return Node("Linear", (codes.inputs[0], weight), node.outputs, {}, OWN)
    return None
