"""The operators: one instance each, by (domain, name).

A module of operators lists them in OPERATORS; a new module is its name here.
"""

from gristmill.errors import ModelError
from gristmill.ops import activation, arithmetic, attention, embedding, gather, linear, loss, normalization, token_pooling
from gristmill.ops.op import GRAD, OWN, Node, Op, TensorType

_MODULES = (activation, arithmetic, attention, embedding, gather, linear, loss, normalization, token_pooling)

OPS: dict[tuple[str, str], Op] = {(op.domain, op.name): op() for module in _MODULES for op in module.OPERATORS}


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
