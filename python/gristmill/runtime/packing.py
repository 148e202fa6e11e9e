"""Encoders over packed sentences: a graph over [batch, sequence] becomes one over rows, in which no padding is computed.

Everything in an encoder treats tokens alone but attention and pooling; these have forms that read where each sentence begins.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model, leading_to
from gristmill.ops import OWN, Node, TensorType, find
from gristmill.ops.activation import Activation
from gristmill.zoo.bert import IDS, MASK, TYPES

PLACES, OFFSETS = "position_ids", "offsets"
SENTENCE, TOKENS = "sentence_embedding", "last_hidden_state"
ROW = TensorType(np.dtype(np.int64), ("rows",))
PLACE = TensorType(np.dtype(np.int64), ("batch", "sequence"))
LAST_AXIS = ("LayerNormalization", "LpNormalization", "Softmax")


def sentence_model(model: Model) -> Model:
    """Return the part of an encoder that makes one vector for each sentence; the mean of tokens' vectors where there is none.

    Raises:
        ModelError: it has no such output, or takes inputs that sentences do not give.
    """
    known = {IDS, MASK, TYPES, PLACES}
    if IDS not in model.inputs or not model.inputs.keys() <= known:
        raise ModelError(
            f"to embed, a model must take {IDS} and no more than {sorted(known)}; this one takes {list(model.inputs)}"
        )
    output = next((name for name in (SENTENCE, TOKENS) if name in model.outputs), model.outputs[0])
    kind = model.types[output]
    if kind.dtype != np.float32 or len(kind.shape) not in (2, 3) or not isinstance(kind.shape[-1], int):
        raise ModelError(f"output '{output}' is {kind}, which is no vector for a sentence or its tokens")
    nodes = model.nodes
    if len(kind.shape) == 3:
        if MASK not in model.inputs:
            raise ModelError(f"output '{output}' has a vector for each token, and no {MASK} says which to take the mean of")
        pool = Node("MaskedPool", (output, MASK), ("mean_of_tokens",), {"mode": "mean"}, OWN)
        nodes, output = (*nodes, pool), "mean_of_tokens"
    return _part(Model(nodes, model.tensors, model.inputs, (output,), model.meta))


def _part(model: Model) -> Model:
    """Leave out what the outputs do not depend on."""
    kept = leading_to(model.nodes, model.outputs)
    wanted = {*model.outputs, *(name for node in kept for name in node.inputs)}
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in wanted}
    return Model(tuple(kept), tensors, model.inputs, model.outputs, model.meta)


def counting(model: Model) -> tuple[int, int | None]:
    """Return where an encoder's places start, and the id that they leave out, as its Positions node says."""
    found = {(n.attributes.get("start", 0), n.attributes.get("padding")) for n in model.nodes if n.op == "Positions"}
    if len(found) > 1:
        raise ModelError("the model counts places in more than one way")
    return found.pop() if found else (0, None)


def packed(model: Model) -> Model:
    """Return an encoder's twin over packed sentences, with the same tensors.

    Its inputs are int64: `input_ids`, `token_type_ids` and `position_ids` [rows], of these what it reads, and `offsets`
    [segments + 1], where each sentence begins, and the last ends. Its output is one vector for each segment; that of an empty one
    means nothing, and rows past the last offset have no influence.

    Raises:
        ModelError: a node mixes tokens in a way that has no packed form.

    Example:
        >>> import gristmill as gm
        >>> list(packed(gm.zoo.bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=9)).inputs)
        ['input_ids', 'token_type_ids', 'position_ids', 'offsets']
    """
    return _Packer(model).model()


class _Packer:
    """Follows the values that have one row for each token, `tokens`, through a graph."""

    def __init__(self, source: Model) -> None:
        self.source = source
        self.alias: dict[str, str] = {}
        self.tokens = {name for name in (IDS, TYPES, PLACES) if name in source.inputs}
        self.nodes = [made for node in source.nodes for made in self._convert(node)]

    def model(self) -> Model:
        if any(name in self.tokens for name in self.source.outputs):
            raise ModelError(f"outputs {self.source.outputs} have a vector for each token; packing needs one for each sentence")
        read = {name for node in self.nodes for name in node.inputs}
        inputs = {name: ROW for name in (IDS, TYPES, PLACES) if name in read}
        inputs[OFFSETS] = TensorType(ROW.dtype, ("ends",))
        return Model(tuple(self.nodes), self.source.tensors, inputs, self.source.outputs, self.source.meta)

    def _convert(self, node: Node) -> list[Node]:
        if node.op == "Positions" and node.inputs[0] == IDS:
            counting(self.source)
            self.alias[node.name] = PLACES
            self.tokens.update((PLACES, node.name))
            return []
        convert = FORMS.get((node.domain, node.op))
        if convert is not None and node.inputs[0] in self.tokens:
            return [convert(self, node)]
        node = replace(node, inputs=tuple(self.alias.get(name, name) for name in node.inputs))
        if not self.tokens.intersection(node.inputs):
            self._demand(MASK not in node.inputs, node)
            return [node]
        self._demand(self._alone(node), node)
        self.tokens.update(node.outputs)
        if node.op in LAST_AXIS and "axis" in node.attributes:
            return [replace(node, attributes={**node.attributes, "axis": -1})]
        return [node]

    def _demand(self, fits: bool, node: Node) -> None:
        if not fits:
            raise ModelError(f"{node.op} '{node.name}' has no form for packed sentences")

    def _alone(self, node: Node) -> bool:
        """Whether a node treats every token by itself, whatever the rank of what holds them."""
        flags = [name in self.tokens for name in node.inputs if name]
        kinds = [self.source.types.get(name, PLACE) for name in node.inputs if name]
        if node.op == "Gather":
            return flags == [False, True] and node.attributes.get("axis", 0) == 0
        if node.op == "Linear":
            return flags[0] and all(flags[3:])
        if node.op in LAST_AXIS:
            return flags[0] and node.attributes.get("axis", -1) in (-1, len(kinds[0].shape) - 1) and len(kinds[0].shape) > 2
        if node.op in ("Add", "Sub", "Mul", "Div"):
            ranks = {len(kind.shape) for kind, token in zip(kinds, flags, strict=True) if token}
            return len(ranks) == 1 and all(token or len(kind.shape) <= 1 for kind, token in zip(kinds, flags, strict=True))
        return node.op == "Identity" or isinstance(find(node), Activation)

    def _attention(self, node: Node) -> Node:
        mask = node.input(3)
        self._demand(mask in ("", MASK) and all(name in self.tokens for name in node.inputs[:3]), node)
        self.tokens.update(node.outputs)
        return Node("PackedAttention", (*node.inputs[:3], OFFSETS), node.outputs, node.attributes, OWN)

    def _pool(self, node: Node) -> Node:
        self._demand(node.inputs[1] == MASK, node)
        return Node("PackedPool", (node.inputs[0], OFFSETS), node.outputs, node.attributes, OWN)


FORMS: dict[tuple[str, str], Callable[[_Packer, Node], Node]] = {
    (OWN, "MaskedAttention"): _Packer._attention,
    (OWN, "MaskedPool"): _Packer._pool,
}
