"""The places of tokens in their sequence, which index a table of learned positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.op import OWN, Node, Op, TensorType, need
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

INT64 = np.dtype(np.int64)


class Positions(Op):
    """The place of each token of int64 ids [batch, length], counted from `start`.

    With `padding` (the id of the padding token, as RoBERTa counts) such tokens are left out of the count and have place
    `start - 1`; without it the places follow from the shape alone and are known when a plan is made. Sequences of more than
    `limit` tokens are refused.
    """

    name = "Positions"
    domain = OWN
    arity = (1, 1)
    attributes = {"start": int, "padding": int, "limit": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        ids = types[0]
        assert ids is not None
        need(ids.dtype == INT64 and len(ids.shape) == 2, node, f"ids must be int64 [batch, length], got {ids}")
        length, limit = ids.shape[1], node.attributes.get("limit")
        fits = limit is None or isinstance(length, str) or length <= limit
        need(fits, node, f"'{node.inputs[0]}' has {length} tokens in a sequence, the model takes {limit} at most")
        return [ids]

    def known(self, node: Node, types: Sequence[TensorType | None], values: Sequence[Array | None]) -> list[Array] | None:
        if "padding" in node.attributes:
            return super().known(node, types, values)
        assert types[0] is not None
        return [positions(np.empty(types[0].extents, INT64), node.attributes.get("start", 0))]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return True

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [positions(inputs[0], node.attributes.get("start", 0), node.attributes.get("padding"))]


def positions(ids: Array, start: int, padding: int | None = None) -> Array:
    """Return the places of tokens along the last axis."""
    if padding is None:
        return np.broadcast_to(np.arange(start, start + ids.shape[-1], dtype=INT64), ids.shape)
    real = ids != padding
    return np.cumsum(real, axis=-1, dtype=INT64) * real + (start - 1)


OPERATORS = (Positions,)
