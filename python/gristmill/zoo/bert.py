"""Encoders of the BERT family: BERT, RoBERTa and DistilBERT differ in what they embed and in the heads on top.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers"; sentence vectors: Reimers and Gurevych 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model
from gristmill.ops import OWN, Node, TensorType
from gristmill.ops.token_pooling import MODES
from gristmill.tensor import Dense, Tensor

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "relu": ("Relu", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "silu": ("Swish", {}),
}


@dataclass(frozen=True)
class Projection:
    """A linear layer on the pooled vector: tensors `<name>.weight` [outputs, inputs] and, with a bias, `<name>.bias`."""

    name: str
    outputs: int
    activation: str | None = None
    bias: bool = True


@dataclass(frozen=True)
class Encoder:
    """The shape of an encoder.

    Args:
        layers, hidden, heads, intermediate: depth, width, attention heads, and the width inside feed-forward layers.
        vocabulary, positions, types: rows of the embedding tables; 0 types: there is no such table and no such input.
        activation: of the feed-forward layers.
        epsilon: of the layer normalisations.
        padding: the id of the padding token where places are counted without it, from `padding + 1` on (RoBERTa); else None.
        pooling: how tokens become one vector, a mode of `ops.token_pooling`; None: the output is one vector for each token.
        projections: layers after pooling, or on each token's vector.
        normalize: make sentence vectors unit vectors.
        output: the name of the output.
    """

    layers: int = 6
    hidden: int = 384
    heads: int = 12
    intermediate: int = 1536
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    padding: int | None = None
    pooling: str | None = "mean"
    projections: tuple[Projection, ...] = ()
    normalize: bool = True
    output: str = "sentence_embedding"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        n, wide = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocabulary, n),
            "embeddings.position_embeddings.weight": (self.positions, n),
            "embeddings.LayerNorm.weight": (n,),
            "embeddings.LayerNorm.bias": (n,),
        }
        if self.types:
            shapes["embeddings.token_type_embeddings.weight"] = (self.types, n)
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
                shapes |= {f"{at}.{name}.weight": (n, n), f"{at}.{name}.bias": (n,)}
            shapes |= {f"{at}.intermediate.dense.weight": (wide, n), f"{at}.intermediate.dense.bias": (wide,)}
            shapes |= {f"{at}.output.dense.weight": (n, wide), f"{at}.output.dense.bias": (n,)}
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                shapes |= {f"{at}.{name}.weight": (n,), f"{at}.{name}.bias": (n,)}
        for projection in self.projections:
            shapes[f"{projection.name}.weight"] = (projection.outputs, n)
            n = projection.outputs
            if projection.bias:
                shapes[f"{projection.name}.bias"] = (n,)
        return shapes


def bert(
    layers: int = 6,
    hidden: int = 384,
    heads: int = 12,
    intermediate: int | None = None,
    vocabulary: int = 30522,
    positions: int = 512,
    types: int = 2,
    activation: str = "gelu",
    epsilon: float = 1e-12,
    pooling: str | None = "mean",
    normalize: bool = True,
    classes: int | None = None,
    seed: int = 0,
) -> Model:
    """Build an encoder with random weights: normal with deviation 0.02 as BERT begins, biases 0.

    Inputs are int64 [batch, sequence]: `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and, unless `types` is 0,
    `token_type_ids`. The output is `sentence_embedding` [batch, hidden]; without pooling `last_hidden_state` [batch, sequence,
    hidden]; with classes `logits` [batch, classes].

    Args:
        layers: how many.
        hidden: the width; a multiple of `heads`.
        heads: of attention.
        intermediate: the width inside the feed-forward layers. Default: 4 * hidden.
        vocabulary: how many token ids there are.
        positions: the longest sequence.
        types: how many token types there are.
        activation: "gelu", "gelu_tanh", "relu", "tanh", "sigmoid" or "silu".
        epsilon: of the layer normalisations.
        pooling: "mean", "sqrt", "weighted", "max" or "first"; None for the vectors of the tokens.
        normalize: make the sentence vectors unit vectors.
        classes: put a classifier on the pooled vector.
        seed: of the weights.

    Raises:
        ModelError: an argument does not fit.

    Example:
        >>> bert(layers=1, hidden=8, heads=2, vocabulary=50, positions=16).outputs
        ('sentence_embedding',)
    """
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "vocabulary": vocabulary, "positions": positions}
    sizes |= {"intermediate": 4 * hidden if intermediate is None else intermediate, "classes": 1 if classes is None else classes}
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ModelError(f"{name} must be a positive whole number, got {size!r}")
    for name, size in {"types": types, "seed": seed}.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 0:
            raise ModelError(f"{name} must be a whole number from 0, got {size!r}")
    if pooling is None and classes is not None:
        raise ModelError("a classifier needs a pooled vector: choose a pooling")
    output = "logits" if classes is not None else "last_hidden_state" if pooling is None else "sentence_embedding"
    shape = Encoder(
        layers, hidden, heads, sizes["intermediate"], vocabulary, positions, types, activation, epsilon,
        pooling=pooling, projections=() if classes is None else (Projection("classifier", classes),),
        normalize=bool(normalize) and classes is None, output=output,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, extents in shape.tensors().items():
        if len(extents) == 2:
            values = rng.standard_normal(extents, np.float32) * np.float32(0.02)
        else:
            values = np.full(extents, float(name.endswith("LayerNorm.weight")), np.float32)
        tensors[name] = Dense(values)
    return encoder(shape, tensors)


def encoder(shape: Encoder, tensors: Mapping[str, Tensor]) -> Model:
    """Build the graph over tensors of the names and shapes that `shape.tensors()` lists.

    Raises:
        ModelError: the shape is not possible, or a tensor does not fit.
    """
    _check(shape)
    graph = _Graph(shape)
    value = graph.embed()
    for layer in range(shape.layers):
        value = graph.layer(f"encoder.layer.{layer}", value)
    output = graph.rename(graph.head(value), shape.output)
    kind = TensorType(np.dtype(np.int64), ("batch", "sequence"))
    inputs = dict.fromkeys((IDS, MASK, TYPES)[: 3 if shape.types else 2], kind)
    return Model(tuple(graph.nodes), {name: tensors[name] for name in shape.tensors()}, inputs, (output,))


def _check(shape: Encoder) -> None:
    if shape.hidden % shape.heads:
        raise ModelError(f"hidden ({shape.hidden}) must be a multiple of heads ({shape.heads})")
    for activation in (shape.activation, *(p.activation for p in shape.projections)):
        if activation is not None and activation not in ACTIVATIONS:
            raise ModelError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if shape.pooling is not None and shape.pooling not in MODES:
        raise ModelError(f"unknown pooling {shape.pooling!r}; choose one of {', '.join(MODES)}")


class _Graph:
    """The nodes of an encoder; every method appends some and returns the name of the value that they make."""

    def __init__(self, shape: Encoder) -> None:
        self.shape = shape
        self.nodes: list[Node] = []

    def node(self, op: str, inputs: tuple[str, ...], output: str, domain: str = "", **attributes: int | float | str) -> str:
        self.nodes.append(Node(op, inputs, (output,), attributes, domain))
        return output

    def rename(self, value: str, name: str) -> str:
        """Let the last node, which makes a value, make it under another name."""
        assert self.nodes[-1].outputs == (value,)
        self.nodes[-1] = replace(self.nodes[-1], outputs=(name,))
        return name

    def linear(self, at: str, x: str, bias: bool = True) -> str:
        return self.node("Linear", (x, f"{at}.weight", f"{at}.bias") if bias else (x, f"{at}.weight"), at, OWN)

    def activation(self, kind: str, x: str) -> str:
        op, attributes = ACTIVATIONS[kind]
        return self.node(op, (x,), f"{x}.{kind}", **attributes)

    def norm(self, at: str, x: str) -> str:
        return self.node("LayerNormalization", (x, f"{at}.weight", f"{at}.bias"), at, epsilon=self.shape.epsilon)

    def embed(self) -> str:
        words = self.node("Gather", ("embeddings.word_embeddings.weight", IDS), "embeddings.words")
        counting = {"limit": self.shape.positions}
        if self.shape.padding is not None:
            counting = {"start": self.shape.padding + 1, "padding": self.shape.padding}
        places = self.node("Positions", (IDS,), "position_ids", OWN, **counting)
        at = self.node("Gather", ("embeddings.position_embeddings.weight", places), "embeddings.positions")
        total = self.node("Add", (words, at), "embeddings.placed")
        if self.shape.types:
            types = self.node("Gather", ("embeddings.token_type_embeddings.weight", TYPES), "embeddings.types")
            total = self.node("Add", (total, types), "embeddings.sum")
        return self.norm("embeddings.LayerNorm", total)

    def layer(self, at: str, x: str) -> str:
        query, key, value = (self.linear(f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        scale = 1.0 / sqrt(self.shape.hidden // self.shape.heads)
        mixed = self.node(
            "MaskedAttention", (query, key, value, MASK), f"{at}.attention.self", OWN, heads=self.shape.heads, scale=scale
        )
        x = self.add_and_norm(f"{at}.attention.output", mixed, x)
        wide = self.activation(self.shape.activation, self.linear(f"{at}.intermediate.dense", x))
        return self.add_and_norm(f"{at}.output", wide, x)

    def add_and_norm(self, at: str, x: str, residual: str) -> str:
        total = self.node("Add", (self.linear(f"{at}.dense", x), residual), f"{at}.sum")
        return self.norm(f"{at}.LayerNorm", total)

    def head(self, value: str) -> str:
        if self.shape.pooling is not None:
            value = self.node("MaskedPool", (value, MASK), "pooled", OWN, mode=self.shape.pooling)
        for projection in self.shape.projections:
            value = self.linear(projection.name, value, projection.bias)
            if projection.activation is not None:
                value = self.activation(projection.activation, value)
        return self.node("LpNormalization", (value,), "normalized", axis=-1, p=2) if self.shape.normalize else value
