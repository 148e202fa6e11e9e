"""From the vectors of tokens to one vector for each sequence: mean, maximum, first token and their kin.

Each comes in two forms: over a padded batch with a mask, and over packed rows, where `offsets` says which row begins each segment.
Modes: "mean"; "sqrt": the sum over the square root of the count; "weighted": the mean weighted by place, 1 for the first;
"max"; "first". A sequence without tokens gives zeros.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gristmill import _core
from gristmill.ops.op import GRAD, OWN, Binder, Node, Op, Tape, TensorType, fresh_dim, need, same_dim, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)
MODES = ("mean", "sqrt", "weighted", "max", "first")


def weights(mode: str, mask: Array) -> Array:
    """Return float64 weights [batch, length] by which tokens are summed; not for "max"."""
    wide = (mask != 0).astype(np.float64)
    if mode == "first":
        return wide * (np.cumsum(wide, axis=-1) == 1)
    if mode == "weighted":
        wide = wide * np.arange(1, mask.shape[-1] + 1)
    total = wide.sum(axis=-1, keepdims=True)
    total = np.sqrt(total) if mode == "sqrt" else total
    return np.divide(wide, total, out=np.zeros_like(wide), where=total > 0)


def pool(mode: str, x: Array, mask: Array) -> Array:
    """Pool x [batch, length, n] by a mask [batch, length]."""
    if mode != "max":
        return np.einsum("bs,bsn->bn", weights(mode, mask), np.where(mask[..., None] != 0, x, 0)).astype(x.dtype)
    if not x.shape[1]:
        return np.zeros((x.shape[0], x.shape[2]), x.dtype)
    best = np.where(mask[..., None] != 0, x, -np.inf).max(axis=1)
    return np.where((mask != 0).any(axis=1)[:, None], best, 0).astype(x.dtype)


def pool_grad(mode: str, dy: Array, x: Array, mask: Array) -> Array:
    """Return the gradient in x; that of a maximum goes to the first token that reaches it."""
    if mode != "max":
        return (weights(mode, mask)[..., None] * dy[:, None, :]).astype(x.dtype)
    grad = np.zeros(x.shape, x.dtype)
    if x.shape[1]:
        where = np.where(mask[..., None] != 0, x, -np.inf).argmax(axis=1)[:, None, :]
        np.put_along_axis(grad, where, dy[:, None, :], axis=1)
    return grad * (mask[..., None] != 0)


def padded(rows: Array, offsets: Array) -> tuple[Array, Array]:
    """Return packed rows as a padded batch, and its mask."""
    lengths = np.diff(offsets)
    places = np.arange(lengths.max(initial=0))
    mask = places < lengths[:, None]
    return rows[np.where(mask, offsets[:-1, None] + places, 0)] if len(rows) else rows[np.empty(mask.shape, int)], mask


class Pool(Op):
    """One vector for each sequence."""

    domain = OWN
    arity = (2, 2)
    attributes = {"mode": str}
    differentiable = True
    packed: ClassVar[bool]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        x, by = types
        assert x is not None
        assert by is not None
        need(node.attributes.get("mode", "mean") in MODES, node, f"unknown mode {node.attributes.get('mode')!r}; known: {MODES}")
        rank = 2 if self.packed else 3
        need(x.dtype == FLOAT and len(x.shape) == rank, node, f"x must be float32 of rank {rank}, got {x}")
        if not self.packed:
            fits = by.dtype in (INT64, np.bool_) and len(by.shape) == 2 and all(map(same_dim, by.shape, x.shape))
            need(fits, node, f"the mask must be int64 or bool [{x.shape[0]}, {x.shape[1]}], got {by}")
            return [TensorType(FLOAT, (x.shape[0], x.shape[2]))]
        fits = by.dtype == INT64 and len(by.shape) == 1 and by.shape[0] != 0
        need(fits, node, f"offsets must be int64 [segments + 1], got {by}")
        ends = by.shape[0]
        return [TensorType(FLOAT, (fresh_dim(node, 0) if isinstance(ends, str) else ends - 1, x.shape[1]))]

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        x, mask = padded(*inputs) if self.packed else inputs
        return [pool(node.attributes.get("mode", "mean"), x, mask)]

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if tape.wants(node.inputs[0]):
            tape.add(node.inputs[0], tape.emit(f"{self.name}Grad", [dy, *node.inputs], node.attributes))

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return not self.packed and all(split)

    def bind(self, node: Node, binder: Binder) -> bool:
        kernel = _core.packed_pool if self.packed else _core.masked_pool
        x, by = map(binder.rows, node.inputs)
        binder.step(kernel, node.attributes.get("mode", "mean"), x, by, binder.output(node.outputs[0]))
        return True


class MaskedPool(Pool):
    """x float32 [batch, length, n] and mask int64 or bool [batch, length] give [batch, n]."""

    name = "MaskedPool"
    packed = False


class PackedPool(Pool):
    """x float32 [rows, n] and offsets int64 [segments + 1], rising from 0, give [segments, n]; rows past the last are unread."""

    name = "PackedPool"
    packed = True


class PoolGrad(Op):
    """The gradient of Pool in x."""

    domain = GRAD
    arity = (3, 3)
    attributes = {"mode": str}
    pool: ClassVar[type[Pool]]

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        made = self.pool().infer(node, types[1:], constants[1:])
        need(same_type(types[0], made[0]), node, f"dy is {types[0]}, the output is {made[0]}")
        assert types[1] is not None
        return [types[1]]

    def bind(self, node: Node, binder: Binder) -> bool:
        kernel = _core.packed_pool_grad if self.pool.packed else _core.masked_pool_grad
        binder.step(kernel, node.attributes.get("mode", "mean"), *map(binder.rows, node.inputs), binder.output(node.outputs[0]))
        return True


class MaskedPoolGrad(PoolGrad):
    name = "MaskedPoolGrad"
    pool = MaskedPool

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        return [pool_grad(node.attributes.get("mode", "mean"), *inputs)]


class PackedPoolGrad(PoolGrad):
    name = "PackedPoolGrad"
    pool = PackedPool

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, x, offsets = inputs
        batch, mask = padded(x, offsets)
        grad = np.zeros_like(x)
        grad[: int(offsets[-1])] = pool_grad(node.attributes.get("mode", "mean"), dy, batch, mask)[mask]
        return [grad]


OPERATORS = (MaskedPool, PackedPool, MaskedPoolGrad, PackedPoolGrad)
