"""The operators: one instance each, by (domain, name).

A module of operators lists them in OPERATORS; a new module is its name here.
"""

from collections.abc import Sequence

from gristmill.errors import ModelError
from gristmill.ops import (
    activation,
    arithmetic,
    attention,
    batch,
    binary,
    boxes,
    cast,
    convolution,
    elementwise,
    embedding,
    fill,
    gather,
    heads,
    image,
    indexing,
    linear,
    loss,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    shape,
    signal,
    slicing,
    token_pooling,
)
from gristmill.ops.op import GRAD, OWN, Node, Op, TensorType, need, refusal
from gristmill.tensor import Tensor

_MODULES = (
    activation,
    arithmetic,
    attention,
    batch,
    binary,
    boxes,
    cast,
    convolution,
    elementwise,
    embedding,
    fill,
    gather,
    heads,
    image,
    indexing,
    linear,
    loss,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    shape,
    signal,
    slicing,
    token_pooling,
)

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


def types_made(node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
    """Return the types of a node's outputs by its operator's rule: one for each, of no negative extent.

    Raises:
        ModelError: the inputs or the attributes do not fit.
        Undetermined: the types depend on values that are not known.
    """
    op = find(node)
    try:
        made = op.infer(node, types, constants)
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
        raise refusal(node, error) from error
    need(len(made) == len(node.outputs), node, f"makes {len(made)} outputs, {len(node.outputs)} are named")
    for kind in made:
        need(all(isinstance(dim, str) or dim >= 0 for dim in kind.shape), node, f"would make {kind}")
    return made


__all__ = ["GRAD", "OPS", "OWN", "Node", "Op", "TensorType", "find", "types_made"]
