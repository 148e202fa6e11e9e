"""Losses by name: what they add to a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model, check_model
from gristmill.ops import OWN, Node, TensorType
from gristmill.tensor import Dense, Tensor

LABELS = "labels"
TARGET = "target"
TEACHER = "teacher"
LOSS = "loss"


@dataclass(frozen=True)
class Loss:
    """An operator that ends a training graph, or a weighted sum of such.

    Args:
        op: its name; `domain` its domain.
        extra: the inputs it takes beside the model's output.
        attributes: its options.
        terms: what a weighted sum adds up.
    """

    op: str
    extra: tuple[str, ...]
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple["Term", ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the loss in JSON-compatible terms, for `from_dict`."""
        terms = [{"value": term.value, "weight": term.weight, "loss": term.loss.as_dict()} for term in self.terms]
        return {
            "op": self.op,
            "extra": list(self.extra),
            "domain": self.domain,
            "attributes": dict(self.attributes),
            "terms": terms,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Loss":
        terms = tuple(Term(term["value"], cls.from_dict(term["loss"]), term["weight"]) for term in fields["terms"])
        return cls(fields["op"], tuple(fields["extra"]), fields["domain"], fields["attributes"], terms)


@dataclass(frozen=True)
class Term:
    """A part of a weighted sum: a loss on one value of the graph."""

    value: str
    loss: Loss
    weight: float


def distillation(temperature: float = 2.0, alpha: float = 0.5) -> Loss:
    """The loss of knowledge distillation: inputs `teacher` (logits) and `labels` beside the student's own."""
    attributes = {"temperature": float(temperature), "alpha": float(alpha)}
    return Loss("DistillationLoss", (TEACHER, LABELS), OWN, attributes)


def weighted(terms: Mapping[str, tuple[str | Loss, float]]) -> Loss:
    """The weighted sum of losses on several values of one graph, such as the hidden states of a student beside its output.

    Args:
        terms: by the name of a value, a loss and its weight. On a value that is no output the loss takes one target, as "mse" and
            "cosine" do: the target of value `v` is the input `target.v`. The model's own output may have any loss.

    Raises:
        ModelError: there are no terms, a loss is unknown, or a weight is not positive.

    Example:
        >>> import gristmill as gm
        >>> encoder = gm.zoo.bert(layers=2, hidden=8, heads=2, vocabulary=50, positions=16)
        >>> hidden = "encoder.layer.0.output.LayerNorm"
        >>> sorted(attach(encoder, weighted({"sentence_embedding": ("cosine", 1.0), hidden: ("mse", 0.1)})).inputs)[2:]
        ['target', 'target.encoder.layer.0.output.LayerNorm', 'token_type_ids']
    """
    made = tuple(Term(value, find(loss), float(weight)) for value, (loss, weight) in terms.items())
    for term in made:
        if term.loss.terms or not (isfinite(term.weight) and term.weight > 0):
            raise ModelError(f"the loss on '{term.value}' must be a single one with a positive weight, got {term}")
    if not made:
        raise ModelError("a weighted loss needs at least one term")
    return Loss("WeightedSum", tuple(dict.fromkeys(name for term in made for name in term.loss.extra)), OWN, terms=made)


LOSSES = {
    "cross_entropy": Loss("SoftmaxCrossEntropyLoss", (LABELS,)),
    "mse": Loss("MeanSquaredError", (TARGET,), OWN),
    "cosine": Loss("CosineLoss", (TARGET,), OWN),
}


def find(loss: str | Loss) -> Loss:
    """Return a loss by name.

    Raises:
        ModelError: there is none of that name.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ModelError(f"unknown loss {loss!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[loss]


def attach(model: Model, loss: str | Loss) -> Model:
    """Return the model with output `loss` alone, the mean over the batch; labels or targets become inputs.

    `cross_entropy` adds input `labels` (int64 [batch]), `mse` and `cosine` add `target` (as the output), distillation `teacher`
    and `labels`, a weighted sum a target for each of its terms.

    Raises:
        ModelError: the model has more than one output, or the loss does not fit it.

    Example:
        >>> import gristmill as gm
        >>> sorted(attach(gm.zoo.mlp([4, 3]), "cross_entropy").inputs)
        ['labels', 'x']
    """
    chosen = find(loss)
    if len(check_model(model).outputs) != 1:
        raise ModelError(f"a loss needs a model with one output, this one has {model.outputs}")
    if chosen.terms:
        return _attach_terms(model, chosen.terms)
    value = model.outputs[0]
    node = Node(chosen.op, (value, *chosen.extra), (LOSS,), chosen.attributes, chosen.domain)
    inputs = {**model.inputs, **_extra_inputs(model, value, chosen)}
    return model.replace(nodes=(*model.nodes, node), inputs=inputs, outputs=(LOSS,))


def target_of(model: Model, value: str) -> str:
    """Return the name of the input that holds the target of a value of the graph."""
    return TARGET if value == model.outputs[0] else f"{TARGET}.{value}"


def _extra_inputs(model: Model, value: str, loss: Loss) -> dict[str, TensorType]:
    """Return the inputs that a loss on a value adds, in the order in which it takes them."""
    if value not in model.types or value in model.inputs:
        raise ModelError(f"a loss was asked for on '{value}', which no node of the model makes")
    kind = model.types[value]
    if value != model.outputs[0] and loss.extra != (TARGET,):
        raise ModelError(f"only a loss with one target goes with '{value}', which is not the model's output; got {loss.op}")
    kinds = {LABELS: TensorType(np.dtype(np.int64), kind.shape[:1]), TARGET: kind, TEACHER: kind}
    return {target_of(model, value) if name == TARGET else name: kinds[name] for name in loss.extra}


def _attach_terms(model: Model, terms: tuple[Term, ...]) -> Model:
    """Append each term, times its weight, and their sum."""
    nodes, inputs, total = list(model.nodes), dict(model.inputs), ""
    tensors: dict[str, Tensor] = {}
    for index, term in enumerate(terms):
        extra = _extra_inputs(model, term.value, term.loss)
        inputs |= extra
        own, part, weight = f"{LOSS}.{index}", f"{LOSS}.{index}.weighted", f"{LOSS}.{index}.weight"
        tensors[weight] = Dense(np.asarray(term.weight, np.float32))
        nodes.append(Node(term.loss.op, (term.value, *extra), (own,), term.loss.attributes, term.loss.domain))
        nodes.append(Node("Mul", (own, weight), (part,)))
        if total:
            nodes.append(Node("Add", (total, part), (f"{LOSS}.sum.{index}",)))
        total = f"{LOSS}.sum.{index}" if total else part
    nodes[-1] = replace(nodes[-1], outputs=(LOSS,))
    return Model(tuple(nodes), {**model.tensors, **tensors}, inputs, (LOSS,), model.meta)
