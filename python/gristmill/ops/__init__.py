"""The operators: one instance each, by (domain, name).

A module of operators lists them in OPERATORS; a new module is its name in WIDE. Those of CORE, which multilayer perceptrons and
encoders are made of, are imported at once, all others when a graph has the first operator that is none of them.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gristmill.errors import ModelError
from gristmill.ops import (
    activation,
    arithmetic,
    attention,
    embedding,
    gather,
    linear,
    loss,
    normalization,
    shape,
    token_pooling,
)
from gristmill.ops.op import GRAD, OWN, Node, Op, TensorType, need, refusal
from gristmill.tensor import Tensor

if TYPE_CHECKING:
    OPS: dict[tuple[str, str], Op]

CORE = (activation, arithmetic, attention, embedding, gather, linear, loss, normalization, shape, token_pooling)
WIDE = (
    "batch", "binary", "boxes", "cast", "convolution", "elementwise", "fill", "heads", "image", "indexing", "matmul", "pooling",
    "quantization", "recurrent", "reduction", "signal", "slicing",
)  # fmt: skip

_imported: dict[tuple[str, str], Op] = {(op.domain, op.name): op() for module in CORE for op in module.OPERATORS}
_waiting = list(WIDE)


def _all() -> dict[tuple[str, str], Op]:
    """Return all operators, after importing the modules that nobody asked for so far."""
    for name in tuple(_waiting):
        module = import_module(f"gristmill.ops.{name}")
        _imported.update({(op.domain, op.name): op() for op in module.OPERATORS if (op.domain, op.name) not in _imported})
        if name in _waiting:
            _waiting.remove(name)
    return _imported


def __getattr__(name: str) -> Any:
    """Give OPS, all operators, on first use."""
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _all()


def find(node: Node) -> Op:
    """Return the operator of a node.

    Raises:
        ModelError: there is none of that name.
    """
    key = node.domain, node.op
    op = _imported.get(key) or _all().get(key)
    if op is None:
        known = ", ".join(sorted(name for domain, name in _all() if domain == node.domain))
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
