"""Fused multi-head attention, softmax(scale q k^T) v for each head, over padded batches or packed texts, and its gradients.

Heads lie side by side in the columns, as a linear layer makes them: no transpose before or after. Vaswani et al., "Attention is
all you need", 2017.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gristmill import _core
from gristmill.ops.op import GRAD, OWN, Binder, Node, Op, Tape, TensorType, need, same_dim, same_type
from gristmill.tensor import Tensor
from gristmill.tensor.parts import Array

ATTRIBUTES = {"heads": int, "scale": float}


def scale_of(node: Node, columns: int) -> float:
    """The factor of the scores: 1 / sqrt(width of a head) unless the node says."""
    return float(node.attributes.get("scale", (columns // node.attributes["heads"]) ** -0.5 if columns else 1.0))


def precision_of(binder: Binder) -> str:
    """bf16 where the session allows it and the CPU multiplies it."""
    has_bf16 = _core.slots()["attention_product_bf16"][0] != "scalar"
    return "bf16" if binder.low_precision and has_bf16 else "float32"


def check_heads(node: Node, columns: Any) -> None:
    heads, scale = node.attributes.get("heads", 0), node.attributes.get("scale", 1.0)
    need(heads >= 1, node, f"its attribute heads must be at least 1, got {heads}")
    need(0 < scale < float("inf"), node, f"its attribute scale must be positive and finite, got {scale}")
    need(isinstance(columns, str) or columns % heads == 0, node, f"{columns} columns do not divide by {heads} heads")


def split(x: Array, heads: int) -> Array:
    """[rows, heads * width] to [heads, rows, width], in float64."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1).astype(np.float64)


def join(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def probabilities(q: Array, k: Array, scale: float) -> Array:
    scores = scale * (q @ k.swapaxes(-1, -2))
    e = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def attend(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """Attention of one text: q [rows, columns], k and v [keys, columns]."""
    if not q.size or not len(k):
        return np.zeros_like(q)
    q, k, v = (split(x, heads) for x in (q, k, v))
    return join(probabilities(q, k, scale) @ v)


def attend_grad(dy: Array, q: Array, k: Array, v: Array, heads: int, scale: float) -> tuple[Array, Array, Array]:
    if not q.size or not len(k):
        return np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dy, q, k, v = (split(x, heads) for x in (dy, q, k, v))
    p = probabilities(q, k, scale)
    dp = dy @ v.swapaxes(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    return join(ds @ k), join(ds.swapaxes(-1, -2) @ q), join(p.swapaxes(-1, -2) @ dy)


def attended(mask: Array | None, keys: int, scale: float) -> tuple[Array, float]:
    """The indices of the keys that count, and the scale; where a mask names none, all of them, with equal weights."""
    chosen = np.arange(keys) if mask is None else np.flatnonzero(mask)
    return (chosen, scale) if len(chosen) or not keys else (np.arange(keys), 0.0)


def segments(offsets: Array, rows: int) -> Iterator[slice]:
    """What offsets mean, whatever they hold: each no less than the one before, all within [0, rows]."""
    bounds = np.maximum.accumulate(np.clip(offsets, 0, rows)).tolist()
    return (slice(begin, end) for begin, end in pairwise(bounds))


class _Attention(Op):
    """What the four operators share. The last input is a mask or offsets."""

    domain = OWN
    attributes = ATTRIBUTES
    gradients = 0  # how many of the first inputs are gradients of the output

    def infer(self, node: Node, types: Sequence[TensorType | None], constants: Sequence[Tensor | None]) -> list[TensorType]:
        q, k, v = types[self.gradients : self.gradients + 3]
        guide = types[self.gradients + 3] if len(types) > self.gradients + 3 else None
        assert q is not None
        assert k is not None
        need(all(x is not None and x.dtype == np.float32 for x in (q, k, v)), node, f"q, k, v must be float32: {q}, {k}, {v}")
        self.check(node, q, k, guide)
        need(same_type(k, v), node, f"k is {k} but v is {v}: they must be equal")
        check_heads(node, q.shape[-1])
        if not self.gradients:
            return [q]
        need(same_type(types[0], q), node, f"dy is {types[0]} but q is {q}")
        return [q, k, k]

    def check(self, node: Node, q: TensorType, k: TensorType, guide: TensorType | None) -> None:
        """Check q against k, and the mask or the offsets."""
        raise NotImplementedError

    def gradient(self, node: Node, tape: Tape, dy: str) -> None:
        if not any(map(tape.wants, node.inputs[:3])):
            return
        made = tape.emit_all(node.op + "Grad", [dy, *node.inputs], dict(node.attributes), outputs=3)
        for value, gradient in zip(node.inputs[:3], made, strict=True):
            if tape.wants(value):
                tape.add(value, gradient)


class _Masked(_Attention):
    def check(self, node: Node, q: TensorType, k: TensorType, guide: TensorType | None) -> None:
        fits = len(q.shape) == len(k.shape) == 3 and same_dim(q.shape[0], k.shape[0]) and same_dim(q.shape[2], k.shape[2])
        need(fits, node, f"q is {q} but k is {k}: they must be [batch, length, columns] with equal batch and columns")
        if guide is None:
            return
        fits = len(guide.shape) == 2 and all(map(same_dim, guide.shape, k.shape))
        need(fits, node, f"mask is {guide} but k is {k}: it must be [batch, keys]")
        need(guide.dtype in (np.int64, np.bool_), node, f"mask is {guide}: it must be int64 or bool")


class MaskedAttention(_Masked):
    """Inputs q [batch, length, columns], k and v [batch, keys, columns], optional mask [batch, keys] (int64 or bool; not 0:
    attend to this key); output as q; attributes heads, and scale (1 / sqrt(columns / heads)).

    A masked key weighs exactly 0. A sequence whose mask names no key attends to all of them alike, as it does where a mask is
    the addition of the lowest finite number: its output is the mean of v.
    """

    name = "MaskedAttention"
    arity = (3, 4)
    differentiable = True

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        q, k, v, mask = (*inputs, None)[:4]
        heads, out = node.attributes["heads"], np.empty_like(q)
        for i in range(len(q)):
            chosen, scale = attended(None if mask is None else mask[i], k.shape[1], scale_of(node, q.shape[2]))
            out[i] = attend(q[i], k[i][chosen], v[i][chosen], heads, scale)
        return [out]

    def separable(
        self, node: Node, split: Sequence[bool], types: Sequence[TensorType | None], made: Sequence[TensorType]
    ) -> bool:
        return all(split)

    def bind(self, node: Node, binder: Binder) -> bool:
        q, k, v = map(binder.rows, node.inputs[:3])
        mask = binder.rows(node.input(3)) if node.input(3) else None
        heads, scale = node.attributes["heads"], scale_of(node, q.shape[2])
        scratch = binder.scratch(_core.attention_scratch(k.shape[1], q.shape[2] // heads, binder.threads))
        out = binder.output(node.outputs[0])
        binder.step(_core.masked_attention, q, k, v, mask, heads, scale, out, scratch, precision_of(binder))
        return True


class MaskedAttentionGrad(_Masked):
    """The gradients of MaskedAttention in q, k and v, from that of its output and its inputs; scores are computed anew."""

    name = "MaskedAttentionGrad"
    domain = GRAD
    arity = (4, 5)
    gradients = 1

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, q, k, v, mask = (*inputs, None)[:5]
        heads = node.attributes["heads"]
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for i in range(len(q)):
            chosen, scale = attended(None if mask is None else mask[i], k.shape[1], scale_of(node, q.shape[2]))
            dq[i], dk[i, chosen], dv[i, chosen] = attend_grad(dy[i], q[i], k[i][chosen], v[i][chosen], heads, scale)
        return [dq, dk, dv]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, q, k, v = map(binder.rows, node.inputs[:4])
        mask = binder.rows(node.input(4)) if node.input(4) else None
        heads, scale = node.attributes["heads"], scale_of(node, q.shape[2])
        outputs = map(binder.output, node.outputs)
        scratch = binder.scratch(_core.attention_scratch(k.shape[1], q.shape[2] // heads, binder.threads, True))
        binder.step(_core.masked_attention_grad, dy, q, k, v, mask, heads, scale, *outputs, scratch)
        return True


class _Packed(_Attention):
    def check(self, node: Node, q: TensorType, k: TensorType, guide: TensorType | None) -> None:
        need(len(q.shape) == 2 and same_type(q, k), node, f"q is {q} but k is {k}: they must be equal, [rows, columns]")
        fits = guide is not None and guide.dtype == np.int64 and len(guide.shape) == 1
        need(fits, node, f"offsets is {guide}: it must be int64 [segments + 1]")


class PackedAttention(_Packed):
    """Inputs q, k, v [rows, columns] and offsets [segments + 1] (int64): texts of uneven length one after the other, no padding.

    Rows offsets[s] to offsets[s + 1] attend to each other; rows before the first and after the last segment give 0. Offsets
    are read at every run and are not errors whatever they hold: each is taken as no less than the one before and as within
    [0, rows].
    """

    name = "PackedAttention"
    arity = (4, 4)
    differentiable = True

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        q, k, v, offsets = inputs
        heads, scale, out = node.attributes["heads"], scale_of(node, q.shape[1]), np.zeros_like(q)
        for part in segments(offsets, len(q)):
            out[part] = attend(q[part], k[part], v[part], heads, scale)
        return [out]

    def bind(self, node: Node, binder: Binder) -> bool:
        q, k, v, offsets = map(binder.rows, node.inputs)
        heads, scale = node.attributes["heads"], scale_of(node, q.shape[1])
        scratch = binder.scratch(_core.attention_scratch(q.shape[0], q.shape[1] // heads, binder.threads))
        out = binder.output(node.outputs[0])
        binder.step(_core.packed_attention, q, k, v, offsets, heads, scale, out, scratch, precision_of(binder))
        return True


class PackedAttentionGrad(_Packed):
    """The gradients of PackedAttention in q, k and v, from that of its output and its inputs."""

    name = "PackedAttentionGrad"
    domain = GRAD
    arity = (5, 5)
    gradients = 1

    def reference(self, node: Node, *inputs: Any) -> list[Array]:
        dy, q, k, v, offsets = inputs
        heads, scale = node.attributes["heads"], scale_of(node, q.shape[1])
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for part in segments(offsets, len(q)):
            dq[part], dk[part], dv[part] = attend_grad(dy[part], q[part], k[part], v[part], heads, scale)
        return [dq, dk, dv]

    def bind(self, node: Node, binder: Binder) -> bool:
        dy, q, k, v, offsets = map(binder.rows, node.inputs)
        heads, scale = node.attributes["heads"], scale_of(node, q.shape[1])
        outputs = map(binder.output, node.outputs)
        scratch = binder.scratch(_core.attention_scratch(q.shape[0], q.shape[1] // heads, binder.threads, True))
        binder.step(_core.packed_attention_grad, dy, q, k, v, offsets, heads, scale, *outputs, scratch)
        return True


OPERATORS = (MaskedAttention, MaskedAttentionGrad, PackedAttention, PackedAttentionGrad)
