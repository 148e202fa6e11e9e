"""Our own operators as graphs of standard ones, for files that others read."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gristmill.errors import FormatError
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Bitmask, Quantized, Sparse, Tensor, is_int8
from gristmill.tensor.parts import Array

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
}


class Unknown(Exception):
    """An operator that has no form in standard ones."""


class Writer:
    """The nodes and the tensors of the file that is written.

    Args:
        types: the type of every value of the model.
        tensors: those of the model.
    """

    def __init__(self, types: Mapping[str, TensorType], tensors: Mapping[str, Tensor]) -> None:
        self.types = types
        self.given = tensors
        self.tensors: dict[str, Array] = {}
        self.nodes: list[Node] = []
        self.weights: dict[tuple[str, bool], str] = {}  # of Linear, by name and whether transposed
        self._taken = {*types}
        self._count = 0

    def fresh(self, hint: str) -> str:
        name = hint
        while name in self._taken:
            self._count += 1
            name = f"{hint}_{self._count}"
        self._taken.add(name)
        return name

    def constant(self, value: Any, dtype: Any, hint: str) -> str:
        name = self.fresh(hint)
        self.tensors[name] = np.asarray(value, dtype)
        return name

    def tensor(self, name: str) -> str:
        """Take over a tensor of the model, whatever its kind, as a plain one."""
        if name not in self.tensors:
            self.tensors[name] = self.given[name].dense()
        return name

    def emit(
        self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None, output: str = "", hint: str = "value"
    ) -> str:
        """Append a node and return its one output."""
        name = output or self.fresh(hint)
        self.nodes.append(Node(op, tuple(inputs), (name,), attributes or {}))
        return name

    def write(self, node: Node) -> None:
        """Append a node of the model.

        Raises:
            Unknown: it has no form in standard operators.
        """
        if not node.domain:
            for name in node.inputs:
                if name in self.given:
                    self.tensor(name)
            self.nodes.append(node)
            return
        rule = RULES.get(node.op) if node.domain == OWN else None
        if rule is None:
            raise Unknown
        read = [self.tensor(name) if name in self.given and not (node.op == "Linear" and i == 1) else name
                for i, name in enumerate(node.inputs)]  # fmt: skip
        rule(Node(node.op, tuple(read), node.outputs, node.attributes, node.domain), self)

    def rank(self, name: str) -> int:
        kind = self.types[name]
        if not kind.known:
            raise FormatError(f"the rank of '{name}' depends on values")
        return len(kind.shape)


def linear(node: Node, to: Writer) -> None:
    """Gemm for matrices, else MatMul and Add; int8 weights as DequantizeLinear of their codes."""
    x, weight, bias, residual = node.input(0), node.inputs[1], node.input(2), node.input(3)
    activation = node.attributes.get("activation")
    last = node.outputs[0]
    gemm = to.rank(x) == 2 and bool(bias)
    w = weight_of(weight, not gemm, to)
    steps: list[Callable[[str, str], str]] = []
    if gemm:
        steps.append(lambda y, out: to.emit("Gemm", [y, w, bias], {"transB": 1}, out, f"{last}.product"))
    else:
        steps.append(lambda y, out: to.emit("MatMul", [y, w], None, out, f"{last}.product"))
        if bias:
            steps.append(lambda y, out: to.emit("Add", [y, bias], None, out, f"{last}.biased"))
    if activation == "silu":
        steps.append(lambda y, out: to.emit("Mul", [y, to.emit("Sigmoid", [y])], None, out, f"{last}.active"))
    elif activation is not None:
        op, attributes = ACTIVATIONS[activation]
        steps.append(lambda y, out: to.emit(op, [y], attributes, out, f"{last}.active"))
    if residual:
        steps.append(lambda y, out: to.emit("Add", [y, residual], None, out))
    for number, step in enumerate(steps):
        x = step(x, last if number == len(steps) - 1 else "")


def weight_of(name: str, transposed: bool, to: Writer) -> str:
    """Return the name of a Linear's matrix, [k, n] if transposed, written once."""
    tensor = to.given[name]
    if not is_int8(tensor) and not transposed:
        return to.tensor(name)
    if (name, transposed) not in to.weights:
        to.weights[name, transposed] = _dequantized(name, transposed, to) if is_int8(tensor) else to.fresh(f"{name}.transposed")
        if not is_int8(tensor):
            to.tensors[to.weights[name, transposed]] = tensor.dense().T
    return to.weights[name, transposed]


def _dequantized(name: str, transposed: bool, to: Writer) -> str:
    codes, scale = codes_of(to.given[name])
    inputs = [
        to.constant(codes.T if transposed else codes, np.int8, f"{name}.codes"),
        to.constant(scale, np.float32, f"{name}.scale"),
        to.constant(np.zeros(scale.shape), np.int8, f"{name}.zero"),
    ]
    return to.emit("DequantizeLinear", inputs, {"axis": 1 if transposed else 0}, hint=f"{name}.dequantized")


def codes_of(tensor: Tensor) -> tuple[Array, Array]:
    """Return int8 codes [n, k] and float32 scales [n]."""
    if isinstance(tensor, Quantized):
        return tensor.codes, tensor.scale
    assert isinstance(tensor, (Sparse, Bitmask))
    assert tensor.scale is not None
    return np.rint(tensor.dense() / tensor.scale[:, None]).astype(np.int8), tensor.scale


def masked_attention(node: Node, to: Writer) -> None:
    """softmax(scale q k^T + mask) v for each head."""
    q, k, v, mask = node.inputs[0], node.inputs[1], node.inputs[2], node.input(3)
    heads, columns, out = node.attributes["heads"], to.types[q].shape[-1], node.outputs[0]
    if isinstance(columns, str):
        raise FormatError(f"{node.op} '{node.name}': the number of its columns is not known")
    scale = node.attributes.get("scale", (columns // heads) ** -0.5 if columns else 1.0)
    cut = to.constant([0, 0, heads, columns // heads], np.int64, f"{out}.heads")
    join = to.constant([0, 0, columns], np.int64, f"{out}.columns")

    def split(x: str, perm: tuple[int, ...]) -> str:
        return to.emit("Transpose", [to.emit("Reshape", [x, cut])], {"perm": perm})

    scores = to.emit("MatMul", [split(q, (0, 2, 1, 3)), split(k, (0, 2, 3, 1))], hint=f"{out}.scores")
    scores = to.emit("Mul", [scores, to.constant(scale, np.float32, f"{out}.scale")])
    if mask:
        axes = to.constant([1, 2], np.int64, f"{out}.axes")
        kept = to.emit("Unsqueeze", [boolean(mask, to), axes])
        scores = to.emit("Where", [kept, scores, to.constant(-1e30, np.float32, f"{out}.never")])
    weights = to.emit("Softmax", [scores], {"axis": -1}, hint=f"{out}.weights")
    mixed = to.emit("Transpose", [to.emit("MatMul", [weights, split(v, (0, 2, 1, 3))])], {"perm": (0, 2, 1, 3)})
    to.emit("Reshape", [mixed, join], None, out)


def boolean(mask: str, to: Writer) -> str:
    return mask if to.types[mask].dtype == np.bool_ else to.emit("Cast", [mask], {"to": "bool"})


def masked_pool(node: Node, to: Writer) -> None:
    x, mask = node.inputs
    mode, out = node.attributes.get("mode", "mean"), node.outputs[0]
    one, last = to.constant([1], np.int64, f"{out}.one"), to.constant([-1], np.int64, f"{out}.last")
    kept = to.emit("Unsqueeze", [boolean(mask, to), last])
    zero = to.constant(0, np.float32, f"{out}.zero")
    if mode == "max":
        never = to.constant(-math.inf, np.float32, f"{out}.never")
        best = to.emit("ReduceMax", [to.emit("Where", [kept, x, never]), one], {"keepdims": 0})
        any_kept = to.emit("ReduceMax", [to.emit("Cast", [kept], {"to": "float32"}), one], {"keepdims": 0})
        to.emit("Where", [to.emit("Cast", [any_kept], {"to": "bool"}), best, zero], None, out)
        return
    weights = to.emit("Cast", [kept], {"to": "float32"})
    axis = to.constant(1, np.int64, f"{out}.axis")
    if mode == "first":
        counted = to.emit("CumSum", [weights, axis])
        firsts = to.emit("Cast", [to.emit("Equal", [counted, to.constant(1, np.float32, f"{out}.first")])], {"to": "float32"})
        weights = to.emit("Mul", [weights, firsts])
    if mode == "weighted":
        ones = to.emit("Add", [to.emit("Mul", [weights, zero]), to.constant(1, np.float32, f"{out}.step")])
        weights = to.emit("Mul", [weights, to.emit("CumSum", [ones, axis])])
    total = to.emit("ReduceSum", [weights, one], {"keepdims": 0})
    total = to.emit("Sqrt", [total]) if mode == "sqrt" else total
    clean = to.emit("Where", [kept, x, zero])
    summed = to.emit("ReduceSum", [to.emit("Mul", [clean, weights]), one], {"keepdims": 0})
    to.emit("Div", [summed, to.emit("Max", [total, to.constant(1e-30, np.float32, f"{out}.least")])], None, out)


def positions(node: Node, to: Writer) -> None:
    ids, out, start = node.inputs[0], node.outputs[0], node.attributes.get("start", 0)
    if "padding" in node.attributes:
        padding = to.constant(node.attributes["padding"], np.int64, f"{out}.padding")
        real = to.emit("Cast", [to.emit("Not", [to.emit("Equal", [ids, padding])])], {"to": "int64"})
        counted = to.emit("Mul", [to.emit("CumSum", [real, to.constant(1, np.int64, f"{out}.axis")]), real])
        to.emit("Add", [counted, to.constant(start - 1, np.int64, f"{out}.before")], None, out)
        return
    first, step = to.constant(start, np.int64, f"{out}.start"), to.constant(1, np.int64, f"{out}.step")
    scalar = to.constant([], np.int64, f"{out}.scalar")
    length = to.emit("Reshape", [to.emit("Shape", [ids], {"start": 1, "end": 2}), scalar])
    places = to.emit("Range", [first, to.emit("Add", [length, first]), step])
    to.emit("Expand", [places, to.emit("Shape", [ids])], None, out)


def mean_squared_error(node: Node, to: Writer) -> None:
    difference = to.emit("Sub", node.inputs)
    to.emit("ReduceMean", [to.emit("Mul", [difference, difference])], {"keepdims": 0}, node.outputs[0])


RULES: dict[str, Callable[[Node, Writer], None]] = {
    "Linear": linear,
    "MaskedAttention": masked_attention,
    "MaskedPool": masked_pool,
    "MeanSquaredError": mean_squared_error,
    "Positions": positions,
}

__all__ = ["RULES", "Unknown", "Writer"]
