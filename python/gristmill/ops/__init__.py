"""The operators: one instance each, by (domain, name). A new operator is its file and its line here."""

from gristmill.errors import ModelError
from gristmill.ops import activation, arithmetic, convolution, linear, loss, normalization, pooling, quantization
from gristmill.ops.op import GRAD, OWN, Node, Op, TensorType

_ALL: tuple[type[Op], ...] = (
    linear.Linear, linear.LinearGradInput, linear.LinearGradWeight, linear.SumRows,
    activation.Relu, activation.Gelu, activation.Tanh, activation.Sigmoid, activation.Swish, activation.ActivationGrad,
    arithmetic.Add, arithmetic.Mul, arithmetic.Identity, arithmetic.SumToShape,
    normalization.LayerNormalization, normalization.LayerNormalizationGrad,
    normalization.Softmax, normalization.SoftmaxGrad,
    loss.SoftmaxCrossEntropyLoss, loss.SoftmaxCrossEntropyLossGrad, loss.MeanSquaredError, loss.MeanSquaredErrorGrad,
    loss.DistillationLoss, loss.DistillationLossGrad,
    *convolution.OPERATORS, *pooling.OPERATORS, *quantization.OPERATORS,
)  # fmt: skip

OPS: dict[tuple[str, str], Op] = {(op.domain, op.name): op() for op in _ALL}


def find(node: Node) -> Op:
    """Return the operator of a node.

    Raises:
        ModelError: there is none of that name.
    """
    op = OPS.get((node.domain, node.op))
    if op is None:
        known = ", ".join(sorted(name for domain, name in OPS if domain == node.domain))
        raise ModelError(f"unknown operator {node.domain or 'ai.onnx'}::{node.op} (node '{node.name}'); known: {known}")
    return op


__all__ = ["GRAD", "OPS", "OWN", "Node", "Op", "TensorType", "find"]
