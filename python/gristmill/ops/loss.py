"""Losses, and the gradients of those that are one float32 scalar, the mean over the batch."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.ops.axes import at, first
from gristmill.ops.dtypes import is_float, narrow, wide
from gristmill.ops.normalization import log_softmax, softmax
from gristmill.ops.op import GRAD, OWN, Binder, Node, Op, Tape, TensorType, as_rows, need, same_dim, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

FLOAT = np.dtype(np.float32)
SCALAR = TensorType(FLOAT, ())


def check_labels(node: Node, logits: TensorType | None, labels: TensorType | None) -> None:
    assert logits is not None
    assert labels is not None
    need(logits.dtype == FLOAT and len(logits.shape) == 2, node, f"logits must be float32 [batch, classes], got {logits}")
    fits = labels.dtype == np.int64 and len(labels.shape) == 1 and same_dim(labels.shape[0], logits.shape[0])
    need(fits, node, f"labels must be int64 [{logits.shape[0]}], got {labels}")


def check_pair(node: Node, types: Sequence[TensorType | None]) -> None:
    x, target = types
    need(same_type(x, target), node, f"x is {x} but the target is {target}")
    assert x is not None
    need(x.dtype == FLOAT, node, f"x must be float32, got {x}")


def check_distillation(node: Node, logits: TensorType | None, teacher: TensorType | None, labels: TensorType | None) -> None:
    check_labels(node, logits, labels)
    need(same_type(logits, teacher), node, f"student logits are {logits} but teacher logits are {teacher}")
    need(node.attributes.get("temperature", 0) > 0, node, "temperature must be positive")
    need(0 <= node.attributes.get("alpha", -1) <= 1, node, "alpha must lie in [0, 1]")


class LossGrad(Op):
    """The gradient of a loss in its first input: inputs are the gradient of the loss, a scalar, and the loss's own inputs."""

    domain = GRAD
    loss: ClassVar[type[Op]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        need(types[0] == SCALAR, node, f"the gradient of a loss must be {SCALAR}, got {types[0]}")
        need(self.loss().infer(node, types[1:], constants[1:]) == [SCALAR], node, "only losses of one scalar have gradients")
        assert types[1] is not None
        return [types[1]]


def one_hot(labels: Array, classes: int) -> Array:
    """A row of NaN stands for a label outside [0, classes), as in the kernel."""
    rows = (labels[:, None] == np.arange(classes)).astype(np.float64)
    rows[(labels < 0) | (labels >= classes)] = np.nan
    return rows


def mean_cross_entropy(logits: Array, labels: Array) -> Any:
    picked = np.where(one_hot(labels, logits.shape[-1]) == 1, log_softmax(logits), 0.0).sum(axis=-1)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    return -np.where(valid, picked, np.nan).mean()


class Likelihood(Op):
    """The negative log likelihood of labels [batch, ...] under scores [batch, classes, ...].

    An optional third input weighs the classes; labels equal to `ignore_index` count for nothing; `reduction` is mean (default,
    over the weights), sum or none.
    """

    attributes = {"ignore_index": int, "reduction": str}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        scores, labels, weight = first(types), types[1], at(types, 2)
        assert labels is not None
        fits = len(scores.shape) >= 2 and len(labels.shape) == len(scores.shape) - 1 and is_float(scores.dtype)
        fits = fits and all(map(same_dim, labels.shape, (scores.shape[0], *scores.shape[2:])))
        wanted = f"[{', '.join(map(str, (*scores.shape[:1], *scores.shape[2:])))}]"
        need(
            fits and labels.dtype in (np.int32, np.int64),
            node,
            f"scores are {scores}, labels must be int64 {wanted}, got {labels}",
        )
        fits = weight is None or same_type(weight, TensorType(scores.dtype, scores.shape[1:2]))
        need(fits, node, f"scores are {scores} but the weights of the classes {weight}")
        reduction = node.attributes.get("reduction", "mean")
        need(reduction in ("mean", "sum", "none"), node, f"unknown reduction {reduction!r}")
        loss = TensorType(scores.dtype, labels.shape if reduction == "none" else ())
        return [loss, scores][: len(node.outputs)]

    def _loss(self, node: Node, log_probability: Array, inputs: Sequence[Any]) -> Array:
        """A label outside of the classes makes NaN."""
        labels, weight = inputs[1].astype(np.int64), at(inputs, 2)
        classes = log_probability.shape[1]
        known = (labels >= 0) & (labels < classes)
        index = np.where(known, labels, 0)
        picked = np.take_along_axis(log_probability, index[:, None], axis=1)[:, 0]
        share = np.ones(labels.shape) if weight is None else wide(weight).astype(np.float64)[index]
        loss = np.where(known, -picked * share, np.nan)
        if "ignore_index" in node.attributes:
            ignored = labels == node.attributes["ignore_index"]
            loss, share = np.where(ignored, 0.0, loss), np.where(ignored, 0.0, share)
        reduction = node.attributes.get("reduction", "mean")
        if reduction == "mean":
            with np.errstate(invalid="ignore", divide="ignore"):
                loss = loss.sum() / share.sum()
        return narrow(loss.sum() if reduction == "sum" else loss, inputs[0].dtype)


class NegativeLogLikelihoodLoss(Likelihood):
    """ONNX NegativeLogLikelihoodLoss: the scores are log probabilities."""

    name = "NegativeLogLikelihoodLoss"
    arity = (2, 3)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        return super().infer(node, types, constants)[:1]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [self._loss(node, wide(inputs[0]).astype(np.float64), inputs)]


class SoftmaxCrossEntropyLoss(Likelihood):
    """ONNX SoftmaxCrossEntropyLoss; a second output is the log probabilities.

    The mean over float32 logits [batch, classes] and int64 labels, neither weighed nor ignored, has kernels and a gradient.
    """

    name = "SoftmaxCrossEntropyLoss"
    arity = (2, 3)
    differentiable = True

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        log_probability = log_softmax(inputs[0], axis=1)
        loss = self._loss(node, log_probability, inputs)
        return [loss, narrow(log_probability, inputs[0].dtype)][: len(node.outputs)]

    def _plain(self, node: Node) -> bool:
        mean = node.attributes.get("reduction", "mean") == "mean" and "ignore_index" not in node.attributes
        return mean and not node.input(2) and len(node.outputs) == 1

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        need(self._plain(node), node, "has a gradient only as the plain mean over the batch")
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("SoftmaxCrossEntropyLossGrad", [dy, *node.inputs]))

    def bind(self, node: Node, binder: Binder) -> bool:
        logits, labels = map(binder.rows, node.inputs[:2])
        if not self._plain(node) or len(logits.shape) != 2 or labels.dtype != np.int64:
            return False
        binder.step(_core.cross_entropy, logits, labels, binder.output(node.outputs[0]))
        return True


class SoftmaxCrossEntropyLossGrad(LossGrad):
    """dlogits = dloss * (softmax(logits) - one_hot(labels)) / batch."""

    name = "SoftmaxCrossEntropyLossGrad"
    loss = SoftmaxCrossEntropyLoss
    arity = (3, 3)

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        check_labels(node, *types[1:])
        return super().infer(node, types, constants)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dloss, logits, labels = inputs
        return [(dloss * (softmax(logits) - one_hot(labels, logits.shape[-1])) / len(logits)).astype(FLOAT)]

    def bind(self, node: Node, binder: Binder) -> bool:
        binder.step(_core.cross_entropy_grad, *map(binder.rows, node.inputs), binder.output(node.outputs[0]))
        return True


class MeanSquaredError(Op):
    """mean((x - target)^2) over all elements."""

    name = "MeanSquaredError"
    domain = OWN
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        check_pair(node, types)
        return [SCALAR]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, target = inputs
        return [np.asarray(((x.astype(np.float64) - target) ** 2).mean(), FLOAT)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value, other in (node.inputs, node.inputs[::-1]):
            if tape.wants(value):
                tape.add(value, tape.emit("MeanSquaredErrorGrad", [dy, value, other]))

    def bind(self, node: Node, binder: Binder) -> bool:
        binder.step(_core.mean_squared_error, *map(binder.rows, node.inputs), binder.output(node.outputs[0]))
        return True


class MeanSquaredErrorGrad(LossGrad):
    """dx = dloss * 2 (x - target) / size."""

    name = "MeanSquaredErrorGrad"
    loss = MeanSquaredError
    arity = (3, 3)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dloss, x, target = inputs
        return [(dloss * 2.0 * (x.astype(np.float64) - target) / x.size).astype(FLOAT)]

    def bind(self, node: Node, binder: Binder) -> bool:
        binder.step(_core.mean_squared_error_grad, *map(binder.rows, node.inputs), binder.output(node.outputs[0]))
        return True


def cosines(x: Array, target: Array) -> tuple[Array, Array, Array]:
    """Return the cosine of each pair of rows, and 1 / norm of both, in float64; 0 where a row is of zeros."""
    x, target = x.astype(np.float64), target.astype(np.float64)
    norms = [np.sqrt((value * value).sum(axis=-1)) for value in (x, target)]
    a, b = (np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0) for norm in norms)
    return (x * target).sum(axis=-1) * a * b, a, b


class CosineLoss(Op):
    """mean(1 - cosine(x, target)) over rows, the cosine along the last axis; that of a row of zeros is 0."""

    name = "CosineLoss"
    domain = OWN
    arity = (2, 2)
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        check_pair(node, types)
        assert types[0] is not None
        need(len(types[0].shape) >= 1, node, f"{types[0]} has no last axis")
        return [SCALAR]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [np.asarray((1.0 - cosines(*inputs)[0]).mean(), FLOAT)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        for value, other in (node.inputs, node.inputs[::-1]):
            if tape.wants(value):
                tape.add(value, tape.emit("CosineLossGrad", [dy, value, other]))

    def bind(self, node: Node, binder: Binder) -> bool:
        x, target = (value.reshape(*as_rows(value.shape)) for value in map(binder.rows, node.inputs))
        binder.step(_core.cosine, x, target, binder.output(node.outputs[0]))
        return True


class CosineLossGrad(LossGrad):
    """dx = -dloss / rows * (target / (|x| |target|) - cosine * x / |x|^2)."""

    name = "CosineLossGrad"
    loss = CosineLoss
    arity = (3, 3)

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dloss, x, target = inputs
        cosine, a, b = (value[..., None] for value in cosines(x, target))
        return [(-dloss / cosine.size * (target * (a * b) - x * (cosine * a * a))).astype(FLOAT)]

    def bind(self, node: Node, binder: Binder) -> bool:
        dloss, *pair = map(binder.rows, node.inputs)
        x, target, dx = (value.reshape(*as_rows(value.shape)) for value in (*pair, binder.output(node.outputs[0])))
        binder.step(_core.cosine_grad, dloss, x, target, dx)
        return True


class DistillationLoss(Op):
    """alpha T^2 KL(softmax(teacher / T) || softmax(logits / T)) + (1 - alpha) cross entropy (Hinton et al. 2015).

    Inputs logits [batch, classes], teacher [batch, classes], labels int64 [batch].
    """

    name = "DistillationLoss"
    domain = OWN
    arity = (3, 3)
    attributes = {"temperature": float, "alpha": float}
    differentiable = True

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        check_distillation(node, *types)
        return [SCALAR]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        logits, teacher, labels = inputs
        t, alpha = node.attributes["temperature"], node.attributes["alpha"]
        target, log_student = softmax(teacher / t), log_softmax(logits / t)
        divergence = (target * (log_softmax(teacher / t) - log_student)).sum(axis=-1).mean()
        return [np.asarray(alpha * t * t * divergence + (1 - alpha) * mean_cross_entropy(logits, labels), FLOAT)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        need(not tape.wants(node.inputs[1]), node, "the teacher must not depend on what is differentiated")
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit("DistillationLossGrad", [dy, *node.inputs], node.attributes))

    def bind(self, node: Node, binder: Binder) -> bool:
        bind_distillation(_core.distillation, node, binder)
        return True


class DistillationLossGrad(LossGrad):
    """dlogits = dloss * (alpha T (softmax(logits/T) - softmax(teacher/T)) + (1-alpha) (softmax(logits) - one_hot)) / batch."""

    name = "DistillationLossGrad"
    loss = DistillationLoss
    arity = (4, 4)
    attributes = DistillationLoss.attributes

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dloss, logits, teacher, labels = inputs
        t, alpha = node.attributes["temperature"], node.attributes["alpha"]
        soft = alpha * t * (softmax(logits / t) - softmax(teacher / t))
        hard = (1 - alpha) * (softmax(logits) - one_hot(labels, logits.shape[-1]))
        return [(dloss * (soft + hard) / len(logits)).astype(FLOAT)]

    def bind(self, node: Node, binder: Binder) -> bool:
        bind_distillation(_core.distillation_grad, node, binder)
        return True


def bind_distillation(kernel: Any, node: Node, binder: Binder) -> None:
    t, alpha = node.attributes["temperature"], node.attributes["alpha"]
    binder.step(kernel, *map(binder.rows, node.inputs), t, alpha, binder.output(node.outputs[0]))


OPERATORS = (
    NegativeLogLikelihoodLoss,
    SoftmaxCrossEntropyLoss,
    SoftmaxCrossEntropyLossGrad,
    MeanSquaredError,
    MeanSquaredErrorGrad,
    CosineLoss,
    CosineLossGrad,
    DistillationLoss,
    DistillationLossGrad,
)
