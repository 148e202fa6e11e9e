"""The multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Dense, Tensor

ACTIVATIONS = {
    "relu": ("Relu", 2.0),
    "gelu": ("Gelu", 2.0),
    "tanh": ("Tanh", 1.0),
    "sigmoid": ("Sigmoid", 1.0),
    "silu": ("Swish", 2.0),
}


def mlp(sizes: Sequence[int], activation: str = "relu", seed: int = 0, layer_norm: bool = False) -> Model:
    """Build a perceptron with input `x` float32 [batch, sizes[0]] and output `logits` [batch, sizes[-1]].

    Weights are normal with variance gain / inputs (He et al. 2015; gain 2 for relu, gelu and silu, 1 otherwise), biases 0.

    Args:
        sizes: the width of each layer, input first.
        activation: "relu", "gelu", "tanh", "sigmoid" or "silu", between layers.
        seed: of the initial weights.
        layer_norm: normalise before each activation.

    Raises:
        ModelError: fewer than two sizes, a size that is no whole number from 1, or an unknown activation or seed.

    Example:
        >>> mlp([64, 512, 256, 10]).weights
        ('layer0.weight', 'layer1.weight', 'layer2.weight')
    """
    widths = list(sizes) if isinstance(sizes, (Sequence, np.ndarray)) else []
    if len(widths) < 2 or not all(isinstance(size, (int, np.integer)) and size >= 1 for size in widths):
        raise ModelError(f"an mlp needs a list of at least two sizes, positive whole numbers, got {sizes!r}")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ModelError(f"seed must be a whole number of at least 0, got {seed!r}")
    if activation not in tuple(ACTIVATIONS):
        raise ModelError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    op, gain = ACTIVATIONS[activation]
    rng = np.random.default_rng(seed)
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    value, last = "x", len(widths) - 2
    for layer, (k, n) in enumerate(pairwise(map(int, widths))):
        weight, bias = f"layer{layer}.weight", f"layer{layer}.bias"
        tensors[weight] = Dense((rng.standard_normal((n, k)) * sqrt(gain / k)).astype(np.float32))
        tensors[bias] = Dense(np.zeros(n, np.float32))
        made = "logits" if layer == last else f"layer{layer}"
        nodes.append(Node("Linear", (value, weight, bias), (made,), domain=OWN))
        value = made
        if layer == last:
            break
        if layer_norm:
            scale, shift = f"layer{layer}.norm.weight", f"layer{layer}.norm.bias"
            tensors |= {scale: Dense(np.ones(n, np.float32)), shift: Dense(np.zeros(n, np.float32))}
            nodes.append(Node("LayerNormalization", (value, scale, shift), (f"{value}.norm",)))
            value = f"{value}.norm"
        nodes.append(Node(op, (value,), (f"{value}.{activation}",)))
        value = f"{value}.{activation}"
    inputs = {"x": TensorType(np.dtype(np.float32), ("batch", int(widths[0])))}
    return Model(tuple(nodes), tensors, inputs, ("logits",))
