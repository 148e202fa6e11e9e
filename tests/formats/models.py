"""Small models that hold every kind of tensor, built from plain arrays."""

import numpy as np

from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Bitmask, Dense, Quantized, Sparse, Tensor

F32 = np.dtype(np.float32)


def blocks(dtype: str = "float32") -> Sparse:
    """An [8, 12] matrix of 2x4 blocks, one row group empty."""
    rng = np.random.default_rng(1)
    values = rng.integers(-9, 10, (5, 2, 4)).astype(dtype)
    scale = np.linspace(0.5, 1.5, 8, dtype=np.float32) if dtype == "int8" else None
    offsets, index = np.array([0, 2, 2, 3, 5], np.int32), np.array([0, 2, 1, 0, 1], np.int32)
    return Sparse((8, 12), values, offsets, index, scale)


COLUMNS = (3, 0, 7, 2, 5, 6)  # of the elements of `unstructured`


def unstructured() -> Bitmask:
    """A [5, 8] matrix with six elements."""
    bits = np.array([[0b1000], [0], [0b10000001], [0b100], [0b1100000]], np.uint8)
    return Bitmask((5, 8), bits, np.arange(1, 7, dtype=np.float32), np.array([0, 1, 1, 3, 4, 6]))


def quantized() -> Quantized:
    rng = np.random.default_rng(2)
    return Quantized(rng.integers(-127, 128, (12, 6)).astype(np.int8), rng.random(12, np.float32) + 0.1)


def every_kind() -> Model:
    """x [batch, 6] -> quantized [12] -> int8 blocks [8] -> unstructured [5] -> normalised, with odd but legal extras."""
    tensors: dict[str, Tensor] = {
        "a.weight": quantized(),
        "a.bias": Dense(np.linspace(-1, 1, 12, dtype=np.float32)),
        "b.weight": blocks("int8"),
        "c.weight": unstructured(),
        "norm": Dense(np.ones(5, np.float32)),
    }
    nodes = (
        Node("Linear", ("x", "a.weight", "a.bias"), ("a",), domain=OWN),
        Node("Relu", ("a",), ("a.relu",)),
        Node("Linear", ("a.relu", "b.weight"), ("b",), domain=OWN),
        Node("Linear", ("b", "c.weight"), ("c",), domain=OWN),
        Node("LayerNormalization", ("c", "norm"), ("y",), {"epsilon": 1e-6, "axis": -1}),
    )
    meta = {"name": "everything", "trained": {"epochs": 3, "loss": [0.5, 0.25, 1 / 3]}, "text": "größe"}
    return Model(nodes, tensors, {"x": TensorType(F32, ("batch", 6))}, ("y", "b"), meta)
