"""Losses by name: what they add to a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.model import Model, check_model
from gristmill.ops import OWN, Node, TensorType

LABELS = "labels"
TARGET = "target"
TEACHER = "teacher"
LOSS = "loss"


@dataclass(frozen=True)
class Loss:
    """An operator that ends a training graph.

    Args:
        op: its name; `domain` its domain.
        extra: the inputs it takes beside the model's output.
        attributes: its options.
    """

    op: str
    extra: tuple[str, ...]
    domain: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


def distillation(temperature: float = 2.0, alpha: float = 0.5) -> Loss:
    """The loss of knowledge distillation: inputs `teacher` (logits) and `labels` beside the student's own."""
    attributes = {"temperature": float(temperature), "alpha": float(alpha)}
    return Loss("DistillationLoss", (TEACHER, LABELS), OWN, attributes)


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

    `cross_entropy` adds input `labels` (int64 [batch]), `mse` and `cosine` add `target` (as the output), distillation `teacher` and `labels`.

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
    output = model.types[model.outputs[0]]
    kinds = {LABELS: TensorType(np.dtype(np.int64), output.shape[:1]), TARGET: output, TEACHER: output}
    inputs = {**model.inputs, **{name: kinds[name] for name in chosen.extra}}
    node = Node(chosen.op, (model.outputs[0], *chosen.extra), (LOSS,), chosen.attributes, chosen.domain)
    return model.replace(nodes=(*model.nodes, node), inputs=inputs, outputs=(LOSS,))
