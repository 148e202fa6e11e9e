"""Structured removal: whole layers of an encoder, and heads of its attention. What is left is a smaller dense model.

Layers: Fan, Grave & Joulin 2019, "Reducing transformer depth on demand"; students of every second layer: Sanh et al. 2019
(DistilBERT). Heads: Michel, Levy & Neubig 2019, "Are sixteen heads really better than one?".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gristmill.compression.calibration import batches, norms
from gristmill.compression.layers import EncoderLayer, encoder_layers, projections, readers_of
from gristmill.compression.prune import need_finite
from gristmill.compression.recipe import Context, Pass, is_number
from gristmill.errors import ModelError
from gristmill.model import Model, leading_to
from gristmill.ops import Node
from gristmill.tensor import BFloat16, Dense, Tensor
from gristmill.tensor.parts import Array
from gristmill.tensor.selection import dropped

Heads = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class RemoveLayers(Pass):
    """Remove whole layers of an encoder: its depth becomes less, its inputs and outputs stay as they are.

    The result is a student that `Distill` can train. Layers are found in the graph by their attention, whatever the nodes are
    called.

    Args:
        layers: the layers to remove, from 0; negative ones count from the end; or
        keep: the layers to keep; or
        every: remove every so manyth layer: 2 removes the second, the fourth, ..., and keeps every other.

    Raises:
        ModelError: not exactly one of the three is given; the model has no such layer, or no layer would be left; or its graph
            is no stack of layers.

    Example:
        >>> import gristmill as gm
        >>> model = gm.zoo.bert(layers=4, hidden=8, heads=2, vocabulary=50)
        >>> student, _ = gm.compress(model, [gm.RemoveLayers(every=2)])
        >>> sum(node.op == "MaskedAttention" for node in student.nodes)
        2
    """

    layers: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    every: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "keep"):
            given = getattr(self, name)
            numbers = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
            if not all(is_whole(number) for number in numbers):
                raise ModelError(f"RemoveLayers: {name} must be whole numbers, got {given!r}")
            object.__setattr__(self, name, numbers)
        if self.every is not None and not (is_whole(self.every) and self.every >= 2):
            raise ModelError(f"RemoveLayers: every must be a whole number from 2 on, got {self.every!r}")
        if sum((bool(self.layers), bool(self.keep), self.every is not None)) != 1:
            raise ModelError("RemoveLayers takes exactly one of layers, keep and every")

    def apply(self, model: Model, context: Context) -> Model:
        layers = encoder_layers(model)
        count = len(layers)
        if self.every is not None:
            gone = set(range(self.every - 1, count, self.every))
        elif self.keep:
            gone = set(range(count)) - {place(number, count, "RemoveLayers") for number in self.keep}
        else:
            gone = {place(number, count, "RemoveLayers") for number in self.layers}
        if not gone or len(gone) == count:
            raise ModelError(
                f"RemoveLayers would remove {len(gone)} of {count} layers; remove at least one and keep at least one"
            )
        return without_layers(model, [layers[number] for number in sorted(gone)])


@dataclass(frozen=True)
class RemoveHeads(Pass):
    """Remove heads of an encoder's attention: the matrices of queries, keys, values and of the output really shrink.

    Heads keep their size, and every layer at least one of them. Either `heads` says which go, or `fraction` how many: then those
    of the lowest scores go.

    Args:
        heads: the heads to remove by layer, both from 0: {0: (1, 3)}.
        fraction: the share of heads to remove, in (0, 1).
        method: what heads score: "magnitude", the root of the sum of squares of all its weights; "wanda", the norm of
            its part of the output projection with each input multiplied by its norm over calibration data, which estimates how
            much the head adds to the output.
        scope: what is ranked together: the heads of each "layer", or all, "global".
        calibration: for "wanda": "data" (the default) for the data that `compress` is given, a mapping of inputs, or an iterable
            of such batches.

    Raises:
        ModelError: an option lies outside its range, the model has no such layer or head, its layers are not recognised, or their
            weights are shared, sparse or int8.
        DataError: calibration data are missing or do not fit.

    Example:
        >>> import gristmill as gm
        >>> model = gm.zoo.bert(layers=1, hidden=8, heads=4, vocabulary=50)
        >>> smaller, _ = gm.compress(model, [gm.RemoveHeads(fraction=0.5)])
        >>> smaller.tensors["encoder.layer.0.attention.self.query.weight"].shape
        (4, 8)
    """

    heads: dict[Any, Any] | Heads | None = None
    fraction: float | None = None
    method: str = "magnitude"
    scope: str = "layer"
    calibration: Any = None

    def __post_init__(self) -> None:
        if (self.heads is None) == (self.fraction is None):
            raise ModelError("RemoveHeads takes either heads or a fraction")
        if self.heads is not None:
            object.__setattr__(self, "heads", as_heads(self.heads))
        if self.fraction is not None and not (is_number(self.fraction) and 0 < self.fraction < 1):
            raise ModelError(f"RemoveHeads: fraction must lie in (0, 1), got {self.fraction!r}")
        if self.method not in ("magnitude", "wanda") or self.scope not in ("layer", "global"):
            raise ModelError(
                f"RemoveHeads: method is magnitude or wanda and scope layer or global, got {self.method!r} and {self.scope!r}"
            )
        if self.calibration is not None and self.method != "wanda":
            raise ModelError("RemoveHeads: calibration is for method='wanda'; magnitudes need no data")

    def apply(self, model: Model, context: Context) -> Model:
        layers = encoder_layers(model)
        if isinstance(self.heads, tuple):
            gone = dict.fromkeys(range(len(layers)), ())  # type: dict[int, tuple[int, ...]]
            for layer, heads in self.heads:
                gone[place(layer, len(layers), "RemoveHeads")] = heads
        else:
            gone = self._lowest(self._scores(model, layers, context))
        for number, heads in gone.items():
            if heads:
                model = without_heads(model, layers[number], heads)
        return model

    def _scores(self, model: Model, layers: list[EncoderLayer], context: Context) -> list[Array]:
        """Return the scores of the heads of every layer."""
        found = [projections(model, layer) for layer in layers]
        for nodes in found:
            for node in nodes:
                need_finite(model, node.inputs[1], "remove heads of")
        inputs: dict[str, Array] = {}
        if self.method == "wanda":
            given = "data" if self.calibration is None else self.calibration
            data = batches(model, given, context, "RemoveHeads")
            inputs = norms(model, [nodes[3].inputs[1] for nodes in found], data, context.threads, "RemoveHeads")
        return [head_scores(model, layer, nodes, inputs) for layer, nodes in zip(layers, found, strict=True)]

    def _lowest(self, scores: list[Array]) -> dict[int, tuple[int, ...]]:
        """Return the heads to remove by layer; the best one of every layer stays."""
        assert self.fraction is not None
        ranked = [(score, layer, head) for layer, each in enumerate(scores) for head, score in enumerate(each.tolist())]
        best = {(layer, int(each.argmax())) for layer, each in enumerate(scores)}
        groups = [ranked] if self.scope == "global" else [[e for e in ranked if e[1] == layer] for layer in range(len(scores))]
        gone: list[tuple[int, int]] = []
        for group in groups:
            free = [(layer, head) for _, layer, head in sorted(group) if (layer, head) not in best]
            gone += free[: dropped(self.fraction, len(group))]
        if not gone:
            raise ModelError(f"RemoveHeads: a fraction of {self.fraction} of {[len(each) for each in scores]} heads is none")
        return {layer: tuple(sorted(h for at, h in gone if at == layer)) for layer in range(len(scores))}


def is_whole(value: Any) -> bool:
    return is_number(value) and int(value) == value


def as_heads(heads: Any) -> Heads:
    """Return heads by layer as pairs.

    Raises:
        ModelError: they are none.
    """
    try:
        pairs = heads.items() if isinstance(heads, Mapping) else heads
        made = tuple((int(layer), tuple(sorted({int(head) for head in each}))) for layer, each in pairs)
    except (TypeError, ValueError) as error:
        raise ModelError(f"RemoveHeads: heads must map layers to heads, such as {{0: (1, 3)}}, got {heads!r}") from error
    if not any(each for _, each in made) or len({layer for layer, _ in made}) < len(made):
        raise ModelError(f"RemoveHeads: heads must name each layer once, and at least one head; got {heads!r}")
    return made


def place(number: int, count: int, what: str) -> int:
    """Return a layer's number from 0.

    Raises:
        ModelError: there is no such layer.
    """
    if not -count <= number < count:
        raise ModelError(f"{what}: the model has layers 0 to {count - 1}, there is no layer {number}")
    return int(number) % count


def without_layers(model: Model, gone: list[EncoderLayer]) -> Model:
    """Return a model in which the input of each of the layers takes the place of its output."""
    removed = {node.name for layer in gone for node in layer.nodes}
    instead: dict[str, str] = {}
    for layer in gone:
        instead[layer.output] = instead.get(layer.input, layer.input)
    nodes = [
        replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs))
        for node in model.nodes
        if node.name not in removed
    ]
    nodes += [Node("Identity", (instead[name],), (name,)) for name in model.outputs if name in instead]
    lost = {name for node in model.nodes if node.name in removed for name in node.outputs} - instead.keys()
    if lost & set(model.outputs):
        raise ModelError(f"RemoveLayers: {sorted(lost & set(model.outputs))}, which the model returns, lie inside removed layers")
    return with_used_tensors(replace(model, nodes=tuple(leading_to(nodes, model.outputs))))


def with_used_tensors(model: Model) -> Model:
    """Return the model without the tensors that nothing reads."""
    used = {name for node in model.nodes for name in node.inputs} | set(model.outputs)
    return replace(model, tensors={name: tensor for name, tensor in model.tensors.items() if name in used})


def head_scores(model: Model, layer: EncoderLayer, nodes: tuple[Node, Node, Node, Node], inputs: Mapping[str, Array]) -> Array:
    """Return the score of each head, float64 [heads]."""
    heads = layer.attention.attributes["heads"]
    *into, output = (model.tensors[node.inputs[1]].dense().astype(np.float64) for node in nodes)
    by_input = output**2  # [columns out, heads * size]
    if inputs:
        by_input = by_input * inputs[nodes[3].inputs[1]].astype(np.float64) ** 2
        return np.asarray(np.sqrt(by_input.sum(axis=0).reshape(heads, -1).sum(axis=1)))
    squares = by_input.sum(axis=0).reshape(heads, -1).sum(axis=1)
    for weight in into:
        squares = squares + (weight**2).reshape(heads, -1).sum(axis=1)
    return np.asarray(np.sqrt(squares))


def without_heads(model: Model, layer: EncoderLayer, gone: tuple[int, ...]) -> Model:
    """Return a model without some heads of a layer.

    Raises:
        ModelError: there are no such heads, or the weights around the attention cannot be cut.
    """
    name = layer.attention.name
    attention = next(node for node in model.nodes if node.name == name)
    heads = attention.attributes["heads"]
    if not all(0 <= head < heads for head in gone) or len(gone) >= heads:
        raise ModelError(
            f"RemoveHeads: attention '{name}' has heads 0 to {heads - 1} and keeps at least one, cannot remove {gone}"
        )
    *into, output = projections(model, replace(layer, attention=attention))
    width = model.tensors[output.inputs[1]].shape[1]
    kept = np.delete(np.arange(width).reshape(heads, -1), gone, axis=0).reshape(-1)
    tensors: dict[str, Tensor] = {output.inputs[1]: cut(model, output.inputs[1], kept, 1, name)}
    for node in into:
        for tensor in filter(None, (node.inputs[1], node.input(2))):
            tensors[tensor] = cut(model, tensor, kept, 0, name)
    if any(node.input(3) for node in into):
        raise ModelError(f"RemoveHeads: something is added to the queries, keys or values of attention '{name}'")
    attributes = {
        **attention.attributes,
        "heads": heads - len(gone),
        "scale": float(attention.attributes.get("scale", (width // heads) ** -0.5)),
    }
    smaller = replace(attention, attributes=attributes)
    return model.replace(nodes=tuple(smaller if node.name == name else node for node in model.nodes), tensors=tensors)


def cut(model: Model, name: str, kept: Array, axis: int, where: str) -> Tensor:
    """Return a tensor with the kept rows or columns only.

    Raises:
        ModelError: it is compressed, or several nodes read it.
    """
    tensor = model.tensors[name]
    if not isinstance(tensor, (Dense, BFloat16)):
        raise ModelError(f"RemoveHeads: '{name}' is {tensor.kind}; remove heads before Prune and Quantize")
    if len(readers_of(model)[name]) > 1:
        raise ModelError(f"RemoveHeads: '{name}' of attention '{where}' is shared by several nodes")
    left = np.take(tensor.dense(), kept, axis)
    return BFloat16.from_dense(left) if isinstance(tensor, BFloat16) else Dense(left)
