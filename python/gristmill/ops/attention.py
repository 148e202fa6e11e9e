"""Attention over a padded batch with a mask, and over packed rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.op import OWN, Node, Op, TensorType, need, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


def attend(q: Array, k: Array, v: Array, mask: Array | None, heads: int, scale: float) -> Array:
    b, s, n = q.shape
    parts = [x.reshape(b, x.shape[1], heads, n // heads).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = (parts[0] @ parts[1].transpose(0, 1, 3, 2)).astype(np.float64) * scale
    if mask is not None:
        scores = np.where(mask[:, None, None, :] != 0, scores, -1e30)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e30))
    scores = scores / np.maximum(scores.sum(axis=-1, keepdims=True), 1e-30)
    return (scores.astype(q.dtype) @ parts[2]).transpose(0, 2, 1, 3).reshape(b, s, n)


class MaskedAttention(Op):
    name = "MaskedAttention"
    domain = OWN
    arity = (3, 4)
    attributes = {"heads": int, "scale": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        need(same_type(types[1], types[2]), node, f"k is {types[1]} but v is {types[2]}")
        assert types[0] is not None
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        q, k, v, mask = (*inputs, None)[:4]
        return [attend(q, k, v, mask, node.attributes["heads"], node.attributes["scale"])]


class PackedAttention(Op):
    name = "PackedAttention"
    domain = OWN
    arity = (4, 4)
    attributes = {"heads": int, "scale": float}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        assert types[0] is not None
        return [types[0]]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        q, k, v, offsets = inputs
        out = np.zeros_like(q)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            part = [x[None, begin:end] for x in (q, k, v)]
            if end > begin:
                out[begin:end] = attend(*part, None, node.attributes["heads"], node.attributes["scale"])[0]
        return [out]


OPERATORS = (MaskedAttention, PackedAttention)
