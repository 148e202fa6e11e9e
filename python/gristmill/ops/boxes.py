"""Boxes around what is in images: NonMaxSuppression."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.ops.axes import at, first
from gristmill.ops.dtypes import INT64, wide
from gristmill.ops.op import Node, Op, TensorType, fresh_dim, need, same_dim
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array


class NonMaxSuppression(Op):
    """The boxes of each class by falling score, but for those that overlap a chosen one too much: rows (batch, class, box).

    Inputs boxes [batch, n, 4], scores [batch, classes, n] and, optional scalars, how many at most for each class (default 0),
    the overlap (intersection over union) and the score from which on a box goes or counts.
    """

    name = "NonMaxSuppression"
    arity = (2, 5)
    attributes = {"center_point_box": int}

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        boxes, scores = first(types), types[1]
        assert scores is not None
        fits = len(boxes.shape) == 3 and len(scores.shape) == 3 and same_dim(boxes.shape[-1], 4)
        need(fits, node, f"boxes are {boxes}, scores {scores}")
        return [TensorType(INT64, (fresh_dim(node, 0), 3))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        boxes, scores = (wide(x).astype(np.float64) for x in inputs[:2])
        most, overlap, lowest = (None if at(inputs, i) is None else inputs[i].reshape(-1)[0] for i in (2, 3, 4))
        if node.attributes.get("center_point_box", 0):
            centre, half = boxes[..., :2], boxes[..., 2:] / 2
            low, high = centre - half, centre + half
        else:
            low, high = np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])
        rows = [
            (batch, kind, box)
            for batch in range(scores.shape[0])
            for kind in range(scores.shape[1])
            for box in chosen(low[batch], high[batch], scores[batch, kind], int(most or 0), float(overlap or 0), lowest)
        ]
        return [np.array(rows, INT64).reshape(-1, 3)]


def chosen(low: Array, high: Array, scores: Array, most: int, overlap: float, lowest: float | None) -> list[int]:
    """The boxes to keep by falling score: each removes those that share more than `overlap` of their union with it."""
    left = np.argsort(-scores, kind="stable")
    left = left if lowest is None else left[scores[left] > lowest]
    area = np.prod(high - low, axis=-1)
    kept: list[int] = []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(int(best))
        sides = np.minimum(high[best], high[left]) - np.maximum(low[best], low[left])
        shared = np.prod(np.maximum(sides, 0), axis=-1)
        union = area[best] + area[left] - shared
        left = left[np.divide(shared, union, out=np.zeros_like(shared), where=union > 0) <= overlap]
    return kept


OPERATORS = (NonMaxSuppression,)
