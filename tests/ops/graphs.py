"""One small training graph for every differentiable operator: tensors -> operator -> loss."""

from dataclasses import dataclass, field

import numpy as np

from gristmill.model import Model
from gristmill.ops import OWN, Node
from gristmill.tensor import Bitmask, Dense, Int4, Quantized, Sparse, Tensor

RNG_SEED = 7


@dataclass(frozen=True)
class Graph:
    """Tensors that train, the node under test, and constants; the loss is the mean square of its output against a target."""

    name: str
    node: Node
    tensors: dict[str, Tensor]
    wrt: tuple[str, ...]
    scalar: bool = False  # the node is a loss itself
    constants: dict[str, Tensor] = field(default_factory=dict)

    def model(self) -> Model:
        tensors = {**self.tensors, **self.constants}
        if self.scalar:
            return Model((self.node,), tensors, {}, ("loss",))
        bare = Model((self.node,), tensors, {}, (self.node.outputs[0],))
        shape = bare.types[self.node.outputs[0]].extents
        target = Dense(np.random.default_rng(RNG_SEED).standard_normal(shape).astype(np.float32))
        loss = Node("MeanSquaredError", (self.node.outputs[0], "target"), ("loss",), domain=OWN)
        return Model((self.node, loss), {**tensors, "target": target}, {}, ("loss",))


def draw(*shape: int, seed: int = 0) -> Dense:
    return Dense(np.random.default_rng((RNG_SEED, seed, *shape)).standard_normal(shape).astype(np.float32))


def away_from_zero(*shape: int) -> Dense:
    """Values that a finite difference does not carry over Relu's kink."""
    x = draw(*shape).array
    return Dense(np.where(np.abs(x) < 0.1, x + 0.3, x).astype(np.float32))


def sparse(n: int, k: int, block: tuple[int, int]) -> Sparse:
    """A block-sparse matrix made without the packing kernels."""
    rng = np.random.default_rng((RNG_SEED, n, k))
    mask = rng.random((n // block[0], k // block[1])) < 0.4
    groups, index = np.nonzero(mask)
    offsets = np.zeros(n // block[0] + 1, np.int32)
    np.cumsum(np.bincount(groups, minlength=n // block[0]), out=offsets[1:])
    values = rng.standard_normal((len(index), *block)).astype(np.float32)
    return Sparse((n, k), values, offsets, index.astype(np.int32))


def int8(tensor: Sparse) -> Sparse:
    rng = np.random.default_rng(RNG_SEED)
    codes = rng.integers(-127, 128, tensor.values.shape).astype(np.int8)
    scale = rng.uniform(0.005, 0.02, tensor.shape[0]).astype(np.float32)
    return Sparse(tensor.matrix_shape, codes, tensor.row_offsets, tensor.index, scale)


def bitmask(tensor: Dense | Quantized | Int4) -> Bitmask:
    """About four tenths of the elements of a matrix."""
    return Bitmask.of(tensor, np.random.default_rng(RNG_SEED).random(tensor.shape) < 0.4)


def quantized(n: int, k: int) -> Quantized:
    rng = np.random.default_rng(RNG_SEED)
    scale = rng.uniform(0.005, 0.02, n).astype(np.float32)
    return Quantized(rng.integers(-127, 128, (n, k)).astype(np.int8), scale)


def linear(name: str, weight: Tensor, m: int = 5) -> Graph:
    n, k = weight.shape
    tensors: dict[str, Tensor] = {"x": draw(m, k), "w": weight, "b": draw(n)}
    return Graph(name, Node("Linear", ("x", "w", "b"), ("y",), domain=OWN), tensors, ("x", "w", "b"))


MASK = np.array([[1, 0, 1], [0, 0, 0]], np.int64)  # the second text has no key: its gradients reach v alone


def attention(name: str, rows: int, keys: int, mask: np.ndarray | None = MASK, **attributes) -> Graph:
    """Two texts, two heads of width 5."""
    tensors: dict[str, Tensor] = {"q": draw(2, rows, 10), "k": draw(2, keys, 10, seed=1), "v": draw(2, keys, 10, seed=2)}
    constants: dict[str, Tensor] = {} if mask is None else {"mask": Dense(mask)}
    inputs = ("q", "k", "v", *constants)
    node = Node("MaskedAttention", inputs, ("y",), {"heads": 2, **attributes}, OWN)
    return Graph(name, node, tensors, ("q", "k", "v"), constants=constants)


def positive(*shape: int, seed: int = 0) -> Dense:
    """Values that logarithms and roots take, away from 0."""
    return Dense((0.5 + np.abs(draw(*shape, seed=seed).array)).astype(np.float32))


def unary(op: str, x: Dense, **attributes: float) -> Graph:
    return Graph(op.lower(), Node(op, ("x",), ("y",), attributes), {"x": x}, ("x",))


def shaping(name: str, op: str, x: Dense, *vectors: tuple[int, ...], **attributes: object) -> Graph:
    """An operator on x whose other inputs are vectors of integers."""
    constants = {f"v{index}": Dense(np.array(vector, np.int64)) for index, vector in enumerate(vectors)}
    return Graph(name, Node(op, ("x", *constants), ("y",), attributes), {"x": x}, ("x",), constants=constants)


LABELS = Dense(np.array([0, 3, 2, 1, 3], np.int64))
INDICES = Dense(np.array([[0, 2, -1], [2, 2, 5]], np.int64))
TOKENS = Dense(np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.int64))
NORM = {"epsilon": 1e-5}

GRAPHS = [
    linear("linear", draw(7, 13)),
    linear("linear-one-row", draw(33, 20), m=1),
    linear("linear-wide", draw(70, 129), m=37),
    linear("linear-sparse-1x4", sparse(12, 32, (1, 4)), m=19),
    linear("linear-sparse-1x1", sparse(9, 21, (1, 1))),
    Graph("add", Node("Add", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": draw(4, 6, seed=1)}, ("a", "b")),
    Graph("add-broadcast", Node("Add", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": draw(6)}, ("a", "b")),
    Graph("mul", Node("Mul", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": draw(4, 6, seed=1)}, ("a", "b")),
    Graph("mul-broadcast", Node("Mul", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": draw(4, 1)}, ("a", "b")),
    Graph("identity", Node("Identity", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    Graph("relu", Node("Relu", ("x",), ("y",)), {"x": away_from_zero(5, 7)}, ("x",)),
    Graph("tanh", Node("Tanh", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    Graph("sigmoid", Node("Sigmoid", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    Graph("swish", Node("Swish", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    Graph("gelu", Node("Gelu", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    Graph("gelu-tanh", Node("Gelu", ("x",), ("y",), {"approximate": "tanh"}), {"x": draw(5, 7)}, ("x",)),
    Graph(
        "layer-normalization", Node("LayerNormalization", ("x", "g", "b"), ("y",), NORM),
        {"x": draw(5, 17), "g": draw(17), "b": draw(17, seed=1)}, ("x", "g", "b"),
    ),
    Graph("softmax", Node("Softmax", ("x",), ("y",)), {"x": draw(5, 7)}, ("x",)),
    attention("attention", 3, 3),
    attention("attention-cross", 5, 2, mask=None),
    attention("attention-long", 7, 61, mask=np.arange(122).reshape(2, 61) % 61 < 40, scale=0.5),
    Graph(
        "attention-packed",
        Node("PackedAttention", ("q", "k", "v", "offsets"), ("y",), {"heads": 2}, OWN),
        {"q": draw(9, 10), "k": draw(9, 10, seed=1), "v": draw(9, 10, seed=2)}, ("q", "k", "v"),
        constants={"offsets": Dense(np.array([0, 3, 3, 4, 8], np.int64))},
    ),
    Graph("gather", Node("Gather", ("t", "i"), ("y",)), {"t": draw(6, 20)}, ("t",), constants={"i": INDICES}),
    Graph(
        "gather-axis-1", Node("Gather", ("t", "i"), ("y",), {"axis": 1}), {"t": draw(3, 6, 5)}, ("t",), constants={"i": INDICES}
    ),
    *[
        Graph(
            f"masked-pool-{mode}", Node("MaskedPool", ("x", "mask"), ("y",), {"mode": mode}, OWN),
            {"x": draw(3, 4, 18)}, ("x",), constants={"mask": TOKENS},
        )
        for mode in ("mean", "sqrt", "weighted", "max", "first")
    ],
    *[
        Graph(
            f"packed-pool-{mode}", Node("PackedPool", ("x", "offsets"), ("y",), {"mode": mode}, OWN),
            {"x": draw(9, 18)}, ("x",), constants={"offsets": Dense(np.array([0, 3, 3, 8], np.int64))},
        )
        for mode in ("mean", "sqrt", "weighted", "max", "first")
    ],
    Graph("lp-normalization", Node("LpNormalization", ("x",), ("y",), {"axis": -1, "p": 2}), {"x": draw(5, 19)}, ("x",)),
    Graph(
        "cosine-loss", Node("CosineLoss", ("x", "t"), ("loss",), domain=OWN), {"x": draw(5, 19), "t": draw(5, 19, seed=1)},
        ("x", "t"), scalar=True,
    ),
    Graph(
        "cross-entropy", Node("SoftmaxCrossEntropyLoss", ("x", "labels"), ("loss",)), {"x": draw(5, 4)}, ("x",),
        scalar=True, constants={"labels": LABELS},
    ),
    Graph(
        "mean-squared-error", Node("MeanSquaredError", ("x", "t"), ("loss",), domain=OWN), {"x": draw(5, 4)}, ("x",),
        scalar=True, constants={"t": draw(5, 4, seed=1)},
    ),
    Graph(
        "distillation",
        Node("DistillationLoss", ("x", "t", "labels"), ("loss",), {"temperature": 3.0, "alpha": 0.7}, OWN),
        {"x": draw(5, 4)}, ("x",), scalar=True, constants={"labels": LABELS, "t": draw(5, 4, seed=1)},
    ),
    *(unary(op, away_from_zero(5, 7)) for op in ("Abs", "Cos", "Erf", "Exp", "Neg", "Sin", "Softplus")),
    *(unary(op, positive(5, 7)) for op in ("Log", "Reciprocal", "Sqrt")),
    unary("Elu", away_from_zero(5, 7), alpha=0.7),
    unary("LeakyRelu", away_from_zero(5, 7), alpha=0.2),
    Graph("cast", Node("Cast", ("x",), ("y",), {"to": "float32"}), {"x": draw(4, 6)}, ("x",)),
    Graph("sub", Node("Sub", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": draw(4, 6, seed=1)}, ("a", "b")),
    Graph("sub-broadcast", Node("Sub", ("a", "b"), ("y",)), {"a": draw(6), "b": draw(4, 6)}, ("a", "b")),
    Graph("div", Node("Div", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": positive(4, 6, seed=1)}, ("a", "b")),
    Graph("div-broadcast", Node("Div", ("a", "b"), ("y",)), {"a": draw(4, 6), "b": positive(4, 1)}, ("a", "b")),
    Graph(
        "pow", Node("Pow", ("x", "e"), ("y",)), {"x": positive(4, 6)}, ("x",),
        constants={"e": Dense(np.array([2.0, 0.5, -1.0, 3.0, 1.0, 0.0], np.float32))},
    ),
    shaping("reduce-mean", "ReduceMean", draw(3, 4, 5), (-1,)),
    shaping("reduce-mean-all", "ReduceMean", draw(3, 4), keepdims=0),
    shaping("reduce-sum", "ReduceSum", draw(3, 4, 5), (0, 2), keepdims=0),
    shaping("reshape", "Reshape", draw(4, 6), (0, 2, -1)),
    shaping("flatten", "Flatten", draw(2, 3, 4), axis=2),
    shaping("squeeze", "Squeeze", draw(2, 1, 3, 1), (1, -1)),
    shaping("unsqueeze", "Unsqueeze", draw(2, 3), (0, 3)),
    shaping("transpose", "Transpose", draw(3, 5)),
    shaping("transpose-last", "Transpose", draw(2, 3, 5), perm=(0, 2, 1)),
    shaping("transpose-heads", "Transpose", draw(2, 3, 4, 5), perm=(0, 2, 1, 3)),
    shaping("slice", "Slice", draw(5, 7), (1, -1), (4, -8), (0, 1), (1, -2)),
    shaping("expand", "Expand", draw(3, 1), (2, 1, 4)),
    Graph(
        "concat", Node("Concat", ("a", "b", "c"), ("y",), {"axis": 1}),
        {"a": draw(3, 2), "b": draw(3, 1), "c": draw(3, 4)}, ("a", "c"),
    ),
    Graph("matmul", Node("MatMul", ("a", "b"), ("y",)), {"a": draw(3, 5), "b": draw(5, 4)}, ("a", "b")),
    Graph("matmul-batched", Node("MatMul", ("a", "b"), ("y",)), {"a": draw(2, 3, 4, 5), "b": draw(2, 3, 5, 6)}, ("a", "b")),
    Graph("matmul-broadcast", Node("MatMul", ("a", "b"), ("y",)), {"a": draw(2, 1, 4, 5), "b": draw(3, 5, 6)}, ("a", "b")),
    Graph("softmax-axis", Node("Softmax", ("x",), ("y",), {"axis": 1}), {"x": draw(2, 5, 3)}, ("x",)),
]  # fmt: skip

# Straight-through gradients of rounded weights: no finite difference of the rounded forward pass can confirm them, so they
# are held against the same graph with the rounding left out.
INT8_GRAPHS = [
    linear("linear-int8", quantized(12, 20), m=9),
    linear("linear-sparse-int8", int8(sparse(12, 32, (1, 4))), m=19),
    linear("linear-bitmask-int8", bitmask(quantized(19, 35)), m=3),
    linear("linear-bitmask-int4", bitmask(Int4.from_dense(draw(19, 75).array, 32)), m=14),
]
