"""Products with constant matrices: Gemm and MatMul become Linear, whose weight is [n, k]; constant vectors become biases."""

from dataclasses import replace

import numpy as np

from gristmill.formats.onnx.canonical.graph import Graph
from gristmill.model import Model
from gristmill.ops import OWN, Node
from gristmill.tensor import Dense, Quantized
from gristmill.tensor.parts import Array


def products(model: Model) -> Model:
    """Turn MatMul and Gemm by float32 matrices of the model into Linear."""
    graph = Graph(model)
    turned: dict[str, str] = {}
    for node in graph.walk("MatMul", "Gemm"):
        weight = graph.constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or not graph.shape(node.inputs[0]):
            continue
        if node.op == "MatMul":
            name = _transposed(graph, turned, node.inputs[1], weight)
            graph.put(Node("Linear", (node.inputs[0], name), node.outputs, {}, OWN))
        else:
            _gemm(graph, turned, node, weight)
    return graph.done()


def _transposed(graph: Graph, turned: dict[str, str], name: str, weight: Array) -> str:
    if name not in turned:
        turned[name] = graph.tensor(np.ascontiguousarray(weight.T), f"{name}.T")
    return turned[name]


def _gemm(graph: Graph, turned: dict[str, str], node: Node, weight: Array) -> None:
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    if node.attributes.get("transA"):
        return
    name = node.inputs[1] if node.attributes.get("transB") else _transposed(graph, turned, node.inputs[1], weight)
    if alpha != 1.0:
        scaled = graph.tensors[name].dense() * np.float32(alpha)
        name = graph.tensor(scaled, f"{name}.scaled")
    inputs: tuple[str, ...] = (node.inputs[0], name)
    n = graph.tensors[name].shape[0]
    if node.input(2) and beta != 0.0:
        bias = graph.constant(node.inputs[2])
        vector = None if bias is None else row_vector(bias, n)
        if vector is None:
            return
        if bias is None or beta != 1.0 or bias.shape != (n,):
            inputs += (graph.tensor(vector * np.float32(beta), f"{node.inputs[2]}.row"),)
        else:
            inputs += (node.inputs[2],)
    graph.put(Node("Linear", inputs, node.outputs, {}, OWN))


def row_vector(array: Array, n: int) -> Array | None:
    """Return a constant that is broadcast along all but the last axis as [n], or None."""
    if array.dtype != np.float32 or array.size not in (1, n) or (array.size == n and array.shape[-1:] not in ((n,), ())):
        return None
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (n,)))


def biases(model: Model) -> Model:
    """Take constant vectors that are added to, or subtracted from, a Linear without bias as its bias."""
    graph = Graph(model)
    for node in graph.walk("Add", "Sub"):
        orders = (node.inputs, node.inputs[::-1]) if node.op == "Add" else (node.inputs,)
        for made, other in orders:
            linear, array = graph.maker(made, "Linear"), graph.constant(other)
            if linear is None or array is None or not graph.once(made) or len(linear.inputs) > 2 or linear.attributes:
                continue
            rank = graph.shape(made)
            vector = row_vector(array, graph.tensors[linear.inputs[1]].shape[0])
            if vector is None or rank is None or array.ndim > len(rank):
                continue
            name = other
            if array.shape != vector.shape or node.op == "Sub":
                name = graph.tensor(-vector if node.op == "Sub" else vector, f"{other}.row")
            graph.put(replace(linear, inputs=(*linear.inputs, name), outputs=node.outputs))
            break
    return graph.done()


def rows_of(graph: Graph, linear: Node, rows: Array, name: str) -> Node:
    """Return a Linear that makes some of the columns that another makes."""
    weight = graph.tensors[linear.inputs[1]]
    if isinstance(weight, Quantized):
        part: Dense | Quantized = Quantized(weight.codes[rows], weight.scale[rows])
    else:
        part = Dense(weight.dense()[rows])
    inputs: tuple[str, ...] = (linear.inputs[0], graph.tensor(part, f"{name}.weight"))
    bias = graph.constant(linear.inputs[2]) if linear.input(2) else None
    if bias is not None:
        inputs += (graph.tensor(bias[rows], f"{name}.bias"),)
    return replace(linear, inputs=inputs, outputs=(name,))
