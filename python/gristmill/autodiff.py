"""Reverse-mode differentiation as a transformation of models.

The result is an ordinary model: it computes the loss and the asked-for gradients, and a Session runs it like any other. Only
the part of the backward graph that reaches the asked-for tensors is built, which is what makes training a few of them small.
Reference: Baydin et al., "Automatic differentiation in machine learning: a survey", JMLR 18 (2018).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model, leading_to
from gristmill.ops import GRAD, Node, TensorType, find
from gristmill.tensor import Dense

SEED = "gradient_seed"


def gradient_name(tensor: str) -> str:
    """The output that holds the gradient of a tensor."""
    return f"gradient:{tensor}"


class _Tape:
    """The nodes of the backward graph while it is written."""

    def __init__(self, model: Model, wanted: set[str]) -> None:
        self.model = model
        self.wanted = wanted
        self.nodes: list[Node] = []
        self.gradients: dict[str, str] = {}

    def emit(self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None, domain: str = GRAD) -> str:
        name = f"gradient.{len(self.nodes)}.{op}"
        self.nodes.append(Node(op, tuple(inputs), (name,), attributes or {}, domain))
        return name

    def emit_all(self, op: str, inputs: Sequence[str], attributes: Mapping[str, Any], outputs: int) -> tuple[str, ...]:
        names = tuple(f"gradient.{len(self.nodes)}.{op}.{output}" for output in range(outputs))
        self.nodes.append(Node(op, tuple(inputs), names, attributes, GRAD))
        return names

    def wants(self, name: str) -> bool:
        return name in self.wanted

    def add(self, name: str, gradient: str) -> None:
        before = self.gradients.get(name)
        self.gradients[name] = gradient if before is None else self.emit("Add", [before, gradient], domain="")

    def type(self, name: str) -> TensorType:
        return self.model.types[name]


def gradients(model: Model, loss: str, wrt: Iterable[str]) -> Model:
    """Return a model that computes `loss` and, as outputs `gradient:<name>`, its gradient in each tensor of `wrt`.

    The gradient of a compressed tensor is that of its trainable part: the stored values of a float32 `Sparse`, a gain on the
    scales of anything int8 (straight through the rounding).

    Args:
        model: a graph that contains `loss`.
        loss: the name of a scalar value.
        wrt: names of float tensors of the model.

    Raises:
        ModelError: `loss` is no scalar, a name is no tensor or does not influence the loss, or an operator has no gradient.

    Example:
        >>> import gristmill as gm
        >>> from gristmill import losses
        >>> training = losses.attach(gm.zoo.mlp([4, 3]), "cross_entropy")
        >>> gradients(training, "loss", ["layer0.bias"]).outputs
        ('loss', 'gradient:layer0.bias')
    """
    wrt = list(dict.fromkeys(wrt))
    if loss not in model.types or model.types[loss].shape != ():
        raise ModelError(f"'{loss}' must be a scalar of the graph, got {model.types.get(loss)}")
    strangers = [name for name in wrt if name not in model.tensors]
    if strangers:
        raise ModelError(f"{strangers} are no tensors of the model; it has {sorted(model.tensors)}")
    tape = _Tape(model, _influenced(model, wrt))
    if loss in tape.wanted:
        tape.gradients[loss] = SEED
    for node in reversed(leading_to(model.nodes, [loss])):
        dy = tape.gradients.get(node.outputs[0])
        if dy is not None:
            find(node).gradient(node, tape, dy)
    lost = [name for name in wrt if name not in tape.gradients]
    if lost:
        raise ModelError(f"the loss does not depend on {lost}")
    return _assemble(model, loss, wrt, tape)


def _assemble(model: Model, loss: str, wrt: list[str], tape: _Tape) -> Model:
    """Name each gradient after its tensor, in the node that makes it: no copy, so that it lands where it is bound."""
    final: dict[str, str] = {}
    for name in wrt:
        value = tape.gradients[name]
        if value in final or value == SEED:  # as both terms of a sum do: the second gets a copy, and so does what is no node's
            value = tape.emit("Identity", [value], domain="")
        final[value] = gradient_name(name)
    rename = [
        Node(n.op, tuple(final.get(i, i) for i in n.inputs), tuple(final.get(o, o) for o in n.outputs), n.attributes, n.domain)
        for n in tape.nodes
    ]
    nodes = (*leading_to(model.nodes, [loss]), *rename)
    used = {name for node in nodes for name in node.inputs}
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in used}
    tensors[SEED] = Dense(np.ones((), np.float32))
    inputs = {name: kind for name, kind in model.inputs.items() if name in used}
    return Model(nodes, tensors, inputs, (loss, *map(gradient_name, wrt)), model.meta)


def _influenced(model: Model, wrt: Iterable[str]) -> set[str]:
    """Every value that depends on one of `wrt`, these included."""
    reached = set(wrt)
    for node in model.nodes:
        if reached.intersection(node.inputs):
            reached.update(node.outputs)
    return reached
